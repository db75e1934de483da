"""Submit the batch scripts of launch/slurm/ to SLURM, filled in; `--dry-run` prints them."""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mede2.trainer.batch_scripts import check_time, fill, parse_directive
from mede2.trainer.commandline import fail, stage_command
from mede2.trainer.evaluation.run import command as evaluate_command
from mede2.trainer.preference.sample import command as sample_command
from mede2.trainer.resolution import read_recipe, resolve

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "launch" / "slurm"
HELP = """Submit a batch script of launch/slurm/ to SLURM, filled in, and print its job id; --dry-run prints the script.

Jobs run in the repository's root, and paths are relative to it. Arguments that are not listed go to the job's own
command; without any, a stage runs its embedded default. What is not given stays as the script has it."""


class Checked(click.ParamType):
    """Text that a function takes, or else refuses by ValueError."""

    name = "text"

    def __init__(self, check: Callable[[str], Any]):
        self.check = check

    def convert(self, value, param, ctx):
        try:
            return self.check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def words(text: str) -> list[str]:
    """Words as a shell reads them; raises ValueError where a quote is left open."""
    return shlex.split(text)


def job_id(text: str) -> str:
    number, _, task = text.partition("_")
    if not number.isdecimal() or (task and not task.isdecimal()):
        raise ValueError(f"{text!r} is no job id, such as 1234 or 1234_5")
    return text


def file_of_repository(text: str) -> str:
    """A file's path, if it is there from the repository's root."""
    if not (ROOT / text).is_file():
        raise ValueError(f"no such file: {ROOT / text}")
    return text


FILE = Checked(file_of_repository)
JOB_OPTIONS = (
    click.option("--nodes", type=click.IntRange(1), help="Of the job."),
    click.option("--gpus-per-node", type=click.IntRange(0), help="A process each; 0: no GPU, one process a node."),
    click.option("--cpus-per-task", type=click.IntRange(1), help="On each node."),
    click.option("--partition", metavar="NAME", help="Where it queues."),
    click.option("--account", metavar="NAME", help="Who pays."),
    click.option("--time", type=Checked(check_time), metavar="TIME", help="Until it goes back into the queue: 8:00:00"),
    click.option("--after", type=Checked(job_id), multiple=True, metavar="JOB", help="Starts once JOB has ended well."),
    click.option(
        "--sbatch", "further", type=Checked(parse_directive), multiple=True, metavar="NAME=VALUE",
        help="Any option of sbatch, such as mem=0, qos=high or exclusive. Several times.",
    ),
    click.option("--venv", metavar="FOLDER", help="Of python; '': the python of PATH."),
    click.option("--launcher", type=click.Choice(["torchrun", "deepspeed"]), help="Of the ranks."),
    click.option(
        "--container", type=Checked(words), metavar="WORDS",
        help="What runs a command in one, such as 'apptainer exec --nv image.sif'.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the script, submit nothing."),
)  # fmt: skip
STAGE_OPTIONS = (
    click.option("--ds", type=FILE, default="ds_configs/z3.json", show_default=True, help="DeepSpeed file."),
    click.option("--recipe", type=FILE, help="Settings as YAML."),
    click.option("--output", metavar="FOLDER", help="On a disk that all nodes share."),
)
DECIDES = re.compile("--recipe|--save-every|(--set=)?save_every=")
PASSED_ON = {"ignore_unknown_options": True, "show_default": True}


def job_command(name: str, help: str, *options: Callable) -> Callable:
    """A command of this tool: options of its own, those of every job, and arguments that it passes on."""

    def decorate(callback: Callable) -> click.Command:
        callback = click.argument("arguments", nargs=-1, type=click.UNPROCESSED)(callback)
        for option in reversed((*options, *JOB_OPTIONS)):
            callback = option(callback)
        return main.command(name, help=help, context_settings=PASSED_ON)(callback)

    return decorate


@click.group(help=HELP)
def main() -> None:
    pass


@job_command("stage1", "Stage I; arguments: see launch/stage1.py.", *STAGE_OPTIONS)
def stage1(ds: str, recipe: str | None, output: str | None, arguments: Sequence[str], **job: Any) -> None:
    submit([stage_script(1, ds, recipe, output, arguments, job)], job["dry_run"])


@job_command("stage2", "Stage II; arguments: see launch/stage2.py.", *STAGE_OPTIONS)
def stage2(ds: str, recipe: str | None, output: str | None, arguments: Sequence[str], **job: Any) -> None:
    submit([stage_script(2, ds, recipe, output, arguments, job)], job["dry_run"])


