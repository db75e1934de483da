"""The data set of a run: every row read, checked and encoded before the first step, the work shared by the ranks."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mede2.trainer.data.encoding import Encoder, Example
from mede2.trainer.data.records import BadRow, Record, read_records
from mede2.trainer.data.remarks import Remark, Traits, compare, traits
from mede2.trainer.stopping import watcher
from mede2.trainer.world import World

LISTED = 20  # bad rows shown in an error


@dataclass(frozen=True)
class DataSet:
    """Encoded examples in the order of the files.

    Attributes:
        files: the jsonl files.
        examples: the usable rows.
        fingerprint: sha256 over the examples' digests: tokens, masks, image bytes.
        bad_rows: rows that were skipped, {"source", "problem"}.
        remarks: on rows that are used as they are.
    """

    files: tuple[str, ...]
    examples: list[Example]
    fingerprint: str
    bad_rows: list[dict[str, str]]
    remarks: list[Remark]

    @property
    def has_images(self) -> bool:
        return any(example.images for example in self.examples)

    def __str__(self) -> str:
        lengths = sorted(len(sequence) for example in self.examples for sequence in example.sequences)
        images = sum(len(example.images) for example in self.examples)
        return (
            f"{len(self.examples)} rows from {', '.join(self.files)}: {images} images, "
            f"{sum(lengths)} tokens, median sequence {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        )


@dataclass(frozen=True)
class Checked:
    """A row that was checked: its record, the example it gives and what it is compared by, or why there is none."""

    record: Record | None = None
    example: Example | None = None
    traits: Traits | None = None
    problem: BadRow | None = None


def check_rows(
    files: tuple[str, ...], stage: int, encode: Callable[[Record], Example], part: int = 0, parts: int = 1
) -> Iterator[tuple[int, Checked]]:
    """Check every `parts`-th row from `part` on, with its number.

    Args:
        files: jsonl files.
        stage: what their rows are.
        encode: an `Encoder`, or what else makes an example of a record or raises a BadRow.
        part, parts: which rows.
    """
    for number, record in enumerate(read_records(files, stage)):
        if number % parts == part:
            try:
                if isinstance(record, BadRow):
                    raise record
                example = encode(record)
                yield number, Checked(record, example, traits(record, example.image_hashes))
            except BadRow as problem:
                yield number, Checked(problem=problem)


def load_dataset(files: tuple[str, ...], stage: int, encoder: Encoder, on_bad_row: str, world: World) -> DataSet:
    """Read, check and encode; each rank encodes every `world.size`-th row, and all get all.

    Args:
        files: jsonl files.
        stage: what their rows are.
        encoder: of the model.
        on_bad_row: "stop" raises if any row is unusable, "skip" leaves such rows out and lists them in `bad_rows`.
        world: the ranks.

    Raises:
        ValueError: the list of unusable rows with file, line and reason, or no usable row at all.
        StopRequested: on every rank.
    """
    share: list[tuple[int, Example | dict[str, str], Traits | None]] = []
    for number, row in check_rows(files, stage, encoder, world.rank, world.size):
        if watcher.asked:
            break
        problem = row.problem and {"source": row.problem.source, "problem": row.problem.problem}
        share.append((number, row.example or problem, row.traits))
    world.stop_if_asked(f"while the rows of {', '.join(files)} were checked")
    rows = sorted((row for part in world.gather(share) for row in part), key=lambda row: row[0])
    examples = [row for _, row, _ in rows if isinstance(row, Example)]
    bad_rows = [row for _, row, _ in rows if isinstance(row, dict)]
    if bad_rows and (on_bad_row == "stop" or not examples):
        listed = "\n".join(f"  {bad['source']}: {bad['problem']}" for bad in bad_rows[:LISTED])
        more = f"\n  ... and {len(bad_rows) - LISTED} more" if len(bad_rows) > LISTED else ""
        raise ValueError(
            f"{len(bad_rows)} of {len(rows)} rows cannot be used "
            f"(--set on_bad_row=skip leaves them out):\n{listed}{more}"
        )
    if not examples:
        raise ValueError(f"no rows in {', '.join(files)}")
    digest = hashlib.sha256("".join(example.digest for example in examples).encode()).hexdigest()
    return DataSet(tuple(files), examples, digest, bad_rows, compare(known for *_, known in rows if known))


def write_bad_rows(dataset: DataSet, output: Path) -> Path:
    """List the skipped rows in `output`/bad_rows.jsonl."""
    path = output / "bad_rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset.bad_rows), encoding="utf-8")
    return path
