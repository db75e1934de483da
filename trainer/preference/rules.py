"""The rule-based judge: scores an answer on the rubric's criteria by words alone, or says why it cannot.

Its reach, criterion by criterion:

- `logical_consistency` compares the conclusion that the reasoning states (an option behind a word of conclusion, or a
  phrase of the case's `meta.conclusions`) with the final answer. It does not see whether the conclusion follows from
  what was said before. It gives 1, 2, 3 or 5.
- `image_analysis` and `no_hallucination` compare what the reasoning says of the image (`statements`) with the case's
  structured findings (`meta.findings`); without these they cannot be judged. A phrase of the case's table is no
  statement about the image.
- `reflection` looks for a word of checking and for what follows it: earlier things named again, or a change. It does
  not see whether the check is right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mede2.trainer.answering.answers import match_option, parse_answer, plain
from mede2.trainer.files import hash_file, hash_json
from mede2.trainer.preference import statements
from mede2.trainer.preference.judgements import Answer, Judgement, Score, sign
from mede2.trainer.preference.rubric import Rubric
from mede2.trainer.preference.statements import (  # fmt: skip
    ANYTHING,
    ASSERTED,
    DENIED,
    NOT_A_SIDE,
    POSSIBLE,
    Finding,
    ImageReader,
    Statement,
    phrase,
    sentences,
)
from mede2.trainer.questions.cases import Case

JUDGE = "rules"
FAULT = 3  # a score of 3 or less says that the check found a fault
NO_FINDINGS = "the case has no structured findings (meta.findings)"
LETTER = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?:?\s+\(?([A-Z])\)?(?=[\s.,;)]|$)")
PART = re.compile(r"[,;]|\b(?:but|and|or)\b")


def judge(answer: Answer, rubric: Rubric) -> Judgement:
    """Judge one answer.

    Raises:
        ValueError: findings or conclusions of the case that cannot be read.
    """
    case, parsed = answer.case, parse_answer(answer.text, answer.case.options)
    scores, problem = None, None
    if not parsed.well_formed:
        problem = "not <think>...</think> <answer>...</answer>, so what its reasoning is cannot be told"
    elif not parsed.think:
        problem = "the reasoning is empty"
    else:
        scores = {
            "logical_consistency": logical_consistency(case, parsed.think, parsed.answer, rubric),
            "image_analysis": image_analysis(case, parsed.think, rubric),
            "no_hallucination": no_hallucination(case, parsed.think, rubric),
            "reflection": reflection(case, parsed.think, rubric),
        }
    seen = [answer.key, answer.text, case.answer, case.options, case.meta.get("findings"), case.meta.get("conclusions")]
    return sign(answer, JUDGE, rubric, scores, problem, hash_json([JUDGE, code_hash(), rubric.hash, seen]))


@cache
def code_hash() -> str:
    """sha256 of the rules themselves: judgements by other rules are other judgements."""
    return hash_json([hash_file(Path(file)) for file in (__file__, statements.__file__)])


@dataclass(frozen=True)
class Conclusion:
    """An option (or another diagnosis) that a sentence arrives at; `by_table` if the case's own table says that it
    follows from the phrase, `place` is the sentence's number."""

    target: str
    quote: str
    by_table: bool
    place: int


def logical_consistency(case: Case, think: str, answer: str, rubric: Rubric) -> Score:
    """Whether the final answer is what the reasoning arrives at."""
    found = conclusions(case, think, rubric)
    if not found:
        return Score(None, None, "the reasoning states no conclusion that can be read")
    given, last = _target(answer, case.options), found[-1]
    if last.target != given:
        return Score(1, last.quote, f"the reasoning arrives at {last.target}, the answer is {given}")
    entailed = [conclusion for conclusion in found if conclusion.by_table]
    if entailed and entailed[-1].target != given:
        return Score(2, entailed[-1].quote, f"from this follows {entailed[-1].target}, the answer is {given}")
    earlier = [conclusion for conclusion in found if conclusion.target != given]
    if earlier:
        between = " ".join(sentences(think)[earlier[-1].place + 1 : last.place + 1]).lower()
        if not phrase((*rubric.words.reflection, *rubric.words.changes)).search(between):
            return Score(
                3, earlier[-1].quote, f"it first arrives at {earlier[-1].target} and does not say why no longer"
            )
    return Score(5, last.quote, f"the reasoning arrives at {given}, and so does the answer")


