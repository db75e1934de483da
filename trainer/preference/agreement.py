"""Agreement of raters on scores 1 to 5: Cohen's and Fleiss' kappa, Krippendorff's alpha, with bootstrap intervals.

statsmodels and krippendorff compute them; they are an extra, imported where they are used.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mede2.trainer.preference.rubric import SCORES
from mede2.trainer.preference.scored import Place

NUM_RESAMPLES = 500
Ratings = Mapping[str, Mapping[Place, float]]  # rater -> answer -> score


@dataclass(frozen=True)
class Estimate:
    """A figure over `num` answers or pairs with its 95 % interval.

    `value` is None where the figure is not defined (nobody's scores vary, or nothing was scored twice), and so is the
    interval where that holds for more than 1 in 20 of the resamples.
    """

    value: float | None
    low: float | None
    high: float | None
    num: int


def cohen(first: Mapping[Place, int], second: Mapping[Place, int], seed: int = 0) -> Estimate:
    """Cohen's kappa of two raters over the answers that both scored, quadratic weights (Cohen 1968)."""
    from statsmodels.stats.inter_rater import cohens_kappa

    places = sorted(first.keys() & second.keys())
    cells = np.array([(first[place] - 1) * len(SCORES) + second[place] - 1 for place in places], dtype=int)
    indicators = np.eye(len(SCORES) ** 2)[cells]  # (answers, 25); their sum is the table of the two

    def figure(rows: np.ndarray) -> float:
        table = rows.sum(0).reshape(len(SCORES), len(SCORES))
        return cohens_kappa(table, wt="quadratic", return_results=False)

    return bootstrap(figure, indicators, [case for case, _ in places], seed)


def fleiss(ratings: Ratings, seed: int = 0) -> Estimate:
    """Fleiss' kappa (Fleiss 1971), nominal, over the answers that every rater scored."""
    from statsmodels.stats.inter_rater import fleiss_kappa

    places = sorted(set.intersection(*(set(scores) for scores in ratings.values())))
    return bootstrap(fleiss_kappa, _counts(ratings, places, SCORES), [case for case, _ in places], seed)


def alpha(ratings: Ratings, seed: int = 0) -> Estimate:
    """Krippendorff's alpha (Krippendorff 2011), ordinal, over the answers with two scores or more. Scores need not be
    whole."""
    import krippendorff

    num_scores = Counter(place for scores in ratings.values() for place in scores)
    places = sorted(place for place, num in num_scores.items() if num > 1)
    domain = sorted({*SCORES, *(score for scores in ratings.values() for score in scores.values())})

    def figure(rows: np.ndarray) -> float:
        return krippendorff.alpha(value_counts=rows, value_domain=domain, level_of_measurement="ordinal")

    return bootstrap(figure, _counts(ratings, places, domain), [case for case, _ in places], seed)


def bootstrap(figure: Callable[[np.ndarray], float], rows: np.ndarray, cases: Sequence[str], seed: int = 0) -> Estimate:
    """A figure of the rows with its percentile interval over cases drawn again with replacement (Efron 1979; by case,
    as what belongs to one case stands or falls together).

    Args:
        figure: of rows (num, ...); may be NaN where it is not defined.
        rows: one for each answer or pair.
        cases: the case of each row.
    """
    if not len(rows):
        return Estimate(None, None, None, 0)
    names, case = np.unique(cases, return_inverse=True)
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing varies: 0 / 0, which is told as None
        value = float(figure(rows))
        times = (
            np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(NUM_RESAMPLES)
        )
        drawn = np.array([float(figure(np.repeat(rows, num[case], axis=0))) for num in times])
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value):
        return Estimate(None, None, None, len(rows))
    if len(defined) < 0.95 * NUM_RESAMPLES:
        return Estimate(value, None, None, len(rows))
    low, high = np.quantile(defined, (0.025, 0.975))
    return Estimate(value, float(low), float(high), len(rows))


def _counts(ratings: Ratings, places: Sequence[Place], domain: Sequence[float]) -> np.ndarray:
    """(answers, scores): how many raters gave an answer each score."""
    counts = np.zeros((len(places), len(domain)), dtype=int)
    column = {score: i for i, score in enumerate(domain)}
    for row, place in enumerate(places):
        for scores in ratings.values():
            if place in scores:
                counts[row, column[scores[place]]] += 1
    return counts
