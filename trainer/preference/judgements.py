"""Judgements: what one judge says of one answer, as the rows of judgements.jsonl hold it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mede2.trainer.answering.answers import is_right, parse_answer
from mede2.trainer.data.records import BadRow
from mede2.trainer.preference.rubric import CRITERIA, Rubric
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row, read_rows

WANTED = ("case", "sample", "judge", "rubric", "correct", "answer", "well_formed", "scores", "problem", "order", "key")


@dataclass(frozen=True)
class Score:
    """One criterion of one answer.

    Attributes:
        score: 1 to 5 (whole, unless several judges were combined); None where the judge cannot tell.
        evidence: a piece of the answer that shows it; None where `score` is.
        note: why; where `score` is None, what was in the way.
    """

    score: float | None
    evidence: str | None
    note: str


@dataclass(frozen=True)
class Answer:
    """Answer number `sample` to a case; `key` is the hash of all that its text depends on."""

    case: Case
    sample: int
    text: str
    key: str


@dataclass(frozen=True)
class Judgement:
    """One judge on one answer.

    Attributes:
        case, sample: which answer.
        judge: "rules", a model with its server, or a combination such as "mean(rules, ...)".
        rubric: sha256 of the rubric file.
        correct: whether the answer is the key's; None where that cannot be told (an open question in other words).
        answer: what stands between the answer tags; None if the answer is not well-formed.
        well_formed: whether it is <think>...</think> <answer>...</answer>.
        scores: by criterion; None if the judge said nothing that can be used.
        problem: why `scores` is None.
        order: 0; 1 in the second of two judgements, with the case's answers in the opposite order.
        position: place of the answer among those that the judge read at once, from 0; None if it read them singly.
        counted: of a combination, by criterion, how many judges had a score.
        key: sha256 of all that the judgement depends on.
    """

    case: str
    sample: int
    judge: str
    rubric: str
    correct: bool | None
    answer: str | None
    well_formed: bool
    scores: Mapping[str, Score] | None
    problem: str | None
    key: str
    order: int = 0
    position: int | None = None
    counted: Mapping[str, int] | None = None

    def row(self) -> Row:
        return asdict(self)


def sign(
    answer: Answer,
    judge: str,
    rubric: Rubric,
    scores: Mapping[str, Score] | None,
    problem: str | None,
    key: str,
    order: int = 0,
    position: int | None = None,
) -> Judgement:
    """The judgement of an answer. Format and correctness are read off its text, whoever the judge is."""
    case, parsed = answer.case, parse_answer(answer.text, answer.case.options)
    return Judgement(
        case.id, answer.sample, judge, rubric.hash, is_right(parsed, case.answer, case.options), parsed.answer,
        parsed.well_formed, scores, problem, key, order, position,
    )  # fmt: skip


def read_judgements(path: Path) -> Iterator[Judgement]:
    """Every judgement of a file.

    Raises:
        BadRow: names file, line and field of a row that is none.
    """
    for source, row in read_rows(path, WANTED):
        yield _judgement(source, row)


def _judgement(source: str, row: Mapping[str, Any]) -> Judgement:
    scores = row["scores"]
    if scores is not None:
        if not isinstance(scores, dict) or set(scores) != set(CRITERIA):
            raise BadRow(source, f"scores: one for each of {', '.join(CRITERIA)}, or null, not {scores!r:.80}")
        scores = {criterion: _score(source, criterion, scores[criterion]) for criterion in CRITERIA}
    names = Judgement.__dataclass_fields__
    if unknown := sorted(row.keys() - names.keys()):
        raise BadRow(source, f"{', '.join(unknown)}: unknown")
    return Judgement(**{**row, "scores": scores})


def _score(source: str, criterion: str, value: Any) -> Score:
    if not isinstance(value, dict) or value.keys() != {"score", "evidence", "note"}:
        raise BadRow(source, f"scores.{criterion}: an object with score, evidence and note, not {value!r:.80}")
    score = value["score"]
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if score is not None and not (is_number and 1 <= score <= 5):
        raise BadRow(source, f"scores.{criterion}.score: 1 to 5, or null, not {score!r}")
    return Score(**value)
