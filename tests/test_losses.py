import pytest
import torch
from torch.autograd import gradcheck

from trainer.losses import LOSSES, Loss, forward_kl, jensen_shannon, target_probabilities, total_variation


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
