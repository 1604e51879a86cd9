"""Replay: exact acceptance along recorded text, modelled time, the same portfolio and trainer as live."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora import profiling
from aurora.acceptance_profile import read_profile
from aurora.clockwork import Clockwork, Live, Outcome, PromptLookup, Speculator, lookup
from aurora.config import UserError
from aurora.prompts import Conversation
from aurora.replay import POLICIES, Arrivals, ReplayOptions, policy_of, run
from aurora.replay_result import Cell, half_widths, legs, mean_cells, recovery, requests_to_recover, summarise
from aurora.results import read_rows
from aurora.step_costs import read_costs
from aurora.step_time import COSTS, StepTimeModel
from aurora.trace import DraftTrace, decode_traces
from drafters import TargetWeights, load_drafter
from drafters.rollout import Context, Nodes, run_rollouts
from tests.tiny import TinyServer, greedy_manifest, prompts, tiny_config
from trainer.loop import TrainerLoop
from trainer.recording import Recording, RecordingWriter, request_key
from trainer.sequence import OpenSequence, Sequence
from trainer.verify import greedy_drafts

TURNS = [(f"question {i}",) for i in range(12)]
FREE = dict.fromkeys(COSTS, 0.0)


@pytest.fixture(scope="module")
def recorded(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve greedy answers of the tiny target, three of each of four prompts."""
    server, out = TinyServer(directory), tmp_path_factory.mktemp("recording")
    how = greedy_manifest(directory, max_tokens=24)
    writer = RecordingWriter(out / "recording", how)
    asked = prompts(4) * 3
    for i, (turns, prompt) in enumerate(zip(TURNS, asked, strict=True)):
        sequence: OpenSequence | None = None
        for trace in server.traces("r", prompt, 24, lambda _truth, _step: [], domain=f"d{i % 2}"):
            sequence = sequence or OpenSequence.begin(trace)
            sequence.append(trace)
        assert sequence is not None
        whole = sequence.snapshot()
        key = request_key(turns, 0)
        writer.add(Sequence(key, f"d{i % 2}", 0, whole.prompt_tokens, whole.ids, whole.hidden, whole.aux, ()))
    writer.flush()
    rows = [json.dumps({"prompt": turns[0], "domain": f"d{i % 2}"}) for i, turns in enumerate(TURNS)]
    (out / "order.jsonl").write_text("\n".join(rows))
    costs = FREE | {"constant": 0.05, "request": 0.001, "draft": 0.002, "first_pass": 0.005, "further_pass": 0.003}
    costs |= {"model_first_pass": 0.004, "model_read_token": 0.0001, "model_further_pass": 0.003}
    (out / "costs.json").write_text(json.dumps({"step_costs": costs}))
    return out


def _options(recorded: Path, policy: str, **fields: object) -> ReplayOptions:
    fields = {"dataset": str(recorded / "order.jsonl"), "costs": recorded / "costs.json", "draft_vocab": 256} | fields
    return ReplayOptions(recorded / "recording", policy=policy, **fields)


def _result(recorded: Path, policy: str, tmp_path: Path, **fields: object) -> dict:
    out = tmp_path / f"{policy}.json"
    assert run(_options(recorded, policy, json_file=out, **fields)) == 0
    return json.loads(out.read_text())


def _lives(texts: list[list[int]], prompt_tokens: int = 4) -> list[Live]:
    lives = []
    for i, text in enumerate(texts):
        rows = len(text) - 1
        request = Sequence(
            f"k{i}", "", 0, prompt_tokens, np.array(text), torch.zeros(rows, 1), torch.zeros(rows, 3), ()
        )
        lives.append(Live(f"{i}", request, None, Outcome(""), ""))
    return lives


