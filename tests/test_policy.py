"""Policy gradient on verified drafts: returns, baseline, clipping, schedule, and the gradient itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from aurora.config import RLConfig
from trainer.losses import reverse_kl, total_variation
from trainer.policy import clipped_surrogate, discounted_return, expected_return, policy_gradient, share_at
from trainer.rollout import Actions

IDS = torch.tensor([2, 3, 5, 8])  # the draft vocabulary


def actions(node: list[int], token: list[int], q: list[float], accepted: list[int], left: list[int]) -> Actions:
    whole = [torch.tensor(values, dtype=torch.int64) for values in (node, token, accepted, left)]
    return Actions(whole[0], whole[1], torch.tensor(q), torch.ones(len(q)), whole[2], whole[3])


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 6), st.integers(1, 6), st.floats(0.1, 1.0))
def test_the_return_is_the_discounted_sum_of_later_accepted_tokens(accepted: int, depth: int, discount: float) -> None:
    """Action j = `depth` of a draft of which `accepted` are accepted: sum over i >= j of discount^(i-j) [i <= a]."""
    plain = sum(discount ** (i - depth) for i in range(depth, 20) if i <= accepted)
    from_here = torch.tensor([max(accepted - depth + 1, 0), 9])
    assert discounted_return(from_here, discount)[0].item() == pytest.approx(plain, rel=1e-5)


@given(st.floats(0.0, 1.0), st.integers(1, 5), st.floats(0.1, 1.0))
def test_the_baseline_is_the_mean_return_of_tokens_accepted_alike(alpha: float, left: int, discount: float) -> None:
    stops = [alpha**a * (1 - alpha) for a in range(left)] + [alpha**left]
    mean = sum(chance * sum(discount**i for i in range(a)) for a, chance in enumerate(stops))
    found = expected_return(torch.tensor([alpha, 0.5]), torch.tensor([left, 7]), discount)
    assert found[0].item() == pytest.approx(mean, abs=1e-5)


def test_the_surrogate_is_ppos() -> None:
    """Schulman et al. 2017, figure 1: no gain beyond the clip in the direction in which the ratio has moved already."""
    q = torch.tensor([0.5] * 6, dtype=torch.float64)
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], dtype=torch.float64)
    advantage = torch.tensor([2.0, 2, 2, -2, -2, -2], dtype=torch.float64)
    log_pi = (ratio * q).log().requires_grad_()
    value = clipped_surrogate(log_pi, q, advantage, 0.2)
    value.sum().backward()
    assert value.tolist() == pytest.approx([-1.0, -2.0, -2.4, 1.6, 2.0, 3.0])
    assert log_pi.grad.tolist() == pytest.approx([-1.0, -2.0, 0.0, 0.0, 2.0, 3.0])


def test_gradients_equal_finite_differences() -> None:
    found = actions([0, 1, 1, 2], [2, 5, 8, 3], [0.3, 0.2, 0.9, 1.0], [2, 0, 1, 3], [3, 3, 1, 4])
    config = RLConfig(weight=1.0, discount=0.9, clip=0.3, anchor=0.5)
    p = rows(3, 1).softmax(-1)
    baseline_of = rows(3, 2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        # The baseline is held where it is: it is no part of the gradient.
        log_pi = x.log_softmax(-1)[found.node].gather(-1, torch.searchsorted(IDS, found.token)[:, None]).squeeze(-1)
        alpha = 1 - total_variation(baseline_of[found.node], p[found.node])
        advantage = discounted_return(found.accepted, 0.9) - expected_return(alpha, found.left, 0.9)
        anchor = 0.5 * reverse_kl(x[found.node], p[found.node])
        return (clipped_surrogate(log_pi, found.q.double(), advantage, 0.3) + anchor).mean()

    x = baseline_of.clone().requires_grad_()
    assert gradcheck(loss, (x,))
    mine = baseline_of.clone().requires_grad_()
    policy = policy_gradient([mine], [p], [found], IDS, config)
    assert policy is not None
    policy.loss.backward()
    loss(x).backward()
    torch.testing.assert_close(mine.grad, x.grad)
    assert policy.actions == 4


def test_on_policy_it_is_the_gradient_of_the_expected_return() -> None:
    """Averaged over the actions that q draws, for any baseline of the node: the baseline adds nothing."""
    x = rows(1, 3).requires_grad_()
    q = x.detach().softmax(-1)[0]
    gained = torch.tensor([0, 2, 1, 3])  # what the environment gives for each token
    p = rows(1, 4).softmax(-1)
    config = RLConfig(weight=1.0, anchor=0.0, clip=0.2)
    mean = torch.zeros(4, dtype=torch.float64)
    for column, token in enumerate(IDS.tolist()):
        taken = actions([0], [token], [q[column].item()], [int(gained[column])], [4])
        policy = policy_gradient([x], [p], [taken], IDS, config)
        assert policy is not None
        (gradient,) = torch.autograd.grad(policy.loss, x)
        mean += q[column] * gradient[0]
    (exact,) = torch.autograd.grad(-(x.softmax(-1)[0] * gained).sum(), x)
    torch.testing.assert_close(mean, exact[0], atol=1e-6, rtol=1e-6)


def test_of_greedy_drafts_only_confident_errors_are_lowered() -> None:
    config = RLConfig(weight=1.0, anchor=0.0, clip=0.2)
    p = torch.tensor([[0.25] * 4])

    def pull(confidence: float, accepted: int) -> float:
        """Gradient of the drafted token's logit, which has probability `confidence`."""
        rest = math.log((1 - confidence) / 3)
        x = torch.tensor([[math.log(confidence), rest, rest, rest]], requires_grad=True)
        policy = policy_gradient([x], [p], [actions([0], [2], [1.0], [accepted], [3])], IDS, config)
        assert policy is not None
        policy.loss.backward()
        return float(x.grad[0, 0])

    assert pull(0.5, 0) == 0.0
    assert pull(0.95, 0) > 0
    assert pull(0.6, 3) < pull(0.1, 3) < 0


def test_pi_is_taken_at_the_temperature_of_the_draft() -> None:
    x, p = rows(1, 5), rows(1, 6).softmax(-1)
    q = float((x / 0.5).softmax(-1)[0, 1])
    taken = Actions(*(torch.tensor([v]) for v in (0, 3, q, 0.5, 1, 2)))
    policy = policy_gradient([x], [p], [taken], IDS, RLConfig(weight=1.0, anchor=0.0, clip=0.01))
    assert policy is not None
    assert policy.clipped == 0.0, "unchanged weights have ratio 1"


def test_tokens_that_left_the_vocabulary_are_no_actions() -> None:
    x, p = rows(2, 7), rows(2, 8).softmax(-1)
    gone = actions([0, 1], [4, 99], [1.0, 1.0], [1, 1], [2, 2])
    assert policy_gradient([x], [p], [gone], IDS, RLConfig(weight=1.0)) is None
    assert policy_gradient([x], [p], [actions([], [], [], [], [])], IDS, RLConfig(weight=1.0)) is None


def test_the_schedule_goes_from_imitation_to_the_policy() -> None:
    config = RLConfig(weight=0.8, after_steps=10, ramp_steps=4)
    assert [share_at(config, step) for step in (0, 10, 11, 12, 14, 1000)] == pytest.approx([0, 0, 0.2, 0.4, 0.8, 0.8])
    assert share_at(RLConfig(), 10**9) == 0.0
