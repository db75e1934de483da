"""Records: the rows of a jsonl file in the conversational form, read through `datasets` and checked one by one."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mede2.trainer.settings import ELICIT

Message = dict[str, Any]  # {"role": str, "content": [{"type": "text", "text": str} | {"type": "image"}, ...]}

KEYS = {ELICIT: {"messages"}, ELICIT + 1: {"prompt", "chosen", "rejected"}}
OPTIONAL_KEYS = {"images", "meta", "id"}
MOST_NESTED = 100  # levels of lists and objects in a row
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tab, line feed and carriage return
HALF_PAIR = re.compile(r"[\ud800-\udfff]")
UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # what would break up a line of a message
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux
IMAGE_ROOT = "MEDE2_IMAGE_ROOT"  # environment variable: further folders that images may lie in, with : between
URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


class BadRow(ValueError):
    """A row that cannot be used, told in one line.

    Attributes:
        source: file and line.
        problem: what is wrong and what to do.
        kind: form, text, image or length.
    """

    def __init__(self, source: str, problem: str, kind: str = "form"):
        problem = UNPRINTED.sub(lambda character: f"\\u{ord(character[0]):04x}", problem)
        super().__init__(f"{source}: {problem}")
        self.source, self.problem, self.kind = source, problem, kind

    def __reduce__(self):
        """Ranks tell each other by pickle what was raised."""
        return BadRow, (self.source, self.problem, self.kind)


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
        id: the row's name, where it has one.
    """

    source: str
    conversations: tuple[tuple[Message, ...], ...]
    num_prompt_messages: int
    images: tuple[Path, ...]
    meta: dict = field(default_factory=dict)
    id: str | int | None = None


def read_records(files: tuple[str, ...], stage: int) -> Iterator[Record | BadRow]:
    """Yield every row of the files in order: a Record, or the BadRow that says why it is none."""
    for file in files:
        for line_number, line in enumerate(_lines(file), start=1):
            if line.strip():
                try:
                    yield parse_record(line, f"{file}:{line_number}", Path(file).parent, stage)
                except BadRow as problem:
                    yield problem


def detect_stage(file: str) -> int:
    """The stage that a file's rows are for, by the first row that has the keys of one.

    Raises:
        ValueError: there is none, or the file cannot be read.
    """
    for line_number, line in enumerate(_lines(file), start=1):
        if line.strip():
            try:
                row = parse_row(f"{file}:{line_number}", line)
            except BadRow:
                continue
            for stage, keys in KEYS.items():
                if keys <= row.keys():
                    return stage
    wanted = " or ".join(", ".join(sorted(keys)) for keys in KEYS.values())
    raise ValueError(f"{file}: no row of Stage I or II in it, with {wanted}")


