import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora.trace import DraftTrace
from trainer.buffer import MIN_STARTS, Replay, is_held_out
from trainer.sequence import OpenSequence

H, VOCAB, PROMPT = 2, 50, 4
MakeTrace = Callable[..., DraftTrace]


def token(position: int) -> int:
    """The true token at a position of every request."""
    return position * 7 % VOCAB


def state(position: int, width: int) -> np.ndarray:
    return np.full((1, width), position, np.uint16)


def trace(make: MakeTrace, request: str, position: int, n: int, k: int, accepted: int, domain: str = "") -> DraftTrace:
    """n rows from `position`, k of them drafts, `accepted` of these right; states say their position, or 999."""
    true_rows = n - k + accepted
    ids = [token(position + i) if i < true_rows else (token(position + i) + 1) % VOCAB for i in range(n)]
    emitted = [token(position + n - k + i) for i in range(accepted + 1)]
    states = [position + i if i < true_rows else 999 for i in range(n)]
    return make(
        request_id=request,
        position=position,
        prompt_tokens=PROMPT,
        input_ids=np.array(ids, np.int32),
        emitted_ids=np.array(emitted, np.int32),
        k=k,
        accepted=accepted,
        hidden=np.concatenate([state(s, H) for s in states]),
        aux=np.concatenate([state(s, 3 * H) for s in states]),
        domain=domain,
    )


def request(make: MakeTrace, name: str, steps: list[tuple[int, int]], domain: str = "") -> list[DraftTrace]:
    """Prefill, then verification steps of (k, accepted)."""
    traces = [trace(make, name, 0, PROMPT, 0, 0, domain)]
    at = PROMPT
    for k, accepted in steps:
        traces.append(trace(make, name, at, k + 1, k, accepted, domain))
        at += accepted + 1
    return traces


def assert_aligned(replay: Replay) -> None:
    """Each row holds the token and the state of its own position, and drafts end where the target disagreed."""
    for queue in (replay._train, replay._held_out):
        for sequence in queue.sequences.values():
            s = sequence.snapshot()
            assert s.ids.tolist() == [token(s.position + i) for i in range(len(s.ids))]
            rows = s.hidden.view(torch.uint16).numpy()
            assert rows[:, 0].tolist() == list(range(s.position, s.position + len(rows)))
            assert len(s.ids) - len(rows) in (0, 1)
            for b in s.drafts:
                true = [token(s.position + b.start + 2 + i) for i in range(len(b.path))]
                assert b.path[: b.accepted].tolist() == true[: b.accepted]
                assert b.accepted == len(b.path) or b.path[b.accepted] != true[b.accepted]
                assert (b.hidden.view(torch.uint16).numpy() == 999).all()
                assert len(b.hidden) == len(b.path) - b.accepted
                assert len(b.q) == len(b.path)


STEPS = st.lists(st.integers(0, 4).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), max_size=12)


