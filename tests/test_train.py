"""`aurora train`: traces or a recording in, a drafter that passed the gate out."""

from pathlib import Path

import pytest
import torch

from aurora.cli import main
from aurora.results import read_rows
from aurora.trace import DraftTrace, decode_traces, encode_traces
from aurora.trace_log import TraceLog, log_files
from drafters import TargetWeights, load_drafter
from tests.tiny import DRAFT_VOCAB, TinyServer, greedy_manifest, half_right, prompts, write_target
from trainer.loop import TrainerLoop
from trainer.recording import Recording, RecordingWriter, Verified, traces_of
from trainer.sequence import OpenSequence, Sequence

TINY = ("batch_rows=64", "warmup_steps=2", "learning_rate=0.003", "holdout=0.3", "precision=fp32")


@pytest.fixture(scope="module")
def traffic(directory: Path) -> list[DraftTrace]:
    server = TinyServer(directory)
    asked = list(enumerate(prompts(6))) * 4  # what is held out was also learned: random text teaches nothing else
    return [t for n, (_, p) in enumerate(asked) for t in server.traces(f"r{n}", p, 12, half_right, version=40)]


@pytest.fixture
def log(directory: Path, traffic: list[DraftTrace], tmp_path: Path) -> Path:
    written = TraceLog(tmp_path / "log", 1 << 30, str(directory))
    for i in range(0, len(traffic), 25):
        written.write(encode_traces(traffic[i : i + 25]))
    return tmp_path / "log"


def train(log: Path, out: Path, *more: str) -> int:
    settings = [part for setting in TINY for part in ("--set", f"trainer.{setting}")]
    return main(["train", str(log), "--out", str(out), "--draft-vocab", str(DRAFT_VOCAB), *settings, *more])


