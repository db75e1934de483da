"""Answers with their scores: samples.jsonl read and checked, and joined with one judge's judgements."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.preference.judgements import Judgement, read_judgements
from mede2.trainer.questions.cases import Case, read_cases
from mede2.trainer.questions.rows import Row, read_rows

Place = tuple[str, int]  # a case's id and the number of a sample
FIELDS = {"case": str, "sample": int, "text": str, "finish": str, "num_tokens": int, "model": str, "key": str}


@dataclass(frozen=True)
class Sample:
    """An answer of a model: number `sample` of `case`; `finish` is "stop", or "length" where it was cut off."""

    case: str
    sample: int
    text: str
    finish: str
    num_tokens: int
    model: str
    key: str

    @property
    def place(self) -> Place:
        return self.case, self.sample


@dataclass(frozen=True)
class Scored:
    """An answer and what the judge says of it, if it says anything."""

    answer: Sample
    judgement: Judgement | None

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the criteria that were judged."""
        return scores(self.judgement) if self.judgement else {}


def scores(judgement: Judgement) -> dict[str, float]:
    """The scores that a judge gave; a criterion on which it could not tell is missing."""
    given = judgement.scores or {}
    return {criterion: given[criterion].score for criterion in given if given[criterion].score is not None}


def read_samples(path: Path, cases: Container[str]) -> list[Sample]:
    """Every answer of a file.

    Args:
        path: samples.jsonl.
        cases: ids of those that may be answered.

    Raises:
        BadRow: names file, line and field of a row that is none, whose case is unknown, or that is there twice.
        ValueError: there is none.
    """
    samples: list[Sample] = []
    lines: dict[Place, str] = {}
    for source, row in read_rows(path, FIELDS):
        samples.append(parse_sample(source, row))
        if samples[-1].case not in cases:
            raise BadRow(source, f"case: {samples[-1].case!r:.60} is not among the cases")
        if (first := lines.setdefault(samples[-1].place, source)) != source:
            raise BadRow(source, f"sample {samples[-1].sample} of case {samples[-1].case!r} again, after {first}")
    if not samples:
        raise ValueError(f"{path}: no answer in it")
    return samples


def parse_sample(source: str, row: Row) -> Sample:
    for name, kind in FIELDS.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise BadRow(source, f"{name}: {'a text' if kind is str else 'a whole number'}, not {row[name]!r:.60}")
    return Sample(**{name: row[name] for name in FIELDS})


def join(samples: Iterable[Sample], judgements: Sequence[Judgement], judge: str | None) -> dict[str, list[Scored]]:
    """The answers of each case, each with the judgement of one judge; of two in both orders the first counts.

    Args:
        judge: whose judgements count; None where there is only one.

    Raises:
        ValueError: several judges and none named, a judge who judged nothing, or two judgements of one answer.
    """
    judges = sorted({judgement.judge for judgement in judgements})
    if judge is None and len(judges) == 1:
        judge = judges[0]
    if judge not in judges:
        asked = "judge: state which counts" if judge is None else f"judge: {judge!r} judged nothing"
        raise ValueError(f"{asked}; there are {', '.join(judges) or 'none'}")
    found: dict[Place, Judgement] = {}
    for judgement in judgements:
        if judgement.judge == judge and judgement.order == 0:
            place = (judgement.case, judgement.sample)
            if found.setdefault(place, judgement) is not judgement:
                raise ValueError(f"{judge} has two judgements of sample {place[1]} of case {place[0]!r}; keep one")
    cases: dict[str, list[Scored]] = {}
    for sample in samples:
        cases.setdefault(sample.case, []).append(Scored(sample, found.get(sample.place)))
    return cases


@dataclass(frozen=True)
class Inputs:
    """What the steps behind the judges start from."""

    cases: dict[str, Case]
    samples: list[Sample]
    judgements: list[Judgement]

    def answers(self, judge: str | None) -> dict[str, list[Scored]]:
        """The answers of every case, in the order of the cases; see `join`."""
        answers = join(self.samples, self.judgements, judge)
        return {case: answers.get(case, []) for case in self.cases}


def read_inputs(cases: str, samples: str, judgements: str) -> Inputs:
    """Read the three files.

    Raises:
        ValueError: a row that cannot be used, or one of a case or of a sample that is not there.
    """
    known = {case.id: case for case in read_cases(Path(cases))}
    answers, judged = read_samples(Path(samples), known), list(read_judgements(Path(judgements)))
    places = {sample.place for sample in answers}
    for judgement in judged:
        if (judgement.case, judgement.sample) not in places:
            where = f"sample {judgement.sample} of case {judgement.case!r}"
            raise ValueError(f"{judgements}: {where} is not in {samples}")
    return Inputs(known, answers, judged)
