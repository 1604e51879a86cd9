"""`aurora plan`: the fewest replicas are the fewest, and what it promises holds in the simulation."""

import json
from pathlib import Path

import numpy as np
import pytest

from aurora.acceptance_profile import AcceptanceProfile, read_profile
from aurora.cli import main
from aurora.plan import Machine, PlanOptions, Trials
from aurora.routing import POLICIES

SECONDS = {"constant": 0.04, "request": 0.002, "draft": 0.002, "prefill_token": 0.0015, "kilo_context_token": 0.005}
PASSES = {"first_pass": 0.004, "read_token": 0.0, "further_pass": 0.004}
K_MAX, ANSWERS, PLACES = 3, 30, 40
TARGET = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "vocab_size": 300,
}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """A trace of four requests a second, what a table drafts for its answers, and the costs of two machines."""
    rng = np.random.default_rng(0)
    times, prompts, outputs = np.cumsum(rng.exponential(0.25, 150)), rng.integers(5, 90, 150), rng.integers(5, 60, 150)
    rows = zip(times, prompts, outputs, strict=True)
    lines = [json.dumps({"t_s": float(t), "request_tokens": int(p), "response_tokens": int(o)}) for t, p, o in rows]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    right = (rng.random((ANSWERS * PLACES, K_MAX)) < 0.7).cumprod(axis=1).sum(axis=1).astype(np.uint8)
    expected = np.tile(np.float32(0.7) ** np.arange(1, K_MAX + 1, dtype=np.float32), (len(right), 1))
    AcceptanceProfile("ngram", right, PLACES * np.arange(1, ANSWERS + 1), expected).write(tmp_path / "profile")
    (tmp_path / "slow.json").write_text(json.dumps({"step_costs": SECONDS | PASSES}))
    fast = {name: seconds / 4 for name, seconds in (SECONDS | PASSES).items()}
    (tmp_path / "fast.json").write_text(json.dumps({"step_costs": fast}))
    return {name: tmp_path / name for name in ("trace.jsonl", "profile", "slow.json", "fast.json", "out.json")}


def _flags(inputs: dict[str, Path], *more: str) -> list[str]:
    machines = [f"--machine=slow={inputs['slow.json']},1.0", f"--machine=fast={inputs['fast.json']},2.5"]
    return ["plan", str(inputs["trace.jsonl"]), "--profile", str(inputs["profile"]), *machines, *more]


def _plans(inputs: dict[str, Path], *more: str, code: int = 0) -> dict[str, dict]:
    assert main([*_flags(inputs, *more), "--json", str(inputs["out.json"])]) == code
    return {each["machine"]: each for each in json.loads(inputs["out.json"].read_text())}


def _trials(inputs: dict[str, Path], **fields: object) -> Trials:
    text = f"slow={inputs['slow.json']},1.0"
    options = PlanOptions(trace=inputs["trace.jsonl"], profile=inputs["profile"], machines=(text,), **fields)
    return Trials(Machine.of(text, 1 << 20), options.read_trace(), read_profile(inputs["profile"]), options)


@pytest.mark.parametrize("token_ms", [55.0, 65.0, 90.0])
def test_the_fewest_replicas_are_those_of_a_search_one_by_one(inputs: dict[str, Path], token_ms: float):
    trials = _trials(inputs, token_ms=token_ms, attain=0.95)
    one_by_one = next(n for n in range(1, 65) if trials.served(n, K_MAX).attained >= 0.95)
    assert trials.fewest(K_MAX) == one_by_one


