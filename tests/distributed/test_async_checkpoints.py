"""Checkpoints that are written while the training goes on: the same files; and disks that refuse, on two ranks."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator

import pytest

WAYS = {"z1_bf16": 5, "z2": 5, "z3": 6}  # files of a checkpoint: ZeRO-1 and 2 write the model once
REFUSED = ("full", "full_behind", "read-only")
SIZES = {"full": "1m", "read-only": "8m"}


@pytest.fixture(scope="session")
def disks(tmp_path_factory) -> Iterator[dict[str, str]]:
    """File systems with a whole small checkpoint of update 3 on each, or none where nothing can be mounted."""
    mounted = {}
    for name, size in SIZES.items():
        folder = tmp_path_factory.mktemp("disk")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            break
        mounted[name] = str(folder)
        checkpoint = folder / "checkpoints" / "step-000003"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.pt").write_bytes(b"...")
        files = {"weights.pt": {"bytes": 3, "sha256": hashlib.sha256(b"...").hexdigest()}}
        marker = {"step": 3, "world_size": 2, "identity": {}, "objective": {}, "files": files}
        (checkpoint / "complete.json").write_text(json.dumps(marker), encoding="utf-8")
    yield mounted
    for folder in mounted.values():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def results(launch, models, records, disks, tmp_path_factory) -> list[dict]:
    scenarios = [*WAYS, "kept", *(REFUSED if len(disks) == len(SIZES) else ())]
    job = {"models": models, "records": records, "checkpoints": str(tmp_path_factory.mktemp("async")), "disks": disks}
    return launch("checkpoints", 2, scenarios=scenarios, **job)


@pytest.fixture
def refusals(results, disks) -> list[dict]:
    if len(disks) < len(SIZES):
        pytest.skip("no file system can be mounted here")
    return results


@pytest.mark.parametrize("way", WAYS)
def test_the_files_are_those_that_are_written_at_once(results, way):
    """To the bit, though two updates are made between the copy and the writing; with optimizer and generators."""
    at_once, behind = results[0][way]["files"]
    assert len(at_once) == WAYS[way]
    assert behind == at_once


@pytest.mark.parametrize("way", WAYS)
def test_the_training_goes_on_from_them(results, way):
    for found in results:
        assert len(set(found[way]["losses"])) == 2
        assert found[way]["again"] == found[way]["losses"]


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_there_when_every_rank_has_written(results, way):
    for found in results:
        assert found[way]["seen"] == [[], [], ["step-000001"]]


def test_one_is_completed_before_the_next_begins_and_the_last_by_finish(results):
    for found in results:
        assert found["kept"] == {"before": 5, "after": 6, "left": ["step-000003", "step-000005", "step-000006"]}


@pytest.mark.parametrize("way", ["full", "full_behind"])
def test_a_full_disk_is_one_error_on_every_rank_and_the_last_checkpoint_stays(refusals, way):
    for found in refusals:
        assert found[way]["said"].startswith("checkpoint of update 7: ")
        assert "No space left on device" in found[way]["said"]
        assert found[way]["whole"] == 3


@pytest.mark.parametrize(("way", "why"), [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_an_export_that_the_disk_refuses_is_one_error_on_every_rank(refusals, way, why):
    for found in refusals:
        assert found[way]["exported"].startswith("export: ")
        assert why in found[way]["exported"]
        assert "the last checkpoint is whole: make room" in found[way]["exported"]


def test_a_read_only_folder_is_one_error_on_every_rank_and_the_last_checkpoint_stays(refusals):
    for found in refusals:
        assert found["read-only"]["said"].startswith("checkpoint of update 7: ")
        assert "cannot be written ([Errno 30] Read-only file system: " in found["read-only"]["said"]
        assert found["read-only"]["whole"] == 3
