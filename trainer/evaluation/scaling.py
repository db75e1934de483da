"""Inference-time scaling: accuracy against the number n of answers drawn, by four ways to make one answer of n."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mede2.trainer.answering.answers import plain
from mede2.trainer.evaluation.answered import Answered
from mede2.trainer.evaluation.statistics import Estimate, mean
from mede2.trainer.preference.rubric import SCORES

NUM_SUBSETS = 2000  # the most that a vote is averaged over
COUNTED_AT_ONCE = 4_000_000  # votes, 8 bytes each
EQUAL = 1e-9  # sums of the same weights in another order differ by less


@dataclass(frozen=True)
class Point:
    """One point of the curve.

    Attributes:
        method: "pass@n", "majority", "mmrp vote" or "best of n".
        n: answers drawn for each question.
        accuracy: with its interval over questions.
        num_tokens: mean number of tokens generated for a question.
    """

    method: str
    n: int
    accuracy: Estimate
    num_tokens: float


@dataclass(frozen=True)
class Drawn:
    """All answers to Q questions, N to each.

    Attributes:
        right: (Q, N) 0 or 1.
        same: (Q, N, N) 1 where two answers of a question say the same; an answer that could not be read says nothing,
            and is not the same as itself either.
        scores: (Q, N) by the rules; None where no answer has one.
    """

    right: np.ndarray
    same: np.ndarray
    scores: np.ndarray | None


def scaling(answers: Sequence[Answered], seed: int = 0, clusters: Mapping[str, Hashable] | None = None) -> list[Point]:
    """The curve of one model on one benchmark from N answers drawn to each question, for n = 1, 2, 4, ... and N.

    What n answers come to is the expectation over the subsets of n of the N, not the first n:

    - pass@n: one of them is right; 1 - C(N - c, n) / C(N, n) for c right ones (Chen et al. 2021, arXiv 2107.03374).
    - majority: what most of them say is right (self-consistency, arXiv 2203.11171). Answers say the same if their texts
      do, as `plain` has them. An answer that could not be read does not vote; if none could, the vote is wrong. Of
      answers with equal votes one is drawn by lot: their mean counts.
    - mmrp vote: the same, each vote weighted by the mean score that the rules give to its answer.
    - best of n: the answer with the best of these scores, readable or not, is right; of equal ones the mean counts.

    pass@n and best of n are exact. The votes are exact where there are at most 2000 subsets (every n up to N = 13, and
    n = 1 and N always), and otherwise the mean over 2000 that are drawn with `seed`, the same for all questions.
    An answer that the rules could not judge has the lowest score, 1. If they judged none at all, the two methods that
    need a score are left out.

    Args:
        answers: of one model to one benchmark under one probe, in any order.
        seed: of the subsets and the resamples.
        clusters: what each question belongs to (see `statistics.mean`), by its id, such as its image; None: each stands
            alone.

    Returns:
        By method, then n.

    Raises:
        ValueError: no answers, several models, benchmarks or probes, a greedy answer, an answer that is there twice, or
            questions with differing numbers of answers.
    """
    drawn = _by_question(answers)
    if clusters is not None and (missing := [question for question in drawn if question not in clusters]):
        raise ValueError(f"clusters: none for question {missing[0]!r}; give one for each, or None")
    belongs = [question if clusters is None else clusters[question] for question in drawn]
    table = _tabulate(list(drawn.values()))
    num = table.right.shape[1]
    tokens = sum(answer.num_tokens for answer in answers) / len(answers)
    methods = {
        "pass@n": lambda n: _any_right(table, n),
        "majority": lambda n: _vote(table, np.ones_like(table.right), _subsets(num, n, seed)),
    }
    if table.scores is not None:
        methods |= {
            "mmrp vote": lambda n: _vote(table, table.scores, _subsets(num, n, seed)),
            "best of n": lambda n: _best(table, n),
        }
    return [
        Point(name, n, mean(accuracy(n).clip(0, 1), belongs, seed), n * tokens)  # sums of parts may pass 1 by 1e-16
        for name, accuracy in methods.items()
        for n in sorted({*(2**i for i in range(num.bit_length())), num})
    ]


def _by_question(answers: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The answers of each question in the order of their samples, questions in the order of their ids."""
    if not answers:
        raise ValueError("scaling: no answers; draw several to each question")
    for field in ("model", "benchmark", "probe"):
        if len(several := sorted({getattr(answer, field) for answer in answers})) > 1:
            raise ValueError(f"scaling: answers with {field} {', '.join(several)}; give those of one")
    drawn: dict[str, dict[int, Answered]] = {}
    for answer in answers:
        if answer.sample is None:
            raise ValueError(f"scaling: the greedy answer to {answer.case!r}; give those that were drawn")
        samples = drawn.setdefault(answer.case, {})
        if samples.setdefault(answer.sample, answer) is not answer:
            raise ValueError(f"scaling: sample {answer.sample} of {answer.case!r} twice; give each once")
    most = max(drawn, key=lambda case: len(drawn[case]))
    for case, samples in drawn.items():
        if len(samples) < len(drawn[most]):
            raise ValueError(
                f"scaling: {len(samples)} answers to {case!r} and {len(drawn[most])} to {most!r}; draw as many to each"
            )
    return {case: [drawn[case][sample] for sample in sorted(drawn[case])] for case in sorted(drawn)}


