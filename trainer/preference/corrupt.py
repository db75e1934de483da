"""Pairs for ablations: a good answer, and the same answer spoiled in one way, labelled by the criterion it offends."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click

from mede2.trainer.answering.progress import Progress
from mede2.trainer.preference.edits import EDITS, Spoilt, spoil
from mede2.trainer.preference.scored import Scored, read_inputs
from mede2.trainer.preference.select import (
    Policy,
    good,
    left_out_file,
    policy_help,
    preference_row,
    print_outcome,
    provenance,
    read_policy,
    unusable,
)
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row, write_rows


@dataclass(frozen=True)
class Corruption:
    """A good answer and what one edit made of it: None where it offers nothing, `reason` where it is not used."""

    answer: Scored
    edit: str
    spoilt: Spoilt | None
    reason: str | None


def corruptions(case: Case, answers: Sequence[Scored], edits: Sequence[str], policy: Policy) -> Iterator[Corruption]:
    """Every edit tried on the best good answer of a case, in an order that the seed decides; of those that succeed
    `pairs_per_case` are used."""
    order = sorted(answers, key=lambda scored: scored.answer.sample)
    rng = random.Random(f"{policy.seed} {case.id}")
    rng.shuffle(order)
    fit = [scored for scored in order if not unusable(scored) and good(scored, policy)]
    if not fit:
        return
    best = max(fit, key=lambda scored: mean(scored.scores.values()))
    used = 0
    for edit in rng.sample(list(edits), len(edits)):
        spoilt = spoil(best.answer.text, edit, policy.seed, case.options)
        reason = None
        if spoilt is None:
            reason = f"{edit}: nothing to corrupt this way"
        elif used == policy.pairs_per_case:
            reason = "more pairs than pairs_per_case"
        used += reason is None
        yield Corruption(best, edit, spoilt, reason)


def corruption_row(case: Case, folder: Path, made: Corruption, policy: Policy) -> Row:
    """The pair as Stage II reads it; nobody judged the spoilt answer, so it has no scores."""
    answer = made.answer.answer
    meta = {
        "case": case.id,
        "chosen_sample": answer.sample,
        "rejected_sample": None,
        "criterion": EDITS[made.edit].criterion,
        "kind": made.edit,
        "edit": {"before": made.spoilt.before, "after": made.spoilt.after},
        "scores": {"chosen": made.answer.scores, "rejected": None},
        "policy": dataclasses.asdict(policy),
        "provenance": {"chosen": provenance(made.answer), "rejected": {"sample": answer.key, "edit": made.edit}},
    }
    return preference_row(case, folder, answer.text, made.spoilt.text, meta)


def corrupt(
    cases: Mapping[str, Case],
    answers: Mapping[str, Sequence[Scored]],
    edits: Sequence[str],
    policy: Policy,
    folder: Path,
) -> tuple[list[Row], list[Row]]:
    """Rows of pairs, and a row for each edit of a case that made none: {"case", "sample", "edit", "reason"}."""
    pairs, left_out = [], []
    with Progress("cases", len(answers)) as progress:
        for name, scored in answers.items():
            tried = list(corruptions(cases[name], scored, edits, policy))
            if not tried:
                left_out.append({"case": name, "sample": None, "edit": None, "reason": "a case without a good answer"})
            for made in tried:
                if made.reason is None:
                    pairs.append(corruption_row(cases[name], folder, made, policy))
                else:
                    place = {"case": name, "sample": made.answer.answer.sample}
                    left_out.append(place | {"edit": made.edit, "reason": made.reason})
            progress.advance()
    return pairs, left_out


@click.command(
    "corrupt",
    help=__doc__,
    short_help="Good answers spoiled along one criterion, for ablations.",
    epilog="\b\nSettings of a policy (those of chosen answers count here):\n" + policy_help(),
)
@click.option("--cases", required=True, metavar="FILE")
@click.option("--samples", required=True, metavar="FILE")
@click.option("--judgements", required=True, metavar="FILE")
@click.option("--output", required=True, metavar="FILE", help="Pairs; NAME.left_out.jsonl goes beside them.")
@click.option(
    "--edit", "edits", multiple=True, type=click.Choice(list(EDITS)), help="Only these; all of them otherwise."
)
@click.option("--policy", "policy_file", metavar="FILE.yaml", help="Settings as YAML.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; see below.")
def command(cases, samples, judgements, output, edits, policy_file, assignments) -> None:
    policy = read_policy(policy_file, assignments)
    inputs = read_inputs(cases, samples, judgements)
    target = Path(output)
    pairs, left_out = corrupt(inputs.cases, inputs.answers(policy.judge), edits or list(EDITS), policy, target.parent)
    write_rows(left_out_file(target), left_out)
    write_rows(target, pairs)
    print_outcome(Counter(row["meta"]["kind"] for row in pairs), Counter(row["reason"] for row in left_out), output)
