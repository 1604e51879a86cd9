"""Workers in processes of their own, over Gloo: the same result as one worker, and none of them is needed."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aurora.config import AuroraConfig, ConfigError, TrainerConfig, UserError, load_config
from drafters import Eagle3Config, TargetWeights, initialise
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, TinyServer, half_right, prompts
from trainer.buffer import Replay
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.crew import Crew
from trainer.learner import Learner, StepMetrics
from trainer.local_helpers import LOOPBACK, LocalHelper, start_helpers
from trainer.rollout import build_batch

SETTINGS = TrainerConfig(
    learning_rate=3e-3, warmup_steps=4, batch_rows=64, precision="fp32", rejected_weight=0.5, nice=0, workers=3
)
START_S = 120.0


@pytest.fixture(scope="module")
def replay(directory: Path) -> Replay:
    server, replay = TinyServer(directory), Replay(HIDDEN, VOCAB, 64, 0.01)
    for i, prompt in enumerate(prompts(8)):
        for trace in server.traces(f"r{i}", prompt, 14, half_right):
            replay.add(trace)
    return replay


@pytest.fixture(scope="module")
def helpers(directory: Path) -> Iterator[list[LocalHelper]]:
    made = start_helpers(SETTINGS, directory)
    yield made
    for helper in made:
        helper.close()


def new_learner(target: TargetWeights, settings: TrainerConfig = SETTINGS) -> Learner:
    return Learner(initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB), seed=0), target, settings)


class Alone:
    """One worker's training, step by step: what all others are compared with."""

    def __init__(self, learner: Learner, replay: Replay) -> None:
        self.learner, self.replay = learner, replay

    def step(self) -> StepMetrics:
        windows = self.replay.sample(SETTINGS.batch_rows, random.Random(self.learner.steps))
        return self.learner.step(build_batch(windows, SETTINGS.ttt_steps, oldest_version=0))


class Together:
    """The same with helpers."""

    def __init__(self, learner: Learner, replay: Replay, helpers: list[LocalHelper], timeout_s: float = 60.0) -> None:
        self.learner, self.replay = learner, replay
        self.crew = Crew(learner, helpers, LOOPBACK, "cpu", timeout_s)
        assert self.crew.wait_for_all(START_S)

    def step(self) -> StepMetrics:
        windows = self.replay.sample(SETTINGS.batch_rows, random.Random(self.learner.steps))
        return self.crew.step(windows, 0)[0]

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *_: object) -> None:
        self.crew.part()  # the helpers go on to the next test


