"""The journal: what it has taken in is there after any end; what was torn is not."""

import json
import os
import sys
from pathlib import Path

import pytest

from mede2.trainer.answering.journal import Journal
from mede2.trainer.preference import judge
from mede2.trainer.questions.cases import read_cases


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def journal_of(output: Path, rank: int = 0) -> Path:
    return output.parent / f".{output.name}.journal" / f"{rank}.jsonl"


def test_a_torn_last_line_is_dropped_and_all_before_it_kept(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output) as journal:
        journal.append({"key": "a", "text": "é"}, {"key": "b", "text": "\n"})
    whole = journal_of(output).read_bytes()
    for torn in (b'{"key": "c", "te', b'{"key": "c"}', b"\0\0\0", "é".encode()[:1]):
        journal_of(output).write_bytes(whole + torn)
        with Journal(output) as journal:
            assert len(journal) == 2
            assert journal["b"]["text"] == "\n"
            journal.append({"key": "d"})
        assert journal_of(output).read_bytes() == whole + b'{"key": "d"}\n'


def test_damage_elsewhere_is_told(tmp_path):
    output = tmp_path / "out.jsonl"
    for line, told in [(b'{"key": "a', "not JSON"), (b'{"text": "a"}', "no `key`"), (b"\xff", "not UTF-8")]:
        journal_of(output).parent.mkdir(exist_ok=True)
        journal_of(output).write_bytes(b'{"key": "a"}\n' + line + b"\n" + b'{"key": "b"}\n')
        with pytest.raises(ValueError, match=rf"0.jsonl:2: .*{told}"):
            Journal(output)


def test_two_processes_do_not_write_one_journal(tmp_path):
    with Journal(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="another process is writing it"):
        Journal(tmp_path / "out.jsonl")
    with Journal(tmp_path / "out.jsonl"):
        """Closed, it is free again."""


def test_the_output_is_written_while_the_journal_keeps_others_out(demo_cases, tmp_path, write_rows, monkeypatch):
    """Or one that was halted before its last line would write beside the one that came after it."""
    rows = [
        {"case": case.id, "sample": 0, "text": "", "key": case.id, "finish": "stop", "num_tokens": 0, "model": "m"}
        for case in read_cases(demo_cases)
    ]
    samples, output = write_rows(tmp_path / "samples.jsonl", rows), tmp_path / "judgements.jsonl"

    def write_alone(path: Path, rows) -> None:
        with pytest.raises(ValueError, match="another process is writing it"):
            Journal(path)
        write(path, rows)

    write = judge.write_rows
    monkeypatch.setattr(judge, "write_rows", write_alone)
    judge.command(
        ["--cases", str(demo_cases), "--samples", str(samples), "--output", str(output)], standalone_mode=False
    )  # fmt: skip
    assert len(rows_of(output)) == len(rows)


def test_what_the_disk_refuses_leaves_no_torn_line(tmp_path):
    """A real limit on the size of files stands for a full disk."""
    output = tmp_path / "out.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "from mede2.trainer.answering.journal import Journal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        "journal = Journal(Path(sys.argv[1])); journal.append({'key': 'a', 'text': 'x' * 30});\n"
        "try: journal.append({'key': 'b', 'text': 'x' * 90})\n"
        "except OSError: journal.append({'key': 'c'})\n"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(output)]) == 0
    assert [row["key"] for row in rows_of(journal_of(output))] == ["a", "c"]
