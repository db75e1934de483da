"""Adapters: which field of a benchmark's rows is what, declared; and the case that a row makes by it."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mede2.trainer.data.images import DAMAGE
from mede2.trainer.data.records import BadRow, parse_images, parse_prompt
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.prompts import MARK, YES_NO, YES_OR_NO, ask_for, pose
from mede2.trainer.questions.rows import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif"}  # where they are not the format's own name
KEY_TWICE = "the right option's text stands twice among the options"


@dataclass(frozen=True)
class LeftOut:
    """A row that is none of the benchmark's questions, and why; it is counted and told."""

    reason: str


Outcome = Case | LeftOut | BadRow


@dataclass(frozen=True)
class Adapter:
    """What the fields of a row are. A field named nowhere here is an error in a row, and so is one that a row lacks
    unless it is `optional`.

    Attributes:
        question: its text; None: it stands in the image, and `instead` is asked.
        answer: text of the right option, or of the answer to an open question; None: only `letter` has the key.
        letter: letter of the right option.
        options: one field with a list or {letter: text}, or a field for each option; () where there are none.
        choices: options that are the same for every row, and no field.
        images: fields with the name of a file, a list of names, or an embedded image.
        id: field; None: the row's number.
        context: what is to be read before the question.
        explanation: why the answer is right.
        meta: key of the case's meta: field.
        unused: fields that the format has and nothing here needs.
        made: of all these, those that `prepare` makes, and no row has of itself.
        optional: fields that a row may lack, or have empty.
        instead: what is asked where the question stands in the image; the options then stand there, too.
        marked: images are shown where the texts have their marks: field image_1 at "<image 1>".
        yes_no: questions without options whose key is yes or no get these two as options, for scoring: they are not
            listed in the prompt, which says "Answer yes or no.", and `meta.answer_type` is closed unless the row says.
            Scoring reads the words; it would also take a bare A for yes, which nobody offered.
        editable: the file is the user's own, so that what is doubtful in it is an error.
        prepare: mends a row's form, (source, row) -> fields to change; may raise BadRow.
        leave_out: says of a row why it is left out, or None.
    """

    question: str | None
    answer: str | None = None
    letter: str | None = None
    options: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    id: str | None = None
    context: str | None = None
    explanation: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    instead: str = ""
    marked: bool = False
    yes_no: bool = False
    editable: bool = False
    prepare: Callable[[str, Row], Row] = lambda source, row: {}
    leave_out: Callable[[Row], str | None] = lambda row: None

    @property
    def fields(self) -> set[str]:
        """Every field that a row may have."""
        single = {self.question, self.answer, self.letter, self.id, self.context, self.explanation} - {None}
        several = {*self.options, *self.images, *self.meta.values(), *self.unused, *self.optional}
        return (single | several) - set(self.made)


def adapt(adapter: Adapter, rows: Iterable[tuple[str, Row | BadRow]], folder: Path, store: Path) -> Iterator[Outcome]:
    """Make a case of every row.

    Args:
        adapter: what the fields are.
        rows: ("file and place", row).
        folder: what names of image files are relative to.
        store: where embedded images are written.
    """
    for number, (source, row) in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield make_case(adapter, source, number, row, folder, store)
        except BadRow as problem:
            yield problem


def make_case(adapter: Adapter, source: str, number: int, row: Row, folder: Path, store: Path) -> Case | LeftOut:
    """The case of one row.

    An option's text that stands twice is let be while it is wrong: no answer can mean it and be right. Where it is the
    key, no text can name the key alone; such a row is left out and told, or an error where the file is `editable`.

    Raises:
        BadRow: names the field, what it holds and what to do.
    """
    if unknown := sorted(row.keys() - adapter.fields):
        raise BadRow(source, f"{', '.join(unknown)}: unknown; the fields here are {', '.join(sorted(adapter.fields))}")
    if missing := sorted(adapter.fields - set(adapter.optional) - row.keys()):
        raise BadRow(source, f"{', '.join(missing)}: missing; the row has {', '.join(row) or 'no field'}")
    if reason := adapter.leave_out(row):
        return LeftOut(reason)
    for name in adapter.options:
        if row.get(name) is None and name not in (*adapter.optional, *adapter.made):
            raise BadRow(source, f"{name}: null where options are due")
    row = row | adapter.prepare(source, row)

    options = _options(source, adapter, row)
    answer = _key(source, adapter, row, options)
    if options.count(answer) > 1 and not adapter.editable:
        return LeftOut(KEY_TWICE)
    if adapter.editable and len(set(options)) < len(options):
        raise BadRow(source, f"options: different texts, not {list(options)!r:.80}")
    offered, closing = options, ask_for(options)
    meta = {key: row[name] for key, name in adapter.meta.items() if row.get(name) not in (None, "")}
    if adapter.yes_no:
        closed = not options and answer.lower() in YES_NO
        meta.setdefault("answer_type", "closed" if closed else "open")
        if closed:
            options, answer, closing = YES_NO, answer.lower(), YES_OR_NO

    question = read_text(source, adapter.question, row) if adapter.question else adapter.instead
    images = _images(source, adapter, row, store)
    if not images and adapter.images and not set(adapter.images) <= set(adapter.optional):
        raise BadRow(source, f"{', '.join(adapter.images)}: no image", "image")
    context = read_text(source, adapter.context, row) if adapter.context and row.get(adapter.context) else ""
    messages, shown = pose(
        closing,
        question,
        offered if adapter.question else (),
        context,
        () if adapter.marked else list(images.values()),
        images if adapter.marked else {},
    )
    if adapter.marked:
        for part in messages[0]["content"]:
            if stray := MARK.search(part.get("text", "")):
                raise BadRow(source, f"{stray[0]} stands in the text, and the row has no such image", "image")
    prompt = parse_prompt(source, messages)
    paths = parse_images(source, shown, prompt, folder, store)
    for path in paths:
        if not path.is_file():
            raise BadRow(source, f"image {path}: no such file", "image")
    name = read_text(source, adapter.id, row) if adapter.id and row.get(adapter.id) is not None else str(number)
    explanation = row.get(adapter.explanation) if adapter.explanation else None
    return Case(source, name, prompt, paths, answer, options, explanation or None, meta)


