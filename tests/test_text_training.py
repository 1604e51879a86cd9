"""Training the draft model: what its rows are judged by, that it learns, is gated, published, resumed, rolled back."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aurora.config import AuroraConfig
from aurora.store import DrafterStore
from aurora.trace import DraftTrace, encode_traces
from drafters import IncrementalDrafter, TargetWeights, initialise_draft_model, load_draft_model
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, TinyServer, half_right, prompts, tiny_config
from trainer.buffer import Replay
from trainer.draft_model import DraftModelTraining
from trainer.loop import TrainerLoop
from trainer.sinks import Sinks
from trainer.text import build_text_batch, greedy_text
from trainer.verify import accepted_drafts

STEPS = 60


@pytest.fixture(scope="module")
def traffic(directory: Path) -> list[DraftTrace]:
    server = TinyServer(directory)
    asked = list(enumerate(prompts(6))) * 4  # what is held out was also learned: random text teaches nothing else
    return [t for n, (_, p) in enumerate(asked) for t in server.traces(f"r{n}", p, 14, half_right)]


@pytest.fixture
def replay(traffic: list[DraftTrace]) -> Replay:
    replay = Replay(HIDDEN, VOCAB, 64, 0.3)
    for trace in traffic:
        replay.add(trace)
    return replay


def _loop(
    directory: Path,
    run_dir: Path,
    drafters: tuple[str, ...] = ("model",),
    sinks: Sinks | None = None,
    **trainer: object,
) -> TrainerLoop:
    tree = tiny_config(run_dir, **trainer).model_dump()
    tree["speculation"]["drafters"] = drafters
    return TrainerLoop(AuroraConfig.model_validate(tree), directory, clock=lambda: 0.0, model_sinks=sinks)


def test_a_judged_row_is_the_targets_for_the_token_that_follows(replay: Replay, target: TargetWeights) -> None:
    windows = replay.sample(40, random.Random(0))
    batch = build_text_batch(windows)
    assert batch.rows == sum(len(starts) for _, starts in windows) == 40
    assert batch.bounds[-1] == len(batch.ids)
    said = (batch.target_hidden.float() @ target.lm_head.T).argmax(-1)
    known = batch.truth >= 0
    assert known.sum() >= 30
    assert (said[known] == batch.truth[known]).float().mean() > 0.9, "greedy text; bf16 states turn a few near ties"
    read = batch.ids[batch.judged]
    for (sequence, starts), first in zip(windows, np.cumsum([0, *(len(s) for _, s in windows)]), strict=False):
        assert read[first : first + len(starts)].tolist() == sequence.ids[np.array(starts) + 1].tolist()


def test_greedy_text_is_incremental_drafting_up_to_the_first_wrong_draft(replay: Replay, target: TargetWeights) -> None:
    model = initialise_draft_model(target, 6, DRAFT_VOCAB)  # so many of the target's layers that some drafts are right
    found = set()
    for sequence in replay.held_out(6):
        along = greedy_text(model, sequence, 3)
        runs = accepted_drafts(along, sequence)
        assert len(runs) == sequence.end_start - sequence.first_start
        for start, run, drafted in zip(range(sequence.first_start, sequence.end_start), runs, along, strict=True):
            text, truth = sequence.ids[: start + 2], sequence.ids[start + 2 : start + 5].tolist()
            drafts = IncrementalDrafter(model).draft({"a": text}, 3).tokens["a"]
            right = next((i for i, (a, b) in enumerate(zip(drafts, truth, strict=False)) if a != b), len(truth))
            assert run == right
            known = min(right + 1, 3, len(sequence.ids) - 2 - start)
            assert drafted[:known].tolist() == drafts[:known]
            found.add(right)
    assert len(found) > 1


def test_it_learns_publishes_and_leaves_the_target_alone(
    directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    told: list[tuple[int, dict[str, Any]]] = []
    loop = _loop(directory, tmp_path, sinks=Sinks(*[lambda row, number: told.append((number, row))] * 2))
    training = loop.draft_model
    assert training is not None
    frozen = [t.clone() for t in (training.live.embed_tokens, training.live.lm_head)]
    loop.ingest(encode_traces(traffic))
    losses = []
    for _ in range(STEPS):
        assert loop.work()
        assert training.last_step is not None
        losses.append(training.last_step.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert loop.status()["step"] == 0, "nobody drafts with the neural drafter: it gets no time"
    published = training.publish()
    assert published is not None
    assert published.number == training.version == 2
    verdict = published.metadata
    assert verdict["acceptance_length"] > verdict["parent_acceptance_length"] >= 1.0
    *steps, (_, gate), last = told
    assert [row["loss"] for _, row in steps] == losses
    assert gate["gate"]["acceptance_length"] == verdict["acceptance_length"]
    assert last == (2, verdict)
    on_disk = load_draft_model(DrafterStore(loop.config.draft_model_dir).verify(2).path, loop._target)
    assert all(torch.equal(on_disk.state_dict()[n], t) for n, t in training.live.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(frozen, (on_disk.embed_tokens, on_disk.lm_head), strict=True))
    assert loop.status()["draft_model"]["gate"]["passed"]


def test_a_restart_goes_on_from_the_checkpoint(directory: Path, traffic: list[DraftTrace], tmp_path: Path) -> None:
    loop = _loop(directory, tmp_path)
    loop.ingest(encode_traces(traffic))
    for _ in range(4):
        loop.work()
    loop.checkpoint()
    again = _loop(directory, tmp_path)
    again.ingest(encode_traces(traffic))
    assert again.status()["draft_model"]["step"] == 4
    pair = [one.draft_model for one in (loop, again)]
    assert [type(p) for p in pair] == [DraftModelTraining] * 2
    assert len({p.train().loss for p in pair if p is not None}) == 1


def test_after_a_rollback_it_goes_on_from_the_version_that_serves(
    directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    loop = _loop(directory, tmp_path)
    training = loop.draft_model
    assert training is not None
    loop.ingest(encode_traces(traffic))
    for _ in range(STEPS):
        loop.work()
    assert training.publish() is not None
    store = DrafterStore(loop.config.draft_model_dir)
    first = load_draft_model(store.read(1).path, loop._target).state_dict()
    store.reject(2, "drafts worse than version 1")
    training.publish()
    assert training.version == 1
    assert all(torch.equal(t, first[name]) for name, t in training.live.state_dict().items())


def test_two_drafters_share_the_time_as_told(directory: Path, traffic: list[DraftTrace], tmp_path: Path) -> None:
    loop = _loop(directory, tmp_path, ("eagle3", "model"), draft_model_share=0.7)
    training = loop.draft_model
    assert training is not None
    assert not loop.work(), "nothing to learn from yet"
    loop.ingest(encode_traces(traffic))
    for spent_s, steps in ((6.9, (0, 1)), (7.1, (1, 1))):  # of ten seconds
        training.spent_s, loop._spent_s = spent_s, 10.0 - spent_s
        loop.work()
        assert (loop.status()["step"], training.learner.steps) == steps


def test_a_drafter_with_nothing_to_do_leaves_its_time_to_the_other(
    directory: Path, traffic: list[DraftTrace], tmp_path: Path
) -> None:
    loop = _loop(directory, tmp_path, ("eagle3", "model"))
    training = loop.draft_model
    assert training is not None
    loop.ingest(encode_traces(traffic))
    training.learner.tokens = training._before + loop._earned
    training.spent_s, loop._spent_s = 0.0, 10.0
    loop.work()
    assert (loop.status()["step"], training.learner.steps) == (1, 0)
    training.learner.tokens, loop._learner.tokens = training._before, loop._allowed
    training.spent_s, loop._spent_s = 10.0, 0.0
    loop.work()
    assert (loop.status()["step"], training.learner.steps) == (1, 1)
