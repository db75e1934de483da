"""An evaluation on disk: questions.jsonl, answers.jsonl and evaluation.json in its folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from mede2.trainer.evaluation.answered import Answered, Evaluation
from mede2.trainer.files import hash_file, hash_json, write_json
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row, read_rows, write_rows

WANTED = ("benchmark", "id", "prompt", "images", "image_hashes", "answer", "options", "explanation", "meta")
ALIKE = ("max_tokens", "system", "grey_window", "probes", "samples", "temperature of samples", "top_p", "seed")
QUESTIONS, ANSWERS, ABOUT = "questions.jsonl", "answers.jsonl", "evaluation.json"


def write_evaluation(evaluation: Evaluation, leaks: Sequence[Row] | None, folder: Path) -> None:
    """Write the three files, the last one when the others are whole; `leaks` is None where nobody looked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    write_rows(
        folder / QUESTIONS,
        (
            {"benchmark": name, "source": case.source} | _row(case)
            for name, cases in evaluation.benchmarks.items()
            for case in cases.values()
        ),
    )
    write_rows(folder / ANSWERS, map(asdict, evaluation.answers))
    about = {"models": list(evaluation.models), "settings": evaluation.settings, "leaks": leaks}
    write_json(folder / ABOUT, about)


def read_evaluation(folder: Path) -> tuple[Evaluation, list[Row] | None]:
    """What `write_evaluation` wrote: the evaluation and its leaks.

    Raises:
        ValueError: a folder without a whole evaluation in it, a row that is none of it, or an image that has changed
            since (one that is gone is told in the report).
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no evaluation in it that was ended (no {ABOUT})") from error
    benchmarks: dict[str, dict[str, Case]] = {}
    for source, row in read_rows(folder / QUESTIONS, WANTED):
        prompt, images = tuple(row["prompt"]), tuple(map(Path, row["images"]))
        for image, image_hash in zip(images, row["image_hashes"], strict=True):
            if image.is_file() and hash_file(image) != image_hash:  # a report shows no file that was not asked about
                raise ValueError(f"{source}: image {image} is not the one that was asked about; ask again")
        known = row["answer"], tuple(row["options"]), row["explanation"], row["meta"]
        benchmarks.setdefault(row["benchmark"], {})[row["id"]] = Case(source, row["id"], prompt, images, *known)
    names = [field.name for field in fields(Answered)]
    answers = [
        Answered(**{name: row[name] for name in names}) for _, row in read_rows(folder / ANSWERS, names)
    ]  # fmt: skip
    return Evaluation(tuple(about["models"]), benchmarks, answers, about["settings"]), about["leaks"]


def join(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several evaluations as one: models of different runs side by side on the questions.

    Raises:
        ValueError: a model in two of them, one benchmark's name for different questions, or answers that were made
            under other settings.
    """
    benchmarks: dict[str, dict[str, Case]] = {}
    models: list[str] = []
    first = evaluations[0].settings
    for evaluation in evaluations:
        for name in ALIKE:
            if evaluation.settings.get(name) != first.get(name):
                theirs = f"{evaluation.settings.get(name)!r} for {', '.join(evaluation.models)}"
                raise ValueError(f"{name}: {first.get(name)!r} for {', '.join(evaluations[0].models)}, but {theirs}")
        if twice := set(models) & set(evaluation.models):
            raise ValueError(f"model {sorted(twice)[0]!r}: in two of the evaluations; give each a name of its own")
        models += evaluation.models
        for name, cases in evaluation.benchmarks.items():
            if _digest(benchmarks.setdefault(name, dict(cases))) != _digest(cases):
                raise ValueError(f"benchmark {name!r}: not the same questions in all of the evaluations")
    settings = {", ".join(evaluation.models): evaluation.settings for evaluation in evaluations}
    answers = [answer for evaluation in evaluations for answer in evaluation.answers]
    return Evaluation(tuple(models), benchmarks, answers, settings)


def _row(case: Case) -> Row:
    """A case as `read_evaluation` reads it."""
    return {
        "id": case.id, "prompt": list(case.prompt), "images": [str(image.resolve()) for image in case.images],
        "image_hashes": list(case.image_hashes),
        "answer": case.answer, "options": list(case.options), "explanation": case.explanation, "meta": case.meta,
    }  # fmt: skip


def _digest(cases: dict[str, Case]) -> str:
    return hash_json([(case.id, case.digest, case.answer, case.options) for case in cases.values()])
