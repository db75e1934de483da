"""Whether an extracted answer is the key's, as an evaluation counts it, and how much of an open key it has."""

import re
from collections.abc import Sequence

from mede2.trainer.answering.answers import plain
from mede2.trainer.answering.extraction import Extracted
from mede2.trainer.answering.mentions import clean

ARTICLES = frozenset({"a", "an", "the"})
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?")
WORD = re.compile(rf"{NUMBER.pattern}|\w+")


def is_match(extracted: Extracted, key: str, options: Sequence[str] = ()) -> bool:
    """Whether an answer counts as right. Unparsed is wrong.

    Among options, of which the key is one, it must be the one that is meant. An answer to an open question must have
    the key's `words`, all of them and no others, in its order. That is a lower bound: a synonym, or a sentence around
    the right words, is counted as wrong (`word_recall` tells the second).
    """
    if options:
        return extracted.option == list(options).index(key)
    return extracted.answer is not None and words(extracted.answer) == words(key)


def word_recall(answer: str, key: str) -> float:
    """Share of the key's different `words` that the answer has, 0 to 1, for open questions (arXiv 2306.00890).

    Raises:
        ValueError: the key has no words.
    """
    wanted = set(words(key))
    if not wanted:
        raise ValueError(f"key: {key!r} has no words; an open question needs a key that can be compared")
    return len(wanted.intersection(words(answer))) / len(wanted)


def words(text: str) -> tuple[str, ...]:
    """Words as SQuAD's exact match compares them (arXiv 1606.05250): lower case, no articles and no punctuation.

    Numbers are compared by value: 3.50 is 3.5, 1,000 is 1000. A text of articles or punctuation alone is one word.
    """
    found = [_by_value(word) for word in WORD.findall(clean(text).lower()) if word not in ARTICLES]
    return tuple(found or filter(None, [plain(text)]))


def _by_value(word: str) -> str:
    return repr(float(word.replace(",", ""))) if NUMBER.fullmatch(word) else word
