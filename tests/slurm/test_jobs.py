"""Jobs on a real SLURM of two nodes, one rank on each: whatever interrupts them, they end with the same weights."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mede2.trainer.batch_scripts import fill
from mede2.trainer.files import hash_file

pytestmark = pytest.mark.timeout(1500)
ROOT = Path(__file__).parents[2]
NUM_STEPS = 20
TRAINING = (
    "--model", "trainer/demo/base", "--epochs", "100", "--max-steps", str(NUM_STEPS), "--save-every", "1",
    "--global-batch-size", "4", "--micro-batch-size", "2", "--learning-rate", "1e-4", "--max-length", "512",
    "--set", "num_workers=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def training(folder) -> tuple[str, ...]:
    """Arguments of a short Stage II."""
    from mede2.trainer.demo.records import write_stage2

    return (*TRAINING, "--train", str(write_stage2(folder / "records", 20, seed=5)))


@pytest.fixture(scope="module")
def submit(cluster, folder):
    """`submit(command, *arguments)` runs launch/submit.py for two nodes without GPUs; returns the job ids."""
    common = (
        "--gpus-per-node", "0", "--cpus-per-task", "3", "--time", "20", "--partition", "main", "--venv", sys.prefix,
        "--sbatch", f"output={folder}/%x-%j.out",
    )  # fmt: skip

    def run(command: str, *arguments: str, nodes: int = 2) -> list[str]:
        line = (sys.executable, "launch/submit.py", command, *common, "--nodes", str(nodes), *arguments)
        return cluster.run(*line).split()

    return run


@pytest.fixture(scope="module")
def undisturbed(cluster, folder, training) -> str:
    """sha256 of the weights that two ranks reach without SLURM, by the script for clusters that have none."""
    text = (ROOT / "launch/slurm/without_slurm.sh").read_text()
    settings = {
        "VENV": sys.prefix, "PROCESSES": "1", "HEAD": "127.0.0.1", "PORT": str(cluster.free_ports(1)[0]),
        "OUTPUT": f"{folder}/undisturbed/stage2", "ARGUMENTS": training,
    }  # fmt: skip
    script = folder / "without_slurm.sh"
    script.write_text(fill(text, {}, settings))
    machines = [
        subprocess.Popen(
            ["bash", script, str(number)], cwd=ROOT, env=cluster.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    return weights(folder / "undisturbed/stage2")


@pytest.fixture(scope="module")
def short_of_time(cluster, folder) -> str:
    """A job that gets nothing done in its one minute. It starts before all other tests and waits for SLURM beside them;
    what stands for a training sleeps until it is asked to stop."""
    text = (ROOT / "launch/slurm/stage2.sh").read_text()
    directives = {
        "nodes": "2", "gpus-per-node": None, "cpus-per-task": "1", "partition": "urgent", "time": "1",
        "signal": "B:USR1@25", "output": f"{folder}/short-%j.out",
    }  # fmt: skip
    text = fill(text, directives, {"VENV": "", "OUTPUT": f"{folder}/short/stage2"})
    sleep = 'until [ -e "$MEDE2_SIGNAL_FOLDER/stop" ]; do sleep 0.2; done; exit 75'
    before, _, _ = text.partition("\njob ")
    script = folder / "short.sh"
    script.write_text(f"{before}\nMAX_ATTEMPTS=2\njob srun bash -c '{sleep}'\n")
    return cluster.run("sbatch", "--parsable", str(script)).strip()


def weights(output: Path) -> str:
    return hash_file(output / "model.safetensors")


def num_updates(output: Path) -> int:
    """Of which there are metrics."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_whatever_interrupts_a_job_it_ends_with_the_weights_of_an_undisturbed_run(
    cluster, submit, folder, training, short_of_time, undisturbed
):
    """In turn: a job in a partition that goes first; the signal that SLURM sends before the time is up; an operator's
    requeue; a node that dies. Each when two more updates are done."""
    output = folder / "disturbed/stage2"
    (job,) = submit("stage2", "--output", str(output), *training)
    log = folder / f"stage2-{job}.out"

    def preempt() -> None:  # of the 8 CPUs of a node the job holds 3
        urgent = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=6", "--output=/dev/null", "--wrap=sleep 1")
        cluster.run("sbatch", *urgent)

    interruptions = (
        preempt,
        lambda: cluster.run("scancel", "--batch", "--signal=USR1", job),
        lambda: cluster.run("scontrol", "requeue", job),
        lambda: cluster.kill_node("n2"),
    )
    done = []
    for interrupt in interruptions:
        done.append(num_updates(output))
        cluster.wait_for(lambda: num_updates(output) >= done[-1] + 2, f"update {done[-1] + 2}", log)
        interrupt()
        cluster.wait_for(lambda: cluster.job(job)["Restarts"] == str(len(done)), f"restart {len(done)}", log)
    cluster.start_node("n2")
    cluster.wait_for_end(job, log)

    told = log.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", told
    continued = [int(step) for step in re.findall(rf"continuing \S+ at update (\d+) of {NUM_STEPS}", told)]
    assert len(continued) == len(interruptions), told
    assert all(step > before for step, before in zip(continued, done, strict=True)), (continued, done)
    assert steps(output) == list(range(1, NUM_STEPS + 1))
    assert weights(output) == undisturbed
    assert not (output.parent / "signals" / job).exists()


