"""Drafters that are whole and worth nothing, on a running engine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aurora.store import REJECTED, DrafterStore
from tests.faults.traffic import Traffic, mixed
from tests.integration.conftest import LEARNING, SMALL
from tests.integration.process import START_LIMIT_S, ServedModel, random_prompts
from tests.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

DRAFTING = (*SMALL, "--no-learning", "--drafters=eagle3", "--draft-vocab=256", "--fixed-k=2", "--wandb=disabled")


def changed(version: Path, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Writes the files of a version with other weights."""

    def write(directory: Path) -> None:
        tensors = load_file(version / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text((version / "config.json").read_text())

    return write


def zero(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            tensor.zero_()


def alarm(server: ServedModel, kind: str) -> bool:
    return f'aurora_alarm{{kind="{kind}"}} 1.0' in server.get("/metrics")


def test_a_drafter_of_zeros_and_speculation_that_is_off_raise_alarms(tiny_model: Path, tmp_path: Path) -> None:
    first = ServedModel(tiny_model, tmp_path / "run", *DRAFTING)
    try:
        first.wait_ready(START_LIMIT_S)
    finally:
        assert first.stop() == 0
    source = tmp_path / "run" / "drafters" / "v000001"
    zeroed = tmp_path / "zeroed"
    zeroed.mkdir()
    changed(source, zero)(zeroed)
    server = ServedModel(tiny_model, tmp_path / "other", *DRAFTING, f"--drafter={zeroed}")
    try:
        server.wait_ready(START_LIMIT_S)
        prompts = random_prompts(4)
        expected = server.answers(prompts)
        with Traffic(server.url, mixed(server.model_name())) as traffic:
            wait_until(lambda: alarm(server, "drafter_never_right"), 180, "the alarm is raised")
            store = DrafterStore(tmp_path / "other" / "drafters")
            store.publish(changed(source, lambda tensors: None), {})
            wait_until(lambda: server.metric("aurora_drafter_version") == 2, 60, "the other one is live")
            wait_until(lambda: not alarm(server, "drafter_never_right"), 60, "the alarm is over")
        assert traffic.failed == 0
        assert server.answers(prompts) == expected
        for _ in range(6):
            server.complete([5] * 8, max_tokens=450, max_speculation=0)
        wait_until(lambda: alarm(server, "speculation_off"), 60, "nothing was drafted for 2,000 steps")
        server.answers(prompts)
        wait_until(lambda: not alarm(server, "speculation_off"), 60, "drafts are back")
    finally:
        server.stop()


def test_worse_drafters_are_taken_back(
    tiny_model: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run_dir = tmp_path / "run"
    teacher = ServedModel(tiny_model, run_dir, *LEARNING)
    try:
        teacher.wait_ready(START_LIMIT_S)
        teacher.serve_until_version(4)
    finally:
        assert teacher.stop() == 0
    store = DrafterStore(run_dir / "drafters")
    good = store.latest()
    assert good is not None
    version = store.read(good).path
    bad: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "zeroed": zero,
        "scrambled": lambda w: w["lm_head.weight"].copy_(w["lm_head.weight"][torch.randperm(len(w["lm_head.weight"]))]),
        "noise": lambda w: w["fc.weight"].normal_(),
    }
    server = ServedModel(tiny_model, run_dir, *DRAFTING)
    told = {}
    try:
        server.wait_ready(START_LIMIT_S)
        prompts = random_prompts(20, seed=100)  # what it has learned from
        expected = server.answers(prompts)
        for name, change in bad.items():
            number = store.publish(changed(version, change), {}).number
            before = server.metric("aurora_draft_steps_total")
            rejected = run_dir / "drafters" / f"v{number:06d}" / REJECTED
            for _ in range(60):
                assert server.answers(prompts) == expected
                if rejected.exists():
                    break
            assert rejected.read_text(), name
            wait_until(lambda: server.metric("aurora_drafter_version") == good, 60, "the good one is back")
            told[name] = server.metric("aurora_draft_steps_total") - before
        assert server.metric("aurora_rollbacks_total") == len(bad)
    finally:
        server.stop()
    record_property("drafts_until_back", json.dumps(told))
