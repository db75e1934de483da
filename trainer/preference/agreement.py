"""Agreement of raters on scores 1 to 5: Cohen's and Fleiss' kappa, Krippendorff's alpha, with bootstrap intervals."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

SCORES = (1, 2, 3, 4, 5)
NUM_RESAMPLES = 1000
Ratings = Mapping[str, Mapping[Hashable, int]]  # rater -> item -> score


@dataclass(frozen=True)
class Estimate:
    """A figure over `num` items with its 95 % percentile interval.

    `value` is None where the figure is not defined (nobody's scores vary, or no item has two of them), and so is the
    interval where that holds for more than 1 in 20 of the resamples.
    """

    value: float | None
    low: float | None
    high: float | None
    num: int


def cohen(first: Mapping[Hashable, int], second: Mapping[Hashable, int], seed: int = 0) -> Estimate:
    """Cohen's kappa of two raters over the items that both scored, quadratic weights (Cohen 1968)."""
    items = sorted(first.keys() & second.keys(), key=repr)
    cells = np.array([(first[item] - 1) * len(SCORES) + second[item] - 1 for item in items], dtype=int)
    indicators = np.eye(len(SCORES) ** 2)[cells]  # (items, 25): summed over items they are the table of the two

    def figure(rows: np.ndarray) -> float:
        table = rows.sum(0).reshape(len(SCORES), len(SCORES))
        return cohens_kappa(table, wt="quadratic", return_results=False)

    return bootstrap(figure, indicators, seed)


def fleiss(ratings: Ratings, seed: int = 0) -> Estimate:
    """Fleiss' kappa (Fleiss 1971), nominal, over the items that every rater scored."""
    shared = set.intersection(*(set(scores) for scores in ratings.values())) if len(ratings) > 1 else set()
    return bootstrap(fleiss_kappa, _counts(ratings, shared), seed)


def alpha(ratings: Ratings, seed: int = 0) -> Estimate:
    """Krippendorff's alpha (Krippendorff 2011), ordinal, over the items with two scores or more."""
    every = set().union(*ratings.values())
    counts = _counts(ratings, every)
    counts = counts[counts.sum(1) > 1]

    def figure(rows: np.ndarray) -> float:
        return krippendorff.alpha(value_counts=rows, value_domain=SCORES, level_of_measurement="ordinal")

    return bootstrap(figure, counts, seed)


def agreement(ratings: Ratings, seed: int = 0) -> dict[str, Estimate]:
    """Every figure for these raters: `cohen A | B` for each two of them, `fleiss`, `alpha`."""
    figures = {
        f"cohen {first} | {second}": cohen(ratings[first], ratings[second], seed)
        for first, second in combinations(sorted(ratings), 2)
    }
    return figures | {"fleiss": fleiss(ratings, seed), "alpha": alpha(ratings, seed)}


def bootstrap(figure: Callable[[np.ndarray], float], rows: np.ndarray, seed: int) -> Estimate:
    """A figure of the rows (one per item) and its interval over rows drawn again with replacement (Efron 1979)."""
    num = len(rows)
    if num == 0:
        return Estimate(None, None, None, 0)
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # no variance: 0 / 0, which is told as None
        value = float(figure(rows))
        drawn = np.array([float(figure(rows[rng.integers(num, size=num)])) for _ in range(NUM_RESAMPLES)])
    defined = drawn[np.isfinite(drawn)]
    low = high = None
    if np.isfinite(value) and len(defined) >= 0.95 * NUM_RESAMPLES:
        low, high = (float(bound) for bound in np.quantile(defined, (0.025, 0.975)))
    return Estimate(value if np.isfinite(value) else None, low, high, num)


def _counts(ratings: Ratings, items: set) -> np.ndarray:
    """(items, 5): how many raters gave an item each score."""
    counts = np.zeros((len(items), len(SCORES)), dtype=int)
    for row, item in enumerate(sorted(items, key=repr)):
        for scores in ratings.values():
            if item in scores:
                counts[row, scores[item] - 1] += 1
    return counts
