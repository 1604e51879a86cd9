"""Recordings: what is written comes back; interrupted ones go on; others are refused."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from aurora.config import UserError
from aurora.prompts import Conversation
from aurora.record import Recorder, RecordOptions, select
from trainer.recording import MANIFEST, Manifest, Recording, RecordingWriter, request_key
from trainer.sequence import Sequence

H = 8
HOW = Manifest(model="m", fingerprint="f", temperature=0.0, top_p=1.0, top_k=0, max_tokens=16, seed=0)


def _sequence(key: str, rows: int, domain: str = "sql") -> Sequence:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, H, generator=generator).bfloat16()
    aux = torch.randn(rows, 3 * H, generator=generator).bfloat16()
    return Sequence(key, domain, 0, rows // 2, np.arange(rows + 1, dtype=np.int64) * 7, hidden, aux, ())


def _same(a: Sequence, b: Sequence) -> bool:
    plain = (a.request_id, a.domain, a.position, a.prompt_tokens) == (
        b.request_id,
        b.domain,
        b.position,
        b.prompt_tokens,
    )
    return plain and bool((a.ids == b.ids).all()) and torch.equal(a.hidden, b.hidden) and torch.equal(a.aux, b.aux)


def test_requests_come_back_as_they_were(tmp_path):
    writer = RecordingWriter(tmp_path / "r", HOW)
    sequences = [_sequence(f"k{i}", 4 + 3 * i, domain=f"d{i % 2}") for i in range(5)]
    for sequence in sequences[:3]:
        writer.add(sequence)
    writer.flush()
    for sequence in sequences[3:]:
        writer.add(sequence)
    writer.flush()
    recording = Recording(tmp_path / "r")
    assert recording.manifest == HOW
    assert len(recording) == 5
    assert all(_same(recording.read(s.request_id), s) for s in sequences)
    assert writer.nbytes == sum(f.stat().st_size for f in (tmp_path / "r").glob("*.safetensors"))


def test_an_interrupted_recording_goes_on_where_it_stopped(tmp_path):
    first = RecordingWriter(tmp_path, HOW)
    first.add(_sequence("a", 5))
    first.flush()
    first.add(_sequence("lost", 5))  # never flushed
    (tmp_path / "requests-000002.part").write_bytes(b"half a shard")
    second = RecordingWriter(tmp_path, HOW)
    assert second.keys == {"a"}
    second.add(_sequence("b", 6))
    second.flush()
    recording = Recording(tmp_path)
    assert len(recording) == 2
    assert "lost" not in recording
    assert _same(recording.read("b"), _sequence("b", 6))


def test_another_way_of_recording_is_refused_and_nothing_changes(tmp_path):
    RecordingWriter(tmp_path, HOW)
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=r"temperature 0\.0, not 1\.0: give another --out"):
        RecordingWriter(tmp_path, msgspec.structs.replace(HOW, temperature=1.0))
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no recording"):
        RecordingWriter(tmp_path, HOW)
    with pytest.raises(UserError, match="aurora record"):
        Recording(tmp_path)


def test_what_a_killed_first_run_left_is_no_obstacle(tmp_path):
    (tmp_path / "manifest.part").write_text("{")
    RecordingWriter(tmp_path, HOW)
    assert len(Recording(tmp_path)) == 0


def test_a_damaged_shard_is_named(tmp_path):
    writer = RecordingWriter(tmp_path, HOW)
    writer.add(_sequence("a", 5))
    writer.flush()
    shard = tmp_path / "requests-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(UserError, match=r"requests-000001\.safetensors: damaged"):
        Recording(tmp_path)


def test_keys_tell_conversations_and_turns_apart():
    keys = [request_key(turns, turn) for turns in (("a", "b"), ("ab",), ("a",)) for turn in range(len(turns))]
    assert len(set(keys)) == 4
    assert request_key(("a", "b"), 1) == request_key(("a", "b"), 1)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_k", -2), ("top_p", 0.0), ("concurrency", 0), ("max_gib", -1.0)]
)
def test_values_that_make_no_sense_are_named(field, value, tmp_path):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} {value}: must "):
        RecordOptions("d", tmp_path, **{field: value})


def test_selection_takes_each_conversation_once_and_the_first_of_each_domain():
    rows = [Conversation((f"{d}{i}",), d) for i in (0, 1, 1, 2) for d in ("x", "y")]
    assert [c.turns[0] for c in select(rows, 2)] == ["x0", "y0", "x1", "y1"]
    assert len(select(rows, None)) == 6


class _Engine:
    """Answers after one trace for each token; a request's traces can be drained before it is answered."""

    def __init__(self, make_trace, fail_at: int | None = None) -> None:
        self.make_trace = make_trace
        self.fail_at = fail_at
        self.sink: list = []
        self.asked: list = []

    async def start(self) -> None: ...

    async def chat(self, request_id: str, messages: list[dict[str, str]], sampling) -> str:
        self.asked.append((request_id, list(messages), sampling))
        if len(self.asked) == self.fail_at:
            raise RuntimeError("the engine died")
        name = f"{request_id}-0a1b"
        rows = {"k": 0, "accepted": 0, "request_id": name, "prompt_tokens": 3, "draft_q": np.ones(0, np.float32)}
        rows |= {"top_q_ids": np.zeros((0, 0), np.int32), "top_q": np.zeros((0, 0), np.float32)}
        for position, count in ((0, 3), (3, 1), (4, 1)):
            ids = np.arange(position, position + count, dtype=np.int32)
            states = {"hidden": np.zeros((count, H), np.uint16), "aux": np.zeros((count, 3 * H), np.uint16)}
            emitted = np.array([position + count], np.int32)
            self.sink.append(self.make_trace(position=position, input_ids=ids, emitted_ids=emitted, **rows, **states))
            await asyncio.sleep(0.01)
        return f"answer {len(self.asked)}"

    async def drain(self) -> list:
        taken, self.sink = self.sink, []
        return taken


