"""Check records before they are trained on: what the stages refuse, and what their author should know."""

import gzip
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.dataset import Checked, check_rows
from mede2.trainer.data.encoding import Encoder, Example, read_images
from mede2.trainer.data.images import Window, load_image, parse_window
from mede2.trainer.data.records import Record, text_of
from mede2.trainer.data.remarks import Remark, compare, normalized
from mede2.trainer.preference.duplicates import ALIKE_BITS, ALIKE_TEXT, alike_images, alike_texts, perceptual_hash
from mede2.trainer.preference.leakage import COMMON, GRAM, LEAK_BITS, LIKELY, SHORTEST, Benchmarks, Index
from mede2.trainer.questions.benchmarks import parse_benchmark, read_benchmark
from mede2.trainer.questions.cases import Case
from mede2.trainer.settings import ENHANCE, Settings

KINDS = {
    "file": "files: there, UTF-8",
    "form": "rows: JSON, keys, roles, placeholders",
    "text": "texts: no control tokens, read in the right encoding, answer tags",
    "image": "images: decode; none the same or alike in two files",
    "length": "tokens, those of images counted",
    "duplicate": "rows and answers: not the same, not nearly the same",
    "contradiction": "one question, one answer; none both chosen and rejected",
    "id": "ids: each once",
    "licence": "meta.license: there",
    "place": "images: inside the file's folder",
    "leak": "benchmarks: none of their questions and images",
}
LISTED = {"error": 20, "warning": 5}  # of a kind, on the terminal


@dataclass(frozen=True)
class Problem:
    """One finding; `line` is None for a whole file."""

    file: str
    line: int | None
    severity: str
    kind: str
    problem: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.severity}: {self.problem}"


@dataclass
class Report:
    """What a check found.

    Attributes:
        rows: of the files.
        usable: rows that a stage would train on.
        images: in usable rows, each time that one is shown.
        image_files: that hold them.
        lengths: tokens of each sequence of the usable rows; none without a model.
        licenses: usable rows by licence.
        benchmarks: what the rows were compared with; see `leakage.Index.summary`.
        problems: in the order of the rows.
    """

    rows: int = 0
    usable: int = 0
    images: int = 0
    image_files: int = 0
    lengths: list[int] = field(default_factory=list)
    licenses: Counter = field(default_factory=Counter)
    benchmarks: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def count(self, severity: str, kind: str | None = None) -> int:
        return sum(found.severity == severity and kind in (None, found.kind) for found in self.problems)


def check(
    files: Sequence[str], stage: int, encoder: Encoder | None = None, grey_window: Window = None,
    most_bits: int = ALIKE_BITS, least_similarity: float = ALIKE_TEXT, benchmarks: Benchmarks | None = None,
) -> Report:  # fmt: skip
    """Check files as a stage does, by the same code, and for what a stage does not ask.

    Args:
        files: jsonl files.
        stage: what their rows are.
        encoder: of the model that will be trained; without one tokens are not counted.
        grey_window: see `images.load_image`.
        most_bits: see `duplicates.alike_images`.
        least_similarity: see `duplicates.alike_texts`.
        benchmarks: cases, by the benchmark's name, that the usable rows must not hold.
    """

    def decode(record: Record) -> Example:
        return Example(record.source, (), tuple(map(str, record.images)), "", read_images(record, grey_window)[1])

    report, good = Report(), []
    with Progress("rows checked", sum(map(_num_lines, files))) as progress:
        for file in files:
            try:
                for _, row in check_rows((file,), stage, encoder or decode):
                    report.rows += 1
                    if row.problem:
                        report.problems.append(_problem("error", row.problem.source, row.problem))
                    else:
                        good.append(row)
                    progress.advance()
            except ValueError as error:
                report.problems.append(Problem(file, None, "error", "file", str(error).removeprefix(f"{file}: ")))
    report.usable, report.images = len(good), sum(len(row.example.images) for row in good)
    report.image_files = len({path for row in good for path in row.example.images})
    report.lengths = [len(sequence) for row in good for sequence in row.example.sequences]
    report.licenses = Counter(_licence(row.record) or "none" for row in good)
    remarks = [
        *compare(row.traits for row in good), *_alike_rows(good, least_similarity),
        *_alike_images(good, grey_window, most_bits), *_origins(good),
    ]  # fmt: skip
    report.problems += [_problem("warning", remark.source, remark) for remark in remarks]
    if benchmarks:
        index = Index(benchmarks, grey_window)
        report.benchmarks = index.summary
        report.problems += _leaks(good, index)
    order = {file: number for number, file in enumerate(files)}
    report.problems.sort(key=lambda found: (order[found.file], found.line or 0))
    return report


def _num_lines(file: str) -> int:
    """For the progress alone: 0 where it is not to be had."""
    try:
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    except (OSError, EOFError):
        return 0


def _problem(severity: str, source: str, found: Any) -> Problem:
    file, _, line = source.rpartition(":")
    text = found.text if isinstance(found, Remark) else found.problem
    return Problem(file, int(line), severity, found.kind, text)


