"""The study's tables: each arm's rates over the seeds, its errors by criterion, and how arms differ.

Two kinds of chance are kept apart. The interval of a difference is over the cases: what other held-out cases might have
given to these very models. What other seeds might give shows in the values of the single seeds, and in nothing else:
from three values no interval is worth its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mede2.trainer.demo.cases import CRITERIA, Case
from mede2.trainer.demo.errors import errors
from mede2.trainer.demo.score import judge
from mede2.trainer.demo.study import Arm
from mede2.trainer.evaluation.statistics import Estimate, holm, mcnemar, paired_difference

RATES = ("accuracy", "format", "grounding", "soundness")
ERRORS = (*CRITERIA, "unreadable")
SIGNIFICANT = 0.05

Verdicts = Mapping[str, Sequence[bool]]  # by name of a rate or an error, one for each case


@dataclass(frozen=True)
class Difference:
    """An arm minus another, in one rate or one kind of error.

    Attributes:
        arm, other: names of the arms.
        measure: of `RATES`, or the criterion that the arm leaves out.
        estimate: the mean over the seeds, with the interval over the cases for these very runs.
        by_seed: the differences of the single seeds.
        p_values: McNemar's for each seed, adjusted by Holm's method over all differences of all seeds.
    """

    arm: str
    other: str
    measure: str
    estimate: Estimate
    by_seed: tuple[float, ...]
    p_values: tuple[float, ...]


def verdicts(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, list[bool]]:
    """What is right and what is wrong about a model's answers to the cases, for each of `RATES` and `ERRORS`."""
    judged = [judge(case, text) for case, text in zip(cases, answers, strict=True)]
    failed = [errors(case, text) for case, text in zip(cases, answers, strict=True)]
    return {name: [getattr(verdict, name) for verdict in judged] for name in RATES} | {
        name: [name in names for names in failed] for name in ERRORS
    }


def compare(arms: Sequence[Arm], of: Mapping[str, Sequence[Verdicts]]) -> list[Difference]:
    """Every arm with those that it is compared with.

    Args:
        arms: of the study.
        of: by name of the arm, the verdicts for each seed, the same seeds and the same cases for each.
    """
    found = []
    for arm, other in [(one, other) for one in arms for other in one.against]:
        for measure in (*RATES, *filter(None, [arm.left_out])):
            pairs = [(theirs[measure], ours[measure]) for theirs, ours in zip(of[other], of[arm.name], strict=True)]
            first, second = ([hit for pair in pairs for hit in pair[side]] for side in (0, 1))
            of_the_same_case = [case for theirs, _ in pairs for case in range(len(theirs))]
            estimate = paired_difference(first, second, of_the_same_case)
            found.append((arm.name, other, measure, estimate, pairs))
    adjusted = iter(holm([mcnemar(*pair) for *_, pairs in found for pair in pairs]))
    return [
        Difference(
            arm, other, measure, estimate,
            tuple((sum(ours) - sum(theirs)) / len(ours) for theirs, ours in pairs),
            tuple(next(adjusted) for _ in pairs),
        )
        for arm, other, measure, estimate, pairs in found
    ]  # fmt: skip


def tables(titles: Mapping[str, str], of: Mapping[str, Sequence[Verdicts]], differences: Sequence[Difference]) -> str:
    """The tables as Markdown, in per cent.

    Args:
        titles: of the rows, by name of the model, in their order.
        of: see `compare`; a model that has no seed has one set of verdicts.
        differences: of `compare`.
    """
    num = len(of[next(iter(titles))][0]["accuracy"])
    parts = [f"{num} unseen cases, per cent: the mean over the seeds (each seed)"]
    parts.append(_rates(titles, of, RATES))
    parts.append("Answers with an error, by criterion; one whose chain cannot be read counts as that alone")
    parts.append(_rates(titles, of, ERRORS))
    if differences:
        parts.append(
            "Points more than another arm has: the mean over the seeds [95 % interval over the cases] (each seed; "
            f"* McNemar's p, by Holm over all of these, below {SIGNIFICANT})"
        )
    for other in dict.fromkeys(difference.other for difference in differences):
        rows: dict[str, list[str]] = {}
        for difference in differences:
            if difference.other == other:
                rows.setdefault(difference.arm, [titles[difference.arm]]).append(_difference(difference))
        width = max(map(len, rows.values()))
        headings = (f"more than {titles[other]}", *RATES, "errors of the criterion left out")[:width]
        parts.append(_table(headings, [row + [""] * (width - len(row)) for row in rows.values()]))
    return "\n\n".join(parts) + "\n"


def _rates(titles: Mapping[str, str], of: Mapping[str, Sequence[Verdicts]], names: Sequence[str]) -> str:
    return _table(("", *names), [[title, *(_rate(of[arm], name) for name in names)] for arm, title in titles.items()])


def _rate(seeds: Sequence[Verdicts], name: str) -> str:
    values = [sum(seed[name]) / len(seed[name]) for seed in seeds]
    each = f" ({', '.join(f'{100 * value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{100 * sum(values) / len(values):.1f}{each}"


def _difference(difference: Difference) -> str:
    estimate = difference.estimate
    each = ", ".join(
        f"{100 * value:+.1f}{'*' if p < SIGNIFICANT else ''}"
        for value, p in zip(difference.by_seed, difference.p_values, strict=True)
    )
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}] ({each})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
