"""The losses against numbers worked out by hand, and their gradients."""

import inspect
import math

import pytest
import torch

from mede2.trainer.losses import LOSSES, Answers, Pairs, sum_by_sequence
from mede2.trainer.settings import OBJECTIVES

# The pair of the hand-worked numbers. Chosen: log-ratio -10 + 12 = 2 over 5 tokens, 0.4 per token, log-probability per
# token -2. Rejected: log-ratio -14 + 13 = -1 over 10 tokens, -0.1 and -1.4. Under a corrupted image: -11 + 12 = 1.
POLICY = (-10.0, -14.0, -11.0)
REFERENCE = (-12.0, -13.0, -12.0)
NUM_TOKENS = (5, 10, 5)
OPTIONS = {"beta": 0.5, "label_smoothing": 0.1, "simpo_gamma": 0.5, "reward_shift": 0.25}


def column(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def make_pairs(policy=POLICY, reference=REFERENCE, num_tokens=NUM_TOKENS) -> Pairs:
    """One pair; log-probabilities are numbers or tensors (1,)."""
    columns = [[v if isinstance(v, torch.Tensor) else column(v) for v in values] for values in (policy, reference)]
    return Pairs(*map(Answers, columns[0], map(column, num_tokens), columns[1]))


def value(name: str, pairs: Pairs | None = None, **changes) -> torch.Tensor:
    """The loss of one pair, with those of the options that it takes."""
    options = OPTIONS | changes
    wanted = inspect.signature(LOSSES[name]).parameters
    return LOSSES[name](pairs or make_pairs(), **{option: options[option] for option in options if option in wanted})


BY_HAND = {
    "sigmoid": 0.351413,  # logit 0.5 * 3; 0.9 log(1 + e^-1.5) + 0.1 log(1 + e^1.5) = 0.201413 + 0.1 * 1.5
    "robust": 0.013913,  # (0.9 * 0.201413 - 0.1 * 1.701413) / 0.8 = (0.181272 - 0.170141) / 0.8
    "sigmoid_norm": 0.575939,  # logit 0.5 * (0.4 + 0.1); log(1 + e^-0.25) = log 1.778801
    "hinge": 0.0,  # 1 - 1.5 is below zero
    "ipo": 0.25,  # (0.4 + 0.1 - 1 / (2 * 0.5))^2
    "bco_pair": 0.787339,  # rewards 1 and -0.5; log(1 + e^-1) + log(1 + e^-0.5) = 0.313262 + 0.474077
    "bco_pair_shifted": 0.773742,  # both 0.75 away from 0.25 on the right side; 2 log(1 + e^-0.75) = 2 * 0.386871
    "simpo": 1.171101,  # logit 0.5 * (-2 + 1.4) - 0.5 = -0.8; log(1 + e^0.8) = log 3.225541
    "orpo": 1.128562,  # odds e^-2 / (1 - e^-2) = 0.156518 and e^-1.4 / (1 - e^-1.4) = 0.327311; log(1 + 2.091207)
    "image_conditional": 0.474077,  # logit 0.5 * (2 - 1); log(1 + e^-0.5)
    "anchor": 0.313262,  # logit 0.5 * 2; log(1 + e^-1)
    "nll": 10.0,
}


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    assert value(name).item() == pytest.approx(BY_HAND[name], abs=2e-6)


def test_more_by_hand():
    """DPO without smoothing; a hinge inside its margin, 1 - 0.25 * 3; odds of 1 and 1/3, so log(1 + 1/3)."""
    assert value("sigmoid", label_smoothing=0.0).item() == pytest.approx(0.201413, abs=1e-6)
    assert value("hinge", beta=0.25).item() == 0.25
    odds = make_pairs((5 * math.log(1 / 2), 10 * math.log(1 / 4), 0.0))
    assert value("orpo", odds).item() == pytest.approx(0.287682, abs=1e-6)


def test_robust_is_unbiased_under_flips():
    """0.9 of the labels as they are and 0.1 flipped: the mean is the loss of clean labels."""
    flipped = make_pairs((-14.0, -10.0, 0.0), (-13.0, -12.0, 0.0))
    mean = 0.9 * value("robust").item() + 0.1 * value("robust", flipped).item()
    assert mean == pytest.approx(value("sigmoid", label_smoothing=0.0).item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_is_log_two_where_policy_is_reference(beta):
    same = make_pairs((-3.0, -700.0, -3.0), (-3.0, -700.0, -3.0))
    for name in ("sigmoid", "sigmoid_norm", "image_conditional", "anchor"):
        assert value(name, same, beta=beta).item() == pytest.approx(math.log(2)), name


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    """Against finite differences, and in the direction that a preference means; rows stay apart from each other."""
    policy = [torch.tensor([logp, logp - 0.5], dtype=torch.float64, requires_grad=True) for logp in POLICY]
    others = (
        [torch.tensor([v, v], dtype=torch.float64) for v in NUM_TOKENS],
        [torch.tensor([v, v], dtype=torch.float64) for v in REFERENCE],
    )

    def loss(*logps: torch.Tensor) -> torch.Tensor:
        return value(name, Pairs(*map(Answers, logps, *others)), beta=0.25)

    assert torch.autograd.gradcheck(loss, policy)
    losses = loss(*policy)
    assert losses.shape == (2,)
    chosen, rejected, corrupted = torch.autograd.grad(losses[0], policy, allow_unused=True, materialize_grads=True)
    assert chosen[0] < 0
    assert (rejected[0] > 0) == (name not in ("image_conditional", "anchor", "nll"))
    assert (corrupted[0] > 0) == (name == "image_conditional")
    assert chosen[1] == rejected[1] == corrupted[1] == 0


def test_dpo_gradient_by_hand():
    """d loss / d chosen = -beta * sigmoid(-1.5) = -0.5 * 0.182426; the rejected one has the other sign."""
    policy = [column(logp).requires_grad_() for logp in POLICY]
    value("sigmoid", make_pairs(policy), label_smoothing=0.0).backward()
    assert [logp.grad and logp.grad.item() for logp in policy] == [
        pytest.approx(-0.091213, abs=1e-6), pytest.approx(0.091213, abs=1e-6), None,
    ]  # fmt: skip


@pytest.mark.parametrize("logp", [-1e6, 1e6])
@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "image_conditional", "anchor"])
def test_log_ratios_far_out_stay_finite(name, logp):
    """-log sigmoid(x) is -x for x far below zero and 0 far above; BCO's other half is log 2."""
    far = make_pairs((logp, 0.0, 0.0), (0.0, 0.0, 0.0))
    rest = math.log(2) if name == "bco_pair" else 0.0
    assert value(name, far, beta=1.0, label_smoothing=0.0).item() == pytest.approx(max(0.0, -logp) + rest)


@pytest.mark.parametrize("logp", [-1e6, -1e-30, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_odds_of_certain_and_of_impossible_answers_stay_finite(side, logp):
    policy = [column(-1.0).requires_grad_() for _ in range(3)]
    policy[side] = column(logp).requires_grad_()
    loss = value("orpo", make_pairs(policy))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(policy[s].grad) for s in (0, 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_know_what_each_loss_reads(name):
    """The table that settings are checked by, which must not import torch, against the losses themselves."""
    read = set(inspect.signature(LOSSES[name]).parameters) - {"pairs", "reward_shift"}
    assert set(OBJECTIVES[name]) - {"reference", "reference_cache"} == read
    without = Pairs(*(Answers(column(logp), column(5.0)) for logp in POLICY))
    if "reference" in OBJECTIVES[name]:
        with pytest.raises(TypeError):
            value(name, without)
    else:
        assert torch.isfinite(value(name, without))


def test_every_loss_can_be_asked_for():
    assert LOSSES.keys() == OBJECTIVES.keys()


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
