"""The swap's sums and copies that run on a GPU there, here on a CPU: `tests/gpu` runs them on one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from serve import on_device
from serve.on_device import beside_serving, fingerprint, placed

TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(fingerprint(a), fingerprint(b))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_byte_changes_it(content: bytes, data: st.DataObject) -> None:
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    changed = tensor.clone()
    changed[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert same(tensor, tensor.clone())
    assert not same(tensor, changed)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=40), st.data())
def test_words_that_change_places_change_it(numbers: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(numbers)
    shuffled = torch.tensor(data.draw(st.permutations(numbers)))
    assert same(tensor, shuffled) == torch.equal(tensor, shuffled)


@given(TYPES, st.integers(0, 9), st.integers(1, 50))
def test_it_depends_on_the_bytes_alone(dtype: torch.dtype, offset: int, size: int) -> None:
    whole = torch.arange(offset + size).to(dtype)
    assert same(whole[offset:], whole[offset:].clone()), "not on where they lie"
    assert same(whole.expand(2, -1).T, whole.expand(2, -1).T.contiguous())
    assert same(whole, whole.view(torch.uint8))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True))
def test_mixing_loses_nothing(words: list[int]) -> None:
    assert len(on_device._mixed(torch.tensor(words, dtype=torch.int64)).unique()) == len(words)


def test_blocks_are_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(tensor)
    monkeypatch.setattr(on_device, "_BLOCK", 7)
    assert torch.equal(fingerprint(tensor), whole)
    assert whole.shape == (1,)
    assert not same(tensor, tensor[:-1])


def test_a_staged_value_has_the_live_ones_type_and_place() -> None:
    live = torch.zeros(3, dtype=torch.bfloat16)
    with beside_serving(live.device):
        value = placed(torch.ones(3), live)
    assert value.dtype == torch.bfloat16
    assert value.device == live.device
