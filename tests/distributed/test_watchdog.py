"""Ranks that hang, die, stand still or are slow, as the launchers run them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from socket import gethostname

import pytest

WATCHED = Path(__file__).parent / "workers" / "watched.py"
ROOT = Path(__file__).parents[2]
LONG_S = 150  # for what takes a fraction of it
HANG_MINUTES = 0.25
NEVER_MINUTES = 30.0


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def start(models, records, tmp_path_factory):
    """`start(name, fault, launcher, hang_minutes, **environment)` starts Stage I with a fault in rank 1; returns the
    process and its log."""
    started = []

    def run(name: str, fault: str, launcher: list[str], hang_minutes: float, **environment: str):
        folder = tmp_path_factory.mktemp(name)
        common = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        options = {
            "--ds": ROOT / "ds_configs" / "z3.json", "--train": records["texts"], "--output": folder / "stage1",
            "--global-batch-size": 2, "--micro-batch-size": 1, "--max-steps": 9, "--epochs": 9,
        }  # fmt: skip
        arguments = [str(part) for option in options.items() for part in option]
        arguments += ["--model", models["tied"], "--set", f"hang_minutes={hang_minutes}", "--set", "num_workers=1"]
        log = folder / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*launcher, str(WATCHED), *arguments], env=common | {"FAULT": fault} | environment, cwd=ROOT,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process, log

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def runs(start):
    """Three runs at a time, as most of each is waiting."""
    beside = Path(sys.executable).parent
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    torchrun = [str(beside / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port()]
    deepspeed = [str(beside / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    return {
        "hang": start("hang", "hang", torchrun, HANG_MINUTES),
        "die": start("die", "die", deepspeed, NEVER_MINUTES),
        "freeze": [
            start(f"freeze-{rank}", "freeze", [sys.executable], NEVER_MINUTES, RANK=rank, LOCAL_RANK=rank, **shared)
            for rank in ("0", "1")
        ],
    }


def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(runs):
    """Rank 1 hangs in Python before the backward of an update; rank 0 waits for it in a collective."""
    process, log = runs["hang"]
    assert process.wait(LONG_S) == 1
    text = log.read_text()
    for rank in range(2):
        (headline,) = [line for line in text.splitlines() if line.startswith(f"[rank {rank}] watchdog: ")]
        assert headline.endswith("since it began: update 2, micro-batch 1 of 1; it ends")
        assert f"[rank {rank}]   File" in text
    assert "in hang\n" in text
    assert [line for line in text.splitlines() if line.startswith("[rank 0]") and "reduce_scatter" in line]


def test_a_rank_that_is_killed_ends_the_job_with_the_stack_of_the_other(runs):
    """By a connection error, or by the launcher's SIGTERM where the dead rank's data workers still hold its sockets."""
    process, log = runs["die"]
    assert process.wait(LONG_S) not in (0, None)
    text = log.read_text()
    assert "exits with return code = -9" in text
    assert "Killing subprocess" in text
    told = [line for line in text.splitlines() if "watchdog: rank 0" in line and "got SIGTERM" in line]
    assert told or "Connection" in text
    assert any("trainer/loop.py" in line and "in train" in line for line in text.splitlines())


def test_a_rank_whose_peer_stands_still_ends_on_sigterm_with_its_stacks(runs):
    """No connection breaks, and rank 0 is stuck in a collective, where Python handlers do not run."""
    (ours, log), (other, other_log) = runs["freeze"]
    deadline = time.monotonic() + LONG_S
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, other_log.read_text()
        assert ours.poll() is other.poll() is None, log.read_text() + other_log.read_text()
        time.sleep(0.1)
    ours.send_signal(signal.SIGTERM)
    assert ours.wait(LONG_S) == 1
    text = log.read_text()
    assert "[rank 0] watchdog: rank 0 on " in text
    assert "got SIGTERM and is stuck in: update 2, micro-batch 1 of 1; it ends" in text
    assert "in train" in text


def test_a_rank_that_is_slowed_is_named(launch):
    ours, other = (results["slowed"] for results in launch("slow", 2, scenarios=["slowed"], timeout_s=LONG_S))
    assert [mark.get("alarms/slow_rank") for mark in ours["marks"]] == [None, 1, 1]
    assert all(mark["pace/slowest"] > 1.5 for mark in ours["marks"])
    assert ours["said"].startswith(f"alarm at update 2, slow_rank: rank 1 on {gethostname()} is ")
    assert (other["said"], other["marks"]) == ("", ours["marks"])
