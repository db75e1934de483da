"""What each stage minimizes: from a micro-batch's log-probabilities to this rank's share of loss and metrics."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mede2.trainer.data.batches import Totals
from mede2.trainer.data.collate import MicroBatch
from mede2.trainer.losses import LOSSES, Answers, Pairs, sum_by_sequence
from mede2.trainer.settings import Settings

Stats = dict[str, Tensor]  # shares: their sums over micro-batches and ranks are the metrics


class Objective(ABC):
    """What a stage minimizes. Most carry nothing from one update to the next; what one does travels in checkpoints."""

    @abstractmethod
    def __call__(self, token_logps: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, Stats]:
        """One micro-batch.

        Args:
            token_logps: (N,) fp32.
            batch: the micro-batch.
            totals: of the global batch.

        Returns:
            this rank's share of the loss () fp64, and of the metrics.
        """

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Learn from an update's metrics. Called once after each, on every rank with the same reduced numbers."""
        return

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        assert not state, f"{type(self).__name__} has no state to load {sorted(state)} into"


class Elicit(Objective):
    """Stage I: negative log-likelihood of the demonstrations' answers, averaged over answer tokens."""

    def __call__(self, token_logps: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, Stats]:
        logps = sum_by_sequence(token_logps, batch.sequence, len(batch.weights))
        loss = -(logps * batch.weights).sum() / totals.num_answer_tokens
        return loss, {"loss": loss.detach()}


elicit = Elicit()


@dataclass
class RunningMean:
    """Mean of all values so far, each of them counting once; 0 before the first."""

    total: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class Enhance(Objective):
    """Stage II: a weighted mix of losses on pairs, by default DPO and NLL on the chosen answers (arXiv 2505.23118).

    Rewards are beta times the log-ratio of policy and reference; without a reference, beta times the log-probability,
    per token where SimPO is in the mix.

    Attributes:
        settings: of the run: `objective`, and what its losses read.
        reference: (num_examples, num_sides) fp64, reference log-probabilities of the sides of each pair: chosen,
            rejected, and where batches have it chosen under a corrupted image; None where no loss reads them.
        mean_reward: MPO's reward shift, the mean over the pairs of all updates so far. It starts at zero, where the
            rewards of a policy that is its reference do. An objective that only evaluates shares the trained one's.
    """

    settings: Settings
    reference: Tensor | None
    mean_reward: RunningMean = field(default_factory=RunningMean)

    def __call__(self, token_logps: Tensor, batch: MicroBatch, totals: Totals) -> tuple[Tensor, Stats]:
        pairs = self._pairs(token_logps, batch)
        weights = batch.weights[: len(batch.indices)].double()  # (B,), 0 for filler
        per_pair = weights / totals.num_examples
        shares = {"nll": weights / totals.num_answer_tokens}
        if pairs.corrupted:  # a global batch without any image has nothing to average: 0
            shares["image_conditional"] = weights * batch.has_image / max(1, totals.num_with_image)
        terms = {
            name: (LOSSES[name](pairs, **self._options(name)) * shares.get(name, per_pair)).sum()
            for name in self.settings.objective
        }
        loss = sum(self.settings.objective[name] * term for name, term in terms.items())
        stats = {"loss": loss.detach()} | {f"loss/{name}": term.detach() for name, term in terms.items()}

        chosen_rewards, rejected_rewards = self._rewards(pairs.chosen), self._rewards(pairs.rejected)
        margins = chosen_rewards - rejected_rewards
        means = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": margins,
            "rewards/margins_abs": margins.abs(),
            "rewards/accuracies": (margins > 0).double(),
            "logps/chosen": pairs.chosen.logps.detach(),
            "logps/rejected": pairs.rejected.logps.detach(),
            "length/chosen": pairs.chosen.num_tokens,
            "length/rejected": pairs.rejected.num_tokens,
        }
        stats |= {name: (values * per_pair).sum() for name, values in means.items()}
        if pairs.corrupted:
            gaps = pairs.chosen.logps.detach() - pairs.corrupted.logps.detach()  # nats an answer
            stats["image_gap"] = (gaps * shares["image_conditional"]).sum()
        if "bco_pair_shifted" in self.settings.objective:
            stats |= {"rewards/shift": self.mean_reward.value * per_pair.sum(), "num_pairs": weights.sum()}
        return loss, stats

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "bco_pair_shifted" in self.settings.objective:
            mean_reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            self.mean_reward.total += mean_reward * metrics["num_pairs"]
            self.mean_reward.count += metrics["num_pairs"]

    def state_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self.mean_reward)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean_reward.total, self.mean_reward.count = state["total"], state["count"]

    def _pairs(self, token_logps: Tensor, batch: MicroBatch) -> Pairs:
        num_answers, num_pairs = len(batch.weights), len(batch.indices)
        logps = sum_by_sequence(token_logps, batch.sequence, num_answers).split(num_pairs)
        num_tokens = torch.bincount(batch.sequence, minlength=num_answers).split(num_pairs)
        of_reference = [None] * len(logps)
        if self.reference is not None:
            of_reference = self.reference[list(batch.indices)].unbind(1)
        return Pairs(*(Answers(*side) for side in zip(logps, num_tokens, of_reference, strict=True)))

    def _options(self, name: str) -> dict[str, float]:
        """The keyword arguments of a loss: settings of the same names, and the reward shift."""
        values = {"reward_shift": self.mean_reward.value} | vars(self.settings)
        return {option: values[option] for option in inspect.signature(LOSSES[name]).parameters if option in values}

    def _rewards(self, answers: Answers) -> Tensor:
        """(B,) fp64, detached."""
        per_token = "simpo" in self.settings.objective
        scores = answers.logratios if self.reference is not None else answers.mean_logps if per_token else answers.logps
        return self.settings.beta * scores.detach()
