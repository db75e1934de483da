"""Benchmarks by name: what they are, what to download, where it goes, and the questions in it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mede2.trainer.data.records import BadRow
from mede2.trainer.questions import exams, mmmu, own_questions, pubmedqa, visual_questions
from mede2.trainer.questions.adapter import LeftOut, Outcome
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import tell

OWN = "cases"  # the adapter of files of one's own


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: what it is, in a line.
        download: where it comes from, and what of it.
        path: what PATH names, and how its folder is laid out.
        licence: as its publishers state it.
        groups: what it can be broken down by, of GROUPS in `trainer/evaluation/answered.py`.
        reader: yields what each row is, from (path, folder for embedded images).
    """

    name: str
    title: str
    download: str
    path: str
    licence: str
    groups: tuple[str, ...]
    reader: Callable[[Path, Path], Iterator[Outcome]]


_ALL = (
    Benchmark(
        "medqa",
        "MedQA (USMLE): board questions with four or five options",
        "the archive that the README of GitHub jind11/MedQA links to",
        "US/4_options/phrases_no_exclude_test.jsonl of it (four options), or US/test.jsonl (five)",
        "MIT",
        ("task",),
        exams.read_medqa,
    ),
    Benchmark(
        "medbullets",
        "MedBullets: USMLE Step 2 and 3 style questions with explanations",
        "GitHub HanjieChen/ChallengeClinicalQA, folder medbullets",
        "medbullets_op5.csv (five options), or medbullets_op4.csv (four)",
        "none stated by its repository",
        (),
        exams.read_medbullets,
    ),
    Benchmark(
        "medxpertqa-text",
        "MedXpertQA Text: expert questions, ten options, by reasoning and understanding",
        "hub data set TsinghuaC3I/MedXpertQA",
        "the folder that holds Text/test.jsonl, or that file",
        "MIT",
        ("specialty", "task"),
        exams.read_medxpertqa_text,
    ),
    Benchmark(
        "medxpertqa-mm",
        "MedXpertQA MM: expert questions with images, five options, by reasoning and understanding",
        "hub data set TsinghuaC3I/MedXpertQA, images.zip unpacked",
        "the folder that holds MM/test.jsonl and images/",
        "MIT",
        ("specialty", "task"),
        exams.read_medxpertqa_mm,
    ),
    Benchmark(
        "pubmedqa",
        "PubMedQA: yes, no or maybe, from an abstract",
        "GitHub pubmedqa/pubmedqa, folder data; or hub data set qiaojin/PubMedQA, pqa_labeled",
        "the folder of ori_pqal.json, or of the parquet file; with test_ground_truth.json beside it, its 500 alone",
        "MIT",
        (),
        pubmedqa.read_pubmedqa,
    ),
    Benchmark(
        "mmmu",
        "MMMU: the five subjects of Health & Medicine, validation split",
        "hub data set MMMU/MMMU: " + ", ".join(mmmu.SUBJECTS),
        "the folder that holds a folder of parquet for each of these subjects",
        "Apache-2.0",
        ("specialty", "modality", "task", "answer_type"),
        mmmu.read_mmmu,
    ),
    Benchmark(
        "mmmu-pro",
        "MMMU-Pro, ten options: the five subjects of Health & Medicine",
        "hub data set MMMU/MMMU_Pro, folder `standard (10 options)`",
        "the folder that holds that folder",
        "Apache-2.0",
        ("specialty", "modality"),
        mmmu.read_mmmu_pro,
    ),
    Benchmark(
        "mmmu-pro-4",
        "MMMU-Pro, four options: the five subjects of Health & Medicine",
        "hub data set MMMU/MMMU_Pro, folder `standard (4 options)`",
        "the folder that holds that folder",
        "Apache-2.0",
        ("specialty", "modality"),
        mmmu.read_mmmu_pro_4,
    ),
    Benchmark(
        "mmmu-pro-vision",
        "MMMU-Pro, question and options in the image: the same five subjects",
        "hub data set MMMU/MMMU_Pro, folder `vision`",
        "the folder that holds that folder",
        "Apache-2.0",
        ("specialty",),
        mmmu.read_mmmu_pro_vision,
    ),
    Benchmark(
        "vqa-rad",
        "VQA-RAD: clinicians' questions on radiological images, test split",
        "osf.io/89kps: the json file and the image folder; or hub data set flaviagiammarino/vqa-rad",
        "the folder of `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder`, or of data/test-*.parquet",
        "CC0 1.0",
        ("specialty", "task", "answer_type"),
        visual_questions.read_vqa_rad,
    ),
    Benchmark(
        "slake",
        "SLAKE, English questions: CT, MRI and X-ray, test split",
        "hub data set BoKelvin/SLAKE, imgs.zip unpacked",
        "the folder that holds test.json and imgs/",
        "CC BY 4.0",
        ("specialty", "modality", "task", "answer_type"),
        visual_questions.read_slake,
    ),
    Benchmark(
        "slake-zh",
        "SLAKE, Chinese questions: CT, MRI and X-ray, test split",
        "hub data set BoKelvin/SLAKE, imgs.zip unpacked",
        "the folder that holds test.json and imgs/",
        "CC BY 4.0",
        ("specialty", "modality", "task", "answer_type"),
        visual_questions.read_slake_chinese,
    ),
    Benchmark(
        "path-vqa",
        "PathVQA: questions on pathology images, test split",
        "hub data set flaviagiammarino/path-vqa",
        "the folder that holds data/test-*.parquet",
        "MIT",
        ("answer_type",),
        visual_questions.read_path_vqa,
    ),
    Benchmark(
        "pmc-vqa",
        "PMC-VQA: questions on figures of open-access papers, four options",
        "hub data set RadGenome/PMC-VQA: test_clean.csv with images.zip, or test_2.csv with images_2.zip, unpacked",
        "the csv file beside its unpacked folder (images/, images_2/ or figures/)",
        "CC BY-SA",
        (),
        visual_questions.read_pmc_vqa,
    ),
    Benchmark(
        OWN,
        "questions of your own, named by the file's stem",
        "nothing",
        "a .jsonl of cases (id, prompt, answer) or of question rows (question, options, answer), with its images",
        "as each row's meta.license says",
        ("specialty", "modality", "task", "answer_type"),
        own_questions.read_own,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def read_benchmark(name: str, path: Path, images: Path, say: Callable[[str], None] = _to_stderr) -> list[Case]:
    """The questions of a benchmark, in the order of its files.

    Args:
        name: one of BENCHMARKS.
        path: what the benchmark's `path` says.
        images: a folder; images embedded in parquet are written there as they are, each once, named by their hash.
        say: told in one line how many questions there are, and how many rows were left out for which reason.

    Returns:
        Cases with unique ids; `meta.license` and `meta.source` are the benchmark's where a row has none of its own.

    Raises:
        ValueError: no such benchmark, nothing to read at the path, or rows that cannot be used: listed with file, row
            and reason.
    """
    benchmark = _find(name)
    cases: dict[str, Case] = {}
    problems: list[BadRow] = []
    left_out: Counter[str] = Counter()
    for outcome in benchmark.reader(path, images):
        if isinstance(outcome, BadRow):
            problems.append(outcome)
        elif isinstance(outcome, LeftOut):
            left_out[outcome.reason] += 1
        elif outcome.id in cases:
            told = f"id: {outcome.id!r} again, after {cases[outcome.id].source}; ids are unique"
            problems.append(BadRow(outcome.source, told))
        else:
            if name != OWN:
                outcome.meta.setdefault("license", benchmark.licence)
                outcome.meta.setdefault("source", f"{benchmark.title.split(':')[0]} ({benchmark.name})")
            cases[outcome.id] = outcome
    if problems:
        raise tell(f"{path}: {len(problems)} of {len(problems) + len(cases)} questions cannot be used:", problems)
    aside = "".join(f"; {count} rows left out: {reason}" for reason, count in left_out.items())
    if not cases:
        raise ValueError(f"{path}: no question of {name} in it{aside}")
    say(f"{name}: {len(cases)} questions from {path}{aside}")
    return list(cases.values())


def parse_benchmark(text: str) -> tuple[str, str, Path]:
    """Read what `--benchmark` was given.

    Args:
        text: NAME=PATH.

    Returns:
        The name that the evaluation uses, the benchmark that reads the path, and the path. The first two are the same
        but for files of one's own, which go by their stem: cases=held_out.jsonl is held_out, read as cases.

    Raises:
        ValueError: not of this form, no such benchmark, or a file of one's own with the name of a benchmark.
    """
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError(f"--benchmark {text}: NAME=PATH, such as medqa=test.jsonl; NAME is one of {_names()}")
    _find(name)
    if name != OWN:
        return name, name, Path(path)
    stem = Path(path).stem
    if stem in BENCHMARKS and stem != OWN:
        raise ValueError(f"--benchmark {text}: {stem} is a benchmark's name; rename the file, or say {stem}={path}")
    return stem, OWN, Path(path)


def _names() -> str:
    return ", ".join(BENCHMARKS)


def _find(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"{name}: no such benchmark; there are {_names()}")
    return BENCHMARKS[name]
