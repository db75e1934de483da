"""Both stages on real blood smears: records derived from the boxes, the real commands, scores on held-out images.

python benchmarks/blood_smears.py --questions mm_bccd.jsonl
"""

import csv
import json
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import click
import numpy as np
import smears
from PIL import Image
from smears import OPTIONS, Smear

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.demo.score import Rate

Row = dict[str, object]
ROOT = Path(__file__).parents[1]
VOCABULARY = 512
LICENSE = "MIT"  # of BCCD's images, (c) 2017 shenggan
ALWAYS = ("--global-batch-size", "32", "--micro-batch-size", "32", "--max-length", "512", "--save-every", "100")
PRETRAIN = ("--learning-rate", "3e-3", "--set", "weight_decay=0.01", "--set", "adam_beta2=0.98")
WORDS = (*PRETRAIN, "--set", "warmup_ratio=0.13", "--set", "scheduler=constant")
PICTURES = (
    *PRETRAIN, "--set", "warmup_ratio=0.03", "--set", "final_lr_ratio=0.02", "--set", "train_vision_tower=true", "--set",
    "train_merger=true",
)  # fmt: skip
STAGE1 = ("--learning-rate", "1.2e-3", "--set", "warmup_ratio=0.1")
STAGE2 = ("--learning-rate", "5e-4", "--set", "objective={sigmoid: 1, nll: 2}")
PLAIN_DPO = ("--learning-rate", "5e-5", "--beta", "1", "--set", "objective={sigmoid: 1}")
MAX_TOKENS = 96


@click.command(help=__doc__)
@click.option("--questions", required=True, metavar="FILE", help="Questions on smears, with meta.boxes.")
@click.option("--output", default="runs/smears", show_default=True, help="Folder of records and runs.")
@click.option("--num-heldout", default=92, show_default=True, help="Images that nothing is trained on.")
@click.option("--development", default=0, show_default=True, help="Score on so many of the training images instead.")
@click.option("--num-views", default=12_000, show_default=True, help="Views that the base model learns to transcribe.")
@click.option("--epochs", default=1.0, show_default=True, help="Of the base model over its views.")
@click.option("--word-steps", default=300, show_default=True, help="Updates of the base model on words alone.")
@click.option("--num-demos", default=1600, show_default=True, help="Demonstrations of Stage I.")
@click.option("--num-pairs", default=1600, show_default=True, help="Pairs of Stage II.")
@click.option("--seed", default=0, show_default=True, help="Of the split, the weights, the records and their order.")
@click.option("--results", metavar="FILE.csv", help="Write the table there, too.")
def main(
    questions: str, output: str, num_heldout: int, development: int, num_views: int, epochs: float, word_steps: int,
    num_demos: int, num_pairs: int, seed: int, results: str | None,
) -> None:  # fmt: skip
    folder = Path(output)
    train, scored = smears.split_images(smears.read_smears(Path(questions)), num_heldout, seed)
    if development:
        train, scored = smears.split_images(train, development, seed)
    click.echo(f"{len(train)} images to train on, {len(scored)} to score on")
    write_rows(folder / "cases.jsonl", cases(scored))
    write_rows(folder / "words.jsonl", words(train, 32 * word_steps, seed))
    write_rows(folder / "views.jsonl", transcripts(train, num_views, folder, seed))
    write_rows(folder / "demos.jsonl", demonstrations(train, num_demos, seed))
    write_rows(folder / "pairs.jsonl", pairs(train, num_pairs, folder, seed))
    build(folder / "random", train, seed)

    common = ("--seed", str(seed), *ALWAYS)
    stage(1, folder, "words", "random", "words.jsonl", *common, *WORDS, ds="z1")
    stage(1, folder, "base", "words", "views.jsonl", *common, *PICTURES, "--epochs", str(epochs), ds="z1")
    stage(1, folder, "stage1", "base", "demos.jsonl", *common, *STAGE1)
    stage(2, folder, "stage2", "stage1", "pairs.jsonl", *common, *STAGE2)
    stage(2, folder, "dpo", "stage1", "pairs.jsonl", *common, *PLAIN_DPO)
    models = {"base": "base", "Stage I": "stage1", "Stage II by plain DPO": "dpo", "Stage II (DPO and NLL)": "stage2"}
    table = score(folder, models, train)
    for row in table:
        click.echo("  ".join(f"{value}" for value in row.values()))
    if results:
        write_table(Path(results), table)


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


