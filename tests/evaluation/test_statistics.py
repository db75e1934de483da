"""Intervals and tests against hand-computed values and statsmodels, and how often intervals hold the truth."""

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as peer_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from mede2.trainer.evaluation.answered import Answered
from mede2.trainer.evaluation.statistics import Estimate, Flips, Rate, flips, holm, mcnemar, mean, paired_difference


def answered(case, answer, right, sample=None, benchmark="medqa"):
    return Answered("Stage I", benchmark, case, "image", sample, "", "stop", 1, None, answer, right)


def verdicts(num_both, num_lost, num_gained, num_neither):
    """Verdicts of two models with so many questions of each kind."""
    first = [True] * num_both + [True] * num_lost + [False] * num_gained + [False] * num_neither
    second = [True] * num_both + [False] * num_lost + [True] * num_gained + [False] * num_neither
    return first, second


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"),
    [(0, 400, 0.0, 0.00951), (200, 400, 0.45124, 0.54876), (9, 10, 0.59585, 0.98212), (400, 400, 0.99049, 1.0)],
)
def test_wilson_intervals_by_hand(hits, num, low, high):
    """From Wilson's formula with z = 1.959964; 0 of n reaches z^2 / (n + z^2) = 3.84146 / 403.84146."""
    assert Rate(hits, num).interval == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize("num", [1, 2, 7, 75, 400, 100_000])
