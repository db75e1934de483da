"""Loss functions: pure, over log-probabilities, in fp32 or wider; every average is over a global count."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def nll_loss(token_logps: Tensor, token_weights: Tensor, num_tokens: int) -> Tensor:
    """Token-weighted negative log-likelihood: this rank's share of the mean over `num_tokens` tokens of all ranks.

    Args:
        token_logps: (N,) fp32.
        token_weights: (N,) 0 for tokens of filler rows, else 1.
        num_tokens: answer tokens in the global batch.

    Returns:
        () fp32; summed over micro-batches and ranks it is the mean.
    """
    return -(token_logps * token_weights).sum() / num_tokens


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization, sigmoid form (arXiv 2305.18290), with label smoothing (conservative DPO).

    Args:
        policy_chosen_logps, ...: (B,) log-probabilities of whole answers.
        beta: inverse temperature.
        label_smoothing: probability that a label is flipped.

    Returns:
        losses (B,), chosen_rewards (B,), rejected_rewards (B,); the rewards are detached.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)  # beta * h in eq. 7 of arXiv 2305.18290
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
