"""What came of the cases, in figures: counts, scores, pairs, biases, agreement, the rules' quality; pairs to read."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np

from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.images import Window
from mede2.trainer.data.records import BadRow, Record, message_text, read_records
from mede2.trainer.data.thumbnails import thumbnail
from mede2.trainer.files import write_json, write_text
from mede2.trainer.preference.agreement import Ratings, alpha, bootstrap, cohen, fleiss
from mede2.trainer.preference.judgements import Judgement
from mede2.trainer.preference.rubric import CRITERIA, DEFAULT, SCORES, read_rubric
from mede2.trainer.preference.scored import Inputs, Place, read_inputs, scores
from mede2.trainer.preference.select import left_out_file
from mede2.trainer.questions.rows import Row, read_rows
from mede2.trainer.settings import ENHANCE

NOT_STATED = "not stated"


def read_labels(path: Path, places: set[Place]) -> dict[str, dict[str, dict[Place, int]]]:
    """Scores that people gave, {rater: {criterion: {answer: score}}}, from rows {"case", "sample", "rater", "scores"}.

    Raises:
        BadRow: names file, line and field of a row that is none, or that labels an answer nobody gave or one again.
    """
    labels: dict[str, dict[str, dict[Place, int]]] = {}
    for source, row in read_rows(path, ("case", "sample", "rater", "scores")):
        place, rater, given = (row["case"], row["sample"]), row["rater"], row["scores"]
        if not isinstance(rater, str) or not rater.strip():
            raise BadRow(source, f"rater: a name, not {rater!r:.60}")
        if not all(isinstance(part, str | int) for part in place) or place not in places:
            raise BadRow(source, f"there is no sample {row['sample']!r:.60} of case {row['case']!r:.60}")
        if not isinstance(given, dict) or not given or not given.keys() <= set(CRITERIA):
            raise BadRow(source, f"scores: whole numbers for some of {', '.join(CRITERIA)}, not {given!r:.80}")
        for criterion, score in given.items():
            if isinstance(score, bool) or score not in SCORES:
                raise BadRow(source, f"scores.{criterion}: a whole number from 1 to 5, not {score!r:.60}")
            mine = labels.setdefault(rater, {}).setdefault(criterion, {})
            if place in mine:
                raise BadRow(source, f"{rater} scored {criterion} of sample {place[1]} of case {place[0]!r} before")
            mine[place] = int(score)
    return labels


def count_steps(inputs: Inputs, pairs: Sequence[Record], left_out: Iterable[Row]) -> Row:
    """How many rows each step had, and what became of the answers."""
    with_pairs = {str(record.meta.get("case")) for record in pairs}
    answered = {sample.case for sample in inputs.samples}
    per_judge = {}
    for judge, judgements in by_judge(inputs.judgements).items():
        first = [judgement for judgement in judgements if judgement.order == 0]
        per_judge[judge] = {
            "answers": len(first),
            "right": sum(judgement.correct is True for judgement in first),
            "wrong": sum(judgement.correct is False for judgement in first),
            "not well-formed": sum(not judgement.well_formed for judgement in first),
            "without scores": sum(not scores(judgement) for judgement in first),
            "judged twice": len(judgements) - len(first),
        }
    return {
        "cases": len(inputs.cases),
        "cases with answers": len(answered),
        "answers": len(inputs.samples),
        "answers cut off": sum(sample.finish != "stop" for sample in inputs.samples),
        "judgements": len(inputs.judgements),
        "pairs": len(pairs),
        "cases with pairs": len(with_pairs & inputs.cases.keys()),
        "by judge": per_judge,
        "left out": dict(Counter(row["reason"] for row in left_out).most_common()),
    }


def by_judge(judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    judges: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        judges.setdefault(judgement.judge, []).append(judgement)
    return judges


def distributions(judgements: Sequence[Judgement]) -> Row:
    """{judge: {criterion: {"counts": of scores rounded to 1..5, "mean", "not judged"}}}, of each answer's first
    judgement."""
    found = {}
    for judge, rows in by_judge(judgements).items():
        found[judge] = {}
        first = [scores(row) for row in rows if row.order == 0]
        for criterion in CRITERIA:
            given = [row[criterion] for row in first if criterion in row]
            counts = Counter(int(score + 0.5) for score in given)
            found[judge][criterion] = {
                "counts": [counts[score] for score in SCORES],
                "mean": fmean(given) if given else None,
                "not judged": len(first) - len(given),
            }
    return found


def tally_pairs(pairs: Sequence[Record]) -> Row:
    """Pairs by what their rows say of themselves."""
    names = ("criterion", "kind", "modality", "specialty")
    return {
        name: dict(Counter(str(record.meta.get(name, NOT_STATED)) for record in pairs).most_common()) for name in names
    }


def length_bias(pairs: Sequence[Record], seed: int = 0) -> Row:
    """How much longer the chosen answers are, in characters."""
    lengths = [tuple(len(answer_text(record, side)) for side in (0, 1)) for record in pairs]
    cases = [str(record.meta.get("case", i)) for i, record in enumerate(pairs)]
    rows = np.array(lengths, dtype=float).reshape(-1, 2)
    longer = (rows[:, 0] > rows[:, 1]) + 0.5 * (rows[:, 0] == rows[:, 1])
    return {
        "chosen": fmean(rows[:, 0]) if pairs else None,
        "rejected": fmean(rows[:, 1]) if pairs else None,
        "chosen minus rejected": asdict(bootstrap(np.mean, rows[:, 0] - rows[:, 1], cases, seed)),
        "share with the chosen one longer": asdict(bootstrap(np.mean, longer, cases, seed)),
    }


def order_bias(judgements: Sequence[Judgement], seed: int = 0) -> Row:
    """For each judge that judged answers twice, in both orders, by criterion: how much better an answer scores where it
    stands earlier, and how often its score stays the same."""
    found = {}
    for judge, rows in by_judge(judgements).items():
        twice: dict[Place, dict[int, Judgement]] = {}
        for row in rows:
            if row.position is not None:
                twice.setdefault((row.case, row.sample), {})[row.order] = row
        both = {place: orders for place, orders in twice.items() if orders.keys() == {0, 1}}
        if not both:
            continue
        found[judge] = {}
        for criterion in CRITERIA:
            gains, same, cases = [], [], []
            for (case, _), orders in both.items():
                earlier, later = sorted(orders.values(), key=lambda row: row.position)
                given = scores(earlier), scores(later)
                if criterion in given[0] and criterion in given[1]:
                    same.append(given[0][criterion] == given[1][criterion])
                    moved = earlier.position != later.position
                    gains.append(given[0][criterion] - given[1][criterion] if moved else np.nan)
                    cases.append(case)
            gain, moved = np.array(gains, dtype=float), np.isfinite(np.array(gains, dtype=float))
            found[judge][criterion] = {
                "earlier minus later": asdict(
                    bootstrap(np.mean, gain[moved], [case for case, m in zip(cases, moved, strict=True) if m], seed)
                ),
                "the same": asdict(bootstrap(np.mean, np.array(same, dtype=float), cases, seed)),
            }
    return found


def agreement(judgements: Sequence[Judgement], labels: Mapping[str, Mapping[str, Mapping[Place, int]]], seed: int = 0):
    """By criterion {figure: estimate}: Cohen's kappa of each two raters, Fleiss' kappa and Krippendorff's alpha of the
    judges, of the people and of all; combined judges, which need not give whole scores, with each person by alpha."""
    found = {}
    with Progress("agreement on criteria", len(CRITERIA)) as progress:
        for criterion in CRITERIA:
            judges, combined = {}, {}
            for judge, rows in by_judge(judgements).items():
                given = {(row.case, row.sample): scores(row).get(criterion) for row in rows if row.order == 0}
                given = {place: score for place, score in given.items() if score is not None}
                if given:
                    (judges if rows[0].counted is None else combined)[judge] = given
            people = {rater: mine[criterion] for rater, mine in labels.items() if criterion in mine}
            found[criterion] = {name: asdict(one) for name, one in _figures(judges, combined, people, seed)}
            progress.advance()
    return found


def _figures(judges: Ratings, combined: Ratings, people: Ratings, seed: int):
    every = {**judges, **people}
    names = list(every)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            yield f"Cohen's kappa, {first} and {second}", cohen(every[first], every[second], seed)
    for who, raters in {"judges": judges, "people": people, "judges and people": every}.items():
        if len(raters) > 1 and not (who == "judges and people" and not (judges and people)):
            yield f"Fleiss' kappa, {who}", fleiss(raters, seed)
            yield f"Krippendorff's alpha, {who}", alpha(raters, seed)
    for judge in combined:
        for person in people:
            both = {judge: combined[judge], person: people[person]}
            yield f"Krippendorff's alpha, {judge} and {person}", alpha(both, seed)


def rules_quality() -> list[Row]:
    """Precision and recall of the rule-based checks on labelled cases of the demo."""
    from mede2.trainer.preference.rule_quality import rule_quality

    return [
        asdict(one) | {"precision": one.precision, "recall": one.recall} for one in rule_quality(read_rubric(DEFAULT))
    ]


def examples(pairs: Sequence[Record], num: int, seed: int, redact: bool, window: Window = None) -> list[Row]:
    """Some pairs drawn at random, in the order of the file; with `redact` neither text nor image is among what is
    returned."""
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), min(num, len(pairs))))
    return [_example(pairs[i], redact, window) for i in drawn]


def _example(record: Record, redact: bool, window: Window) -> Row:
    meta = record.meta
    shown = {
        "case": meta.get("case"),
        "criterion": meta.get("criterion"),
        "kind": meta.get("kind"),
        "scores": {side: _stated_scores(meta, side) for side in ("chosen", "rejected")},
        "characters": {side: len(answer_text(record, i)) for i, side in enumerate(("chosen", "rejected"))},
        "num_images": len(record.images),
    }
    if redact:
        return shown
    prompt = record.conversations[0][: record.num_prompt_messages]
    return shown | {
        "prompt": [{"role": message["role"], "text": message_text(message)} for message in prompt],
        "chosen": answer_text(record, 0),
        "rejected": answer_text(record, 1),
        "images": [thumbnail(image, window) for image in record.images],
    }


def _stated_scores(meta: Mapping[str, Any], side: str) -> dict[str, float]:
    """What a row says that one answer scored; rows of other makers may say anything under `meta`, or nothing."""
    given = meta.get("scores")
    given = given.get(side) if isinstance(given, dict) else None
    return {
        name: score
        for name, score in (given if isinstance(given, dict) else {}).items()
        if isinstance(score, int | float)
    }


def answer_text(record: Record, side: int) -> str:
    """The chosen answer (side 0) or the rejected one (1)."""
    return message_text(record.conversations[side][-1])


def read_pairs(path: Path) -> list[Record]:
    """Pairs as Stage II reads them. Raises the first BadRow."""
    records = []
    for record in read_records((str(path),), ENHANCE):
        if isinstance(record, BadRow):
            raise record
        records.append(record)
    return records


def make_report(
    inputs: Inputs,
    pairs: Sequence[Record],
    left_out: Sequence[Row],
    labels: Mapping[str, Mapping[str, Mapping[Place, int]]],
    seed: int = 0,
) -> Row:
    """All figures, as JSON holds them; an estimate is {"value", "low", "high", "num"}."""
    return {
        "counts": count_steps(inputs, pairs, left_out),
        "scores": distributions(inputs.judgements),
        "pairs": tally_pairs(pairs),
        "length bias": length_bias(pairs, seed),
        "order bias": order_bias(inputs.judgements, seed),
        "agreement": agreement(inputs.judgements, labels, seed),
    }


@click.command("report", help=__doc__, short_help="Figures, biases, agreement and pairs to read, on one page.")
@click.option("--cases", required=True, metavar="FILE")
@click.option("--samples", required=True, metavar="FILE")
@click.option("--judgements", required=True, metavar="FILE")
@click.option("--pairs", "pairs_file", required=True, metavar="FILE", help="What was left out is read from beside it.")
@click.option("--human", metavar="FILE", help='Rows {"case", "sample", "rater", "scores": {criterion: 1..5}}.')
@click.option("--output", required=True, metavar="FILE.html", help="One page that needs nothing else.")
@click.option("--json", "json_file", metavar="FILE.json", help="The same figures for other programs.")
@click.option(
    "--examples", "num_examples", default=10, show_default=True, type=click.IntRange(0), help="Pairs to read."
)
@click.option("--redact", is_flag=True, help="Neither texts nor images in the page and the JSON file.")
@click.option("--rules/--no-rules", default=True, show_default=True, help="Measure the rule-based checks on the demo.")
@click.option("--grey-window", metavar="LOW,HIGH", help="Black and white in images of over 8 bits.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the examples and intervals.")
def command(
    cases: str, samples: str, judgements: str, pairs_file: str, human: str | None, output: str, json_file: str | None,
    num_examples: int, redact: bool, rules: bool, grey_window: str | None, seed: int,
) -> None:  # fmt: skip
    from mede2.trainer.data.images import parse_window
    from mede2.trainer.preference.page import page, sections
    from mede2.trainer.tables import print_sections

    window = parse_window(grey_window)
    inputs = read_inputs(cases, samples, judgements)
    labels = read_labels(Path(human), {sample.place for sample in inputs.samples}) if human else {}
    pairs = read_pairs(Path(pairs_file))
    beside = left_out_file(Path(pairs_file))
    left_out = [row for _, row in read_rows(beside, ("reason",))] if beside.is_file() else []
    report = make_report(inputs, pairs, left_out, labels, seed)
    report["rules"] = rules_quality() if rules else []
    report["redacted"] = redact
    report["examples"] = examples(pairs, num_examples, seed, redact, window)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(output), page(report))
    if json_file:
        write_json(Path(json_file), report)
    print_sections(sections(report))
    click.echo(f"{output}{', ' + json_file if json_file else ''}")
