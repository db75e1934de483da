"""The main job, whole: `deepspeed launch/stage2.py --ds ds_configs/z3.json` alone, against its golden losses.

After a change that is meant to move them: python tests/cli/test_embedded_default.py FOLDER_OF_RUNS
"""

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden_losses.json")
FIRST, FIRST_TOLERANCE = 5, 1e-4  # rounding differs between processors, and grows with the updates
LATER_TOLERANCE = 0.1


def losses(runs: Path) -> dict[str, list[float]]:
    """Losses of both stages in a folder of runs."""
    metrics = {stage: (runs / stage / "metrics.jsonl").read_text().splitlines() for stage in ("stage1", "stage2")}
    return {stage: [round(json.loads(row)["loss"], 6) for row in rows] for stage, rows in metrics.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run) -> Path:
    folder = tmp_path_factory.mktemp("default")
    done = run("deepspeed", "launch/stage2.py", "--ds", "ds_configs/z3.json", "--output", str(folder / "stage2"))
    assert "running Stage I first" in done.stdout
    return folder


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_losses(stage, runs):
    golden, ours = json.loads(GOLDEN.read_text())[stage], losses(runs)[stage]
    assert len(ours) == len(golden)
    assert ours[:FIRST] == pytest.approx(golden[:FIRST], abs=FIRST_TOLERANCE)
    quarter = len(golden) // 4
    assert sum(ours[-quarter:]) / quarter == pytest.approx(sum(golden[-quarter:]) / quarter, abs=LATER_TOLERANCE)


def test_stage2_prefers_the_chosen_answers_of_unseen_cases(runs):
    metrics = json.loads((runs / "stage2" / "summary.json").read_text())["metrics"]
    assert metrics["eval/rewards/accuracies"] > 0.7
    assert metrics["eval/rewards/margins"] > 0


def test_the_second_time_there_is_nothing_to_do(runs, run):
    done = run("deepspeed", "launch/stage2.py", "--ds", "ds_configs/z3.json", "--output", str(runs / "stage2"))
    assert "done; --resume never runs it again" in done.stdout
    assert "running Stage I first" not in done.stdout


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses(Path(sys.argv[1])), indent=1) + "\n")
