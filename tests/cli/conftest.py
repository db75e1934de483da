"""The real commands in subprocesses, from the repository root, as the README says them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_SIZE", "TRITON_INTERPRET")
    }
    return env | {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{env['PATH']}"} | extra


def run_command(*command: str, timeout_s: int = 240, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run a command; with `check`, its output is the failure's message."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**env), timeout=timeout_s, text=True, capture_output=True, check=False
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


@pytest.fixture(scope="session")
def run():
    """`run(*command, timeout_s=, check=, **environment)`."""
    return run_command


@pytest.fixture(scope="session")
def start():
    """`start(*command, **environment)`: the same in the background, in a process group of its own, silent."""

    def start_command(*command: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(**env), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    return start_command


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> dict[str, str]:
    """Small files of the embedded case set: 40 demonstrations, 20 pairs."""
    from mede2.trainer.demo.records import write_stage1, write_stage2

    folder = tmp_path_factory.mktemp("records")
    return {
        "stage1": str(write_stage1(folder / "1", 40, seed=5)),
        "stage2": str(write_stage2(folder / "2", 20, seed=5)),
    }
