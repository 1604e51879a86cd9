"""Acceptance of sampled drafts along a recorded text against the laws of rejection sampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora.store import DrafterStore
from drafters import TargetWeights, ensure_drafter, load_drafter
from drafters.eagle3 import Eagle3
from drafters.rollout import run_rollouts
from tests.tiny import TinyServer, prompts, tiny_config
from trainer.rollout import build_batch
from trainer.sequence import OpenSequence, Sequence
from trainer.verify import (
    NOTHING,
    Sampling,
    TextLaw,
    acceptance_chance,
    accepted_drafts,
    greedy_drafts,
    sampled_drafts,
    text_law,
)


@pytest.fixture(scope="module")
def sequence(directory: Path) -> Sequence:
    """A greedy answer of the tiny target."""
    grown: OpenSequence | None = None
    for trace in TinyServer(directory).traces("r", prompts(1)[0], 24, lambda _truth, _step: []):
        grown = grown or OpenSequence.begin(trace)
        grown.append(trace)
    assert grown is not None
    return grown.snapshot()


def _distribution(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)


@settings(max_examples=200, deadline=None)
@given(_distribution(6), _distribution(6))
def test_the_mean_over_what_is_said_is_what_rejection_sampling_accepts(a: list[float], b: list[float]) -> None:
    p, q = (torch.tensor(weights, dtype=torch.float64) for weights in (a, b))
    p, q = p / p.sum(), q / q.sum()
    assert float((p * acceptance_chance(p, q)).sum()) == pytest.approx(float(torch.minimum(p, q).sum()))


@pytest.mark.parametrize(
    "how", [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.0, top_k=5), Sampling(2.0, 0.5, 3)]
)
def test_the_law_of_a_text_is_that_of_a_plain_definition(sequence: Sequence, directory: Path, how: Sampling) -> None:
    head = TargetWeights.load(directory).lm_head
    drafted = torch.arange(0, len(head), 3)
    law = text_law(sequence, head, drafted, how)
    assert law.said.shape == (len(sequence.hidden),)
    assert law.drafted.shape == (len(sequence.hidden), len(drafted))
    for row in range(sequence.first_start, len(sequence.hidden)):
        p = (sequence.hidden[row].float() @ head.T / how.temperature).softmax(-1)
        order = p.argsort(descending=True).tolist()
        kept = order[: how.top_k or len(order)]
        total, inside = sum(float(p[t]) for t in kept), []
        for token in kept:
            inside.append(token)
            if sum(float(p[t]) for t in inside) / total >= how.top_p:
                break
        left = torch.zeros(len(p))
        left[inside] = p[inside] / p[inside].sum()
        token = int(sequence.ids[row + 1])
        assert token in inside, "the text is greedy, so its tokens are always among those kept"
        assert float(law.said[row]) == pytest.approx(float(left[token]), rel=1e-3)
        assert torch.allclose(law.drafted[row], left[drafted], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def model(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Eagle3:
    """The drafter of day 0."""
    config = tiny_config(tmp_path_factory.mktemp("run"))
    version = ensure_drafter(DrafterStore(config.store_dir), directory, config.speculation, 0)
    return load_drafter(version.path, TargetWeights.load(directory))


def _law(sequence: Sequence, model: Eagle3, said: torch.Tensor) -> TextLaw:
    """A law that gives the text's tokens `said` [T] and everything else next to nothing."""
    return TextLaw(said, torch.zeros(len(sequence.hidden), len(model.draft_ids)))


def test_a_drafter_at_zero_temperature_drafts_greedily(sequence: Sequence, model: Eagle3) -> None:
    """In the limit q is one-hot, and of a text that was certain the right drafts are accepted."""
    law = _law(sequence, model, torch.ones(len(sequence.hidden)))
    found = sampled_drafts(model, sequence, 3, law, temperature=1e-6, generator=torch.Generator().manual_seed(0))
    assert found.tolist() == greedy_drafts(model, sequence, 3).tolist()


def test_a_sampled_draft_is_accepted_with_its_chance(sequence: Sequence, model: Eagle3) -> None:
    """At T = 0.5: the first draft with min(1, q / p); the second with that times its own."""
    p = torch.linspace(0.002, 0.02, len(sequence.hidden))
    generator = torch.Generator().manual_seed(0)
    law = _law(sequence, model, p)
    drafts = [sampled_drafts(model, sequence, 2, law, temperature=0.5, generator=generator) for _ in range(400)]
    accepted = np.stack([accepted_drafts(drawn, sequence) for drawn in drafts])
    starts = range(sequence.first_start, sequence.end_start)
    batch = build_batch([(sequence, starts)], 2)
    expected = np.ones(len(starts))
    with torch.no_grad():
        states = list(run_rollouts(model, batch.context, batch.nodes))
    for depth, (label, state) in enumerate(zip(batch.labels, states, strict=True)):
        q = torch.zeros(len(label.truth), len(model.t2d))
        q[:, model.draft_ids] = (model.logits(state).detach() / 0.5).softmax(-1)
        said = q.gather(1, label.truth.clamp_min(0)[:, None])[:, 0].where(label.truth >= 0, 0.0)
        chance = (said / p[label.target + starts[0] + 1]).clamp_max(1.0).numpy()
        expected = expected[: len(chance)] * chance
        found = (accepted[:, : len(chance)] > depth).mean(0)
        assert np.abs(found - expected).max() < 5 * 0.5 / np.sqrt(len(drafts))
    assert 0.02 < expected.mean() < 0.98, "neither certain nor hopeless"


def test_a_rejected_draft_is_one_that_the_target_wants_less(sequence: Sequence, model: Eagle3) -> None:
    """Rejected tokens come from (q - p)+: never one whose p is at least its q; after it nothing is known."""
    wanted = int(greedy_drafts(model, sequence, 1)[0, 0])
    p = torch.zeros(len(sequence.hidden), len(model.draft_ids))
    p[:, model.draft_ids == wanted] = 1.0
    law = TextLaw(torch.full((len(p),), 0.9), p)
    generator = torch.Generator().manual_seed(0)
    drafts = np.concatenate(
        [sampled_drafts(model, sequence, 3, law, temperature=1.0, generator=generator)[:1] for _ in range(300)]
    )
    truth = int(sequence.ids[sequence.first_start + 2])
    wrong = drafts[drafts[:, 0] != truth]
    assert len(wrong) > 100
    assert wanted not in wrong[:, 0]
    assert (wrong[:, 1:] == NOTHING).all()
