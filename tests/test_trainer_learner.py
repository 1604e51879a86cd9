import copy
import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from aurora.config import RLConfig, TrainerConfig
from drafters import Eagle3Config, TargetWeights, initialise
from drafters.checksum import checksum
from tests.tiny import DRAFT_VOCAB, HIDDEN, VOCAB, TinyServer, filled_replay, prompts, write_target
from trainer.buffer import Replay
from trainer.checkpoint import FILE, CheckpointRefused, load_checkpoint, save_checkpoint
from trainer.flops import step_flops
from trainer.learner import Learner, StepMetrics
from trainer.rollout import Batch, build_batch

SETTINGS = TrainerConfig(learning_rate=3e-3, warmup_steps=4, batch_rows=64, precision="fp32", rejected_weight=0.5)


@pytest.fixture(scope="module")
def replay(target: TargetWeights) -> Replay:
    return filled_replay(Path(target.name), 8)


@pytest.fixture
def learner(target: TargetWeights) -> Learner:
    return new_learner(target)


def new_learner(target: TargetWeights, settings: TrainerConfig = SETTINGS) -> Learner:
    config = Eagle3Config.for_target(target.config, DRAFT_VOCAB)
    return Learner(initialise(target, config, seed=0), target, settings)


def batch(replay: Replay, seed: int, rejected: bool = True) -> Batch:
    windows = replay.sample(SETTINGS.batch_rows, random.Random(seed))
    return build_batch(windows, SETTINGS.ttt_steps, oldest_version=0 if rejected else None)


def values(metrics: StepMetrics) -> tuple:
    return metrics.step, metrics.loss, metrics.loss_per_depth, metrics.acceptance_per_depth, metrics.grad_norm


def test_the_loss_falls_and_acceptance_rises_at_every_depth(learner: Learner, replay: Replay) -> None:
    first = learner.step(batch(replay, 0))
    for seed in range(1, 60):
        learner.step(batch(replay, seed))
    last = learner.step(batch(replay, 0))
    assert last.loss < 0.6 * first.loss
    assert all(new < old for new, old in zip(last.loss_per_depth, first.loss_per_depth, strict=True))
    assert last.acceptance_length > first.acceptance_length + 0.3
    assert (last.rows, last.rejected_rows > 0, last.step, learner.tokens) == (64, True, 61, 61 * 64)


def test_the_target_is_not_trained(learner: Learner, replay: Replay, target: TargetWeights) -> None:
    before = [t.clone() for t in (target.embed_tokens, target.lm_head, target.norm)]
    learner.step(batch(replay, 0))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (target.embed_tokens, target.lm_head, target.norm), strict=True)
    )


def test_what_each_sequence_missed_adds_up_to_the_share_accepted(learner: Learner, replay: Replay) -> None:
    both = batch(replay, 0)
    metrics = learner.step(both)
    level, known = both.nodes[0], both.labels[0].truth >= 0
    asked = [int(known[a:b].sum()) for a, b in pairwise(level.bounds)]
    wrong = sum(m * n for m, n in zip(learner.missed, asked, strict=True))
    assert 1 - wrong / sum(asked) == pytest.approx(metrics.acceptance_per_depth[0])
    assert len(set(learner.missed)) > 1


def test_the_count_of_operations_is_what_pytorch_counts(learner: Learner, replay: Replay) -> None:
    for seed, rejected in ((0, True), (1, False)):
        packed = batch(replay, seed, rejected)
        with FlopCounterMode(display=False) as counter:
            learner.step(packed)
        assert step_flops(learner.model.config, packed) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_learning_rate_warms_up(learner: Learner, replay: Replay) -> None:
    rates = [learner.step(batch(replay, 0)).learning_rate for _ in range(6)]
    assert rates == pytest.approx([r * 3e-3 for r in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])


def test_rejected_rows_have_a_weight_of_their_own(replay: Replay, target: TargetWeights) -> None:
    both = batch(replay, 0)
    silent = new_learner(target, SETTINGS.model_copy(update={"rejected_weight": 0.0})).step(both)
    without = new_learner(target).step(batch(replay, 0, rejected=False))
    weighted = new_learner(target).step(both)
    assert silent.loss == pytest.approx(without.loss, rel=1e-5)
    assert silent.grad_norm == pytest.approx(without.grad_norm, rel=1e-4)
    assert weighted.loss_per_depth[0] == pytest.approx(without.loss_per_depth[0], rel=1e-5), "depth 0 is never rejected"
    assert weighted.loss_per_depth[1:] != without.loss_per_depth[1:]


