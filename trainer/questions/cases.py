"""Cases: questions with images and the key to the answer, from a jsonl file."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mede2.trainer.data.records import BadRow, Message, parse_images, parse_prompt, parse_row
from mede2.trainer.files import hash_file, hash_json
from mede2.trainer.questions.rows import Row, read_lines, tell

WANTED = {"id": str, "prompt": list, "answer": str}
OPTIONAL = {"images": list, "options": list, "explanation": str, "meta": dict}
FORMAT = (
    "Reason about the images and the question step by step between <think> and </think>: what is seen, what follows "
    "from it, and a check of both. Then give the answer alone between <answer> and </answer>; where options are "
    "offered, the text of one of them. Write nothing else."
)
KINDS = {str: "text", list: "a list", dict: "a JSON object"}


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        source: file and line, for messages.
        id: unique in its file.
        prompt: messages with list contents, the last one the user's.
        images: files, in the order of their placeholders.
        answer: the key; one of `options` where there are any.
        options: what the question offers, in its order.
        explanation: why the answer is right, where the case says so.
        meta: specialty, modality, license, findings ({place: finding}) and whatever else the case carries.
    """

    source: str
    id: str
    prompt: tuple[Message, ...]
    images: tuple[Path, ...]
    answer: str
    options: tuple[str, ...] = ()
    explanation: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def image_hashes(self) -> tuple[str, ...]:
        """sha256 of the bytes of each image file."""
        return tuple(map(hash_file, self.images))

    @cached_property
    def digest(self) -> str:
        """sha256 of all that an answer to the case depends on: prompt and image bytes, but not the key."""
        return hash_json([self.prompt, self.image_hashes])


def read_cases(path: Path) -> list[Case]:
    """Read and check every case of a file. Whether the images decode is seen when they are first used.

    Raises:
        ValueError: lists the rows that cannot be used with file, line and reason, or says that there is no case.
    """
    cases: dict[str, Case] = {}
    problems: list[BadRow] = []
    for source, line in read_lines(path):
        try:
            case = parse_case(source, parse_row(source, line), path.parent)
            if case.id in cases:
                raise BadRow(source, f"id: {case.id!r} again, after {cases[case.id].source}; ids are unique")
            cases[case.id] = case
        except BadRow as problem:
            problems.append(problem)
    if problems:
        raise tell(f"{path}: {len(problems)} of {len(problems) + len(cases)} cases cannot be used:", problems)
    if not cases:
        raise ValueError(f"{path}: no case in it")
    return list(cases.values())


def with_system(case: Case, system: str) -> tuple[Message, ...]:
    """The case's prompt behind a system message.

    Raises:
        BadRow: the case has one of its own.
    """
    if case.prompt[0]["role"] == "system":
        raise BadRow(case.source, "prompt: has a system message of its own, so --system cannot give it another")
    return ({"role": "system", "content": [{"type": "text", "text": system}]}, *case.prompt)


def parse_case(source: str, row: Row, folder: Path) -> Case:
    """Check one row.

    Args:
        source: "file:line", for messages.
        row: the JSON object.
        folder: what image paths are relative to.

    Raises:
        BadRow: names the field, what it holds and what to do.
    """
    if missing := sorted(WANTED.keys() - row.keys()):
        raise BadRow(source, f"{', '.join(missing)}: missing")
    if unknown := sorted(row.keys() - WANTED.keys() - OPTIONAL.keys()):
        raise BadRow(source, f"{', '.join(unknown)}: unknown; put what is not part of the question under `meta`")
    given = {name: value for name, value in row.items() if name in WANTED or value is not None}
    for name, kind in (WANTED | OPTIONAL).items():
        if not isinstance(given.get(name, kind()), kind):
            raise BadRow(source, f"{name}: {KINDS[kind]}, not {given[name]!r:.60}")
    for name in ("id", "answer"):
        if not given[name].strip():
            raise BadRow(source, f"{name}: empty")
    options = tuple(given.get("options", ()))
    if not all(isinstance(option, str) and option.strip() for option in options) or len(set(options)) < len(options):
        raise BadRow(source, f"options: different texts, none empty, not {list(options)!r:.80}")
    if options and given["answer"] not in options:
        raise BadRow(source, f"answer: {given['answer']!r:.60} is none of the options {list(options)!r:.80}")
    prompt = parse_prompt(source, given["prompt"])
    images = parse_images(source, given.get("images"), prompt, folder)
    for image in images:
        if not image.is_file():
            raise BadRow(source, f"image {image}: no such file")
    return Case(
        source, given["id"], prompt, images, given["answer"], options, given.get("explanation"), given.get("meta", {})
    )


def read_system(system: str | None) -> str | None:
    """The system message that `--system` names: `format`, or the text of a file; None is none."""
    if system is None or system == "format":
        return system and FORMAT
    try:
        text = Path(system).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--system {system}: `format` or a text file ({error})") from error
    if not text:
        raise ValueError(f"--system {system}: an empty file")
    return text
