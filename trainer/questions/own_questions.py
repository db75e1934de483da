"""Questions of one's own from a jsonl file, each row in either of two forms: a case (see `cases`) or a question row.

A question row has no `prompt` but `question` and `answer`, and perhaps `id` (else its place in the file), `options` (a
list, or {letter: text}), `answer_text`, `context` (text, or [{"label": ..., "text": ...}]), `images` (relative to the
file), `explanation`, `facts`, `source`, `year` and `meta`. Where there are options, `answer` is the text of the right
one or its letter.
"""

from collections.abc import Iterator
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions.adapter import LETTERS, Adapter, Outcome, make_case, option_texts
from mede2.trainer.questions.cases import parse_case
from mede2.trainer.questions.rows import Row
from mede2.trainer.questions.tables import read_table


def _prepare(source: str, row: Row) -> Row:
    """Context as one text, and the answer's letter apart from its text."""
    mended: Row = {}
    context, meta = row.get("context"), row.get("meta")
    if isinstance(context, list):
        if not all(isinstance(part, dict) and part.keys() == {"label", "text"} for part in context):
            raise BadRow(source, 'context: text, or a list of {"label": ..., "text": ...}')
        mended["context"] = "\n".join(f"{part['label']}: {part['text']}" for part in context)
    if meta is not None and not isinstance(meta, dict):
        raise BadRow(source, f"meta: a JSON object, not {meta!r:.60}")
    if row.get("explanation") is not None and not isinstance(row["explanation"], str):
        raise BadRow(source, f"explanation: text, not {row['explanation']!r:.60}")
    images = row.get("images")
    if images is not None and not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        raise BadRow(source, f"images: a list of paths, not {images!r:.60}")
    if not row.get("options"):
        return mended | {
            "options": None,
            "answer": row["answer"] if row.get("answer_text") is None else row["answer_text"],
        }

    options, answer = option_texts(source, "options", row["options"]), row["answer"]
    as_letter = isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(options)]
    if row.get("answer_text") is None and as_letter and answer in options and options[LETTERS.index(answer)] != answer:
        raise BadRow(source, f"answer: {answer!r} is one option's letter and another's text; add `answer_text`")
    if as_letter:
        return mended | {"letter": answer, "answer": row.get("answer_text")}
    if row.get("answer_text") not in (None, answer):
        raise BadRow(source, f"answer: {answer!r:.60} is not `answer_text`, {row['answer_text']!r:.60}, nor a letter")
    return mended


QUESTION_ROW = Adapter(
    id="id",
    question="question",
    options=("options",),
    answer="answer",
    letter="letter",
    images=("images",),
    context="context",
    explanation="explanation",
    meta={"source": "source", "year": "year", "facts": "facts"},
    unused=("answer_text", "meta"),
    made=("letter",),
    optional=("id", "options", "answer_text", "images", "context", "explanation", "source", "year", "facts", "meta"),
    editable=True,
    prepare=_prepare,
)


def read_own(path: Path, store: Path) -> Iterator[Outcome]:
    """The questions of a jsonl file; what `meta` holds stays, beside `source`, `year` and `facts`."""
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: questions of one's own are a .jsonl file")
    for number, (source, row) in enumerate(read_table(path), start=1):
        try:
            if isinstance(row, BadRow):
                raise row
            if "prompt" in row:
                yield parse_case(source, row, path.parent)
            else:
                case = make_case(QUESTION_ROW, source, number, row, path.parent, store)
                if "meta" in row and isinstance(row["meta"], dict):
                    case.meta.update(row["meta"] | case.meta)
                yield case
        except BadRow as problem:
            yield problem
