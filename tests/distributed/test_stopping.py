"""A run that is asked to stop in every phase, one after another, ends as if nobody had asked."""

import json
from pathlib import Path

import pytest

from mede2.trainer.files import hash_file

TIMES = {"step_ms", "tokens_per_s", "data_wait_ms", "peak_gib"}


@pytest.fixture(scope="module")
def runs(launch, models, records, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of both runs, and by rank what every start of the stopped one said and left."""
    folder = tmp_path_factory.mktemp("runs")
    scenarios = ["undisturbed", "stopped"]
    results = launch(
        "stopping", 2, timeout_s=600.0, scenarios=scenarios, models=models, records=records, runs=str(folder)
    )
    return folder, [result["stopped"] for result in results]


SAID = {
    "data": ("stopped by SIGUSR1 while the rows of ", 0, []),
    "loading": ("stopped by SIGTERM before the weights of ", 0, []),
    "reference": ("stopped by SIGTERM in the reference pass, after step 1 of 2", 0, []),
    "training": ("stopped by SIGUSR1 after update 1 of 4", 1, ["step-000001"]),
    "evaluation": ("stopped by the stop file in evaluation", 1, ["step-000001", "step-000002"]),
    "owed evaluation": ("stopped by SIGUSR1 in evaluation", 1, ["step-000001", "step-000002"]),
    "saving": ("stopped by SIGTERM after update 3 of 4", 3, [f"step-00000{step}" for step in (1, 2, 3)]),
    "last evaluation": ("stopped by SIGTERM in evaluation", 3, [f"step-00000{step}" for step in (2, 3, 4)]),
    "export": ("stopped by SIGTERM before the weights of ", 4, [f"step-00000{step}" for step in (2, 3, 4)]),
    "": ("done", 4, [f"step-00000{step}" for step in (2, 3, 4)]),
}


@pytest.mark.parametrize("phase", SAID)
def test_a_stop_is_noticed_in_its_phase_by_every_rank_and_nothing_is_lost(runs, phase):
    """One rank is asked, or both and their data workers, or the file; rows and checkpoints are what was done."""
    said, num_rows, checkpoints = SAID[phase]
    for of_rank in runs[1]:
        result = of_rank[phase]
        assert result["said"].startswith(said)
        assert result["rows"] == num_rows
        assert result["checkpoints"] == checkpoints
        assert result["published"] == (phase == "")


def test_the_reference_pass_goes_on_where_it_was_stopped(runs):
    for of_rank in runs[1]:
        assert of_rank["loading"]["cache"] == []
        assert of_rank["reference"]["cache"] == [".image_features", ".unfinished"]
        assert of_rank["training"]["cache"] == [".image_features", ".safetensors"]


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "stage2" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_metrics_and_weights_are_those_of_the_undisturbed_run_to_the_bit(runs):
    folder, _ = runs
    rows = metrics(folder / "undisturbed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4]
    assert metrics(folder / "stopped") == rows
    weights = [hash_file(folder / name / "stage2" / "model.safetensors") for name in ("undisturbed", "stopped")]
    assert weights[0] == weights[1]
