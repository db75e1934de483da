"""`make demo-study` at a tiny size, by the real commands: what is done is found done, and the tables stand in files."""

import json
import re


def test_the_study_goes_on_from_what_is_done(tmp_path, run):
    study = ("python", "launch/demo_study.py", "--runs", str(tmp_path), "--seed", "3", "--num-cases", "4")
    first, second = (run(*study, "--num-rows", "16", "--arm", name).stdout for name in ("stage1", "full"))
    assert re.findall(r"/3/(\w+): done", first) == ["stage1"]
    assert re.findall(r"/3/(\w+): done", second) == ["stage1", "full"]
    trained, found = (tmp_path / "3/stage1.log").read_text().split("done: 1 updates")
    assert "holds this very run, done" not in trained
    assert "holds this very run, done" in found
    assert "done: 1 updates" in (tmp_path / "3/full.log").read_text()

    table = (tmp_path / "study.md").read_text()
    assert table in second
    assert [line.split(" | ")[0] for line in table.splitlines() if line[:3] in ("| b", "| S")] == [
        "| base", "| Stage I", "| Stage II (DPO and NLL)",
        "| base", "| Stage I", "| Stage II (DPO and NLL)",
        "| Stage II (DPO and NLL)",
    ]  # fmt: skip
    compared = json.loads((tmp_path / "study.json").read_text())
    assert [(one["arm"], one["other"], one["estimate"]["num"]) for one in compared] == [("full", "stage1", 4)] * 4


def test_an_unknown_arm_is_told_before_anything_runs(tmp_path, run):
    done = run("python", "launch/demo_study.py", "--runs", str(tmp_path), "--arm", "SFT", check=False)
    assert done.returncode == 2
    assert "arm: 'SFT' is not one of stage1, full, dpo, sft" in done.stderr
    assert not list(tmp_path.iterdir())
