"""Leaks of benchmarks into training rows: which words and which images count, and how `pairs.py check` tells them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mede2.trainer.data.records import detect_stage, parse_record
from mede2.trainer.demo.cases import heldout_cases, render
from mede2.trainer.preference.check import command
from mede2.trainer.preference.leakage import Index, find_leaks, leaks_of_files, to_row
from mede2.trainer.questions.cases import Case, parse_case
from mede2.trainer.settings import ELICIT, ENHANCE

CLOSING = "Reason step by step about all that is told, and then answer with one of the options."
CHINESE = "\u80ba\u90e8\u6709\u6ca1\u6709\u5f02\u5e38"  # is there anything abnormal in the lungs
OPTIONS = ("Left lung", "Right lung", "Both lungs")


def told(first: int, last: int) -> str:
    """`w1 w2 ... w9`: words that stand nowhere else."""
    return " ".join(f"w{number}" for number in range(first, last + 1))


def question(text: str, options=OPTIONS) -> str:
    offered = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
    return f"{text}\n\n{offered}\n\n{CLOSING}"


def case(name: str, text: str, options=OPTIONS, images=(), folder: Path = Path()) -> Case:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    prompt = [{"role": "user", "content": content}]
    row = {"id": name, "prompt": prompt, "images": list(images), "answer": options[0] if options else "yes"}
    return parse_case("cases.jsonl:1", row | {"options": list(options)}, folder)


def demonstration(text: str, answer: str = "I do not know.") -> dict:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "meta": {"license": "CC0-1.0"}}


def pair(text: str, chosen: str = "Left.", rejected: str = "Right.", images=()) -> dict:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    answers = {"chosen": chosen, "rejected": rejected}
    sides = {name: [{"role": "assistant", "content": said}] for name, said in answers.items()}
    return {"prompt": [{"role": "user", "content": content}], "images": list(images)} | sides


def record(row: dict, folder: Path = Path()):
    return parse_record(json.dumps(row), "train.jsonl:7", folder, ELICIT if "messages" in row else ENHANCE)


OTHERS = [case(f"other {number}", question(told(100 * number, 100 * number + 30))) for number in range(1, 5)]
THIRTY = question(told(1, 30))  # 30 words of its own: 18 13-grams

TEXTS = {  # training row -> (13-grams found, of)
    "the question itself": (demonstration(THIRTY), 18),
    "in other lines": (demonstration(told(1, 9) + "\n\n" + told(10, 20) + "  \n" + told(21, 30)), 18),
    "other case and punctuation": (demonstration(f"({told(1, 30).upper().replace(' ', ', ')}?)"), 18),
    "full-width characters": (demonstration(told(1, 29) + " \uff57\uff13\uff10"), 18),
    "its options in another order": (demonstration(question(told(1, 30), OPTIONS[::-1])), 18),
    "in a first turn": (
        {"messages": [{"role": role, "content": text} for role, text in
                      (("user", THIRTY), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", "No."))]}, 18,
    ),
    "in a demonstrated answer": (demonstration("Ask!", f"<think>{told(1, 30)}</think> <answer>Yes</answer>"), 18),
    "in a prompt": (pair(THIRTY), 18),
    "in a chosen answer": (pair("Ask!", chosen=f"So {told(1, 30)}."), 18),
    "in a rejected answer": (pair("Ask!", rejected=f"So {told(1, 30)}."), 18),
    "a word changed in the middle": (demonstration(f"{told(1, 14)} changed {told(16, 30)}"), 2 + 3),
    "13 words of it": (demonstration(f"Of {told(5, 17)} little."), 1),
    "12 words of it": (demonstration(f"Of {told(5, 16)} little."), 0),
    "13 words over two messages": (demonstration(told(5, 10), told(11, 17)), 0),
    "a word too much among 13": (demonstration(f"{told(5, 10)} more {told(11, 17)}"), 0),
    "two parts of it, one in each answer": (pair("Ask!", told(1, 13), told(13, 25)), 2),
    "the same part in both answers": (pair("Ask!", f"Yes, {told(1, 13)}", f"No, {told(1, 13)}"), 1),
    "what every prompt of the benchmark has": (demonstration(question(told(901, 930))), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS, ids=lambda name: name.replace(" ", "_"))
def test_13_words_in_a_row(name):
    row, found = TEXTS[name]
    leaks = find_leaks([record(row)], {"medqa": [case("a", THIRTY), *OTHERS]})
    assert [(leak.benchmark, leak.case, leak.file, leak.line, leak.kind) for leak in leaks] == [
        ("medqa", "a", "train.jsonl", 7, "text")
    ] * bool(found)
    for leak in leaks:
        assert leak.share == found / 18
        assert f"{found} of 18 13-grams" in leak.detail
        assert leak.severity == ("error" if found / 18 >= 0.25 else "warning")


def test_the_first_words_found_are_told():
    (leak,) = find_leaks([record(demonstration(f"Of {told(5, 20)}."))], {"medqa": [case("a", THIRTY), *OTHERS]})
    assert leak.detail == f"4 of 18 13-grams of the question (22%), first {told(5, 17)!r}"


def test_words_that_many_questions_have_are_not_their_own():
    """Inside a line, too: with 22 questions what stands in 11 is common, what stands in 10 is not."""
    shared = told(1, 13)
    for number, found in ((10, 10), (11, 0)):
        with_it = [case(f"with {i}", question(f"{shared} {told(100 * i, 100 * i + 20)}")) for i in range(1, 23)]
        rest = [case(f"without {i}", question(told(100 * i, 100 * i + 20))) for i in range(31, 53)]
        cases = with_it[:number] + rest[: 22 - number]
        leaks = find_leaks([record(demonstration(shared))], {"medqa": cases})
        assert [leak.case for leak in leaks] == [f"with {i}" for i in range(1, found + 1)]


def test_cases_that_are_the_same_are_one_question():
    """As MMMU-Pro has each question with four options and with ten: it does not become common to all."""
    cases = [case("four", THIRTY), case("three", question(told(1, 30), OPTIONS[::-1]), OPTIONS[::-1])]
    leaks = find_leaks([record(demonstration(told(1, 30)))], {"mmmu": [*cases, *OTHERS]})
    assert [(leak.case, leak.share) for leak in leaks] == [("four", 1.0), ("three", 1.0)]


def test_several_benchmarks():
    benchmarks = {"a": [case("1", THIRTY), *OTHERS], "b": [case("1", question(told(1, 20))), *OTHERS], "c": OTHERS}
    leaks = find_leaks([record(demonstration(told(1, 30)))] * 2, benchmarks)
    assert [(leak.benchmark, leak.case, leak.share) for leak in leaks] == [("a", "1", 1.0), ("b", "1", 1.0)] * 2


@pytest.mark.parametrize(
    ("text", "row", "found"),
    [
        ("Which vitamin cures scurvy?", "He asked: which VITAMIN cures\nscurvy!", True),
        ("Which vitamin cures scurvy?", "Which vitamin cures the scurvy?", False),
        ("Which vitamin cures scurvy?", "Which vitamin cures", False),
        (told(1, 12), told(0, 13), True),
        (told(1, 12), told(1, 11), False),
        ("Is it benign?", "Is it benign?", False),  # three words stand in texts by chance
        (CHINESE + "\uff1f", "\u8bf7\u95ee" + CHINESE + "\u3002", True),
    ],
)  # fmt: skip
def test_a_question_of_fewer_words_must_be_there_whole(text, row, found):
    leaks = find_leaks([record(demonstration(row))], {"own": [case("a", question(text)), *OTHERS]})
    assert [(leak.case, leak.share) for leak in leaks] == [("a", 1.0)] * found
    assert all("the whole question, " in leak.detail for leak in leaks)


@pytest.fixture
def film(tmp_path):
    """`film(name, number, scale, **options)` saves the picture of a case."""

    def save(name: str, number: int = 0, scale: float = 1.0, mode: str = "L", **options) -> str:
        picture = render(heldout_cases(number + 1)[number]).convert(mode)
        picture.resize([round(scale * side) for side in picture.size]).save(tmp_path / name, **options)
        return name

    return save


def test_a_short_question_on_images_is_another_one_on_other_images(tmp_path, film):
    asked = "Is there a fracture to be seen?"
    (mine, other) = (
        case("mine", asked, (), [film("a.png", 0)], tmp_path),
        case("other", asked, (), [film("b.png", 1)], tmp_path),
    )
    film("c.png", 2)
    rows = [demonstration(asked), pair(asked, images=["c.png"]), pair(asked, images=["b.png"])]
    cases = [mine, other, *(case(f"{i}", told(100 * i, 100 * i + 5), ()) for i in range(1, 5))]
    leaks = find_leaks((record(row, tmp_path) for row in rows), {"own": cases})
    assert [(leak.case, leak.kind) for leak in leaks] == [("other", "text"), ("other", "image")]


IMAGES = {
    "the same file": ({"name": "a.png"}, "has the bytes of"),
    "a copy": ({"name": "copy.png"}, "has the bytes of"),
    "compressed otherwise": ({"name": "b.png", "compress_level": 0}, "has the pixels of"),
    "grey as colours": ({"name": "b.png", "mode": "RGB"}, "has the pixels of"),
    "as jpeg": ({"name": "b.jpg", "quality": 70}, "looks like ("),
    "half as large": ({"name": "b.png", "scale": 0.5}, "looks like ("),
    "another": ({"name": "b.png", "number": 1}, None),
}


@pytest.mark.parametrize("name", IMAGES, ids=lambda name: name.replace(" ", "_"))
def test_images(name, tmp_path, film):
    options, how = IMAGES[name]
    benchmark = {"rad": [case("a", "What is it?", (), [film("a.png")], tmp_path)]}
    row = pair("Which?", images=[film(**options)])
    leaks = find_leaks([record(row, tmp_path)], benchmark)
    assert [(leak.case, leak.kind, leak.severity) for leak in leaks] == [("a", "image", "error")] * bool(how)
    for leak in leaks:
        assert leak.detail.startswith(f"image {tmp_path / options['name']} {how}")
        assert leak.detail.endswith(" image 1 of the case")


def test_the_nearest_of_several_images_is_told_once(tmp_path, film):
    """Of a case with two images, in a row with two; and each case that shows an image is named."""
    first, second = film("a.png", 0), film("b.png", 1)
    cases = [case("both", "What?", (), [first, second], tmp_path), case("one", "Why?", (), [second], tmp_path)]
    row = pair("Which?", images=[film("a.jpg", 0, quality=70), film("copy.png", 1)])
    leaks = find_leaks([record(row, tmp_path)], {"rad": cases})
    assert sorted((leak.case, leak.detail) for leak in leaks) == [
        ("both", f"image {tmp_path}/copy.png has the bytes of image 2 of the case"),
        ("one", f"image {tmp_path}/copy.png has the bytes of image 1 of the case"),
    ]


def test_an_image_of_a_benchmark_that_does_not_decode_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"rad: case 'a': image .*a\.png: does not decode"):
        Index({"rad": [case("a", "What?", (), ["a.png"], tmp_path)]})


def test_what_cannot_be_looked_for_is_counted(tmp_path, film):
    """One and the same question on every film: the films alone tell."""
    asked = question("Does this film of a child's chest show pneumonia, or does it not show it at all?")
    cases = [case(f"{i}", asked, images=[film(f"{i}.png", i)], folder=tmp_path) for i in range(3)]
    index = Index({"films": cases, "texts": OTHERS})
    assert index.summary == {
        "films": {"cases": 3, "images": 3, "without_words": 3},
        "texts": {"cases": 4, "images": 0, "without_words": 0},
    }
    assert index.leaks(record(demonstration(asked))) == []


CHARACTERS = st.characters(categories=("Lu", "Ll", "Nd")).filter(lambda one: one.upper().casefold() == one.casefold())
LETTERS = st.text(CHARACTERS, min_size=1, max_size=5)  # without the dotless i, whose upper case is that of the other i
SEPARATORS = st.sampled_from([" ", "\n", ", ", " - ", "? ", "\u00a0", "\u3000", "\u2014", "\n\n", '" '])
CONTEXTS = st.text(max_size=30)


@settings(deadline=None)
@given(st.data())
def test_a_question_pasted_anywhere_is_found(data):
    """Whatever its words are, however they are parted and cased, and whatever stands around it."""
    texts = [data.draw(st.lists(LETTERS, min_size=4, max_size=30), label="words") for _ in range(3)]
    unique = [[f"q{number}x{place}{word}" for place, word in enumerate(text)] for number, text in enumerate(texts)]
    cases = [case(f"{number}", question(" ".join(text))) for number, text in enumerate(unique)]
    number = data.draw(st.integers(0, 2), label="question")
    pasted = "".join(word + data.draw(SEPARATORS) for word in unique[number])
    pasted = data.draw(st.sampled_from([str, str.upper, str.casefold]), label="case")(pasted)
    around = [data.draw(CONTEXTS).translate(dict.fromkeys((*range(32), 127), " ")) for _ in range(2)]
    text = f"{around[0]} . {pasted} . {around[1]}"
    place = data.draw(st.sampled_from(["question", "answer", "prompt", "chosen", "rejected"]), label="place")
    row = {
        "question": lambda: demonstration(text), "answer": lambda: demonstration("Ask!", text),
        "prompt": lambda: pair(text), "chosen": lambda: pair("Ask!", chosen=text),
        "rejected": lambda: pair("Ask!", rejected=text),
    }[place]()  # fmt: skip
    leaks = find_leaks([record(row)], {"own": cases})
    assert [(leak.case, leak.share) for leak in leaks] == [(f"{number}", 1.0)]


def test_files_of_both_stages(tmp_path, write_rows):
    first = write_rows(tmp_path / "demos.jsonl", [demonstration("Well?"), demonstration(THIRTY)])
    second = write_rows(tmp_path / "pairs.jsonl", ["nonsense", pair("Ask!"), pair(THIRTY)])
    assert (detect_stage(str(first)), detect_stage(str(second))) == (ELICIT, ENHANCE)
    benchmarks = {"medqa": [case("a", THIRTY), *OTHERS]}
    with pytest.raises(ValueError, match=rf"1 rows of .* cannot be compared:\n  {second}:1: not JSON"):
        leaks_of_files([first, second], benchmarks)
    leaks = leaks_of_files([first, second], benchmarks, on_bad_row="skip")
    assert [(leak.file, leak.line) for leak in leaks] == [(str(first), 2), (str(second), 3)]
    assert to_row(leaks[1]) == {
        "benchmark": "medqa", "case": "a", "training_file": str(second), "line": 3, "kind": "text",
        "detail": f"18 of 18 13-grams of the question (100%), first {told(1, 13)!r}",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"demos\.jsonl:1: prompt, chosen, rejected|chosen, prompt, rejected: missing"):
        leaks_of_files([first], benchmarks, stage=ENHANCE)


def test_a_file_of_neither_stage_is_refused(tmp_path, write_rows):
    file = write_rows(tmp_path / "cases.jsonl", [{"id": "a"}, "nonsense"])
    with pytest.raises(ValueError, match="no row of Stage I or II in it, with messages or chosen, prompt, rejected"):
        leaks_of_files([file], {"medqa": OTHERS})


def test_an_image_of_a_row_that_does_not_decode_is_a_bad_row(tmp_path, write_rows, film):
    benchmarks = {"rad": [case("a", "What?", (), [film("a.png")], tmp_path)]}
    (tmp_path / "bad.png").write_bytes(b"nothing")
    file = write_rows(tmp_path / "pairs.jsonl", [pair("Which?", images=["bad.png"]), pair("Which?", images=["a.png"])])
    with pytest.raises(ValueError, match=rf"{file}:1: image .*bad\.png: does not decode"):
        leaks_of_files([file], benchmarks)
    assert [leak.line for leak in leaks_of_files([file], benchmarks, on_bad_row="skip")] == [2]


@pytest.fixture
def arguments(tmp_path, write_rows):
    """`arguments(rows, *more)`: for `pairs.py check` on Stage I rows against cases of five questions."""
    prompts = [THIRTY, *(question(told(100 * number, 100 * number + 30)) for number in range(1, 5))]
    offer = {"answer": OPTIONS[0], "options": list(OPTIONS)}
    rows = [
        {"id": f"{number}", "prompt": [{"role": "user", "content": text}]} | offer
        for number, text in enumerate(prompts)
    ]
    cases = write_rows(tmp_path / "own.jsonl", rows)

    def write(rows: list, *more: str) -> list[str]:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        return [str(file), "--stage", "1", "--against", f"cases={cases}", *more]

    return write


CLEAN, PHRASE, COPY = demonstration(told(901, 960)), demonstration(told(1, 13)), demonstration(THIRTY)


@pytest.mark.parametrize(
    ("rows", "more", "code"),
    [
        ([CLEAN], ("--strict",), 0), ([CLEAN, PHRASE], (), 0), ([PHRASE], ("--strict",), 2), ([COPY], (), 1),
        ([PHRASE, COPY], ("--strict",), 1), ([COPY], ("--json",), 1),
    ],
)  # fmt: skip
def test_exit_code(arguments, rows, more, code):
    """A copied question is an error, a phrase in common a warning."""
    assert CliRunner().invoke(command, arguments(rows, *more)).exit_code == code


def test_check_by_the_command_itself(arguments, pairs, tmp_path):
    """Bad rows hide no leak."""
    done = pairs("check", *arguments(["nonsense", CLEAN, PHRASE, COPY]))
    assert done.returncode == 1, done.stdout
    assert "against own: 5 cases with 0 images\n" in done.stdout
    file = tmp_path / "rows.jsonl"
    found = "13-grams of the question"
    assert f"{file}:3: warning: own, case '0': 1 of 18 {found} (6%), first {told(1, 13)!r}\n" in done.stdout
    assert f"{file}:4: error: own, case '0': 18 of 18 {found} (100%), first {told(1, 13)!r}\n" in done.stdout
    (row,) = [line.split("\u2502") for line in done.stdout.splitlines() if "benchmarks: none of" in line]
    assert [cell.strip() for cell in row[2:4]] == ["1", "1"]


def test_check_in_json(arguments, tmp_path):
    said = json.loads(CliRunner().invoke(command, arguments([COPY], "--json")).stdout)
    assert said["against"] == {"own": {"cases": 5, "images": 0, "without_words": 0}}
    detail = f"own, case '0': 18 of 18 13-grams of the question (100%), first {told(1, 13)!r}"
    assert said["problems"] == [
        {"file": str(tmp_path / "rows.jsonl"), "line": 1, "severity": "error", "kind": "leak", "problem": detail}
    ]


def test_a_benchmark_is_named_once(arguments, tmp_path):
    done = CliRunner().invoke(command, arguments([CLEAN], "--against", f"cases={tmp_path / 'own.jsonl'}"))
    assert "own again; give each benchmark a name of its own" in str(done.exception)
