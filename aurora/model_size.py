"""What a target takes of a machine, from its directory: weights, keys and values, and its drafter's training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora.config import UserError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
_DRAFT_VOCAB = 8192  # `speculation.draft_vocab`
_TRAINED = 16  # bytes of a trained parameter in fp32: itself, its gradient, two moments of Adam
_FROZEN = 4  # of one of the target's embedding and head, which the trainer holds in fp32


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a target and of its drafter's training."""

    name: str
    weight_bytes: int
    kv_token_bytes: int  # keys and values of one token in all layers
    heads: int  # of attention
    trainer_bytes: int  # tensors on the trainer's device, beside activations

    @classmethod
    def read(cls, directory: Path) -> "ModelSize":
        """From `config.json` and, where they are there, the sizes of the weights' files. Raises UserError."""
        try:
            config = json.loads((directory / "config.json").read_text())
            return cls.of(directory.name, config, _files_bytes(directory))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory}: {error!r}; give a model directory in Hugging Face format") from error

    @classmethod
    def of(cls, name: str, config: dict[str, Any], weight_bytes: int = 0) -> "ModelSize":
        """From a Llama-like target's `config.json`; weight_bytes: of its files, 0: as many as the config implies."""
        heads, each = (
            config["num_attention_heads"],
            _BYTES[config.get("torch_dtype") or config.get("dtype") or "bfloat16"],
        )
        width = config.get("head_dim") or config["hidden_size"] // heads
        kv_width = (config.get("num_key_value_heads") or heads) * width
        return cls(
            name,
            weight_bytes or each * target_parameters(config),
            2 * config["num_hidden_layers"] * kv_width * each,
            heads,
            _TRAINED * drafter_parameters(config) + _FROZEN * _ends(config),
        )


def target_parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama-like target, biases left out."""
    h, layers = config["hidden_size"], config["num_hidden_layers"]
    return int(_ends(config) + layers * (_attention(config, h) + 3 * h * config["intermediate_size"] + 2 * h) + h)


def drafter_parameters(config: dict[str, Any], draft_vocab: int = _DRAFT_VOCAB) -> int:
    """Trained parameters of the target's EAGLE-3 drafter."""
    h = config["hidden_size"]
    layer = _attention(config, 2 * h) + 3 * h * config["intermediate_size"] + 3 * h
    return int(3 * h * h + layer + h + h * min(draft_vocab, config["vocab_size"]))


def _attention(config: dict[str, Any], inputs: int) -> int:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    q, kv = heads * width, (config.get("num_key_value_heads") or heads) * width
    return int(inputs * (q + 2 * kv) + q * config["hidden_size"])


def _ends(config: dict[str, Any]) -> int:
    """Parameters of embedding and head."""
    return int(config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2))


def _files_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
