"""The order of the data: a pure function of seed, epoch and step, whatever the ranks and the accumulation."""

from collections import Counter

import pytest

from mede2.trainer.data.sampler import Sampler, Slot
from mede2.trainer.settings import BatchArithmetic


def sampler(num_examples=22, global_batch_size=8, micro_batch_size=1, world_size=1, seed=5) -> Sampler:
    return Sampler(num_examples, BatchArithmetic(global_batch_size, micro_batch_size, world_size), seed)


def gathered(of: Sampler, step: int) -> list[Slot]:
    """Every slot that some rank gets at `step`."""
    return [slot for rank in range(of.batch.world_size) for micro in of.micro_batches(step, rank) for slot in micro]


@pytest.mark.parametrize(("num_examples", "steps"), [(22, 3), (24, 3), (25, 4), (1, 1), (8, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_example_counts_once_an_epoch_and_filler_weighs_nothing(num_examples, steps, epoch):
    of = sampler(num_examples)
    assert of.steps_per_epoch == steps
    batches = [gathered(of, epoch * steps + step) for step in range(steps)]
    assert all(len(batch) == 8 for batch in batches), "a short batch would change the number of micro-batches of a rank"
    counts = Counter()
    for slot in (slot for batch in batches for slot in batch):
        assert slot.weight in (0, 1)
        counts[slot.index] += slot.weight
    assert counts == dict.fromkeys(range(num_examples), 1)


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 2), (2, 1), (2, 2), (4, 2), (8, 1), (1, 8)])
def test_the_global_batch_does_not_depend_on_ranks_or_accumulation(micro_batch_size, world_size):
    split, whole = sampler(micro_batch_size=micro_batch_size, world_size=world_size), sampler()
    for step in range(2 * whole.steps_per_epoch):
        assert Counter(gathered(split, step)) == Counter(whole.global_batch(step))
        for rank in range(world_size):
            micro_batches = split.micro_batches(step, rank)
            assert [len(micro) for micro in micro_batches] == [micro_batch_size] * split.batch.grad_accum_steps


def test_order_is_pure_and_differs_between_epochs_and_seeds():
    orders = {(seed, epoch): tuple(sampler(seed=seed).epoch_order(epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 9
    assert tuple(sampler(seed=1).epoch_order(2)) == orders[1, 2]


def test_a_step_does_not_depend_on_the_steps_before_it():
    """What a resumed run relies on."""
    walked, jumped = sampler(), sampler()
    for step in range(5):
        walked.global_batch(step)
    assert walked.global_batch(5) == jumped.global_batch(5)


def test_held_out_order_is_that_of_the_file():
    of = sampler(num_examples=10, seed=None)
    assert [slot.index for step in range(2) for slot in of.global_batch(step) if slot.weight] == list(range(10))