def test_plain_decoding_takes_one_step_a_token_in_continuous_batches():
    costs = StepTimeModel.known(FREE | {"constant": 1.0, "request": 0.1, "prefill_token": 0.01})
    lives = _lives([list(range(7)), list(range(9)), list(range(6))])
    clockwork = Clockwork(costs, Speculator(), concurrency=2)
    done = list(clockwork.run(lives))
    assert [live.name for live in done] == ["0", "1", "2"]
    assert [live.outcome.emitted for live in lives] == [3, 5, 2]
    assert [live.outcome.steps for live in lives] == [2, 4, 1]
    # steps: prompts of 0 and 1; both decode, twice; 1 decodes, prompt of 2; 1 and 2 decode
    assert clockwork.now_s == pytest.approx(5 * 1.0 + 0.1 * (2 + 2 + 1 + 2) + 0.01 * (8 + 4))
    assert sum(live.outcome.seconds for live in lives) == pytest.approx(clockwork.now_s)


def test_drafts_are_accepted_up_to_the_first_that_was_not_said():
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 5, 6, 7, 8]
    (live,) = Clockwork(StepTimeModel.known(FREE | {"constant": 1.0}), PromptLookup(), 1).run(_lives([text]))
    outcome = live.outcome
    assert outcome.emitted == len(text) - 4
    assert 0 < outcome.accepted < outcome.drafted
    assert outcome.emitted == 1 + outcome.steps + outcome.accepted


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_lookup_is_vllms(text):
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

    theirs = _find_longest_matched_ngram_and_propose_tokens(np.array(text, np.int32), 2, 4, 10_000, 3)
    assert lookup(np.array(text)) == theirs.tolist()


def test_greedy_drafts_are_those_of_drafting_one_token_at_a_time(recorded: Path, directory: Path, tmp_path: Path):
    target = TargetWeights.load(directory)
    from aurora.store import DrafterStore
    from drafters import ensure_drafter

    config = tiny_config(tmp_path)
    version = ensure_drafter(DrafterStore(config.store_dir), directory, config.speculation, 0)
    model = load_drafter(version.path, target)
    sequence = Recording(recorded / "recording").read(request_key(TURNS[0], 0))
    found = greedy_drafts(model, sequence, 3)
    assert len(found) == sequence.end_start - sequence.first_start
    for start in range(sequence.first_start, sequence.end_start):
        drafts = _draft(model, sequence, start, 3)
        truth = sequence.ids[start + 2 : start + 5].tolist()
        agreed = next((i for i, (a, b) in enumerate(zip(drafts, truth, strict=False)) if a != b), len(truth))
        known = min(agreed + 1, len(truth))
        assert found[start - sequence.first_start, :known].tolist() == drafts[:known]
        assert (found[start - sequence.first_start, agreed + 1 :] == -1).all()


def _draft(model, sequence: Sequence, start: int, k: int) -> list[int]:
    """Greedy drafts after token start + 1, each reading the one before it."""
    rows = start + 1
    context = Context(torch.from_numpy(sequence.ids[1 : rows + 1]), sequence.aux[:rows], torch.arange(rows), (0, rows))
    nodes = [Nodes(torch.tensor([start]), torch.from_numpy(sequence.ids[start + 1 : start + 2]), (0, 1))]
    drafts: list[int] = []
    for _ in range(k):
        with torch.no_grad():
            *_, state = run_rollouts(model, context, nodes)
        drafts.append(int(model.draft_ids[model.logits(state).argmax(-1)]))
        nodes.append(Nodes(torch.tensor([0]), torch.tensor(drafts[-1:]), (0, 1)))
    return drafts


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_emits_the_recorded_tokens(recorded: Path, tmp_path: Path, policy: str):
    result = _result(recorded, policy, tmp_path, drafters=("eagle3", "ngram", "model"))
    requests = result["requests"]
    assert len(requests) == len(TURNS)
    assert all(r["emitted"] == 24 for r in requests)
    assert all(r["emitted"] == 1 + r["steps"] + r["accepted"] for r in requests)
    assert {cell["domain"] for cell in result["cells"]} == {"d0", "d1", "all"}
    if policy == "no_speculation":
        assert [cell["speedup"] for cell in result["cells"]] == [1.0, 1.0, 1.0]


