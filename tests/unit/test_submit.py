"""launch/submit.py: the scripts that it fills in, what bash and sbatch read in them, and what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mede2.trainer.batch_scripts import check_time, directive, fill, parse_directive

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sh"))
CASES = "tests/answering/written_answers.yaml"  # a file that is there; submit.py does not read it


@pytest.fixture
def submit():
    """`submit(*arguments, **environment)` runs launch/submit.py."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), *arguments]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def dry(submit):
    """`dry(*arguments)`: the script that would be submitted."""

    def run(*arguments: str) -> str:
        done = submit(*arguments, "--dry-run")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def settings(script: str, *names: str) -> list[list[str]]:
    """The values of a script's settings, as bash reads them."""
    assigned = script[: script.index("PROGRESS=")]
    each = "for word in \"${{{name}[@]}}\"; do printf '%s\\0' \"$word\"; done; printf '\\1'; "
    show = "".join(each.format(name=name) for name in names)
    told = subprocess.run(["bash", "-c", f"{assigned}\n{show}"], capture_output=True, text=True, check=True).stdout
    return [values.split("\0")[:-1] for values in told.split("\1")[:-1]]


SCRIPT = """#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue

OUTPUT=runs/a  # where
WORDS=(one 'two')
OUTPUT=$OUTPUT/b
"""


def test_values_take_the_place_of_those_in_the_script():
    filled = fill(SCRIPT, {"nodes": "4", "gpus-per-node": None, "account": "x"}, {"OUTPUT": "c d", "WORDS": ["$1", ""]})
    assert (
        filled
        == """#!/usr/bin/env bash
#SBATCH --nodes=4
#SBATCH --requeue
#SBATCH --account=x

OUTPUT='c d'  # where
WORDS=('$1' '')
OUTPUT=$OUTPUT/b
"""
    )


def test_nothing_given_changes_nothing():
    assert fill(SCRIPT, {"qos": None}, {}) == SCRIPT


def test_a_setting_that_no_script_has_is_a_fault_of_ours():
    with pytest.raises(KeyError, match="NONE"):
        fill(SCRIPT, {}, {"NONE": "x"})


@pytest.mark.parametrize("text", ["30", "90:30", "8:00:00", "2-0", "2-12:30", "1-02:00:00", "1000:00:00"])
def test_times_of_slurm(text):
    assert check_time(text) == text


@pytest.mark.parametrize(
    "text", ["", "0", "0:00", "8h", "1:2:3:4", "8:60:00", "1-24:00", "-5", "1 0", "8:00:00\n", "1٣"]
)
def test_no_times_of_slurm(text):
    with pytest.raises(ValueError, match="is no time"):
        check_time(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("mem=0", ("mem", "0")), ("--exclusive", ("exclusive", "")), ("gres=gpu:a100:8", ("gres", "gpu:a100:8"))],
)
def test_options_of_sbatch(text, parts):
    assert parse_directive(text) == parts
    assert directive(*parts) == f"#SBATCH --{text.removeprefix('--')}"


@pytest.mark.parametrize("text", ["", "mem=", "comment=a b", "a=b\n#SBATCH --c", 'comment="x"', "mem 5", "comment=#x"])
def test_what_no_line_of_sbatch_holds(text):
    with pytest.raises(ValueError, match="no option of sbatch"):
        parse_directive(text)


