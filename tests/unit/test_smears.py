"""Blood smears of invented boxes: what is told, what follows, what is spoiled, and who shares an image with whom."""

import importlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.answering.answers import parse_answer

BOXES = [  # in a frame of 640 x 480
    {"label": "Platelets", "box": [600, 400, 640, 440]},  # lower-right
    {"label": "WBC", "box": [100, 300, 300, 470]},  # centre (200, 385): lower-left
    {"label": "RBC", "box": [0, 0, 100, 100]},  # never told
    {"label": "Platelets", "box": [310, 20, 350, 60]},  # centre (330, 40): upper-right by 10 px
    {"label": "Platelets", "box": [20, 20, 60, 60]},  # upper-left
]
TOLD = (
    ("white cell", "lower-left"), ("platelet", "upper-left"), ("platelet", "upper-right"), ("platelet", "lower-right"),
)  # fmt: skip
COUNT, PLACE = "platelet count", "white cell quadrant"


@pytest.fixture
def smears(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "real_files")
    return importlib.import_module("smears")


@pytest.fixture
def write(smears, tmp_path):
    """Write questions on so many smears, all with these boxes."""

    def write_questions(num: int, count: str = "3 or more") -> Path:
        rows = []
        for number in range(num):
            for ending, task, answer in (("plt", COUNT, count), ("wbc", PLACE, "lower-left")):
                meta = {"boxes": BOXES, "box_frame": [640, 480]}
                options = dict(zip("ABCD", smears.OPTIONS[task], strict=True))
                row = {"id": f"{number}-{ending}", "images": [f"{number}.jpg"], "options": options, "meta": meta}
                rows.append(row | {"answer_text": answer})
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_questions


def test_boxes_are_told_in_words(smears, write):
    (smear,) = smears.read_smears(write(1))
    assert smears.places(smear.cells) == TOLD
    assert smears.look(TOLD) == (
        "white cell lower-left; platelet upper-left; platelet upper-right; platelet lower-right"
    )
    assert smears.look(()) == "nothing"
    # white at (0.31, 0.80): column 1, row 3; platelets at (0.97, 0.88), (0.52, 0.08), (0.06, 0.08)
    assert smears.grid(smear.cells) == (
        "platelet clear platelet clear, clear clear clear clear, clear clear clear clear, clear white clear platelet"
    )


def test_fields_of_the_grid_with_several_cells(smears):
    first, second = smears.Cell("platelet", 0, 0, 0.1, 0.1), smears.Cell("platelet", 0.1, 0.1, 0.2, 0.2)
    white = smears.Cell("white cell", 0, 0, 0.4, 0.4)
    assert smears.grid([first, second]).startswith("platelets clear")
    assert smears.grid([first, white]).startswith("both clear")


@pytest.mark.parametrize(
    ("x", "y", "quadrant"),
    [(0.49, 0.49, "upper-left"), (0.51, 0.49, "upper-right"), (0.49, 0.51, "lower-left"), (0.5, 0.5, "lower-right")],
)
def test_the_centre_decides_the_quadrant(smears, x, y, quadrant):
    assert smears.Cell("platelet", x - 0.1, y - 0.2, x + 0.1, y + 0.2).quadrant == quadrant


def test_chains(smears):
    look = "Look: white cell lower-left; platelet upper-left; platelet upper-right; platelet lower-right."
    assert smears.chain(COUNT, TOLD) == (
        f"<think>{look} Count: 3. Check: 3 found, so 3 or more.</think>\n<answer> 3 or more</answer>"
    )
    assert smears.chain(PLACE, TOLD[:1]) == (
        "<think>Look: white cell lower-left. White cell: lower-left. Check: lower-left found, so lower-left.</think>\n"
        "<answer> lower-left</answer>"
    )
    assert smears.answer(COUNT, (("platelet", "upper-left"),) * 5) == "3 or more"
    assert smears.answer(COUNT, TOLD[:1]) == "0"


def test_the_same_in_words_has_every_cell_once(smears):
    phrasings = {smears.tell(TOLD, np.random.default_rng(seed)) for seed in range(40)}
    assert len(phrasings) > 20
    for words in phrasings:
        told = {place: words.count(f"{place} part") for place in smears.QUADRANTS}
        assert set(told.values()) == {1}
        assert (words.count("platelet"), words.count("white cell")) == (3, 1)