def test_what_was_served_before_is_drafted_well(recorded: Path, tmp_path: Path):
    """Every answer comes three times: from the second on the table knows it."""
    result = _result(recorded, "ngram_table", tmp_path, concurrency=1)
    assert result["cells"][-1]["speedup"] > 1.3
    assert sum(r["accepted"] for r in result["requests"][4:]) > 0.6 * 23 * 8


def _told(recorded: Path, domains: str) -> list[str]:
    """The domain that each request was of, in the order in which they were done."""
    options = _options(recorded, "ngram_table", domains=domains)
    recording = Recording(options.recording)
    arrivals = Arrivals(options, recording, [request_key(turns, 0) for turns in TURNS] * 3)
    speculator = policy_of(options, recording, recorded)[0]
    return [live.domain for live in Clockwork(read_costs(options.costs), speculator, 1).run(arrivals)]


def test_requests_are_sorted_by_labels_by_clusters_or_not_at_all(recorded: Path):
    assert set(_told(recorded, "labels")) == {"d0", "d1"}
    assert set(_told(recorded, "none")) == {""}
    clusters = _told(recorded, "clusters")
    assert clusters[0] == ""
    assert clusters[-1].startswith("cluster-")


def test_online_training_gets_its_share_and_its_drafter_can_be_kept(recorded: Path, tmp_path: Path):
    kept = tmp_path / "trained"
    online = _result(recorded, "online_eagle3", tmp_path, train_share=2.0, save_drafter=kept)
    assert online["training_core_s"] > 0
    static = _result(recorded, "static_eagle3", tmp_path, drafter=kept)
    assert static["training_core_s"] == 0
    assert static["requests"][0]["emitted"] == 24


