"""`pairs.py demonstrations`: what is left out and why, how specialties are balanced; Stage I takes the rest."""

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.demo.records import write_stage1
from mede2.trainer.preference.check import check
from mede2.trainer.preference.demonstrations import (
    NO_SPECIALTY,
    Demonstration,
    balance,
    command,
    shares,
    without_alike,
)
from mede2.trainer.settings import ELICIT

OPTIONS = ["mass", "cyst", "clear"]


def demonstration(question: str = "Which?", think: str = "A round shadow.", answer: str = "mass", **meta) -> dict:
    text = f"<think>{think}</think> <answer>{answer}</answer>"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return {"messages": turns, "meta": {"answer": "mass", "options": OPTIONS} | meta}


def case(**changes) -> dict:
    prompt = [{"role": "user", "content": "Which finding?"}]
    row = {"id": "c1", "prompt": prompt, "answer": "mass", "options": OPTIONS, "explanation": "A round shadow."}
    return row | {"meta": {"specialty": "pulmonology"}} | changes


def said(text: str) -> dict:
    return {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]}


KEY = {"meta": {"answer": "mass"}}
IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which finding?"}]}]
ANSWER = said("<think>a</think> <answer>mass</answer>")["messages"][1:]
LEFT_OUT = {
    "no JSON": ("nonsense", "unusable", "not JSON"),
    "no row of either form": ({"question": "Which?"}, "unusable", "messages: missing"),
    "roles": ({"messages": [{"role": "assistant", "content": "mass"}]} | KEY, "unusable", "role 'assistant' where"),
    "a case whose key is no option": (case(answer="nodule"), "unusable", "'nodule' is none of the options"),
    "options by number": (demonstration(options=3), "unusable", "meta.options: a list of texts, not 3"),
    "no meta": (said("<think>a</think> <answer>mass</answer>"), "no key", "meta.answer is None"),
    "an empty key": (demonstration(answer="mass") | {"meta": {"answer": " "}}, "no key", "meta.answer is ' '"),
    "a case without explanation": (case(explanation=None), "no reasoning", "no explanation"),
    "a case with an empty explanation": (case(explanation=" "), "no reasoning", "no explanation"),
    "an image": ({"messages": IMAGE + ANSWER, "images": ["a.png"]} | KEY, "images", "1 images"),
    "no tags": (said("It is a mass.") | KEY, "format", "It is a mass."),
    "a text behind the answer": (said("<think>a</think> <answer>mass</answer> Really.") | KEY, "format", "<think>a"),
    "no thoughts": (demonstration(think=" "), "format", "<think> </think>"),
    "no answer": (demonstration(answer=""), "format", "<answer></answer>"),
    "tags in the explanation": (case(explanation="a</think>b"), "format", "<think>a</think>b"),
    "a wrong option": (demonstration(answer="cyst"), "wrong", "'cyst', where the key is 'mass'"),
    "the wrong letter": (demonstration(answer="B"), "wrong", "'B', where the key is 'mass'"),
    "letter and text of two options": (demonstration(answer="A. cyst"), "wrong", "'A. cyst'"),
    "no option": (demonstration(answer="nodule"), "wrong", "'nodule'"),
    "a wrong number": (demonstration(answer="4") | {"meta": {"answer": "3"}}, "wrong", "'4', where the key is '3'"),
    "an open answer in other words": (demonstration(answer="tumour") | KEY, "unclear", "'tumour'"),
    "too short": (demonstration(think="Ah."), "length", "40 characters"),
    "too long": (demonstration(think="a" * 400), "length", "437 characters"),
}  # fmt: skip
GOOD = {
    "the option's text": demonstration(),
    "the option's letter": demonstration(answer="A"),
    "letter and text": demonstration(answer="a. Mass."),
    "the key is a letter": demonstration() | {"meta": {"answer": "A", "options": OPTIONS}},
    "options by letter": demonstration(options=dict(zip("ABC", OPTIONS, strict=True))),
    "an open question": demonstration(answer="Mass.") | KEY,
    "a case": case(),
    "two turns": {
        "messages": [*said("<think>a</think>no tags")["messages"], *demonstration()["messages"]],
        "meta": {"answer": "mass"},
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path, write_rows):
    """`run(rows, *arguments)`: (result, rows taken, rows left out), from in/rows.jsonl to out/taken.jsonl."""

    def invoke(rows: list, *arguments: str):
        (tmp_path / "in").mkdir(exist_ok=True)
        file, output = write_rows(tmp_path / "in" / "rows.jsonl", rows), tmp_path / "out" / "taken.jsonl"
        result = CliRunner().invoke(command, [str(file), "--output", str(output), *arguments])
        files = (output, output.with_name("taken.jsonl.left_out.jsonl"))
        read = [[json.loads(line) for line in path.read_text().splitlines()] for path in files if path.exists()]
        return result, *(read or ([], []))

    return invoke


@pytest.mark.parametrize("name", LEFT_OUT, ids=lambda name: name.replace(" ", "_"))
def test_left_out(run, tmp_path, name):
    row, reason, detail = LEFT_OUT[name]
    other = demonstration("What else is there to be seen?")
    _, taken, left_out = run([other, row], "--min-answer", "46", "--max-answer", "400")
    assert taken == [other]
    assert [(found["source"], found["reason"]) for found in left_out] == [(f"{tmp_path}/in/rows.jsonl:2", reason)]
    assert detail in left_out[0]["detail"]


@pytest.mark.parametrize("name", GOOD, ids=lambda name: name.replace(" ", "_"))
def test_taken(run, load, tmp_path, name):
    result, taken, left_out = run([GOOD[name]])
    assert result.exit_code == 0
    assert left_out == []
    if "messages" in GOOD[name]:
        assert taken == [GOOD[name]], "a row of Stage I stays as it is"
    assert len(load(tmp_path / "out" / "taken.jsonl", ELICIT).examples) == 1


def test_a_case_becomes_a_row_of_stage_1(run):
    _, (taken,), _ = run([case()])
    answer = "<think>A round shadow.</think> <answer>mass</answer>"
    assert taken == {
        "id": "c1",
        "messages": [{"role": "user", "content": "Which finding?"}, {"role": "assistant", "content": answer}],
        "meta": {"specialty": "pulmonology", "answer": "mass", "options": OPTIONS},
    }


def test_nothing_to_take_is_one_error_with_the_counts(run):
    result, *_ = run([case(explanation=None), case(explanation=None), demonstration(answer="cyst")])
    message = str(result.exception)
    assert "no row of " in message
    assert ": no reasoning 2 (a case without explanation), wrong 1 (its answer is not the key)" in message


def test_the_output_is_none_of_the_inputs(write_rows, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [demonstration()])
    result = CliRunner().invoke(command, [str(file), "--output", str(tmp_path / "." / "rows.jsonl")])
    assert "it is one of the files that are read" in str(result.exception)
    assert json.loads(file.read_text()) == demonstration()


LONG = " ".join(f"finding {number}" for number in range(40))


def test_questions_that_are_alike_are_taken_once(run):
    """The first of them, if it is taken itself."""
    rows = [
        demonstration(LONG, answer="cyst"), demonstration(LONG, think="First."), demonstration(f"{LONG} here"),
        demonstration(LONG.upper(), think="Another."), demonstration("Something else?"),
    ]  # fmt: skip
    _, taken, left_out = run(rows)
    assert taken == [rows[1], rows[4]]
    assert [(found["source"][-1], found["reason"], found["detail"][-1]) for found in left_out] == [
        ("1", "wrong", "'"), ("3", "alike", "2"), ("4", "alike", "2"),
    ]  # fmt: skip


def test_what_is_like_a_row_that_is_left_out_is_kept():
    """Of a row of ever other questions, each like the one before, every other is kept."""
    words = [f"w{number}" for number in range(120)]
    questions = [" ".join(words[5 * start : 5 * start + 60]) for start in range(5)]
    candidates = [Demonstration(f"f:{n}", {}, question, (), "") for n, question in enumerate(questions)]
    found = [earlier for _, earlier in without_alike(candidates, 0.7)]
    assert found == [None, "f:0", None, "f:2", None]


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(1, 50), min_size=1), st.integers(1, 200))
def test_shares_are_as_even_as_the_sizes_allow(sizes, number):
    taken = shares(sizes, number)
    assert sum(taken.values()) == min(number, sum(sizes.values()))
    assert all(taken[name] <= sizes[name] for name in sizes)
    most = max(taken.values())
    assert all(taken[name] == sizes[name] or taken[name] >= most - 1 for name in sizes)


