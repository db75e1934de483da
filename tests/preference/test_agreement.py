"""Agreement figures against values worked out by hand and published examples; intervals that respect cases."""

import numpy as np
import pytest

from mede2.trainer.preference.agreement import Estimate, alpha, bootstrap, cohen, fleiss

NONE = None


def ratings(*raters):
    """Each rater's scores of answers to cases of their own; None where there is none."""
    return {
        f"rater {i}": {(f"case {n}", 0): score for n, score in enumerate(scores) if score is not None}
        for i, scores in enumerate(raters)
    }


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 5, 1, 5), (1, 5, 5, 5), 1 - 0.25 / 0.5),  # 1 in 4 apart; by chance .5 x .75 + .5 x .25
        ((1, 2, 3), (1, 2, 5), 1 - (4 / 3) / 4),  # squares apart 4 / 3; by chance (0+1+16+1+0+9+4+1+4) / 9
        ((1, 2, 4, 5), (1, 2, 4, 5), 1.0),
        ((1, 5), (5, 1), -1.0),
        ((1, 2, 3, None), (1, 2, 5, 4), 1 - (4 / 3) / 4),  # only what both scored
    ],
)
def test_cohens_kappa_by_hand(first, second, expected):
    found = cohen(*ratings(first, second).values())
    assert found.value == pytest.approx(expected)
    assert found.num == len([score for score in first if score])


def test_fleiss_kappa_of_the_published_example():
    """Ten subjects, fourteen raters, five categories: kappa 0.210 (Wikipedia's worked example)."""
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    by_subject = [[score + 1 for score, num in enumerate(row) for _ in range(num)] for row in counts]
    found = fleiss(ratings(*zip(*by_subject, strict=True)))
    assert found.value == pytest.approx(0.210, abs=0.0005)
    assert found.low < found.value < found.high
    assert found.num == 10


def test_fleiss_kappa_counts_what_everybody_scored():
    assert fleiss(ratings((1, 2, 3, 4), (1, 2, 3, None), (1, 2, None, None))).num == 2


def test_krippendorffs_alpha_of_the_published_example():
    """Four observers, twelve units with gaps: ordinal alpha 0.815 (Krippendorff 2011)."""
    found = alpha(ratings(
        (1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE),
        (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3),
        (NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE),
        (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE),
    ))  # fmt: skip
    assert found.value == pytest.approx(0.815, abs=0.0005)
    assert found.num == 11  # the last unit has one score
    assert found.low < found.value < found.high


def test_alpha_takes_the_means_of_several_judges():
    assert alpha(ratings((1.5, 2, 4.5), (1.5, 2, 4.5))).value == pytest.approx(1)
    assert alpha(ratings((1.5, 2, 4.5), (4, 2, 1))).value < 0


@pytest.mark.parametrize("figure", [fleiss, alpha, lambda both: cohen(*both.values())])
def test_a_figure_that_is_not_defined_is_none(figure):
    assert figure(ratings((5, 5, 5), (5, 5, 5))) == Estimate(None, None, None, 3)
    assert figure(ratings((5, 4, None), (None, None, 5))) == Estimate(None, None, None, 0)


def test_an_interval_that_most_resamples_do_not_have_is_none():
    found = cohen(*ratings((5, 1), (5, 1)).values())
    assert (found.value, found.low, found.high) == (pytest.approx(1), None, None)


def test_answers_of_one_case_count_as_one_when_cases_are_drawn():
    values = np.random.default_rng(0).normal(size=40)
    alone = bootstrap(np.mean, values, [f"{i:03d}" for i in range(40)])
    repeated = bootstrap(np.mean, np.repeat(values, 9), [f"{i:03d}" for i in range(40) for _ in range(9)])
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    assert repeated.num == 360


def test_the_interval_is_near_the_normal_one_and_the_same_each_time():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = bootstrap(np.mean, values, [str(i) for i in range(400)], seed=5)
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert found == bootstrap(np.mean, values, [str(i) for i in range(400)], seed=5)
