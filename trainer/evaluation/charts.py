"""Charts as SVG without text of their own where a table stands beside them: strips of intervals, curves with bands.

Colours and line widths are the page's style sheet's; a series keeps its colour and its shape through the page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_COLOURS = 6
CIRCLE, SQUARE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z"
TRIANGLE, DIAMOND = "M0-5l4.8 8.2h-9.6z", "M0-5.2l5.2 5.2l-5.2 5.2l-5.2-5.2z"
SHAPES = (CIRCLE, SQUARE, TRIANGLE, DIAMOND)
LANE_PX, STRIP_PX = 10, 20
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 220, 34, 40, 10, 34  # of a panel of curves
LABEL_PX = 12  # between two labels at least


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with the places of its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


def span(values: Sequence[float], least: float = 0.1) -> Axis:
    """An axis over all the values with some 3 to 6 ticks at round numbers; at least `least` long."""
    low, high = min(values), max(values)
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 10) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def swatch(series: int) -> Markup:
    """The shape and colour of a series, to stand beside its name."""
    return Markup('<svg class="swatch s{}" width="12" height="12" aria-hidden="true">{}</svg>').format(
        series % NUM_COLOURS, _mark(series, "6", "6")
    )


def strip(
    marks: Sequence[tuple[int, Mapping[str, float]]],
    axis: Axis,
    references: Sequence[float] = (),
    bars: bool = False,
) -> Markup:
    """A row of a table as a chart: a mark and its interval for each series, in lanes below each other.

    Args:
        marks: (series, {"value", "low", "high"}).
        axis: the same for all rows of a table.
        references: values to draw a dashed line at, such as what chance would score.
        bars: from 0 to the value, instead of a mark alone.
    """
    height = STRIP_PX + LANE_PX * (len(marks) - 1)
    parts = [_upright("zero" if tick == 0 else "grid", axis, tick) for tick in axis.ticks]
    parts += [_upright("reference", axis, value) for value in references]
    for lane, (series, estimate) in enumerate(marks):
        y = STRIP_PX / 2 + LANE_PX * lane
        value, low, high = (_percent(axis.place(estimate[name])) for name in ("value", "low", "high"))
        drawn = [Markup('<line class="whisker" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(low, high, y, y)]
        if bars:
            ends = sorted((axis.place(0), axis.place(estimate["value"])))
            bar = Markup('<rect class="bar" x="{}" width="{}" y="{}" height="10"/>')
            drawn.insert(0, bar.format(_percent(ends[0]), _percent(ends[1] - ends[0]), y - 5))
        drawn.append(_mark(series, value, str(y)))
        parts.append(Markup('<g class="s{}">{}</g>').format(series % NUM_COLOURS, Markup().join(drawn)))
    return Markup('<svg class="strip" width="100%" height="{}" aria-hidden="true">{}</svg>').format(
        height, Markup().join(parts)
    )


def scale(axis: Axis, percent: bool = True) -> Markup:
    """The numbers of the ticks, to stand above strips."""
    texts = [
        Markup('<text x="{}" y="12">{}</text>').format(
            _percent(axis.place(tick)), f"{100 * tick if percent else tick:g}"
        )
        for tick in axis.ticks
    ]
    return Markup('<svg class="scale" width="100%" height="16" aria-hidden="true">{}</svg>').format(
        Markup().join(texts)
    )


def curves(
    series: Sequence[tuple[int, str, Sequence[tuple[float, Mapping[str, float]]]]], y_axis: Axis, title: str, unit: str
) -> Markup:
    """Lines with bands over a log2 axis, each with its last value written beside it.

    Args:
        series: (series, name, [(x, {"value", "low", "high"})]), x above 0 and rising.
        y_axis: of shares, told in per cent.
        title: of the panel, for those who cannot see it.
        unit: of x.
    """
    xs = sorted({x for _, _, points in series for x, _ in points})
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    if high - low < 1:
        low, high = low - 0.5, high + 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(x) - low) / (high - low)
        return round(right, 2), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y_axis.place(y), 2)

    parts = []
    for tick in y_axis.ticks:
        y = at(xs[0], tick)[1]
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, f"{100 * tick:g}")
        )
    bottom = HEIGHT - BOTTOM
    for x in _log2_ticks(xs):
        place = at(x, 0)[0]
        parts.append(
            Markup(
                '<line class="tick" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="x" x="{}" y="{}">{}</text>'
            ).format(place, place, bottom, bottom + 4, place, bottom + 16, f"{x:g}")
        )
    parts.append(
        Markup('<text class="x unit" x="{}" y="{}">{}</text>').format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, unit)
    )
    told, ends = [], []
    for number, name, points in series:
        line = [at(x, estimate["value"]) for x, estimate in points]
        band = [at(x, estimate["high"]) for x, estimate in points]
        band += [at(x, estimate["low"]) for x, estimate in reversed(points)]
        if len(points) == 1:  # a band of no width would not be seen
            band = [(x + dx, y) for (x, y), dx in zip(band * 2, (-3, -3, 3, 3), strict=True)]
            band = [band[0], band[2], band[3], band[1]]
        drawn = Markup('<polygon class="band" points="{}"/><polyline class="line" points="{}"/>').format(
            _points(band), _points(line)
        )
        drawn += Markup().join(_mark(number, str(x), str(y)) for x, y in line)
        parts.append(Markup('<g class="s{}">{}</g>').format(number % NUM_COLOURS, drawn))
        ends.append((line[-1], f"{100 * points[-1][1]['value']:.1f}", number))
        told.append(f"{name}: " + ", ".join(f"{100 * e['value']:.1f} at {x:g}" for x, e in points))
    parts += _labels(ends)
    return Markup('<svg class="curves" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>').format(
        WIDTH, HEIGHT, title, f"Accuracy in per cent by {unit}. " + "; ".join(told), Markup().join(parts)
    )


def _labels(ends: Sequence[tuple[tuple[float, float], str, int]]) -> list[Markup]:
    """Values right of the ends of the lines, moved down where they would lie on each other."""
    parts, free = [], TOP - 2.0
    for (x, y), text, number in sorted(ends, key=lambda end: end[0][1]):
        free = max(y + 4, free + LABEL_PX)
        parts.append(
            Markup('<text class="value s{}" x="{}" y="{}">{}</text>').format(number % NUM_COLOURS, x + 8, free, text)
        )
    return parts


def _log2_ticks(xs: Sequence[float]) -> list[float]:
    """The values themselves where they are few whole numbers, else powers of 2 between them."""
    if len(xs) <= 6 and all(float(x).is_integer() for x in xs):
        return list(xs)
    inside = [2.0**i for i in range(math.ceil(math.log2(xs[0])), math.floor(math.log2(xs[-1])) + 1)]
    return inside[:: math.ceil(len(inside) / 6)] or [round(xs[0])]


def _mark(series: int, x: str, y: str) -> Markup:
    shape = Markup('<svg class="mark" x="{}" y="{}" overflow="visible"><path d="{}"/></svg>')
    return shape.format(x, y, SHAPES[series % len(SHAPES)])


def _upright(kind: str, axis: Axis, value: float) -> Markup:
    x = _percent(axis.place(value))
    return Markup('<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"/>').format(kind, x, x)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