def _tabulate(questions: Sequence[Sequence[Answered]]) -> Drawn:
    codes = np.array([list(_codes(question)) for question in questions])
    scores = np.array([[np.nan if a.mmrp is None else a.mmrp for a in question] for question in questions], dtype=float)
    judged = np.isfinite(scores)
    return Drawn(
        right=np.array([[a.right for a in question] for question in questions], dtype=float),
        same=((codes[:, :, None] == codes[:, None, :]) & (codes[:, :, None] >= 0)).astype(float),
        scores=np.where(judged, scores, SCORES[0]) if judged.any() else None,
    )


def _codes(question: Sequence[Answered]) -> Iterator[int]:
    """A number for what each answer says; -1 for one that could not be read."""
    numbers: dict[str, int] = {}
    for answer in question:
        yield -1 if answer.answer is None else numbers.setdefault(plain(answer.answer), len(numbers))


def _any_right(drawn: Drawn, n: int) -> np.ndarray:
    """(Q,) pass@n."""
    num = drawn.right.shape[1]
    chance = [1 - math.comb(num - right, n) / math.comb(num, n) for right in range(num + 1)]
    return np.array(chance)[drawn.right.sum(1).astype(int)]


def _best(drawn: Drawn, n: int) -> np.ndarray:
    """(Q,) best of n: an answer's level is the best of a subset in C(<=, n) - C(<, n) of the C(N, n), where so many
    answers score no more, and less; the level is then shared equally by its answers."""
    num = drawn.right.shape[1]
    less = (drawn.scores[:, :, None] > drawn.scores[:, None, :]).sum(2)  # (Q, N)
    no_more = (drawn.scores[:, :, None] >= drawn.scores[:, None, :]).sum(2)
    share = np.array([math.comb(ranked, n) / math.comb(num, n) for ranked in range(num + 1)])
    return (drawn.right * (share[no_more] - share[less]) / (no_more - less)).sum(1)


def _vote(drawn: Drawn, weights: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """(Q,) accuracy of the vote of the answers in a subset, mean over (N, S) subsets; weights are (Q, N)."""
    at_once = max(1, COUNTED_AT_ONCE // subsets.size)
    parts = []
    for start in range(0, len(weights), at_once):
        part = slice(start, start + at_once)
        votes = (drawn.same[part] * weights[part, None, :]) @ subsets  # (questions, N, S): for what each answer says
        top = votes.max(1, keepdims=True)
        won = (votes >= top - EQUAL) & (subsets > 0)  # who voted for a winner
        parts.append(_mean_over_winners(won, weights[part], drawn.right[part]))
    return np.concatenate(parts)


def _mean_over_winners(won: np.ndarray, weights: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(questions,) mean over subsets of the share of right ones among the winners' votes.

    Winners have equal votes, so that each winner counts once. Where no answer could be read all have equal votes, none,
    and none is right.
    """
    of_winners = np.einsum("qns,qn->qs", won, weights)
    of_right = np.einsum("qns,qn->qs", won, weights * right)
    return (of_right / of_winners).mean(1)


def _subsets(num: int, n: int, seed: int) -> np.ndarray:
    """(num, S) 0 or 1: which answers a subset of n has; all subsets, or NUM_SUBSETS drawn where there are more."""
    if math.comb(num, n) <= NUM_SUBSETS:
        chosen = np.array(list(combinations(range(num), n)))
    else:
        chosen = np.random.default_rng(seed).random((NUM_SUBSETS, num)).argsort(1)[:, :n]
    member = np.zeros((len(chosen), num))
    np.put_along_axis(member, chosen, 1, axis=1)
    return member.T
