"""Pairs from judged answers by a stated policy: which is chosen, which rejected, and why each other one is neither."""

import dataclasses
import functools
import heapq
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.records import parse_record
from mede2.trainer.preference.rubric import CRITERIA, SCORES
from mede2.trainer.preference.scored import Scored, read_inputs
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row, write_rows
from mede2.trainer.resolution import parse_assignments, read_recipe
from mede2.trainer.settings import ENHANCE

SHINGLE = 3  # words
KINDS = ("wrong", "hard")  # of rejected answers: a wrong one, or a right one whose reasoning is bad
UNITS = {"tokens": lambda answer: answer.num_tokens, "characters": lambda answer: len(answer.text)}


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Policy:
    """Which pairs are made; written into every row."""

    judge: str | None = _setting(None, "whose judgements count; null where there is one judge")
    floor: float = _setting(4, "a chosen answer is correct and has at least this on every criterion that was judged")
    criteria: tuple[str, ...] = _setting(CRITERIA, "the criteria by which a rejected answer may be worse")
    min_gap: float = _setting(2, "on one of them it scores lower by at least this; less is a tie")
    hard_share: float | None = _setting(
        None,
        "share of the pairs whose rejected answer is correct and badly reasoned, kept to within one pair; what is too "
        "much of either kind is left out; null takes them as they come",
    )
    length_ratio: float = _setting(1.5, "the longer answer of a pair has at most this many times the other's length")
    length_unit: str = _setting("tokens", "tokens or characters")
    similarity: float = _setting(0.95, "answers that share this much of their three-word shingles are near-duplicates")
    pairs_per_case: int = _setting(2, "at most so many pairs of a case")
    seed: int = _setting(0, "decides between equals")

    def __post_init__(self):
        object.__setattr__(self, "criteria", tuple(self.criteria) if isinstance(self.criteria, list) else self.criteria)

        def number(name: str, low: float, high: float, kinds: type = int | float) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "a whole number" if kinds is int else "a number"
                raise ValueError(f"policy: {name}: {what} from {low} to {high}, not {value!r}")

        number("floor", SCORES[0], SCORES[-1])
        number("min_gap", 0.01, SCORES[-1] - SCORES[0])
        number("length_ratio", 1, math.inf)
        number("similarity", 0.01, 1)
        number("pairs_per_case", 1, 10**6, int)
        number("seed", 0, 2**63, int)
        if self.hard_share is not None:
            number("hard_share", 0, 1)
        if self.length_unit not in UNITS:
            raise ValueError(f"policy: length_unit: {' or '.join(UNITS)}, not {self.length_unit!r}")
        if not isinstance(self.criteria, tuple) or not self.criteria or not set(self.criteria) <= set(CRITERIA):
            raise ValueError(f"policy: criteria: a list of some of {', '.join(CRITERIA)}, not {self.criteria!r}")
        if not isinstance(self.judge, str | None):
            raise ValueError(f"policy: judge: the name of a judge, not {self.judge!r}")


def read_policy(file: str | None, assignments: Sequence[str]) -> Policy:
    """A policy from a YAML file of its settings, with `key=value`s over it."""
    values = (read_recipe(file) if file else {}) | parse_assignments(assignments)
    names = [item.name for item in dataclasses.fields(Policy)]
    if unknown := sorted(values.keys() - set(names), key=str):
        raise ValueError(f"policy: {unknown[0]}: unknown; there are {', '.join(names)}")
    return Policy(**values)


@dataclass(frozen=True)
class Pair:
    """Two answers to a case; `criterion` is that on which they differ most, by `gap`."""

    case: str
    chosen: Scored
    rejected: Scored
    kind: str
    criterion: str
    gap: float


@dataclass(frozen=True)
class LeftOut:
    """A sample that is in no pair (None: a case that has none), and why."""

    case: str
    sample: int | None
    reason: str


