"""Which examples make up which update, and who runs them: a pure function of seed, epoch and step."""

import math
from dataclasses import dataclass

import torch

from mede2.trainer.settings import BatchArithmetic


@dataclass(frozen=True)
class Slot:
    """A place in a global batch: the index of an example and its weight (0: filler, computed and not counted)."""

    index: int
    weight: int


@dataclass(frozen=True)
class Sampler:
    """Cuts the examples of each epoch into global batches, and those into the micro-batches of each rank.

    What a global batch holds depends on seed, epoch and step alone. Inside it examples are sorted by length, longest
    first: a micro-batch holds examples of like lengths, the ranks run like ones at the same time, and memory peaks in
    the first micro-batch. As every average is over the global batch, none of this changes an update.

    Attributes:
        lengths: tokens of each example (`Layout.length`).
        batch: the batch arithmetic.
        seed: of the order; None keeps the order of the file (evaluation).
        pack_length: 0, or the tokens of a packed row: then a micro-batch is one row of as many examples as fit.
    """

    lengths: tuple[int, ...]
    batch: BatchArithmetic
    seed: int | None
    pack_length: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch.global_batch_size)

    def epoch_order(self, epoch: int) -> list[int]:
        """The order of the examples in an epoch (from 0)."""
        if self.seed is None:
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def global_batch(self, step: int) -> list[int]:
        """The examples of update `step` (from 0), `global_batch_size` of them but for the last of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch.global_batch_size
        return self.epoch_order(epoch)[position * size : (position + 1) * size]

    def micro_batches(self, step: int, rank: int) -> list[list[Slot]]:
        """The slots of update `step` that fall to `rank`, one list per micro-batch; as many lists on every rank."""
        return self.turns(step)[rank :: self.batch.world_size]

    def turns(self, step: int) -> list[list[Slot]]:
        """The micro-batches of update `step`, longest first; the ranks take them in turn."""
        indices = sorted(self.global_batch(step), key=lambda index: -self.lengths[index])
        filler, size = Slot(indices[-1], 0), self.batch.micro_batch_size
        if self.pack_length:
            turns = self._packed(indices)
        else:
            turns = [[Slot(index, 1) for index in indices[at : at + size]] for at in range(0, len(indices), size)]
            turns[-1] += [filler] * (size - len(turns[-1]))
        while len(turns) % self.batch.world_size:
            turns.append([filler] * size)
        return turns

    def num_computed(self, slots: list[Slot]) -> int:
        """Tokens of a micro-batch as it runs, padding counted."""
        lengths = [self.lengths[slot.index] for slot in slots]
        return sum(lengths) if self.pack_length else len(lengths) * max(lengths)

    def _packed(self, indices: list[int]) -> list[list[Slot]]:
        """Rows of at most `pack_length` tokens, fullest first: each example, longest first, where it first fits."""
        rows: list[list[Slot]] = []
        loads: list[int] = []
        for index in indices:
            length = self.lengths[index]
            row = next((r for r, load in enumerate(loads) if load + length <= self.pack_length), len(rows))
            if row == len(rows):
                rows.append([])
                loads.append(0)
            rows[row].append(Slot(index, 1))
            loads[row] += length
        return [row for _, row in sorted(zip(loads, rows, strict=True), key=lambda pair: -pair[0])]
