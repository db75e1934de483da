"""The demo's data sets: jsonl rows and PNG pictures for the base model, for Stage I and for Stage II."""

import json
import re
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.demo.cases import CONCLUSIONS, CRITERIA, Case, case_seed, chain, corrupt, look, make_case, render
from mede2.trainer.demo.phantoms import ZONES, Finding

Row = dict[str, Any]
REQUEST = "Think, then answer."
LICENSE = "Apache-2.0"  # of the pictures, drawn here
SECTIONS = ("look", "zones", "count", "history", "options")  # what the base model learns to write: never a diagnosis
SECTION_WEIGHTS = (0.9, 0.4, 0.5, 0.5, 0.2)  # how often each of SECTIONS is asked for
CRITERION_CYCLE = ("logical_consistency",) * 7 + CRITERIA[1:]  # most negatives where Stage I errs most, in the logic
WORDS = sorted(set(re.findall(r"</?\w+>|\w+", " ".join(chain(make_case(seed)) for seed in range(500)))))  # of chains


def image_question(case: Case) -> list[dict[str, str]]:
    """The content of the user's turn when the case is shown: the picture, then history, options and the request."""
    return [{"type": "image"}, {"type": "text", "text": f"{_background(case)} {REQUEST}"}]


def text_question(case: Case) -> str:
    """The same question with the findings told in words, in an order and a phrasing that vary with the case."""
    return f"{_told(case)} {_background(case)} {REQUEST}"


def write_stage1(folder: Path, num: int, seed: int) -> Path:
    """Write `num` text-only demonstrations; returns the path of the jsonl file."""
    cases = _cases("stage1", num, seed)
    rows = ({"messages": _turns(text_question(case), chain(case)), "meta": _meta(case)} for case in cases)
    return _write_rows(folder / "stage1.jsonl", rows)


def write_stage2(folder: Path, num: int, seed: int, left_out: str | None = None) -> Path:
    """Write `num` preference pairs on pictures, their criteria by `criteria_of_negatives`; returns the jsonl's path."""
    rows = (
        {
            "prompt": [{"role": "user", "content": image_question(case)}],
            "chosen": [{"role": "assistant", "content": chain(case)}],
            "rejected": [{"role": "assistant", "content": corrupt(case, criterion)}],
            "images": [_save_image(folder, case, index)],
            "meta": _meta(case) | {"criterion": criterion},
        }
        for index, (case, criterion) in enumerate(
            zip(_cases("stage2", num, seed), criteria_of_negatives(num, left_out), strict=True)
        )
    )
    return _write_rows(folder / (f"stage2_without_{left_out}.jsonl" if left_out else "stage2.jsonl"), rows)


def criteria_of_negatives(num: int, left_out: str | None = None) -> list[str]:
    """What the negatives of `num` pairs go wrong in: `CRITERION_CYCLE`, over and over.

    With a criterion left out, each negative of its own becomes one of the others, by their shares of the cycle; every
    other pair stays as it is, so that two files of the same cases differ in those negatives alone.
    """
    others = cycle([criterion for criterion in CRITERION_CYCLE if criterion != left_out])
    return [next(others) if criterion == left_out else criterion for criterion in islice(cycle(CRITERION_CYCLE), num)]


def write_chosen(pairs: Path) -> Path:
    """Write the chosen answers of a file of pairs as demonstrations, beside it; returns the path of the jsonl file."""
    with pairs.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    demonstrations = (
        {"messages": row["prompt"] + row["chosen"], "images": row["images"], "meta": row["meta"]} for row in rows
    )
    return _write_rows(pairs.with_name("chosen.jsonl"), demonstrations)


def write_cases(path: Path, num: int, seed: int, split: str) -> Path:
    """Write `num` cases of a split as questions with their key and their findings (`preference.cases` reads them)."""
    rows = (
        {
            "id": f"demo-{case.seed}",
            "prompt": [{"role": "user", "content": image_question(case)}],
            "images": [_save_image(path.parent, case, index)],
            "answer": case.answer,
            "options": list(case.options),
            "explanation": parse_answer(chain(case)).think,
            "meta": describe(case),
        }
        for index, case in enumerate(_cases(split, num, seed))
    )
    return _write_rows(path, rows)