def test_wilson_intervals_are_those_of_statsmodels(num):
    for hits in sorted({0, 1, num // 3, num - 1, num}):
        assert Rate(hits, num).interval == pytest.approx(proportion_confint(hits, num, method="wilson"), abs=1e-7)


def test_none_and_all_end_exactly_at_the_bounds():
    for num in range(1, 2000):
        assert Rate(0, num).interval[0] == 0
        assert Rate(num, num).interval[1] == 1


def test_a_rate_is_written_in_per_cent():
    assert str(Rate(9, 10)) == "90.0 [59.6, 98.2]"


@pytest.mark.parametrize(("hits", "num"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_rate_is_refused(hits, num):
    with pytest.raises(ValueError, match=f"rate: {hits} hits of {num}"):
        Rate(hits, num)


def test_verdicts_that_stand_alone_get_wilsons_interval():
    assert mean([True] * 9 + [False], range(10)) == Estimate(0.9, *Rate(9, 10).interval, 10)
    assert mean([0.0] * 400, range(400)) == Estimate(0, *Rate(0, 400).interval, 400)


def test_the_bootstrap_of_two_clusters_by_hand():
    """Means of clusters a and b are 0 and 2 / 3; drawn are aa, ab, ba, bb, a quarter each, so 0 and 2 / 3 are the ends,
    and the mean of all is 2 of 5, not the mean of the means."""
    found = mean([0, 0, 1, 1, 0], ["a", "a", "b", "b", "b"])
    assert found == Estimate(0.4, 0.0, pytest.approx(2 / 3), 5)


def test_the_bootstrap_of_unequal_clusters_divides_by_the_answers_drawn():
    """8 clusters of one wrong answer and 1 of 8 right ones: with it once the mean is 8 / 16, twice 16 / 23, three times
    24 / 30, four times 32 / 37. P(none) = 0.346, P(<= 3) = 0.986, P(<= 2) = 0.929: the ends are 0 and 24 / 30."""
    found = mean([0] * 8 + [1] * 8, [*range(8)] + [8] * 8)
    assert (found.value, found.low, found.high) == (0.5, 0.0, pytest.approx(0.8))


def test_the_bootstrap_is_near_the_normal_interval_of_independent_values():
    values = np.random.default_rng(1).uniform(size=400)
    found = mean(values, range(400), seed=5)
    half = 1.959964 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_answers_that_are_copies_leave_the_interval_as_it_is():
    values = np.random.default_rng(0).uniform(size=40)
    alone = mean(values, range(40))
    copied = mean(np.repeat(values, 9), np.repeat(range(40), 9).tolist())
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert (copied.num, alone.num) == (360, 40)


def test_order_and_names_do_not_matter_but_the_seed_does():
    rng = np.random.default_rng(2)
    values, clusters = rng.uniform(size=90), np.arange(90) // 3
    order = rng.permutation(90)
    found = mean(values, clusters.tolist())
    again = mean(values[order], [("image", str(cluster)) for cluster in clusters[order]])
    assert (again.low, again.high) == pytest.approx((found.low, found.high), abs=1e-12)
    assert mean(values, clusters.tolist(), seed=1) != found


def test_resamples_drawn_in_several_parts_make_one_interval(monkeypatch):
    values, clusters = np.random.default_rng(3).uniform(size=30), list(range(30))
    whole = mean(values, clusters)
    monkeypatch.setattr("mede2.trainer.evaluation.statistics.DRAWN_AT_ONCE", 30 * 7)  # 2000 is no multiple of 7
    assert mean(values, clusters) == whole


@pytest.mark.parametrize("verdict", [0, 1])
def test_clusters_all_right_or_all_wrong_count_once_each(verdict):
    found = mean([verdict] * 60, np.repeat(range(20), 3).tolist())
    assert (found.low, found.high) == pytest.approx(Rate(20 * verdict, 20).interval, abs=1e-9)
    assert (found.value, found.num) == (verdict, 60)


def test_one_cluster_says_little():
    """u = 3.84146 / 4.84146 = 0.79345 around a mean of 0.75."""
    found = mean([1, 1, 1, 0], ["a"] * 4)
    assert found == Estimate(0.75, pytest.approx(0.15491, abs=1e-5), pytest.approx(0.94836, abs=1e-5), 4)


def test_clusters_of_equal_means_are_alike_within_rounding():
    """0.1 + 0.1 + 0.1 is not 0.3: without a tolerance this were an interval of width 1e-17."""
    found = mean([0.1] * 5, ["a", "a", "a", "b", "c"])
    share = 1.959964**2 / (3 + 1.959964**2)
    assert (found.low, found.high) == pytest.approx((0.1 - 0.1 * share, 0.1 + 0.9 * share))


def test_bounds_are_those_of_the_figure():
    share = 1.959964**2 / (10 + 1.959964**2)
    found = mean([2.0] * 10, range(10), bounds=(1, 5))
    assert found == Estimate(2, pytest.approx(2 - share), pytest.approx(2 + 3 * share), 10)
    assert mean([1.0] * 10, range(10), bounds=(1, 5)).low == 1  # scores, not verdicts


def test_a_paired_difference_by_hand():
    """Differences of cluster means are -1 and 1: drawn are -1, 0, 0, 1."""
    assert paired_difference([1, 1, 0], [0, 0, 1], ["a", "a", "b"]) == Estimate(pytest.approx(-1 / 3), -1, 1, 3)


def test_a_paired_difference_is_narrower_than_that_of_strangers():
    """Same verdicts but 10 gained and 2 lost: the spread is that of the 12, (12 / 200 - 0.04^2)^0.5 / 200^0.5."""
    first, second = verdicts(94, 2, 10, 94)
    found = paired_difference(first, second, range(200))
    half = 1.959964 * (12 / 200 - 0.04**2) ** 0.5 / 200**0.5
    assert found.value == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((0.04 - half, 0.04 + half), abs=0.15 * half)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [(0, 0, -1, 1), (1, 1, -1, 1), (0, 1, 1 - 2, 1), (1, 0, -1, -1 + 2)],
)
def test_a_difference_that_never_varies_keeps_a_width(first, second, low, high):
    """The ends are a share u = 3.84146 / 103.84146 of the way to -1 and 1."""
    found = paired_difference([first] * 100, [second] * 100, range(100))
    value, share = second - first, 0.0369935
    assert found.value == value
    assert found.low == pytest.approx(value + share * (-1 - value), abs=1e-6)
    assert found.high == pytest.approx(value + share * (1 - value), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "values: empty"),
        ([0, 1], ["a"], "clusters: 1 for 2 values"),
        ([0, 1], ["a", "b", "a"], "clusters: 3 for 2 values"),
        ([0, 1.5], ["a", "b"], "1.5 is not between 0 and 1"),
        ([0, float("nan")], ["a", "b"], "nan is not between 0 and 1"),
    ],
)
def test_what_has_no_mean_is_refused(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        mean(values, clusters)


@pytest.mark.parametrize("compare", [lambda a, b: paired_difference(a, b, "abc"), mcnemar, flips])
def test_only_the_same_questions_are_compared(compare):
    with pytest.raises(ValueError, match="3 and 2 long"):
        compare([True, True, False], [True, False])
    with pytest.raises(ValueError, match="0 and 0 long"):
        compare([], [])


@pytest.mark.parametrize(
    ("num_lost", "num_gained", "expected"),
    [
        (0, 0, 1.0),
        (4, 4, 1.0),  # twice more than a half is no chance
        (0, 5, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (5, 1, 2 * (1 + 6) / 2**6),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_by_hand(num_lost, num_gained, expected):
    assert mcnemar(*verdicts(7, num_lost, num_gained, 3)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_lost", "num_gained"), [(3, 11), (40, 40), (480, 560), (2400, 2600), (5000, 5000)])
def test_mcnemar_is_that_of_statsmodels(num_lost, num_gained):
    expected = peer_mcnemar([[50, num_lost], [num_gained, 60]], exact=True).pvalue
    assert mcnemar(*verdicts(50, num_lost, num_gained, 60)) == pytest.approx(expected, rel=1e-8)


def test_mcnemar_takes_verdicts_alone():
    with pytest.raises(ValueError, match=r"0\.5 is no verdict"):
        mcnemar([True, 0.5], [True, False])


def test_holm_by_hand():
    """Sorted: 0.01 x 4, 0.02 x 3, then 0.025 x 2 = 0.05 and 0.03 x 1 = 0.03, raised to the 0.06 before them."""
    assert holm([0.03, 0.01, 0.025, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.5]) == [1, 1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(4)
    for num in (2, 3, 17):
        p_values = rng.uniform(size=num) ** 4
        p_values[-1] = p_values[0]  # a tie
        assert holm(p_values.tolist()) == pytest.approx(multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_holm_takes_p_values_alone(value):
    with pytest.raises(ValueError, match="p-value"):
        holm([0.5, value])


def test_flips_by_hand():
    """Lost; gained; another wrong answer; the same in other letters; unread twice; unread then wrong; lost, unread."""
    said = [("a", "b"), ("b", "a"), ("b", "c"), ("A  lung.", "a lung"), (None, None), (None, "b"), ("a", None)]
    right = [(True, False), (False, True), (False, False), (True, True), (False, False), (False, False), (True, False)]
    first, second = ([answered(str(i), said[i][turn], right[i][turn]) for i in range(7)] for turn in (0, 1))
    assert flips(first, second) == Flips(to_wrong=2, to_right=1, changed=5, num=7)
    assert flips(second, first) == Flips(to_wrong=1, to_right=2, changed=5, num=7)


@pytest.mark.parametrize("other", [{"case": "2"}, {"case": "1", "sample": 3}, {"case": "1", "benchmark": "slake"}])
def test_flips_are_of_the_same_questions(other):
    with pytest.raises(ValueError, match="flips: "):
        flips([answered("1", "a", True)], [answered(answer="a", right=True, **other)])


NUM_DATA_SETS = 300


def holds(interval):
    """The share of data sets whose interval holds the true mean, 0.6: 40 images, 5 questions each, of a chance of being
    right that differs by image (beta distribution of mean 0.6, intraclass correlation 1 / 3)."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(NUM_DATA_SETS):
        right = rng.uniform(size=(40, 5)) < rng.beta(1.2, 0.8, size=(40, 1))
        found = interval(right.ravel(), np.repeat(range(40), 5).tolist())
        hits += found.low <= 0.6 <= found.high
    return hits / NUM_DATA_SETS


def test_intervals_of_clustered_verdicts_hold_the_truth_19_times_in_20():
    """With 300 data sets chance leaves 0.95 within 0.025 nearly always (2 standard errors); a little less is the
    percentile interval's own with 40 clusters."""
    assert 0.91 <= holds(mean) <= 0.985


def test_intervals_that_ignore_clusters_are_too_narrow():
    """The variance is 1 + 4 / 3 times that of single questions: 1.96 / 2.33^0.5 = 1.28 standard errors hold 80 %."""
    assert holds(lambda right, _: mean(right, range(len(right)))) < 0.86
    assert holds(lambda right, _: mean(0.999 * right + 0.0006, range(len(right)))) < 0.86  # the bootstrap's own
