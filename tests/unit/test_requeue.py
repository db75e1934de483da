"""launch/slurm/job.sh where SLURM's controller does not answer, with programs in the place of SLURM's."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
VENV= LAUNCHER=torchrun CONTAINER=() OUTPUT=$FOLDER/runs/stage2 PROGRESS=("$FOLDER/runs/stage2")
source launch/slurm/job.sh
job bash -c 'exit 75'
"""
# The first $OUTAGE calls that begin with $DOWN fail. Every call is a line in a file.
PROGRAM = """#!/bin/bash
call="$(basename "$0") $*"
echo "$call" >> "$FOLDER/calls"
if [[ $call = "$DOWN"* ]] && [ "$(grep -c "^$DOWN" "$FOLDER/calls")" -le "$OUTAGE" ]; then
    echo "error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
"""
ANSWERS = {"squeue": 'echo "$STATE"', "scontrol": "echo n1", "sleep": ""}


@pytest.fixture
def job(tmp_path):
    """`job(down, outage, state)` runs a job that asks to be started again; returns it and how often
    `scontrol requeue` was called."""
    (tmp_path / "bin").mkdir()
    for name, answer in ANSWERS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"{PROGRAM}{answer}\n")
        program.chmod(0o755)

    def run(down: str, outage: int, state: str = "RUNNING") -> tuple[subprocess.CompletedProcess, int]:
        ours = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_START_TIME": "1", "SLURM_JOB_END_TIME": "2",
            "DOWN": down, "OUTAGE": str(outage), "STATE": state,
        }  # fmt: skip
        command = ["bash", "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ours, capture_output=True, text=True, timeout=60)
        return done, (tmp_path / "calls").read_text().splitlines().count("scontrol requeue 7")

    return run


def test_a_short_outage_is_waited_for(job):
    done, num_requeued = job("squeue", 3)
    assert (done.returncode, num_requeued) == (75, 1), done.stderr
    assert "job.sh: requeued after attempt 0" in done.stdout


def test_a_requeue_that_meets_an_outage_is_tried_again(job):
    done, num_requeued = job("scontrol requeue", 2)
    assert (done.returncode, num_requeued) == (75, 3), done.stderr


def test_a_long_outage_is_told_for_what_it_is(job):
    done, num_requeued = job("squeue", 100)
    assert (done.returncode, num_requeued) == (75, 0)
    assert "job.sh: not requeued: SLURM does not answer; once it does: scontrol requeue 7\n" in done.stderr


def test_a_job_that_slurm_ends_is_left_to_it(job):
    done, num_requeued = job("none", 0, "COMPLETING")
    assert (done.returncode, num_requeued) == (75, 0)
    assert "SLURM itself is ending the job" in done.stderr
