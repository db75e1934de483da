"""Questions of one's own, as cases and as question rows; real ones where a folder is named."""

import os
from pathlib import Path

import pytest

DATA = "MEDE2_DATA"  # names a folder of question files to try as well
ROW = {"question": "What is it?", "options": {"A": "A cyst", "B": "A vein"}, "answer": "B"}
CHOOSE = "\n\nAnswer with one of the options."


def test_both_forms_in_one_file(tmp_path, write_rows, read, layout, picture):
    (tmp_path / "a.png").write_bytes(picture(1))
    case = {
        "id": "own",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
        "images": ["a.png"],
        "answer": "x",
        "options": ["x", "y"],
        "meta": {"license": "CC0", "specialty": "skin"},
    }
    full = ROW | {
        "id": "full",
        "context": [{"label": "AGE", "text": "9"}, {"label": "SEX", "text": "f"}],
        "images": ["a.png", "a.png"],
        "answer_text": "A vein",
        "explanation": "Blue.",
        "facts": ["It is blue."],
        "source": "our clinic",
        "year": "2020",
        "meta": {"license": "CC BY 4.0", "modality": "photograph", "boxes": [[1, 2]]},
    }
    plain = {"question": "How many?", "answer": "3", "context": "Two, and one.", "options": None, "explanation": None}
    path = write_rows(tmp_path / "held_out.jsonl", [case, full, plain])
    cases, said = read("cases", path)
    assert list(cases) == ["own", "full", "3"]
    assert layout(cases["own"]) == [None, "Which?"]
    assert cases["own"].meta == {"license": "CC0", "specialty": "skin"}
    assert layout(cases["full"]) == [None, None, "AGE: 9\nSEX: f\n\nWhat is it?\n\nA. A cyst\nB. A vein" + CHOOSE]
    assert cases["full"].images == (tmp_path / "a.png",) * 2
    assert (cases["full"].options, cases["full"].answer) == (("A cyst", "A vein"), "A vein")
    assert cases["full"].explanation == "Blue."
    assert cases["full"].meta == {
        "source": "our clinic", "year": "2020", "facts": ["It is blue."], "license": "CC BY 4.0",
        "modality": "photograph", "boxes": [[1, 2]],
    }  # fmt: skip
    assert layout(cases["3"]) == ["Two, and one.\n\nHow many?\n\nAnswer briefly."]
    assert (cases["3"].options, cases["3"].answer, cases["3"].explanation) == ((), "3", None)
    assert cases["3"].meta == {}
    assert said == [f"cases: 3 questions from {path}"]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"answer": "A cyst"}, "A cyst"),
        ({"answer": "A cyst", "answer_text": "A cyst"}, "A cyst"),
        ({"options": ["A cyst", "A vein"], "answer": "A"}, "A cyst"),
        ({"options": ["B", "A"], "answer": "A", "answer_text": "B"}, "B"),
        ({"options": ["A", "B"], "answer": "B"}, "B"),
        ({"options": [], "answer": "B", "answer_text": "A bone"}, "A bone"),
    ],
)
def test_the_answer_is_the_right_options_letter_or_text(tmp_path, write_rows, read, change, answer):
    path = write_rows(tmp_path / "rows.jsonl", [ROW | change])
    assert read("cases", path)[0]["1"].answer == answer


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "C"}, "answer: 'C' is none of the options ['A cyst', 'A vein']"),
        ({"answer": "B", "answer_text": "A cyst"}, "answer: 'A cyst' is not option B, which is 'A vein'"),
        (
            {"answer": "A cyst", "answer_text": "A vein"},
            "answer: 'A cyst' is not `answer_text`, 'A vein', nor a letter",
        ),
        ({"options": ["B", "A"], "answer": "A"}, "is one option's letter and another's text; add `answer_text`"),
        ({"options": ["A cyst", "A vein", "A cyst"]}, "options: different texts"),
        ({"options": "A cyst"}, "options: a list of texts or {letter: text}"),
        ({"options": {"1": "A cyst", "2": "A vein"}}, "options: letters from A on, not 1, 2"),
        ({"context": [{"text": "x"}]}, 'context: text, or a list of {"label": ..., "text": ...}'),
        ({"images": "a.png"}, "images: a list of paths, not 'a.png'"),
        ({"images": ["none.png"]}, "none.png: no such file"),
        ({"meta": []}, "meta: a JSON object"),
        ({"explanation": 1}, "explanation: text, not 1"),
        ({"label": "B"}, "label: unknown"),
        ({"answer": ...}, "answer: missing"),
        ({"prompt": []}, "id: missing"),
    ],
)
def test_a_bad_row_is_told_by_line_and_field(tmp_path, write_rows, refused, change, told):
    row = {name: value for name, value in (ROW | change).items() if value is not ...}
    path = write_rows(tmp_path / "rows.jsonl", [ROW, row])
    message = refused("cases", path)
    assert f"{path}: 1 of 2 questions cannot be used:\n  {path}:2: " in message
    assert told in message


def test_lines_that_are_no_rows(tmp_path, write_rows, refused):
    path = write_rows(tmp_path / "rows.jsonl", [ROW | {"id": "1"}, ROW | {"id": "1"}, "[", '{"question": NaN}'])
    message = refused("cases", path)
    assert message.startswith(f"{path}: 3 of 4 questions cannot be used")
    for told in (":2: id: '1' again, after", ":3: not JSON", ":4: not JSON: NaN"):
        assert told in message
    assert refused("cases", write_rows(path, [])) == f"{path}: no question of cases in it"
    assert "are a .jsonl file" in refused("cases", tmp_path / "rows.csv")
    assert "No such file or directory" in refused("cases", tmp_path / "none.jsonl")


@pytest.mark.skipif(not os.environ.get(DATA), reason=f"{DATA} names no folder of question files")
def test_real_question_files(read):
    files = sorted(Path(os.environ[DATA]).glob("*.jsonl"))
    assert files
    for file in files:
        with file.open(encoding="utf-8") as lines:
            number = sum(1 for line in lines if line.strip())
        cases, _ = read("cases", file)
        assert len(cases) == number
        assert all(case.answer in case.options for case in cases.values() if case.options)
