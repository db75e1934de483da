"""The order of the data: a pure function of seed, epoch and step, whatever the ranks and the accumulation."""

from collections import Counter

import pytest

from mede2.trainer.data.sampler import Sampler, Slot
from mede2.trainer.settings import BatchArithmetic


def sampler(
    num_examples=22, global_batch_size=8, micro_batch_size=1, world_size=1, seed=5, pack_length=0
) -> Sampler:  # fmt: skip
    lengths = tuple((10 + 7 * index % 40,) for index in range(num_examples))
    return Sampler(lengths, BatchArithmetic(global_batch_size, micro_batch_size, world_size), seed, pack_length)


def gathered(of: Sampler, step: int) -> list[Slot]:
    """Every slot that some rank gets at `step`."""
    return [slot for rank in range(of.batch.world_size) for micro in of.micro_batches(step, rank) for slot in micro]


LAYOUTS = [
    (1, 1, 0),
    (1, 2, 0),
    (2, 1, 0),
    (2, 2, 0),
    (4, 2, 0),
    (8, 1, 0),
    (1, 8, 0),
    (1, 1, 100),
    (1, 2, 100),
    (1, 2, 49),
]


@pytest.mark.parametrize(("num_examples", "steps"), [(22, 3), (24, 3), (25, 4), (1, 1), (8, 1)])
@pytest.mark.parametrize(("micro_batch_size", "world_size", "pack_length"), LAYOUTS)
def test_every_example_counts_once_an_epoch_and_filler_weighs_nothing(
    num_examples, steps, micro_batch_size, world_size, pack_length
):
    of = sampler(num_examples, 8, micro_batch_size, world_size, pack_length=pack_length)
    assert of.steps_per_epoch == steps
    for epoch in (0, 3):
        counts = Counter()
        for slot in (slot for step in range(steps) for slot in gathered(of, epoch * steps + step)):
            assert slot.weight in (0, 1)
            counts[slot.index] += slot.weight
        assert counts == dict.fromkeys(range(num_examples), 1)


@pytest.mark.parametrize(("micro_batch_size", "world_size", "pack_length"), LAYOUTS)
def test_the_global_batch_does_not_depend_on_ranks_accumulation_or_packing(micro_batch_size, world_size, pack_length):
    split = sampler(micro_batch_size=micro_batch_size, world_size=world_size, pack_length=pack_length)
    for step in range(2 * split.steps_per_epoch):
        counted = Counter(slot.index for slot in gathered(split, step) if slot.weight)
        assert counted == Counter(sampler().global_batch(step))
        sizes = {len(split.micro_batches(step, rank)) for rank in range(world_size)}
        assert len(sizes) == 1, "a rank with fewer micro-batches would leave the others waiting"


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(2, 1), (2, 2), (1, 2)])
def test_micro_batches_hold_examples_of_like_lengths_longest_first(micro_batch_size, world_size):
    of = sampler(micro_batch_size=micro_batch_size, world_size=world_size)
    for step in range(of.steps_per_epoch):
        of_ranks = [of.micro_batches(step, rank) for rank in range(world_size)]
        in_time = [micro[number] for number in range(len(of_ranks[0])) for micro in of_ranks]
        lengths = [of.longest(slot.index) for micro in in_time for slot in micro if slot.weight]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("pack_length", [49, 60, 100, 1000])
def test_packed_rows_keep_the_budget_and_leave_no_rank_idle_beside_a_full_one(pack_length, world_size):
    of = sampler(pack_length=pack_length, world_size=world_size)
    for step in range(of.steps_per_epoch):
        rows = [row for rank in range(world_size) for row in of.micro_batches(step, rank)]
        loads = [sum(of.num_tokens(slot.index) for slot in row if slot.weight) for row in rows]
        assert max(loads) <= pack_length
        longest = max(of.num_tokens(index) for index in of.global_batch(step))
        filled = [load for load in loads if load]
        assert max(filled) - min(filled) <= longest
        counts = [len(row) for row in rows if row[0].weight]
        assert len(counts) == len(rows) or max(counts) == 1
        if world_size == 1:
            assert len(rows) <= 1 + 2 * sum(loads) // pack_length


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
    assert [index for step in range(2) for index in of.global_batch(step)] == list(range(10))
