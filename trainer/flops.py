"""How much arithmetic an optimiser step is, and how much of it the machine could do.

Counted are matrix products, two operations a multiplication with addition; the element-wise rest is small beside them.
"""

import time
from dataclasses import dataclass

import torch

from drafters.config import Eagle3Config
from trainer.rollout import Batch

_SIZE = 512  # rows and columns of the timed product
_TIMED_S = 0.03


@dataclass(frozen=True)
class Speed:
    """What optimiser steps took and did."""

    seconds: float = 0.0
    tokens: int = 0  # rollout starts
    flops: int = 0  # of one worker

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(self.seconds + other.seconds, self.tokens + other.tokens, self.flops + other.flops)

    def per_s(self, peak: float) -> dict[str, float]:
        """Tokens trained on per second and share of the `peak` [operations/s]; empty before the first step."""
        if not self.seconds:
            return {}
        return {"tokens_per_s": self.tokens / self.seconds, "share_of_peak": self.flops / self.seconds / peak}


def step_flops(config: Eagle3Config, batch: Batch) -> int:
    """Floating-point operations of the matrix products of one `Learner.step` on `batch`.

    A trained weight is used once forward and twice backward (its own gradient and its input's); the first layer over
    the target's states has no input that needs a gradient, nor has the target's head any backward pass.
    """
    h, draft_vocab = config.hidden_size, config.draft_vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows, judged = len(batch.context.next_ids), len(batch.target_hidden)
    nodes = [len(level.parent) for level in batch.nodes]
    every_node = 2 * h * q + q * h + 3 * h * config.intermediate_size + h * draft_vocab
    keys_values = 2 * h * 2 * kv * (rows + sum(nodes[1:]))  # depth 0 is a context row
    trained = 3 * (sum(nodes) * every_node + keys_values)
    fuse, judge = 2 * rows * 3 * h * h, judged * h * draft_vocab
    return 2 * (trained + fuse + judge + 3 * _attention(batch, q))


def _attention(batch: Batch, width: int) -> int:
    """Multiplications of scores and weighted values over the context rows, forward."""
    products = 0
    for level in batch.nodes:
        for i in range(len(level.bounds) - 1):
            in_nodes = level.bounds[i + 1] - level.bounds[i]
            in_rows = batch.context.bounds[i + 1] - batch.context.bounds[i]
            products += 2 * in_nodes * in_rows * width
    return products


def measure_peak(bf16: bool, device: str) -> float:
    """Operations per second of a square matrix product in the training precision: the fastest of a few tens of ms."""
    a = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    best_s, end = float("inf"), 0.0
    _timed(a)  # the first one also sets up
    while time.perf_counter() < end or not end:
        end = end or time.perf_counter() + _TIMED_S
        best_s = min(best_s, _timed(a))
    return 2 * _SIZE**3 / best_s


def _timed(a: torch.Tensor) -> float:
    began = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for a GPU
    return time.perf_counter() - began
