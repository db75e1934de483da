"""The cache of reference log-probabilities: what it holds, and everything that it refuses to give out."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mede2.trainer import reference
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.settings import ENHANCE, BatchArithmetic
from mede2.trainer.stopping import StopRequested

COMPONENTS = {"weights": "a1", "records": "b2", "dtype": "torch.float32"}


def engine(world, logps_of_row=lambda index, side: -(10.0 * index + side) - 1 / 3):
    """Stands in for the engine: answers each sequence with a number that tells its row and side."""

    def answer_logps(batch):
        values = [logps_of_row(index, side) for side in range(2) for index in batch.indices]
        return torch.tensor(values, dtype=torch.float64)

    switches = SimpleNamespace(eval=lambda: None, train=lambda: None)
    return SimpleNamespace(deepspeed=switches, world=world, dtype=torch.float32, answer_logps=answer_logps)


@pytest.fixture
def batches(load, stage2_file, processor, model_folder, world):
    """Seven rows in batches of four: the last one has filler."""
    dataset = load(stage2_file, ENHANCE)
    sampler = Sampler(tuple(map(Layout().lengths, dataset.examples)), BatchArithmetic(4, 2, 1), seed=3)
    return Batches(dataset, sampler, Collator(processor, Positions(model_folder), True, Layout()), world)


def compute(batches, folder, **options):
    return reference.compute(engine(batches.world, **options), batches, folder, COMPONENTS, lambda done, total: None)


def test_values_lie_in_the_order_of_the_rows_and_are_found_again(batches, tmp_path):
    """Whatever order the pass took; (row, side) in fp64, to the last digit."""
    values = compute(batches, tmp_path)
    assert values.tolist() == [[-(10.0 * row + side) - 1 / 3 for side in range(2)] for row in range(7)]
    found = reference.read_cache(tmp_path, COMPONENTS, 7)
    assert found.dtype == torch.float64
    assert torch.equal(found, values)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors", "a partial file was left"
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, "others may read as the umask says"


@pytest.fixture
def asked_after(world, monkeypatch):
    """`asked_after(n)`: the pass is asked to stop after the n-th step from now on."""

    def arrange(num_steps: int) -> None:
        answers = iter([None] * (num_steps - 1) + ["SIGTERM"])
        monkeypatch.setattr(type(world), "asked_to_stop", lambda self: next(answers, None))

    return arrange


def test_a_stopped_pass_goes_on_with_the_steps_that_are_left(batches, tmp_path, asked_after):
    """Of its two steps the second is computed, and gives what one pass gives; nothing unfinished is left."""
    whole = compute(batches, tmp_path / "whole")
    asked_after(1)
    with pytest.raises(StopRequested, match=r"^stopped by SIGTERM in the reference pass, after step 1 of 2$"):
        compute(batches, tmp_path / "stopped")
    assert [path.suffixes for path in (tmp_path / "stopped").iterdir()] == [[".unfinished", ".safetensors"]]
    assert reference.read_cache(tmp_path / "stopped", COMPONENTS, 7) is None

    answered: list[int] = []

    def logps_of_row(index: int, side: int) -> float:
        answered.append(index)
        return -(10.0 * index + side) - 1 / 3

    values = compute(batches, tmp_path / "stopped", logps_of_row=logps_of_row)
    assert set(answered) == set(batches.sampler.global_batch(1))
    assert torch.equal(values, whole)
    assert [path.suffixes for path in (tmp_path / "stopped").iterdir()] == [[".safetensors"]]


def test_a_pass_stopped_after_its_last_step_has_nothing_left_to_compute(batches, tmp_path, asked_after):
    asked_after(2)
    with pytest.raises(StopRequested, match="after step 2 of 2"):
        compute(batches, tmp_path)
    values = compute(batches, tmp_path, logps_of_row=lambda index, side: float("nan"))
    assert values[:, 1].tolist() == [-(10.0 * row + 1) - 1 / 3 for row in range(7)]


def test_what_an_unfinished_pass_left_of_something_else_is_refused(batches, tmp_path, asked_after):
    asked_after(1)
    with pytest.raises(StopRequested):
        compute(batches, tmp_path)
    (left,) = tmp_path.iterdir()
    others = COMPONENTS | {"weights": "c3"}
    left.rename(reference.cache_path(tmp_path, others).with_suffix(".unfinished.safetensors"))
    with pytest.raises(ValueError, match="made from another weights; delete it"):
        reference.compute(engine(batches.world), batches, tmp_path, others, lambda done, total: None)


def test_two_runs_may_write_the_same_cache_at_once(batches, tmp_path, monkeypatch):
    """On hosts where their processes have one number: the second is done while the first still writes."""
    save, second = reference.save_tensors, iter([True])

    def slowly(tensors, path, metadata):
        save(tensors, path, metadata)
        if next(second, False):
            compute(batches, tmp_path)
            assert path.exists(), "the other run took what this one has written"

    monkeypatch.setattr(reference, "save_tensors", slowly)
    values = compute(batches, tmp_path)
    assert torch.equal(reference.read_cache(tmp_path, COMPONENTS, 7), values)
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_cached_is_none(tmp_path):
    assert reference.read_cache(tmp_path, COMPONENTS, 7) is None
    assert reference.read_cache(tmp_path / "no folder", COMPONENTS, 7) is None


@pytest.mark.parametrize("name", COMPONENTS)
def test_another_component_is_another_file(batches, tmp_path, name):
    compute(batches, tmp_path)
    assert reference.read_cache(tmp_path, COMPONENTS | {name: "other"}, 7) is None


def test_a_file_made_from_something_else_is_refused_by_name(batches, tmp_path):
    compute(batches, tmp_path)
    others = COMPONENTS | {"weights": "c3", "attention": "sdpa"}
    reference.cache_path(tmp_path, COMPONENTS).rename(reference.cache_path(tmp_path, others))
    with pytest.raises(ValueError, match=r"safetensors: made from another attention, weights; delete it"):
        reference.read_cache(tmp_path, others, 7)


@pytest.mark.parametrize("keep", [0, 5, 40, -8], ids=["empty", "no_header", "half_a_header", "cut"])
def test_a_damaged_file_is_refused(batches, tmp_path, keep):
    compute(batches, tmp_path)
    path = reference.cache_path(tmp_path, COMPONENTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"reference cache .*safetensors: damaged .*delete it"):
        reference.read_cache(tmp_path, COMPONENTS, 7)


@pytest.mark.parametrize("content", [{"other": torch.zeros(7, 2)}, {}], ids=["another_tensor", "no_tensor"])
def test_a_file_without_the_values_is_refused(tmp_path, content):
    metadata = {"components": '{"weights": "a1", "records": "b2", "dtype": "torch.float32"}'}
    save_file(content, reference.cache_path(tmp_path, COMPONENTS), metadata=metadata)
    with pytest.raises(ValueError, match="damaged"):
        reference.read_cache(tmp_path, COMPONENTS, 7)


@pytest.mark.parametrize(
    "values", [torch.zeros(6, 2), torch.full((7, 2), float("-inf"))], ids=["a_row_missing", "a_row_unfilled"]
)
def test_missing_rows_cannot_pass(tmp_path, values):
    metadata = {"components": '{"weights": "a1", "records": "b2", "dtype": "torch.float32"}'}
    save_file({reference.TENSOR: values.double()}, reference.cache_path(tmp_path, COMPONENTS), metadata=metadata)
    with pytest.raises(ValueError, match=r"6 rows for 7 records|not finite"):
        reference.read_cache(tmp_path, COMPONENTS, 7)


def test_values_that_are_not_finite_name_their_rows_and_are_not_cached(batches, tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl:3 are not finite"):
        compute(batches, tmp_path, logps_of_row=lambda index, side: float("nan") if (index, side) == (2, 1) else -1.0)
    assert reference.read_cache(tmp_path, COMPONENTS, 7) is None


def test_a_row_that_no_rank_computed_cannot_pass(batches, tmp_path, monkeypatch):
    everything = Sampler.micro_batches
    monkeypatch.setattr(Sampler, "micro_batches", lambda self, step, rank: everything(self, step, rank)[:1])
    with pytest.raises(KeyError):
        compute(batches, tmp_path)
    assert reference.read_cache(tmp_path, COMPONENTS, 7) is None
