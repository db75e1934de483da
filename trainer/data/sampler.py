"""Which examples make up which update: a pure function of seed, epoch and step, whatever the number of ranks."""

import math
from dataclasses import dataclass

import torch

from mede2.trainer.settings import BatchArithmetic


@dataclass(frozen=True)
class Slot:
    """A place in a global batch: the index of an example and its weight (0: filler in a short last batch)."""

    index: int
    weight: int


@dataclass(frozen=True)
class Sampler:
    """Cuts the examples of each epoch into global batches, and those into the micro-batches of each rank.

    Attributes:
        num_examples: rows of the data set.
        batch: the batch arithmetic.
        seed: of the order; None keeps the order of the file (evaluation).
    """

    num_examples: int
    batch: BatchArithmetic
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.batch.global_batch_size)

    def epoch_order(self, epoch: int) -> list[int]:
        """The order of the examples in an epoch (from 0)."""
        if self.seed is None:
            return list(range(self.num_examples))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.num_examples, generator=generator).tolist()

    def global_batch(self, step: int) -> list[Slot]:
        """The `global_batch_size` slots of update `step` (from 0); a short last batch is filled with weight 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch.global_batch_size
        indices = self.epoch_order(epoch)[position * size : (position + 1) * size]
        return [Slot(index, 1) for index in indices] + [Slot(indices[0], 0)] * (size - len(indices))

    def micro_batches(self, step: int, rank: int) -> list[list[Slot]]:
        """The slots of update `step` that fall to `rank`, one list per micro-batch."""
        slots, micro = self.global_batch(step), self.batch.micro_batch_size
        return [
            slots[start : start + micro] for start in range(rank * micro, len(slots), micro * self.batch.world_size)
        ]
