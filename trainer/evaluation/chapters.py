"""A summary's chapters: the tables that page and terminal share, and what only the page shows beside them."""

from collections.abc import Iterator, Sequence

from mede2.trainer.answering.extraction import RUNGS
from mede2.trainer.evaluation.answered import PROBES
from mede2.trainer.evaluation.charts import Axis, curves, span
from mede2.trainer.evaluation.figures import (
    Chapter,
    Figures,
    by,
    link,
    p_value,
    percent,
    plain_mean,
    points,
    share,
    signed,
)
from mede2.trainer.evaluation.summary import BETTER, NO_DIFFERENCE, WORSE
from mede2.trainer.questions.rows import Row

SIGNS = {BETTER: "▲", WORSE: "▼", NO_DIFFERENCE: "○"}
PROBE_NAMES = {"blank": "blank image", "shuffle": "another's image", "noise": "noise", "text_only": "text only"}
FEW = 5  # benchmarks that are named in a sentence, and fit beside each other with their intervals
SHARES = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1))


def chapters(summary: Row) -> Iterator[Chapter]:
    """All that have something to say, in the order of the page."""
    yield _accuracy(summary)
    if summary["comparisons"]:
        yield _comparisons(summary)
    if summary["scaling"]:
        yield _scaling(summary)
    if summary["grounding"]:
        yield _grounding(summary)
    if summary["groups"]:
        yield _groups(summary)
    yield _reading(summary)
    yield _leakage(summary)


def findings(summary: Row) -> list[str]:
    """Each model against the first, in a sentence."""
    found, first, num = [], summary["models"][0], len(summary["benchmarks"])
    for model, rows in by([row for row in summary["comparisons"] if row["against"] == first], "model").items():
        parts = []
        for word, of_word in by(rows, "verdict").items():
            gains = "" if word == NO_DIFFERENCE else " ({} points)"
            names = [row["benchmark"] + gains.format(signed(row["difference"]["value"])) for row in of_word]
            parts.append(f"{word} on {', '.join(names) if num <= FEW else f'{len(names)} of {num} benchmarks'}")
        found.append(f"{model} against {first}: {'; '.join(parts)}.")
    return found


def _accuracy(summary: Row) -> Chapter:
    models, benchmarks = summary["models"], summary["benchmarks"]
    scores = {(row["benchmark"], row["model"]): row for row in summary["scores"]}
    verdicts = {
        (row["benchmark"], row["model"]): row["verdict"]
        for row in summary["comparisons"] if row["against"] == models[0]
    }  # fmt: skip

    def cell(benchmark: str, model: str) -> str:
        word = verdicts.get((benchmark, model), NO_DIFFERENCE)
        sign = "" if word == NO_DIFFERENCE else f" {SIGNS[word]}"
        return percent(scores[benchmark, model]["accuracy"]) + sign

    rows = [(model, *(cell(benchmark, model) for benchmark in benchmarks)) for model in models]
    rows.append(("always the same answer", *(_constant(described["majority"]) for described in benchmarks.values())))
    rows.append(("chance, where options are", *(share(described["chance"]) for described in benchmarks.values())))
    rows.append(("questions", *(str(described["questions"]) for described in benchmarks.values())))
    rows.append(("of them with images", *(str(described["with_images"]) for described in benchmarks.values())))
    signs = f" {SIGNS[BETTER]} better, {SIGNS[WORSE]} worse than {models[0]}; no sign: no difference shown."
    note = "Greedy answers, per cent with 95 % intervals. What could not be read is wrong."
    pictures = [
        Figures(
            benchmark, ("model", "accuracy"),
            [(model, percent(scores[benchmark, model]["accuracy"])) for model in models],
            marks=tuple(((i, scores[benchmark, model]["accuracy"]),) for i, model in enumerate(models)),
            axis=SHARES,
            references=((described["majority"]["accuracy"],),) * len(models),
        )
        for benchmark, described in benchmarks.items()
    ]  # fmt: skip
    return Chapter(
        "accuracy", "Accuracy",
        "Intervals are Wilson's; where questions share images, questions about one image are drawn again together "
        "(cluster bootstrap). Dashed: the best that the same answer to every question could score.",
        [
            Figures(
                "Accuracy", ("", *benchmarks), rows, note + (signs if len(models) > 1 else ""), num_quiet=4,
                is_stacked=len(benchmarks) > FEW,
            )
        ],
        pictures,
    )  # fmt: skip


