import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trainer.losses import (
    LOSSES,
    Loss,
    accepted_length,
    forward_kl,
    jensen_shannon,
    lump,
    target_probabilities,
    total_variation,
)


def probabilities(n: int = 3, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_equal_finite_differences(loss: Loss) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: loss(x, probabilities()), (logits,))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_perfect_drafter_costs_nothing_and_any_other_something(loss: Loss) -> None:
    p = probabilities()
    assert loss(p.log() + 7.0, p) == pytest.approx([0, 0, 0], abs=1e-9)
    assert (loss(probabilities(seed=2).log(), p) > 1e-3).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_certain_targets_and_certain_drafters_stay_finite(loss: Loss) -> None:
    p = torch.tensor([[1.0, 0.0, 0.0]])
    logits = torch.tensor([[-200.0, 100.0, 0.0]], requires_grad=True)
    value = loss(logits, p)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_values_by_hand() -> None:
    p, logits = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]]).log()
    assert forward_kl(logits, p).item() == pytest.approx(0.143841, abs=1e-5)
    assert total_variation(logits, p).item() == pytest.approx(0.25, abs=1e-6)
    assert jensen_shannon(torch.tensor([[50.0, -50.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(0.693147)


def test_target_probabilities_are_the_heads_renormalised_over_its_rows() -> None:
    hidden, head = torch.randn(2, 4), torch.randn(6, 4)
    full = (hidden @ head.T).softmax(-1)
    kept = torch.tensor([1, 4, 5])
    expected = full[:, kept] / full[:, kept].sum(-1, keepdim=True)
    torch.testing.assert_close(target_probabilities(hidden, head[kept]), expected)


PLAIN = {
    "forward_kl": lambda q, p: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
    "reverse_kl": lambda q, p: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
    "jensen_shannon": lambda q, p: sum(
        (a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))) / 2 for a, b in zip(p, q, strict=True)
    ),
    "total_variation": lambda q, p: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}


def plain_softmax(logits: list[float]) -> list[float]:
    exp = [math.exp(x) for x in logits]
    return [x / sum(exp) for x in exp]


def slope(f: Callable[[list[float]], float], x: list[float], i: int, h: float = 1e-5) -> float:
    """Central difference of f in coordinate i."""
    up, down = list(x), list(x)
    up[i] += h
    down[i] -= h
    return (f(up) - f(down)) / (2 * h)


def numbers(n: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-3, 3), min_size=n, max_size=n)


@pytest.mark.parametrize("name", LOSSES)
@given(numbers(4), numbers(4), st.integers(1, 4))
def test_value_and_gradient_are_those_of_the_plain_definition(
    name: str, x: list[float], y: list[float], m: int
) -> None:
    """Whole (m = 4) and over the m likeliest tokens and the rest."""
    p = plain_softmax(y)
    assume(min(abs(a - b) for a, b in itertools.combinations(p, 2)) > 1e-3)
    order = sorted(range(4), key=lambda i: -p[i])

    def merged(values: list[float]) -> list[float]:
        kept = [values[i] for i in order[:m]]
        return kept if m == 4 else [*kept, sum(values[i] for i in order[m:])]

    def plain(logits: list[float]) -> float:
        return PLAIN[name](merged(plain_softmax(logits)), merged(p))

    q = merged(plain_softmax(x))
    assume(min(abs(a - b) for a, b in zip(q, merged(p), strict=True)) > 1e-3)  # total variation has a kink there
    logits = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = LOSSES[name](*lump(logits, torch.tensor([p], dtype=torch.float64), m))
    value.sum().backward()
    assert value.item() == pytest.approx(plain(x), abs=1e-9)
    assert logits.grad[0].tolist() == pytest.approx([slope(plain, x, i) for i in range(4)], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_merging_all_but_the_likeliest_keeps_the_optimum_and_never_adds_loss(name: str) -> None:
    p, logits = probabilities(6, 8), probabilities(6, 8, seed=3).log()
    whole = LOSSES[name](logits, p)
    assert torch.equal(LOSSES[name](*lump(logits, p, 8)), whole)
    assert torch.equal(LOSSES[name](*lump(logits, p, 99)), whole)
    before = torch.zeros(6, dtype=torch.float64)
    for m in range(1, 8):
        merged = LOSSES[name](*lump(logits, p, m))
        assert (merged <= whole + 1e-12).all()
        assert (merged >= before - 1e-12).all(), "more kept tokens say more"
        assert LOSSES[name](*lump(p.log(), p, m)) == pytest.approx([0] * 6, abs=1e-9)
        before = merged


@pytest.mark.parametrize("name", LOSSES)
def test_merged_gradients_equal_finite_differences(name: str) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: LOSSES[name](*lump(x, probabilities(3, 6), 2)), (logits,))


def expected_accepted(q: list[list[float]], p: list[list[float]]) -> float:
    """Speculative sampling played out: every path of drafts, every place where the target stops it."""
    total = 0.0
    for path in itertools.product(range(len(q[0])), repeat=len(q)):
        drafted = math.prod(q[j][token] for j, token in enumerate(path))
        reached = 1.0
        for j, token in enumerate(path):
            accept = min(1.0, p[j][token] / q[j][token])
            total += drafted * reached * (1 - accept) * j
            reached *= accept
        total += drafted * reached * len(q)
    return total


@given(numbers(9), numbers(9))
def test_accepted_length_is_what_speculative_sampling_accepts_on_average(x: list[float], y: list[float]) -> None:
    p = [plain_softmax(y[i : i + 3]) for i in (0, 3, 6)]
    q = [plain_softmax(x[i : i + 3]) for i in (0, 3, 6)]
    assume(min(abs(a - b) for i in range(3) for a, b in zip(p[i], q[i], strict=True)) > 1e-3)
    logits = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    rows = [logits[None, i : i + 3] for i in (0, 3, 6)]
    targets = [torch.tensor([row], dtype=torch.float64) for row in p]
    lost = sum(value.sum() for value in accepted_length(rows, targets, [torch.zeros(1, dtype=torch.int64)] * 3))
    lost.backward()

    def plain(values: list[float]) -> float:
        return 3 - expected_accepted([plain_softmax(values[i : i + 3]) for i in (0, 3, 6)], p)

    assert lost.item() == pytest.approx(plain(x), abs=1e-9)
    assert logits.grad.tolist() == pytest.approx([slope(plain, x, i) for i in range(9)], abs=1e-6)


def test_accepted_length_follows_the_parents_of_a_tree() -> None:
    """Two rollouts; the second forks at depth 1."""
    p = [probabilities(2, 4), probabilities(3, 4, seed=1)]
    logits = [probabilities(2, 4, seed=2).log(), probabilities(3, 4, seed=3).log()]
    alpha = [1 - total_variation(x, y) for x, y in zip(logits, p, strict=True)]
    first, second = accepted_length(logits, p, [torch.tensor([7, 9]), torch.tensor([0, 1, 1])])
    torch.testing.assert_close(1 - first, alpha[0])
    torch.testing.assert_close(1 - second, alpha[1] * alpha[0][[0, 1, 1]])
