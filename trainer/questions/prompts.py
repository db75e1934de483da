"""The prompt of a question: how question, options, context and images are put to a model, in one place."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mede2.trainer.data.records import Message

MARK = re.compile(r"<image \d+>")  # where MMMU's texts show one of their images
CHOOSE, YES_OR_NO, OPEN = "Answer with one of the options.", "Answer yes or no.", "Answer briefly."
CHOOSE_TEXT, CHOOSE_LETTER = (
    "Answer with the text of one of the options.",
    "Answer with the letter of one of the options.",
)
YES_NO = ("yes", "no")


def ask_for(options: Sequence[str]) -> str:
    """The closing line. Answers are read by text first, then by letter: where a text is itself a letter of an option,
    as in "A. C", the text is asked for, and where a text is an image, the letter."""
    if not options:
        return OPEN
    if any(MARK.search(option) for option in options):
        return CHOOSE_LETTER
    letters = {chr(ord("A") + position) for position in range(len(options))}
    return CHOOSE_TEXT if any(option.upper() in letters for option in options) else CHOOSE


def pose(
    closing: str,
    question: str,
    options: Sequence[str] = (),
    context: str = "",
    images: Sequence[Any] = (),
    marked: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[Message], list[Any]]:
    """One user message: images, then context, question, options one a line as `A. text`, and what is asked for.

    Args:
        closing: the last line, what is asked for, see `ask_for`.
        question: its text.
        options: what is offered, in its order.
        context: what is to be read before the question.
        images: shown before everything else.
        marked: images by the mark, such as "<image 1>", that they replace wherever it stands in the texts; those whose
            mark stands nowhere are shown after `images`.

    Returns:
        The prompt, and the images in the order of its placeholders (one for each time that it is shown).
    """
    offered = "\n".join(f"{chr(ord('A') + position)}. {option}" for position, option in enumerate(options))
    text = "\n\n".join(part for part in (context.strip(), question.strip(), offered, closing) if part)
    shown = [*images, *(image for mark, image in marked.items() if mark not in text)]
    content: list[dict[str, str]] = [{"type": "image"} for _ in shown]
    start = 0
    for match in MARK.finditer(text):
        if match[0] in marked:
            if before := text[start : match.start()].strip(" "):
                content.append({"type": "text", "text": before})
            content.append({"type": "image"})
            shown.append(marked[match[0]])
            start = match.end()
    content.append({"type": "text", "text": text[start:].lstrip(" ")})
    return [{"role": "user", "content": content}], shown