def _comparisons(summary: Row) -> Chapter:
    rows = summary["comparisons"]
    first = summary["models"][0]
    axis = span([0, *(row["difference"][end] for row in rows for end in ("low", "high"))])
    table = Figures(
        "Comparisons",
        ("benchmark", "model", "against", "difference, points", "gained / lost", "p", "p, adjusted", "verdict"),
        [
            (
                row["benchmark"], row["model"], row["against"], points(row["difference"]),
                f"{row['gained']} / {row['lost']}", p_value(row["p"]), p_value(row["p_adjusted"]),
                f"{SIGNS[row['verdict']]} {row['verdict']}",
            )
            for row in rows
        ],
        "Gained: questions that the model gets right and the other does not; lost: the reverse.",
        heads=3, brief=(0, 1, 2, 3, 6, 7),
        marks=tuple(((summary["models"].index(row["model"]), row["difference"]),) for row in rows),
        axis=axis,
        links=tuple(
            link(benchmark=row["benchmark"], model=row["model"], verdict="flipped") if row["against"] == first else None
            for row in rows
        ),
    )  # fmt: skip
    return Chapter(
        "comparisons", "Comparisons",
        f"On the same questions; p-values of McNemar's exact test, adjusted by Holm's method for all {len(rows)} "
        "comparisons here. A model is called better or worse only where the adjusted p-value is below 0.05 and the "
        "interval of the difference leaves out 0.",
        [table],
    )  # fmt: skip


def _scaling(summary: Row) -> Chapter:
    models, panels, details = summary["models"], {}, {}
    for benchmark, rows in by(summary["scaling"], "benchmark").items():
        axis = span([row["accuracy"][end] for row in rows for end in ("low", "high")])
        for x, unit in (("n", "answers drawn"), ("num_tokens", "tokens generated for a question")):
            panels.setdefault(benchmark, {})[x] = {
                method: curves(
                    [
                        (models.index(model), model, [(row[x], row["accuracy"]) for row in of_model])
                        for model, of_model in by(of_method, "model").items()
                    ],
                    axis, f"{benchmark}: {method}", unit,
                )
                for method, of_method in by(rows, "method").items()
            }  # fmt: skip
        details[f"{benchmark}: every n"] = [
            Figures(
                method, ("model", *(f"n = {n}" for n in dict.fromkeys(row["n"] for row in of_method))),
                [
                    (model, *(f"{percent(row['accuracy'])} at {row['num_tokens']:.0f}" for row in of_model))
                    for model, of_model in by(of_method, "model").items()
                ],
                "Accuracy at so many tokens for a question.",
            )
            for method, of_method in by(rows, "method").items()
        ]  # fmt: skip
    last = [rows[-1] for rows in by(summary["scaling"], "benchmark", "model", "method").values()]
    all_drawn = {(row["benchmark"], row["model"], row["method"]): percent(row["accuracy"]) for row in last}
    methods = list(dict.fromkeys(row["method"] for row in last))
    table = Figures(
        "Inference-time scaling", ("benchmark", "model", "n", "tokens", *methods),
        [
            (
                benchmark, model, str(rows[0]["n"]), f"{rows[0]['num_tokens']:.0f}",
                *(all_drawn.get((benchmark, model, method), "-") for method in methods),
            )
            for (benchmark, model), rows in by(last, "benchmark", "model").items()
        ],
        "Accuracy with all answers that were drawn.", heads=2,
    )  # fmt: skip
    return Chapter(
        "scaling", "Inference-time scaling",
        "Accuracy when n answers are drawn to each question and one is made of them, with 95 % bands. pass@n: one of "
        "them is right, which only the key can tell. majority: what most of them say. mmrp vote: the same, votes "
        "weighted by the scores of the rule-based judge, which is told neither the key nor what an image shows. "
        "best of n: the answer that it scores highest.",
        [table], panels=panels, details=details,
    )  # fmt: skip


