"""`make demo-pairs` at a tiny size: the commands that it prints, in their order, each on the files of those before."""

import json
import shutil
import sys
from pathlib import Path

from mede2.trainer.demo.cases import CRITERIA, chain, corrupt, make_case
from mede2.trainer.demo.defaults import BASE_MODEL


def answer_as_stage1(pairs: Path) -> None:
    """Put chains, true and false by turns, in place of what the base model, which cannot think, has said."""
    seeds = {case["id"]: case["meta"]["seed"] for case in map(json.loads, (pairs / "cases.jsonl").open())}
    samples = [json.loads(line) for line in (pairs / "samples.jsonl").open()]
    for sample in samples:
        case = make_case(seeds[sample["case"]])
        text = chain(case) if sample["sample"] % 2 else corrupt(case, CRITERIA[0])
        sample |= {"text": text, "finish": "stop", "num_tokens": len(text.split())}
    (pairs / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def test_the_steps_of_make_demo_pairs_in_their_order(tmp_path, run):
    for stage in ("stage1", "stage2"):
        shutil.copytree(BASE_MODEL, tmp_path / stage)
        (tmp_path / stage / "summary.json").write_text("{}")
    variables = (f"RUNS={tmp_path}", f"VENV={sys.prefix}", "NUM_CASES=6", "NUM_SCORED=6")
    quietly = ("--dry-run", "--no-print-directory", f"--old-file={sys.prefix}/installed")  # `make test` may run this
    printed = run("make", *quietly, "demo-pairs", *variables).stdout
    commands = [line.split("launch/")[1].split()[:2] for line in printed.splitlines()]
    steps = [second if first == "pairs.py" else first for first, second in commands]
    assert steps == ["demo-cases", "sample", "judge", "select", "check", "report", "stage2.py", "demo.py"]
    done = {}
    for step, command in zip(steps, printed.splitlines(), strict=True):
        if step == "demo.py":
            break  # there is nothing to score: Stage II checks its settings, model and rows, and stops
        done[step] = run("bash", "-c", command + " --dry-run" * (step == "stage2.py")).stdout
        if step == "sample":
            answer_as_stage1(tmp_path / "pairs")
    assert "6 of 6 rows can be used" in done["check"]
    assert "train: 6 rows from" in done["stage2.py"]
    assert (tmp_path / "pairs/report.html").stat().st_size > 10_000