def test_specialties_are_balanced(run):
    """Of 4, 20 and 30, and 6 without: 26 are 4, 6, 8 and 8."""
    sizes = {"dermatology": 4, "cardiology": 20, "neurology": 30, None: 6}
    rows = [
        demonstration(f"Question {number} of {specialty}, which?", specialty=specialty)
        for specialty, size in sizes.items()
        for number in range(size)
    ]
    result, taken, left_out = run(rows, "--number", "26", "--similarity", "1")
    counts = Counter(row["meta"]["specialty"] for row in taken)
    assert counts == {"dermatology": 4, None: 6, "cardiology": 8, "neurology": 8}
    assert Counter(row["detail"] for row in left_out) == {"cardiology": 12, "neurology": 22}
    assert [rows.index(row) for row in taken] == sorted(rows.index(row) for row in taken), "in the order of the file"
    assert NO_SPECIALTY in result.output
    assert "26 demonstrations from 60 rows" in result.output
    assert run(rows, "--number", "26", "--similarity", "1")[1] == taken, "the same again"
    assert run(rows, "--number", "26", "--similarity", "1", "--seed", "1")[1] != taken


def test_what_is_drawn_does_not_depend_on_the_order_or_on_other_specialties():
    candidates = [Demonstration(f"f:{n}", {"messages": [n]}, "", (), "ab"[n % 2]) for n in range(40)]

    def drawn(given, number):
        return {row.source for row, taken in zip(given, balance(given, number, seed=3), strict=True) if taken}

    assert drawn(candidates, 10) == drawn(candidates[::-1], 10)
    of_a = drawn(candidates[::2], 5)
    assert of_a == {source for source in drawn(candidates, 10) if int(source[2:]) % 2 == 0}
    assert of_a < drawn(candidates[::2], 6), "a larger number only adds"


