"""Rotary position embedding in the NeoX layout (Su et al. 2021), with the `linear` and `llama3` frequency scalings."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Rotary(Protocol):
    """What the frequencies depend on (`Eagle3Config`, `DraftModelConfig`)."""

    @property
    def head_dim(self) -> int: ...
    @property
    def rope(self) -> Mapping[str, Any]: ...


def inverse_frequencies(config: Rotary) -> Tensor:
    """Radians a position for each pair of dimensions, [D / 2] float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / torch.pow(torch.tensor(float(config.rope["rope_theta"])), exponent)
    if config.rope["rope_type"] == "linear":
        return inv_freq / float(config.rope["factor"])
    return _llama3(inv_freq, config) if config.rope["rope_type"] == "llama3" else inv_freq


def _llama3(inv_freq: Tensor, config: Rotary) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high = float(config.rope["low_freq_factor"]), float(config.rope["high_freq_factor"])
    turns = float(config.rope["original_max_position_embeddings"]) * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * inv_freq + (1.0 - kept) * inv_freq / float(config.rope["factor"])


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate heads [n, heads, D] to positions [n]: dimension i pairs with i + D / 2."""
    angles = positions.to(torch.float32)[:, None] * inv_freq  # [n, D / 2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
