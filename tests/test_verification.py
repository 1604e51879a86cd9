"""Verification by drawing: what is said, how often, and that vLLM still asks for it in the same way."""

import inspect
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from serve import verification

VOCABULARY = 6


@pytest.fixture
def installed() -> Iterator[SimpleNamespace]:
    """vLLM's module with the replacement, as CPU workers have it."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    current_platform.import_kernels()
    theirs = rejection_sampler.rejection_sample
    verification.install()
    yield rejection_sampler
    rejection_sampler.rejection_sample = theirs


def _sampling(temperature: list[float], generators: dict[int, torch.Generator] | None = None) -> SimpleNamespace:
    zeros = [t == 0 for t in temperature]
    return SimpleNamespace(
        temperature=torch.tensor(temperature),
        all_greedy=all(zeros),
        all_random=not any(zeros),
        generators=generators or {},
    )


@given(st.data())
def test_tokens_are_said_up_to_the_first_that_is_no_draft(data: st.DataObject) -> None:
    token = st.integers(0, 2)
    requests = data.draw(st.lists(st.lists(st.tuples(token, token), max_size=4), min_size=1, max_size=5))
    bonus = data.draw(st.lists(token, min_size=len(requests), max_size=len(requests)))
    counts = [len(each) for each in requests]
    drawn, drafts = (torch.tensor([pair[i] for each in requests for pair in each], dtype=torch.long) for i in (0, 1))
    width = max(counts) + 1 + data.draw(st.integers(0, 2))
    said = verification.compare(drawn, drafts, counts, torch.tensor(bonus)[:, None], width)
    for row, pairs, last in zip(said.tolist(), requests, bonus, strict=True):
        expected = []
        for drawn_one, draft in pairs:
            expected.append(drawn_one)
            if drawn_one != draft:
                break
        else:
            expected.append(last)
        assert row == expected + [-1] * (width - len(expected))


def _ask(module: SimpleNamespace, logits: torch.Tensor, drafts: list[list[int]], sampling: SimpleNamespace) -> list:
    """What each request says; the bonus token is 0."""
    counts = [len(each) for each in drafts]
    said = module.rejection_sample(
        torch.tensor([t for each in drafts for t in each], dtype=torch.int32),
        counts,
        max(counts),
        torch.tensor(np.cumsum(counts), dtype=torch.int32),
        None,
        logits,
        torch.zeros(len(counts), 1, dtype=torch.int32),
        sampling,
    )
    return said.tolist()


def test_what_is_said_has_the_targets_distribution(installed: SimpleNamespace) -> None:
    """20,000 requests with two drafts: their first tokens, and their second where the first draft was right."""
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf], [0.0, 0.3, 0.6, 0.9, 1.2, 1.5]])
    many = 20_000
    said = _ask(installed, logits.repeat(many, 1), [[0, 1]] * many, _sampling([1.0] * many))
    p = logits.softmax(dim=-1)
    firsts, seconds = Counter(s[0] for s in said), Counter(s[1] for s in said if s[0] == 0)
    assert {s[1] for s in said if s[0] != 0} == {-1}
    assert {s[2] for s in said if s[:2] == [0, 1]} == {0}
    for counts, expected in ((firsts, p[0]), (seconds, p[1])):
        seen = [counts[token] for token in range(VOCABULARY) if expected[token] > 0]
        wanted = expected[expected > 0].double()
        assert stats.chisquare(seen, (wanted / wanted.sum() * sum(seen)).numpy()).pvalue > 1e-3
    assert firsts[5] == 0


def test_greedy_requests_beside_sampled_ones_say_the_likeliest(installed: SimpleNamespace) -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, VOCABULARY)
    best = logits.argmax(dim=-1).tolist()
    said = _ask(installed, logits, [[token] for token in best], _sampling([0.0, 1.0] * 200))
    assert [s[0] for s in said[::2]] == best[::2]
    assert [s[0] for s in said[1::2]] != best[1::2]


def test_a_seed_draws_the_same_again_whoever_is_beside_it(installed: SimpleNamespace) -> None:
    logits = torch.zeros(6, 1000)

    def said(neighbour: int) -> list:
        torch.manual_seed(neighbour)
        seeded = {1: torch.Generator().manual_seed(7)}
        return _ask(installed, logits, [[0] * 3] * 2, _sampling([1.0, 1.0], seeded))

    first, second = said(1), said(2)
    assert first[1] == second[1]
    assert first[0] != second[0]


def test_it_replaces_a_function_of_the_same_signature() -> None:
    from vllm.v1.sample import rejection_sampler

    theirs = list(inspect.signature(rejection_sampler.rejection_sample).parameters)
    assert theirs[:8] == [
        "draft_token_ids",
        "num_draft_tokens",
        "max_spec_len",
        "cu_num_draft_tokens",
        "draft_probs",
        "target_logits",
        "bonus_token_ids",
        "sampling_metadata",
    ]
    assert set(theirs[8:]) == {"synthetic_mode", "synthetic_conditional_rates", "use_fp64_gumbel"}
    assert rejection_sampler.PLACEHOLDER_TOKEN_ID == -1