def test_the_trainer_gets_the_neural_drafts_and_not_the_tables(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    traces: list[DraftTrace] = []
    shares: list[float] = []
    ingest, train = TrainerLoop.ingest, TrainerLoop.train

    def noting_ingest(loop: TrainerLoop, payload: bytes) -> int:
        traces.extend(decode_traces(payload))
        return ingest(loop, payload)

    def noting_train(loop: TrainerLoop):
        step = train(loop)
        shares.append(step.rl_share if step.actions else 0.0)
        return step

    monkeypatch.setattr(TrainerLoop, "ingest", noting_ingest)
    monkeypatch.setattr(TrainerLoop, "train", noting_train)
    settings = ("trainer.rl.weight=0.5", "trainer.rl.after_steps=0", "trainer.batch_rows=64")
    online = _result(recorded, "online_eagle3", tmp_path, fixed_k=2, train_share=2.0, settings=settings)
    verified = [t for t in traces if t.k]
    assert {t.drafter_version for t in verified} == {1}
    assert len(verified) == sum(r["draft_steps"] for r in online["requests"])
    assert sum(t.accepted for t in verified) == sum(r["accepted"] for r in online["requests"])
    assert all(len(t.hidden) == 1 + t.accepted for t in verified)
    assert max(shares) > 0
    traces.clear()
    both = _result(recorded, "portfolio", tmp_path)
    neural = sum(bool(t.k) for t in traces)
    assert 0 < neural < sum(r["draft_steps"] for r in both["requests"])


def test_a_setting_reaches_the_trainer_and_a_wrong_one_is_named(recorded: Path):
    with pytest.raises(UserError, match=r"trainer\.loss.*got 'l2'"):
        _options(recorded, "online_eagle3", settings=("trainer.loss=l2",))
    with pytest.raises(UserError, match=r"--set speculation\.k_max: only keys of the trainer"):
        _options(recorded, "online_eagle3", settings=("speculation.k_max=3",))
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        _options(recorded, "online_eagle3", settings=("trainer.seed",))


@pytest.mark.parametrize("codec", ["bf16", "compact"])
def test_training_learns_from_traces_in_the_codec_asked_for(recorded: Path, tmp_path: Path, codec: str):
    result = _result(recorded, "online_eagle3", tmp_path, train_share=2.0, codec=codec)
    assert result["options"]["codec"] == codec
    assert result["training_core_s"] > 0


def test_a_draft_model_learns_while_it_is_replayed(recorded: Path, tmp_path: Path):
    online = _result(recorded, "online_draft_model", tmp_path, train_share=4.0, draft_layers=3)
    assert online["training_core_s"] > 0
    assert sum(request["drafted"] for request in online["requests"]) > 0
    with pytest.raises(UserError, match="--save-drafter: online_draft_model trains no EAGLE-3"):
        _options(recorded, "online_draft_model", save_drafter=tmp_path / "kept")


def test_results_are_rows_that_say_what_they_compare_with(recorded: Path, tmp_path: Path):
    file = tmp_path / "results.json"
    for policy in ("static_eagle3", "ngram_table"):
        _result(recorded, policy, tmp_path, results=file, experiment="tiny")
    found = {row.place: row for row in read_rows(file)}
    table = found["tiny", "all", "ngram_table", "speedup_over_no_speculation"]
    speed = found["tiny", "all", "ngram_table", "tokens_per_s"]
    static = found["tiny", "all", "static_eagle3", "tokens_per_s"]
    assert table.value == pytest.approx(speed.value / speed.baseline)
    ratio = found["tiny", "all", "ngram_table", "speedup_over_static"]
    assert (ratio.value, ratio.baseline) == pytest.approx((speed.value / static.value, static.value))
    assert ("tiny", "all", "ngram_table", "requests_to_recover") not in found, "twelve requests are too few to tell"


def test_several_seeds_give_means_and_intervals(recorded: Path, tmp_path: Path):
    file = tmp_path / "results.json"
    result = _result(recorded, "online_eagle3", tmp_path, train_share=0.2, seeds=2, results=file, experiment="two")
    found = {row.metric: row.value for row in read_rows(file) if row.cell == "all"}
    assert found["acceptance_length"] == result["cells"][-1]["acceptance_length"]
    assert found["acceptance_length_ci95"] >= 0
    assert found["speedup_over_no_speculation_ci95"] >= 0
    with pytest.raises(UserError, match="--save-drafter: --seeds 2"):
        _options(recorded, "online_eagle3", seeds=2, save_drafter=tmp_path / "new")


def test_intervals_are_students():
    cells = [[Cell("all", 5, value, 0.5, 1.0, 10.0, 1.0)] for value in (1.0, 2.0, 3.0)]
    (mean,), (width,) = mean_cells(cells), half_widths(cells)
    assert (mean.acceptance_length, mean.requests, mean.domain) == (2.0, 5, "all")
    assert width["acceptance_length"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t of 2 degrees at 0.975
    assert width["acceptance_rate"] == 0
    assert half_widths(cells[:1]) == [{}]


def _outcome(accepted: int) -> Outcome:
    return Outcome("d", emitted=11 + accepted, steps=10, draft_steps=10, drafted=40, accepted=accepted, seconds=1.0)


def test_recovery_is_the_first_stretch_as_good_as_the_legs_end():
    slow, fast = [_outcome(2)] * 60, [_outcome(20)] * 90
    assert requests_to_recover([*slow, *fast]) == 60 - 2  # 23 of 25 requests at the end's rate are 95 % of it
    assert requests_to_recover(fast) == 0
    assert requests_to_recover(fast[:40]) is None


def test_recovery_is_told_where_each_domain_is_one_leg():
    streams = [replace(_outcome(20), domain=domain) for domain in ("a", "b") for _ in range(80)]
    assert recovery(streams) == {"a": 0, "b": 0}
    assert recovery([*streams, *streams]) == {}


def test_legs_begin_where_the_domain_changes():
    assert legs(["a", "a", "b", "a"]) == [("a", range(2)), ("b", range(2, 3)), ("a", range(3, 4))]


def test_domains_that_come_back_have_a_cell_for_each_leg():
    outcomes = [
        replace(_outcome(accepted), domain=domain)
        for domain, accepted in (("a", 0), ("b", 10), ("a", 20))
        for _ in range(12)
    ]
    cells = {cell.domain: cell for cell in summarise(outcomes, outcomes)}
    assert list(cells) == ["a", "b", "a, leg 1", "b, leg 1", "a, leg 2", "all"]
    assert [cells[name].acceptance_length for name in ("a", "a, leg 1", "a, leg 2", "all")] == [2, 1, 3, 2]
    assert cells["a, leg 2"].requests == 12
    for once_or_mixed in (outcomes[:24], outcomes[::12]):
        assert not any("leg" in cell.domain for cell in summarise(once_or_mixed, once_or_mixed))


@pytest.mark.parametrize("policy", ["static_eagle3", "ngram_table"])
def test_a_profile_holds_what_is_right_at_every_place(policy: str, recorded: Path, tmp_path: Path):
    _result(recorded, policy, tmp_path, profile=tmp_path / "profile", k_max=3)
    profile = read_profile(tmp_path / "profile")
    recording = Recording(recorded / "recording")
    requests = [recording.read(request_key(turns, 0)) for turns in TURNS]
    counts = np.diff(profile.ends, prepend=0)
    assert counts.tolist() == [len(r.ids) - r.prompt_tokens - 3 for r in requests]
    if policy == "static_eagle3":
        assert profile.drafter == "eagle3"
        assert not profile.expected.any()
        assert profile.right.mean() < 1, "it was never trained"
    else:
        assert profile.drafter == "ngram"
        first, last = profile.right[: profile.ends[3]], profile.right[profile.ends[-5] :]
        assert last.mean() > first.mean(), "the third answer to the same prompt is known from the first"
        offered = (profile.expected > 0).sum(axis=1)
        assert (profile.right <= offered).all()
        assert (np.diff(profile.expected, axis=1) <= 0).all()
    with pytest.raises(UserError, match="--profile: portfolio has not one drafter to profile"):
        _options(recorded, "portfolio", profile=tmp_path / "other")
    with pytest.raises(UserError, match="no answer is longer than --k-max 99 tokens; lower it"):
        profiling.profile("ngram", 99, requests, profiling.table_places(1 << 20, 99))


def test_bad_input_is_named(recorded: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--policy guess: no such policy; choose from no_speculation"):
        _options(recorded, "guess")
    with pytest.raises(UserError, match="--codec zip: no such codec; choose from bf16, int8, compact, tiny"):
        _options(recorded, "online_eagle3", codec="zip")
    with pytest.raises(UserError, match="--domains guess: choose from labels, clusters, none"):
        _options(recorded, "portfolio", domains="guess")
    with pytest.raises(UserError, match="aurora record"):
        run(ReplayOptions(tmp_path, str(recorded / "order.jsonl"), "portfolio", recorded / "costs.json"))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "never recorded"}))
    with pytest.raises(UserError, match="holds no request of"):
        run(_options(recorded, "portfolio", dataset=str(other)))
    for flag in ("json_file", "results"):
        with pytest.raises(UserError, match=r"nowhere/r\.json: no such directory; create it first"):
            _options(recorded, "portfolio", **{flag: tmp_path / "nowhere" / "r.json"})
    with pytest.raises(UserError, match="cannot be written; give another file"):
        _options(recorded, "portfolio", results=tmp_path)
    with pytest.raises(UserError, match="not a file of results"):
        run(_options(recorded, "portfolio", results=other))
    broken = tmp_path / "costs.json"
    broken.write_text('{"step_costs": {"constant": 1}}')
    with pytest.raises(UserError, match=r"no cost of request.*aurora bench --json"):
        run(_options(recorded, "portfolio", costs=broken))
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"step_costs": {name: 0.1 for name in COSTS if not name.startswith("model")}}))
    with pytest.raises(UserError, match="no cost of model_first_pass; add it from aurora_step_cost_seconds"):
        run(_options(recorded, "online_draft_model", costs=older))
    with pytest.raises(UserError, match="--drafters eagle4: choose from eagle3, ngram, model"):
        _options(recorded, "portfolio", drafters=("eagle4",))


def test_conversations_share_the_key_with_their_recording():
    assert request_key(Conversation(("question 0",)).turns, 0) == request_key(TURNS[0], 0)