def _record(engine: _Engine, out: Path, talks: list[Conversation], **fields: object) -> RecordingWriter:
    writer = RecordingWriter(out, HOW)
    options = RecordOptions("d", out, concurrency=2, **fields)
    asyncio.run(Recorder(engine, options, writer, drain_s=0.005).record(talks))
    return writer


def test_every_request_of_every_conversation_is_written(make_trace, tmp_path):
    engine = _Engine(make_trace)
    talks = [Conversation((f"q{i}",), "sql") for i in range(6)] + [Conversation(("one", "two"), "code")]
    _record(engine, tmp_path / "r", talks, temperature=1.0, seed=5)
    recording = Recording(tmp_path / "r")
    assert len(recording) == 8
    second = recording.read(request_key(("one", "two"), 1))
    assert (second.domain, second.ids.tolist(), second.prompt_tokens) == ("code", [0, 1, 2, 3, 4, 5], 3)
    turns = {key: messages for key, messages, _ in engine.asked}
    assert [m["role"] for m in turns[request_key(("one", "two"), 1)]] == ["user", "assistant", "user"]
    assert len({sampling.seed for _, _, sampling in engine.asked}) == 8


def test_what_was_answered_before_the_engine_died_is_kept(make_trace, tmp_path):
    talks = [Conversation((f"q{i}",), "sql") for i in range(8)]
    with pytest.raises(ExceptionGroup):
        _record(_Engine(make_trace, fail_at=6), tmp_path, talks)
    kept = len(Recording(tmp_path))
    assert 1 <= kept < 6
    _record(_Engine(make_trace), tmp_path, [t for t in talks if request_key(t.turns, 0) not in Recording(tmp_path)])
    assert len(Recording(tmp_path)) == 8


def test_a_full_recording_stops(make_trace, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.recording._SHARD_BYTES", 1)
    talks = [Conversation((f"q{i}",), "sql") for i in range(40)]
    writer = _record(_Engine(make_trace), tmp_path, talks, max_gib=2e-6)
    assert 0 < len(Recording(tmp_path)) < 40
    assert writer.nbytes >= 2e-6 * 2**30
