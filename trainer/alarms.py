"""Alarms over a run's metrics: known ways in which training goes wrong while the loss looks fine."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence

Row = dict[str, float]  # of metrics.jsonl
Reading = tuple[float, str]  # how near: 1 sounds the alarm, below CLEAR ends it; and what is seen, for people

WINDOW = 32  # updates that an alarm looks back on; fewer would take a few odd batches for a trend
CLEAR = 0.5  # well below 1, so that an alarm does not flicker about its threshold
STRONG = 0.7  # correlation: half of the variance; over 32 updates noise gives it once in 250,000 windows
PAID = 0.1  # of the margins by the chosen answers: less is the common small dip of DPO, not its failure
UNEQUAL = 0.05  # of an answer's length: answers nearer than that differ in what they say, not in how long they are
WRONG = 0.005  # share of pairs: the gradient of DPO fades with them
SPIKE = 10.0  # times the median: far beyond the spread of honest batches, well below a divergence
QUIET: Reading = (0.0, "")


def chosen_falls(rows: Sequence[Row]) -> Reading:
    """DPO widens the margin by pushing both answers down, the rejected one faster (arXiv 2402.13228).

    Judged on `rewards/chosen`, the chosen log-probability against the reference's: the raw one differs from batch to
    batch by the length of the answers.
    """
    if not _full(rows, "rewards/chosen", "rewards/margins"):
        return QUIET
    chosen, margins, time = _series(rows, "rewards/chosen"), _series(rows, "rewards/margins"), range(len(rows))
    level = min(
        -_correlation(time, chosen) / STRONG,
        1 + _correlation(time, margins) / STRONG,  # noisier, as both answers are in them: not falling is enough
        -statistics.fmean(chosen) / max(PAID * statistics.fmean(margins), 1e-9),
    )
    return level, (
        f"the chosen answers become less likely (rewards/chosen {chosen[0]:.3g} -> {chosen[-1]:.3g}) while margins "
        f"rise ({margins[0]:.3g} -> {margins[-1]:.3g}); raise the weight of nll in objective, or lower learning_rate"
    )


def length_drift(rows: Sequence[Row]) -> Reading:
    """The policy rewards length: batches whose chosen answers are the longer ones have the larger margins.

    The correlation of batch means estimates that of single pairs; the common trend over time is taken out.
    """
    if not _full(rows, "length/chosen", "length/rejected", "rewards/margins"):
        return QUIET
    chosen, rejected = _series(rows, "length/chosen"), _series(rows, "length/rejected")
    longer = [one - other for one, other in zip(chosen, rejected, strict=True)]
    margins, time = _series(rows, "rewards/margins"), range(len(rows))
    common = _correlation(longer, margins)
    of_longer, of_margins = _correlation(time, longer), _correlation(time, margins)
    free = (1 - of_longer**2) * (1 - of_margins**2)
    partial = (common - of_longer * of_margins) / math.sqrt(free) if free > 1e-12 else 0.0
    unequal = statistics.fmean(map(abs, longer)) / max(statistics.fmean(chosen), 1.0)
    return min(abs(partial) / STRONG, unequal / UNEQUAL), (
        f"margins follow the answers' length (correlation {partial:+.2f} of rewards/margins with length/chosen - "
        "length/rejected); balance the lengths of the pairs"
    )


def saturated(rows: Sequence[Row]) -> Reading:
    """Every pair is already ranked right: nothing is left to learn but larger margins."""
    if not _full(rows, "rewards/accuracies"):
        return QUIET
    wrong = 1 - statistics.fmean(_series(rows, "rewards/accuracies"))
    return WRONG / max(wrong, 1e-9), (
        f"{100 * (1 - wrong):.1f} % of the last {len(rows)} batches' pairs are ranked right: little is left to learn; "
        "stop here, or train on harder pairs"
    )


def gradient_spike(rows: Sequence[Row]) -> Reading:
    """One gradient far above those before it: a broken row, or the start of a divergence."""
    *before, now = rows
    if not _full(before, "grad_norm", of=WINDOW - 1):
        return QUIET
    usual = statistics.median(_series(before, "grad_norm"))
    return now["grad_norm"] / (SPIKE * usual) if usual else 0.0, (
        f"grad_norm {now['grad_norm']:.3g}, {SPIKE:.0f} times and more the usual {usual:.3g}; look at this update's "
        "rows, or lower learning_rate"
    )


def not_finite(rows: Sequence[Row]) -> Reading:
    """A metric is NaN or infinite, as the loss on one held-out row may make it (the training loss stops the run)."""
    bad = [name for name, value in rows[-1].items() if not math.isfinite(value)]
    return float(len(bad)), f"not finite: {', '.join(bad)}"


ALARMS: tuple[Callable[[Sequence[Row]], Reading], ...] = (
    chosen_falls, length_drift, saturated, gradient_spike, not_finite,
)  # fmt: skip


class Alarms:
    """Which alarms sound, from the rows of the run so far; the same rows, fed again, put it in the same state."""

    def __init__(self):
        self.rows: deque[Row] = deque(maxlen=WINDOW)
        self.sounding: set[str] = set()

    def __call__(self, row: Row) -> tuple[dict[str, str], Row]:
        """Take the next update's row.

        Args:
            row: of metrics.jsonl; marks of its own alarms, as read back from the file, change nothing.

        An update that was left out (it has no grad_norm) is not among those that alarms look back on.

        Returns:
            the text of each alarm that starts now, by name; and the row's marks: `alarms/NAME` 1 while the alarm
            lasts, 0 where it ends, absent otherwise.
        """
        if "num_skipped" in row and "grad_norm" not in row:
            return {}, {f"alarms/{name}": 1.0 for name in self.sounding}
        self.rows.append(row)
        starting, marks = {}, {}
        for alarm in ALARMS:
            name = alarm.__name__
            level, text = alarm(tuple(self.rows))
            if name in self.sounding:
                marks[f"alarms/{name}"] = float(level >= CLEAR)
                if level < CLEAR:
                    self.sounding.remove(name)
            elif level >= 1:
                marks[f"alarms/{name}"] = 1.0
                self.sounding.add(name)
                starting[name] = text
        return starting, marks


def _full(rows: Sequence[Row], *names: str, of: int = WINDOW) -> bool:
    """Whether the window is full of rows that have the metrics: Stage I has no rewards."""
    return len(rows) == of and all(name in row for row in rows for name in names)


def _series(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's, and 0 where one of them never changes."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return 0.0
