"""The real command: nothing in a forged checkpoint runs, and no other user reads what a run writes."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from mede2.trainer.checkpoint import MARKER
from mede2.trainer.files import hash_file

OTHERS = 0o007


class Touches:
    """When it is unpickled, the file `path` is there."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def command(run, records):
    """`command(folder, *flags)`: Stage I, two updates with a checkpoint after each, under an umask that lets all users
    read."""

    def stage1(folder: Path, *flags: str, **options):
        before = os.umask(0o022)
        try:
            return run(
                "python", "launch/stage1.py", "--ds", "ds_configs/z3.json", "--model", "trainer/demo/base",
                "--train", records["stage1"], "--global-batch-size", "4", "--max-steps", "2", "--save-every", "1",
                "--output", str(folder), *flags, **options,
            )  # fmt: skip
        finally:
            os.umask(before)

    return stage1


@pytest.fixture(scope="module")
def output(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stage1"
    command(folder)
    return folder


def test_no_other_user_reads_what_a_run_writes(output):
    """DeepSpeed's files, TensorBoard's, transformers' and ours."""
    written = [output, *output.rglob("*")]
    names = {path.name for path in written}
    assert {"model.safetensors", "metrics.jsonl", "settings.yaml", "tensorboard", "step-000002", MARKER} <= names
    assert any(name.endswith("_optim_states.pt") for name in names)
    open_to_others = [str(path) for path in written if stat.S_IMODE(path.stat().st_mode) & OTHERS]
    assert open_to_others == []
    closed_to_the_group = [str(path) for path in written if not stat.S_IMODE(path.stat().st_mode) & stat.S_IRGRP]
    assert closed_to_the_group == []


def test_nor_what_the_steps_to_pairs_write(run, tmp_path):
    before = os.umask(0o077)  # a stricter one stays
    folder = tmp_path / "cases"
    try:
        run("python", "launch/pairs.py", "demo-cases", "--num", "2", "--output", str(folder / "cases.jsonl"))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_a_forged_checkpoint_runs_nothing(command, output, tmp_path):
    """Its manifest verifies: whoever forges the one forges the other."""
    forged = Path(shutil.copytree(output / "checkpoints" / "step-000001", tmp_path / "step-000001"))
    (file,) = [path for path in forged.iterdir() if path.name.endswith("_optim_states.pt")]
    touched = tmp_path / "touched"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"ds_version": Touches(touched)}, file)
    touched.unlink(missing_ok=True)
    marker = json.loads((forged / MARKER).read_text())
    marker["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    (forged / MARKER).write_text(json.dumps(marker))
    done = command(tmp_path / "stage1", "--resume", str(forged), check=False)
    assert done.returncode not in (0, None)
    assert f"a file of {forged} is not read" in done.stderr, done.stderr[-3000:]
    assert "(io.open) and could run code" in done.stderr
    assert not touched.exists()