def _lines(file: str) -> Iterator[str]:
    """The lines of a text file, streamed by `datasets` (which also reads compressed files and keeps no copy)."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
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

    row = parse_row(source, line)
    wanted = KEYS[stage]
    if missing := sorted(wanted - row.keys()):
        other = next((name for name, keys in KEYS.items() if name != stage and keys <= row.keys()), None)
        hint = f" (this is a row for Stage {'I' * other})" if other else f"; the row has {', '.join(row) or 'no key'}"
        raise BadRow(source, f"{', '.join(missing)}: missing{hint}")
    if unknown := sorted(row.keys() - wanted - OPTIONAL_KEYS):
        raise BadRow(source, f"{', '.join(unknown)}: unknown; put what is not for training under `meta`")
    meta, given_id = row.get("meta"), row.get("id")
    check(meta is None or isinstance(meta, dict), f"meta: a JSON object, not {type(meta).__name__}")
    named = isinstance(given_id, (str, int)) and not isinstance(given_id, bool) and given_id != ""
    check(given_id is None or named, f"id: text or a whole number, not {given_id!r:.60}")

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
        chosen, rejected = map(text_of, answers)
        check(chosen != rejected, "chosen and rejected are the same text: no preference to learn")
        conversations, num_prompt_messages = tuple(prompt + answer for answer in answers), len(prompt)

    images = parse_images(source, row.get("images"), conversations[0], folder)
    return Record(source, conversations, num_prompt_messages, images, meta or {}, given_id)


def parse_row(source: str, line: str) -> dict[str, Any]:
    """One line as a JSON object of which nothing is lost: a key that stands twice, a number that JSON does not have and
    text that is no Unicode are refused.

    Raises:
        BadRow: names what is wrong and where.
    """

    def refuse(constant: str) -> None:
        raise BadRow(source, f"not JSON: {constant}, which JSON does not have; write null")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadRow(source, f"{twice}: stands twice in one object; only one of the two would count")
        return found

    try:
        row = json.loads(line, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at column {error.colno}"
        if line.strip() in ("{", "["):
            problem += " (a row is one whole line: jq -c turns other JSON into such lines)"
        raise BadRow(source, problem) from error
    except RecursionError as error:
        raise BadRow(source, f"nested more than {MOST_NESTED} levels deep") from error
    except BadRow:
        raise
    except ValueError as error:  # of Python's int
        raise BadRow(source, f"a whole number of too many digits ({error})") from error
    if not isinstance(row, dict):
        raise BadRow(source, f"a row is a JSON object, not {type(row).__name__}")
    _check_strings(source, row, "", 1)
    return row


def _check_strings(source: str, value: Any, where: str, level: int) -> None:
    """Refuse half surrogate pairs, which no file in UTF-8 can hold, and nesting that no row needs."""
    if level > MOST_NESTED:
        raise BadRow(source, f"nested more than {MOST_NESTED} levels deep")
    if isinstance(value, str):
        if HALF_PAIR.search(value):
            raise BadRow(source, f"{where}: not valid Unicode (half of a surrogate pair)", "text")
    elif isinstance(value, list):
        for position, part in enumerate(value):
            _check_strings(source, part, f"{where}[{position}]", level + 1)
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_strings(source, name, f"a key of {where or 'the row'}", level)
            _check_strings(source, part, f"{where}.{name}" if where else name, level + 1)


def parse_prompt(source: str, value: Any) -> tuple[Message, ...]:
    """The messages that an answer follows, or the BadRow that they are."""
    prompt = _messages(source, "prompt", value)
    if prompt[-1]["role"] != "user":
        raise BadRow(source, "prompt: the last message must be the user's")
    return prompt


def parse_images(
    source: str, value: Any, messages: tuple[Message, ...], folder: Path, *others: Path
) -> tuple[Path, ...]:
    """The files of the placeholders in `messages`, or the BadRow where they do not fit, or lead out of `folder`, the
    `others` and what MEDE2_IMAGE_ROOT names: rows from elsewhere choose no files of this machine."""
    inside = [os.path.realpath(root) for root in (folder, *others, *_image_roots())]
    images = [] if value is None else value
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise BadRow(source, f"images: a list of paths, not {images!r:.60}")
    for image in images:
        if URL.match(image):
            raise BadRow(source, f"images: {image!r:.60} is a URL; save the image and name its file")
        if UNPRINTED.search(image):
            raise BadRow(source, f"images: the path {image!r:.60} holds a control character")
        if max(len(part.encode()) for part in image.split("/")) > LONGEST_NAME or len(image.encode()) > LONGEST_PATH:
            raise BadRow(source, f"images: the path {image!r:.60}... is longer than a path can be")
        place = Path(os.path.realpath(folder / image))  # of a link, where it leads
        if not any(place.is_relative_to(root) for root in inside):
            raise BadRow(
                source,
                f"images: {image!r:.200} leads out of {folder}, the folder of its file; put the images there, or name "
                f"a folder that holds them in the environment variable {IMAGE_ROOT}",
            )
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise BadRow(
            source,
            f"images: {len(images)} paths for {placeholders} image placeholders; each image is shown where a part "
            '{"type": "image"} stands',
        )
    return tuple(folder / image for image in images)


def _image_roots() -> list[str]:
    """From the environment, not from settings: a recipe that comes with the rows cannot widen it."""
    return [root for root in os.environ.get(IMAGE_ROOT, "").split(os.pathsep) if root]


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
            if control := CONTROL.search(part["text"]):
                raise BadRow(source, f"{where}: a text with the control character U+{ord(control[0]):04X}", "text")
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
    if not any(part["type"] == "image" or _is_visible(part["text"]) for part in parts):
        raise BadRow(source, f"{where}: empty")
    return parts


def _is_visible(text: str) -> bool:
    """Whether there is more than white space and characters without a shape, such as U+200B."""
    return any(character.isprintable() and character != " " for character in text)


def text_of(messages: Iterable[Message]) -> str:
    """The text of messages, however it is cut into parts."""
    return "".join(part.get("text", "") for message in messages for part in message["content"])


def message_text(message: Message) -> str:
    """The text of one message, [image] where an image stands."""
    return "".join("[image] " if part["type"] == "image" else part["text"] for part in message["content"])
