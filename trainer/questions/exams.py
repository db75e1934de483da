"""Written examinations: MedQA, MedBullets, and MedXpertQA's texts and images."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions.adapter import Adapter, Outcome, adapt, option_texts
from mede2.trainer.questions.rows import Row
from mede2.trainer.questions.tables import find_files, find_folder, read_table, read_tables

REPEATED = re.compile(r"\s*Answer Choices:\s*(?=\(A\))")  # MedXpertQA's questions end with their options
LETTERED = re.compile(r"\s*\(([A-Z])\)\s*")

MEDQA = Adapter(
    question="question",
    options=("options",),
    letter="answer_idx",
    answer="answer",
    meta={"task": "meta_info"},  # which step of the examination: step1, step2&3
    unused=("metamap_phrases",),
    optional=("metamap_phrases",),
)


def _medbullets(letters: str) -> Adapter:
    return Adapter(
        question="question",
        options=tuple(f"op{letter}" for letter in letters),
        letter="answer_idx",
        answer="answer",
        explanation="explanation",
        meta={"link": "link"},
        optional=("explanation", "link"),
    )


def _without_repeated_options(source: str, row: Row) -> Row:
    """Cut the options off the question's end where they are the row's own, letter by letter; the prompt lists them."""
    question, options = row.get("question"), option_texts(source, "options", row.get("options"))
    repeated = list(REPEATED.finditer(question)) if isinstance(question, str) else []
    if not repeated:
        return {}
    told = LETTERED.split(question[repeated[-1].end() :])[1:]
    expected = chain.from_iterable((chr(ord("A") + place), option) for place, option in enumerate(options))
    if [" ".join(text.split()) for text in told] != [" ".join(text.split()) for text in expected]:
        return {}  # other words than the options': part of the question
    return {"question": question[: repeated[-1].start()]}


def _medxpertqa(images: tuple[str, ...]) -> Adapter:
    return Adapter(
        id="id",
        question="question",
        options=("options",),
        letter="label",
        images=images,
        meta={"specialty": "body_system", "task": "question_type", "medical_task": "medical_task"},
        prepare=_without_repeated_options,
    )


MEDXPERTQA_TEXT, MEDXPERTQA_MM = _medxpertqa(()), _medxpertqa(("images",))


def read_medqa(path: Path, store: Path) -> Iterator[Outcome]:
    """The US questions with five options, or with four where the path names that file: jsonl of jind11/MedQA.

    Fields as public readers of these files have them (the archive itself was not at hand): metamap_phrases in the file
    with four options only.
    """
    (file,) = find_files(path, "test.jsonl", "phrases_no_exclude_test.jsonl")
    yield from adapt(MEDQA, read_table(file), file.parent, store)


def read_medbullets(path: Path, store: Path) -> Iterator[Outcome]:
    """The csv files of HanjieChen/ChallengeClinicalQA, as they lie there: with the column `ope` five options, without
    it four. An older state of them ends its rows with empty cells."""
    (file,) = find_files(path, "medbullets_op5.csv")
    rows = list(read_table(file))
    five = any("ope" in row for _, row in rows if not isinstance(row, BadRow))
    yield from adapt(_medbullets("abcde" if five else "abcd"), rows, file.parent, store)


def read_medxpertqa_text(path: Path, store: Path) -> Iterator[Outcome]:
    """Ten options; the split by reasoning and understanding is the case's `meta.task`. Fields as the card and the
    viewer of hub data set TsinghuaC3I/MedXpertQA show them."""
    files = find_files(path, "Text/test.jsonl", "test.jsonl", "Text/test/*.parquet")
    yield from adapt(MEDXPERTQA_TEXT, read_tables(files), files[0].parent, store)


def read_medxpertqa_mm(path: Path, store: Path) -> Iterator[Outcome]:
    """Five options and one image or more, from the unpacked images.zip."""
    files = find_files(path, "MM/test.jsonl", "test.jsonl", "MM/test/*.parquet")
    folder = find_folder([base / "images" for base in files[0].absolute().parents[:3]])
    yield from adapt(MEDXPERTQA_MM, read_tables(files), folder, store)
