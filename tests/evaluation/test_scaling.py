"""Scaling curves by hand, and against every subset of the drawn answers counted one by one."""

from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest

from mede2.trainer.evaluation import scaling as module
from mede2.trainer.evaluation.answered import Answered
from mede2.trainer.evaluation.scaling import scaling
from mede2.trainer.evaluation.statistics import mean

KEY = "a"


def drawn(case, said, scores=None, num_tokens=10, **other):
    """Answers to one question, one for each letter of `said`; "-" could not be read, and "a" is right."""
    return [
        Answered(
            **dict(model="Stage I", benchmark="medqa", case=case, probe="image", text="", finish="stop", rung=None)
            | dict(sample=sample, num_tokens=num_tokens, answer=None if letter == "-" else letter)
            | dict(right=letter == KEY, mmrp=scores and scores[sample])
            | other
        )
        for sample, letter in enumerate(said)
    ]


def accuracies(answers, **settings):
    return {(point.method, point.n): point.accuracy.value for point in scaling(answers, **settings)}


def random_answers(num_questions, num, seed=0):
    rng = np.random.default_rng(seed)
    said = [["aab-", "aabcd--", "abc"][question % 3] for question in range(num_questions)]
    scores = [[rng.choice([None, 1, 2, 2.5, 10 / 3, 5]) for _ in range(num)] for _ in said]
    return [
        answer
        for question, letters in enumerate(said)
        for answer in drawn(f"q{question}", rng.choice(list(letters), size=num), scores[question], question)
    ]


def by_count(method, answers, n):
    """Mean over every subset of n, each question's answers counted in plain Python."""
    questions = defaultdict(list)
    for answer in answers:
        questions[answer.case].append(answer)
    figures = []
    for question in questions.values():
        outcomes = [method(subset) for subset in combinations(question, n)]
        figures.append(sum(outcomes) / len(outcomes))
    return sum(figures) / len(figures)


def any_right(subset):
    return any(answer.right for answer in subset)


def vote(subset, weight=lambda answer: 1):
    votes = Counter()
    for answer in subset:
        if answer.answer is not None:
            votes[answer.answer] += weight(answer)
    winners = [said for said, num in votes.items() if num > max(votes.values()) - 1e-6]
    return winners.count(KEY) / len(winners) if winners else 0


def score(answer):
    return 1 if answer.mmrp is None else answer.mmrp


def best(subset):
    top = [answer.right for answer in subset if score(answer) == max(map(score, subset))]
    return sum(top) / len(top)


BY_COUNT = {"pass@n": any_right, "majority": vote, "mmrp vote": lambda subset: vote(subset, score), "best of n": best}


@pytest.mark.parametrize("num", [1, 2, 3, 6, 8])
def test_every_method_is_the_mean_over_all_subsets(num):
    answers = random_answers(12, num)
    found = accuracies(answers)
    assert {method for method, _ in found} == set(BY_COUNT)
    for (method, n), value in found.items():
        assert value == pytest.approx(by_count(BY_COUNT[method], answers, n), abs=1e-12), (method, n)


def test_a_vote_over_too_many_subsets_is_near_the_mean_over_all():
    """12 870 subsets of 8 of 16 answers, 2000 of them drawn: an accuracy of one question is known to 0.5 / 2000^0.5,
    that is 0.011, and the mean of 12 to 0.0032."""
    answers = random_answers(12, 16)
    found = accuracies(answers)
    for method in ("majority", "mmrp vote"):
        exact = by_count(BY_COUNT[method], answers, 8)
        assert found[method, 8] == pytest.approx(exact, abs=0.01)
        assert found[method, 8] != exact
        assert found[method, 4] == pytest.approx(by_count(BY_COUNT[method], answers, 4), abs=1e-12)  # 1820: all
    assert accuracies(answers) == found
    assert accuracies(answers, seed=1)["majority", 8] != found["majority", 8]


def test_a_drawn_subset_has_n_answers():
    """The only answer that could be read is in a subset of 8 of 16 half the time; 4 standard errors are 0.045."""
    assert accuracies(drawn("1", "a" + 15 * "-"))["majority", 8] == pytest.approx(1 / 2, abs=0.045)


@pytest.mark.parametrize("num", range(2, 14))
def test_all_right_is_1_whatever_the_scores(num):
    """Sums of shares that pass 1 by rounding are still accuracies."""
    scores = [1 + i % 4 for i in range(num)]
    assert all(value == pytest.approx(1) for value in accuracies(drawn("1", num * "a", scores)).values())


def test_pass_at_n_by_hand():
    """2 of 4 right: no right one among 2 in 1 of 6 pairs."""
    found = accuracies(drawn("1", "abab"))
    assert [found["pass@n", n] for n in (1, 2, 4)] == pytest.approx([1 / 2, 5 / 6, 1])


def test_majority_by_hand():
    """Of a a b -: singles are right in 2 of 4; of the pairs aa, a- and a- are right, ab and ab half, b- wrong."""
    found = accuracies(drawn("1", "aab-"))
    assert [found["majority", n] for n in (1, 2, 4)] == pytest.approx([1 / 2, (3 + 2 * 0.5) / 6, 1])
    assert "mmrp vote" not in {method for method, _ in found}


