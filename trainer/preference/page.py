"""The report as one self-contained page of HTML; its tables, which a terminal shows as well."""

from collections.abc import Iterator
from pathlib import Path

import jinja2

from mede2.trainer.preference.rubric import SCORES
from mede2.trainer.questions.rows import Row
from mede2.trainer.tables import Section

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def sections(report: Row) -> Iterator[Section]:
    """Every table of a report that has something to say."""
    counts = report["counts"]
    steps = [name for name, value in counts.items() if isinstance(value, int)]
    yield Section("Steps", ("", "number"), [(name, str(counts[name])) for name in steps])
    if counts["left out"]:
        yield _tally("Left out of the pairs", "reason", counts["left out"])
    if counts["by judge"]:
        names = tuple(next(iter(counts["by judge"].values())))
        rows = [(judge, *(str(row[name]) for name in names)) for judge, row in counts["by judge"].items()]
        yield Section("Judgements", ("judge", *names), rows)
    for judge, criteria in report["scores"].items():
        rows = [
            (name, *map(str, row["counts"]), _number(row["mean"]), str(row["not judged"]))
            for name, row in criteria.items()
        ]
        columns = ("criterion", *map(str, SCORES), "mean", "not judged")
        yield Section(f"Scores by {judge}", columns, rows, "Answers by their score; scores between are rounded.")
    for name, tally in report["pairs"].items():
        if tally:
            yield _tally(f"Pairs by {name}", name, tally)
    length = report["length bias"]
    if length["chosen"] is not None:
        rows = [
            ("chosen, mean", f"{length['chosen']:.1f}"),
            ("rejected, mean", f"{length['rejected']:.1f}"),
            ("chosen minus rejected", _estimate(length["chosen minus rejected"], 1)),
            ("share with the chosen one longer", _estimate(length["share with the chosen one longer"], 3)),
        ]
        yield Section("Length bias", ("", "characters"), rows, "Equal lengths count half. 95 % intervals by case.")
    for judge, criteria in report["order bias"].items():
        rows = [
            (name, _estimate(row["earlier minus later"], 2), _estimate(row["the same"], 2), str(row["the same"]["num"]))
            for name, row in criteria.items()
        ]
        columns = ("criterion", "score where it stands earlier minus later", "share with the same score", "answers")
        yield Section(f"Order bias of {judge}", columns, rows, "Answers that were judged in both orders.")
    figures = list(dict.fromkeys(name for criterion in report["agreement"].values() for name in criterion))
    if figures:
        rows = [
            (f"{figure}: {criterion}", _estimate(row[figure], 2), str(row[figure]["num"]))
            for figure in figures for criterion, row in report["agreement"].items() if figure in row
        ]  # fmt: skip
        yield Section(
            "Agreement", ("figure: criterion", "value", "answers"), rows,
            "Cohen's kappa with quadratic weights, Fleiss' nominal, Krippendorff's ordinal; 95 % bootstrap intervals "
            "by case. Undefined: the scores do not vary, or nothing was scored twice.",
        )  # fmt: skip
    if report.get("rules"):
        rows = [
            (f"{row['check']}: {row['form']}", _number(row["precision"], 3), _number(row["recall"], 3),
             *(str(row[name]) for name in ("found", "missed", "false_alarms", "passed")))
            for row in report["rules"]
        ]  # fmt: skip
        columns = ("check: form", "precision", "recall", "found", "missed", "false alarms", "passed")
        origin = (
            "On clean and spoiled answers to the demo's held-out cases: texts from the same hands as the rules, so how "
            "the checks do on other writers' answers is not said here."
        )
        yield Section("Rule-based checks", columns, rows, origin)


def page(report: Row) -> str:
    """The report as HTML without a script, a link or anything else from outside; every text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, sections=list(sections(report)))


def _tally(title: str, heading: str, tally: Row) -> Section:
    total = sum(tally.values())
    rows = [(name, str(num), f"{100 * num / total:.1f} %") for name, num in tally.items()]
    return Section(title, (heading, "number", "share"), rows, bars=tuple(num / total for num in tally.values()))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _estimate(estimate: Row, digits: int) -> str:
    if estimate["value"] is None:
        return "undefined"
    value = _number(estimate["value"], digits)
    if estimate["low"] is None:
        return f"{value} [no interval]"
    return f"{value} [{_number(estimate['low'], digits)}, {_number(estimate['high'], digits)}]"
