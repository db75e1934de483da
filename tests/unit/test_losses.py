"""The losses against numbers worked out by hand."""

import math

import pytest
import torch

from mede2.trainer.losses import dpo_loss, nll_loss, sum_by_sequence


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, **options):
    values = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return dpo_loss(*(torch.tensor([value], dtype=torch.float64) for value in values), **options)


def test_dpo_by_hand():
    """Log-ratios -10+12 = 2 and -14+13 = -1, so h = 3; at beta 0.5 the logit is 1.5, and -log sigmoid(1.5) =
    log(1 + e^-1.5) = log(1.223130) = 0.201413."""
    loss, chosen_reward, rejected_reward = dpo(-10, -14, -12, -13, beta=0.5)
    assert loss.item() == pytest.approx(0.201413, abs=1e-6)
    assert (chosen_reward.item(), rejected_reward.item()) == (1.0, -0.5)  # 0.5 * 2 and 0.5 * -1


def test_dpo_label_smoothing_by_hand():
    """0.9 * log(1 + e^-1.5) + 0.1 * log(1 + e^1.5) = 0.201413 + 0.1 * 1.5, as log(1 + e^x) = x + log(1 + e^-x)."""
    loss, *_ = dpo(-10, -14, -12, -13, beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.351413, abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_is_log_two_where_policy_is_reference(beta):
    loss, chosen_reward, rejected_reward = dpo(-3, -700, -3, -700, beta=beta)
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen_reward.item() == rejected_reward.item() == 0


def test_dpo_gradient_raises_chosen_and_lowers_rejected():
    """d loss / d chosen = -beta * sigmoid(-1.5) = -0.5 * 0.182426; the rejected one has the other sign."""
    chosen = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-14.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-12.0]), torch.tensor([-13.0])
    losses, *rewards = dpo_loss(chosen, rejected, *reference, beta=0.5)
    losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.091213, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.091213, abs=1e-6)
    assert not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize("margin", [-1e6, 1e6])
def test_dpo_stays_finite_at_extreme_margins(margin):
    """-log sigmoid(x) is -x for x far below zero and 0 far above."""
    loss, *_ = dpo(margin, 0, 0, 0, beta=1.0)
    assert loss.item() == max(0.0, -margin)


def test_nll_counts_weighted_tokens_over_the_global_number():
    """(1*1 + 1*2 + 1*3 + 0*4) / 6 = 1: the denominator is the caller's, not the number of tokens at hand."""
    token_logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    loss = nll_loss(token_logps, torch.tensor([1.0, 1.0, 1.0, 0.0]), num_tokens=6)
    loss.backward()
    assert loss.item() == 1.0
    torch.testing.assert_close(token_logps.grad, torch.tensor([-1 / 6, -1 / 6, -1 / 6, 0.0]))


def test_sum_by_sequence():
    """Tokens in any order, a sequence without tokens, and a gradient of one for each token."""
    token_logps = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    sums = sum_by_sequence(token_logps, torch.tensor([2, 0, 2]), 3)
    sums.sum().backward()
    assert sums.tolist() == [-2.0, 0.0, -5.0]
    assert token_logps.grad.tolist() == [1.0, 1.0, 1.0]


def test_sum_by_sequence_keeps_digits_that_fp32_loses():
    """-4096 less 4096 times 2^-13 is -4096.5; in fp32 each of those additions rounds to nothing."""
    token_logps = torch.tensor([-4096.0] + [-(2.0**-13)] * 4096)
    assert sum_by_sequence(token_logps, torch.zeros(4097, dtype=torch.int64), 1).item() == -4096.5
