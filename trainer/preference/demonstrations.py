"""Curate demonstrations for Stage I: right, well-formed, of fair length, no two alike, balanced over specialties."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mede2.trainer.answering.answers import is_right, parse_answer
from mede2.trainer.data.encoding import Encoder, read_images
from mede2.trainer.data.records import BadRow, Record, parse_record, parse_row, text_of
from mede2.trainer.data.remarks import normalized
from mede2.trainer.preference.duplicates import ALIKE_TEXT, alike_texts
from mede2.trainer.questions.cases import parse_case
from mede2.trainer.questions.rows import Row, read_lines, write_rows
from mede2.trainer.settings import ELICIT, Settings

NUMBER = 2000  # arXiv 2505.23118, Stage I
REASONS = {  # why a row is left out, in the order in which it is asked; the first that holds counts
    "unusable": "no row of Stage I and no case, or one that no stage takes",
    "no key": "nothing to compare its answer with (meta.answer)",
    "no reasoning": "a case without explanation",
    "images": "it shows images, and Stage I is text alone (--with-images keeps them)",
    "format": "not <think>...</think> <answer>...</answer> with something in both",
    "wrong": "its answer is not the key",
    "unclear": "an open answer, other words than the key's",
    "length": "shorter or longer than asked for",
    "alike": "nearly the question of an earlier one",
    "surplus": "more than its specialty's share",
}
NO_SPECIALTY = "(none)"


class LeftOut(Exception):
    """A row that is not taken; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Limits:
    """What demonstrations must keep to.

    Attributes:
        least, most: length of the answer, in tokens of `encoder`'s model or, without one, in characters.
        with_images: whether rows with images are taken.
        encoder: of the model that will be trained; it refuses what the stage would refuse.
    """

    least: int = 0
    most: int | None = None
    with_images: bool = False
    encoder: Encoder | None = None


@dataclass(frozen=True)
class Demonstration:
    """A row that may be taken: `row` as it will be written, `question` its normalized text, `images` their hashes."""

    source: str
    row: Row
    question: str
    images: tuple[str, ...]
    specialty: str


def read_demonstration(source: str, line: str, folder: Path, output: Path, limits: Limits) -> Demonstration:
    """One line, of Stage I's records or of cases.jsonl, as a demonstration.

    Args:
        source: "file:line".
        line: the JSON text.
        folder: what its image paths are relative to.
        output: the folder that they will be relative to.
        limits: what it must keep to.

    Raises:
        LeftOut: why it is none.
    """
    try:
        row = parse_row(source, line)
        if "messages" not in row and "answer" in row:
            row = _of_case(source, row, folder)
            line = json.dumps(row)
        record = parse_record(line, source, folder, ELICIT)
    except BadRow as error:
        raise LeftOut("unusable", error.problem) from error
    options = _options(record)
    key = record.meta.get("answer")
    if not isinstance(key, str) or not key.strip():
        raise LeftOut("no key", f"meta.answer is {key!r:.60}")
    if record.images and not limits.with_images:
        raise LeftOut("images", f"{len(record.images)} images")
    answer = text_of(record.conversations[0][-1:])
    parsed = parse_answer(answer, options)
    if not (parsed.well_formed and parsed.think and parsed.answer):
        raise LeftOut("format", answer[:60])
    if not (right := is_right(parsed, key, options)):
        raise LeftOut("unclear" if right is None else "wrong", f"{parsed.answer!r:.60}, where the key is {key!r:.60}")
    length, images = _length(record, answer, limits.encoder)
    if length < limits.least or (limits.most is not None and length > limits.most):
        raise LeftOut("length", f"{length} {'tokens' if limits.encoder else 'characters'}")
    if record.images:
        paths = [Path(name) for name in row["images"]]
        moved = [path if path.is_absolute() else os.path.relpath(folder / path, output) for path in paths]
        row = row | {"images": [str(path) for path in moved]}
        try:
            parse_record(json.dumps(row), source, output, ELICIT)
        except BadRow as error:
            raise LeftOut("unusable", error.problem) from error
    question = normalized(" ".join(text_of([message]) for message in record.conversations[0][:-1]))
    return Demonstration(source, row, question, images, str(record.meta.get("specialty") or NO_SPECIALTY))