@pytest.mark.parametrize(
    ("said", "expected"),
    [("aabb", 1 / 2), ("abcd", 1 / 4), ("a---", 1), ("b---", 0), ("----", 0), ("bbaa-ccdd", 1 / 4), ("bba", 0)],
)
def test_majority_of_all_counts_winners_equally(said, expected):
    assert accuracies(drawn("1", said))["majority", len(said)] == pytest.approx(expected)


def test_open_answers_vote_by_their_plain_words():
    """Three ways to write the right answer outvote a wrong one that is there twice."""
    words = ("Left lung", "left  lung.", "LEFT LUNG", "right lung", "right lung")
    answers = [
        answer
        for sample, text in enumerate(words)
        for answer in drawn("1", "-", sample=sample, answer=text, right=sample < 3)
    ]
    assert accuracies(answers)["majority", 5] == 1


@pytest.mark.parametrize(
    ("said", "scores", "expected"),
    [
        ("abb", (5, 2, 2), 1),  # 5 against 4
        ("abb", (4, 2, 2), 1 / 2),
        ("abb", (3, 2, 2), 0),
        ("aaabb", (1, 1, 4 / 3, 5 / 3, 5 / 3), 1 / 2),  # equal but for rounding
        ("a-", (1, 5), 1),  # what could not be read does not vote
        ("abb", (3, None, None), 1),  # unjudged votes weigh 1
        ("abb", (2, None, None), 1 / 2),
    ],
)
def test_votes_weigh_as_much_as_their_scores(said, scores, expected):
    assert accuracies(drawn("1", said, scores))["mmrp vote", len(said)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "scores", "expected"),
    [
        ("abb", (5, 4, 4), 1),
        ("abb", (4, 4, 4), 1 / 3),
        ("abb", (4, 5, 4), 0),
        ("a-", (4, 5), 0),  # the best may be one that could not be read
        ("ab", (2, None), 1),
        ("ab", (1, None), 1 / 2),  # unjudged is 1
    ],
)
def test_the_best_of_all(said, scores, expected):
    assert accuracies(drawn("1", said, scores))["best of n", len(said)] == pytest.approx(expected)


def test_the_best_of_some_by_hand():
    """Scores 5 (wrong), 4 (right), 4 (wrong), 1 (right): of 6 pairs 3 hold the 5; 4 and 4 is half; 4 right and 1 is
    right; 4 wrong and 1 is wrong."""
    found = accuracies(drawn("1", "baba", (5, 4, 4, 1)))
    assert [found["best of n", n] for n in (1, 2, 4)] == pytest.approx([1 / 2, 1.5 / 6, 0])


def test_points_are_in_order_and_count_tokens():
    """Questions of 10 and 30 tokens an answer: 20 on average, n times."""
    points = scaling(drawn("1", "aabaab", num_tokens=10) + drawn("2", "bbbbba", num_tokens=30))
    assert [(point.method, point.n, point.num_tokens) for point in points] == [
        (method, n, 20 * n) for method in ("pass@n", "majority") for n in (1, 2, 4, 6)
    ]


def test_the_order_of_the_answers_does_not_matter():
    answers = random_answers(20, 15)
    shuffled = [answers[i] for i in np.random.default_rng(1).permutation(len(answers))]
    assert scaling(shuffled) == scaling(answers)


def test_questions_in_parts_are_those_at_once(monkeypatch):
    answers = random_answers(20, 5)
    whole = scaling(answers)
    monkeypatch.setattr(module, "COUNTED_AT_ONCE", 160)
    assert scaling(answers) == whole


def test_intervals_are_over_questions_or_what_they_belong_to():
    """1 of 2 right, 2 of 2 or none: pass@1 is the mean of (1/2, 1, 0) over questions."""
    answers = [answer for i in range(30) for answer in drawn(f"q{i:02d}", ("ab", "aa", "bb")[i % 3])]
    shares = [(0.5, 1, 0)[i % 3] for i in range(30)]
    images = {f"q{i:02d}": i % 6 for i in range(30)}
    assert scaling(answers)[0].accuracy == mean(shares, range(30))
    assert scaling(answers, clusters=images)[0].accuracy == mean(shares, [i % 6 for i in range(30)])


def test_the_seed_is_that_of_the_resamples_too():
    """pass@n draws no subsets, so that only its interval can differ."""
    first, second = (scaling(random_answers(40, 7), seed=seed)[1].accuracy for seed in (0, 3))
    assert first.value == second.value
    assert first.low != second.low


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "no answers"),
        (drawn("1", "ab") + drawn("2", "ab", model="Stage II"), "model Stage I, Stage II"),
        (drawn("1", "ab") + drawn("2", "ab", benchmark="slake"), "benchmark medqa, slake"),
        (drawn("1", "ab") + drawn("2", "ab", probe="blank"), "probe blank, image"),
        (drawn("1", "a", sample=None), "the greedy answer to '1'"),
        (drawn("1", "ab") + drawn("1", "b"), "sample 0 of '1' twice"),
        (drawn("1", "ab") + drawn("2", "abb"), "2 answers to '1' and 3 to '2'"),
    ],
)
def test_what_makes_no_curve_is_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        scaling(answers)


def test_a_question_that_belongs_nowhere_is_refused():
    with pytest.raises(ValueError, match="none for question '2'"):
        scaling(drawn("1", "ab") + drawn("2", "ab"), clusters={"1": "image"})