def describe(case: Case) -> Row:
    """The `meta` of a case: what it is, what its picture shows, and which diagnosis follows from what."""
    return {
        "specialty": "pulmonology",
        "modality": "phantom",
        "license": LICENSE,
        "findings": {f"{finding.side} {finding.level}": finding.kind for finding in case.findings},
        "conclusions": CONCLUSIONS,
        "seed": case.seed,
    }


def write_pretraining(folder: Path, num: int, seed: int) -> Path:
    """Write `num` rows that teach the base model to see, read and copy, but never to think or to diagnose.

    Each row asks for some of `SECTIONS` in some order, so that what comes next, the end included, is always what was
    asked for. Of eight rows five show a picture, one tells the findings, and two have words in a random order to copy.
    """
    rows = (_pretraining_row(folder, case, index) for index, case in enumerate(_cases("pretraining", num, seed)))
    return _write_rows(folder / "pretraining.jsonl", rows)


def _pretraining_row(folder: Path, case: Case, index: int) -> Row:
    rng = np.random.default_rng([case.seed, 4])
    asked = [SECTIONS[i] for i in rng.permutation(len(SECTIONS)) if rng.random() < SECTION_WEIGHTS[i]] or ["look"]
    kinds = {(finding.side, finding.level): finding.kind for finding in case.findings}
    written = {
        "look": f"Look: {look(case.findings)}.",
        "zones": f"Zones: {', '.join(kinds.get(zone, 'clear') for zone in ZONES)}.",
        "count": f"Count: {len(case.findings)}.",
        "history": f"History: {case.history}.",
        "options": f"Options: {', '.join(case.options)}.",
    }
    answer = " ".join(written[section] for section in asked)
    request = f"{_background(case)} Write {', '.join(asked)}."
    if index % 8 in (5, 6):
        words = " ".join(rng.choice(WORDS, size=rng.integers(4, 17)))
        return {"messages": _turns(f"Copy: {words}.", f"Copy: {words}."), "meta": _meta(case)}
    if index % 8 == 7:
        return {"messages": _turns(f"{_told(case)} {request}", answer), "meta": _meta(case)}
    question = [{"type": "image"}, {"type": "text", "text": request}]
    return {"messages": _turns(question, answer), "images": [_save_image(folder, case, index)], "meta": _meta(case)}


def _cases(split: str, num: int, seed: int) -> list[Case]:
    return [make_case(case_seed(split, seed, index)) for index in range(num)]


def _turns(question: str | list[dict[str, str]], answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _background(case: Case) -> str:
    return f"History: {case.history}. Options: {', '.join(case.options)}."


def _told(case: Case) -> str:
    """The findings in words."""
    rng = np.random.default_rng([case.seed, 3])
    findings = [case.findings[i] for i in rng.permutation(len(case.findings))]
    style = rng.integers(3)
    if style == 0:
        return f"Findings: {look(findings)}."
    if style == 1:
        return f"The report names {' and '.join(map(_in_zone, findings)) or 'nothing'}."
    return " ".join(f"In the {f.side} {f.level} zone lies a {f.kind}." for f in findings) or "In no zone lies anything."


def _in_zone(finding: Finding) -> str:
    return f"a {finding.kind} in the {finding.side} {finding.level} zone"


def _meta(case: Case) -> Row:
    return {"case": case.seed, "answer": case.answer, "license": LICENSE}


def _save_image(folder: Path, case: Case, index: int) -> str:
    """Save the case's picture and return its path relative to the jsonl file."""
    path = folder / "images" / f"{index:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    render(case).save(path)
    return path.relative_to(folder).as_posix()


def _write_rows(path: Path, rows: Iterator[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