def select(
    cases: Mapping[str, Sequence[Scored]], policy: Policy, advance: Callable[[], None] = lambda: None
) -> tuple[list[Pair], list[LeftOut]]:
    """Pairs from the answers of cases, in the order of the cases, the widest gap first.

    Every sample is in a pair or left out with its reason. Deterministic in the arguments; `advance` is called behind
    each case.
    """
    candidates: dict[str, list[Pair]] = {}
    reasons: dict[tuple[str, int], str] = {}
    for case, answers in cases.items():
        candidates[case], why = _candidates(case, answers, policy)
        reasons |= {(case, sample): reason for sample, reason in why.items()}
        advance()
    pairs = _allot(candidates, policy)
    taken = {id(pair) for pair in pairs}
    per_case = Counter(pair.case for pair in pairs)
    for case, found in candidates.items():
        full = per_case[case] >= policy.pairs_per_case
        for pair in found:
            if id(pair) not in taken:
                reason = "more pairs than pairs_per_case" if full else "hard_share: too many of its kind"
                reasons[case, pair.rejected.answer.sample] = f"rejected: {reason}"
    used = {scored.answer.place for pair in pairs for scored in (pair.chosen, pair.rejected)}
    left_out = []
    for case, answers in cases.items():
        other = "another good answer was taken" if per_case[case] else "no worse answer to set it against"
        for answer in answers:
            if answer.answer.place not in used:
                left_out.append(LeftOut(*answer.answer.place, reasons.get(answer.answer.place, f"good: {other}")))
        if not answers:
            left_out.append(LeftOut(case, None, "a case without samples"))
    return pairs, left_out


def good(scored: Scored, policy: Policy) -> bool:
    """Whether a usable answer may be chosen."""
    judgement = scored.judgement
    return bool(judgement.correct) and judgement.well_formed and min(scored.scores.values()) >= policy.floor


def unusable(scored: Scored) -> str | None:
    """Why an answer can be neither chosen nor rejected, if it cannot."""
    if scored.judgement is None:
        return "not judged"
    if scored.answer.finish != "stop":
        return "cut off at the length limit"
    if not scored.scores:
        return "unjudged" if scored.judgement.well_formed else "unjudged: not <think>...</think> <answer>...</answer>"
    if scored.judgement.correct is None:
        return "unjudged: right or wrong cannot be told"
    return None


def _candidates(case: str, answers: Sequence[Scored], policy: Policy) -> tuple[list[Pair], dict[int, str]]:
    """For each worse answer of a case the pair with the good one that it differs from most; the widest gap first. With
    them the reasons of those that have none."""
    order = sorted(answers, key=lambda scored: scored.answer.sample)
    random.Random(f"{policy.seed} {case}").shuffle(order)  # every sort below is stable: equals stay in this order
    reasons = {scored.answer.sample: reason for scored in order if (reason := unusable(scored))}
    usable = [scored for scored in order if scored.answer.sample not in reasons]
    chosen = [scored for scored in usable if good(scored, policy)]
    pairs = []
    for rejected in (scored for scored in usable if not good(scored, policy)):
        partners = [(*_gap(scored, rejected, policy), scored) for scored in chosen]
        judged = [partner for partner in partners if partner[1] > -math.inf]
        wide = [partner for partner in judged if partner[1] >= policy.min_gap]
        matched = [partner for partner in wide if _length_ratio(partner[2], rejected, policy) <= policy.length_ratio]
        unlike = [partner for partner in matched if not _alike(partner[2], rejected, policy)]
        if not unlike:
            reasons[rejected.answer.sample] = "rejected: " + (
                "no good answer of its case" if not partners
                else "no criterion was judged in it and in a good answer" if not judged
                else "a tie with every good answer on the criteria" if not wide
                else "no good answer of like length" if not matched
                else "a near-duplicate of the good answer"
            )  # fmt: skip
            continue
        criterion, gap, best = min(
            unlike, key=lambda partner: (-partner[1], _length_ratio(partner[2], rejected, policy))
        )
        pairs.append(Pair(case, best, rejected, KINDS[rejected.judgement.correct], criterion, gap))
    pairs.sort(key=lambda pair: -pair.gap)
    distinct: list[Pair] = []
    for pair in pairs:
        if any(_alike(pair.rejected, other.rejected, policy) for other in distinct):
            reasons[pair.rejected.answer.sample] = "rejected: a near-duplicate of another rejected answer"
        else:
            distinct.append(pair)
    return distinct, reasons