def _licence(record: Record) -> str:
    return str(record.meta.get("license") or "").strip()


def _origins(rows: Sequence[Checked]) -> Iterator[Remark]:
    """Rows without a licence, and images that do not travel with their file's folder."""
    for row in rows:
        if not _licence(row.record):
            yield Remark(row.record.source, "licence", "no meta.license: who may use it, and what for?")
        folder = Path(row.record.source.rpartition(":")[0]).parent.resolve()
        outside = [image for image in row.record.images if not image.resolve().is_relative_to(folder)]
        if outside:
            text = f"image {outside[0]} lies outside the file's folder and stays when that moves"
            yield Remark(row.record.source, "place", text)


def _alike_rows(rows: Sequence[Checked], least: float) -> Iterator[Remark]:
    """Rows nearly the same as an earlier one on the same images. Those entirely the same are in `compare`."""
    different: dict[tuple, Checked] = {}
    for row in rows:
        different.setdefault((row.traits.question, row.traits.answers), row)
    first = list(different.values())
    texts = [
        normalized(" ".join(text_of([message]) for messages in row.record.conversations for message in messages))
        for row in first
    ]
    pairs = alike_texts(texts, [row.example.image_hashes for row in first], least)
    for row, earlier_ones in itertools.groupby(pairs, key=lambda pair: pair[0]):
        _, earlier, similarity = max(earlier_ones, key=lambda pair: pair[2])
        text = f"nearly the row of {first[earlier].record.source} again (similarity {similarity:.2f})"
        yield Remark(first[row].record.source, "duplicate", text)


def _alike_images(rows: Sequence[Checked], grey_window: Window, most_bits: int) -> Iterator[Remark]:
    """Files with the bytes of another, and pictures that look like another: once each, where they are first shown."""
    shown: dict[Path, tuple[str, str]] = {}  # file -> where it is first shown, its hash
    for row in rows:
        for image, image_hash in zip(row.record.images, row.example.image_hashes, strict=True):
            shown.setdefault(image.resolve(), (row.record.source, image_hash))
    distinct: dict[str, Path] = {}
    for image, (source, image_hash) in shown.items():
        if (first := distinct.setdefault(image_hash, image)) != image:
            yield Remark(source, "image", f"image {image} has the bytes of {first} ({shown[first][0]})")
    images = list(distinct.values())
    if len(images) < 2:
        return
    with Progress("images compared", len(images)) as progress:
        hashes = []
        for image in images:
            hashes.append(perceptual_hash(load_image(image, grey_window)))
            progress.advance()
    for image, earlier, bits in alike_images(np.stack(hashes), most_bits):
        looks = f"image {images[image]} looks like {images[earlier]} ({shown[images[earlier]][0]})"
        yield Remark(shown[images[image]][0], "image", f"{looks}: {bits} bits of 256 differ")


def _leaks(rows: Sequence[Checked], index: Index) -> Iterator[Problem]:
    """Rows that hold a benchmark's question or show its image."""
    with Progress("rows compared with benchmarks", len(rows)) as progress:
        for row in rows:
            for leak in index.leaks(row.record):
                text = f"{leak.benchmark}, case {leak.case!r}: {leak.detail}"
                yield Problem(leak.file, leak.line, leak.severity, "leak", text)
            progress.advance()


HELP = f"""Check records before they are trained on: everything that the stages refuse (errors), by the same code, and
what their author should know (warnings): rows, ids and images that stand twice or nearly so, answers that contradict
each other, missing licences.

Images look alike where perceptual hashes of 256 bits differ in at most {ALIKE_BITS}. Paths of images may be absolute or
lead out of the file's folder, but that is a warning: they are read wherever the rows point.

--against BENCHMARK, a file or folder behind its name: that a row shows one of its images (the same bytes, the same
pixels, or {LEAK_BITS} bits at most of the hash different) or holds {LIKELY:.0%} or more of a question is an error; less
is a warning, for different vignettes have phrases in common. Questions are compared by {GRAM} words in a row, without
case and punctuation, options, and what stands in more than {COMMON} of the benchmark's questions or in over half of
them; a shorter one, of {SHORTEST} words or more, must be there whole and, if it has images, beside one of them.

Exit code: 0 without errors; 1 with errors; 2 with warnings alone, under --strict (and where the command itself is
misspelt)."""


@click.command("check", help=HELP, short_help=__doc__)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--stage", type=click.IntRange(1, 2), default=ENHANCE, show_default=True, help="That the rows are for.")
@click.option(
    "--model", metavar="FOLDER", help="Whose tokens are counted, folder or hub name. [tokens are not counted]"
)
@click.option("--max-length", type=click.IntRange(8), metavar="NUMBER", help=f"[{Settings.max_length}]")
@click.option("--max-pixels", type=click.IntRange(1), metavar="NUMBER", help="[the model's own limit]")
@click.option(
    "--grey-window", metavar="LOW,HIGH", help="Intensities that become black and white in images of over 8 bits."
)
@click.option("--image-bits", type=click.IntRange(0, 256), default=ALIKE_BITS, show_default=True,
              help="Bits in which hashes of images that look alike may differ.")  # fmt: skip