def _grounding(summary: Row) -> Chapter:
    whole = [row for row in summary["grounding"] if row["group"] is None]
    details = {
        f"{benchmark} by {group.replace('_', ' ')}": [
            _drops(summary, of_probe, PROBE_NAMES[probe], "value", "model")
            for probe, of_probe in by(sorted(rows, key=_probe_rank), "probe").items()
        ]
        for (benchmark, group), rows in by(
            [row for row in summary["grounding"] if row["group"] is not None], "benchmark", "group"
        ).items()
    }
    return Chapter(
        "grounding", "Does it look at the image?",
        "Accuracy with the right image minus accuracy without it, on the same questions, those with images. A model "
        "that does not look loses nothing. To wrong and to right: per cent of the questions whose verdict turned; "
        "changed: whose answer did, right or not.",
        [
            _drops(summary, sorted(rows, key=_probe_rank), f"Grounding: {benchmark}", "probe", "model")
            for benchmark, rows in by(whole, "benchmark").items()
        ],
        details=details,
    )  # fmt: skip


def _drops(summary: Row, rows: Sequence[Row], title: str, *heads: str) -> Figures:
    every = [row["drop"][end] for row in summary["grounding"] if row["group"] is None for end in ("low", "high")]
    own = [row["drop"][end] for row in rows for end in ("low", "high")]

    def turned(row: Row, name: str) -> str:
        return f"{100 * row[name] / row['drop']['num']:.1f}"

    return Figures(
        title,
        (*heads, "questions", "right image", "without it", "drop, points", "to wrong", "to right", "changed"),
        [
            (
                *(PROBE_NAMES.get(row[head], row[head]) for head in heads), str(row["drop"]["num"]),
                share(row["right_image"]["value"]), share(row["probed"]["value"]), points(row["drop"]),
                turned(row, "to_wrong"), turned(row, "to_right"), turned(row, "changed"),
            )
            for row in rows
        ],
        heads=2, brief=(0, 1, 2, 5),
        marks=tuple(((summary["models"].index(row["model"]), row["drop"]),) for row in rows),
        axis=span([0, *every, *own]),
        as_bars=True,
        links=tuple(
            link(benchmark=row["benchmark"], model=row["model"], probe=row["probe"], verdict="changed")
            if row["group"] is None else None
            for row in rows
        ),
    )  # fmt: skip


def _groups(summary: Row) -> Chapter:
    models, details = summary["models"], {}
    for (benchmark, group), rows in by(summary["groups"], "benchmark", "group").items():
        values = by(rows, "value")
        details[f"{benchmark} by {group.replace('_', ' ')}"] = [
            Figures(
                f"{benchmark} by {group.replace('_', ' ')}", (group.replace("_", " "), "questions", *models),
                [
                    (value, str(of[0]["accuracy"]["num"]), *(percent(row["accuracy"]) for row in of))
                    for value, of in values.items()
                ],
                marks=tuple(tuple((i, row["accuracy"]) for i, row in enumerate(of)) for of in values.values()),
                axis=SHARES,
            )
        ]  # fmt: skip
    return Chapter(
        "groups", "By group",
        "Accuracy by what the questions say they are about. Where there are few questions the intervals are wide, and "
        "nothing here is tested.",
        details=details,
    )  # fmt: skip


