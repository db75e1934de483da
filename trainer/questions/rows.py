"""The jsonl files between the steps: rows in, rows out, each row with its file and line for messages."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mede2.trainer.data.records import BadRow, parse_row
from mede2.trainer.files import write_text

Row = dict[str, Any]
MOST_TOLD = 20  # problems named in one message


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line that is not blank.

    Raises:
        ValueError: a file that cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_rows(path: Path, wanted: Iterable[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yield ("file:line", object) for every line; the first that lacks one of the `wanted` keys is a BadRow."""
    for source, line in read_lines(path):
        row = parse_row(source, line)
        if missing := sorted(set(wanted) - row.keys()):
            raise BadRow(source, f"{', '.join(missing)}: missing")
        yield source, row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all of a file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tell(heading: str, problems: Sequence[object]) -> ValueError:
    """One error for many problems."""
    more = [f"... and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
    return ValueError("\n  ".join([heading, *map(str, problems[:MOST_TOLD]), *more]))
