"""Blood smears with boxes (BCCD) as a task for both stages: views, chains told from the boxes, ways to spoil them.

The base model learns to transcribe smears and never counts; Stage I tells in words how to count; Stage II shows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mede2.trainer.questions.rows import read_rows

SIZE = (96, 96)  # pixels of a view
MERGE = 3  # patches of 8 px merged on a side: a visual token for each field
GRID = (4, 4)  # columns and rows of fields; two of each are a quadrant
LABELS = {"WBC": "white cell", "Platelets": "platelet"}  # red cells are incompletely boxed, so never told
KINDS = tuple(LABELS.values())
FIELDS = ("clear", "white", "platelet", "platelets", "both")
QUADRANTS = ("upper-left", "upper-right", "lower-left", "lower-right")
TASKS = {"plt": "platelet count", "wbc": "white cell quadrant"}  # by the end of a question's id
QUESTIONS = {
    "platelet count": "This is a stained peripheral blood smear. How many platelets are visible?",
    "white cell quadrant": "In which quadrant of the image is the centre of the white blood cell?",
}
OPTIONS = {"platelet count": ("0", "1", "2", "3 or more"), "white cell quadrant": QUADRANTS}
REQUEST = "Think, then answer."
ERRORS = ("miscounted", "moved", "invented", "contradicted")
SMALLEST_WINDOW = 0.6  # of a side of the smear
CUT = (0.1, 0.6)  # a window in which a cell shows this share of itself is not used: it could be told or not
WINDOWS_TRIED = 20


@dataclass(frozen=True)
class Cell:
    """A white cell or a platelet; its box in shares of the image's sides."""

    kind: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def quadrant(self) -> str:
        x, y = self.centre
        return f"{'upper' if y < 0.5 else 'lower'}-{'left' if x < 0.5 else 'right'}"


Places = tuple[tuple[str, str], ...]  # (kind, quadrant) of every cell, in the order in which a chain tells them


@dataclass(frozen=True)
class Smear:
    """One image; `rows` are its questions as the file has them, by task."""

    image: Path
    cells: tuple[Cell, ...]
    rows: dict[str, dict]


def read_smears(path: Path) -> list[Smear]:
    """Every image of a question file once, with its boxes, in the file's order.

    Raises:
        ValueError: names a row whose question is of no known task, or whose answer its boxes contradict.
    """
    smears: dict[str, Smear] = {}
    for source, row in read_rows(path, ("id", "images", "options", "answer_text", "meta")):
        task = TASKS.get(row["id"].rpartition("-")[2])
        if task is None or tuple(row["options"].values()) != OPTIONS[task]:
            raise ValueError(f"{source}: id {row['id']!r} with options {row['options']}: of no known task")
        (image,) = row["images"]
        width, height = row["meta"]["box_frame"]
        cells = tuple(
            Cell(LABELS[box["label"]], *np.divide(box["box"], [width, height, width, height]).tolist())
            for box in row["meta"]["boxes"]
            if box["label"] in LABELS
        )
        if answer(task, places(cells)) != row["answer_text"]:
            raise ValueError(f"{source}: the answer {row['answer_text']!r} is not that of its boxes")
        smears.setdefault(image, Smear(path.parent / image, cells, {})).rows[task] = row
    return list(smears.values())


def split_images(smears: Sequence[Smear], num_heldout: int, seed: int) -> tuple[list[Smear], list[Smear]]:
    """Training and held-out smears. By image: no image of one has a question in the other.

    Raises:
        ValueError: more held out than there are.
    """
    if not 0 < num_heldout < len(smears):
        raise ValueError(f"{num_heldout} images held out of {len(smears)}: at least one on both sides")
    order = np.random.default_rng([seed, 0]).permutation(len(smears))
    return [smears[i] for i in sorted(order[num_heldout:])], [smears[i] for i in sorted(order[:num_heldout])]


def places(cells: Sequence[Cell]) -> Places:
    """What a chain tells: white cells first, then platelets, each kind by quadrant."""
    return _ordered((cell.kind, cell.quadrant) for cell in cells)


def view(cells: Sequence[Cell], rng: np.random.Generator) -> tuple[tuple[float, ...], bool, bool, tuple[Cell, ...]]:
    """A part of a smear, perhaps mirrored, in which no cell is so cut that it could be told or not.

    Returns:
        The window (left, top, right, bottom, in shares), whether it is mirrored from left to right and from top to
        bottom, and the cells in it, in shares of the window.
    """
    across, down = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    for _ in range(WINDOWS_TRIED):
        side = rng.uniform(SMALLEST_WINDOW, 1)
        left, top = rng.uniform(0, 1 - side, size=2)
        shown = [_shown(cell, (left, top, left + side, top + side)) for cell in cells]
        if not any(CUT[0] < share < CUT[1] for share in shown):
            break
    else:
        left, top, side, shown = 0.0, 0.0, 1.0, [1.0] * len(cells)
    window = (left, top, left + side, top + side)
    kept = (_within(cell, window, across, down) for cell, share in zip(cells, shown, strict=True) if share >= CUT[1])
    return window, across, down, tuple(kept)


def draw(image: Image.Image, window: tuple[float, ...], across: bool, down: bool) -> Image.Image:
    """The picture of a view, SIZE."""
    box = [share * side for share, side in zip(window, image.size * 2, strict=True)]
    picture = image.resize(SIZE, Image.Resampling.BICUBIC, box=tuple(box))
    if across:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if down else picture


