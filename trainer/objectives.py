"""What each stage minimizes: from a micro-batch's log-probabilities to this rank's share of loss and metrics."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mede2.trainer.data.collate import MicroBatch
from mede2.trainer.data.dataset import Totals
from mede2.trainer.losses import dpo_loss, nll_loss, sum_by_sequence

Stats = dict[str, Tensor]  # shares: their sums over micro-batches and ranks are the metrics
Objective = Callable[[Tensor, MicroBatch, Totals], tuple[Tensor, Stats]]


def elicit(token_logps: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, Stats]:
    """Stage I: negative log-likelihood of the demonstrations' answers, averaged over answer tokens.

    Args:
        token_logps: (N,) fp32.
        batch: the micro-batch.
        totals: of the global batch.

    Returns:
        this rank's share of the loss () fp32, and of the metrics.
    """
    loss = nll_loss(token_logps, batch.weights[batch.sequence], totals.num_answer_tokens)
    return loss, {"loss": loss.detach()}


@dataclass(frozen=True)
class Enhance:
    """Stage II: DPO on pairs plus NLL on the chosen answers (arXiv 2505.23118).

    Attributes:
        reference: (num_examples, 2) fp64, reference log-probabilities of chosen and rejected.
        beta, label_smoothing: of DPO.
        nll_weight: of the NLL; 0 is pure DPO.
    """

    reference: Tensor
    beta: float
    label_smoothing: float
    nll_weight: float

    def __call__(self, token_logps: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, Stats]:
        """Arguments and returns as in `elicit`; sequences are the chosen answers, then the rejected ones."""
        num_pairs = len(batch.indices)
        policy_chosen_logps, policy_rejected_logps = sum_by_sequence(token_logps, batch.sequence, 2 * num_pairs).split(
            num_pairs
        )
        reference_chosen_logps, reference_rejected_logps = self.reference[list(batch.indices)].unbind(1)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            self.beta, self.label_smoothing,
        )  # fmt: skip
        share = batch.weights[:num_pairs].double() / totals.num_examples
        preference = (losses * share).sum()
        chosen_weights = torch.where(batch.sequence < num_pairs, batch.weights[batch.sequence], 0.0)
        nll = nll_loss(token_logps, chosen_weights, totals.num_answer_tokens)
        loss = preference + self.nll_weight * nll

        margins = chosen_rewards - rejected_rewards
        lengths = batch.sequence.bincount(minlength=2 * num_pairs)
        means = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": margins,
            "rewards/margins_abs": margins.abs(),
            "rewards/accuracies": (margins > 0).double(),
            "logps/chosen": policy_chosen_logps.detach(),
            "logps/rejected": policy_rejected_logps.detach(),
            "length/chosen": lengths[:num_pairs],  # answer tokens
            "length/rejected": lengths[num_pairs : 2 * num_pairs],
        }
        stats = {"loss": loss.detach(), "loss/preference": preference.detach(), "loss/nll": nll.detach()}
        return loss, stats | {name: (values * share).sum() for name, values in means.items()}
