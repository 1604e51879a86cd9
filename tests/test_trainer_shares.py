"""Shares of a batch: together they are the batch, in what is computed, added up and learned."""

import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.config import RLConfig, TrainerConfig
from drafters import Eagle3Config, TargetWeights, initialise
from tests.tiny import DRAFT_VOCAB, filled_replay
from trainer.buffer import Replay
from trainer.learner import Learner, StepMetrics
from trainer.member import take_step
from trainer.rollout import build_batch
from trainer.shares import Share, Windows, split

OLDEST = 0


@pytest.fixture(scope="module")
def replay(target: TargetWeights) -> Replay:
    return filled_replay(Path(target.name), 4)


class Threads:
    """Workers as threads of this process: they add up in order of rank."""

    def __init__(self, world: int) -> None:
        self.barrier, self.slots = threading.Barrier(world, timeout=60), [None] * world

    def of(self, rank: int) -> "ThreadPeers":
        return ThreadPeers(self, rank)


class ThreadPeers:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def total(self, values: torch.Tensor) -> torch.Tensor:
        self.threads.slots[self.rank] = values
        self.threads.barrier.wait()
        total = sum(self.threads.slots)
        self.threads.barrier.wait()
        return total

    def add_gradients(self, model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = self.total(parameter.grad)


def new_learner(target: TargetWeights, config: TrainerConfig) -> Learner:
    return Learner(initialise(target, Eagle3Config.for_target(target.config, DRAFT_VOCAB), seed=0), target, config)


def together(learners: list[Learner], shares: list[Share]) -> list[StepMetrics]:
    """One step of all learners, each in a thread."""
    threads, found = Threads(len(learners)), [None] * len(learners)

    def run(rank: int) -> None:
        learners[rank].peers = threads.of(rank)
        found[rank] = take_step(learners[rank], shares[rank], OLDEST, "cpu")[0]

    running = [threading.Thread(target=run, args=(rank,)) for rank in range(len(learners))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert None not in found
    return found


def parameters(learner: Learner) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(learner.model.parameters()).detach()


def numbers(metrics: StepMetrics) -> list[float]:
    by_depth = [*metrics.loss_per_depth, *metrics.acceptance_per_depth]
    policy = [metrics.rl_share, metrics.rl_loss, metrics.rl_clipped, metrics.actions]
    return [metrics.step, metrics.loss, metrics.grad_norm, metrics.rows, metrics.rejected_rows, *by_depth, *policy]


def windows_of(replay: Replay, rows: int, seed: int) -> Windows:
    return replay.sample(rows, random.Random(seed))


@settings(max_examples=8)
@given(
    world=st.integers(1, 5),
    rows=st.integers(1, 48),
    seed=st.integers(0, 99),
    loss=st.sampled_from(["forward_kl", "reverse_kl", "total_variation", "accepted_length"]),
    rejected_weight=st.sampled_from([0.0, 0.5]),
    rl_weight=st.sampled_from([0.0, 0.5]),
)
def test_workers_with_a_share_each_learn_what_one_learns_from_all(
    target: TargetWeights,
    replay: Replay,
    world: int,
    rows: int,
    seed: int,
    loss: str,
    rejected_weight: float,
    rl_weight: float,
) -> None:
    rl = RLConfig(weight=rl_weight, after_steps=0, ramp_steps=1)
    config = TrainerConfig(precision="fp32", warmup_steps=1, loss=loss, rejected_weight=rejected_weight, rl=rl)
    one, several = new_learner(target, config), [new_learner(target, config) for _ in range(world)]
    untrained = parameters(one)
    for step in range(3):
        windows = windows_of(replay, rows, seed + step)
        batch = build_batch(windows, config.ttt_steps, oldest_version=OLDEST, rejected=config.learns_rejected)
        expected = one.step(batch)
        found = together(several, split(windows, world, config.ttt_steps))
        for learner, metrics in zip(several, found, strict=True):
            assert numbers(metrics) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-6)
            assert learner.missed == one.missed
            assert learner.tokens == one.tokens
            moved, apart = (parameters(one) - untrained).norm(), (parameters(learner) - parameters(one)).norm()
            assert apart <= 0.01 * moved, "of single parameters Adam turns rounded tiny gradients into steps"
            assert torch.equal(parameters(learner), parameters(several[0]))


@given(st.integers(1, 7), st.integers(1, 60), st.integers(0, 99))
def test_every_start_is_in_one_share_that_counts_and_shares_are_even(
    replay: Replay, world: int, rows: int, seed: int
) -> None:
    windows = windows_of(replay, rows, seed)
    shares = split(windows, world, 3)
    starts = [
        (place, sequence.position + start)
        for share in shares
        if share.place.counts
        for place, (sequence, mine) in zip(share.place.windows, share.windows, strict=True)
        for start in mine
    ]
    assert starts == [(i, sequence.position + start) for i, (sequence, mine) in enumerate(windows) for start in mine]
    sizes = [sum(len(mine) for _, mine in share.windows) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_a_share_reads_the_context_of_the_whole_window(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.shares.MAX_CONTEXT", 2)
    (sequence, starts) = max(windows_of(replay, 60, 0), key=lambda window: len(window[1]))
    later = split([(sequence, starts[4:])], 2, 3)[1]
    ((part, mine),) = later.windows
    assert part.position == sequence.position + starts[4] - 2
    assert mine[-1] + part.position == starts[-1] + sequence.position
    assert len(part.aux) == mine[-1] + 1


def test_a_share_that_travels_is_the_same_and_takes_no_more_along_than_it_needs(replay: Replay) -> None:
    windows = windows_of(replay, 24, 1)
    first, second = split(windows, 2, 3)
    for share in (first, second):
        arrived = pickle.loads(pickle.dumps(share))
        assert arrived.place == share.place
        ours, theirs = (build_batch(each.windows, 3, oldest_version=OLDEST) for each in (share, arrived))
        assert torch.equal(ours.context.aux, theirs.context.aux)
        assert torch.equal(ours.target_hidden, theirs.target_hidden)
        assert [a.token.tolist() for a in ours.actions] == [a.token.tolist() for a in theirs.actions]
        rows = sum(part.aux.nbytes + part.hidden.nbytes for part, _ in share.windows)
        assert len(pickle.dumps(share)) < 2 * rows + 20_000
