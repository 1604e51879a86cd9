"""`aurora simulate`: the rule that serves is the one that is simulated, the command compares all rules on one trace."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aurora import batching, speculation_rules
from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.cli import main
from aurora.clockwork import Clockwork, Live, Outcome, PortfolioSpeculator, Speculator
from aurora.config import SpeculationConfig
from aurora.results import read_rows
from aurora.simulate import simulate
from aurora.step_time import StepTimeModel
from serve.portfolio import Portfolio
from trainer.sequence import Sequence

PROMPT, OUTPUT, REQUESTS, AT_ONCE, K_MAX = 12, 50, 60, 4, 4
SECONDS = {"constant": 0.04, "request": 0.002, "draft": 0.002, "prefill_token": 0.0015, "kilo_context_token": 0.005}
PASSES = {"first_pass": 0.004, "read_token": 0.0, "further_pass": 0.004}


def _answers(first: float, seed: int) -> np.ndarray:
    """Right drafts at each place of every answer, [REQUESTS, OUTPUT - 1]: as many as succeed in a row at this rate."""
    rng = np.random.default_rng(seed)
    rates = np.clip(first + rng.normal(0, 0.1, (REQUESTS, 1, 1)), 0, 1)
    return (rng.random((REQUESTS, OUTPUT - 1, K_MAX)) < rates).cumprod(axis=2).sum(axis=2)


def _served(right: np.ndarray | None, costs: StepTimeModel) -> float:
    """Modelled seconds of the portfolio that serves, with a neural drafter; None: without speculation."""
    lives = []
    for i in range(REQUESTS):
        ids = np.arange(PROMPT + OUTPUT)
        rows = torch.zeros(len(ids) - 1, 1)
        request = Sequence(f"r{i}", "", 0, PROMPT, ids, rows, rows.expand(-1, 3), ())
        drafted = np.full((request.end_start - request.first_start, K_MAX), -1)
        for place in range(OUTPUT - 1) if right is not None else ():
            count, start = right[i, place], PROMPT + place - 1 - request.first_start
            said = ids[PROMPT + place + 1 :][:count]
            drafted[start, : len(said)] = said
            drafted[start, len(said) : len(said) + 1] = -5
        lives.append(Live(f"r{i}", request, drafted, Outcome(""), ""))
    speculator = Speculator()
    if right is not None:
        speculator = PortfolioSpeculator(Portfolio(SpeculationConfig(drafters=("eagle3",)), K_MAX), K_MAX)
    clockwork = Clockwork(costs, speculator, AT_ONCE)
    assert len(list(clockwork.run(lives))) == REQUESTS
    return clockwork.now_s


def _simulated(right: np.ndarray, kind: int, k: int = 0) -> float:
    n, width = right.shape
    begin = np.arange(n) * width
    load = batching.Load(np.zeros(n), np.full(n, PROMPT), np.full(n, OUTPUT), begin, begin + width)
    rule = speculation_rules.Rule(
        kind,
        K_MAX,
        np.full(AT_ONCE + 1, k),
        np.array(list((SECONDS | PASSES).values())),
        True,
        0.01,
        right.astype(np.uint8).ravel(),
        np.zeros((right.size, K_MAX), np.float32),
        speculation_rules.new_memory(),
        np.zeros(K_MAX),
        np.zeros(K_MAX),
    )
    *_, state = simulate(load, batching.Engine(AT_ONCE, 2048, 10_000, AT_ONCE), rule)
    return float(state.clock[0])


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.6, 0.9])
def test_the_simulated_rule_is_the_one_that_serves(rate: float):
    right = _answers(rate, seed=3)
    costs = StepTimeModel.known(SECONDS | PASSES)
    plain = _served(None, costs)
    assert _simulated(right, speculation_rules.FIXED) == pytest.approx(plain, rel=0.01)
    assert _simulated(right, speculation_rules.GOODPUT) == pytest.approx(_served(right, costs), rel=0.03)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """A trace, a profile and costs, and the command that simulates them."""
    rng = np.random.default_rng(0)
    rows = [
        json.dumps({"t_s": float(t), "request_tokens": int(p), "response_tokens": int(o)})
        for t, p, o in zip(
            np.cumsum(rng.exponential(1.0, 80)), rng.integers(5, 90, 80), rng.integers(2, 60, 80), strict=True
        )
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(rows))
    right = _answers(0.5, seed=1)
    ends = np.arange(1, REQUESTS + 1) * right.shape[1]
    expected = np.zeros((right.size, K_MAX), np.float32)
    AcceptanceProfile("eagle3", right.astype(np.uint8).ravel(), ends, expected).write(tmp_path / "profile")
    (tmp_path / "costs.json").write_text(json.dumps({"step_costs": SECONDS | PASSES}))
    files = ["--profile", str(tmp_path / "profile"), "--costs", str(tmp_path / "costs.json")]
    return ["simulate", str(tmp_path / "trace.jsonl"), *files]


def _run(inputs: list[str], out: Path, *more: str) -> dict[str, dict[str, float]]:
    assert main([*inputs, "--json", str(out), *more]) == 0
    return {each["policy"]: each for each in json.loads(out.read_text())}


def test_the_command_compares_all_rules_and_says_the_same_again(inputs: list[str], tmp_path: Path):
    rows = tmp_path / "rows.json"
    found = _run(inputs, tmp_path / "out.json", "--results", str(rows), "--cell", "tiny")
    assert list(found) == [
        "no_speculation",
        *(f"fixed_k{k}" for k in (1, 2, 3, 4)),
        "batch_table",
        "smartspec",
        "goodput",
        "hindsight",
        "oracle",
    ]
    best = min(found[name]["latency_mean_s"] for name in found if name[:5] in ("fixed", "no_sp"))
    assert found["goodput"]["latency_mean_s"] < best * 1.02
    assert found["oracle"]["latency_mean_s"] <= min(each["latency_mean_s"] for each in found.values())
    assert found["no_speculation"]["acceptance_length"] == 1.0
    told = {(row.policy, row.metric): row for row in read_rows(rows) if row.cell == "tiny"}
    ratio = told["goodput", "ratio_to_best_fixed"]
    assert ratio.value == pytest.approx(best / found["goodput"]["latency_mean_s"])
    assert told["goodput", "latency_p99_s"].baseline == found["no_speculation"]["latency_p99_s"]
    assert _run(inputs, tmp_path / "again.json") == found
    assert _run(inputs, tmp_path / "other.json", "--seed", "1") != found


def test_load_is_changed_by_flags(inputs: list[str], tmp_path: Path):
    usual = _run(inputs, tmp_path / "a.json")["no_speculation"]
    busy = _run(inputs, tmp_path / "b.json", "--speed", "4", "--requests", "200")["no_speculation"]
    assert busy["requests"] == 200
    assert busy["latency_p50_s"] > usual["latency_p50_s"]
    crowded = _run(inputs, tmp_path / "c.json", "--speed", "4", "--kv-tokens", "200")["no_speculation"]
    assert crowded["preempted"] > 0
    closed = _run(inputs, tmp_path / "d.json", "--at-once", "1")["no_speculation"]
    assert closed["latency_p50_s"] < usual["latency_p50_s"]


def test_one_replica_is_the_same_whoever_routes_and_more_are_served_by_more(inputs: list[str], tmp_path: Path):
    alone = _run(inputs, tmp_path / "a.json", "--speed", "4")
    for router in ("least_loaded", "earliest_finish"):
        assert _run(inputs, tmp_path / "b.json", "--speed", "4", "--replicas", "1", "--router", router) == alone
    several = {
        router: _run(inputs, tmp_path / "c.json", "--speed", "4", "--replicas", "3", "--router", router)["goodput"]
        for router in ("round_robin", "least_loaded", "earliest_finish")
    }
    assert max(each["latency_mean_s"] for each in several.values()) < alone["goodput"]["latency_mean_s"]
    assert {each["requests"] for each in several.values()} == {80}


def test_prompts_that_begin_alike_are_read_once(inputs: list[str], tmp_path: Path):
    trace = Path(inputs[1])
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    rows = [row | {"request_tokens": 640, "session_id": i % 4} for i, row in enumerate(rows)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    kept = _run(inputs, tmp_path / "a.json", "--replicas", "2")["no_speculation"]
    read = _run(inputs, tmp_path / "b.json", "--replicas", "2", "--no-prefix-cache")["no_speculation"]
    assert kept["prefix_cached"] == pytest.approx((80 - 4) * 639 / (80 * 640)), "two sessions a replica"
    assert read["prefix_cached"] == 0
    assert kept["first_token_p50_s"] < read["first_token_p50_s"]
    alone = _run(inputs, tmp_path / "c.json", "--no-prefix-cache")
    assert alone["goodput"] == _run(inputs, tmp_path / "d.json", "--no-prefix-cache", "--replicas", "1")["goodput"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "0"], "--replicas 0: must be above 0"),
        (["--router", "x"], "--router x: give one of round_robin, least_loaded, earliest_finish"),
        (["--replicas", "2", "--at-once", "3"], "--at-once 3 --replicas 2: routers need arrivals"),
        (["--requests", "0"], "--requests 0: must be above 0"),
        (["--speed", "0"], "--speed 0.0: must be above 0"),
        (["--at-once", "-1"], "--at-once -1: must not be negative"),
        (["--kv-tokens", "20"], "--kv-tokens 20: a request has"),
        (["--token-budget", "16"], "--token-budget 16: below --max-seqs 256"),
        (
            ["--columns", "size=x"],
            "--columns size=x: give WHAT=NAME, where WHAT is time, prompt, output, label, blocks, session",
        ),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json: no such directory"),
        (["--profile", "pyproject.toml"], "give a file that `aurora replay --profile` wrote"),
        (["--costs", "pyproject.toml"], "give a file that `aurora bench --json` wrote"),
    ],
)
def test_bad_input_is_named(flags: list[str], said: str, inputs: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*inputs, *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_profile_is_kept_whole(tmp_path: Path):
    right = np.array([2, 0, 1, 4, 0], np.uint8)
    AcceptanceProfile("ngram", right, np.array([3, 5]), np.ones((5, 4), np.float32)).write(tmp_path / "p")
    again = read_profile(tmp_path / "p")
    assert (again.drafter, again.k_max, again.right.tolist(), again.ends.tolist()) == (
        "ngram",
        4,
        [2, 0, 1, 4, 0],
        [3, 5],
    )
    assert again.rates().tolist() == pytest.approx([3 / 5, 2 / 3, 1 / 2, 1.0])
    with pytest.raises(ValueError, match="places"):
        AcceptanceProfile("ngram", right, np.array([3]), np.ones((5, 4), np.float32))


def test_hindsight_is_each_answers_own_mean_where_there_is_something_to_draft():
    right, ends = np.array([2, 0, 1, 2], np.uint8), np.array([2, 4])
    offered = np.array([[0.5, 0.5], [0.5, 0.0], [0.5, 0.5], [0.5, 0.5]], np.float32)
    expected = [[0.5, 0.5], [0.5, 0.5], [1.0, 0.5], [1.0, 0.5]]
    assert AcceptanceProfile("eagle3", right, ends, offered).hindsight().tolist() == expected
    assert AcceptanceProfile("ngram", right, ends, offered).hindsight().tolist() == [
        [0.5, 1.0],
        [0.5, 0.0],
        [1.0, 0.5],
        [1.0, 0.5],
    ]