def tasks_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The questions that can be asked: a quadrant only of the only white cell."""
    alone = sum(cell.kind == "white cell" for cell in cells) == 1
    return tuple(OPTIONS) if alone else ("platelet count",)


def question(task: str) -> str:
    """The question with its options."""
    return f"{QUESTIONS[task]} Options: {', '.join(OPTIONS[task])}."


def answer(task: str, told: Places) -> str:
    """The option that follows from what is told; of several white cells the first counts."""
    if task == "platelet count":
        return _count_option(sum(kind == "platelet" for kind, _ in told))
    return next((quadrant for kind, quadrant in told if kind == "white cell"), "none")


def look(told: Places) -> str:
    """Cells as chains list them: `white cell lower-left; platelet upper-left`, or `nothing`."""
    return "; ".join(f"{kind} {quadrant}" for kind, quadrant in told) or "nothing"


def grid(cells: Sequence[Cell]) -> str:
    """Row by row what each field shows."""
    named = fields(cells)
    return ", ".join(" ".join(named[start : start + GRID[0]]) for start in range(0, len(named), GRID[0]))


def fields(cells: Sequence[Cell]) -> list[str]:
    """Which of FIELDS has its centre in each field of GRID, in reading order."""
    kinds: list[list[str]] = [[] for _ in range(GRID[0] * GRID[1])]
    for cell in cells:
        column, row = (min(int(at * number), number - 1) for at, number in zip(cell.centre, GRID, strict=True))
        kinds[row * GRID[0] + column].append(cell.kind)
    return [_field(of_field) for of_field in kinds]


def tell(told: Places, rng: np.random.Generator) -> str:
    """The same in words, in an order and a phrasing that vary."""
    mixed = [told[i] for i in rng.permutation(len(told))]
    if rng.random() < 0.5:
        return (
            f"The report names {' and '.join(f'a {kind} in the {place} part' for kind, place in mixed) or 'nothing'}."
        )
    return " ".join(f"In the {place} part lies a {kind}." for kind, place in mixed) or "In no part lies anything."


def chain(task: str, told: Places) -> str:
    """The reference answer: look, count or place, re-check; then the option that follows."""
    return _write(_steps(task, told), answer(task, told))


def corrupt(task: str, told: Places, error: str, rng: np.random.Generator) -> str:
    """The reference answer with one thing wrong.

    - `miscounted`: the number of platelets is off by one, or the white cell in another quadrant, and what follows too;
    - `moved`: in the list, and only there, a cell lies in another quadrant; where there is none, one is invented;
    - `invented`: in the list, and only there, is a platelet too many;
    - `contradicted`: another option than the chain arrives at.
    """
    right = answer(task, told)
    steps = _steps(task, told)
    if error == "miscounted" and task == "platelet count":
        number = sum(kind == "platelet" for kind, _ in told)
        wrong = number + 1 if number == 0 or (number != 3 and rng.random() < 0.5) else number - 1
        return _write(steps | _conclusion(task, str(wrong), _count_option(wrong)), _count_option(wrong))
    if error == "miscounted":
        wrong = _other(QUADRANTS, right, rng)
        return _write(steps | _conclusion(task, wrong, wrong), wrong)
    if error == "contradicted":
        return _write(steps, _other(OPTIONS[task], right, rng))
    edited = list(told)
    if error == "moved" and told:
        index = rng.integers(len(told))
        kind, quadrant = told[index]
        edited[index] = (kind, _other(QUADRANTS, quadrant, rng))
    else:
        edited.append(("platelet", QUADRANTS[rng.integers(len(QUADRANTS))]))
    return _write(steps | {"look": f"Look: {look(_ordered(edited))}."}, right)


def _field(kinds: Sequence[str]) -> str:
    """The one of FIELDS for the cells in a field."""
    if len(set(kinds)) == 2:
        return "both"
    if "white cell" in kinds:
        return "white"
    return ("clear", "platelet", "platelets")[min(len(kinds), 2)]


def _steps(task: str, told: Places) -> dict[str, str]:
    right = answer(task, told)
    found = str(sum(kind == "platelet" for kind, _ in told)) if task == "platelet count" else right
    return {"look": f"Look: {look(told)}."} | _conclusion(task, found, right)


def _conclusion(task: str, found: str, option: str) -> dict[str, str]:
    """The steps behind the list."""
    name = "Count" if task == "platelet count" else "White cell"
    return {"found": f"{name}: {found}.", "check": f"Check: {found} found, so {option}."}


def _write(steps: dict[str, str], option: str) -> str:
    return f"<think>{' '.join(steps.values())}</think>\n<answer> {option}</answer>"


def _count_option(number: int) -> str:
    return OPTIONS["platelet count"][min(number, 3)]


def _other(options: Sequence[str], but: str, rng: np.random.Generator) -> str:
    others = [option for option in options if option != but]
    return others[rng.integers(len(others))]


def _ordered(told) -> Places:
    return tuple(sorted(told, key=lambda place: (KINDS.index(place[0]), QUADRANTS.index(place[1]))))


def _shown(cell: Cell, window: tuple[float, ...]) -> float:
    """The share of a cell's box that a window shows."""
    width = min(cell.right, window[2]) - max(cell.left, window[0])
    height = min(cell.bottom, window[3]) - max(cell.top, window[1])
    whole = (cell.right - cell.left) * (cell.bottom - cell.top)
    return max(width, 0) * max(height, 0) / whole


def _within(cell: Cell, window: tuple[float, ...], across: bool, down: bool) -> Cell:
    """A cell in shares of a window, mirrored with it."""
    left, top, right, bottom = window
    x = sorted(abs(across - (at - left) / (right - left)) for at in (cell.left, cell.right))
    y = sorted(abs(down - (at - top) / (bottom - top)) for at in (cell.top, cell.bottom))
    return Cell(cell.kind, x[0], y[0], x[1], y[1])
