"""What each update trains on, made ahead of the step by worker processes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from mede2.trainer import watchdog
from mede2.trainer.data.collate import Collator, MicroBatch
from mede2.trainer.data.dataset import DataSet
from mede2.trainer.data.encoding import Example
from mede2.trainer.data.features import ImageFeatures
from mede2.trainer.data.sampler import Sampler, Slot
from mede2.trainer.stopping import end_with_parent, signals_held
from mede2.trainer.world import World


@dataclass(frozen=True)
class Totals:
    """Counts of a global batch, over all ranks and micro-batches: the denominators of its averages.

    Attributes:
        num_examples: rows that count (Stage II: pairs).
        num_with_image: those that have an image.
        num_answer_tokens: learnt tokens of the first sequence of each row (Stage II: the chosen answers).
        num_tokens: tokens that go through the model, padding and filler not counted, for throughput.
    """

    num_examples: int
    num_with_image: int
    num_answer_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class Batches:
    """The data set in the sampler's order, as one rank's micro-batches.

    Attributes:
        num_workers: processes that decode and collate ahead; 0: this one does, when a micro-batch is wanted.
    """

    dataset: DataSet
    sampler: Sampler
    collator: Collator
    world: World
    num_workers: int = 0

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Those of one update, made here and now."""
        for slots in self.sampler.micro_batches(step, self.world.rank):
            yield self.collator(self.dataset.examples, slots)

    def with_features(self, features: ImageFeatures) -> "Batches":
        """The same, with `features` in place of images."""
        return replace(self, collator=self.collator.with_features(features))

    def feed(self, steps: range, of: str = "update") -> "Feed":
        return Feed(self, steps, of)

    def totals(self, step: int) -> Totals:
        """Counted on every rank alike, from the whole global batch, so that no rank needs to ask another."""
        return self._count([self.dataset.examples[index] for index in self.sampler.global_batch(step)])

    def rows(self, step: int) -> list[str]:
        """Where the rows of the global batch stand: file:line."""
        return [self.dataset.examples[index].source for index in self.sampler.global_batch(step)]

    def whole(self) -> Totals:
        """Counts of the whole data set."""
        return self._count(self.dataset.examples)

    def _count(self, examples: list[Example]) -> Totals:
        return Totals(
            num_examples=len(examples),
            num_with_image=sum(bool(example.images) for example in examples),
            num_answer_tokens=sum(example.sequences[0].num_answer_tokens for example in examples),
            num_tokens=sum(sum(self.collator.layout.lengths(example)) for example in examples),
        )


class _Planned(torch.utils.data.Dataset):
    """The micro-batches of a plan, collated when asked for."""

    def __init__(self, collator: Collator, examples: list[Example], plan: list[list[Slot]]):
        self.collator, self.examples, self.plan = collator, examples, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> MicroBatch | ValueError:
        try:
            return self.collator(self.examples, self.plan[number])
        except ValueError as error:  # a file that changed since it was checked; raised whole where it is wanted
            return error


class Feed:
    """The micro-batches of successive updates, in order, prepared while earlier ones compute.

    Workers are forked when it is made: before an engine holds memory that it rewrites, or each keeps its old pages.

    Args:
        batches: of one rank.
        steps: the updates.
        of: what a step is called where the watchdog tells of it.

    Attributes:
        batches, steps, of: as given.
        waited_s: seconds that the step has waited for data since it was last set to 0.
        waited_in_all_s: the same since the start.
    """

    def __init__(self, batches: Batches, steps: range, of: str = "update"):
        self.batches, self.steps, self.of = batches, steps, of
        rank = batches.world.rank
        of_steps = {step: batches.sampler.micro_batches(step, rank) for step in steps}
        self._sizes = {step: len(plan) for step, plan in of_steps.items()}
        plan = [slots for step in steps for slots in of_steps[step]]
        self.waited_s = self.waited_in_all_s = 0.0
        num_workers = min(batches.num_workers, len(plan))
        loader = DataLoader(
            _Planned(batches.collator, batches.dataset.examples, plan), batch_size=None, num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None, pin_memory=batches.world.device.type == "cuda",
            collate_fn=_as_it_is, generator=torch.Generator(),  # the default one belongs to the run
            worker_init_fn=end_with_parent,
        )  # fmt: skip
        with signals_held():  # a stop that reaches every process of the job must leave them to the run that stops
            self._loader = iter(loader)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Those of the next update; call it for the steps in their order."""
        name, size = f"{self.of} {step + 1}", self._sizes[step]
        for number in range(1, size + 1):
            watchdog.beat(f"{name}, waiting for micro-batch {number} of {size}")
            started = time.perf_counter()
            micro_batch = next(self._loader)
            waited_s = time.perf_counter() - started
            self.waited_s, self.waited_in_all_s = self.waited_s + waited_s, self.waited_in_all_s + waited_s
            if isinstance(micro_batch, ValueError):
                raise micro_batch
            watchdog.beat(f"{name}, micro-batch {number} of {size}")
            yield micro_batch
        watchdog.beat(f"{name}, after its micro-batches")


def _as_it_is(item):
    return item
