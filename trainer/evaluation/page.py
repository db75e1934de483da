"""The report of an evaluation: one self-contained page of HTML, the same figures as JSON and on a terminal."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from rich.console import Console

from mede2.trainer.data.images import Window
from mede2.trainer.evaluation.answered import Evaluation
from mede2.trainer.evaluation.chapters import PROBE_NAMES, SIGNS, chapters, findings
from mede2.trainer.evaluation.charts import scale, strip, swatch
from mede2.trainer.evaluation.shown import collect
from mede2.trainer.evaluation.summary import summarize
from mede2.trainer.files import write_text
from mede2.trainer.questions.rows import Row
from mede2.trainer.tables import print_sections

FOLDER = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "report.html.jinja", "report.css", "report.js"
INTERVAL = re.compile(r"(?P<value>\S+) (?P<interval>\[[^\]]*\])(?P<more>.*)", re.DOTALL)
VERDICT = re.compile(rf"(?P<sign>[{''.join(SIGNS.values())}]) (?P<word>.*)")
LONG_NAME = 28  # characters
PAGE, FIGURES = "report.html", "report.json"


def write_report(
    evaluation: Evaluation,
    folder: Path,
    leaks: Sequence[Row] | None = None,
    redact: bool = False,
    num_shown: int = 200,
    seed: int = 0,
    grey_window: Window = None,
) -> Row:
    """Write report.html and report.json, each whole or not at all, and nothing before both are made.

    Args:
        evaluation: see `summarize`.
        folder: is made if it is not there.
        leaks: see `summarize`.
        redact: leaves out every text of a question or an answer, and every image.
        num_shown: questions to read on the page, at most; those with errors first (see `shown.choose`).
        seed: of the resampling and of the questions shown.
        grey_window: black and white in images of over 8 bits.

    Returns:
        The summary, as in report.json.

    Raises:
        ValueError: see `summarize`.
    """
    if num_shown < 0:
        raise ValueError(f"num_shown: 0 questions or more, not {num_shown}")
    summary = summarize(evaluation, leaks, seed)
    summary = _redacted(summary) if redact else summary
    summary["redacted"] = redact
    shown = None if redact else collect(evaluation, num_shown, seed, grey_window)
    html = page(summary, shown)
    figures = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PAGE, html)
    write_text(folder / FIGURES, figures)
    return summary


def page(summary: Row, shown: Row | None) -> str:
    """The report as HTML that fetches nothing and runs nothing but its own script, whose hash its policy names.

    Args:
        summary: of `summarize`.
        shown: of `collect`; None: a page without questions to read.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "named": partial(_named, summary["models"])}
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    return environment.get_template(TEMPLATE).render(
        summary=summary, chapters=list(chapters(summary)), findings=findings(summary), shown=shown,
        probe_names=PROBE_NAMES, strip=strip, scale=scale, style=Markup(style), script=Markup(script),
        style_hash=_digest(style), script_hash=_digest(script), data=_safe_json(shown),
        settings=_flat(summary["settings"]),
    )  # fmt: skip


def print_summary(summary: Row, console: Console | None = None) -> None:
    """Print the chapters' main tables, with the columns that say most."""
    print_sections((table.shortened() for chapter in chapters(summary) for table in chapter.tables), console)


def _redacted(summary: Row) -> Row:
    """Without the texts of keys, and of what leaked."""
    benchmarks = {
        name: described | {"majority": described["majority"] | {"answers": []}}
        for name, described in summary["benchmarks"].items()
    }
    leakage = summary["leakage"]
    if leakage:
        found = [{name: value for name, value in leak.items() if name != "detail"} for leak in leakage["found"]]
        leakage = leakage | {"found": found}
    return summary | {"benchmarks": benchmarks, "leakage": leakage}


def _digest(text: str) -> str:
    """As a content security policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _safe_json(value: object) -> Markup:
    """JSON in ASCII that no HTML parser takes for markup, wherever it stands in a page."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _cell(text: str) -> Markup:
    """A figure with its interval set smaller, a verdict with its sign."""
    if match := INTERVAL.fullmatch(text):
        more = Markup(' <span class="more">{}</span>').format(match["more"].strip()) if match["more"] else ""
        parts = Markup('<span class="value">{}</span> <span class="interval">{}</span>').format(*match.groups()[:2])
        return Markup('<span class="estimate">{}{}</span>').format(parts, more)
    if match := VERDICT.fullmatch(text):
        kind = match["word"].split()[0]
        return Markup('<span class="verdict {}"><span aria-hidden="true">{}</span> {}</span>').format(
            kind, *match.groups()
        )
    return escape(text)


def _named(models: Sequence[str], text: str) -> Markup:
    """A name, behind its colour and shape if it is a model's; a long one may be broken."""
    if text not in models:
        return escape(text)
    kind = "model long" if len(text) > LONG_NAME else "model"
    return Markup('<span class="{}">{}{}</span>').format(kind, swatch(models.index(text)), text)


def _flat(settings: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Settings by their path."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