def test_a_stage_is_filled_in(dry):
    script = dry(
        "stage2", "--nodes", "4", "--gpus-per-node", "2", "--cpus-per-task", "16", "--partition", "long", "--account",
        "med", "--time", "1-00:00:00", "--after", "12", "--after", "13_4", "--sbatch", "mem=0", "--sbatch", "exclusive",
        "--recipe", "trainer/demo/stage2.yaml", "--output", "runs/x", "--launcher", "deepspeed", "--train", "p.jsonl",
        "--beta", "0.2",
    )  # fmt: skip
    assert directives(script) == [
        "job-name=stage2", "nodes=4", "ntasks-per-node=1", "gpus-per-node=2", "cpus-per-task=16", "time=1-00:00:00",
        "output=%x-%j.out", "open-mode=append", "requeue", "signal=B:USR1@300", "partition=long", "account=med",
        "dependency=afterok:12:13_4", "kill-on-invalid-dep=yes", "mem=0", "exclusive",
    ]  # fmt: skip
    assert settings(script, "DS", "OUTPUT", "LAUNCHER", "VENV", "CONTAINER", "ARGUMENTS") == [
        ["ds_configs/z3.json"], ["runs/x"], ["deepspeed"], [".venv"], [],
        ["--recipe", "trainer/demo/stage2.yaml", "--train", "p.jsonl", "--beta", "0.2"],
    ]  # fmt: skip


ODD = ["it's", "a b", "$HOME", "`id`", "*", '"', "\\", "a  # b", "#", "\n", "é"]


def test_odd_paths_arrive_as_they_are(dry):
    train = [word for odd in ODD for word in ("--train", odd)]
    script = dry("stage1", "--output", "runs/it's $HERE  # yes", "--container", "run 'my image.sif' \"$X\"", *train)
    assert settings(script, "OUTPUT", "CONTAINER", "ARGUMENTS") == [
        ["runs/it's $HERE  # yes"], ["run", "my image.sif", "$X"], [*train, "--save-every", "100"],
    ]  # fmt: skip


@pytest.mark.parametrize("given", [["--save-every", "7"], ["--set", "save_every=7"], ["--save-every=7"]])
def test_checkpoints_come_as_often_as_somebody_says(dry, given):
    assert settings(dry("stage1", *given), "ARGUMENTS") == [given]


def test_what_is_not_given_stays(dry):
    script = dry("pairs", "--cases", CASES)
    assert settings(script, "ARGUMENTS") == [["--num", "8"]]


def test_no_gpus_is_no_line(dry):
    assert not [line for line in directives(dry("stage1", "--gpus-per-node", "0")) if "gpu" in line]


def test_the_members_of_a_sweep_are_the_tasks_of_an_array(dry):
    objective = "objective={sigmoid: 1, nll: 2}"
    members = ["--member", "--beta 0.1", "--member", f"--set '{objective}'", "--member", ""]
    script = dry("sweep", *members, "--at-once", "2", "--model", "m", "--output", "runs/s")
    assert "array=0-2%2" in directives(script)
    assert "output=%x-%A_%a.out" in directives(script)
    for task, arguments in enumerate([["--beta", "0.1"], ["--set", objective], []]):
        told = settings(f"SLURM_ARRAY_TASK_ID={task}\n{script}", "member", "OUTPUT", "ARGUMENTS")
        assert told == [arguments, [f"runs/s/{task}"], ["--model", "m", "--save-every", "100"]]


def test_a_chain_hands_each_what_the_one_before_writes(dry):
    script = dry(
        "chain", "--runs", "runs/c", "--cases", CASES, "--benchmark", "cases=h.jsonl", "--after", "7", "--nodes", "2",
        "--stage1", "--recipe trainer/demo/stage1.yaml --train d.jsonl", "--pairs", "--num 2", "--stage2", "--beta 0.3",
        "--evaluate", "--samples 4",
    )  # fmt: skip
    scripts = [f"#!{text}" for text in script.split("#!")[1:]]
    names = ["stage1", "pairs", "stage2", "evaluate"]
    assert [directives(text)[0] for text in scripts] == [f"job-name={name}" for name in names]
    assert ["dependency=afterok:7" in directives(text) for text in scripts] == [True, False, False, False]
    assert all("nodes=2" in directives(text) for text in scripts)
    assert settings(scripts[0], "OUTPUT", "ARGUMENTS") == [
        ["runs/c/stage1"], ["--recipe", "trainer/demo/stage1.yaml", "--train", "d.jsonl"],
    ]  # fmt: skip
    assert settings(scripts[1], "MODEL", "CASES", "OUTPUT", "ARGUMENTS") == [
        ["runs/c/stage1"], [CASES], ["runs/c/pairs"], ["--num", "2"],
    ]  # fmt: skip
    assert settings(scripts[2], "OUTPUT", "ARGUMENTS") == [
        ["runs/c/stage2"], ["--train", "runs/c/pairs/pairs.jsonl", "--beta", "0.3", "--save-every", "100"],
    ]  # fmt: skip
    assert settings(scripts[3], "MODELS", "BENCHMARKS", "OUTPUT", "ARGUMENTS") == [
        ["Stage I=runs/c/stage1", "Stage II=runs/c/stage2"], ["cases=h.jsonl"], ["runs/c/evaluation"],
        ["--samples", "4"],
    ]  # fmt: skip


