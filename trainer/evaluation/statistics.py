"""Figures with what chance leaves open: rates, means and paired differences with 95 % intervals, and paired tests.

Which interval holds when. Wilson's is for a count of verdicts that do not depend on each other: one answer to each
question, no two questions about one image. Where several answers belong together (questions about one image, drawn
answers to one question) it is too narrow, and what belongs together is drawn again together: the cluster bootstrap. Its
intervals are rather narrow below some 20 clusters.

McNemar's test takes every question for itself as well. Of several models call one better than another where the
p-value stays below 0.05 after `holm` over all comparisons that are shown, and the interval of the paired difference
does not contain 0.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mede2.trainer.answering.answers import plain
from mede2.trainer.evaluation.answered import Answered

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
NUM_RESAMPLES = 2000
DRAWN_AT_ONCE = 2_000_000  # clusters, 8 bytes each


@dataclass(frozen=True)
class Rate:
    """So many hits out of so many cases that do not depend on each other."""

    hits: int
    num: int

    def __post_init__(self) -> None:
        if self.num < 1 or not 0 <= self.hits <= self.num:
            raise ValueError(f"rate: {self.hits} hits of {self.num}; give 1 case or more, and 0 to that many hits")

    @property
    def value(self) -> float:
        return self.hits / self.num

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval (Wilson 1927), within 0..1."""
        centre = (self.hits + Z95**2 / 2) / (self.num + Z95**2)
        half = Z95 / (self.num + Z95**2) * math.sqrt(self.hits * (self.num - self.hits) / self.num + Z95**2 / 4)
        return centre - half if self.hits else 0.0, centre + half if self.hits < self.num else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, over `num` answers with its 95 % interval."""

    value: float
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class Flips:
    """Of `num` questions asked twice: how many verdicts turned wrong, how many right, how many answers changed."""

    to_wrong: int
    to_right: int
    changed: int
    num: int


def mean(
    values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """The mean of verdicts, or of other figures of answers, with its 95 % interval.

    Verdicts (0 or 1) that each have a cluster of their own get Wilson's interval. All else gets the percentile interval
    of 2000 resamples of the clusters (Efron 1979). Where every cluster has the same mean (all answers right, all wrong,
    or there is one cluster) no resample differs, and the interval would have no width; it then reaches as far as it
    would if a share u of the clusters lay at either bound, u = z^2 / (clusters + z^2) being Wilson's upper end for none
    seen. For verdicts that is Wilson's interval with each cluster counted once.

    Args:
        values: one for each answer.
        clusters: what each answer belongs to, such as its image or its question; drawn again together.
        seed: of the resampling. The order of the answers and the names of the clusters do not matter.
        bounds: the least and the most that a value can be.

    Raises:
        ValueError: no values, another number of clusters, or a value out of bounds.
    """
    given = _figures("values", values, bounds)
    alone = len(clusters) == len(set(clusters)) == len(given)
    if alone and np.isin(given, (0, 1)).all() and tuple(bounds) == (0, 1):
        rate = Rate(int(given.sum()), len(given))
        return Estimate(rate.value, *rate.interval, rate.num)
    return _bootstrap(given, clusters, seed, bounds)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Mean of `second` minus mean of `first` on the same questions, with the bootstrap interval of `mean`.

    Args:
        first, second: verdicts or other figures; the same place is the same question.
        clusters, seed, bounds: see `mean`.

    Raises:
        ValueError: as `mean`, or `first` and `second` differ in length.
    """
    _same_length(first, second)
    difference = _figures("second", second, bounds) - _figures("first", first, bounds)
    reach = bounds[1] - bounds[0]
    return _bootstrap(difference, clusters, seed, (-reach, reach))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The exact two-sided p-value of McNemar's test (1947): the chance that, of the questions with differing verdicts,
    so unequal a number turned each way if either way were as likely. 1 where no verdict differs.

    Args:
        first, second: verdicts; the same place is the same question.

    Raises:
        ValueError: none given, differing lengths, or what is no verdict.
    """
    _same_length(first, second)
    pairs = list(zip(first, second, strict=True))
    for verdict in (verdict for pair in pairs for verdict in pair):
        if verdict not in (0, 1):
            raise ValueError(f"McNemar's test: {verdict!r} is no verdict; give True and False")
    gained = sum(bool(after) and not before for before, after in pairs)
    lost = sum(bool(before) and not after for before, after in pairs)
    num, fewer = gained + lost, min(gained, lost)
    ways = tail = 1  # ways to choose 0 of num; whole numbers, as 2^-num is too small for a float from 1075 on
    for chosen in range(fewer):
        ways = ways * (num - chosen) // (chosen + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**num)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method (1979), in the order given.

    Raises:
        ValueError: a value not between 0 and 1.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"p-value {value!r}: give numbers from 0 to 1")
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def flips(first: Sequence[Answered], second: Sequence[Answered]) -> Flips:
    """How often verdict and answer changed from the questions as they are to the same questions under a probe.

    An answer has changed if its text has (as `plain` has it), or if only one of the two could be read.

    Args:
        first, second: answers to the same questions in the same order.

    Raises:
        ValueError: none given, differing lengths, or two different questions at one place.
    """
    _same_length(first, second)
    pairs = list(zip(first, second, strict=True))
    for before, after in pairs:
        if _question(before) != _question(after):
            raise ValueError(
                f"flips: {_question(before)} beside {_question(after)}; give answers to the same questions"
            )
    return Flips(
        to_wrong=sum(before.right and not after.right for before, after in pairs),
        to_right=sum(after.right and not before.right for before, after in pairs),
        changed=sum(_said(before) != _said(after) for before, after in pairs),
        num=len(pairs),
    )


def _question(answer: Answered) -> tuple[str, str, int | None]:
    return answer.benchmark, answer.case, answer.sample


def _said(answer: Answered) -> str | None:
    return None if answer.answer is None else plain(answer.answer)


def _same_length(first: Sequence, second: Sequence) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"first and second: {len(first)} and {len(second)} long; give as many of each, 1 or more")


def _figures(name: str, values: Sequence[float], bounds: tuple[float, float]) -> np.ndarray:
    """The values as (num,) fp64, checked."""
    given = np.asarray(values, dtype=float)
    if not given.size:
        raise ValueError(f"{name}: empty; there is no mean of nothing")
    within = (given >= bounds[0]) & (given <= bounds[1])
    if not within.all():
        raise ValueError(
            f"{name}: {given[~within][0]} is not between {bounds[0]:g} and {bounds[1]:g}; state other `bounds`"
        )
    return given


def _bootstrap(values: np.ndarray, clusters: Sequence[Hashable], seed: int, bounds: tuple[float, float]) -> Estimate:
    """See `mean`; values are (num,) fp64."""
    if len(clusters) != len(values):
        raise ValueError(f"clusters: {len(clusters)} for {len(values)} values; give one for each")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([number[cluster] for cluster in clusters])
    totals, sizes = np.bincount(member, weights=values), np.bincount(member)
    order = np.lexsort((sizes, totals))  # the same draws whatever the order of the answers
    totals, sizes = totals[order], sizes[order]
    num = len(totals)
    value = float(values.mean())
    if np.ptp(totals / sizes) <= 1e-12 * (bounds[1] - bounds[0]):
        elsewhere = Z95**2 / (num + Z95**2)
        low, high = (value + elsewhere * (bound - value) for bound in bounds)
        return Estimate(value, low, high, len(values))
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // num)
    means = []
    for start in range(0, NUM_RESAMPLES, at_once):
        drawn = rng.integers(num, size=(min(at_once, NUM_RESAMPLES - start), num))  # (resamples, clusters)
        means.append(totals[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(value, float(low), float(high), len(values))
