"""Calibration: the drill tells every cost apart, and what was measured is found again by the same engine only."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from aurora.config import load_config
from aurora.goodput import TABLE
from aurora.step_time import COSTS, StepTimeModel, StepWork
from aurora.store import DrafterVersion
from serve.calibration import Drill, costs_file, is_calibration, keep_costs, known_costs

K = 4
_OF_DECODING = ("constant", "request", "draft", "first_pass", "further_pass")


def test_the_drill_tells_costs_apart() -> None:
    true = dict(zip(COSTS, [0.033, 0.0019, 0.0022, 0.0007, 0.005, 0.006, 0.0001, 0.006, 0, 0, 0], strict=True))
    steps, drill, rng = [], Drill(K, neural=True), np.random.default_rng(1)
    for requests in (1, 2, 4, 8, 16):
        drafts = 0
        for step in range(20):
            plan, prompts = drill.plan(), 100 * requests if step == 0 else 0
            assert 0 <= plan.cap <= K
            assert plan.skip_drafter == (plan.cap == 0)
            context = requests * (100 + 2 * step)
            work = StepWork(requests, drafts, prompts, context, int(plan.cap > 0), max(plan.cap - 1, 0))
            seconds = float(np.dot([true[n] for n in COSTS], work.vector())) * float(rng.lognormal(0, 0.03))
            steps.append((work, seconds))
            drafts = sum(map(len, drill.settle({f"{i}": K for i in range(requests)}).values()))
    costs = StepTimeModel.measured(steps).costs
    for name in _OF_DECODING:
        assert costs[name] == pytest.approx(true[name], rel=0.35), name


def test_the_drill_keeps_to_limits_and_drafts_for_the_table() -> None:
    drill = Drill(K, neural=True)
    for _ in range(50):
        drafts = drill.settle({"a": 0, "b": 2, "c": K})
        assert [len(drafts[r]) <= k for r, k in (("a", 0), ("b", 2), ("c", K))] == [True] * 3
        assert drill.one_hot == dict.fromkeys("abc", TABLE)
    assert all(Drill(K, neural=False).plan().skip_drafter for _ in range(9))


def test_only_our_own_requests_calibrate() -> None:
    assert is_calibration("aurora-calibration-4-0-1a2b3c4d")
    assert not is_calibration("chatcmpl-aurora-calibration-4-0")


def test_what_was_measured_is_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = [(StepWork(n, n % 3, 10 * (n % 2), 100 * n, n % 2, 0), 0.03 + 0.002 * n) for n in range(1, 30)]
    file = tmp_path / "new" / "costs.json"
    assert known_costs(file) is None
    assert not caplog.records
    keep_costs(file, steps)
    found = known_costs(file)
    assert found is not None
    assert found.costs == pytest.approx(StepTimeModel.measured(steps).costs)
    assert [path.name for path in file.parent.iterdir()] == ["costs.json"]
    for broken in ("", "[1]", '{"steps": [[1, 2]]}', '{"steps": []}', '{"steps": [[1, 0, 0, 9, 0, 0, 0, 0, 0, "x"]]}'):
        file.write_text(broken)
        with caplog.at_level(logging.WARNING):
            assert known_costs(file) is None
        assert "step costs are measured again" in caplog.text
        caplog.clear()
    occupied = tmp_path / "file"
    occupied.write_text("")
    keep_costs(occupied / "costs.json", steps)
    assert "measured again at the next start" in caplog.text


def test_costs_belong_to_a_model_a_drafter_and_flags(tmp_path: Path) -> None:
    model, drafter = tmp_path / "model", DrafterVersion(1, tmp_path / "drafter", "", {})
    for directory in (model, drafter.path):
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    def name(**overrides: object) -> str:
        fields = {"model": str(model), "cache_dir": tmp_path / "cache", **overrides}
        return costs_file(load_config(None, fields), model, drafter).name

    first = name()
    assert name() == name(run_dir=tmp_path / "elsewhere") == name(**{"server.port": 1}) == first
    others = [
        name(**{"speculation.k_max": 7}),
        name(vllm_args=("--max-model-len=99",)),
        name(**{"trainer.enabled": False}),
    ]
    (model / "config.json").write_text(json.dumps({"hidden_size": 64}))
    others.append(name())
    assert len({first, *others}) == 5
