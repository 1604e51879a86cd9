"""What the swap does where the weights are, so that on a GPU nothing large crosses to the host between two steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BLOCK = 1 << 22  # words at a time: what is allocated for it is little beside a KV cache
_MIX = (-7046029254386353131, -4417276706812531889)  # odd numbers of splitmix64, as signed


@contextmanager
def beside_serving(device: torch.device) -> Iterator[None]:
    """Copies of the body go through a stream of their own and are done when this ends; a CPU has no streams."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def placed(value: Tensor, live: Tensor) -> Tensor:
    """`value` where the live parameter is and in its type; from the host through pinned memory."""
    if live.device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(live.device, non_blocking=True).to(live.dtype)
    return value.to(live.device, live.dtype)


def fingerprint(tensor: Tensor) -> Tensor:
    """[1] int64, computed where the tensor is: another for every change of one 8-byte word, and for nearly all others.

    The sum, modulo 2 to the 64, of the words, each mixed one-to-one in a way that depends on its place.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
    tail[: len(data) - whole] = data[whole:]
    body = data[:whole]
    words = (body if body.storage_offset() % 8 == 0 else body.clone()).view(torch.int64)
    total = _mixed(tail.view(torch.int64) ^ -1)
    for start in range(0, len(words), _BLOCK):
        part = words[start : start + _BLOCK]
        places = torch.arange(start, start + len(part), device=data.device)
        total += _mixed(part ^ _mixed(places)).sum()
    return total


def _mixed(words: Tensor) -> Tensor:
    """The words, int64, permuted among all that there are."""
    words = words * _MIX[0]
    words = (words ^ ((words >> 32) & 0xFFFFFFFF)) * _MIX[1]  # a shift of signed words copies their sign
    return words ^ ((words >> 29) & 0x7FFFFFFFF)
