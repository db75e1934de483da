"""Reading an answer out of generated text: the format check, the two parts, and the option that is meant, or None."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

STRICT = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
LETTERED = re.compile(r"\(?(?P<letter>[A-Za-z])\)?(?:[.:)]\s*(?P<text>.*))?", re.DOTALL)  # A  (A)  A.  A. text


@dataclass(frozen=True)
class ParsedAnswer:
    """What a generation says.

    `think` and `answer` are None unless it is `well_formed`; `option`, an index, is None unless one option is meant.
    """

    well_formed: bool
    think: str | None = None
    answer: str | None = None
    option: int | None = None


def parse_answer(text: str, options: Sequence[str] = ()) -> ParsedAnswer:
    """Read `<think>...</think> <answer>...</answer>`, with nothing before, between or after, each tag once.

    Args:
        text: the generation, special tokens removed.
        options: the texts of the options in the order in which they were offered; empty for an open question.
    """
    match = STRICT.fullmatch(text)
    if match is None or TAG.search(match["think"]) or TAG.search(match["answer"]):
        return ParsedAnswer(well_formed=False)
    think, answer = match["think"].strip(), match["answer"].strip()
    return ParsedAnswer(True, think, answer, match_option(answer, options))


def match_option(answer: str, options: Sequence[str]) -> int | None:
    """The index of the option that `answer` names by its text or by its letter; None if none or more than one is meant.

    Upper and lower case, runs of spaces and a final full stop do not count. A letter with a text beside it counts only
    if the two name the same option.
    """
    texts = [plain(option) for option in options]
    if texts.count(plain(answer)) == 1:
        return texts.index(plain(answer))
    match = LETTERED.fullmatch(answer.strip())
    if match is None:
        return None
    index = ord(match["letter"].upper()) - ord("A")
    if index >= len(options) or (match["text"] and plain(match["text"]) != texts[index]):
        return None
    return index


def is_right(parsed: ParsedAnswer, key: str, options: Sequence[str] = ()) -> bool | None:
    """Whether an answer is the right one; None if words alone cannot tell.

    Among options the one that is meant must be the key's (see `match_option`; a text that names none is wrong). To an
    open question the same words are right (as `plain` has them); others are wrong only where both are numbers, or both
    yes or no, for a thing has many names. What is not well-formed is wrong.
    """
    if not parsed.well_formed:
        return False
    if options:
        return parsed.option is not None and parsed.option == match_option(key, options)
    given, right = plain(parsed.answer), plain(key)
    if NUMBER.fullmatch(given) and NUMBER.fullmatch(right):
        return float(given) == float(right)
    if given == right:
        return True
    return False if {given, right} == {"yes", "no"} else None


def plain(text: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
