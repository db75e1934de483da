"""Records: the rows of a jsonl file in the conversational form, read through `datasets` and checked one by one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mede2.trainer.settings import ELICIT

Message = dict[str, Any]  # {"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, ...]}

KEYS = {ELICIT: {"messages"}, ELICIT + 1: {"prompt", "chosen", "rejected"}}
OPTIONAL_KEYS = {"images", "meta", "id"}


class BadRow(ValueError):
    """A row that cannot be used; `source` is its file and line."""

    def __init__(self, source: str, problem: str):
        super().__init__(f"{source}: {problem}")
        self.source, self.problem = source, problem


@dataclass(frozen=True)
class Record:
    """One row. Stage I has one conversation, Stage II two: the prompt with the chosen, then with the rejected answer.

    Attributes:
        source: file and line, for messages.
        conversations: messages with list contents.
        num_prompt_messages: leading messages of a conversation that are given, not learnt (Stage I: 0, every
            assistant turn is learnt).
        images: files, in the order of their placeholders.
        meta: whatever the row carries for people and other tools.
    """

    source: str
    conversations: tuple[tuple[Message, ...], ...]
    num_prompt_messages: int
    images: tuple[Path, ...]
    meta: dict = field(default_factory=dict)


def read_records(files: tuple[str, ...], stage: int) -> Iterator[Record | BadRow]:
    """Yield every row of the files in order: a Record, or the BadRow that says why it is none."""
    for file in files:
        for line_number, line in enumerate(_lines(file), start=1):
            if line.strip():
                try:
                    yield parse_record(line, f"{file}:{line_number}", Path(file).parent, stage)
                except BadRow as problem:
                    yield problem


def _lines(file: str) -> Iterator[str]:
    """The lines of a text file, streamed by `datasets` (which also reads compressed files and keeps no copy)."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not Path(file).is_file():
        raise ValueError(f"no such file: {file}")
    try:
        for row in load_dataset("text", data_files={"rows": file}, split="rows", streaming=True):
            yield row["text"]
    except (UnicodeDecodeError, DatasetGenerationError) as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


def parse_record(line: str, source: str, folder: Path, stage: int) -> Record:
    """Parse one line of jsonl.

    Args:
        line: the JSON text.
        source: "file:line", for messages.
        folder: the folder that image paths are relative to.
        stage: ELICIT rows have `messages`, ENHANCE rows `prompt`, `chosen` and `rejected`.

    Raises:
        BadRow: names what is wrong and what to do.
    """

    def check(holds: bool, problem: str) -> None:
        if not holds:
            raise BadRow(source, problem)

    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(source, f"not JSON: {error.msg} at column {error.colno}") from error
    check(isinstance(row, dict), f"a row is a JSON object, not {type(row).__name__}")

    wanted = KEYS[stage]
    if missing := sorted(wanted - row.keys()):
        other = next((name for name, keys in KEYS.items() if name != stage and keys <= row.keys()), None)
        hint = f" (this is a row for Stage {'I' * other})" if other else ""
        raise BadRow(source, f"{', '.join(missing)}: missing{hint}")
    if unknown := sorted(row.keys() - wanted - OPTIONAL_KEYS):
        raise BadRow(source, f"{', '.join(unknown)}: unknown; put what is not for training under `meta`")
    meta = row.get("meta") or {}
    check(isinstance(meta, dict), f"meta: a JSON object, not {type(meta).__name__}")

    if stage == ELICIT:
        messages = _messages(source, "messages", row["messages"])
        check(messages[-1]["role"] == "assistant", "messages: the last one must be the assistant's")
        conversations, num_prompt_messages = (messages,), 0
    else:
        prompt = parse_prompt(source, row["prompt"])
        answers = []
        for name in ("chosen", "rejected"):
            answer = _messages(source, name, row[name], first_role="assistant")
            check(len(answer) == 1, f"{name}: one assistant message, not {len(answer)}")
            answers.append(answer)
        check(answers[0] != answers[1], "chosen and rejected are the same text: no preference to learn")
        conversations, num_prompt_messages = tuple(prompt + answer for answer in answers), len(prompt)

    images = parse_images(source, row.get("images"), conversations[0], folder)
    return Record(source, conversations, num_prompt_messages, images, meta)


def parse_prompt(source: str, value: Any) -> tuple[Message, ...]:
    """The messages that an answer follows, or the BadRow that they are."""
    prompt = _messages(source, "prompt", value)
    if prompt[-1]["role"] != "user":
        raise BadRow(source, "prompt: the last message must be the user's")
    return prompt


def parse_images(source: str, value: Any, messages: tuple[Message, ...], folder: Path) -> tuple[Path, ...]:
    """The files of the placeholders in `messages`, or the BadRow where they do not fit."""
    images = value or []
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadRow(source, "images: a list of paths")
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise BadRow(source, f"images: {len(images)} paths for {placeholders} image placeholders")
    return tuple(folder / image for image in images)


def _messages(source: str, name: str, value: Any, first_role: str = "user") -> tuple[Message, ...]:
    """Messages with list contents; roles must alternate from `first_role`, after an optional system message."""
    if not isinstance(value, list) or not value:
        raise BadRow(source, f"{name}: a list of messages, not {value!r:.60}")
    messages, expected = [], first_role
    for position, message in enumerate(value):
        where = f"{name}[{position}]"
        if not isinstance(message, dict) or not {"role", "content"} == message.keys():
            raise BadRow(source, f'{where}: a message is {{"role": ..., "content": ...}}, not {message!r:.60}')
        role = message["role"]
        if not (role == "system" and position == 0 and first_role == "user"):
            if role != expected:
                raise BadRow(source, f"{where}: role {role!r} where {expected!r} is due")
            expected = "assistant" if role == "user" else "user"
        messages.append({"role": role, "content": _content(source, where, role, message["content"])})
    if messages[-1]["role"] == "system":
        raise BadRow(source, f"{name}: only a system message")
    return tuple(messages)


def _content(source: str, where: str, role: str, content: Any) -> list[dict]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise BadRow(source, f"{where}: content is text or a list of parts, not {content!r:.60}")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
            if any("\ud800" <= character <= "\udfff" for character in part["text"]):
                raise BadRow(source, f"{where}: a text that is not valid Unicode (half of a surrogate pair)")
            continue
        if kind == "image" and part.keys() == {"type"}:
            if role == "user":
                continue
            raise BadRow(source, f"{where}: an image in a message of the {role}; images belong to the user's")
        raise BadRow(
            source,
            f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image"}} (paths go to `images`), '
            f"not {part!r:.60}",
        )
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise BadRow(source, f"{where}: empty")
    return parts