def _allot(candidates: Mapping[str, Sequence[Pair]], policy: Policy) -> list[Pair]:
    """The pairs to keep: `pairs_per_case` at most, the kinds in their share.

    With a share, pairs are taken one by one, always of the kind that keeps the share nearest, until that kind is used
    up. The next pair is of the case with the fewest so far; of these, of one that has no other kind to give.
    """
    if policy.hard_share is None:
        return [pair for found in candidates.values() for pair in found[: policy.pairs_per_case]]
    order = sorted(candidates)
    random.Random(policy.seed).shuffle(order)
    rank = {case: i for i, case in enumerate(order)}
    waiting = {
        kind: {case: [pair for pair in found if pair.kind == kind][::-1] for case, found in candidates.items()}
        for kind in KINDS
    }
    heaps = {kind: [] for kind in KINDS}
    for case, found in candidates.items():
        kinds = {pair.kind for pair in found}
        for kind in kinds:
            heapq.heappush(heaps[kind], (0, len(kinds), rank[case], case))
    taken: dict[str, list[Pair]] = defaultdict(list)
    counts = Counter()
    while True:
        kind = KINDS[counts["hard"] + 0.5 <= policy.hard_share * (counts.total() + 1)]
        pair = _next(heaps[kind], waiting[kind], taken, policy.pairs_per_case)
        if pair is None:
            return [pair for case in candidates for pair in sorted(taken[case], key=lambda pair: -pair.gap)]
        taken[pair.case].append(pair)
        counts[kind] += 1


def _next(heap: list, waiting: Mapping[str, list[Pair]], taken: Mapping[str, list[Pair]], most: int) -> Pair | None:
    """The next pair of one kind. An entry of the heap may be out of date; it is then put back where it belongs."""
    while heap:
        num, kinds, rank, case = heapq.heappop(heap)
        if len(taken[case]) >= most or not waiting[case]:
            continue
        if len(taken[case]) > num:
            heapq.heappush(heap, (len(taken[case]), kinds, rank, case))
            continue
        heapq.heappush(heap, (num + 1, kinds, rank, case))
        return waiting[case].pop()
    return None


def _gap(chosen: Scored, rejected: Scored, policy: Policy) -> tuple[str, float]:
    """The named criterion on which the two differ most (the first of equals) and by how much; -inf where none was
    judged in both."""
    scores, others = chosen.scores, rejected.scores
    gaps = {name: scores[name] - others[name] for name in policy.criteria if name in scores and name in others}
    return max(gaps.items(), key=lambda item: item[1], default=("", -math.inf))


def _length_ratio(first: Scored, second: Scored, policy: Policy) -> float:
    lengths = sorted(UNITS[policy.length_unit](scored.answer) for scored in (first, second))
    return lengths[1] / lengths[0] if lengths[0] else math.inf


