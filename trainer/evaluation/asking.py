"""Asking: benchmarks' questions as they are and under probes, put to a model, and its answers read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import click

from mede2.trainer.answering.extraction import extract
from mede2.trainer.answering.jobs import Job, plan
from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.matching import is_match, word_recall
from mede2.trainer.evaluation.answered import AS_IT_IS, Answered
from mede2.trainer.evaluation.probes import probe
from mede2.trainer.files import hash_json
from mede2.trainer.preference import rules
from mede2.trainer.preference.judgements import Answer
from mede2.trainer.preference.rubric import Rubric, read_rubric
from mede2.trainer.questions.benchmarks import read_benchmark
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row

KNOWN = ("findings", "conclusions")  # of a case's meta: what only its author knows
Questions = dict[str, dict[str, Case]]  # benchmark -> id -> question


class Model(Protocol):
    """What answers: `answering.local.LocalModel`, or `answering.server.ServerModel`."""

    identity: Row

    def answer(self, jobs: Sequence[Job], settings: Row, journal: Journal) -> list[Row]: ...


@dataclass(frozen=True)
class Asked:
    """A question under a probe; `case` is the question as the benchmark has it, `job` what is asked."""

    benchmark: str
    probe: str
    case: Case
    job: Job


def ask(name: str, model: Model, asked: Sequence[Asked], settings: Row, journal: Journal) -> list[Answered]:
    """A model's answers, read.

    Args:
        name: of the model.
        model: that answers.
        asked: the questions.
        settings: temperature, top_p, max_tokens, system and grey_window.
        journal: of the evaluation; what it holds is not asked again.
    """
    rubric = read_rubric()
    answers = model.answer([one.job for one in asked], settings, journal)
    drawn = settings["temperature"] > 0
    return [read(name, one, answer, drawn, rubric) for one, answer in zip(asked, answers, strict=True)]


def read(model: str, asked: Asked, answer: Row, drawn: bool, rubric: Rubric) -> Answered:
    """One answer, and what it says."""
    case, text = asked.case, answer["text"]
    found = extract(text, case.options)
    keys = case.meta.get("accepted_answers") or [case.answer]
    return Answered(
        model, asked.benchmark, case.id, asked.probe, asked.job.sample if drawn else None, text, answer["finish"],
        answer["num_tokens"], found.rung, found.answer,
        right=any(is_match(found, key, case.options) for key in keys),
        recall=None if case.options else max(word_recall(found.answer or "", key) for key in keys),
        mmrp=_mmrp(case, text, rubric) if asked.probe == AS_IT_IS else None,
    )  # fmt: skip


def _mmrp(case: Case, text: str, rubric: Rubric) -> float | None:
    """Mean of the scores that the rules give; None where they give none. They are not told what the case knows of its
    image and its answer (findings, conclusions): a vote weighted by that would be cast by the key."""
    meta = {name: value for name, value in case.meta.items() if name not in KNOWN}
    judged = rules.judge(Answer(replace(case, meta=meta), 0, text, ""), rubric)
    scores = [score.score for score in (judged.scores or {}).values() if score.score is not None]
    return sum(scores) / len(scores) if scores else None


def read_questions(
    benchmarks: Mapping[str, tuple[str, Path]], folder: Path, limit: int | None
) -> tuple[Questions, Row]:
    """Every benchmark's questions, and for the report what was read.

    Args:
        benchmarks: name -> adapter and path.
        folder: where images out of parquet files go.
        limit: so many questions of each, always the same ones whatever their order; None for all.
    """
    questions, about = {}, {}
    for name, (adapter, path) in benchmarks.items():
        said: list[str] = []
        cases = read_benchmark(adapter, path, folder, said.append)
        click.echo(*said, err=True)
        about[name] = {"format": adapter, "path": str(path), "read": said[0], "questions": len(cases)}
        if limit is not None and limit < len(cases):
            drawn = {case.id for case in sorted(cases, key=lambda case: hash_json(case.id))[:limit]}
            cases = [case for case in cases if case.id in drawn]
            about[name]["asked"] = limit
        questions[name] = {case.id: case for case in cases}
    return questions, about


def greedy_questions(questions: Questions, kinds: Sequence[str], folder: Path, seed: int, settings: Row) -> list[Asked]:
    """Every question as it is, and under each of the probes.

    Args:
        questions: of every benchmark.
        kinds: of PROBES.
        folder: where the probes' images go.
        seed: of the probes.
        settings: `system` and `grey_window`.
    """
    return [
        Asked(name, kind, cases[job.case.id], job)
        for name, cases in questions.items()
        for kind in (AS_IT_IS, *kinds)
        for job in plan(
            probe(list(cases.values()), kind, folder, seed=seed, window=settings["grey_window"]),
            1, 0, settings["system"],
        )
    ]  # fmt: skip


def drawn_questions(questions: Questions, num: int, seed: int, settings: Row) -> list[Asked]:
    """Every question as it is, `num` times."""
    return [
        Asked(name, AS_IT_IS, job.case, job)
        for name, cases in questions.items()
        for job in plan(list(cases.values()), num, seed, settings["system"])
    ]
