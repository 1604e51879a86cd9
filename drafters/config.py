"""The shape of an EAGLE-3 drafter: everything that decides which tensors it has and what its forward pass computes.

It is derived from the target's `config.json` (`Eagle3Config.for_target`). A target that vLLM's EAGLE-3 Llama drafter
cannot follow (other activation, partial rotary embedding, scaled or capped logits) is refused with a ValueError naming
the key.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPPORTED_TARGETS = ("llama", "mistral", "qwen2", "qwen3")
_SUPPORTED_ROPE = ("default", "linear", "llama3")
_MIN_LAYERS = 7  # below it the tapped layers coincide and vLLM taps fewer than three


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and constants that a drafter's decoder layers share with the target's."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # of the target
    rms_norm_eps: float
    max_position_embeddings: int
    rope: dict[str, Any] = field(hash=False)  # Hugging Face `rope_parameters`: rope_type, rope_theta, ...

    @staticmethod
    def sizes(target: dict[str, Any]) -> dict[str, Any]:
        """The fields above for the target whose `config.json` is `target`, by name."""
        heads = target["num_attention_heads"]
        return {
            "hidden_size": target["hidden_size"],
            "intermediate_size": target["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": target.get("num_key_value_heads") or heads,
            "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
            "vocab_size": target["vocab_size"],
            "rms_norm_eps": target["rms_norm_eps"],
            "max_position_embeddings": target["max_position_embeddings"],
            "rope": rope_parameters(target),
        }

    def hugging_face(self, layers: int, tied: bool = False) -> dict[str, Any]:
        """The same in a Hugging Face Llama's `config.json`, for that many layers; `tied`: the head is the embedding."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "num_hidden_layers": layers,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": self.rope,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
        }


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(DecoderConfig):
    """Sizes and constants of one drafter. H = hidden_size; the drafter's input is 3 tapped target layers, [*, 3H]."""

    draft_vocab_size: int  # tokens that the drafter can propose, below vocab_size
    aux_layer_ids: tuple[int, int, int]  # tapped layers: states after that many decoder layers
    target_name: str = ""  # directory or hub name of the target
    target_architectures: tuple[str, ...] = ()

    @classmethod
    def for_target(cls, target: dict[str, Any], draft_vocab_size: int, target_name: str = "") -> "Eagle3Config":
        """The drafter of the target whose `config.json` is `target`. Raises ValueError when it cannot follow it."""
        check_target(target)
        if not 0 < draft_vocab_size < target["vocab_size"]:
            raise ValueError(
                f"draft_vocab {draft_vocab_size} must be below the target's vocabulary of {target['vocab_size']}: "
                "lower speculation.draft_vocab"
            )
        return cls(
            **cls.sizes(target),
            draft_vocab_size=draft_vocab_size,
            aux_layer_ids=default_aux_layers(target["num_hidden_layers"]),
            target_name=target_name,
            target_architectures=tuple(target.get("architectures") or ()),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the drafter's file, by name."""
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = {
            "self_attn.q_proj.weight": (q, 2 * h),
            "self_attn.k_proj.weight": (kv, 2 * h),
            "self_attn.v_proj.weight": (kv, 2 * h),
            "self_attn.o_proj.weight": (h, q),
            "mlp.gate_proj.weight": (self.intermediate_size, h),
            "mlp.up_proj.weight": (self.intermediate_size, h),
            "mlp.down_proj.weight": (h, self.intermediate_size),
            "input_layernorm.weight": (h,),
            "hidden_norm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        return {
            "fc.weight": (h, 3 * h),
            **{f"layers.0.{name}": shape for name, shape in layer.items()},
            "norm.weight": (h,),
            "lm_head.weight": (self.draft_vocab_size, h),
            "d2t": (self.draft_vocab_size,),
            "t2d": (self.vocab_size,),
        }


def default_aux_layers(layers: int) -> tuple[int, int, int]:
    """Tapped layers of a target with that many layers: vLLM's `get_eagle3_default_aux_hidden_state_layers`."""
    return (2, layers // 2, layers - 3)


def rope_parameters(target: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in the `rope_parameters` layout, also from the older `rope_theta` + `rope_scaling`."""
    rope = dict(target.get("rope_parameters") or target.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", target.get("rope_theta", 10000.0))
    return rope


def check_target(target: dict[str, Any]) -> None:
    """Raise ValueError naming the key of the target's config that an EAGLE-3 Llama drafter cannot follow."""
    rope = rope_parameters(target)
    wrong = {
        f"model_type {target.get('model_type')!r}": target.get("model_type") not in SUPPORTED_TARGETS,
        f"rope_type {rope['rope_type']!r}": rope["rope_type"] not in _SUPPORTED_ROPE,
        "partial_rotary_factor": rope.get("partial_rotary_factor", target.get("partial_rotary_factor") or 1.0) != 1.0,
        f"hidden_act {target.get('hidden_act')!r}": target.get("hidden_act", "silu") != "silu",
        "final_logit_softcapping": bool(target.get("final_logit_softcapping")),
        "logits_scaling": (target.get("logits_scaling") or target.get("logit_scale") or 1.0) != 1.0,
        f"num_hidden_layers {target.get('num_hidden_layers')}": target.get("num_hidden_layers", 0) < _MIN_LAYERS,
    }
    for what, refused in wrong.items():
        if refused:
            raise ValueError(
                f"no EAGLE-3 drafter for a target with {what}: use one of {', '.join(SUPPORTED_TARGETS)} with at least "
                f"{_MIN_LAYERS} layers, full rotary embedding, SiLU and plain logits, or serve with --no-speculation"
            )


def read_target_config(model_dir: Path) -> dict[str, Any]:
    """The target's `config.json`. Raises ValueError when it is missing or not JSON."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; give the directory of a Hugging Face model") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return config
