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
from trainer.verify import Sampling, acceptance_chance, right_drafts, said_probabilities, sampled_drafts


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
def test_said_probabilities_are_those_of_a_plain_definition(sequence: Sequence, directory: Path, how: Sampling) -> None:
    head = TargetWeights.load(directory).lm_head
    found = said_probabilities(sequence, head, how)
    assert len(found) == len(sequence.hidden)
    for row in range(sequence.first_start, len(sequence.hidden)):
        p = (sequence.hidden[row].float() @ head.T / how.temperature).softmax(-1)
        order = p.argsort(descending=True).tolist()
        kept = order[: how.top_k or len(order)]
        total, inside = sum(float(p[t]) for t in kept), []
        for token in kept:
            inside.append(token)
            if sum(float(p[t]) for t in inside) / total >= how.top_p:
                break
        token = int(sequence.ids[row + 1])
        expected = float(p[token]) / sum(float(p[t]) for t in inside)
        assert token in inside, "the text is greedy, so its tokens are always among those kept"
        assert float(found[row]) == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def model(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Eagle3:
    """The drafter of day 0."""
    config = tiny_config(tmp_path_factory.mktemp("run"))
    version = ensure_drafter(DrafterStore(config.store_dir), directory, config.speculation, 0)
    return load_drafter(version.path, TargetWeights.load(directory))


def test_a_drafter_at_zero_temperature_is_accepted_as_far_as_it_is_right(sequence: Sequence, model: Eagle3) -> None:
    """In the limit q is one-hot, and a text that was certain leaves the right drafts only."""
    certain = torch.ones(len(sequence.hidden))
    found = sampled_drafts(model, sequence, 3, certain, temperature=1e-6, generator=torch.Generator().manual_seed(0))
    assert found.tolist() == right_drafts(model, sequence, 3).tolist()


def test_a_sampled_draft_is_accepted_with_its_chance(sequence: Sequence, model: Eagle3) -> None:
    """At T = 0.5: the first draft with min(1, q / p); the second with that times its own."""
    p = torch.linspace(0.002, 0.02, len(sequence.hidden))
    generator = torch.Generator().manual_seed(0)
    draws = np.stack([sampled_drafts(model, sequence, 2, p, temperature=0.5, generator=generator) for _ in range(600)])
    starts = range(sequence.first_start, sequence.end_start)
    batch = build_batch([(sequence, starts)], 2)
    expected = np.ones(len(starts))
    with torch.no_grad():
        states = list(run_rollouts(model, batch.context, batch.nodes))
    for depth, (label, state) in enumerate(zip(batch.labels, states, strict=True)):
        q = torch.zeros(len(label.truth), len(model.t2d))
        q[:, model.draft_ids] = (model.logits(state).detach() / 0.5).softmax(-1)
        said = q.gather(1, label.truth.clamp_min(0)[:, None])[:, 0].where(label.truth >= 0, 0.0)
        chance = (said / p[label.target]).clamp_max(1.0).numpy()
        expected = expected[: len(chance)] * chance
        found = (draws[:, : len(chance)] > depth).mean(0)
        assert np.abs(found - expected).max() < 5 * 0.5 / np.sqrt(len(draws))
    assert 0.02 < expected.mean() < 0.98, "neither certain nor hopeless"
