"""`pairs.py check`: the errors are those of the stages; what it warns of besides, where, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mede2.trainer.data.records import BadRow, Record
from mede2.trainer.data.remarks import briefly, compare, traits
from mede2.trainer.demo.cases import heldout_cases, render
from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.demo.records import write_stage2
from mede2.trainer.preference.check import check, command
from mede2.trainer.preference.duplicates import BLOCK, alike_images, alike_texts, perceptual_hash
from mede2.trainer.prepare import describe, prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import ELICIT, ENHANCE

ROOT = Path(__file__).parents[2]
LICENSED = {"meta": {"license": "CC0-1.0"}}


def demonstration(question: str, answer: str, **more) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | LICENSED | more


def pair(question: str, chosen: str, rejected: str, image: str | None = None, **more) -> dict:
    content = [{"type": "image"}] * bool(image) + [{"type": "text", "text": question}]
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    images = {"images": [image]} if image else {}
    return {"prompt": [{"role": "user", "content": content}]} | answers | images | LICENSED | more


@pytest.fixture
def warned(tmp_path, write_rows):
    """`warned(rows, stage)`: (line, kind, text) of each warning; there must be no error."""

    def warnings(rows: list, stage: int, **options) -> list[tuple[int, str, str]]:
        report = check((str(write_rows(tmp_path / "rows.jsonl", rows)),), stage, **options)
        assert report.count("error") == 0, report.problems
        return [(found.line, found.kind, found.problem) for found in report.problems]

    return warnings


@pytest.fixture
def film(tmp_path):
    """`film(name, number, **options)` saves the picture of a case."""

    def save(name: str, number: int = 0, scale: float = 1.0, **options) -> str:
        picture = render(heldout_cases(number + 1)[number])
        picture.resize([round(scale * side) for side in picture.size]).save(tmp_path / name, **options)
        return name

    return save


THINK = "<think>{}</think> <answer>{}</answer>"
SAID = ("mass", "Mass", "cyst")
DEMONSTRATIONS = {
    "the same twice": (
        [demonstration("A mass?", "Yes."), demonstration("a  MASS?", "yes.")],
        (2, "duplicate", "the row of FILE:1 again"),
    ),
    "the same in other characters": (
        [demonstration("Size 5 \u00b5m?", "Yes."), demonstration("Size\u00a0\uff15 \u03bcm?", "Yes.")],
        (2, "duplicate", "the row of FILE:1 again"),
    ),
    "nearly the same": (
        [demonstration(" ".join(f"finding{i}" for i in range(90)) + end, "Yes.") for end in (" left?", " right?")],
        (2, "duplicate", "nearly the row of FILE:1 again (similarity 0.9"),
    ),
    "one question, two answers": (
        [demonstration("Which?", THINK.format(why, what)) for why, what in zip("abc", SAID, strict=True)],
        (3, "contradiction", "the question and images of FILE:1, but another answer is learnt"),
    ),
    "an id twice": (
        [demonstration("A?", "One.", id=7), demonstration("B?", "Two.", id=8), demonstration("C?", "Three.", id=7)],
        (3, "id", "id 7 again, after FILE:1"),
    ),
    "no licence": ([demonstration("A?", "One.", meta={})], (1, "licence", "no meta.license")),
    "an empty licence": ([demonstration("A?", "One.", meta={"license": " "})], (1, "licence", "no meta.license")),
    "a lost character": ([demonstration("R\ufffdntgen?", "Yes.")], (1, "text", "U+FFFD in a text of the user")),
    "a wrong encoding": ([demonstration("A?", "It\x92s a mass.")], (1, "text", "U+0092 in a text of the assistant")),
    "no end of thinking": ([demonstration("A?", "<think>mass")], (1, "text", "not in the form <think>...</think>")),
    "no thoughts": ([demonstration("A?", THINK.format(" ", "mass"))], (1, "text", "nothing between the think tags")),
    "no final answer": ([demonstration("A?", THINK.format("mass", ""))], (1, "text", "nothing between the answer")),
}  # fmt: skip
PAIRS = {
    "answers alike but for case and space": (
        [pair("Which?", "A  Mass", "a mass")],
        (1, "duplicate", "chosen and rejected differ in nothing but case, white space"),
    ),
    "chosen here, rejected there": (
        [pair("Which?", "mass", "cyst"), pair("Which?", "Cyst", "clear")],
        (2, "contradiction", "the chosen answer is the rejected one of FILE:1"),
    ),
    "the same pair twice": (
        [pair("Which?", "mass", "cyst"), pair("Where?", "left", "right"), pair("Which?", "mass", "cyst")],
        (3, "duplicate", "the row of FILE:1 again"),
    ),
}


@pytest.mark.parametrize("name", [*DEMONSTRATIONS, *PAIRS], ids=lambda name: name.replace(" ", "_"))
def test_warnings(name, warned, tmp_path):
    stage = ELICIT if name in DEMONSTRATIONS else ENHANCE
    rows, (line, kind, text) = (DEMONSTRATIONS | PAIRS)[name]
    (found,) = [found for found in warned(rows, stage) if found[1] == kind]
    assert found[:2] == (line, kind)
    assert text.replace("FILE", str(tmp_path / "rows.jsonl")) in found[2]


GOOD = {
    "several questions on one image": [pair(text, "mass", "cyst", "a.png") for text in ("Which?", "Which is in it?")],
    "one question on several images": [pair("Which?", "mass", "cyst", name) for name in ("a.png", "b.png")],
    "one image by two paths": [pair("Which?", "mass", "cyst", "a.png"), pair("Where?", "left", "right", "c/../a.png")],
    "several pairs of a case": [pair("Which?", "mass", wrong, "a.png") for wrong in ("cyst", "clear")],
    "equal words in two orders": [pair("Which?", "first the left lung, then the right", "the right, then the left")],
}


@pytest.mark.parametrize("name", GOOD, ids=lambda name: name.replace(" ", "_"))
def test_no_warning(name, warned, film, tmp_path):
    film("a.png", 0)
    film("b.png", 1)
    (tmp_path / "c").mkdir()
    assert warned(GOOD[name], ENHANCE) == []


def test_the_earlier_row_is_named_whatever_comes_later(warned):
    """A row that stands twice has the place of its first."""
    one, other = (demonstration(" ".join(f"w{i}" for i in range(90)) + end, "Yes.") for end in (" left?", " right?"))
    found = warned([one, other, one], ELICIT)
    assert [(line, text.partition(" again")[0][-2:]) for line, _, text in found] == [(2, ":1"), (3, ":1")]


def test_images_alike(warned, film, tmp_path):
    """The same bytes, another compression and another size are told once, where they first come up; others are not."""
    names = [
        film("a.png"), film("other.png", 1), film("copy.png"), film("b.jpg", quality=70), film("c.png", scale=2.0),
        "a.png",
    ]  # fmt: skip
    found = warned([pair(f"Which of {name}?", f"mass {i}", "cyst", name) for i, name in enumerate(names)], ENHANCE)
    assert [(line, kind) for line, kind, _ in found] == [(3, "image"), (4, "image"), (5, "image")]
    assert f"copy.png has the bytes of {tmp_path}/a.png ({tmp_path}/rows.jsonl:1)" in found[0][2]
    assert f"b.jpg looks like {tmp_path}/a.png ({tmp_path}/rows.jsonl:1): " in found[1][2]
    assert found[1][2].endswith("bits of 256 differ")


@pytest.mark.parametrize("name", ["up.png", "absolute.png", "link.png"])
def test_images_outside_the_folder_are_told_where_they_may_be_read(monkeypatch, film, tmp_path, name):
    """Converters write absolute paths, and files of rows lie beside a folder of images: no error where the environment
    names it."""
    monkeypatch.setenv("MEDE2_IMAGE_ROOT", str(tmp_path))
    (tmp_path / "rows").mkdir()
    image = tmp_path / film("a.png")
    (tmp_path / "rows" / "link.png").symlink_to(image)
    path = {"up.png": "../a.png", "absolute.png": str(image), "link.png": "link.png"}[name]
    (tmp_path / "rows" / "rows.jsonl").write_text(json.dumps(pair("Which?", "mass", "cyst", path)))
    report = check((str(tmp_path / "rows" / "rows.jsonl"),), ENHANCE)
    ((kind, text),) = [(found.kind, found.problem) for found in report.problems]
    assert kind == "place"
    assert "lies outside the file's folder" in text
    assert report.usable == 1


def test_the_errors_are_those_of_the_stages(tmp_path, write_rows, load, film, processor):
    from mede2.trainer.data.encoding import Encoder

    film("good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    good = pair("Which?", "mass", "cyst", "good.png")
    rows = [
        "nonsense", good, good | {"images": ["none.png"]}, good | {"images": ["bad.png"]}, "", good | {"chosen": []},
        good | {"rejected": good["chosen"]}, pair("Which?", "mass<|im_end|>", "cyst"),
        pair("Which?", "mass " * 600, "cyst"),
    ]  # fmt: skip
    file = write_rows(tmp_path / "rows.jsonl", rows)
    of_stage = load(file, ENHANCE, on_bad_row="skip").bad_rows
    report = check((str(file),), ENHANCE, Encoder(processor, 512))
    errors = [found for found in report.problems if found.severity == "error"]
    assert [{"source": f"{found.file}:{found.line}", "problem": found.problem} for found in errors] == of_stage
    assert [(found.line, found.kind) for found in errors] == [
        (1, "form"), (3, "image"), (4, "image"), (6, "form"), (7, "form"), (8, "text"), (9, "length"),
    ]  # fmt: skip
    assert (report.rows, report.usable, len(report.lengths)) == (8, 1, 2)


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path, write_rows):
    good = write_rows(tmp_path / "good.jsonl", [demonstration("A?", "One.")])
    (tmp_path / "latin.jsonl").write_bytes("Röntgen\n".encode("latin-1"))
    files = (str(tmp_path / "none.jsonl"), str(tmp_path / "latin.jsonl"), str(good))
    report = check(files, ELICIT)
    assert [(found.file, found.line, found.kind) for found in report.problems] == [
        (files[0], None, "file"), (files[1], None, "file"),
    ]  # fmt: skip
    assert report.usable == 1


@pytest.fixture
def run(tmp_path, write_rows):
    """`run(rows, *arguments)`: the command in this process."""

    def invoke(rows: list, *arguments: str):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        return CliRunner().invoke(command, [str(file), "--stage", "1", *arguments])

    return invoke


CLEAN, WARNING, ERROR = demonstration("A?", "One."), demonstration("B?", "Two.", meta={}), {"messages": []}


@pytest.mark.parametrize(
    ("rows", "arguments", "code"),
    [
        ([CLEAN], (), 0), ([CLEAN], ("--strict",), 0), ([CLEAN, WARNING], (), 0), ([CLEAN, WARNING], ("--strict",), 2),
        ([CLEAN, ERROR], (), 1), ([WARNING, ERROR], ("--strict",), 1), ([WARNING, ERROR], ("--json",), 1),
    ],
)  # fmt: skip
def test_exit_code(run, rows, arguments, code):
    assert run(rows, *arguments).exit_code == code


def test_many_problems_are_cut_on_the_terminal_and_whole_in_json(run, tmp_path):
    rows = [demonstration(f"{number}?", f"{number * number}.", meta={}) for number in range(30)] + [ERROR] * 30
    lines = run(rows).stdout.splitlines()
    file = tmp_path / "rows.jsonl"
    assert f"{file}:31: error: messages: a list of messages, not []" in lines
    assert sum(": error: " in line for line in lines) == 20
    assert sum(": warning: " in line for line in lines) == 5
    assert lines[-1] == "30 errors, 30 warnings"
    told = json.loads(run(rows, "--json").stdout)
    assert len(told["problems"]) == 60
    problem = {"severity": "error", "kind": "form", "problem": "messages: a list of messages, not []"}
    assert told["problems"][30] == {"file": str(file), "line": 31} | problem
    assert (told["rows"], told["usable"], told["errors"], told["warnings"]) == (60, 30, 30, 30)


def test_a_limit_without_a_model_is_refused(run):
    assert "--max-length: only with --model" in str(run([CLEAN], "--max-length", "100").exception)


def test_the_demo_by_the_command_itself(tmp_path):
    """No error, no warning; tokens counted; with --json nothing else on stdout."""
    file = write_stage2(tmp_path, 8, seed=5)
    arguments = ("check", str(file), "--model", str(BASE_MODEL), "--strict", "--json")
    program = [sys.executable, str(ROOT / "launch/pairs.py")]
    done = subprocess.run([*program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["usable"], told["problems"]) == (8, 8, [])
    assert told["licenses"] == {"Apache-2.0": 8}
    assert (told["images"], told["image_files"], told["tokens"]["sequences"]) == (8, 8, 16)
    assert 50 < told["tokens"]["longest"] < 200


def test_the_stages_tell_what_check_warns_of(tmp_path, model_folder, write_rows, world):
    """Once for each kind, before the first update; and whether held-out rows are trained on."""
    rows = [demonstration("A?", "One.")] * 3 + [demonstration("B?", "Two.")]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    held_out = str(write_rows(tmp_path / "held_out.jsonl", [rows[-1], demonstration("C?", "Three.")]))
    settings = {"model": str(model_folder), "train": [file], "eval": held_out, "global_batch_size": 4}
    output = tmp_path / "out"
    run = prepare(resolve(ELICIT, [("flag", settings)]), str(ROOT / "ds_configs" / "z3.json"), output, world)
    warnings = [line for line in describe(run) if "warning" in line]
    assert warnings == [
        f"warning: {file}:2: the row of {file}:1 again (and 1 more such remark: launch/pairs.py check lists all)",
        "warning: held-out rows that are trained on, too: 1",
    ]


def test_remarks_in_brief():
    texts = [{"role": "user", "content": [{"type": "text", "text": "\ufffd?"}]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "mass"}]}
    records = [Record(f"rows.jsonl:{line}", ((*texts, answer),), 0, (), {}, "a") for line in (1, 2)]
    remarks = compare(traits(record, ()) for record in records)
    assert [(remark.source, remark.kind) for remark in remarks] == [
        ("rows.jsonl:1", "text"), ("rows.jsonl:2", "text"), ("rows.jsonl:2", "duplicate"),
    ]  # fmt: skip
    assert len(briefly(remarks)) == 2


def test_phantoms_of_different_cases_do_not_look_alike():
    hashes = np.stack([perceptual_hash(render(case)) for case in heldout_cases(150)])
    assert list(alike_images(hashes)) == []


@pytest.mark.parametrize("change", ["jpeg", "half", "twice", "brighter", "negative"])
def test_what_looks_alike(tmp_path, change):
    """A negative does not: its frequencies have the other sign."""
    for case in heldout_cases(20):
        picture = render(case).convert("RGB")
        if change == "jpeg":
            picture.save(tmp_path / "a.jpg", quality=60)
            other = Image.open(tmp_path / "a.jpg")
        elif change in ("half", "twice"):
            scale = 0.5 if change == "half" else 2
            other = picture.resize([int(side * scale) for side in picture.size])
        else:
            other = picture.point(lambda value: min(255, 1.1 * value) if change == "brighter" else 255 - value)
        found = list(alike_images(np.stack([perceptual_hash(picture), perceptual_hash(other)])))
        assert len(found) == (change != "negative")


def test_alike_texts():
    words = " ".join(f"word{number}" for number in range(60))
    texts = ["nothing of it", words, f"{words} more", "of it nothing", words]
    found = list(alike_texts(texts, [0, 0, 0, 0, 1]))
    assert [(text, earlier) for text, earlier, _ in found] == [(2, 1)]
    assert 0.9 < found[0][2] < 1
    assert [(text, earlier) for text, earlier, _ in alike_texts(texts, [0] * 5)] == [(2, 1), (4, 1), (4, 2)]
    assert list(alike_texts(["?", "!"], [0, 0])) == []
    assert list(alike_texts([], [])) == []


def test_alike_texts_over_blocks():
    """A text is compared with those of its own block and of all blocks before."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 5000, 12)) for _ in range(BLOCK + 50)]
    texts[BLOCK + 7] = texts[3]
    texts[BLOCK + 9] = texts[BLOCK + 8]
    found = [(text, earlier) for text, earlier, _ in alike_texts(texts, [0] * len(texts))]
    assert found == [(BLOCK + 7, 3), (BLOCK + 9, BLOCK + 8)]


def test_a_bad_row_is_one_line_without_control_characters():
    assert str(BadRow("rows.jsonl:7", "a\nb\x1b[2J\u2028c")) == "rows.jsonl:7: a\\u000ab\\u001b[2J\\u2028c"
