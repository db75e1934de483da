"""Rows that are good: the forms a record may take, and where its pieces end up. (Bad ones: test_bad_inputs.py)"""

import gzip
import json
from pathlib import Path

import pytest

from mede2.trainer.data.records import BadRow, Record, parse_record, read_records
from mede2.trainer.settings import ELICIT, ENHANCE

TEXT = [{"type": "text", "text": "mass"}]


def parse(row, stage=ELICIT) -> Record:
    return parse_record(json.dumps(row), "rows.jsonl:3", Path("/data"), stage)


def test_demonstration():
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": TEXT}]
    record = parse({"messages": turns, "meta": {"id": 5}, "id": 7})
    ((question, answer),) = record.conversations
    assert question == {"role": "user", "content": [{"type": "text", "text": "Which?"}]}, "text becomes a list of parts"
    assert answer == {"role": "assistant", "content": TEXT}
    assert (record.source, record.num_prompt_messages, record.images, record.meta) == ("rows.jsonl:3", 0, (), {"id": 5})
    assert record.id == 7


def test_pair_shares_its_prompt():
    prompt = [
        {"role": "system", "content": "You read films."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    ]
    row = {
        "prompt": prompt, "images": ["a.png", "/data/films/b.png"],
        "chosen": [{"role": "assistant", "content": "mass"}], "rejected": [{"role": "assistant", "content": "clear"}],
        "id": "case-7",
    }  # fmt: skip
    record = parse(row, ENHANCE)
    assert record.id == "case-7"
    chosen, rejected = record.conversations
    assert chosen[:2] == rejected[:2]
    assert (chosen[2]["content"][0]["text"], rejected[2]["content"][0]["text"]) == ("mass", "clear")
    assert record.num_prompt_messages == 2
    assert record.images == (Path("/data/a.png"), Path("/data/films/b.png")), "relative ones start at its folder"


@pytest.mark.parametrize("extra", [{"meta": None}, {"images": []}, {"images": None}, {"id": None}])
def test_optional_keys(extra):
    row = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "mass"}]}
    assert parse(row | extra).conversations == parse(row).conversations


def test_files_are_read_in_order_with_blank_lines_and_odd_breaks_inside_texts(tmp_path, write_rows):
    """Line numbers are those of an editor; U+2028 and U+0085 are text in JSON, not ends of lines."""

    def row(text):
        return {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]}

    first = write_rows(tmp_path / "first.jsonl", [row("one"), "", row("two\u2028lines\u0085here"), "   ", "nonsense"])
    second = write_rows(tmp_path / "second.jsonl", [row("three\r\nlines")])
    records = list(read_records((str(first), str(second)), ELICIT))
    assert [record.source.rpartition("/")[2] for record in records] == [
        "first.jsonl:1", "first.jsonl:3", "first.jsonl:5", "second.jsonl:1",
    ]  # fmt: skip
    good = [record for record in records if not isinstance(record, BadRow)]
    answers = [record.conversations[0][1]["content"][0]["text"] for record in good]
    assert answers == ["one", "two\u2028lines\u0085here", "three\r\nlines"]


def test_files_that_windows_wrote(tmp_path):
    """A mark of UTF-8 at the start, line ends of two characters."""
    row = json.dumps({"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "mass"}]})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n{row}\r\n".encode())
    assert [record.source for record in read_records((str(path),), ELICIT)] == [f"{path}:1", f"{path}:2"]


def test_compressed_files_and_a_last_line_without_a_break(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "mass"}]})
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(f"{row}\n{row}".encode()))
    assert [type(record) for record in read_records((str(path),), ELICIT)] == [Record, Record]
