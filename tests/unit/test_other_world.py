"""Checkpoints of another number of ranks: what is refused, and where random numbers come from."""

import os
from pathlib import Path

import pytest
import torch

from mede2.trainer.files import write_json
from mede2.trainer.other_world import convert, seed_generators
from mede2.trainer.prepare import find_checkpoint, prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import ELICIT

Z2 = str(Path(__file__).parents[2] / "ds_configs" / "z2.json")


@pytest.mark.parametrize(("optimizer", "wrote", "serves"), [
    ("adamw", 2, True), ("adamw_8bit", 2, False), ("paged_adamw_8bit", 2, False), ("adamw_8bit", 1, True),
])  # fmt: skip
def test_eight_bit_moments_are_refused_by_name(tmp_path, model_folder, stage1_file, world, optimizer, wrote, serves):
    output = tmp_path / "out"
    given = {"model": str(model_folder), "train": [str(stage1_file)], "output": str(output), "optimizer": optimizer}
    run = prepare(resolve(ELICIT, [("flag", given)]), Z2, output, world)
    checkpoint = output / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    marker = {"step": 2, "world_size": wrote, "identity": run.identity, "objective": {}, "files": {}}
    write_json(checkpoint / "complete.json", marker)
    write_json(output / "identity.json", run.identity)
    if serves:
        assert find_checkpoint(run).world_size == wrote
        return
    with pytest.raises(ValueError, match=r"^resume: .*step-000002 was written by 2 ranks with") as caught:
        find_checkpoint(run)
    assert str(caught.value).endswith(
        f"with optimizer {optimizer}, whose state DeepSpeed's universal format cannot hold, so 1 cannot continue it; "
        "start 2, or start over with --resume never"
    )


def test_a_disk_without_room_for_the_conversion(tmp_path, world):
    checkpoint = tmp_path / "step-000002"
    checkpoint.mkdir()
    (checkpoint / "large").touch()
    os.truncate(checkpoint / "large", 2**43)
    with pytest.raises(ValueError, match=r"GiB free, and to convert .*step-000002 .* takes 1\.64e\+04; make room, or"):
        convert(checkpoint, 2, tmp_path, world)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_conversion_that_fails_says_why_and_leaves_nothing(tmp_path, world):
    checkpoint, left = tmp_path / "step-000002", tmp_path / ".step-000002.universal-killed.partial"
    for folder in (checkpoint, left):
        folder.mkdir()
    (checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"^resume: .*step-000002 cannot be converted .* \(.*holds more than tensors"):
        convert(checkpoint, 2, tmp_path, world)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_random_numbers_without_a_saved_state_are_a_function_of_seed_rank_and_step():
    def drawn(*of: int) -> tuple[float, ...]:
        seed_generators(*of)
        return tuple(torch.rand(4).tolist())

    before = torch.get_rng_state()
    places = [(seed, rank, step) for seed in (0, 2**63 - 1) for rank in (1, 11) for step in (1, 11)]
    first, again = ([drawn(*place) for place in places] for _ in range(2))
    torch.set_rng_state(before)
    assert first == again
    assert len(set(first)) == len(places)
