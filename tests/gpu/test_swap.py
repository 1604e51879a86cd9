"""The swap on CUDA tensors: `make gpu`. Skipped without an NVIDIA GPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serve import swap
from serve.on_device import fingerprint
from serve.swap import DrafterSwap
from tests.plain_drafter import HIDDEN, plain_pair, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def live(tmp_path: Path) -> DrafterSwap:
    drafter, target = plain_pair()
    drafter.cuda()
    target.cuda()
    return DrafterSwap(drafter, target, tmp_path, 0)


def publish(live: DrafterSwap, seed: int) -> int:
    return live.store.publish(lambda d: save_file(weights(seed), d / "model.safetensors"), {}).number


def test_a_captured_graph_computes_with_the_new_weights(live: DrafterSwap) -> None:
    x = torch.randn(2, 3 * HIDDEN, device="cuda")
    live.drafter.model.fc(x)  # warm-up, as vLLM does before it captures
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        answer = live.drafter.model.fc(x)
    target = live.target_checksum()
    staged = live.stage(publish(live, seed=5))
    assert all(t.is_cuda for t in staged.tensors.values()), "commit copies within the device"
    live.commit(staged)
    graph.replay()
    torch.testing.assert_close(answer, x @ weights(5)["fc.weight"].cuda().T)
    assert live.target_checksum() == target


def test_a_commit_that_fails_puts_back_what_was_there(live: DrafterSwap, monkeypatch: pytest.MonkeyPatch) -> None:
    live.commit(live.stage(publish(live, seed=1)))
    before = live.drafter_checksum()
    staged = live.stage(publish(live, seed=2))
    calls = []

    def failing(parameter: torch.nn.Parameter, value: torch.Tensor) -> object:
        calls.append(parameter)
        if len(calls) == 3:
            raise RuntimeError("fault")
        return overwrite(parameter, value)

    overwrite = swap._overwrite
    monkeypatch.setattr(swap, "_overwrite", failing)
    with pytest.raises(RuntimeError, match="fault"):
        live.commit(staged)
    assert (live.drafter_checksum(), live.version) == (before, 1)


def test_a_fingerprint_is_the_same_on_both_devices() -> None:
    tensor = torch.randn(100_003)
    assert torch.equal(fingerprint(tensor), fingerprint(tensor.cuda()).cpu())


def test_staging_goes_on_beside_work_in_the_engines_stream(live: DrafterSwap) -> None:
    number = publish(live, seed=3)
    busy = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)  # cycles, in the stream of the engine
    busy.record()
    staged = live.stage(number)
    assert not busy.query(), "staging waited for the engine"
    live.commit(staged)
    assert live.version == number