def test_accepted_rows_have_a_weight_of_their_own(replay: Replay, target: TargetWeights) -> None:
    both = batch(replay, 0)
    weighted = new_learner(target).step(both)
    doubled = new_learner(target, SETTINGS.model_copy(update={"accepted_weight": 2.0, "rejected_weight": 1.0})).step(
        both
    )
    only_rejected = new_learner(target, SETTINGS.model_copy(update={"accepted_weight": 0.0})).step(both)
    assert doubled.loss == pytest.approx(weighted.loss, rel=1e-5), "only the ratio of the weights counts"
    assert only_rejected.loss_per_depth[0] == 0.0
    assert only_rejected.loss_per_depth[1] > 0


def test_merged_targets_are_learned_from(replay: Replay, target: TargetWeights) -> None:
    both = batch(replay, 0)
    whole, all_kept, few = (
        new_learner(target, SETTINGS.model_copy(update={"target_top_m": m})).step(both) for m in (0, DRAFT_VOCAB, 4)
    )
    assert (all_kept.loss, all_kept.grad_norm) == (whole.loss, whole.grad_norm)
    assert few.loss < whole.loss
    learner = new_learner(target, SETTINGS.model_copy(update={"target_top_m": 4}))
    first, *_, last = [learner.step(batch(replay, seed % 5)) for seed in range(41)]
    assert last.acceptance_length > first.acceptance_length + 0.2


def test_the_accepted_length_of_rollouts_can_be_raised_directly(replay: Replay, target: TargetWeights) -> None:
    learner = new_learner(target, SETTINGS.model_copy(update={"loss": "accepted_length"}))
    steps = [learner.step(batch(replay, seed, rejected=False)) for seed in range(80)]
    assert 0 < steps[-1].loss < steps[0].loss < SETTINGS.ttt_steps
    assert steps[0].loss <= sum(steps[0].loss_per_depth), "some rollouts end before the last depth"
    assert steps[-1].acceptance_length > steps[0].acceptance_length + 0.2


def test_the_policy_comes_in_on_schedule_and_imitation_goes(replay: Replay, target: TargetWeights) -> None:
    rl = RLConfig(weight=0.5, after_steps=2, ramp_steps=2)
    learner, imitating = new_learner(target, SETTINGS.model_copy(update={"rl": rl})), new_learner(target)
    steps = [learner.step(batch(replay, seed)) for seed in range(5)]
    plain = [imitating.step(batch(replay, seed)) for seed in range(3)]
    assert [step.rl_share for step in steps] == [0, 0, 0, 0.25, 0.5]
    assert [step.loss for step in steps[:3]] == [step.loss for step in plain]
    assert [step.actions > 0 for step in steps] == [False, False, False, True, True]
    assert steps[3].loss < sum(0.8**j * loss for j, loss in enumerate(steps[3].loss_per_depth))


def test_the_policy_learns_what_was_accepted(target: TargetWeights) -> None:
    """With no imitation left, only accepted drafts say what the right tokens are."""
    rl = RLConfig(weight=1.0, after_steps=0, ramp_steps=1, anchor=0.0)
    replay = Replay(HIDDEN, VOCAB, 64, 0.01)
    server = TinyServer(Path(target.name))
    for i, prompt in enumerate(prompts(4)):
        for trace in server.traces(f"r{i}", prompt, 14, lambda truth, _step: truth[:2]):
            replay.add(trace)
    learner = new_learner(target, SETTINGS.model_copy(update={"rl": rl, "batch_rows": 64}))
    steps = [learner.step(batch(replay, seed)) for seed in range(60)]
    assert steps[0].rl_share == 0.0
    assert steps[-1].acceptance_length > steps[0].acceptance_length + 0.2


def test_a_batch_without_actions_teaches_by_imitation_alone(replay: Replay, target: TargetWeights) -> None:
    rl = RLConfig(weight=0.5, after_steps=0, ramp_steps=1)
    learner, plain = new_learner(target, SETTINGS.model_copy(update={"rl": rl})), new_learner(target)
    for seed in range(3):
        assert values(learner.step(batch(replay, seed, rejected=False))) == values(
            plain.step(batch(replay, seed, rejected=False))
        )


