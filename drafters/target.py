"""The parts of the target that drafting and learning need, read from its safetensors files (sharded ones too).

Only the embedding, the output head, the final norm and the last decoder layer are read. They are frozen: no tensor here
requires a gradient, and a drafter copies what it starts from.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from drafters.config import check_target, read_target_config

_LAYER_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@dataclass(frozen=True)
class TargetWeights:
    """What is read of one target. V = its vocabulary, H = its hidden size; all tensors are float32."""

    name: str  # the directory it was read from
    config: dict[str, Any]  # its config.json
    embed_tokens: Tensor  # [V, H]
    lm_head: Tensor  # [V, H]; the same tensor as embed_tokens when the target ties them
    norm: Tensor  # [H]
    last_layer: dict[str, Tensor]  # "self_attn.q_proj.weight" ... of the last decoder layer
    special_ids: tuple[int, ...]  # begin, end and padding tokens

    @classmethod
    def load(cls, model_dir: Path, device: str = "cpu") -> "TargetWeights":
        """Read a target. Raises ValueError naming the file or key that is missing or not supported."""
        config = read_target_config(model_dir)
        check_target(config)
        last = f"model.layers.{config['num_hidden_layers'] - 1}."
        layer_keys = [f"{last}{part}.weight" for part in _LAYER_PARTS]
        tied = bool(config.get("tie_word_embeddings"))
        head_key = "model.embed_tokens.weight" if tied else "lm_head.weight"
        tensors = _read(model_dir, {"model.embed_tokens.weight", head_key, "model.norm.weight", *layer_keys}, device)
        return cls(
            name=str(model_dir),
            config=config,
            embed_tokens=tensors["model.embed_tokens.weight"],
            lm_head=tensors[head_key],
            norm=tensors["model.norm.weight"],
            last_layer={key.removeprefix(last): tensors[key] for key in layer_keys},
            special_ids=_special_ids(model_dir, config),
        )

    @property
    def fingerprint(self) -> str:
        """Identity of the target, hex: SHA-256 of its final norm and its first embeddings."""
        return hashlib.sha256(torch.cat([self.norm[None], self.embed_tokens[:64]]).cpu().numpy().tobytes()).hexdigest()


def read_layers(model_dir: Path, layers: tuple[int, ...], device: str = "cpu") -> list[dict[str, Tensor]]:
    """Some decoder layers, each as `TargetWeights.last_layer`. Raises ValueError naming a tensor that is missing."""
    keys = {(layer, part): f"model.layers.{layer}.{part}.weight" for layer in layers for part in _LAYER_PARTS}
    tensors = _read(model_dir, set(keys.values()), device)
    return [{f"{part}.weight": tensors[keys[layer, part]] for part in _LAYER_PARTS} for layer in layers]


def _read(model_dir: Path, keys: set[str], device: str) -> dict[str, Tensor]:
    """The named tensors in float32, from whichever files hold them."""
    tensors = {}
    for path in _weight_files(model_dir):
        with safe_open(path, framework="pt", device=device) as file:
            for key in keys & set(file.keys()):
                tensors[key] = file.get_tensor(key).to(torch.float32)
    missing = sorted(keys - tensors.keys())
    if missing:
        raise ValueError(f"{model_dir}: no tensor {missing[0]}; quantised and non-Llama layouts cannot teach a drafter")
    return tensors


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model_dir}: no .safetensors file; export the model to safetensors first")
    return files


def _special_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end or pad a text, from config.json and generation_config.json; each may be one id or a list."""
    generation = model_dir / "generation_config.json"
    sources = [config, json.loads(generation.read_text()) if generation.is_file() else {}]
    found: set[int] = set()
    for source in sources:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = source.get(key)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(t for t in found if 0 <= t < config["vocab_size"]))
