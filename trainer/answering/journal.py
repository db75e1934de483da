"""The journal of a step: an append-only jsonl file of finished pieces of work, on disk before anything relies on them.

The file lies beside the step's output and outlives it: a row is found again by its key, the hash of all that the work
depends on, so that the same work is never done twice, whatever was killed, and work under other settings is never
mistaken for it. With several ranks each appends to a file of its own and all are read.
"""

import fcntl
import json
import os
from pathlib import Path

from mede2.trainer.data.records import BadRow, parse_row
from mede2.trainer.questions.rows import Row


class Journal:
    """Rows under their keys, read once when it is opened; rows that other ranks append later are not seen.

    Args:
        output: the file that the step will write; the journal lies in `.NAME.journal/` beside it.
        rank: the rank that appends. Ranks open a journal before any of them appends.

    Raises:
        ValueError: another process has it open, or a line that is damaged and not the last of its file.
    """

    def __init__(self, output: Path, rank: int = 0):
        folder = output.with_name(f".{output.name}.journal")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{rank}.jsonl"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._rows: dict[str, Row] = {}
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in sorted(folder.glob("*.jsonl")):
                whole = self._read(path)
                if path == self.path:
                    os.truncate(self._file, whole)
            _sync_folder(folder)
        except BlockingIOError as error:
            self.close()
            raise ValueError(f"{output}: another process is writing it (its journal {self.path} is locked)") from error
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, *rows: Row) -> None:
        """Add finished rows, each with its `key`; they are on disk when this returns.

        Raises:
            OSError: the disk refused; then none of them is in the journal.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        end = os.fstat(self._file).st_size
        try:
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        except OSError:
            os.truncate(self._file, end)
            raise
        self._rows |= {row["key"]: row for row in rows}

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, path: Path) -> int:
        """Read the rows of one file; returns how many of its bytes are whole lines. A last line without its line break
        was being written when its process was killed: it was never relied on."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            source = f"{path}:{number}"
            try:
                row = parse_row(source, line.decode())
            except UnicodeDecodeError as error:
                raise BadRow(source, f"not UTF-8 text ({error})") from error
            if not isinstance(row.get("key"), str):
                raise BadRow(source, "no row of a journal: it has no `key`")
            self._rows[row["key"]] = row
        return whole


def _sync_folder(folder: Path) -> None:
    """Make a new file's name last, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
