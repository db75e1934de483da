"""Both stages on real smears and films at their smallest, by one command each; only where a folder of them is named."""

import csv
import os
import sys
from pathlib import Path

import pytest

DATA = "MEDE2_DATA"  # names a folder of question files
SMALLEST = ("--eye-steps", "2", "--num-views", "32", "--num-demos", "32", "--num-pairs", "32")


@pytest.mark.skipif(not os.environ.get(DATA), reason=f"{DATA} names no folder of question files")
@pytest.mark.parametrize(
    ("script", "questions", "options", "num_scored", "always"),
    [
        ("blood_smears", "mm_bccd", ("--word-steps", "2", "--num-heldout", "4"), 4, "always 0"),
        ("child_films", "mm_pneumoniamnist", ("--num-words", "32", "--num-heldout", "6"), 6, "always Pneumonia"),
    ],
)
def test_both_stages_and_their_scores(run, tmp_path, script, questions, options, num_scored, always):
    file, results = Path(os.environ[DATA]).resolve() / f"{questions}.jsonl", tmp_path / "results.csv"
    paths = ("--questions", str(file), "--output", str(tmp_path / "runs"), "--results", str(results))
    run(sys.executable, f"benchmarks/real_files/{script}.py", *paths, *options, *SMALLEST, timeout_s=280)
    with results.open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    first = rows[:5]  # of the first task
    assert [row["model"] for row in first] == [
        always, "base", "Stage I", "Stage II by plain DPO", "Stage II (DPO and NLL)",
    ]  # fmt: skip
    assert {row["n"] for row in first} == {str(num_scored)}
    assert all(float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"]) for row in rows)
    assert all(float(row["grounding"]) <= float(row["format"]) for row in rows if row["format"])
