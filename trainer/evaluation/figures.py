"""What the report's chapters are made of, and how figures are written in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from urllib.parse import urlencode

from markupsafe import Markup

from mede2.trainer.evaluation.charts import Axis
from mede2.trainer.questions.rows import Row
from mede2.trainer.tables import Section

MINUS = "\N{MINUS SIGN}"
Marks = tuple[tuple[int, Mapping[str, float]], ...]


@dataclass(frozen=True)
class Figures(Section):
    """A table with a chart in its last column.

    Attributes:
        brief: the columns that a terminal shows; None: all.
        num_quiet: last rows, which say what the others are to be read beside.
        is_stacked: intervals stand below their values, so that more columns fit.
        marks: for each row what its chart shows, (model's place, estimate).
        axis: of the charts; None: no chart.
        references: for each row values to draw a line at.
        as_bars: from 0, instead of marks.
        links: for each row the state of the question browser that shows what it counts, or None.
    """

    brief: tuple[int, ...] | None = None
    num_quiet: int = 0
    is_stacked: bool = False
    marks: tuple[Marks, ...] = ()
    axis: Axis | None = None
    references: tuple[tuple[float, ...], ...] = ()
    as_bars: bool = False
    links: tuple[str | None, ...] = ()

    def shortened(self) -> Section:
        """As a terminal shows it."""
        kept = range(len(self.columns)) if self.brief is None else self.brief
        rows = [tuple(row[i] for i in kept) for row in self.rows]
        return Section(self.title, tuple(self.columns[i] for i in kept), rows, self.note, heads=self.heads)

    @property
    def spans(self) -> list[int]:
        """For each row, how many rows its first cell stands for; 0 where one above stands for it too."""
        if self.heads == 1:
            return [1] * len(self.rows)
        lengths = [len(list(rows)) for _, rows in groupby(self.rows, key=lambda row: row[0])]
        return [length if i == 0 else 0 for length in lengths for i in range(length)]


@dataclass(frozen=True)
class Chapter:
    """One chapter of the report.

    Attributes:
        name: its anchor.
        text: what its figures are and how to read them.
        tables: for page and terminal.
        pictures: further tables with charts, for the page.
        panels: {heading: {what x is: {caption: chart}}}, for the page.
        details: {heading: tables}, for the page, folded.
    """

    name: str
    title: str
    text: str
    tables: list[Figures] = field(default_factory=list)
    pictures: list[Figures] = field(default_factory=list)
    panels: dict[str, dict[str, dict[str, Markup]]] = field(default_factory=dict)
    details: dict[str, list[Figures]] = field(default_factory=dict)


def link(**state: str) -> str:
    """The address on the page at which the question browser shows this."""
    return "#" + urlencode(state)


def percent(estimate: Row) -> str:
    """Such as 41.0 [36.3, 45.9]."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def points(estimate: Row) -> str:
    """Such as +18.8 [+13.1, +24.5]."""
    value, low, high = (signed(estimate[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def signed(value: float) -> str:
    """A share in points with its sign."""
    text = f"{100 * value:+.1f}".replace("-", MINUS)
    return text[1:] if text[1:] == "0.0" else text


def plain_mean(estimate: Row) -> str:
    """Such as 3.41 [3.20, 3.62]."""
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def share(value: float | None) -> str:
    """Per cent, - for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def p_value(value: float) -> str:
    """Three digits, < 0.001 below."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def by(rows: Sequence[Row], *names: str) -> dict:
    """Rows by one field, or by several as a tuple, in the order in which they come."""
    found: dict = {}
    for row in rows:
        key = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
        found.setdefault(key, []).append(row)
    return found
