"""A run that was thought dead wakes up when its successor is done: it writes nothing more. Real commands, two ranks."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mede2.trainer.metrics import read_metrics

STEPS, PATIENCE_S = 10, 280


@pytest.fixture(scope="module")
def start(launched, models, records) -> Callable[..., list[subprocess.Popen]]:
    """`start(output, restart)` starts job 77 on two ranks."""

    def run(output: Path, restart: int) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        settings = ("num_workers=0", "keep_checkpoints=2", "async_checkpoints=true")
        arguments = (
            "--ds", "ds_configs/z2.json", "--model", models["tied"], "--train", records["texts"],
            "--output", str(output), "--global-batch-size", "4", "--epochs", str(STEPS), "--max-steps", str(STEPS),
            "--save-every", "2", *(part for setting in settings for part in ("--set", setting)),
        )  # fmt: skip
        shared = {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restart),
        }  # fmt: skip
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [launched("stage1.py", *arguments, wait=False, **shared, **rank) for rank in ranks]

    return run


def wait_for(happened: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        ended = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(output: Path, but: int) -> dict[Path, tuple[int, int, bytes]]:
    """Every file by inode, time of change and content, without the ones that process `but` alone has written."""
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in output.rglob("*") if path.is_file() and f".{but}." not in path.name
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_a_run_thought_dead_ends_and_its_successors_files_stay(start, tmp_path):
    output = tmp_path / "out"
    halted = start(output, restart=0)
    wait_for((output / "checkpoints" / "step-000002" / "complete.json").exists, halted)
    for process in halted:
        os.kill(process.pid, signal.SIGSTOP)
    reached = len(read_metrics(output / "metrics.jsonl"))
    assert reached < STEPS

    successors = start(output, restart=1)
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in successors]
    assert [process.returncode for process in successors] == [0, 0], said
    assert f"{output} is taken over from job 77, restart 0 (process {halted[0].pid} on " in said[0]
    assert f"continuing {output}/checkpoints/step-" in said[0]
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == list(range(1, STEPS + 1))
    names = [f"step-{step:06d}" for step in (STEPS - 2, STEPS)]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == names
    before = files(output, but=halted[0].pid)
    assert {"summary.json", "owner.json", "model.safetensors", "metrics.jsonl"} <= {path.name for path in before}

    for process in halted:
        os.kill(process.pid, signal.SIGCONT)
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in halted]
    assert [process.returncode for process in halted] == [1, 1], said
    (told,) = [line for line in said[0].splitlines() if line.startswith("Error: ")]
    assert told.startswith(f"Error: output: {output} now belongs to job 77, restart 1 (process {successors[0].pid} on ")
    assert "Traceback" not in said[0]
    assert files(output, but=halted[0].pid) == before
