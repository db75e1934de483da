"""Several judges together: the mean, the median or the worst of their scores, weighted."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mede2.trainer.files import hash_json
from mede2.trainer.preference.judgements import Judgement, Score
from mede2.trainer.preference.rubric import CRITERIA

COMBINATIONS = ("mean", "median", "worst")


def combine(how: str, judgements: Sequence[Judgement], weights: Mapping[str, float]) -> Judgement:
    """What several judges together say of one answer.

    A judge's two orders count as one judge, by their mean. A judge without a score on a criterion, or with weight 0,
    does not count there; `counted` says how many did.

    Args:
        how: "mean", "median" (the smallest score with half of the weight at or below it; the mean of two scores where
            the half falls just between them) or "worst".
        judgements: of one answer, by one rubric; those of judges that `weights` does not name do not count.
        weights: of the judges, by name, in the order in which the combination names them.
    """
    scores, counted = {}, {}
    for criterion in CRITERIA:
        votes = []
        for judge, weight in weights.items():
            if weight and (vote := _vote(criterion, [one for one in judgements if one.judge == judge])):
                votes.append((judge, weight, vote))
        counted[criterion] = len(votes)
        if not votes:
            scores[criterion] = Score(None, None, "no judge has a score")
            continue
        value = _together(how, [(vote.score, weight) for _, weight, vote in votes])
        judge, _, nearest = min(votes, key=lambda vote: (abs(vote[2].score - value), vote[2].score))
        scores[criterion] = Score(value, nearest.evidence, f"{judge}: {nearest.note}")
    names = [name if weight == 1 else f"{weight:g}*{name}" for name, weight in weights.items()]
    judge = f"{how}({','.join(names)})"
    key = hash_json([judge, [one.key for one in judgements if one.judge in weights]])
    problem = None if any(counted.values()) else "no judge has a score"
    return replace(
        judgements[0], judge=judge, scores=None if problem else scores, problem=problem, key=key, order=0,
        position=None, counted=counted,
    )  # fmt: skip


def _vote(criterion: str, orders: Sequence[Judgement]) -> Score | None:
    """What one judge says on a criterion: the mean of its orders, with the first one's evidence."""
    said = [score for one in orders if one.scores and (score := one.scores[criterion]).score is not None]
    if not said:
        return None
    return Score(statistics.fmean(score.score for score in said), said[0].evidence, said[0].note)


def _together(how: str, votes: Sequence[tuple[float, float]]) -> float:
    """One score from (score, weight) of each judge."""
    if how == "worst":
        return min(score for score, _ in votes)
    total = sum(weight for _, weight in votes)
    if how == "mean":
        return sum(score * weight for score, weight in votes) / total
    ordered, below = sorted(votes), 0.0
    for place, (score, weight) in enumerate(ordered):
        below += weight
        if 2 * below == total:
            return (score + ordered[place + 1][0]) / 2
        if 2 * below > total:
            return score
    raise AssertionError("weights are positive")
