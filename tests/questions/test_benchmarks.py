"""The registry of benchmarks, the command line's NAME=PATH, the list, and the prompt."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mede2.trainer.answering.answers import match_option
from mede2.trainer.evaluation.answered import GROUPS
from mede2.trainer.evaluation.list_benchmarks import command
from mede2.trainer.questions.benchmarks import BENCHMARKS, parse_benchmark, read_benchmark
from mede2.trainer.questions.prompts import CHOOSE, CHOOSE_LETTER, CHOOSE_TEXT, OPEN, ask_for, pose

WANTED = {
    "medqa", "medbullets", "medxpertqa-text", "medxpertqa-mm", "pubmedqa", "mmmu", "mmmu-pro", "mmmu-pro-4",
    "mmmu-pro-vision", "vqa-rad", "slake", "slake-zh", "path-vqa", "pmc-vqa", "cases",
}  # fmt: skip


def test_every_benchmark_is_there_and_described():
    assert set(BENCHMARKS) == WANTED
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert all((benchmark.title, benchmark.download, benchmark.path, benchmark.licence))
        assert set(benchmark.groups) <= set(GROUPS)


def test_an_unknown_name_is_told_with_those_that_there_are(tmp_path):
    for call in (lambda: read_benchmark("medqqa", tmp_path, tmp_path), lambda: parse_benchmark("medqqa=x.jsonl")):
        with pytest.raises(ValueError, match=r"medqqa: no such benchmark; there are medqa, medbullets, .*, cases"):
            call()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("medqa=US/test.jsonl", ("medqa", "medqa", Path("US/test.jsonl"))),
        ("slake=a=b", ("slake", "slake", Path("a=b"))),
        ("cases=held/out.v2.jsonl", ("out.v2", "cases", Path("held/out.v2.jsonl"))),
        ("cases=cases.jsonl", ("cases", "cases", Path("cases.jsonl"))),
    ],
)
def test_name_and_path_on_the_command_line(text, parsed):
    assert parse_benchmark(text) == parsed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("medqa", "NAME=PATH, such as medqa=test.jsonl"),
        ("=x", "NAME=PATH"),
        ("medqa=", "NAME=PATH"),
        ("cases=medqa.jsonl", "medqa is a benchmark's name; rename the file, or say medqa=medqa.jsonl"),
    ],
)
def test_what_is_no_name_and_path(text, told):
    with pytest.raises(ValueError, match=told) as error:
        parse_benchmark(text)
    assert str(error.value).startswith(f"--benchmark {text}: ")


def test_without_a_listener_what_was_read_is_said_on_stderr(tmp_path, write_rows, capsys):
    path = write_rows(tmp_path / "own.jsonl", [{"question": "Which?", "answer": "this"}])
    read_benchmark("cases", path, tmp_path)
    assert capsys.readouterr() == ("", f"cases: 1 questions from {path}\n")


def test_the_list_is_readable_at_100_columns_and_says_what_to_say():
    done = CliRunner().invoke(command)
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 100
    words = " ".join(done.output.split())
    for benchmark in BENCHMARKS.values():
        for text in (benchmark.title, benchmark.download, benchmark.path):
            assert text in words
        assert f"say --benchmark {benchmark.name}=" in words


def test_the_list_for_programs():
    done = CliRunner().invoke(command, ["--json"])
    rows = json.loads(done.output)
    assert [row["name"] for row in rows] == list(BENCHMARKS)
    assert rows[0] == {
        "name": "medqa", "title": BENCHMARKS["medqa"].title, "download": BENCHMARKS["medqa"].download,
        "path": BENCHMARKS["medqa"].path, "licence": "MIT", "groups": ["task"], "say": "--benchmark medqa=PATH",
    }  # fmt: skip
    assert rows[-1]["say"] == "--benchmark cases=FILE.jsonl"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), OPEN),
        (("x", "y"), CHOOSE),
        (("b", "C", "none"), CHOOSE_TEXT),
        (("Vitamin C", "E"), CHOOSE),
        (("<image 1>", "<image 2>"), CHOOSE_LETTER),
    ],
)
def test_what_is_asked_for(options, line):
    assert ask_for(options) == line


def test_a_text_that_is_anothers_letter_is_asked_for_and_read_as_text(tmp_path, write_rows):
    row = {"question": "Which artery?", "options": ["B", "A", "None"], "answer": "B", "answer_text": "A"}
    (case,) = read_benchmark("cases", write_rows(tmp_path / "own.jsonl", [row]), tmp_path)
    assert case.prompt[0]["content"][0]["text"].endswith("\n\n" + CHOOSE_TEXT)
    assert match_option("A", case.options) == case.options.index(case.answer) == 1


def test_the_prompt_in_its_order():
    messages, shown = pose(CHOOSE, " Which? ", ("x", "y"), "Read this.", images=["one", "two"])
    text = "Read this.\n\nWhich?\n\nA. x\nB. y\n\nAnswer with one of the options."
    image = {"type": "image"}
    assert messages == [{"role": "user", "content": [image, image, {"type": "text", "text": text}]}]
    assert shown == ["one", "two"]


def test_a_mark_that_is_no_image_of_the_question_stays_text():
    messages, shown = pose(OPEN, "<image 1>, not <image 12>", marked={"<image 1>": "one"})
    text = ", not <image 12>\n\nAnswer briefly."
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": text}]
    assert shown == ["one"]