def _alike(first: Scored, second: Scored, policy: Policy) -> bool:
    return similarity(first.answer.text, second.answer.text) >= policy.similarity


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of three-word shingles (Broder 1997), 0 to 1; by letters and digits alone."""
    shingles = [_shingles(first), _shingles(second)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@functools.lru_cache(maxsize=1024)  # the answers of a case are compared each with each
def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def preference_row(case: Case, folder: Path, chosen: str, rejected: str, meta: Row) -> Row:
    """A row as Stage II reads it, from a file in `folder`; what the case says of itself goes into `meta` too.

    Raises:
        BadRow: Stage II could not read it.
    """
    described = {name: case.meta[name] for name in ("specialty", "modality", "license") if name in case.meta}
    row = {
        "prompt": list(case.prompt),
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        "images": [os.path.relpath(image, folder) for image in case.images],
        "meta": meta | described,
    }
    parse_record(json.dumps(row), f"case {case.id}", folder, ENHANCE)
    return row


def pair_meta(pair: Pair, policy: Policy) -> Row:
    """What a row says of where it comes from."""
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "case": pair.case,
        "chosen_sample": pair.chosen.answer.sample,
        "rejected_sample": pair.rejected.answer.sample,
        "criterion": pair.criterion,
        "kind": pair.kind,
        "scores": {side: scored.scores for side, scored in sides.items()},
        "policy": dataclasses.asdict(policy),
        "provenance": {side: provenance(scored) for side, scored in sides.items()},
    }


def provenance(scored: Scored) -> Row:
    """Who wrote an answer, who judged it by what, and the keys under which both are found."""
    judgement = scored.judgement
    return {
        "sample": scored.answer.key, "model": scored.answer.model,
        "judgement": judgement.key, "judge": judgement.judge, "rubric": judgement.rubric,
    }  # fmt: skip


def left_out_file(output: Path) -> Path:
    """Where a step says what it left out: pairs.jsonl -> pairs.left_out.jsonl."""
    return output.with_suffix(".left_out.jsonl")


def policy_help() -> str:
    """A line for each setting."""
    fields = dataclasses.fields(Policy)
    return "\n".join(f"  {item.name}={json.dumps(item.default)}  {item.metadata['help']}" for item in fields)


@click.command(
    "select",
    help=__doc__,
    short_help="Pairs from judged answers by a stated policy.",
    epilog="\b\nSettings of a policy, with their defaults:\n" + policy_help(),
)
@click.option("--cases", required=True, metavar="FILE")
@click.option("--samples", required=True, metavar="FILE")
@click.option("--judgements", required=True, metavar="FILE")
@click.option("--output", required=True, metavar="FILE", help="pairs.jsonl; pairs.left_out.jsonl goes beside it.")
@click.option("--policy", "policy_file", metavar="FILE.yaml", help="Settings as YAML.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; see below.")
def command(cases: str, samples: str, judgements: str, output: str, policy_file: str | None, assignments) -> None:
    policy = read_policy(policy_file, assignments)
    inputs = read_inputs(cases, samples, judgements)
    answers = inputs.answers(policy.judge)
    with Progress("cases", len(answers)) as progress:
        pairs, left_out = select(answers, policy, progress.advance)
    target = Path(output)
    rows = [
        preference_row(
            inputs.cases[pair.case],
            target.parent,
            pair.chosen.answer.text,
            pair.rejected.answer.text,
            pair_meta(pair, policy),
        )
        for pair in pairs
    ]
    write_rows(left_out_file(target), map(dataclasses.asdict, left_out))
    write_rows(target, rows)
    print_outcome(Counter(pair.kind for pair in pairs), Counter(row.reason for row in left_out), output)
    if policy.hard_share is not None:
        spared = sum(row.reason.startswith("rejected: hard_share") for row in left_out)
        click.echo(f"hard_share {policy.hard_share:g} left out {spared} pairs; --set hard_share=null keeps them")


def print_outcome(made: Counter, left_out: Counter, output: str) -> None:
    """What was made, by kind, and what was left out, by reason."""
    kinds = ", ".join(f"{num} {kind}" for kind, num in sorted(made.items()))
    click.echo(f"{made.total()} pairs{f' ({kinds})' if kinds else ''} in {output}")
    click.echo(f"left out: {left_out.total()}, each with its reason in {left_out_file(Path(output))}")
    for reason, num in left_out.most_common():
        click.echo(f"{num:8d}  {reason}")