@job_command(
    "sweep", "Stage II once for each --member, as a job array; other arguments go to all. See launch/stage2.py.",
    *STAGE_OPTIONS,
    click.option(
        "--member", "members", type=Checked(words), multiple=True, required=True, metavar="WORDS",
        help="Arguments of one alone, such as '--beta 0.2'. Several times.",
    ),
    click.option("--at-once", type=click.IntRange(1), help="So many run at a time."),
)  # fmt: skip
def sweep(
    ds: str, recipe: str | None, output: str | None, members: Sequence[list[str]], at_once: int | None,
    arguments: Sequence[str], **job: Any,
) -> None:  # fmt: skip
    for member in members:
        if any("\n" in word for word in member):
            raise click.UsageError(f"--member {shlex.join(member)!r}: has a line break, which the script cannot hold")
        check_stage(2, ds, recipe, [*arguments, *member])
    array = f"0-{len(members) - 1}" + (f"%{at_once}" if at_once else "")
    settings = {"DS": ds, "OUTPUT": output, "MEMBERS": [shlex.join(member) for member in members]}
    settings["ARGUMENTS"] = with_recipe(recipe, arguments)
    submit([filled("sweep", job, settings, array=array)], job["dry_run"])


@job_command(
    "pairs", "Pairs of a model's own answers to cases; arguments: see launch/pairs.py sample.",
    click.option("--cases", type=FILE, required=True, help="cases.jsonl"),
    click.option("--model", metavar="FOLDER", help="Who answers."),
    click.option("--output", metavar="FOLDER", help="Where pairs.jsonl goes, and what it is made of."),
)  # fmt: skip
def pairs(cases: str, model: str | None, output: str | None, arguments: Sequence[str], **job: Any) -> None:
    submit([pairs_script(cases, model, output, arguments, job)], job["dry_run"])


@job_command(
    "evaluate", "The evaluation; arguments: see launch/evaluate.py run.",
    click.option("--model", "models", multiple=True, required=True, metavar="NAME=FOLDER", help="Several times."),
    click.option("--benchmark", "benchmarks", multiple=True, required=True, metavar="NAME=PATH", help="Several times."),
    click.option("--output", metavar="FOLDER", help="Where the report goes."),
)  # fmt: skip
def evaluate(
    models: Sequence[str], benchmarks: Sequence[str], output: str | None, arguments: Sequence[str], **job: Any
) -> None:
    submit([evaluate_script(models, benchmarks, output, arguments, job)], job["dry_run"])


@job_command(
    "chain",
    "Stage I, pairs of its answers, Stage II on them, the evaluation of both: four jobs, each once the one before has "
    "ended well. Each takes its own arguments as one text, such as --stage1 '--recipe r.yaml --train demos.jsonl'.",
    click.option("--runs", metavar="FOLDER", default="runs", show_default=True, help="Of all outputs."),
    click.option("--ds", type=FILE, default="ds_configs/z3.json", show_default=True, help="DeepSpeed file."),
    click.option("--cases", type=FILE, required=True, help="cases.jsonl, from which pairs are made."),
    click.option("--benchmark", "benchmarks", multiple=True, required=True, metavar="NAME=PATH", help="Several times."),
    click.option("--stage1", "of_stage1", type=Checked(words), default="", help="Arguments of launch/stage1.py."),
    click.option("--pairs", "of_pairs", type=Checked(words), default="", help="Arguments of launch/pairs.py sample."),
    click.option("--stage2", "of_stage2", type=Checked(words), default="", help="Arguments of launch/stage2.py."),
    click.option("--evaluate", "of_evaluate", type=Checked(words), default="", help="Of launch/evaluate.py run."),
)
def chain(
    runs: str, ds: str, cases: str, benchmarks: Sequence[str], of_stage1: list[str], of_pairs: list[str],
    of_stage2: list[str], of_evaluate: list[str], arguments: Sequence[str], **job: Any,
) -> None:  # fmt: skip
    if arguments:
        raise click.UsageError(f"{arguments[0]}: whose? Say --stage1, --pairs, --stage2 or --evaluate '...'")
    models = [f"Stage I={runs}/stage1", f"Stage II={runs}/stage2"]
    on_pairs = ["--train", f"{runs}/pairs/pairs.jsonl", *of_stage2]
    later = job | {"after": ()}
    submit([
        stage_script(1, ds, None, f"{runs}/stage1", of_stage1, job),
        pairs_script(cases, f"{runs}/stage1", f"{runs}/pairs", of_pairs, later),
        stage_script(2, ds, None, f"{runs}/stage2", on_pairs, later),
        evaluate_script(models, benchmarks, f"{runs}/evaluation", of_evaluate, later),
    ], job["dry_run"])  # fmt: skip