def _reading(summary: Row) -> Chapter:
    scores = summary["scores"]
    shown = {"recall": "open-question recall", "mmrp": "reasoning, 1 to 5"}
    shown = {name: told for name, told in shown.items() if any(row[name] for row in scores)}

    def further(name: str, row: Row) -> str:
        if row[name] is None:
            return "-"
        return percent(row[name]) if name == "recall" else plain_mean(row[name])

    table = Figures(
        "The answers", ("benchmark", "model", "in the format", "unparsed", "cut off", "tokens", *shown.values()),
        [
            (
                row["benchmark"], row["model"], percent(row["format"]), percent(row["unparsed"]),
                percent(row["cut_off"]), f"{row['tokens']:.1f}", *(further(name, row) for name in shown),
            )
            for row in scores
        ],
        "Per cent with 95 % intervals; tokens and reasoning (scored by the rule-based judge) are means.",
        heads=2, brief=(0, 1, 2, 3, 5),
        links=tuple(link(benchmark=row["benchmark"], model=row["model"], verdict="unparsed") for row in scores),
    )  # fmt: skip
    used = {rung for row in scores for rung in row["rungs"]}
    rungs = sorted(used, key=lambda rung: (RUNGS.index(rung) if rung in RUNGS else len(RUNGS), rung))
    ladder = Figures(
        "Rungs", ("benchmark", "model", *rungs, "none"),
        [
            (
                row["benchmark"], row["model"], *(str(row["rungs"].get(rung, 0)) for rung in rungs),
                str(row["accuracy"]["num"] - sum(row["rungs"].values())),
            )
            for row in scores
        ],
        "Answers by the rung of the ladder on which they were found; none: unparsed.", heads=2,
    )  # fmt: skip
    return Chapter(
        "answers", "How the answers were read",
        "An answer is read strictly first, between <answer> and </answer> behind <think>...</think> and with nothing "
        "else; then by a ladder of looser forms. Cut off: the limit of tokens was reached.",
        [table, ladder],
    )  # fmt: skip


def _leakage(summary: Row) -> Chapter:
    leakage = summary["leakage"]
    if leakage is None:
        return Chapter("leakage", "Leakage", "Nobody looked whether the questions stand in the training files.")
    questions = leakage["questions"]
    shared = "13 words in a row (short ones all their words), or an image, with the training files"
    text = (
        f"Questions that share {shared}, and the accuracy on the others."
        if leakage["found"] else f"No question shares {shared} that were looked at."
    )  # fmt: skip
    counts = Figures(
        "Leaked questions", ("benchmark", "questions", "by text", "by image", "by either"),
        [
            (name, *map(str, (summary["benchmarks"][name]["questions"], row["text"], row["image"], row["any"])))
            for name, row in questions.items()
        ],
    )  # fmt: skip
    scores = [row for row in leakage["scores"] if questions[row["benchmark"]]["any"]]
    without = Figures(
        "Accuracy without them", ("benchmark", "model", "all questions", "without the leaked", "questions left"),
        [
            (
                row["benchmark"], row["model"], percent(row["all"]),
                *((percent(row["without"]), str(row["without"]["num"])) if row["without"] else ("-", "0")),
            )
            for row in scores
        ],
        heads=2,
    )  # fmt: skip
    places = Figures(
        "Where they stand", ("question", "benchmark", "training file", "line", "what", "detail"),
        [
            tuple(str(leak.get(name, "")) for name in ("case", "benchmark", "training_file", "line", "kind", "detail"))
            for leak in leakage["found"]
        ],
    )  # fmt: skip
    found = bool(leakage["found"])
    return Chapter(
        "leakage", "Leakage", text, [counts, without] if found else [counts],
        details={"Where they stand": [places]} if found else {},
    )  # fmt: skip


def _constant(majority: Row) -> str:
    told = f" ({', '.join(majority['answers'])})" if majority["answers"] else ""
    return share(majority["accuracy"]) + told


def _probe_rank(row: Row) -> int:
    return PROBES.index(row["probe"])