def test_lengths_in_tokens_of_a_model(run):
    """And what the stage would refuse is left out."""
    thoughts = ("Look.", "Look: " * 30, "<|im_end|>")
    rows = [demonstration(f"Is case {number} clear?", think=think) for number, think in enumerate(thoughts)]
    _, taken, left_out = run(rows, "--model", str(BASE_MODEL), "--max-answer", "60", "--similarity", "1")
    assert taken == rows[:1]
    assert [found["reason"] for found in left_out] == ["length", "unusable"]
    assert left_out[0]["detail"].endswith(" tokens")
    assert "control token <|im_end|>" in left_out[1]["detail"]


def test_images_are_found_from_the_new_folder(run, write_image, load, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDE2_IMAGE_ROOT", str(tmp_path))
    (tmp_path / "in" / "images").mkdir(parents=True)
    write_image(tmp_path / "in" / "images" / "a.png")
    _, (taken,), left_out = run([case(prompt=IMAGE, images=["images/a.png"])], "--with-images")
    assert taken["images"] == ["../in/images/a.png"]
    assert left_out == []
    (example,) = load(tmp_path / "out" / "taken.jsonl", ELICIT).examples
    assert len(example.images) == 1
    absolute = str(tmp_path / "in" / "images" / "a.png")
    _, (taken,), _ = run([case(prompt=IMAGE, images=[absolute])], "--with-images")
    assert taken["images"] == [absolute]


def test_a_missing_image_leaves_the_row_out(run):
    _, _, left_out = run([demonstration(), case(prompt=IMAGE, images=["none.png"])], "--with-images")
    assert [(found["reason"], "no such file" in found["detail"]) for found in left_out] == [("unusable", True)]


def test_the_demo(demo_cases, tmp_path, monkeypatch):
    """Cases with pictures, and records of Stage I; what is written passes `check`."""
    monkeypatch.setenv("MEDE2_IMAGE_ROOT", str(demo_cases.parent))
    records = write_stage1(tmp_path / "records", 40, seed=3)
    output = tmp_path / "taken.jsonl"
    arguments = ("--output", str(output), "--number", "24", "--model", str(BASE_MODEL), "--with-images")
    done = CliRunner().invoke(command, [str(demo_cases), str(records), *arguments])
    assert "24 demonstrations from 52 rows" in done.output
    assert Counter(json.loads(line)["meta"].get("specialty") for line in output.read_text().splitlines()) == {
        "pulmonology": 12, None: 12,
    }  # fmt: skip
    report = check((str(output),), ELICIT)
    assert (report.usable, report.images, report.count("error")) == (24, 12, 0)
    assert {found.kind for found in report.problems} <= {"place"}
    assert Path(f"{output}.left_out.jsonl").exists()
