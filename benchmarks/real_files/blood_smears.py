"""Both stages on real blood smears: records derived from the boxes, the real commands, scores on held-out images.

python benchmarks/real_files/blood_smears.py --questions mm_bccd.jsonl
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import smears
from eyes import Batch, learn_to_see
from PIL import Image
from smears import FIELDS, OPTIONS, Smear
from two_stages import Row, copied, report, score, train_models, turns, write_rows

VOCABULARY = 512
LICENSE = "MIT"  # of BCCD's images, (c) 2017 shenggan


@click.command(help=__doc__)
@click.option("--questions", required=True, metavar="FILE", help="Questions on smears, with meta.boxes.")
@click.option("--output", default="runs/smears", show_default=True, help="Folder of records and runs.")
@click.option("--num-heldout", default=92, show_default=True, help="Images that nothing is trained on.")
@click.option("--development", default=0, show_default=True, help="Score on so many of the training images instead.")
@click.option("--word-steps", default=120, show_default=True, help="Updates of the base model on words alone.")
@click.option("--eye-steps", default=450, show_default=True, help="Updates on what visual tokens show.")
@click.option("--num-views", default=4000, show_default=True, help="Views that the base model learns to transcribe.")
@click.option("--num-demos", default=960, show_default=True, help="Demonstrations of Stage I.")
@click.option("--num-pairs", default=960, show_default=True, help="Pairs of Stage II.")
@click.option("--seed", default=0, show_default=True, help="Of the split, the weights, the records and their order.")
@click.option("--results", metavar="FILE.csv", help="Write the table there, too.")
def main(
    questions: str, output: str, num_heldout: int, development: int, word_steps: int, eye_steps: int, num_views: int,
    num_demos: int, num_pairs: int, seed: int, results: str | None,
) -> None:  # fmt: skip
    folder = Path(output)
    train, scored = smears.split_images(smears.read_smears(Path(questions)), num_heldout, seed)
    if development:
        train, scored = smears.split_images(train, development, seed)
    click.echo(f"{len(train)} images to train on, {len(scored)} to score on")
    write_rows(folder / "cases.jsonl", cases(scored, folder))
    write_rows(folder / "words.jsonl", words(train, 32 * word_steps, seed))
    write_rows(folder / "views.jsonl", transcripts(train, num_views, folder, seed))
    write_rows(folder / "demos.jsonl", demonstrations(train, num_demos, seed))
    write_rows(folder / "pairs.jsonl", pairs(train, num_pairs, folder, seed))
    build(folder / "random", train, seed)

    rng = np.random.default_rng([seed, 5])
    see = partial(
        learn_to_see, draw_batch=partial(fields, train, rng), num_classes=len(FIELDS),
        num_tokens=smears.GRID[0] * smears.GRID[1], num_steps=eye_steps,
    )  # fmt: skip
    train_models(folder, seed, see)
    known = {
        task: Counter(smear.rows[task]["answer_text"] for smear in train if task in smear.rows) for task in OPTIONS
    }
    report(score(folder, {task: counts.most_common(1)[0][0] for task, counts in known.items()}), results)


def build(folder: Path, train: Sequence[Smear], seed: int) -> None:
    """A random Qwen2.5-VL of the demo's size for these words and pictures."""
    from mede2.trainer.demo.model import build_base

    rows = [*words(train, 400, seed), *demonstrations(train, 400, seed)]
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        texts = [text.replace(tag, "") for text in texts]
    texts += ["user\nassistant\n", f"Write look, grid. Grid: {' '.join(FIELDS)}."] * 400
    pixels = smears.SIZE[0] * smears.SIZE[1]
    build_base(folder, seed, texts=texts, vocabulary=VOCABULARY, pixels=(pixels, pixels), merge=smears.MERGE)


def cases(scored: Sequence[Smear], folder: Path) -> Iterator[Row]:
    """Every question on these smears, the images as they are, copied to `folder`."""
    for index, smear in enumerate(scored):
        image = copied(smear.image, folder, index)
        for task, row in smear.rows.items():
            told = smears.places(smear.cells)
            yield {
                "id": row["id"],
                "prompt": [{"role": "user", "content": shown(task)}],
                "images": [image],
                "answer": row["answer_text"],
                "options": list(OPTIONS[task]),
                "explanation": smears.chain(task, told).partition("</think>")[0].removeprefix("<think>"),
                "meta": {"task": task, "look": smears.look(told), "modality": "blood smear", "license": LICENSE},
            }


def words(train: Sequence[Smear], num: int, seed: int) -> Iterator[Row]:
    """Text to transcribe or to copy: cells told in words, words in any order, options. Nothing is counted."""
    rng = np.random.default_rng([seed, 1])
    vocabulary = sorted(
        {word for row in demonstrations(train, 200, seed) for word in row["messages"][1]["content"].split()}
    )
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
    """Views to transcribe, one row in eight with words alone."""
    rng = np.random.default_rng([seed, 2])
    with_words = words(train, num // 7, seed + 1)
    for index in range(num):
        picture, cells = some_view(train, rng)
        task = str(rng.choice(smears.tasks_of(cells)))
        content = [{"type": "image"}, {"type": "text", "text": f"{smears.question(task)} Write look."}]
        written = f"Look: {smears.look(smears.places(cells))}."
        yield {"messages": turns(content, written), "images": [save(picture(), folder / "views" / f"{index:05d}.jpg")]}
        if index % 7 == 6:
            yield next(with_words)


def fields(train: Sequence[Smear], rng: np.random.Generator, num: int) -> Batch:
    """Views, and which of FIELDS each visual token shows."""
    views = [some_view(train, rng, weights(train)) for _ in range(num)]
    return [draw() for draw, _ in views], [[FIELDS.index(name) for name in smears.fields(cells)] for _, cells in views]


def weights(train: Sequence[Smear]) -> np.ndarray:
    """How often the eyes are shown each smear: more often with more platelets."""
    numbers = np.array([0.5 + sum(cell.kind == "platelet" for cell in smear.cells) for smear in train])
    return numbers / numbers.sum()


def transcript(task: str, rng: np.random.Generator, seen: dict[str, str]) -> tuple[str, str]:
    """A request for some sections in some order, and what it asks for."""
    written = seen | {"options": f"Options: {', '.join(OPTIONS[task])}."}
    order = [
        name for name in rng.permutation(list(written)) if rng.random() < {"look": 0.9, "grid": 0.5}.get(name, 0.2)
    ]
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


if __name__ == "__main__":
    main()
