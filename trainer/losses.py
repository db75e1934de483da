"""The losses of Stage II: pure functions of the log-probabilities of whole answers, in fp64, one value for each pair.

Every loss maps `Pairs` to (B,), so a mix is a weighted sum. Whoever averages them divides by a global count: of pairs,
for `nll` of the chosen answers' tokens, for `image_conditional` of pairs with an image. What a loss reads beyond the
log-probabilities are its keyword arguments, named like the settings.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sum_by_sequence(token_logps: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Log-probability of each answer from those of its tokens.

    Args:
        token_logps: (N,) fp32, one row per answer token.
        sequence: (N,) int64, the sequence that each token belongs to.
        num_sequences: S.

    Returns:
        (S,) fp64: a sum over thousands of tokens keeps the digits that a margin of 1e-5 needs.
    """
    zeros = torch.zeros(num_sequences, dtype=torch.float64, device=token_logps.device)
    return zeros.index_add(0, sequence, token_logps.double())


@dataclass(frozen=True)
class Answers:
    """One answer of each of B pairs.

    Attributes:
        logps: (B,) fp64, log pi(y|x): log-probability of the whole answer under the policy, nats.
        num_tokens: (B,) answer tokens.
        reference_logps: (B,) fp64, log pi_ref(y|x); None where no loss reads a reference.
    """

    logps: Tensor
    num_tokens: Tensor
    reference_logps: Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        return self.logps - self.reference_logps

    @property
    def mean_logratios(self) -> Tensor:
        return self.logratios / self.num_tokens

    @property
    def mean_logps(self) -> Tensor:
        return self.logps / self.num_tokens


class Pairs(NamedTuple):
    """B pairs; `corrupted` is the chosen answer again, under a corrupted image."""

    chosen: Answers
    rejected: Answers
    corrupted: Answers | None = None


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with smoothing cDPO: a label is flipped with that probability."""
    logits = beta * (pairs.chosen.logratios - pairs.rejected.logratios)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409): the mean over labels flipped with that probability is DPO's loss."""
    logits = beta * (pairs.chosen.logratios - pairs.rejected.logratios)
    flipped = label_smoothing * logsigmoid(-logits)
    return (flipped - (1 - label_smoothing) * logsigmoid(logits)) / (1 - 2 * label_smoothing)


def sigmoid_norm(pairs: Pairs, *, beta: float) -> Tensor:
    """DPO on log-ratios per token, so that length earns nothing (LN-DPO, as in arXiv 2411.15124)."""
    return -logsigmoid(beta * (pairs.chosen.mean_logratios - pairs.rejected.mean_logratios))


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """SLiC's margin on DPO's logits (arXiv 2305.10425, 2309.06657)."""
    return torch.relu(1 - beta * (pairs.chosen.logratios - pairs.rejected.logratios))


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17; beta is its tau) on log-ratios per token, as its authors ran it."""
    return (pairs.chosen.mean_logratios - pairs.rejected.mean_logratios - 1 / (2 * beta)) ** 2


def bco_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """Binary classifier optimization on pairs (arXiv 2404.04656) without a reward shift."""
    return bco_pair_shifted(pairs, beta=beta, reward_shift=0.0)


def bco_pair_shifted(pairs: Pairs, *, beta: float, reward_shift: float) -> Tensor:
    """The same about `reward_shift`, the mean reward so far: MPO's quality loss (arXiv 2411.10442)."""
    chosen_rewards, rejected_rewards = beta * pairs.chosen.logratios, beta * pairs.rejected.logratios
    return -logsigmoid(chosen_rewards - reward_shift) - logsigmoid(reward_shift - rejected_rewards)


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): log-probabilities per token, a target margin, no reference."""
    return -logsigmoid(beta * (pairs.chosen.mean_logps - pairs.rejected.mean_logps) - simpo_gamma)


def orpo(pairs: Pairs) -> Tensor:
    """ORPO's odds ratio (arXiv 2403.07691, eq. 7) of the probabilities per token; its lambda is the weight in the mix.

    An answer that is certain to the last digit has infinite odds; the bound keeps its gradient a number.
    """
    chosen, rejected = pairs.chosen.mean_logps.clamp(max=-1e-10), pairs.rejected.mean_logps.clamp(max=-1e-10)
    log_odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return -logsigmoid(log_odds)


def image_conditional(pairs: Pairs, *, beta: float) -> Tensor:
    """mDPO's image preference (arXiv 2406.11839): DPO between the right and the corrupted image."""
    return -logsigmoid(beta * (pairs.chosen.logratios - pairs.corrupted.logratios))


def anchor(pairs: Pairs, *, beta: float) -> Tensor:
    """mDPO's anchor (arXiv 2406.11839): the chosen answer's own reward stays above zero."""
    return -logsigmoid(beta * pairs.chosen.logratios)


def nll(pairs: Pairs) -> Tensor:
    """Negative log-likelihood of the chosen answers, to be averaged over their tokens."""
    return -pairs.chosen.logps


LOSSES = {
    loss.__name__: loss
    for loss in (
        sigmoid, robust, sigmoid_norm, hinge, ipo, bco_pair, bco_pair_shifted, simpo, orpo, image_conditional, anchor,
        nll,
    )
}  # fmt: skip