@click.option("--similarity", type=click.FloatRange(0, 1), default=ALIKE_TEXT, show_default=True,
              help="Of texts that are nearly the same (1: the same words in the same order).")  # fmt: skip
@click.option(
    "--against",
    multiple=True,
    metavar="NAME=PATH",
    help="A benchmark that must not be trained on; cases=PATH: cases of your own. Repeatable.",
)
@click.option("--strict", is_flag=True, help="Warnings fail, too.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, with every problem.")
@click.pass_context
def command(
    context: click.Context, files: tuple[str, ...], stage: int, model: str | None, max_length: int | None,
    max_pixels: int | None, grey_window: str | None, image_bits: int, similarity: float, against: tuple[str, ...],
    strict: bool, as_json: bool,
) -> None:  # fmt: skip
    window = parse_window(grey_window)
    limit = max_length or Settings.max_length
    encoder = None
    if model:
        from mede2.trainer.data.processing import load_processor, locate_model

        encoder = Encoder(load_processor(locate_model(model), max_pixels), limit, window)
    elif max_length or max_pixels:
        raise ValueError(f"--{'max-length' if max_length else 'max-pixels'}: only with --model, whose tokens it limits")
    with tempfile.TemporaryDirectory() as folder:
        benchmarks = _read_benchmarks(against, Path(folder))
        report = check(tuple(dict.fromkeys(files)), stage, encoder, window, image_bits, similarity, benchmarks)
    if as_json:
        click.echo(json.dumps(_as_json(report, files, stage, model, limit if model else None), ensure_ascii=False))
    else:
        _print(report, model, limit)
    errors, warnings = report.count("error"), report.count("warning")
    context.exit(1 if errors else 2 if warnings and strict else 0)


def _read_benchmarks(against: Sequence[str], folder: Path) -> dict[str, list[Case]]:
    """The cases of each benchmark; images embedded in its files go to the folder."""
    benchmarks: dict[str, list[Case]] = {}
    for text in against:
        name, adapter, path = parse_benchmark(text)
        if name in benchmarks:
            raise ValueError(f"--against {text}: {name} again; give each benchmark a name of its own")
        benchmarks[name] = read_benchmark(adapter, path, folder / str(len(benchmarks)))
    return benchmarks


def _as_json(report: Report, files: Sequence[str], stage: int, model: str | None, limit: int | None) -> dict[str, Any]:
    lengths = report.lengths
    return {
        "files": list(files), "stage": stage, "model": model, "max_length": limit,
        "rows": report.rows, "usable": report.usable, "images": report.images, "image_files": report.image_files,
        "tokens": {"sequences": len(lengths), "all": sum(lengths), "longest": max(lengths, default=0)},
        "licenses": dict(report.licenses), "against": report.benchmarks,
        "errors": report.count("error"), "warnings": report.count("warning"),
        "problems": [vars(found) for found in report.problems],
    }  # fmt: skip


def _print(report: Report, model: str | None, limit: int) -> None:
    """Problems as compilers list them, then the table."""
    from rich.console import Console
    from rich.table import Table

    told: Counter = Counter()
    for found in report.problems:
        told[found.severity, found.kind] += 1
        if told[found.severity, found.kind] <= LISTED[found.severity]:
            click.echo(found)
    table = Table("checked", "errors", "warnings")
    for kind, title in KINDS.items():
        if kind == "length" and not model:
            title += ": not without --model"
        if kind == "leak" and not report.benchmarks:
            title += ": not without --against"
        counts = [report.count(severity, kind) for severity in ("error", "warning")]
        table.add_row(title, *(str(count) if count else "-" for count in counts))
    if any(told[key] > LISTED[key[0]] for key in told):
        click.echo("(and more of a kind; --json lists all)")
    Console(width=None if click.get_text_stream("stdout").isatty() else 110).print(table)
    images = f"{report.images} images in {report.image_files} files" if report.images else "no images"
    click.echo(f"{report.usable} of {report.rows} rows can be used; {images}")
    if report.lengths:
        middle = sorted(report.lengths)[len(report.lengths) // 2]
        click.echo(f"tokens by {model}: {sum(report.lengths)} in all, median sequence {middle}, longest "
                   f"{max(report.lengths)} of {limit}")  # fmt: skip
    for name, size in report.benchmarks.items():
        few = f", {size['without_words']} without words of their own to look for" if size["without_words"] else ""
        click.echo(f"against {name}: {size['cases']} cases with {size['images']} images{few}")
    click.echo("licences: " + ", ".join(f"{name} {count}" for name, count in report.licenses.most_common()))
    click.echo(f"{report.count('error')} errors, {report.count('warning')} warnings")