REFUSED = {
    "no such setting": (["stage1", "--recipe", "{recipe}"], "betta"),
    "no such flag": (["stage2", "--node", "2"], "No such option '--node'"),
    "no such recipe": (["stage1", "--recipe", "none.yaml"], "no such file: "),
    "no such DeepSpeed file": (["stage1", "--ds", "none.json"], "no such file: "),
    "no such cases": (["pairs", "--cases", "none.jsonl"], "no such file: "),
    "a time": (["stage1", "--time", "8h"], "'8h' is no time"),
    "nodes": (["stage1", "--nodes", "0"], "0 is not in the range x>=1"),
    "nodes in words": (["stage1", "--nodes", "two"], "'two' is not a valid integer"),
    "a job": (["stage1", "--after", "last"], "'last' is no job id"),
    "a partition": (["stage1", "--partition", "a b"], "partition: 'a b' has blanks"),
    "a quote": (["stage1", "--container", "run 'it"], "No closing quotation"),
    "a member": (["sweep", "--member", "--bet 1"], "No such option '--bet'"),
    "a line break": (["sweep", "--member", "--set 'a=1\n'"], "has a line break"),
    "no member": (["sweep"], "Missing option '--member'"),
    "an argument of nobody": (
        ["chain", "--cases", CASES, "--benchmark", "cases=h.jsonl", "--beta", "0.3"], "--beta: whose?"
    ),
    "an argument of sampling": (["pairs", "--cases", CASES, "--num", "0"], "0 is not in the range x>=1"),
    "an argument of the evaluation": (
        ["evaluate", "--model", "a=b", "--benchmark", "c=d", "--probes", "x"], "No such option '--probes'"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_what_a_job_would_refuse_is_refused_at_once(submit, tmp_path, arguments, told):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("betta: 0.1\n")
    done = submit(*(argument.format(recipe=recipe) for argument in arguments), "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_without_slurm_there_is_one_error_and_the_dry_run(submit, tmp_path):
    assert submit("stage1", "--dry-run", PATH=str(tmp_path)).returncode == 0
    done = submit("stage1", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: sbatch is not on this machine: submit where SLURM is, or see the script with --dry-run\n"
    )


@pytest.fixture
def shellcheck():
    """`shellcheck(script)`: what it says of the script, in the repository's root; nothing where all is well."""
    if shutil.which("shellcheck") is None:
        if os.environ.get("MEDE2_REQUIRE_SLURM"):
            pytest.fail("shellcheck is not installed")
        pytest.skip("shellcheck is not installed")

    def run(script: str) -> str:
        command = ["shellcheck", "--external-sources", "-"]
        return subprocess.run(command, input=script, cwd=ROOT, capture_output=True, text=True).stdout

    return run


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "launch/container/lock.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(shellcheck, path):
    assert shellcheck(path.read_text(encoding="utf-8")) == ""


def test_what_is_filled_in_passes_shellcheck_too(shellcheck, dry):
    script = dry("stage2", "--output", "it's", "--train", "a b")
    assert shellcheck(script) == ""
    assert "SC2068" in shellcheck(script.replace('"${ARGUMENTS[@]}"', "${ARGUMENTS[@]}"))