def assert_same(ours: "Together | Alone", theirs: Alone, steps: int) -> None:
    """The next steps have equal numbers and end in equal weights and moments."""
    for _ in range(steps):
        mine, other = ours.step(), theirs.step()
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert mine.acceptance_per_depth == other.acceptance_per_depth
        assert (mine.step, mine.rows, mine.rejected_rows) == (other.step, other.rows, other.rejected_rows)
    if isinstance(ours, Together):
        ours.crew.settle()
    assert ours.learner.missed == theirs.learner.missed
    for a, b in zip(ours.learner.model.parameters(), theirs.learner.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            mine, other = ours.learner.optimizer.state[a][name], theirs.learner.optimizer.state[b][name]
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_workers_learns_what_one_learns(
    target: TargetWeights, replay: Replay, helpers: list[LocalHelper], world: int
) -> None:
    with Together(new_learner(target), replay, helpers[: world - 1]) as several:
        alone = Alone(new_learner(target), replay)
        assert several.crew.size == world
        assert_same(several, alone, 6)
        for learner in (several.learner, alone.learner):  # what the leader alone decides reaches all
            learner.change_vocabulary(torch.arange(VOCAB - DRAFT_VOCAB, VOCAB))
        assert_same(several, alone, 2)
        assert several.crew.lost == 0


def test_a_worker_that_is_killed_costs_no_step_and_joins_again(
    target: TargetWeights, replay: Replay, helpers: list[LocalHelper]
) -> None:
    with Together(new_learner(target), replay, helpers) as several:
        alone = Alone(new_learner(target), replay)
        assert_same(several, alone, 2)
        os.kill(helpers[0].submit("ready").result(START_S), signal.SIGKILL)
        assert_same(several, alone, 2)
        assert several.crew.lost == 1
        assert several.crew.wait_for_all(START_S)
        assert several.crew.size == 3
        assert_same(several, alone, 2)


def test_a_worker_that_hangs_is_left_behind_until_it_answers(
    target: TargetWeights, replay: Replay, helpers: list[LocalHelper]
) -> None:
    with Together(new_learner(target), replay, helpers[:1], timeout_s=2.0) as several:
        alone = Alone(new_learner(target), replay)
        assert_same(several, alone, 1)
        process = helpers[0].submit("ready").result(START_S)
        os.kill(process, signal.SIGSTOP)
        try:
            assert_same(several, alone, 2)
            assert several.crew.size == 1
        finally:
            os.kill(process, signal.SIGCONT)
        assert several.crew.wait_for_all(START_S)
        assert_same(several, alone, 2)
        assert (several.crew.size, several.crew.lost) == (2, 1)


def test_checkpoints_go_from_any_number_of_workers_to_any_other(
    target: TargetWeights, replay: Replay, helpers: list[LocalHelper], tmp_path: Path
) -> None:
    through = Alone(new_learner(target), replay)
    with Together(new_learner(target), replay, helpers[:1]) as two:
        assert_same(two, through, 2)
        save_checkpoint(tmp_path / "two", two.learner, replay.emitted_counts)
    one = Alone(new_learner(target), replay)
    load_checkpoint(tmp_path / "two", one.learner)
    assert_same(one, through, 2)
    save_checkpoint(tmp_path / "one", one.learner, replay.emitted_counts)
    resumed = new_learner(target)
    load_checkpoint(tmp_path / "one", resumed)
    with Together(resumed, replay, helpers[:1]) as two:
        assert_same(two, through, 2)


def test_bad_numbers_of_workers_are_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.workers: .* greater than or equal to 1, got 0"):
        load_config(None, {"trainer.workers": 0})
    with pytest.raises(ConfigError, match="only eagle3 is trained by several"):
        load_config(None, {"trainer.workers": 2, "speculation.drafters": ["ngram"]})
    with pytest.raises(ConfigError, match="there is one worker only"):
        load_config(None, {"trainer.sharded": True})
    settings = AuroraConfig.model_validate({"trainer": {"workers": 2, "num_gpus": 1}}).trainer
    if torch.cuda.device_count() < 2:
        with pytest.raises(UserError, match="each takes a GPU"):
            start_helpers(settings, directory)


def test_shards_on_two_workers_learn_what_one_learns_and_a_lost_one_takes_its_steps_along(
    directory: Path, target: TargetWeights, replay: Replay
) -> None:
    settings = SETTINGS.model_copy(update={"workers": 2, "sharded": True})
    (helper,) = start_helpers(settings, directory)
    with Together(new_learner(target, settings), replay, [helper]) as several:
        alone = Alone(new_learner(target), replay)
        assert_same(several, alone, 2)
        held = sum(parameter.to_local().numel() for parameter in several.crew.working.model.parameters())
        assert held < 0.6 * sum(parameter.numel() for parameter in several.learner.model.parameters())
        for learner in (several.learner, alone.learner):  # as the gate does, after `settle`
            learner.change_vocabulary(torch.arange(VOCAB - DRAFT_VOCAB, VOCAB))
        assert_same(several, alone, 2)
        several.step()
        os.kill(helper.submit("ready").result(START_S), signal.SIGKILL)
        assert several.step().step == 5, "step 5 was not gathered and is taken again"
        assert several.crew.lost == 1
        assert several.crew.wait_for_all(START_S)
        assert several.step().step == 6
        several.crew.settle()
        assert (several.learner.steps, several.crew.size, several.crew.lost) == (6, 2, 1)
    helper.close()
