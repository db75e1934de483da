"""The launchers and a stop: what they return, what the batch shell finds, and where the same command goes on."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from mede2.trainer.stopping import FAILED, REQUEUE, REQUEUE_FILE, STOP_FILE

DEADLINE_S = 240.0


def test_stopped_under_one_launcher_after_another(records, start, tmp_path):
    """`deepspeed` passes the exit code on, torchrun makes it 1: the file tells. SIGTERM goes to all processes of the
    job, as SLURM sends it."""
    output = tmp_path / "stage1"
    command = [
        "launch/stage1.py", "--ds", "ds_configs/z3.json", "--train", records["stage1"], "--output", str(output),
        "--global-batch-size", "4", "--micro-batch-size", "2", "--epochs", "4",
    ]  # fmt: skip

    def rows() -> list[int]:
        path = output / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def stopped(ask: Callable, folder: Path, *launcher: str) -> int:
        """Exit code of a start that is asked to stop after its first update."""
        folder.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        before = len(rows())
        process = start(*launcher, "--master_port", port, *command, MEDE2_SIGNAL_FOLDER=str(folder))
        wait_for(lambda: len(rows()) > before)
        ask(process)
        code = process.wait(DEADLINE_S)
        wait_for((folder / REQUEUE_FILE).exists)
        done = rows()
        assert done == list(range(1, len(done) + 1))
        assert before < len(done) < 40
        assert (output / "checkpoints" / f"step-{len(done):06d}").is_dir()
        return code

    by_file, by_signal = tmp_path / "file", tmp_path / "signal"
    assert stopped(lambda _: (by_file / STOP_FILE).touch(), by_file, "deepspeed", "--num_gpus", "2") == REQUEUE
    terminate = lambda process: os.killpg(process.pid, signal.SIGTERM)  # noqa: E731
    assert stopped(terminate, by_signal, "torchrun", "--nproc_per_node", "2") == FAILED


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