def test_a_plan_keeps_what_it_promises(inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    promise = {"first_token_s": 0.6, "token_ms": 70.0}
    plans = _plans(inputs, "--first-token-s=0.6", "--token-ms=70", "--training-slowdown=0.5")
    trials = _trials(inputs, **promise, training_slowdown=0.5)
    slow, fast = plans["slow"], plans["fast"]
    assert fast["replicas"] < slow["replicas"] <= slow["without_speculation"]
    assert trials.served(slow["replicas"], slow["k_max"], slow["training_duty"]).attained >= 0.99
    beyond = slow["training_duty"] + 0.05
    assert beyond > 1 or trials.served(slow["replicas"], slow["k_max"], beyond).attained < 0.99
    cheapest = min(plans.values(), key=lambda each: each["price"])
    said = capsys.readouterr().out
    assert f"cheapest: {cheapest['replicas']} x {cheapest['machine']} at {cheapest['price']:.2f} an hour" in said
    assert 0 < slow["busy"] < 1
    without_trainer = _plans(inputs, "--first-token-s=0.6", "--token-ms=70", "--training-slowdown=0")
    assert without_trainer["slow"]["training_duty"] == 1.0


def test_a_promise_that_nobody_can_keep_is_said(inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    plans = _plans(inputs, "--token-ms=1", "--max-replicas=3", code=1)
    assert all(each["replicas"] is None and each["training_duty"] == 0 for each in plans.values())
    said = capsys.readouterr().out
    assert "no machine keeps the promise with 3 replicas: promise less, or allow more of them" in said


def test_the_router_is_the_one_that_was_asked_for(inputs: dict[str, Path]):
    served = {router: _trials(inputs, token_ms=60.0, router=router).served(4, 1) for router in POLICIES}
    assert served["least_loaded"] != served["round_robin"]
    latencies = [each.latency_s for each in served.values()]
    assert max(latencies) < 1.05 * min(latencies), "alike and half idle, they serve alike whoever is asked"


def test_a_placement_is_printed_with_its_reasons(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TARGET))
    flags = ["plan", "--placement", "--model", str(tmp_path / "model")]
    assert main([*flags, "--node=a=8,2,24", "--node=b=4,1,24,train", f"--json={inputs['out.json']}"]) == 0
    said = capsys.readouterr().out
    assert "nodes split" in said
    assert "a GPU left over" in said
    placed = json.loads(inputs["out.json"].read_text())
    assert [(seat["part"], seat["node"], seat["gpus"]) for seat in placed["seats"]] == [
        ("replica 0", "a", [0]),
        ("trainer", "b", [0]),
    ]
    for more, error in (
        (["--node=a=8", "--replicas=9"], "--replicas 9: there is room for 8; give at most that, or add nodes"),
        (["--node=a=x"], "--node a=x: give NAME=CPUS"),
        (["--node=a=2,1"], "--node a=2,1: give NAME=CPUS"),
        ([], "--node, --address: give the nodes"),
    ):
        assert main([*flags, *more]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--first-token-s, --token-ms: give what is promised"),
        (["--token-ms=0"], "--token-ms 0.0: must be above 0"),
        (["--token-ms=9", "--attain=1.5"], "--attain 1.5: must be above 0 and at most 1"),
        (["--token-ms=9", "--training-slowdown=-1"], "--training-slowdown -1.0: must not be negative"),
        (["--token-ms=9", "--machine=fast"], "--machine fast: give NAME=COSTS,PRICE[,KV_TOKENS]"),
        (["--token-ms=9", "--machine=x=pyproject.toml,1"], "pyproject.toml: "),
        (["--token-ms=9", "--kv-tokens=20"], "--kv-tokens 20: a request has"),
    ],
)
def test_bad_input_is_named(flags: list[str], said: str, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert main(_flags(inputs, *flags)) == 2
    assert said in capsys.readouterr().err


def test_a_machine_needs_a_price_that_is_none_below_zero(inputs: dict[str, Path]):
    from aurora.config import UserError

    for bad in (f"={inputs['slow.json']},1", f"a={inputs['slow.json']},-1", f"a={inputs['slow.json']},1,0"):
        with pytest.raises(UserError, match="it needs a name, a price of 0 or more and room in the KV cache"):
            Machine.of(bad, 100)
    assert Machine.of(f"a={inputs['slow.json']},1,77", 100).kv_tokens == 77
