"""Remarks: what no row is refused for but its author should know: rows and ids that stand twice, answers that
contradict each other, texts that look broken."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mede2.trainer.answering.answers import TAG, parse_answer
from mede2.trainer.data.records import Record, text_of

MISREAD = re.compile(r"[\ufffd\x80-\x84\x86-\x9f]")  # what a wrong decoding leaves: U+FFFD, and cp1252 read as Latin-1


@dataclass(frozen=True)
class Remark:
    """One remark on a row; `kind` is text, duplicate, contradiction or id here, and more in `pairs.py check`."""

    source: str
    kind: str
    text: str


@dataclass(frozen=True)
class Traits:
    """What of a row is compared with the others, as hashes of `normalized` text, so that ranks exchange little.

    Attributes:
        source: file and line.
        id: of the row, where it has one.
        question: the messages before the last answer, with the images' bytes.
        answers: the last answer; Stage II the chosen and the rejected one.
        conclusion: what the demonstration, or the chosen answer, says between its answer tags, where it has them.
        remarks: on this row by itself.
    """

    source: str
    id: str | int | None
    question: str
    answers: tuple[str, ...]
    conclusion: str | None
    remarks: tuple[Remark, ...]


def normalized(text: str) -> str:
    """Text in one form of its characters (NFKC), without upper case, in single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def traits(record: Record, image_hashes: tuple[str, ...]) -> Traits:
    """What `compare` compares of a record.

    Args:
        record: the row.
        image_hashes: of the bytes of its images.
    """
    question = [f"{message['role']}: {text_of([message])}" for message in record.conversations[0][:-1]]
    answers = tuple(normalized(text_of(conversation[-1:])) for conversation in record.conversations)
    parsed = parse_answer(text_of(record.conversations[0][-1:]))
    return Traits(
        record.source,
        record.id,
        _hash(*map(normalized, question), *image_hashes),
        tuple(map(_hash, answers)),
        _hash(normalized(parsed.answer)) if parsed.answer else None,
        tuple(Remark(record.source, kind, text) for kind, text in _own_remarks(record, answers)),
    )


def _own_remarks(record: Record, answers: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(kind, text) of what is odd in a row by itself."""
    for message in {id(message): message for messages in record.conversations for message in messages}.values():
        if misread := MISREAD.search(text_of([message])):
            yield "text", f"U+{ord(misread[0]):04X} in a text of the {message['role']}: it was read in a wrong encoding"
    for message in record.conversations[0][record.num_prompt_messages :]:
        text = text_of([message])
        if message["role"] == "assistant" and TAG.search(text):
            parsed = parse_answer(text)
            if not parsed.well_formed:
                yield "text", "a learnt answer with tags, but not in the form <think>...</think> <answer>...</answer>"
            elif not (parsed.think and parsed.answer):
                yield "text", f"nothing between the {'answer' if parsed.think else 'think'} tags of a learnt answer"
    if len(set(answers)) < len(answers):
        yield "duplicate", "chosen and rejected differ in nothing but case, white space or the form of characters"


def compare(rows: Iterable[Traits]) -> list[Remark]:
    """The remarks on rows, their own and those from comparing them, in the order of the rows."""
    rows = list(rows)
    whole: dict[tuple, str] = {}
    ids: dict[str | int, str] = {}
    conclusions: dict[str, tuple[str, str]] = {}
    rejected = {(row.question, answer): row.source for row in reversed(rows) for answer in row.answers[1:]}
    remarks: list[Remark] = []
    for row in rows:
        remarks += row.remarks
        if first := whole.get((row.question, row.answers)):
            remarks.append(Remark(row.source, "duplicate", f"the row of {first} again"))
            continue
        whole[row.question, row.answers] = row.source
        if row.id is not None and (first := ids.setdefault(row.id, row.source)) != row.source:
            remarks.append(Remark(row.source, "id", f"id {row.id!r:.60} again, after {first}"))
        if len(row.answers) > 1 and (other := rejected.get((row.question, row.answers[0]), row.source)) != row.source:
            remarks.append(Remark(row.source, "contradiction", f"the chosen answer is the rejected one of {other}"))
        elif row.conclusion:
            source, conclusion = conclusions.setdefault(row.question, (row.source, row.conclusion))
            if conclusion != row.conclusion:
                text = f"the question and images of {source}, but another answer is learnt"
                remarks.append(Remark(row.source, "contradiction", text))
    return remarks


def briefly(remarks: Sequence[Remark]) -> list[str]:
    """A line for each kind: the first remark, and how many there are."""
    lines = []
    for kind in dict.fromkeys(remark.kind for remark in remarks):
        first, *others = (remark for remark in remarks if remark.kind == kind)
        such = f"{len(others)} more such remark{'s' * (len(others) > 1)}"
        more = f" (and {such}: launch/pairs.py check lists all)" if others else ""
        lines.append(f"warning: {first.source}: {first.text}{more}")
    return lines


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
