"""Repairs of sampling on a CPU (vLLM 0.32): under speculation, and of requests with a seed.

`rejection_sampler.expand_batch_to_tokens` launches `expand_kernel`, whose CPU version fills an int64 copy of the
expanded temperature, top-k or top-p and drops it, so every sampled token under speculation is drawn from garbage. The
replacement expands with `repeat_interleave`. It is exact on every device and version, so it may stay installed when
vLLM no longer needs it; `tests/integration/test_sampling.py` fails while it is needed and missing.

A request with a seed whose prompt takes several steps ends the engine: vLLM samples after each part of the prompt,
throws the token away and winds the request's generator back, which generators on a CPU cannot do. `unseeded` keeps such
requests' generators out of the step, so that there is nothing to wind back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

AFFECTED_VERSIONS = ">=0.32,<0.34"


def expand_batch_to_tokens(
    x: "Tensor", cu_num_tokens: "Tensor", num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> "Tensor":
    """Repeat each request's value once for each of its draft tokens: x [B], cu_num_tokens [B] -> [num_tokens]."""
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)


def install() -> None:
    """Replace vLLM's function in this process. Raises RuntimeError when vLLM has moved it."""
    from vllm.v1.sample import rejection_sampler

    if not hasattr(rejection_sampler, "expand_batch_to_tokens"):
        raise RuntimeError(
            "vllm.v1.sample.rejection_sampler has no expand_batch_to_tokens: this vLLM is not one of "
            f"{AFFECTED_VERSIONS}, install one that is"
        )
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


@contextmanager
def unseeded(runner: Any) -> Iterator[None]:
    """While `runner` samples, requests whose token will be thrown away draw from the common generator."""
    batch = runner.input_batch
    discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    held = {i: batch.generators.pop(i) for i in discarded if i in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(held)
