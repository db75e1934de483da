"""MMMU and MMMU-Pro: the five subjects of Health & Medicine, with images where their marks stand in the texts."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions.adapter import Adapter, Outcome, adapt
from mede2.trainer.questions.rows import Row
from mede2.trainer.questions.tables import find_files, read_tables

SUBJECTS = (  # of "Health and Medicine" in the evaluation code of MMMU-Benchmark/MMMU
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
IMAGES = tuple(f"image_{number}" for number in range(1, 8))


def _listed(source: str, name: str, value: object) -> list[str]:
    """A list that is written as the text of a Python list, such as "['CT', 'MRI']"."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise BadRow(source, f"{name}: the text of a Python list, not {value!r:.60}") from error
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise BadRow(source, f"{name}: a list of texts, not {value!r:.60}")
    return value


def _alternatives(answer: object) -> list[str]:
    """The answers of an open question that has several, all right; none where the answer is no such list."""
    try:
        value = ast.literal_eval(answer) if isinstance(answer, str) else None
    except (ValueError, SyntaxError):
        return []
    return value if isinstance(value, list) and all(isinstance(part, str) and part.strip() for part in value) else []


def _spoken(subject: str) -> str:
    return subject.replace("_", " ")


def _of_mmmu(source: str, row: Row) -> Row:
    """Options and image types as lists; the subject out of the id (validation_Public_Health_12)."""
    subject = next((subject for subject in SUBJECTS if f"_{subject}_" in str(row["id"])), None)
    if subject is None:
        raise BadRow(source, f"id: {row['id']!r:.60} names none of the subjects {', '.join(SUBJECTS)}")
    if row["answer"] == "?":
        raise BadRow(source, "answer: withheld (?), as in the test split; read the validation split")
    if row["question_type"] not in ("multiple-choice", "open"):
        raise BadRow(source, f"question_type: multiple-choice or open, not {row['question_type']!r:.60}")
    mended = {"subject": _spoken(subject), "options": _listed(source, "options", row["options"])}
    if row.get("img_type"):
        mended["img_type"] = ", ".join(_listed(source, "img_type", row["img_type"]))
    if row["question_type"] == "open":
        mended |= {"options": None, "letter": None}
        if accepted := _alternatives(row["answer"]):
            mended |= {"answer": accepted[0], "accepted": accepted}
    else:
        mended |= {"letter": row["answer"], "answer": None}
    return mended


def _of_mmmu_pro(source: str, row: Row) -> Row:
    mended = {"options": _listed(source, "options", row["options"]), "subject": _spoken(row["subject"])}
    if row.get("img_type"):
        mended["img_type"] = ", ".join(_listed(source, "img_type", row["img_type"]))
    return mended


def _other_subject(row: Row) -> str | None:
    return None if row["subject"] in SUBJECTS else "a subject outside Health & Medicine"


MMMU = Adapter(
    id="id",
    question="question",
    options=("options",),
    letter="letter",
    answer="answer",
    images=IMAGES,
    marked=True,
    explanation="explanation",
    meta={
        "specialty": "subject", "modality": "img_type", "task": "subfield", "answer_type": "question_type",
        "topic_difficulty": "topic_difficulty", "accepted_answers": "accepted",
    },
    made=("letter", "subject", "accepted"),
    optional=("explanation", "topic_difficulty", "img_type", *IMAGES[1:]),
    prepare=_of_mmmu,
)  # fmt: skip
MMMU_PRO = Adapter(
    id="id",
    question="question",
    options=("options",),
    letter="answer",
    images=IMAGES,
    marked=True,
    explanation="explanation",
    meta={"specialty": "subject", "modality": "img_type", "topic_difficulty": "topic_difficulty"},
    optional=("explanation", "topic_difficulty", "img_type", *IMAGES[1:]),
    prepare=_of_mmmu_pro,
    leave_out=_other_subject,
)
MMMU_PRO_VISION = Adapter(
    id="id",
    question=None,
    instead="Answer the question in the image.",
    options=("options",),
    letter="answer",
    images=("image",),
    meta={"specialty": "subject"},
    prepare=_of_mmmu_pro,
    leave_out=_other_subject,
)


def read_mmmu(path: Path, store: Path) -> Iterator[Outcome]:
    """The validation split of the five subjects, each in a folder of its name, as MMMU/MMMU lies on the hub; or one
    parquet file of one of them.

    Fields as in the hub card's dataset_info. An open question with several right answers has the first as its key, all
    of them in `meta.accepted_answers`.

    Raises:
        ValueError: names the subject that is missing.
    """
    if path.is_dir():
        files = list(chain.from_iterable(find_files(path, f"{name}/validation-*.parquet") for name in SUBJECTS))
    else:
        files = find_files(path)
    yield from adapt(MMMU, read_tables(files), files[0].parent, store)


def _read_mmmu_pro(adapter: Adapter, configuration: str, path: Path, store: Path) -> Iterator[Outcome]:
    if path.is_file():  # whose folder would tell how many options it has
        raise ValueError(f"{path}: name the folder that holds `{configuration}`, as the hub's repository does")
    files = find_files(path, f"{configuration}/test-*.parquet")
    yield from adapt(adapter, read_tables(files), files[0].parent, store)


def read_mmmu_pro(path: Path, store: Path) -> Iterator[Outcome]:
    """The standard questions with ten options. Fields as in the hub card's dataset_info."""
    yield from _read_mmmu_pro(MMMU_PRO, "standard (10 options)", path, store)


def read_mmmu_pro_4(path: Path, store: Path) -> Iterator[Outcome]:
    """The standard questions with four options."""
    yield from _read_mmmu_pro(MMMU_PRO, "standard (4 options)", path, store)


def read_mmmu_pro_vision(path: Path, store: Path) -> Iterator[Outcome]:
    """Question and options stand in the image. Fields as in the hub card's dataset_info; it had no `options` at first,
    which the evaluation code of MMMU-Benchmark/MMMU reads from every row."""
    yield from _read_mmmu_pro(MMMU_PRO_VISION, "vision", path, store)