def conclusions(case: Case, think: str, rubric: Rubric) -> list[Conclusion]:
    """Every conclusion that a reasoning states, in order."""
    entails = _table(case)
    in_table = phrase(entails)
    cue = phrase(rubric.words.conclusions)
    found: list[Conclusion] = []
    every = sentences(think)
    for place, sentence in enumerate(every):
        lower = sentence.lower()
        for match in in_table.finditer(lower):
            if (words := " ".join(match.group().split())) in entails:  # without the plural s that `phrase` allows
                found.append(Conclusion(_target(entails[words], case.options), sentence, True, place))
        cued = cue.search(lower)
        if cued or place == len(every) - 1:
            named = cued and _named(lower[cued.end() :], case.options, rubric)
            named = named or _named(lower, case.options, rubric)  # "X is the most likely diagnosis"
            if not named and (letter := LETTER.search(sentence)):
                named = {_target(letter[1], case.options)}
            if len(named) == 1:
                found.append(Conclusion(named.pop(), sentence, False, place))
    return found


def _table(case: Case) -> dict[str, str]:
    """The case's own table of conclusions: phrase, in lower case with single spaces, to answer."""
    table = case.meta.get("conclusions") or {}
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"{case.source}: meta.conclusions: {{phrase: answer}}, not {table!r:.60}")
    return {" ".join(words.lower().split()): value for words, value in table.items()}


def _named(lower: str, options: Sequence[str], rubric: Rubric) -> set[str]:
    """The options that a text in lower case names and does not reject."""
    negation, negation_after = phrase(rubric.words.negations), phrase(rubric.words.negations_after)
    named, taken = set(), []
    for option in sorted(options, key=len, reverse=True):
        for match in phrase([plain(option)]).finditer(lower):
            if any(start < match.end() and match.start() < end for start, end in taken):
                continue  # a part of a longer option's name
            taken.append(match.span())
            before = PART.split(lower[: match.start()])[-1]
            behind = PART.split(lower[match.end() :])[0]
            if not negation.search(before) and not negation_after.search(behind):
                named.add(plain(option))
    return named


def _target(text: str, options: Sequence[str]) -> str:
    index = match_option(text, options)
    return plain(text if index is None else options[index])


def image_analysis(case: Case, think: str, rubric: Rubric) -> Score:
    """Whether the reasoning addresses what the image shows."""
    reader = _reader(case, rubric)
    if reader.findings is None:
        return Score(None, None, NO_FINDINGS)
    said = reader.statements(think)
    asserted = _most_specific([statement for statement in said if statement.mode == ASSERTED])
    first = sentences(think)[0]
    if not reader.findings:
        normal = [statement for statement in said if statement.kind == ANYTHING and not statement.place]
        if normal:
            return Score(5, normal[0].quote, "nothing is there, and that is said")
        if said:
            return Score(4, said[0].quote, "nothing is there; the image is described, but not called normal")
        return Score(1, first, "nothing is there, and of the image nothing is said")

    exact, inexact, overlooked = _addressed(reader, asserted)
    denials = [statement for statement in said if statement.mode == DENIED]
    denied = [(f, s) for f in overlooked for s in denials if s.kind in (ANYTHING, f.kind) and s.place <= f.place]
    addressed = len(exact) + len(inexact)
    if overlooked:
        score = 1 if not addressed else 2 if denied or 2 * addressed < len(reader.findings) else 3
        missing = ", ".join(map(str, overlooked))
        quote = denied[0][1].quote if denied else asserted[0].quote if asserted else first
        return Score(score, quote, f"{addressed} of {len(reader.findings)} findings addressed; not: {missing}")
    if inexact:
        finding, statement = inexact[0]
        return Score(5 - min(2, len(inexact)), statement.quote, f"{finding} is addressed as {statement}")
    return Score(5, exact[0][1].quote, "every finding is named with its place")


def no_hallucination(case: Case, think: str, rubric: Rubric) -> Score:
    """Whether the image shows what the reasoning asserts of it."""
    reader = _reader(case, rubric)
    if reader.findings is None:
        return Score(None, None, NO_FINDINGS)
    said = reader.statements(think)
    asserted = _most_specific([statement for statement in said if statement.mode == ASSERTED])
    exact = [finding for finding, _ in _addressed(reader, asserted)[0]]
    misread, invented = [], []
    for statement in (statement for statement in asserted if not _shown(reader, statement)):
        open_findings = [finding for finding in reader.findings if finding not in exact]
        near = any(_is_misreading(reader, statement, finding) for finding in open_findings)
        (misread if near else invented).append(statement)
    if wrong := misread + invented:
        score = 1 if len(wrong) > 1 else 2 if invented else 3
        return Score(score, wrong[0].quote, f"not shown: {', '.join(map(str, wrong))}")
    weak = [statement for statement in said if statement.mode == POSSIBLE and not _shown(reader, statement)]
    if weak:
        return Score(4, weak[0].quote, f"not shown, but only called possible: {weak[0]}")
    quote = asserted[0].quote if asserted else said[0].quote if said else sentences(think)[0]
    return Score(5, quote, "everything asserted is shown" if asserted else "nothing is asserted of the image")