def test_a_sweep_is_an_array_whose_tasks_are_interrupted_alone(cluster, submit, folder, training, undisturbed):
    """With DeepSpeed's launcher. Member 0 has another beta, 1 the settings of the undisturbed run; as the last task of
    the array it has the job id of them all."""
    output = folder / "sweep"
    members = ("--member", "--beta '0.2'", "--member", "--beta 0.1")
    (array,) = submit("sweep", "--launcher", "deepspeed", "--output", str(output), *members, *training)
    cluster.wait_for(lambda: num_updates(output / "1") >= 3, "update 3 of task 1")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    for task in (f"{array}_0", f"{array}_1"):
        cluster.wait_for_end(task)
    logs = [path.read_text() for path in sorted(folder.glob("sweep-*.out"))]
    jobs = [cluster.job(f"{array}_{task}") for task in range(2)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"], logs
    assert [job["Restarts"] for job in jobs] == ["0", "1"]
    assert weights(output / "1") == undisturbed
    assert weights(output / "0") != undisturbed
    assert steps(output / "0") == steps(output / "1") == list(range(1, NUM_STEPS + 1))


def test_a_chain_goes_from_stage_one_to_the_report(cluster, submit, folder, demo_cases):
    """Each job once the one before has ended well, which an interrupted Stage I has not; as well as it ends, so does an
    undisturbed one."""
    from mede2.trainer.demo.records import write_cases, write_stage1

    records = write_stage1(folder / "demonstrations", 320, seed=5)
    runs = folder / "chain"
    cases = write_cases(runs / "pairs" / "cases.jsonl", 40, seed=3, split="stage2")  # no images from elsewhere
    common = ["--max-length", "512", "--set", "num_workers=0", "--save-every", "10"]
    of_stage1 = [
        "--model", "trainer/demo/base", "--train", str(records), "--epochs", "2", "--micro-batch-size", "16",
        "--learning-rate", "1.5e-3", *common,
    ]  # fmt: skip
    of_stage2 = ["--global-batch-size", "1", "--micro-batch-size", "1", "--epochs", "100", "--max-steps", "2", *common]
    jobs = submit(
        "chain", "--runs", str(runs), "--cases", str(cases), "--benchmark", f"cases={demo_cases}",
        "--stage1", shlex.join(of_stage1), "--pairs", "--num 4 --max-tokens 80 --batch-size 160",
        "--stage2", shlex.join(of_stage2), "--evaluate", "--max-tokens 80", nodes=1,
    )  # fmt: skip
    assert len(jobs) == 4
    cluster.wait_for(
        lambda: num_updates(runs / "stage1") >= 12, "update 12 of Stage I", folder / f"stage1-{jobs[0]}.out"
    )
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[0])
    alone = subprocess.run(
        [sys.executable, "launch/stage1.py", "--ds", "ds_configs/z3.json", "--output", str(folder / "alone" / "stage1"),
         *of_stage1],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stdout + alone.stderr
    for name, job in zip(("stage1", "pairs", "stage2", "evaluate"), jobs, strict=True):
        cluster.wait_for_end(job, folder / f"{name}-{job}.out")
    told = [cluster.job(job) for job in jobs]
    logs = [path.read_text() for job in jobs for path in folder.glob(f"*-{job}.out")]
    assert [job["JobState"] for job in told] == ["COMPLETED"] * 4, logs
    assert [job["Restarts"] for job in told] == ["1", "0", "0", "0"]
    for before, after in itertools.pairwise(told):
        assert before["EndTime"] <= after["StartTime"]
    assert weights(runs / "stage1") == weights(folder / "alone" / "stage1")
    assert (runs / "pairs" / "pairs.jsonl").read_text().count("\n") >= 1
    assert json.loads((runs / "stage2" / "summary.json").read_text())["updates"] == 2
    assert (runs / "evaluation" / "report.html").is_file()


def test_a_user_error_ends_the_job_and_cancels_what_waits_for_it(cluster, submit, folder, demo_cases):
    jobs = submit(
        "chain", "--runs", str(folder / "wrong"), "--cases", str(demo_cases), "--benchmark", f"cases={demo_cases}",
        "--launcher", "deepspeed", "--stage1", "--set no_such_setting=1", nodes=1,
    )  # fmt: skip
    for job in jobs:
        cluster.wait_for_end(job)
    told = [cluster.job(job) for job in jobs]
    assert [job["JobState"] for job in told] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert told[0]["ExitCode"] == "2:0"
    assert told[0]["Restarts"] == "0"
    assert "no_such_setting" in (folder / f"stage1-{jobs[0]}.out").read_text()


def test_slurm_signals_before_the_time_is_up_and_a_job_without_progress_is_not_requeued_for_ever(
    cluster, folder, short_of_time
):
    """SLURM looks at the time every 30 s, so the signal comes within 35."""
    log = folder / f"short-{short_of_time}.out"
    cluster.wait_for_end(short_of_time, log)
    job, told = cluster.job(short_of_time), log.read_text()
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1"), told
    assert "TIME LIMIT" not in told
    assert "requeued after attempt 0" in told
    assert "not requeued: 2 attempts, and nothing new in" in told