def read_text(source: str, name: str, row: Row) -> str:
    """A field's text, or number as text, without white space around it; nothing is a BadRow."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(source, f"{name}: text, not {value!r:.60}")
    if not (text := str(value).strip()):
        raise BadRow(source, f"{name}: empty")
    return text


def option_texts(source: str, name: str, value: Any) -> tuple[str, ...]:
    """The options of a list, or of {letter: text} with the letters from A on; a letter without a text (null, as parquet
    fills up its rows) is none."""
    if isinstance(value, dict):
        given = {letter: text for letter, text in value.items() if text is not None}
        if "".join(sorted(given)) != LETTERS[: len(given)]:
            raise BadRow(source, f"{name}: letters from A on, not {', '.join(given)}")
        value = [given[letter] for letter in sorted(given)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in value):
        raise BadRow(source, f"{name}: a list of texts or {{letter: text}}, none empty, not {value!r:.80}")
    if not 2 <= len(value) <= len(LETTERS):
        raise BadRow(source, f"{name}: 2 to {len(LETTERS)} options, not {len(value)}")
    return tuple(text.strip() for text in value)


def _options(source: str, adapter: Adapter, row: Row) -> tuple[str, ...]:
    if len(adapter.options) > 1:
        return option_texts(source, ", ".join(adapter.options), [row[name] for name in adapter.options if name in row])
    if not adapter.options or row.get(adapter.options[0]) is None:
        return adapter.choices
    return option_texts(source, adapter.options[0], row[adapter.options[0]])


def _key(source: str, adapter: Adapter, row: Row, options: tuple[str, ...]) -> str:
    """The answer: the text of the right option where there are options. Letter and text must name the same one."""
    letter = row.get(adapter.letter) if adapter.letter else None
    text = row.get(adapter.answer) if adapter.answer else None
    if letter in (None, "") or not options:
        answer = read_text(source, adapter.answer or str(adapter.letter), row)
        if options and answer not in options:
            raise BadRow(source, f"{adapter.answer}: {answer!r:.60} is none of the options {list(options)!r:.80}")
        return answer
    name = adapter.answer if adapter.letter in adapter.made else adapter.letter
    index = LETTERS.find(letter.strip()) if isinstance(letter, str) and len(letter.strip()) == 1 else -1
    if not 0 <= index < len(options):
        raise BadRow(source, f"{name}: {letter!r:.60} is the letter of none of the {len(options)} options")
    if text not in (None, "") and _spaced(read_text(source, str(adapter.answer), row)) != _spaced(options[index]):
        raise BadRow(source, f"{adapter.answer}: {text!r:.60} is not option {letter}, which is {options[index]!r:.60}")
    return options[index]


def _spaced(text: str) -> str:
    return " ".join(text.split()).casefold()


def _images(source: str, adapter: Adapter, row: Row, store: Path) -> dict[str, str]:
    """Image paths by their mark, or by their field and place."""
    found: dict[str, str] = {}
    for name in adapter.images:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        for place, image in enumerate(values):
            if image is None or image == "":
                continue
            mark = f"<{name.replace('_', ' ')}>" if adapter.marked else f"{name}[{place}]"
            if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
                found[mark] = str(save_image(store, f"{source}: {name}", image["bytes"]))
            elif isinstance(image, str):
                found[mark] = image
            else:
                raise BadRow(source, f"{name}: the name of a file or an embedded image, not {image!r:.60}", "image")
    return found


def save_image(store: Path, source: str, content: bytes) -> Path:
    """Write an embedded image as it is, unless it is there: named by the sha256 of its bytes, so that each is written
    once, whoever writes it.

    Raises:
        BadRow: the bytes are in no format that Pillow knows, or damaged, or of far too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                kind = str(image.format)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow(source, f"an image of more than {Image.MAX_IMAGE_PIXELS} pixels", "image") from error
    except DAMAGE as error:
        raise BadRow(source, f"{len(content)} bytes that are no image that Pillow reads", "image") from error
    path = store.absolute() / (hashlib.sha256(content).hexdigest() + SUFFIXES.get(kind, f".{kind.lower()}"))
    if not path.is_file():
        store.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(content)
        os.replace(beside, path)
    return path