def build(folder: Path, train: Sequence[Smear], seed: int) -> None:
    """A random Qwen2.5-VL of the demo's size for these words and pictures."""
    from mede2.trainer.demo.model import build_base

    rows = [*words(train, 400, seed), *demonstrations(train, 400, seed)]
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        texts = [text.replace(tag, "") for text in texts]
    texts += ["user\nassistant\n", f"Write look, grid. Grid: {' '.join(smears.FIELDS)}."] * 400
    pixels = smears.SIZE[0] * smears.SIZE[1]
    build_base(folder, seed, texts=texts, vocabulary=VOCABULARY, pixels=(pixels, pixels))


def cases(scored: Sequence[Smear]) -> Iterator[Row]:
    """Every question on these smears, the images as they are."""
    for smear in scored:
        for task, row in smear.rows.items():
            told = smears.places(smear.cells)
            yield {
                "id": row["id"],
                "prompt": [{"role": "user", "content": shown(task)}],
                "images": [str(smear.image.resolve())],
                "answer": row["answer_text"],
                "options": list(OPTIONS[task]),
                "explanation": smears.chain(task, told).partition("</think>")[0].removeprefix("<think>"),
                "meta": {"task": task, "look": smears.look(told), "modality": "blood smear", "license": LICENSE},
            }


def words(train: Sequence[Smear], num: int, seed: int) -> Iterator[Row]:
    """Text to transcribe or to copy: cells told in words, words in any order, options. Nothing is counted."""
    rng = np.random.default_rng([seed, 1])
    vocabulary = sorted({word for row in demonstrations(train, 200, seed) for word in row["messages"][1]["content"].split()})
    for _ in range(num):
        if rng.random() < 0.5:
            copied = f"Copy: {' '.join(rng.choice(vocabulary, size=rng.integers(4, 17)))}."
            yield {"messages": turns(copied, copied)}
            continue
        cells = some_view(train, rng)[1]
        task = str(rng.choice(smears.tasks_of(cells)))
        told = smears.places(cells)
        asked, written = transcript(task, rng, {"look": f"Look: {smears.look(told)}."})
        yield {"messages": turns(f"{smears.tell(told, rng)} {smears.question(task)} {asked}", written)}


