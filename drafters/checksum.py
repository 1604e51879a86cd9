"""Checksums of weights: equal exactly where names, shapes, types and bytes are."""

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def checksum(tensors: Iterable[tuple[str, Tensor]], said: str = "") -> str:
    """XXH3 (128 bit, hex) of named tensors in the order given, and of what is said with them."""
    digest = xxhash.xxh3_128(said.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