def stage_script(
    stage: int, ds: str, recipe: str | None, output: str | None, arguments: Sequence[str], job: Mapping[str, Any]
) -> str:
    check_stage(stage, ds, recipe, arguments)
    return filled(f"stage{stage}", job, {"DS": ds, "OUTPUT": output, "ARGUMENTS": with_recipe(recipe, arguments)})


def pairs_script(
    cases: str, model: str | None, output: str | None, arguments: Sequence[str], job: Mapping[str, Any]
) -> str:
    check(sample_command, ["--cases", cases, "--model", "any", "--output", "any", *arguments])
    return filled("pairs", job, {"CASES": cases, "MODEL": model, "OUTPUT": output, "ARGUMENTS": arguments or None})


def evaluate_script(
    models: Sequence[str], benchmarks: Sequence[str], output: str | None, arguments: Sequence[str],
    job: Mapping[str, Any],
) -> str:  # fmt: skip
    given = [f"--model={model}" for model in models] + [f"--benchmark={benchmark}" for benchmark in benchmarks]
    check(evaluate_command, [*given, "--output", "any", *arguments])
    settings = {"MODELS": models, "BENCHMARKS": benchmarks, "OUTPUT": output, "ARGUMENTS": arguments or None}
    return filled("evaluate", job, settings)


def with_recipe(recipe: str | None, arguments: Sequence[str]) -> list[str]:
    """Arguments of a stage; checkpoints as often as the script says, unless a recipe or an argument decides."""
    given = [*(["--recipe", recipe] if recipe else []), *arguments]
    return given if any(DECIDES.match(argument) for argument in given) else [*given, "--save-every", "100"]


def check_stage(stage: int, ds: str, recipe: str | None, arguments: Sequence[str]) -> None:
    """What a job would refuse after hours in the queue is refused now: arguments that are none, a recipe's settings."""
    given = check(stage_command(stage), ["--ds", ds, *with_recipe(recipe, arguments)])
    if given["recipe"]:
        recipe = file_of_repository(given["recipe"])
        resolve(stage, [(f"recipe {recipe}", read_recipe(ROOT / recipe))])


def check(command: click.Command, arguments: Sequence[str]) -> dict[str, Any]:
    """Arguments as a command reads them; click's errors where it does not."""
    return command.make_context(command.name, list(arguments)).params


def filled(name: str, job: Mapping[str, Any], settings: Mapping[str, Any], array: str | None = None) -> str:
    """A script of launch/slurm/; what is None or absent stays as it is there."""
    gpus = job["gpus_per_node"]
    directives = {
        "nodes": job["nodes"], "cpus-per-task": job["cpus_per_task"], "partition": job["partition"],
        "account": job["account"], "time": job["time"], "array": array, "gpus-per-node": gpus or None,
        "dependency": ":".join(["afterok", *job["after"]]) if job["after"] else None,
    }  # fmt: skip
    given = {name: str(value) for name, value in directives.items() if value is not None}
    given |= {"gpus-per-node": None} if gpus == 0 else {}
    given |= {"kill-on-invalid-dep": "yes"} if job["after"] else {}
    settings = {"VENV": job["venv"], "LAUNCHER": job["launcher"], "CONTAINER": job["container"], **settings}
    text = (SCRIPTS / f"{name}.sh").read_text(encoding="utf-8")
    return fill(text, given | dict(job["further"]), {k: value for k, value in settings.items() if value is not None})


def submit(scripts: Sequence[str], dry_run: bool) -> None:
    """Print scripts, or submit each to start after the one before and print the job ids."""
    if dry_run:
        click.echo("\n".join(scripts), nl=False)
        return
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine: submit where SLURM is, or see the script with --dry-run")
    with tempfile.TemporaryDirectory() as folder:  # sbatch keeps a copy
        files = [Path(folder) / f"{number}.sh" for number in range(len(scripts))]
        for file, script in zip(files, scripts, strict=True):
            file.write_text(script, encoding="utf-8")
        done = subprocess.run(["bash", SCRIPTS / "chain.sh", *files], cwd=ROOT, check=False)
    if done.returncode:
        raise ValueError("sbatch refused; see above")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        fail(str(error))