def _of_case(source: str, row: Row, folder: Path) -> Row:
    """A case with its explanation as a row of Stage I."""
    case = parse_case(source, row, folder)
    if not (case.explanation and case.explanation.strip()):
        raise LeftOut("no reasoning", "no explanation")
    text = f"<think>{case.explanation.strip()}</think> <answer>{case.answer}</answer>"
    meta = case.meta | {"answer": case.answer} | ({"options": list(case.options)} if case.options else {})
    images = {"images": row["images"]} if case.images else {}
    return {"id": case.id, "messages": [*row["prompt"], {"role": "assistant", "content": text}], **images, "meta": meta}


def _options(record: Record) -> Sequence[str]:
    """The options of a record: a list under meta.options, or an object of letters and texts."""
    options = record.meta.get("options") or ()
    options = list(options.values()) if isinstance(options, dict) else options
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        raise LeftOut("unusable", f"meta.options: a list of texts, not {options!r:.60}")
    return options


def _length(record: Record, answer: str, encoder: Encoder | None) -> tuple[int, tuple[str, ...]]:
    """The length of the answer, and the hashes of the images, which are decoded."""
    try:
        if encoder is None:
            return len(answer), read_images(record)[1]
        example = encoder(record)
        return example.sequences[0].num_answer_tokens, example.image_hashes
    except BadRow as error:
        raise LeftOut("length" if error.kind == "length" else "unusable", error.problem) from error


def without_alike(candidates: Sequence[Demonstration], least: float) -> Iterator[tuple[Demonstration, str | None]]:
    """Yield each candidate with the source of an earlier one that is kept and has nearly its question, or None."""
    texts = [candidate.question for candidate in candidates]
    pairs = alike_texts(texts, [candidate.images for candidate in candidates], least)
    earlier = {row: [pair[1] for pair in group] for row, group in itertools.groupby(pairs, key=lambda pair: pair[0])}
    kept: set[int] = set()
    first: dict[tuple, int] = {}
    for number, candidate in enumerate(candidates):
        same = first.setdefault((candidate.question, candidate.images), number)
        alike = [other for other in (same, *earlier.get(number, ())) if other in kept]
        if not alike:
            kept.add(number)
        yield candidate, candidates[alike[0]].source if alike else None


