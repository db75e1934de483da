"""A user's question files, by the README's own few lines, through both stages; real ones where a folder is named."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DATA = "MEDE2_DATA"  # names a folder of question files to try as well


def convert(run, folder: Path, questions: Path) -> tuple[str, str]:
    """Run the README's conversion."""
    (folder / "convert.py").write_text(
        re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    )
    outputs = str(folder / "demos.jsonl"), str(folder / "pairs.jsonl")
    run("python", str(folder / "convert.py"), str(questions), *outputs)
    return outputs


def train_both(run, folder: Path, demos: str, pairs: str) -> dict:
    """Stage I where there are questions without images to learn from, then Stage II."""
    common = (
        "--ds", "ds_configs/z3.json", "--global-batch-size", "4", "--epochs", "2", "--max-steps", "2", "--max-length",
        "8192",
    )  # fmt: skip
    start = ("--model", "trainer/demo/base")
    if Path(demos).read_text():
        run("python", "launch/stage1.py", *common, "--train", demos, "--output", str(folder / "stage1"))
        start = ()
    run("python", "launch/stage2.py", *common, *start, "--train", pairs, "--output", str(folder / "stage2"))
    return json.loads((folder / "stage2" / "summary.json").read_text())


def test_question_files_become_records_that_both_stages_train_on(run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (60, 40), 90).save(tmp_path / "images" / "smear.png")
    shared = {"options": {"A": "0", "B": "1", "C": "2"}, "answer_text": "1"}
    rows = [
        {"question": f"How many platelets, case {number}?", "explanation": "One purple body.", **shared, **extra}
        for number, extra in enumerate([{"images": ["images/smear.png"]}, {}, {"images": ["images/smear.png"] * 2}, {}])
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = train_both(run, tmp_path, *convert(run, tmp_path, questions))
    assert summary["updates"] == 2
    assert summary["metrics"]["rewards/margins"] != 0


@pytest.mark.skipif(not os.environ.get(DATA), reason=f"{DATA} names no folder of question files")
@pytest.mark.parametrize("name", ["mm_bccd", "mm_pneumoniamnist", "mm_cxr_views", "text_medqa_mediq"])
def test_real_question_files(name, run, tmp_path):
    source = Path(os.environ[DATA])
    if (source / "images").is_dir():
        shutil.copytree(source / "images", tmp_path / "images")
    lines = (source / f"{name}.jsonl").read_text().splitlines()[:12]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(lines))
    assert train_both(run, tmp_path, *convert(run, tmp_path, questions))["updates"] == 2
