"""Precision and recall of the rule-based checks on the demo's cases, clean and spoiled along a known criterion.

Each case is written in two forms: the demo's own chain, whose words never vary, and prose, which varies how findings,
conclusion and re-check are put and adds what must not mislead (denials, something called possible, a check in words
alone). Forms and rules come from the same hands: the figures say that the rules do what they are meant to, not how they
fare on the texts of another writer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mede2.trainer.answering.answers import is_right, parse_answer
from mede2.trainer.demo import cases as demo
from mede2.trainer.demo.phantoms import KINDS, Finding
from mede2.trainer.demo.records import describe
from mede2.trainer.preference import rules
from mede2.trainer.preference.judgements import Answer
from mede2.trainer.preference.rubric import CRITERIA, Rubric
from mede2.trainer.questions.cases import Case

CHECKS = ("correct", "well_formed", *CRITERIA)
FORMS = ("chain", "prose")


@dataclass(frozen=True)
class Quality:
    """A check against the labels; found means that it reports a fault.

    Attributes:
        form: "chain" or "prose".
        check: "correct", "well_formed" or a criterion.
        found, missed: answers that have the fault.
        false_alarms, passed: answers that do not.
    """

    form: str
    check: str
    found: int
    missed: int
    false_alarms: int
    passed: int

    @property
    def precision(self) -> float | None:
        """Share of the reported faults that are there; None if none was reported."""
        reported = self.found + self.false_alarms
        return self.found / reported if reported else None

    @property
    def recall(self) -> float:
        """Share of the faults that are reported."""
        return self.found / (self.found + self.missed)


@dataclass(frozen=True)
class Labelled:
    """An answer and the faults that it was given: names of `CHECKS`."""

    case: Case
    text: str
    faults: frozenset[str]


def rule_quality(rubric: Rubric, num_cases: int = 240) -> list[Quality]:
    """Judge unseen cases of the demo, each clean and with every fault, in both forms: 12 answers a case."""
    every = demo.heldout_cases(num_cases)
    return [quality for form in FORMS for quality in _measure(form, list(labelled(every, form)), rubric)]


def labelled(every: Sequence[demo.Case], form: str) -> Iterator[Labelled]:
    """The answers of one form with their labels."""
    write: Callable[[demo.Case, str | None], str] = _chain if form == "chain" else _prose
    for case in every:
        question = Case(
            f"demo-{case.seed}", f"demo-{case.seed}", (), (), case.answer, case.options, meta=describe(case)
        )
        rng = np.random.default_rng([case.seed, 10])
        for criterion in (None, *CRITERIA):
            text = write(case, criterion)
            faults = {criterion, "correct"} if criterion == "logical_consistency" else {criterion} - {None}
            yield Labelled(question, _respell(text, case, rng), frozenset(faults))
        clean = write(case, None)
        broken = (
            clean.replace("</think>", ""), clean + " I hope this helps.", clean.replace("<answer>", "Answer: "),
            clean.replace("<think>", "<think><think>"), clean.removesuffix("</answer>"),
        )  # fmt: skip
        yield Labelled(question, broken[rng.integers(len(broken))], frozenset({"correct", "well_formed"}))


def _measure(form: str, answers: Sequence[Labelled], rubric: Rubric) -> Iterator[Quality]:
    reported = [_faults(answer, rubric) for answer in answers]
    for check in CHECKS:
        counts = {(there, told): 0 for there in (True, False) for told in (True, False)}
        for answer, told in zip(answers, reported, strict=True):
            if check in ("correct", "well_formed") or "well_formed" not in answer.faults:
                counts[check in answer.faults, check in told] += 1
        yield Quality(
            form, check, counts[True, True], counts[True, False], counts[False, True], counts[False, False]
        )  # fmt: skip


def _faults(answer: Labelled, rubric: Rubric) -> set[str]:
    """The faults that the rules report: a criterion with a score of `rules.FAULT` or less, a wrong answer or format."""
    judgement = rules.judge(Answer(answer.case, 0, answer.text, ""), rubric)
    scores = (judgement.scores or {}).items()
    faults = {name for name, score in scores if score.score is not None and score.score <= rules.FAULT}
    parsed = parse_answer(answer.text, answer.case.options)
    right = is_right(parsed, answer.case.answer, answer.case.options)
    return faults | ({"correct"} if right is False else set()) | (set() if judgement.well_formed else {"well_formed"})


def _chain(case: demo.Case, criterion: str | None) -> str:
    return demo.chain(case) if criterion is None else demo.corrupt(case, criterion)


def _respell(text: str, case: demo.Case, rng: np.random.Generator) -> str:
    """The answer named by its text, its letter or both, where it is an option."""
    parsed = parse_answer(text, case.options)
    if parsed.option is None:
        return text
    letter, option = "ABCD"[parsed.option], case.options[parsed.option]
    spelled = (option, option.upper(), letter, f"({letter})", f"{letter}. {option}", f"{option}.")
    return f"<think>{parsed.think}</think>\n<answer>{spelled[rng.integers(len(spelled))]}</answer>"


def _prose(case: demo.Case, criterion: str | None) -> str:
    """The case in free words; the faults are those that the demo gives its chain, and empty words for a check."""
    rng = np.random.default_rng([case.seed, 11, CRITERIA.index(criterion) if criterion else 9])

    def one_of(*texts: str) -> str:
        return texts[rng.integers(len(texts))]

    spoiled = parse_answer(_chain(case, criterion))
    seen = demo.read_chain(spoiled.think)
    findings = case.findings if criterion == "reflection" else seen.findings if seen else None
    other = next(option for option in case.options if option not in (case.answer, spoiled.answer))
    number = len(case.findings)
    parts = [] if findings is None else [_look(findings, one_of), _aside(findings, one_of)]
    history = {"none": "no fever and no smoking", "fever": "fever", "smoking": "smoking"}[case.history]
    parts.append(one_of(f"The history is {history}.", f"There is {history} in the history."))
    parts.append(f"In all that makes {number}.")
    changes = criterion != "reflection" and rng.random() < 0.3
    parts.append(f"So at first {other}." if changes else _conclude(case.answer, one_of))
    check = f"the number is {number} and the history is {history}, so {case.answer}"
    if criterion == "reflection":
        parts.append(one_of("", "", "Let me double-check. Yes, that is right.", "I have checked everything."))
    elif changes:
        parts.append(f"Wait, {check} instead.")
    else:
        parts.append(one_of(f"Checking again: {check}.", f"Let me double-check: {check}."))
    return f"<think>{' '.join(filter(None, parts))}</think> <answer>{spoiled.answer}</answer>"


def _look(findings: Sequence[Finding], one_of: Callable) -> str:
    if not findings:
        return one_of(
            "The lungs are clear.", "No abnormality is seen.", "The film shows nothing.", "The chest is normal."
        )
    places = [(finding.kind, f"{finding.side} {finding.level}") for finding in findings]
    return one_of(
        f"The film shows {' and '.join(f'a {kind} in the {place} zone' for kind, place in places)}.",
        " ".join(f"In the {place} zone lies a {kind}." for kind, place in places),
        " ".join(f"{place.capitalize()} zone: {kind}." for kind, place in places),
        f"I see {', '.join(f'a {place} {kind}' for kind, place in places)}; the rest is clear.",
        " ".join(f"There is a {kind} in the {place} field." for kind, place in places),
    )


def _aside(findings: Sequence[Finding], one_of: Callable) -> str:
    """Something that asserts no finding."""
    absent = [kind for kind in KINDS if kind not in {finding.kind for finding in findings}] or ["pneumothorax"]
    return one_of(
        "", f"There is no {absent[0]}.", f"A {absent[0]} is not seen.", f"A {absent[-1]} might be hidden by the heart.",
        "No effusion, consolidation or pneumothorax.", "The quality of the film is good.",
    )  # fmt: skip


def _conclude(answer: str, one_of: Callable) -> str:
    return one_of(f"So this is {answer}.", f"The most likely diagnosis is {answer}.", f"Therefore {answer}.")