@given(st.lists(STEPS, min_size=1, max_size=4), st.data())
def test_lost_and_repeated_traces_never_misalign(requests: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    replay = Replay(H, VOCAB, limit_mib=8, holdout=0.3)
    streams = [request(_make, f"r{i}", steps) for i, steps in enumerate(requests)]
    while any(streams):
        stream = data.draw(st.sampled_from([s for s in streams if s]))
        fate = data.draw(st.sampled_from(["keep", "keep", "keep", "lose", "repeat"]))
        next_trace = stream.pop(0)
        if fate != "lose":
            replay.add(next_trace)
        if fate == "repeat":
            replay.add(next_trace)
    assert_aligned(replay)
    for sequence, starts in replay.sample(10_000, random.Random(0)):
        assert sequence.first_start <= starts[0] <= starts[-1] < sequence.end_start


def _make(**fields: object) -> DraftTrace:
    k = int(fields["k"])
    plain = {
        "step": 0, "time_s": 0.0, "draft_q": np.ones(k, np.float32), "top_q_ids": np.zeros((k, 0), np.int32),
        "top_q": np.zeros((k, 0), np.float32), "drafter_version": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
    }  # fmt: skip
    return DraftTrace(**plain | fields)


def test_every_verified_draft_is_known_the_accepted_ones_too() -> None:
    sequence = OpenSequence.begin(trace(_make, "r", 0, PROMPT, 0, 0))
    for t in request(_make, "r", [(2, 2), (0, 0), (3, 1)]):
        sequence.append(t)
    first, second = sequence.snapshot().drafts
    assert (first.start, first.accepted, first.path.tolist()) == (PROMPT - 1, 2, [token(PROMPT + 1), token(PROMPT + 2)])
    assert first.hidden.shape == (0, H)
    assert (second.start, second.accepted, len(second.path), len(second.hidden)) == (PROMPT + 3, 1, 3, 2)
    assert (second.version, second.temperature, second.q.tolist()) == (1, 1.0, [1.0, 1.0, 1.0])


def test_the_logged_q_counts_only_where_drafts_were_sampled() -> None:
    import msgspec

    q = np.array([0.5, 0.25], np.float32)
    for temperature, expected, drafted_at in ((0.0, [1.0, 1.0], 1.0), (0.7, [0.5, 0.25], 0.7)):
        sequence = OpenSequence.begin(trace(_make, "r", 0, PROMPT, 0, 0))
        prompt, verified = request(_make, "r", [(2, 1)])
        sequence.append(prompt)
        sequence.append(msgspec.structs.replace(verified, draft_q=q, temperature=temperature))
        (draft,) = sequence.snapshot().drafts
        assert (draft.q.tolist(), draft.temperature) == (expected, drafted_at)


def test_rejected_rows_may_be_missing() -> None:
    import msgspec

    replay = Replay(H, VOCAB, 8, 0.01)
    prompt, verified = request(_make, "r", [(3, 1)])
    replay.add(prompt)
    replay.add(msgspec.structs.replace(verified, hidden=verified.hidden[:2], aux=verified.aux[:2]))
    (sequence,) = (s.snapshot() for s in replay._train.sequences.values())
    (draft,) = sequence.drafts
    assert (draft.accepted, len(draft.path), len(draft.hidden), len(sequence.hidden)) == (1, 3, 0, PROMPT + 2)


def test_a_gap_splits_the_request() -> None:
    replay = Replay(H, VOCAB, 8, 0.01)
    first, _lost, *rest = request(_make, "r", [(2, 1), (2, 0), (2, 2), (2, 2)])
    for t in [first, *rest]:
        replay.add(t)
    assert replay.stats().gaps == 1
    assert [s.position for s in replay._train.sequences.values()] == [0, PROMPT + 2]
    assert_aligned(replay)


def test_a_preempted_request_that_is_computed_again_is_taken_once() -> None:
    replay = Replay(H, VOCAB, 8, 0.01)
    traces = request(_make, "r", [(2, 1), (2, 0)])
    for t in [*traces, *traces]:
        replay.add(t)
    assert replay.stats().duplicates == len(traces)
    assert replay.stats().sequences == 1


def test_a_prompt_cached_in_part_starts_later() -> None:
    sequence = OpenSequence.begin(trace(_make, "r", 2, 2, 0, 0))
    sequence.append(trace(_make, "r", 2, 2, 0, 0))
    sequence.append(trace(_make, "r", 4, 3, 2, 0))
    s = sequence.snapshot()
    assert (s.position, s.first_start, s.end_start) == (2, 1, 2)
    assert s.drafts[0].start == 1


def test_the_oldest_leave_beyond_the_bound_and_are_counted() -> None:
    replay = Replay(H, VOCAB, limit_mib=0.001, holdout=0.01)
    for i in range(20):
        for t in request(_make, f"r{i}", [(0, 0)] * 8):
            replay.add(t)
    stats = replay.stats()
    assert stats.evicted > 10
    assert stats.mib <= 0.002
    assert len(replay._open) == len(replay._train.sequences) + len(replay._held_out.sequences)
    assert max(replay._train.sequences.values(), key=lambda s: s.request_id == "r19").request_id == "r19"


def test_held_out_requests_are_never_trained_on() -> None:
    replay = Replay(H, VOCAB, 8, holdout=0.3)
    for i in range(60):
        for t in request(_make, f"r{i}", [(2, 2), (2, 2)]):
            replay.add(t)
    trained = {s.request_id for s, _ in replay.sample(10_000, random.Random(0))}
    held = {s.request_id for s in replay.held_out(100)}
    assert trained | held == {f"r{i}" for i in range(60)}
    assert not trained & held
    assert held == {f"r{i}" for i in range(60) if is_held_out(f"r{i}", 0.3)}
    assert 8 <= len(held) <= 28
    newest = [s.request_id for s in replay.held_out(3)]
    assert newest == sorted(held, key=lambda r: int(r[1:]))[-3:]


def test_sampling_keeps_a_small_domain_alive_and_favours_the_new() -> None:
    replay = Replay(H, VOCAB, 8, holdout=0.01)
    for i in range(100):
        for t in request(_make, f"r{i}", [(0, 0)] * 10, domain="rare" if i < 2 else "common"):
            replay.add(t)
    for sequence, _ in replay.sample(10_000, random.Random(1)):
        if int(sequence.request_id[1:]) < 75:
            replay.learned(sequence, 0.5)
    rng = random.Random(0)
    drawn = [replay.sample(1, rng)[0][0] for _ in range(400)]
    rare = sum(s.domain == "rare" for s in drawn)
    assert 0.05 < rare / 400 < 0.3, "2% of the rows, drawn by the square root"
    common = [int(s.request_id[1:]) for s in drawn if s.domain == "common"]
    assert 0.6 < sum(i >= 75 for i in common) / len(common) < 0.85


def served(count: int) -> Replay:
    """A replay of equal requests r0, r1, ..."""
    replay = Replay(H, VOCAB, 8, holdout=0.01)
    for i in range(count):
        for t in request(_make, f"r{i}", [(0, 0)] * 10):
            replay.add(t)
    return replay


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 1000))
def test_sequences_are_drawn_by_what_they_still_teach_and_none_starves(missed: list[float], seed: int) -> None:
    replay = served(len(missed))
    for sequence, _ in replay.sample(10_000, random.Random(seed)):
        replay.learned(sequence, missed[int(sequence.request_id[1:])])
    rng = random.Random(seed)
    drawn = Counter(replay.sample(1, rng)[0][0].request_id for _ in range(2000))
    weights = [max(share, 0.1) for share in missed]
    for i, weight in enumerate(weights):
        expected = weight / sum(weights)
        assert abs(drawn[f"r{i}"] / 2000 - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_later_passes_outweigh_earlier_ones() -> None:
    replay = served(2)
    for missed in (1.0, 0.2, 0.2, 0.2):
        for sequence, _ in replay.sample(10_000, random.Random(0)):
            replay.learned(sequence, missed)
    assert set(replay._missed.values()) == {0.2 + 0.8 / 8}


def test_the_same_seed_and_passes_draw_the_same() -> None:
    def drawn() -> list[str]:
        replay, rng, names = served(8), random.Random(3), []
        for _ in range(40):
            sequence, starts = replay.sample(4, rng)[0]
            replay.learned(sequence, len(names) % 10 / 10)
            names.append(f"{sequence.request_id} {starts}")
        return names

    assert drawn() == drawn()


def test_what_was_learned_of_a_sequence_leaves_with_it() -> None:
    replay = Replay(H, VOCAB, limit_mib=0.001, holdout=0.01)
    for i in range(20):
        for t in request(_make, f"r{i}", [(0, 0)] * 8):
            replay.add(t)
        for sequence, _ in replay.sample(8, random.Random(i)):
            replay.learned(sequence, 0.5)
    gone = request(_make, "r0", [(0, 0)] * 8)
    old = OpenSequence.begin(gone[0])
    for t in gone:
        old.append(t)
    replay.learned(old.snapshot(), 0.5)
    assert len(replay._missed) == len(replay._train.sequences)


def test_sample_gives_as_many_rows_as_asked() -> None:
    replay = Replay(H, VOCAB, 8, holdout=0.01)
    for i in range(5):
        for t in request(_make, f"r{i}", [(2, 2)] * 6):
            replay.add(t)
    rows = [len(starts) for _, starts in replay.sample(30, random.Random(0))]
    assert sum(rows) == 30
    assert not Replay(H, VOCAB, 8, 0.1).sample(30, random.Random(0))


def test_emitted_tokens_are_counted() -> None:
    replay = Replay(H, VOCAB, 8, holdout=0.01)
    for t in request(_make, "r", [(2, 1)]):
        replay.add(t)
    assert replay.emitted_counts.nonzero().flatten().tolist() == sorted(token(PROMPT + i) for i in range(3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draft_q", np.ones(1, np.float32)),
        ("hidden", np.zeros((3, 9), np.uint16)),
        ("aux", np.zeros((2, 6), np.uint16)),
        ("accepted", 3),
        ("position", -1),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(field: str, value: object) -> None:
    import msgspec

    replay = Replay(H, VOCAB, 8, 0.1)
    bad = msgspec.structs.replace(trace(_make, "r", 4, 3, 2, 1), **{field: value})
    with pytest.raises(ValueError, match="trace of r at position"):
        replay.add(bad)
    assert replay.stats().sequences == 0


def test_min_starts_is_reached_by_growing() -> None:
    replay = Replay(H, VOCAB, 8, 0.01)
    ready = []
    for t in request(_make, "r", [(0, 0)] * MIN_STARTS):
        replay.add(t)
        ready.append(replay.ready)
    assert ready == [False] * MIN_STARTS + [True]