def transcripts(train: Sequence[Smear], num: int, folder: Path, seed: int) -> Iterator[Row]:
    """Views to transcribe, one row in eight with words alone. Smears with many platelets are shown more often."""
    rng = np.random.default_rng([seed, 2])
    weights = np.array([0.5 + sum(cell.kind == "platelet" for cell in smear.cells) for smear in train])
    with_words = words(train, num // 7, seed + 1)
    for index in range(num):
        picture, cells = some_view(train, rng, weights / weights.sum())
        task = str(rng.choice(smears.tasks_of(cells)))
        seen = {"look": f"Look: {smears.look(smears.places(cells))}.", "grid": f"Grid: {smears.grid(cells)}."}
        asked, written = transcript(task, rng, seen)
        content = [{"type": "image"}, {"type": "text", "text": f"{smears.question(task)} {asked}"}]
        yield {"messages": turns(content, written), "images": [save(picture(), folder / "views" / f"{index:05d}.jpg")]}
        if index % 7 == 6:
            yield next(with_words)


def transcript(task: str, rng: np.random.Generator, seen: dict[str, str]) -> tuple[str, str]:
    """A request for some sections in some order, and what it asks for."""
    written = seen | {"options": f"Options: {', '.join(OPTIONS[task])}."}
    order = [name for name in rng.permutation(list(written)) if rng.random() < {"look": 0.9, "grid": 0.6}.get(name, 0.2)]
    order = order or ["look"]
    return f"Write {', '.join(order)}.", " ".join(written[name] for name in order)


def demonstrations(train: Sequence[Smear], num: int, seed: int) -> Iterator[Row]:
    """Stage I: cells told in words, the question, the chain."""
    rng = np.random.default_rng([seed, 3])
    for index in range(num):
        cells = some_view(train, rng)[1]
        task = pick_task(cells, index)
        told = smears.places(cells)
        asked = f"{smears.tell(told, rng)} {smears.question(task)} {smears.REQUEST}"
        yield {"messages": turns(asked, smears.chain(task, told)), "meta": {"task": task}}


def pairs(train: Sequence[Smear], num: int, folder: Path, seed: int) -> Iterator[Row]:
    """Stage II: views, the question, the chain and one with an error."""
    rng = np.random.default_rng([seed, 4])
    for index in range(num):
        picture, cells = some_view(train, rng)
        task = pick_task(cells, index)
        told = smears.places(cells)
        error = smears.ERRORS[index // 2 % len(smears.ERRORS)]
        yield {
            "prompt": [{"role": "user", "content": shown(task)}],
            "chosen": [{"role": "assistant", "content": smears.chain(task, told)}],
            "rejected": [{"role": "assistant", "content": smears.corrupt(task, told, error, rng)}],
            "images": [save(picture(), folder / "pair_views" / f"{index:05d}.jpg")],
            "meta": {"task": task, "error": error, "license": LICENSE},
        }


def some_view(train: Sequence[Smear], rng: np.random.Generator, weights=None):
    """A view of a smear: a function that draws it, and its cells."""
    smear = train[rng.choice(len(train), p=weights)]
    window, across, down, cells = smears.view(smear.cells, rng)
    return lambda: smears.draw(opened(smear.image), window, across, down), cells


_opened: dict[Path, Image.Image] = {}


def opened(path: Path) -> Image.Image:
    """An image, decoded once."""
    if path not in _opened:
        _opened[path] = Image.open(path).convert("RGB")
    return _opened[path]


def save(picture: Image.Image, path: Path) -> str:
    """Save a picture beside the records; its path relative to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)
    return f"{path.parent.name}/{path.name}"


def pick_task(cells: Sequence[smears.Cell], index: int) -> str:
    """The tasks in turn, as far as the cells allow."""
    possible = smears.tasks_of(cells)
    return possible[index % len(possible)]


def shown(task: str) -> list[dict[str, str]]:
    """The user's turn beside an image."""
    return [{"type": "image"}, {"type": "text", "text": f"{smears.question(task)} {smears.REQUEST}"}]


def turns(asked: str | list, written: str) -> list[Row]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": written}]


def write_rows(path: Path, rows: Iterator[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def score(folder: Path, models: dict[str, str], train: Sequence[Smear]) -> list[Row]:
    """Greedy answers of each model to the scored cases, beside chance and the majority answer of the training images."""
    scored = [json.loads(line) for line in (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
    table = []
    for task in OPTIONS:
        of_task = [case for case in scored if case["meta"]["task"] == task]
        known = Counter(smear.rows[task]["answer_text"] for smear in train if task in smear.rows)
        majority = known.most_common(1)[0][0]
        table.append(
            {"task": task, "model": f"always {majority}"}
            | rates(accuracy=[case["answer"] == majority for case in of_task])
        )
    for name, model in models.items():
        texts = generate(folder, model, "cases.jsonl")
        for task in OPTIONS:
            of_task = [case for case in scored if case["meta"]["task"] == task]
            parsed = [parse_answer(texts[case["id"]], case["options"]) for case in of_task]
            table.append(
                {"task": task, "model": name}
                | rates(
                    accuracy=[
                        answer.option is not None and case["options"][answer.option] == case["answer"]
                        for case, answer in zip(of_task, parsed, strict=True)
                    ],
                    format=[answer.well_formed for answer in parsed],
                    grounding=[
                        f"Look: {case['meta']['look']}." in (answer.think or "")
                        for case, answer in zip(of_task, parsed, strict=True)
                    ],
                )
            )
    return table


def rates(**hits: list[bool]) -> Row:
    """Each rate in per cent with the ends of its 95 % Wilson interval."""
    row: Row = {}
    for name, each in hits.items():
        rate = Rate(sum(each), len(each))
        low, high = rate.interval
        row |= {"n": rate.num, name: round(100 * rate.value, 1)}
        row |= {f"{name}_low": round(100 * low, 1), f"{name}_high": round(100 * high, 1)}
    return row


def generate(folder: Path, model: str, questions: str) -> dict[str, str]:
    """A model's greedy answer to each question, by id."""
    output = folder / f"{model}.{questions}"
    call(
        "python", "launch/pairs.py", "sample", "--cases", f"{folder / questions}", "--model", f"{folder / model}",
        "--num", "1", "--temperature", "0", "--max-tokens", f"{MAX_TOKENS}", "--output", f"{output}",
    )  # fmt: skip
    return {row["case"]: row["text"] for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}


if __name__ == "__main__":
    main()
