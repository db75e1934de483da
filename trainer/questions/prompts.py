"""The prompt of a question: how question, options, context and images are put to a model, in one place."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mede2.trainer.data.records import Message

MARK = re.compile(r"<image \d+>")  # where MMMU's texts show one of their images
CHOOSE, YES_OR_NO, OPEN = "Answer with one of the options.", "Answer yes or no.", "Answer briefly."
YES_NO = ("yes", "no")


def pose(
    question: str,
    options: Sequence[str] = (),
    context: str = "",
    images: Sequence[Any] = (),
    marked: Mapping[str, Any] | None = None,
    closing: str | None = None,
) -> tuple[list[Message], list[Any]]:
    """One user message: images, then context, question, options one a line as `A. text`, and what is asked for.

    Args:
        question: its text.
        options: what is offered, in its order.
        context: what is to be read before the question.
        images: shown before everything else.
        marked: images by the mark, such as "<image 1>", that they replace wherever it stands in the texts; those whose
            mark stands nowhere are shown after `images`.
        closing: the last line; CHOOSE where there are options and OPEN where there are none, unless told otherwise.

    Returns:
        The prompt, and the images in the order of its placeholders (one for each time that it is shown).
    """
    marked = marked or {}
    offered = "\n".join(f"{chr(ord('A') + position)}. {option}" for position, option in enumerate(options))
    closing = closing or (CHOOSE if options else OPEN)
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
