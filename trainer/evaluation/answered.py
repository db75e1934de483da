"""What an evaluation is made of: the questions, and every answer to them with what was read from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mede2.trainer.questions.cases import Case

AS_IT_IS = "image"  # the question with its own images, or with none where it has none
PROBES = ("blank", "shuffle", "noise", "text_only")  # the same question with other images, or without


@dataclass(frozen=True)
class Answered:
    """One answer of one model.

    Attributes:
        model: as the evaluation names it, such as "Stage I".
        benchmark: as the evaluation names it, such as "medqa".
        case: id of the question, unique in its benchmark.
        probe: AS_IT_IS, or one of PROBES.
        sample: None for the greedy answer; 0, 1, ... for those that were drawn.
        text: of the generation.
        finish: "stop", or "length" where the limit cut it off.
        num_tokens: of the generation.
        rung: of the ladder of `extraction.extract`, by which the answer was found; None where none was.
        answer: what was found: the option's text, or the words of an answer to an open question; None: unparsed.
        right: whether it is the key's. Unparsed is wrong.
        recall: share of the key's words that the answer has, 0 to 1; None for questions with options.
        mmrp: mean score, 1 to 5, of the criteria that the rule-based judge could judge; None where it could judge none,
            or was not asked.
    """

    model: str
    benchmark: str
    case: str
    probe: str
    sample: int | None
    text: str
    finish: str
    num_tokens: int
    rung: str | None
    answer: str | None
    right: bool
    recall: float | None = None
    mmrp: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report is made from.

    Attributes:
        models: in the order of the report; comparisons are with the first, and of each with the one before.
        benchmarks: questions by benchmark and id. A case's `meta` holds what it is grouped by, see GROUPS.
        answers: of all models.
        settings: how the answers were made, for the report's foot.
    """

    models: tuple[str, ...]
    benchmarks: Mapping[str, Mapping[str, Case]]
    answers: Sequence[Answered]
    settings: Mapping[str, object]


GROUPS = ("specialty", "modality", "task", "answer_type")  # keys of `meta` that a report breaks figures down by
