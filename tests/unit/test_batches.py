"""Micro-batches made ahead by workers are those made here; the longest one is found for the rehearsal."""

import pytest
import torch

from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.rehearsal import heaviest
from mede2.trainer.settings import ENHANCE, BatchArithmetic


@pytest.fixture
def make(load, stage2_file, processor, model_folder, world):
    def batches(*, micro_batch_size=2, pack_length=0, num_workers=0, seed=1, layout=Layout()) -> Batches:  # noqa: B008
        dataset = load(stage2_file, ENHANCE)
        lengths = tuple(map(layout.lengths, dataset.examples))
        sampler = Sampler(lengths, BatchArithmetic(4, micro_batch_size, 1), seed, pack_length)
        collator = Collator(
            processor, Positions(model_folder), True, layout, packed=pack_length > 0, corruption=("blank", 0)
        )
        return Batches(dataset, sampler, collator, world, num_workers)

    return batches


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_feed_gives_the_micro_batches_of_its_steps_in_order(make, num_workers):
    batches, steps = make(num_workers=num_workers), range(1, 5)
    feed = batches.feed(steps)
    for step in steps:
        expected, got = list(batches.micro_batches(step)), list(feed.micro_batches(step))
        assert [batch.indices for batch in got] == [batch.indices for batch in expected]
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.inputs.keys() == theirs.inputs.keys()
            assert all(torch.equal(ours.inputs[name], tensor) for name, tensor in theirs.inputs.items())
            for name in ("branches", "rows", "targets", "sequence", "weights", "has_image"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert feed.waited_s > 0


def test_a_feed_draws_nothing_from_the_generator_of_the_run(make):
    """Or a resumed run, which makes a new feed, would go on with other numbers than the one it continues."""
    before = torch.get_rng_state()
    list(make(num_workers=1).feed(range(1)).micro_batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_that_is_gone_is_the_error_of_the_step_that_wants_it(make, tmp_path):
    batches = make(num_workers=1)
    example = batches.dataset.examples[0]
    object.__setattr__(example, "images", (str(tmp_path / "gone.png"),))
    step = next(step for step in range(2) if 0 in batches.sampler.global_batch(step))
    with pytest.raises(ValueError, match=r"^image \S+gone\.png: no such file$"):
        list(batches.feed(range(step, step + 1)).micro_batches(step))


@pytest.mark.parametrize("layout", [Layout(), Layout(False), Layout(True, True)], ids=["shared", "apart", "corrupted"])
@pytest.mark.parametrize(("micro_batch_size", "pack_length"), [(1, 0), (2, 0), (1, 300), (1, 10_000)])
def test_the_heaviest_micro_batch_has_the_most_tokens_of_all(make, micro_batch_size, pack_length, layout):
    batches = make(micro_batch_size=micro_batch_size, pack_length=pack_length, layout=layout)
    sizes = {
        (step, number): batch.inputs["input_ids"].numel()
        for step in range(4) for number, batch in enumerate(batches.micro_batches(step))
    }  # fmt: skip
    filler = batches.collator.filler.shape[1]  # is not counted
    assert sizes[heaviest(batches, range(4))] >= max(sizes.values()) - filler