def test_a_new_vocabulary_keeps_rows_and_moments(learner: Learner, replay: Replay, target: TargetWeights) -> None:
    for seed in range(3):
        learner.step(batch(replay, seed))
    old = learner.model.draft_ids
    head, moments = learner.model.lm_head.weight, learner.optimizer.state[learner.model.lm_head.weight]
    row, moment = head.detach().clone(), moments["exp_avg"].clone()
    new = torch.arange(VOCAB - DRAFT_VOCAB, VOCAB)
    learner.change_vocabulary(new)
    assert torch.equal(learner.model.draft_ids, new)
    assert learner.model.t2d.nonzero().flatten().tolist() == new.tolist()
    kept, came = 100, int(new[~torch.isin(new, old)][0])
    before, after = int((old == kept).nonzero()), int((new == kept).nonzero())
    assert torch.equal(head[after], row[before])
    assert torch.equal(moments["exp_avg"][after], moment[before])
    assert torch.equal(head[int((new == came).nonzero())], target.lm_head[came])
    assert not moments["exp_avg_sq"][int((new == came).nonzero())].any()
    assert learner.step(batch(replay, 4)).loss > 0


def test_resuming_gives_the_step_that_not_stopping_gives(replay: Replay, target: TargetWeights, tmp_path: Path) -> None:
    going = new_learner(target)
    for seed in range(3):
        going.step(batch(replay, seed))
    going.change_vocabulary(torch.arange(VOCAB - DRAFT_VOCAB, VOCAB))
    save_checkpoint(tmp_path, going, replay.emitted_counts)
    resumed = new_learner(target)
    counts = load_checkpoint(tmp_path, resumed)
    assert counts is not None
    assert torch.equal(counts, replay.emitted_counts)
    for seed in range(3, 6):
        assert values(going.step(batch(replay, seed))) == values(resumed.step(batch(replay, seed)))
    states = going.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert going.tokens == resumed.tokens


def test_no_checkpoint_is_no_error(learner: Learner, tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, learner) is None


def test_a_damaged_or_foreign_checkpoint_is_refused_and_changes_nothing(
    learner: Learner, target: TargetWeights, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, learner, torch.zeros(VOCAB))
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    before = copy.deepcopy(learner.model.state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointRefused, match="damaged"):
        load_checkpoint(tmp_path, learner)
    path.write_bytes(whole)
    smaller = Eagle3Config.for_target(target.config, DRAFT_VOCAB - 1)
    with pytest.raises(CheckpointRefused, match="d2t is of shape"):
        load_checkpoint(tmp_path, Learner(initialise(target, smaller, 0), target, SETTINGS))
    other = TargetWeights.load(write_target(tmp_path / "other", seed=9))
    stranger = Learner(initialise(other, learner.model.config, 0), other, SETTINGS)
    with pytest.raises(CheckpointRefused, match="another target"):
        load_checkpoint(tmp_path, stranger)
    assert all(torch.equal(before[name], t) for name, t in learner.model.state_dict().items())


def test_bfloat16_products_follow_float32(target: TargetWeights, replay: Replay) -> None:
    plain, fast = (new_learner(target, SETTINGS.model_copy(update={"precision": p})) for p in ("fp32", "bf16"))
    for seed in range(30):
        exact, rounded = plain.step(batch(replay, seed)), fast.step(batch(replay, seed))
        assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    assert rounded.acceptance_length == pytest.approx(exact.acceptance_length, abs=0.15)
    assert all(p.dtype == torch.float32 for p in fast.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), fast.model.parameters(), strict=True))


def state_of(learner: Learner) -> str:
    moments = ((f"{i}{n}", v) for i, s in enumerate(learner.optimizer.state.values()) for n, v in sorted(s.items()))
    return checksum([*sorted(learner.model.state_dict().items()), *moments], f"{learner.steps} {learner.tokens}")


@pytest.fixture(scope="module")
def saved(target: TargetWeights, replay: Replay, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    learner = new_learner(target)
    learner.step(batch(replay, 0))
    file = save_checkpoint(tmp_path_factory.mktemp("saved"), learner, replay.emitted_counts)
    return file.read_bytes(), state_of(learner)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_changed_checkpoint_is_refused_or_says_the_same(
    saved: tuple[bytes, str], target: TargetWeights, data: st.DataObject
) -> None:
    whole, expected = saved
    header = 8 + int.from_bytes(whole[:8], "little")
    anywhere = st.integers(0, header - 1) | st.integers(0, len(whole) - 1)
    changed = bytearray(whole[: data.draw(anywhere)] if data.draw(st.booleans()) else whole)
    for place in data.draw(st.lists(anywhere, max_size=4)):
        if place < len(changed):
            changed[place] ^= data.draw(st.integers(1, 255))
    learner = new_learner(target)
    before = state_of(learner)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / FILE).write_bytes(changed)
        try:
            load_checkpoint(Path(directory), learner)
        except CheckpointRefused:
            assert bytes(changed) != whole
            assert state_of(learner) == before
        else:
            assert state_of(learner) == expected
