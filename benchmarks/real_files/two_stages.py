"""Both stages on records of one's own by the real commands, and scores on cases of one's own, for the scripts here."""

import csv
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import click

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.evaluation.statistics import Rate

Row = dict[str, object]
ROOT = Path(__file__).parents[2]
ALWAYS = ("--global-batch-size", "32", "--micro-batch-size", "32", "--max-length", "512", "--save-every", "100")
PRETRAIN = ("--set", "weight_decay=0.01", "--set", "adam_beta2=0.98")
WORDS = (*PRETRAIN, "--learning-rate", "3e-3", "--set", "warmup_ratio=0.13", "--set", "scheduler=constant")
PICTURES = (
    *PRETRAIN, "--learning-rate", "2e-3", "--set", "warmup_ratio=0.05", "--set", "final_lr_ratio=0.02",
    "--set", "train_vision_tower=true", "--set", "train_merger=true",
    "--set", "vision_tower_lr=3e-4", "--set", "merger_lr=5e-4",
)  # fmt: skip
STAGE1 = ("--learning-rate", "1.2e-3", "--set", "warmup_ratio=0.1")
STAGE2 = ("--learning-rate", "5e-4", "--set", "objective={sigmoid: 1, nll: 2}")
PLAIN_DPO = ("--learning-rate", "5e-5", "--beta", "1", "--set", "objective={sigmoid: 1}")
MODELS = {"base": "base", "Stage I": "stage1", "Stage II by plain DPO": "dpo", "Stage II (DPO and NLL)": "stage2"}
MAX_TOKENS = 96


def train_models(folder: Path, seed: int, see: Callable[[Path, Path], None]) -> None:
    """From folder/random to all of MODELS, on words.jsonl, views.jsonl, demos.jsonl and pairs.jsonl beside it.

    Args:
        folder: of all this.
        seed: of the runs.
        see: makes, from a model's folder to another, what visual tokens show; between words and views.
    """
    common = ("--seed", str(seed), *ALWAYS)
    stage(1, folder, "words", "random", "words.jsonl", *common, *WORDS, ds="z1")
    if not (folder / "eyes" / "preprocessor_config.json").exists():
        see(folder / "words", folder / "eyes")
    stage(1, folder, "base", "eyes", "views.jsonl", *common, *PICTURES, ds="z1")
    stage(1, folder, "stage1", "base", "demos.jsonl", *common, *STAGE1)
    stage(2, folder, "stage2", "stage1", "pairs.jsonl", *common, *STAGE2)
    stage(2, folder, "dpo", "stage1", "pairs.jsonl", *common, *PLAIN_DPO)


def stage(number: int, folder: Path, name: str, model: str, train: str, *settings: str, ds: str = "z3") -> None:
    """Run a stage's command; it finds by itself what is done already."""
    paths = ("--model", folder / model, "--train", folder / train, "--output", folder / name)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = ("deepspeed", "--master_port", str(port), f"launch/stage{number}.py", "--ds", f"ds_configs/{ds}.json")
    call(*command, *map(str, paths), *settings)


def call(*command: str) -> None:
    """Run a command of the repository and say so."""
    click.echo(f"$ {' '.join(command)}")
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}") or command[0]
    done = subprocess.run([program, *command[1:]], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def turns(asked: str | list, written: str) -> list[Row]:
    """A question and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": written}]


def copied(image: Path, folder: Path, index: int) -> str:
    """Copy an image beside the records, which may name none from elsewhere; its path relative to them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    name = f"images/{index:05d}{image.suffix}"
    shutil.copyfile(image, folder / name)
    return name


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def score(folder: Path, majority: Mapping[str, str]) -> list[Row]:
    """Greedy answers of every model to cases.jsonl, beside the answer that is the most frequent in training.

    Args:
        folder: of cases.jsonl and the models. A case's meta has its task and what a chain should say behind "Look: ".
        majority: that answer for each task.

    Returns:
        A row for each task and model: accuracy, format, and grounding (what the chain lists is what is there), in per
        cent with the ends of the 95 % Wilson interval.
    """
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = {name: generate(folder, model) for name, model in MODELS.items()}
    table = []
    for task, most in majority.items():
        asked = [case for case in cases if case["meta"]["task"] == task]
        always = {"accuracy": [case["answer"] == most for case in asked]}
        table.append({"task": task, "model": f"always {most}", "n": len(asked)} | rates(**always))
        for name, texts in answers.items():
            judged = [judge(case, texts[case["id"]]) for case in asked]
            each = {key: [row[key] for row in judged] for key in ("accuracy", "format", "grounding")}
            table.append({"task": task, "model": name, "n": len(asked)} | rates(**each))
    return table


def judge(case: Row, text: str) -> dict[str, bool]:
    """One answer, judged strictly."""
    parsed = parse_answer(text, case["options"])
    right = parsed.option is not None and case["options"][parsed.option] == case["answer"]
    grounded = f"Look: {case['meta']['look']}." in (parsed.think or "")
    return {"accuracy": right, "format": parsed.well_formed, "grounding": grounded}


def rates(**hits: Sequence[bool]) -> Row:
    """Each rate in per cent with the ends of its 95 % Wilson interval."""
    row: Row = {}
    for name, each in hits.items():
        rate = Rate(sum(each), len(each))
        ends = zip(("", "_low", "_high"), (rate.value, *rate.interval), strict=True)
        row |= {f"{name}{end}": round(100 * value, 1) for end, value in ends}
    return row


def generate(folder: Path, model: str) -> dict[str, str]:
    """A model's greedy answers, by the id of the case."""
    output = folder / f"{model}.answers.jsonl"
    call(
        "python", "launch/pairs.py", "sample", "--cases", f"{folder / 'cases.jsonl'}", "--model", f"{folder / model}",
        "--num", "1", "--temperature", "0", "--max-tokens", f"{MAX_TOKENS}", "--output", f"{output}",
    )  # fmt: skip
    return {row["case"]: row["text"] for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}


def report(table: Sequence[Row], results: str | None) -> None:
    """Print the table; write it with commit and date where a file is named."""
    for row in table:
        told = [f"{key} {row[key]} [{row[f'{key}_low']}, {row[f'{key}_high']}]" for key in row if f"{key}_low" in row]
        click.echo(f"{row['task']}, {row['model']} (n = {row['n']}): {', '.join(told)}")
    if results:
        git = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **git).stdout.strip()
        dirty = bool(subprocess.run(["git", "status", "--porcelain", "-uno"], **git).stdout.strip())
        about = {"date": date.today().isoformat(), "commit": commit, "dirty": dirty}
        with Path(results).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*about, *table[-1]])
            writer.writeheader()
            writer.writerows(about | row for row in table)
