"""Recordings: what is written comes back; interrupted ones go on; others are refused."""

import msgspec
import numpy as np
import pytest
import torch

from aurora.config import UserError
from aurora.prompts import Conversation
from aurora.record import select
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


def test_selection_takes_each_conversation_once_and_the_first_of_each_domain():
    rows = [Conversation((f"{d}{i}",), d) for i in (0, 1, 1, 2) for d in ("x", "y")]
    assert [c.turns[0] for c in select(rows, 2)] == ["x0", "y0", "x1", "y1"]
    assert len(select(rows, None)) == 6
