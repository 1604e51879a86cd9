"""The swap's invariants on plain modules; the engine's packed ones are swapped in `tests/integration`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aurora.store import DrafterRefused, DrafterStore
from serve import swap
from serve.swap import DrafterSwap
from tests.plain_drafter import DRAFT, HIDDEN, VOCAB, Drafter, plain_pair, weights


@pytest.fixture
def publish(tmp_path: Path) -> Callable[[dict[str, Tensor]], int]:
    store = DrafterStore(tmp_path)

    def write(tensors: dict[str, Tensor]) -> int:
        def save(directory: Path) -> None:
            save_file(tensors, directory / "model.safetensors")

        return store.publish(save, {"gated_rates": [0.5, 0.25]}).number

    return write


@pytest.fixture
def live(tmp_path: Path) -> DrafterSwap:
    return DrafterSwap(*plain_pair(), tmp_path, 0)


def state(live: DrafterSwap) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in live.drafter.state_dict().items()}


def test_a_version_is_taken_over_whole_and_the_target_stays(live: DrafterSwap, publish: Callable) -> None:
    published, target = weights(1), live.target_checksum()
    number = publish(published)
    before = live.drafter_checksum()
    staged = live.stage(number)
    assert live.drafter_checksum() == before, "staging touches nothing"
    live.commit(staged)
    assert torch.equal(live.drafter.model.fc.weight, published["fc.weight"])
    stacked = torch.cat([published[f"midlayer.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(live.drafter.model.layers[0].qkv_proj.weight, stacked)
    assert torch.equal(live.drafter.draft_id_to_target_id, published["d2t"])
    assert (live.version, live.gated_rates) == (number, [0.5, 0.25])
    assert live.target_checksum() == target
    assert live.drafter_checksum() != before


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    names = {"fc": "fc.weight", "q": "midlayer.q_proj.weight", "d2t": "d2t", "extra": "extra.weight"}
    tensors: dict[str, Tensor | None] = {**weights(2), **{names[k]: v for k, v in changes.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (broken(fc=None), "key 'model.fc.weight' is missing"),
        (broken(q=None), "key 'model.layers.0.q_proj.weight' is missing"),
        (broken(extra=torch.zeros(1)), "not part of the running drafter"),
        (broken(fc=torch.zeros(HIDDEN, HIDDEN)), r"shape \(8, 8\), the engine runs \(8, 24\)"),
        (broken(fc=torch.full((HIDDEN, 3 * HIDDEN), float("nan"))), "NaN or infinity"),
        (broken(fc=torch.zeros(HIDDEN, 3 * HIDDEN, dtype=torch.int32)), "dtype torch.int32"),
        (broken(d2t=torch.full((DRAFT,), VOCAB)), "outside the target's vocabulary"),
        (broken(d2t=-torch.arange(DRAFT)), "twice to one token"),
    ],
)
def test_a_bad_version_is_refused_before_a_byte_is_written(
    live: DrafterSwap, publish: Callable, tensors: dict[str, Tensor], message: str
) -> None:
    before = state(live)
    with pytest.raises(DrafterRefused, match=message):
        live.stage(publish(tensors))
    assert all(torch.equal(before[name], value) for name, value in state(live).items())


def test_a_parameter_shared_with_the_target_is_refused(publish: Callable, tmp_path: Path) -> None:
    drafter, target = Drafter(), nn.Module()
    target.shared = drafter.lm_head
    with pytest.raises(DrafterRefused, match=r"lm_head\.weight shares storage with the target"):
        DrafterSwap(drafter, target, tmp_path, 0).stage(publish(weights(3)))


@pytest.mark.parametrize("fail_at", range(5))
def test_a_fault_at_any_write_puts_the_last_good_drafter_back(
    live: DrafterSwap, publish: Callable, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    staged, before, checksum = live.stage(publish(weights(4))), state(live), live.drafter_checksum()
    written, overwrite = [0], swap._overwrite

    def failing(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
        if written[0] == fail_at:
            raise RuntimeError("fault")
        written[0] += 1
        return overwrite(parameter, value)

    monkeypatch.setattr(swap, "_overwrite", failing)
    if fail_at == len(staged.tensors):  # after the last write: the comparison finds another value
        monkeypatch.setattr(live, "_verify", lambda _: failing(None, None))
    with pytest.raises(RuntimeError, match="fault"):
        live.commit(staged)
    assert all(torch.equal(before[name], value) for name, value in state(live).items())
    assert live.drafter_checksum() == checksum
    assert live.version == 0
