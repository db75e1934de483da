"""Which examples make up which update, and who runs them: a pure function of seed, epoch and step."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from mede2.trainer.settings import BatchArithmetic


@dataclass(frozen=True)
class Slot:
    """A place in a global batch.

    Attributes:
        index: of the example.
        weight: how much of it each rank that runs it counts: 1, or its part where ranks share it; 0: filler.
    """

    index: int
    weight: float


@dataclass(frozen=True)
class Sampler:
    """Cuts the examples of each epoch into global batches, and those into the micro-batches of each rank.

    What a global batch holds depends on seed, epoch and step alone. Inside it examples are sorted by length, longest
    first: a micro-batch holds examples of like lengths, the ranks run like ones at the same time, and memory peaks in
    the first micro-batch. As every average is over the global batch, none of this changes an update.

    Attributes:
        lengths: tokens of each piece of each example (`Layout.lengths`).
        batch: the batch arithmetic.
        seed: of the order; None keeps the order of the file (evaluation).
        pack_length: 0, or the tokens of a packed row: then a micro-batch is one row of as many examples as fit.
    """

    lengths: tuple[tuple[int, ...], ...]
    batch: BatchArithmetic
    seed: int | None
    pack_length: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.batch.global_batch_size)

    def epoch_order(self, epoch: int) -> tuple[int, ...]:
        """The order of the examples in an epoch (from 0)."""
        return _order(len(self.lengths), self.seed, epoch)

    def global_batch(self, step: int) -> tuple[int, ...]:
        """The examples of update `step` (from 0), `global_batch_size` of them but for the last of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.batch.global_batch_size
        return self.epoch_order(epoch)[position * size : (position + 1) * size]

    def micro_batches(self, step: int, rank: int) -> list[list[Slot]]:
        """The slots of update `step` that fall to `rank`, one list per micro-batch; as many lists on every rank."""
        return self.turns(step)[rank // self.batch.sequence_parallel_size :: self.batch.data_parallel_size]

    def turns(self, step: int) -> list[list[Slot]]:
        """The micro-batches of update `step`, longest first; the ranks, or groups that share them, take turns."""
        size = self.batch.micro_batch_size
        by = self.num_tokens if self.pack_length else self.longest
        indices = sorted(self.global_batch(step), key=lambda index: -by(index))
        filler = Slot(indices[-1], 0)
        if self.pack_length:
            turns = self._packed(indices)
        else:
            turns = [[self._slot(index) for index in indices[at : at + size]] for at in range(0, len(indices), size)]
            turns[-1] += [filler] * (size - len(turns[-1]))
        while len(turns) % self.batch.data_parallel_size:
            turns.append([filler] * size)
        return turns

    def num_tokens(self, index: int) -> int:
        """Tokens that an example puts through the model."""
        return sum(self.lengths[index])

    def longest(self, index: int) -> int:
        """Tokens of an example's longest piece."""
        return max(self.lengths[index])

    def num_computed(self, slots: list[Slot]) -> int:
        """Tokens of a micro-batch as it runs, padding counted."""
        if self.pack_length:
            return sum(self.num_tokens(slot.index) for slot in slots)
        num_rows = sum(len(self.lengths[slot.index]) for slot in slots)
        return num_rows * max(self.longest(slot.index) for slot in slots)

    def _slot(self, index: int) -> Slot:
        return Slot(index, 1 / self.batch.sequence_parallel_size)

    def _packed(self, indices: list[int]) -> list[list[Slot]]:
        """Rows of at most `pack_length` tokens, fullest first, as few for each rank as do, and as even: each example,
        longest first, goes into the emptiest row."""
        lengths, at_once = [self.num_tokens(index) for index in indices], self.batch.data_parallel_size
        num_rows = math.ceil(sum(lengths) / self.pack_length / at_once) * at_once
        while True:
            rows: list[list[Slot]] = [[] for _ in range(num_rows)]
            loads = [0] * num_rows
            for index, length in zip(indices, lengths, strict=True):
                row = loads.index(min(loads))
                rows[row].append(self._slot(index))
                loads[row] += length
            if max(loads) <= self.pack_length:
                return [row for _, row in sorted(zip(loads, rows, strict=True), key=lambda pair: -pair[0]) if row]
            num_rows += at_once


@lru_cache(maxsize=4)
def _order(num_examples: int, seed: int | None, epoch: int) -> tuple[int, ...]:
    """Kept for the epochs at hand: an update asks for it several times, and it is as long as the data set."""
    if seed is None:
        return tuple(range(num_examples))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(num_examples, generator=generator).tolist())
