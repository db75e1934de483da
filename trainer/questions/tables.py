"""The files that benchmarks are published in, row by row: jsonl, json, csv, tsv and parquet."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mede2.trainer.data.records import BadRow, parse_row
from mede2.trainer.questions.rows import Row, read_lines

SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<total>\d{5})\.parquet")
LFS_POINTER = b"version https://git-lfs"
MOST_NAMED = 8  # files of a folder named in one message


def find_files(path: Path, *patterns: str) -> list[Path]:
    """The files that a path names: the file itself, or in a folder all files of the first pattern that any match.

    Raises:
        ValueError: there is no such file or folder, no file in the folder matches, or parts of a split are missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    found = next((files for pattern in patterns if (files := sorted(path.glob(pattern)))), None)
    if found is None:
        names = sorted(entry.name for entry in path.iterdir())
        inside = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
        raise ValueError(f"{path}: no {' and no '.join(patterns)} in this folder, which holds {inside or 'nothing'}")
    parts: dict[tuple[Path, str, str], set[str]] = {}
    for file in found:
        if shard := SHARD.fullmatch(file.name):
            parts.setdefault((file.parent, shard["stem"], shard["total"]), set()).add(shard["index"])
    for (folder, stem, total), indices in parts.items():
        if len(indices) != int(total):
            raise ValueError(f"{folder}: {len(indices)} of the {total} parts {stem}-*-of-{total}.parquet; download all")
    return found


def find_folder(folders: list[Path]) -> Path:
    """The first of the folders that is there.

    Raises:
        ValueError: none is; the archive of the images is still to be unpacked.
    """
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(f"no folder of images: none of {', '.join(map(str, folders))}; unpack the archive there")


def read_table(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Yield ("file and place", row) for every row of a file; a row that is none comes as the BadRow that says why.

    Raises:
        ValueError: a file that cannot be read, or is in another format than its name says.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        pickle = "; pickle is not read, for loading it can run anything" if path.suffix in (".pkl", ".pickle") else ""
        raise ValueError(f"{path}: in none of the formats {', '.join(READERS)}{pickle}")
    yield from reader(path)


def read_tables(paths: Iterable[Path]) -> Iterator[tuple[str, Row | BadRow]]:
    """The rows of several files, one after the other."""
    return chain.from_iterable(map(read_table, paths))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    for source, line in read_lines(path):
        try:
            yield source, parse_row(source, line)
        except BadRow as problem:
            yield source, problem


def read_json(path: Path) -> Any:
    """The value of a whole json file, of which nothing is lost.

    Raises:
        ValueError: not JSON in UTF-8, or a key that stands twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise BadRow(str(path), f"{max(names, key=names.count)}: stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _read_json_rows(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a list of objects, not {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        source = f"{path} row {number}"
        yield source, row if isinstance(row, dict) else BadRow(source, f"a row is an object, not {row!r:.60}")


def _read_csv(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Rows by the names of the first line. A column without a name is the row index that pandas writes, and no field;
    surplus cells at a row's end are let pass where they are empty, as spreadsheets leave them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restkey="surplus cells", strict=True, delimiter=DELIMITERS[path.suffix.lower()])
            for number, row in enumerate(rows, start=1):
                source = f"{path} row {number}"
                surplus = [cell for cell in row.pop("surplus cells", []) if cell.strip()]
                row.pop("", None)
                if surplus:
                    yield source, BadRow(source, f"more cells than the first line has names: {surplus[0]!r:.60}")
                else:
                    yield source, {name: cell for name, cell in row.items() if cell is not None}
    except csv.Error as error:
        raise ValueError(f"{path}: after line {rows.line_num} not a table ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Row | BadRow]]:
    """Rows with embedded images as they lie there: {"bytes": ..., "path": ...}."""
    import pyarrow
    from pyarrow import parquet  # comes with `datasets`

    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path}: a pointer of Git LFS, not the file itself; `git lfs pull` fetches it")
        file.seek(0)
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not parquet ({error})") from error


DELIMITERS = {".csv": ",", ".tsv": "\t"}
READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json_rows,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