def shares(sizes: Mapping[str, int], number: int) -> dict[str, int]:
    """How many of each group to take: `number` in all, as evenly as the groups' sizes allow."""
    taken, left = {}, min(number, sum(sizes.values()))
    for position, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        taken[name] = min(size, left // (len(sizes) - position))
        left -= taken[name]
    return taken


def balance(candidates: Sequence[Demonstration], number: int, seed: int) -> list[bool]:
    """Which candidates to take. Which of a specialty are taken follows from the seed and their text alone, not from
    their order in the files or from what else there is."""

    def draw(candidate: Demonstration) -> str:
        messages = json.dumps(candidate.row["messages"], sort_keys=True)
        return hashlib.sha256(f"{seed} {messages}".encode()).hexdigest()

    wanted = shares(Counter(candidate.specialty for candidate in candidates), number)
    taken = set()
    for index in sorted(range(len(candidates)), key=lambda index: draw(candidates[index])):
        if wanted[candidates[index].specialty]:
            wanted[candidates[index].specialty] -= 1
            taken.add(index)
    return [index in taken for index in range(len(candidates))]


HELP = f"""{__doc__}

FILEs hold records of Stage I with the key under meta.answer (and the options under meta.options), or cases with an
explanation (cases.jsonl). Specialties are read from meta.specialty; each gives the same number as far as it can.

OUTPUT gets what is taken, in the order of the FILEs, the same for the same seed. Beside it OUTPUT.left_out.jsonl
names every other row with the reason."""


@click.command("demonstrations", help=HELP, short_help=__doc__)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--output", required=True, metavar="FILE", help="demonstrations.jsonl")
@click.option("--number", type=click.IntRange(1), default=NUMBER, show_default=True, help="How many to take.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other rows.")
@click.option("--model", metavar="FOLDER", help="Counts its tokens, and leaves out what it does not take.")
@click.option("--max-length", type=click.IntRange(8), metavar="TOKENS", help=f"As in Stage I. [{Settings.max_length}]")
@click.option("--min-answer", type=click.IntRange(0), default=0, metavar="NUMBER",
              help="Shortest answer with its reasoning: tokens with --model, else characters.")  # fmt: skip
@click.option("--max-answer", type=click.IntRange(1), metavar="NUMBER", help="Longest answer, in the same.")
@click.option("--similarity", type=click.FloatRange(0, 1), default=ALIKE_TEXT, show_default=True,
              help="Of questions that are nearly the same (1: the same words in the same order).")  # fmt: skip
@click.option("--with-images", is_flag=True, help="Take rows with images, too.")
def command(
    files: tuple[str, ...], output: str, number: int, seed: int, model: str | None, max_length: int | None,
    min_answer: int, max_answer: int | None, similarity: float, with_images: bool,
) -> None:  # fmt: skip
    encoder = None
    if model:
        from mede2.trainer.data.processing import load_processor, locate_model

        encoder = Encoder(load_processor(locate_model(model)), max_length or Settings.max_length)
    elif max_length:
        raise ValueError("--max-length: only with --model, whose tokens it limits")
    path = Path(output)
    if path.resolve() in {Path(file).resolve() for file in files}:
        raise ValueError(f"--output {output}: it is one of the files that are read")
    limits = Limits(min_answer, max_answer, with_images, encoder)
    left_out: list[dict[str, Any]] = []
    candidates: list[Demonstration] = []
    for file in dict.fromkeys(files):
        for source, line in read_lines(Path(file)):
            try:
                candidates.append(read_demonstration(source, line, Path(file).parent, path.parent, limits))
            except LeftOut as error:
                left_out.append({"source": source, "reason": error.reason, "detail": error.detail})
    different = []
    for candidate, earlier in without_alike(candidates, similarity):
        if earlier:
            left_out.append({"source": candidate.source, "reason": "alike", "detail": earlier})
        else:
            different.append(candidate)
    taken = []
    for candidate, is_taken in zip(different, balance(different, number, seed), strict=True):
        if is_taken:
            taken.append(candidate)
        else:
            left_out.append({"source": candidate.source, "reason": "surplus", "detail": candidate.specialty})
    if not taken:
        counts = Counter(row["reason"] for row in left_out)
        told = ", ".join(f"{reason} {counts[reason]} ({REASONS[reason]})" for reason in REASONS if counts[reason])
        raise ValueError(f"no row of {', '.join(files)} can be a demonstration: {told or 'there is none'}")
    write_rows(path, (candidate.row for candidate in taken))
    write_rows(path.with_name(f"{path.name}.left_out.jsonl"), left_out)
    _print(left_out, different, taken, path, number)


def _print(left_out: list[Row], different: list[Demonstration], taken: list[Demonstration], path: Path, number: int):
    """What was left out and why, what was taken of which specialty."""
    from rich.console import Console
    from rich.table import Table

    reasons = Counter(row["reason"] for row in left_out)
    table = Table("left out", "rows", "because")
    for reason, why in REASONS.items():
        if reasons[reason]:
            table.add_row(reason, str(reasons[reason]), why)
    console = Console(width=None if click.get_text_stream("stdout").isatty() else 110)
    if reasons:
        console.print(table)
    table = Table("specialty", "could be taken", "taken")
    chosen = Counter(candidate.specialty for candidate in taken)
    for specialty, size in sorted(Counter(candidate.specialty for candidate in different).items()):
        table.add_row(specialty, str(size), str(chosen[specialty]))
    console.print(table)
    of = f" of the {number} asked for" if len(taken) < number else ""
    click.echo(f"{len(taken)}{of} demonstrations from {len(left_out) + len(taken)} rows in {path}")
