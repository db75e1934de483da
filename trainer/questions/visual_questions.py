"""Short questions about single medical images: VQA-RAD, SLAKE, PathVQA, PMC-VQA."""

import re
from collections.abc import Iterator
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions.adapter import Adapter, Outcome, adapt
from mede2.trainer.questions.rows import Row
from mede2.trainer.questions.tables import find_files, find_folder, read_table, read_tables

HUB_TRIPLES = Adapter(question="question", answer="answer", images=("image",), yes_no=True)


def _plain_type(source: str, row: Row) -> Row:
    """CLOSED and OPEN in small letters, without the blanks that some rows have behind them."""
    kind = row["answer_type"]
    if not isinstance(kind, str) or kind.strip().lower() not in ("closed", "open"):
        raise BadRow(source, f"answer_type: CLOSED or OPEN, not {kind!r:.60}")
    return {"answer_type": kind.strip().lower()}


VQA_RAD = Adapter(
    id="qid",
    question="question",
    answer="answer",
    images=("image_name",),
    meta={"specialty": "image_organ", "task": "question_type", "answer_type": "answer_type"},
    unused=(
        "phrase_type", "qid_linked_id", "image_case_url", "evaluation", "question_rephrase", "question_relation",
        "question_frame",
    ),
    optional=(
        "qid_linked_id", "image_case_url", "image_organ", "evaluation", "question_rephrase", "question_relation",
        "question_frame",
    ),
    yes_no=True,
    prepare=_plain_type,
    leave_out=lambda row: None if str(row["phrase_type"]).startswith("test") else "phrase_type not of the test split",
)  # fmt: skip


def read_vqa_rad(path: Path, store: Path) -> Iterator[Outcome]:
    """The test rows of the OSF release (json beside its folder of images), or the test split in parquet of
    flaviagiammarino/vqa-rad.

    Fields as in the release's readme (its 14 variables, of which this json's spelling is that of public readers; the
    file itself was not at hand), and as in the hub card's dataset_info.
    """
    files = find_files(path, "VQA_RAD Dataset Public.json", "data/test-*.parquet", "test-*.parquet")
    if files[0].suffix == ".parquet":
        yield from adapt(HUB_TRIPLES, read_tables(files), files[0].parent, store)
    else:
        folder = find_folder([files[0].parent / name for name in ("VQA_RAD Image Folder", "images")])
        yield from adapt(VQA_RAD, read_tables(files), folder, store)


def _slake(language: str) -> Adapter:
    return Adapter(
        id="qid",
        question="question",
        answer="answer",
        images=("img_name",),
        meta={
            "specialty": "location", "modality": "modality", "task": "content_type", "answer_type": "answer_type",
            "base_type": "base_type",
        },
        unused=("img_id", "q_lang", "triple"),
        optional=("img_id", "triple", "base_type"),
        yes_no=True,
        prepare=_plain_type,
        leave_out=lambda row: None if row["q_lang"] == language else f"q_lang is {row['q_lang']}",
    )  # fmt: skip


def read_slake(path: Path, store: Path, language: str = "en") -> Iterator[Outcome]:
    """The test questions in one language; images from the unpacked imgs.zip. Closed questions whose key is
    neither yes nor no (which of two organs, say), and all those in Chinese, have no options. Fields as in test.json
    itself."""
    (file,) = find_files(path, "test.json")
    folder = find_folder([file.parent / "imgs"])
    yield from adapt(_slake(language), read_table(file), folder, store)


def read_slake_chinese(path: Path, store: Path) -> Iterator[Outcome]:
    yield from read_slake(path, store, "zh")


def read_path_vqa(path: Path, store: Path) -> Iterator[Outcome]:
    """The test split in parquet of flaviagiammarino/path-vqa, fields as in its card; the authors' own release is a
    pickle, and refused."""
    files = find_files(path, "data/test-*.parquet", "test-*.parquet")
    yield from adapt(HUB_TRIPLES, read_tables(files), files[0].parent, store)


CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
CHOICE_LETTER = re.compile(r"\s*([A-D]):\s*")


def _unlettered(source: str, row: Row) -> Row:
    """Choices and answer without the letter before them (`A:Diffuse uptake`), which must be the column's."""
    mended: Row = {}
    for name in CHOICES:
        if isinstance(row[name], str) and (match := CHOICE_LETTER.match(row[name])):
            if match[1] != name[-1]:
                raise BadRow(source, f"{name}: {row[name]!r:.60} begins with another letter")
            mended[name] = row[name][match.end() :]
    answer = row.get("Answer", row.get("Anwser"))
    if not isinstance(answer, str):
        raise BadRow(source, "Answer: missing")
    if answer.strip() in ("A", "B", "C", "D") and not row.get("Answer_label"):
        return mended | {"Answer": "", "Answer_label": answer}
    match = CHOICE_LETTER.match(answer)
    return mended | {"Answer": answer[match.end() :] if match else answer}


PMC_VQA = Adapter(
    question="Question",
    options=CHOICES,
    answer="Answer",
    letter="Answer_label",
    images=("Figure_path",),
    unused=("Anwser", "index", "Caption", "split"),  # the caption often tells the answer
    optional=("Answer", "Anwser", "Answer_label", "index", "Caption", "split"),
    prepare=_unlettered,
)


def read_pmc_vqa(path: Path, store: Path) -> Iterator[Outcome]:
    """The test questions, the hand-checked ones where they are there; images from the unpacked images.zip, or
    images_2.zip for the second version's test_2.csv.

    Fields of the first version as in the hub card, which once spelt one of them Anwser. Those of the second, whose
    `Answer` is a letter, are not published in words: they are as public readers of test_2.csv have them.
    """
    (file,) = find_files(path, "test_clean.csv", "test.csv", "test_2.csv")
    names = ("images_2", "figures", "images") if file.stem.endswith("2") else ("images", "figures")
    folder = find_folder([file.parent / name for name in names])
    yield from adapt(PMC_VQA, read_table(file), folder, store)