def _reader(case: Case, rubric: Rubric) -> ImageReader:
    rows = _table(case)
    try:
        return ImageReader(rubric.words, case.meta.get("findings"), case.options, rows)
    except ValueError as error:
        raise ValueError(f"{case.source}: {error}") from error


def _most_specific(said: list[Statement]) -> list[Statement]:
    """Each thing said once, and a thing said without its place not beside the same with it."""
    kept = {(statement.kind, statement.place): statement for statement in reversed(said)}
    return [
        statement for key, statement in reversed(kept.items())
        if not any(kind == statement.kind and place > statement.place for kind, place in kept)
    ]  # fmt: skip


def _addressed(
    reader: ImageReader, asserted: list[Statement]
) -> tuple[list[tuple[Finding, Statement]], list[tuple[Finding, Statement]], list[Finding]]:
    """Findings matched with statements, one to one: exactly, imprecisely (same place, then same kind), and not."""

    def covers(statement: Statement, finding: Finding) -> bool:
        return statement.kind == finding.kind and finding.place <= statement.place

    def same_place(statement: Statement, finding: Finding) -> bool:
        return bool(statement.place) and finding.place <= statement.place

    def same_kind(statement: Statement, finding: Finding) -> bool:
        placed = reader.has_side(statement.place) if reader.has_side(finding.place) else bool(statement.place)
        return statement.kind == finding.kind and placed

    free, left = list(asserted), list(reader.findings or ())
    matched: dict[bool, list[tuple[Finding, Statement]]] = {True: [], False: []}
    for fits in (covers, same_place, same_kind):
        for finding in list(left):
            if statement := next((s for s in free if fits(s, finding)), None):
                matched[fits is covers].append((finding, statement))
                free.remove(statement)
                left.remove(finding)
    return matched[True], matched[False], left


def _shown(reader: ImageReader, statement: Statement) -> bool:
    return any(
        statement.kind == finding.kind and not reader.conflict(statement.place, finding.place)
        for finding in reader.findings or ()
    )


def _is_misreading(reader: ImageReader, statement: Statement, finding: Finding) -> bool:
    """Whether a statement can be a finding that was seen, but with another kind, or in another zone of its side."""
    if statement.kind == finding.kind:
        return not reader.has_side(finding.place) or reader.same_side(statement.place, finding.place)
    return bool(statement.place) and finding.place <= statement.place


def reflection(case: Case, think: str, rubric: Rubric) -> Score:
    """Whether the reasoning takes a step up again: a word of checking, then earlier things named again or a change."""
    every, arrived = sentences(think), conclusions(case, think, rubric)
    marker, change = phrase(rubric.words.reflection), phrase(rubric.words.changes)
    best = Score(1, every[-1], "nothing is taken up again")
    for place, sentence in enumerate(every):
        before_it = [conclusion.target for conclusion in arrived if conclusion.place < place]
        after_it = [conclusion.target for conclusion in arrived if conclusion.place >= place]
        revised = bool(before_it and after_it) and before_it[-1] != after_it[-1]
        for match in marker.finditer(sentence.lower()):
            before = _things(" ".join(every[:place]) + " " + sentence[: match.start()], rubric)
            tail = " ".join([sentence[match.end() :], *every[place + 1 : place + 2]])
            again = sorted(_things(tail, rubric) & before)
            if again and (revised or change.search(tail.lower())):
                score = Score(5, sentence, f"something is changed; named again: {', '.join(again)}")
            else:
                score = Score(min(5, 2 + len(again)), sentence, f"named again: {', '.join(again) or 'nothing'}")
            if score.score > best.score:
                best = score
    return best


def _things(text: str, rubric: Rubric) -> set[str]:
    """The words and numbers of a text that can stand for something; plurals without their s."""
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]{3,}", NOT_A_SIDE.sub(" ", text.lower()))
    return {word.removesuffix("s") for word in words if word not in rubric.words.filler}