def test_a_log_gives_a_better_drafter_that_can_be_trained_further(
    log: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(log, tmp_path / "first", "--steps", "25") == 0
    said = capsys.readouterr().out
    assert "after 25 steps" in said
    assert f"serve with --drafter {tmp_path / 'first'}" in said
    target = TargetWeights.load(directory)
    first = load_drafter(tmp_path / "first", target).state_dict()
    code = train(log, tmp_path / "second", "--drafter", str(tmp_path / "first"), "--steps", "80")
    assert code == 0
    second = load_drafter(tmp_path / "second", target).state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_logged_drafts_are_learned_from_with_discounted_returns(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    original = TrainerLoop.train

    def noting(loop: TrainerLoop):
        step = original(loop)
        taken.append(step.actions)
        assert loop.config.trainer.rl.discount == 0.9
        return step

    monkeypatch.setattr(TrainerLoop, "train", noting)
    rl = ("--set", "trainer.rl.weight=0.5", "--set", "trainer.rl.after_steps=0", "--set", "trainer.rl.discount=0.9")
    train(log, tmp_path / "out", "--steps", "4", *rl)
    assert taken[0] == 0
    assert min(taken[1:]) > 0, "drafts of version 40 are the newest there are"


def test_no_improvement_writes_nothing(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(log, tmp_path / "out", "--steps", "1", "--set", "trainer.gate_margin=3") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named_and_left_out(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = log_files(log)[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert train(log, tmp_path / "out", "--steps", "80") == 0
    assert f"{damaged}: left out" in capsys.readouterr().err


def test_what_cannot_be_used_is_named(
    log: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(log: Path, *more: str, out: str = "new") -> str:
        assert train(log, tmp_path / out, *more) == 2
        return capsys.readouterr().err

    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "neither traces (capture.log_dir) nor a recording" in refused(directory)
    assert "it exists; give a new directory" in refused(log, out="log")
    assert "its parent does not exist" in refused(log, out="a/b")
    assert "--steps 0: must be above 0" in refused(log, "--steps", "0")
    assert "only keys of the trainer" in refused(log, "--set", "server.port=1")
    assert "not an EAGLE-3 drafter" in refused(log, "--drafter", str(log))
    other = write_target(tmp_path / "other", hidden_size=40, head_dim=10)
    assert "the traces are not of" in refused(log, "--model", str(other))
    for path in log_files(log)[1:]:
        path.unlink()
    few = refused(log, "--set", "trainer.holdout=0.000001")
    assert "0 to judge by are too few" in few
    assert not (tmp_path / "new").exists()


def test_several_seeds_give_a_confidence_interval(
    log: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "results.json"
    settings = [part for setting in TINY for part in ("--set", f"trainer.{setting}")]
    command = ["train", str(log), "--draft-vocab", str(DRAFT_VOCAB), *settings, "--steps", "3"]
    assert main([*command, "--seeds", "3", "--results", str(rows), "--experiment", "seeds", "--cell", "tiny"]) == 0
    found = {row.metric: row for row in read_rows(rows)}
    assert f"±{found['acceptance_length_ci95'].value:.3f} (95 %, 3 seeds)" in capsys.readouterr().out
    one = []
    for seed in range(3):
        assert main([*command, "--seed", str(seed), "--results", str(rows), "--experiment", f"{seed}"]) == 0
        one += [row.value for row in read_rows(rows) if row.experiment == f"{seed}"]
    assert len(set(one)) > 1
    length = found["acceptance_length"]
    assert length.value == pytest.approx(sum(one) / 3)
    assert (length.cell, length.policy) == ("tiny", "online_eagle3")
    assert length.baseline is not None
    assert main([*command, "--seeds", "2", "--out", str(tmp_path / "new")]) == 2
    assert "keep the one of a single seed" in capsys.readouterr().err
    assert main(command) == 2
    assert "--out: give a new directory" in capsys.readouterr().err


@pytest.fixture
def recording(directory: Path, traffic: list[DraftTrace], tmp_path: Path) -> Recording:
    how = greedy_manifest(directory, max_tokens=12)
    writer = RecordingWriter(tmp_path / "recording", how)
    for request in dict.fromkeys(t.request_id for t in traffic):
        whole = together([t for t in traffic if t.request_id == request])
        ids = whole.ids[: len(whole.hidden) + 1]
        writer.add(Sequence(request, "", 0, whole.prompt_tokens, ids, whole.hidden, whole.aux, ()))
    writer.flush()
    return Recording(tmp_path / "recording")


def together(traces: list[DraftTrace]) -> Sequence:
    sequence = OpenSequence.begin(traces[0])
    for trace in traces:
        sequence.append(trace)
    return sequence.snapshot()


def test_a_recording_is_learned_from_without_drafts(recording: Recording, tmp_path: Path) -> None:
    assert train(recording.directory, tmp_path / "out", "--steps", "80") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_traces_of_a_recording_are_those_of_serving_it(recording: Recording) -> None:
    request = recording.read(next(iter(recording)))
    said, start = request.ids.tolist(), request.prompt_tokens
    drafts = [
        Verified(start + 1, [said[start + 1], said[start + 2], -1], 2, 7),
        Verified(start + 5, [0, -1], 0, 8),
    ]
    traces = decode_traces(encode_traces(list(traces_of(request, 5, drafts))))
    assert traces[0].position == start - 5
    assert [t.k for t in traces if t.k] == [3, 2]
    assert [t for trace in traces for t in trace.emitted_ids.tolist()] == said[start:]
    again = together(traces)
    assert again.ids.tolist() == said[start - 5 :]
    assert torch.equal(again.hidden, request.hidden[start - 5 :])
    assert torch.equal(again.aux, request.aux[start - 5 :])
    assert [(d.start, d.accepted, d.version, len(d.hidden)) for d in again.drafts] == [(4, 2, 7, 0), (8, 0, 8, 0)]
    assert again.ids[again.drafts[1].start + 1] == said[start + 4], "it was drafted after the last known token"