@pytest.mark.parametrize(
    ("error", "same"), [("miscounted", {"look"}), ("moved", {"found", "answer"}), ("invented", {"found", "answer"}),
                        ("contradicted", {"look", "found"})],
)  # fmt: skip
@pytest.mark.parametrize("task", [COUNT, PLACE])
@pytest.mark.parametrize("told", [TOLD, TOLD[:1], TOLD[:2], TOLD[:3], (TOLD[0], *TOLD[1:2] * 4)])
def test_one_thing_is_wrong(smears, told, task, error, same):
    right = _parts(smears.chain(task, told))
    for seed in range(20):
        wrong = _parts(smears.corrupt(task, told, error, np.random.default_rng(seed)))
        kept = {name for name in right if wrong[name] == right[name]} - {"option"}
        assert kept == same or (right["found"] == "4" and kept - same == {"answer"})  # 3 and 5 are "3 or more" as well
        assert wrong["answer"] in smears.OPTIONS[task]
        if error == "miscounted" and task == COUNT:
            assert abs(int(wrong["found"]) - int(right["found"])) == 1
            assert wrong["answer"] == wrong["option"] == smears.OPTIONS[COUNT][min(int(wrong["found"]), 3)]
        if error == "miscounted" and task == PLACE:
            assert wrong["answer"] == wrong["option"] == wrong["found"]
        if error == "invented":
            more = Counter(wrong["look"].split("; ")) - Counter(right["look"].split("; "))
            assert more.total() == 1
            assert next(iter(more)).startswith("platelet ")
        if error == "moved":
            kinds = [sorted(cell.rsplit(" ", 1)[0] for cell in parts["look"].split("; ")) for parts in (right, wrong)]
            assert kinds[0] == kinds[1]


def _parts(text: str) -> dict[str, str]:
    """The parts of a chain; `found` is told twice, and must be the same both times."""
    parsed = parse_answer(text)
    look, found, check = parsed.think.removesuffix(".").split(". ")
    found = found.split(": ")[1]
    again, option = check.removeprefix("Check: ").split(" found, so ")
    assert again == found
    return {"look": look.removeprefix("Look: "), "found": found, "option": option, "answer": parsed.answer}


def test_split_is_by_image(smears, write):
    train, heldout = smears.split_images(smears.read_smears(write(20)), 6, seed=3)
    images = [{smear.image for smear in part} for part in (train, heldout)]
    assert [len(part) for part in images] == [14, 6]
    assert not images[0] & images[1]
    assert all(smear.rows.keys() == {COUNT, PLACE} for smear in (*train, *heldout))
    again = smears.split_images(smears.read_smears(write(20)), 6, seed=3)
    other = smears.split_images(smears.read_smears(write(20)), 6, seed=4)
    assert again == (train, heldout) != other
    with pytest.raises(ValueError, match="20 images held out of 20"):
        smears.split_images(smears.read_smears(write(20)), 20, seed=3)


def test_an_answer_that_its_boxes_contradict_is_refused(smears, write):
    with pytest.raises(ValueError, match=r"questions.jsonl:1: the answer '2' is not that of its boxes"):
        smears.read_smears(write(1, count="2"))


def test_a_view_shows_the_cells_where_it_says(smears):
    cells = (
        smears.Cell("white cell", 0.1, 0.55, 0.35, 0.9), smears.Cell("platelet", 0.7, 0.1, 0.75, 0.16),
        smears.Cell("platelet", 0.95, 0.95, 1.0, 1.0),
    )  # fmt: skip
    colours = {"white cell": (200, 0, 0), "platelet": (0, 0, 200)}
    image = Image.new("RGB", (640, 480), "white")
    for cell in cells:
        box = np.multiply([cell.left, cell.top, cell.right, cell.bottom], (640, 480) * 2).round().astype(int)
        image.paste(colours[cell.kind], tuple(box.tolist()))
    kept = []
    for seed in range(60):
        window, across, down, shown = smears.view(cells, np.random.default_rng(seed))
        picture = np.asarray(smears.draw(image, window, across, down)).astype(int)
        for cell in shown:
            x, y = (min(int(at * side), side - 1) for at, side in zip(cell.centre, smears.SIZE, strict=True))
            assert np.abs(picture[y, x] - colours[cell.kind]).max() < 90, (seed, cell)
        kept.append(len(shown))
    assert set(kept) >= {1, 2}
