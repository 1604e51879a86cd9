"""Curves of replays: the arithmetic, the marks, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora.config import UserError
from aurora.curves import Curve, CurveOptions, read_curve, run


def _result(file: Path, policy: str, domains: list[str]) -> Path:
    requests = [{"domain": d, "steps": 10, "accepted": i % 7} for i, d in enumerate(domains)]
    file.write_text(json.dumps({"policy": policy, "requests": requests}))
    return file


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 30))
def test_each_point_is_the_mean_of_a_window(requests: list[tuple[int, int]], window: int) -> None:
    accepted, steps = np.array(requests, float).T
    found = Curve("p", ("d",) * len(requests), steps + accepted, steps).rolling(window)
    assert len(found) == max(0, len(requests) - window + 1)
    for i, value in enumerate(found):
        assert value == pytest.approx(1 + accepted[i : i + window].sum() / steps[i : i + window].sum())


def test_a_domain_has_a_curve_of_its_own_requests() -> None:
    curve = Curve("p", ("a", "b", "a", "b"), np.array([2.0, 9.0, 4.0, 9.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert curve.rolling(2, "a").tolist() == [3.0]
    assert curve.rolling(3, "a").tolist() == []


@pytest.mark.parametrize("order", [["a"] * 40 + ["b"] * 40, ["a", "b"] * 40, ["a"] * 80])
def test_a_picture_is_drawn(order: list[str], tmp_path: Path) -> None:
    files = tuple(_result(tmp_path / f"{policy}.json", policy, order) for policy in ("table", "none"))
    out = tmp_path / "curves.png"
    assert run(CurveOptions(files, out, title="a shift")) == 0
    from matplotlib.image import imread

    pixels = imread(out)
    assert pixels.shape[1] == 1200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10, "not blank"


def test_bad_input_is_named(tmp_path: Path) -> None:
    good = _result(tmp_path / "a.json", "a", ["x"] * 30)
    out = tmp_path / "c.png"
    with pytest.raises(UserError, match=r"gone\.json: .*aurora replay --json"):
        read_curve(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"not the requests of"):
        run(CurveOptions((good, _result(tmp_path / "b.json", "b", ["y"] * 30)), out))
    with pytest.raises(UserError, match="--window 31: there are 30 requests only"):
        run(CurveOptions((good,), out, window=31))
    with pytest.raises(UserError, match=r"must end in \.png"):
        CurveOptions((good,), tmp_path / "c.svg")
    assert not out.exists()
