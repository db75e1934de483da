"""Whole runs of both stages on one and on two ranks: the same losses, and models that load by themselves."""

import json
from pathlib import Path

import pytest
import torch

RUNS = {
    1: ("stage1", "stage2"),
    2: ("stage1", "stage2", "stage2_cached", "stage2_pixels", "stage2_reference", "stage2_simpo", "stage2_shared"),
}


@pytest.fixture(scope="session")
def folders(launch, models, records, tmp_path_factory) -> dict[int, dict[str, Path]]:
    """Model folders of every run, by the number of ranks."""
    runs = str(tmp_path_factory.mktemp("runs"))
    found = {}
    for world_size, names in RUNS.items():
        results = launch("stages", world_size, scenarios=names, models=models, records=records, runs=runs)
        assert all(result == results[0] for result in results)
        found[world_size] = {name: Path(folder) for name, folder in results[0].items()}
    return found


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, names in RUNS.items() for name in names])
def test_a_run_ends_with_a_summary_and_a_model(folders, world_size, name):
    folder = folders[world_size][name]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["stage"], summary["world_size"]) == (int(name[5]), world_size)
    assert summary["updates"] == len(rows(folder))
    assert summary["export_logps_difference"] <= 1e-5
    assert (folder / "model.safetensors").is_file()
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("name", RUNS[1])
def test_two_ranks_have_the_losses_of_one(folders, name):
    one, two = rows(folders[1][name]), rows(folders[2][name])
    assert [row["step"] for row in two] == list(range(1, {"stage1": 4, "stage2": 2}[name] + 1))
    for of_one, of_two in zip(one, two, strict=True):
        assert of_one.keys() == of_two.keys()
        for metric in of_one.keys() - {"step_ms", "data_wait_ms", "tokens_per_s", "peak_gib"}:
            assert of_two[metric] == pytest.approx(of_one[metric], rel=1e-5, abs=1e-5), metric


def test_stage_two_starts_where_stage_one_ended(folders):
    for runs in folders.values():
        first = rows(runs["stage2"])[0]
        assert abs(first["rewards/margins"]) <= 1e-5
        assert first["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)


def test_the_cached_reference_serves_a_second_run(folders):
    """The run itself fails when it computes it again."""
    first, again = (rows(folders[2][name])[0] for name in ("stage2", "stage2_cached"))
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert abs(again["rewards/margins"]) <= 1e-5


def test_another_reference_gives_margins_at_once(folders):
    assert abs(rows(folders[2]["stage2_reference"])[0]["rewards/margins"]) > 1e-2


def test_an_objective_without_reference_computes_none(folders):
    """The run itself fails when it does, and when it takes the first margins, which are not zero, for a fault."""
    folder = folders[2]["stage2_simpo"]
    first = rows(folder)[0]
    assert abs(first["rewards/margins"]) > 1e-3
    assert first["rewards/chosen"] < 0
    assert first["loss"] == pytest.approx(first["loss/simpo"] + 0.5 * first["loss/nll"])
    assert "eval/loss/simpo" in first
    assert [path.suffix for path in (folder.parent / "reference_cache").iterdir()] == [".image_features"]


def test_cached_image_features_change_no_update(folders):
    cached, pixels = (rows(folders[2][name]) for name in ("stage2_cached", "stage2_pixels"))
    assert len(cached) == len(pixels) == 4
    for of_cached, of_pixels in zip(cached, pixels, strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert of_cached[metric] == pytest.approx(of_pixels[metric], rel=1e-5, abs=1e-6), metric


def test_ranks_that_share_micro_batches_change_no_update(folders):
    """Nor does their reference pass, nor the features of their vision tower, which the updates read."""
    shared, apart = (rows(folders[2][name]) for name in ("stage2_shared", "stage2_cached"))
    assert len(shared) == len(apart) == 4
    for of_shared, of_apart in zip(shared, apart, strict=True):
        assert of_shared.keys() >= of_apart.keys()
        for metric in of_apart.keys() - {"step_ms", "data_wait_ms", "tokens_per_s", "peak_gib"}:
            assert of_shared[metric] == pytest.approx(of_apart[metric], rel=1e-5, abs=1e-5), metric


def test_one_of_the_ranks_that_share_keeps_the_image_features(folders):
    (features,) = (folders[2]["stage2_shared"].parents[1] / "shared_cache").glob("*.image_features")
    assert {path.name[:10] for path in features.iterdir()} == {"rank-00000"}


def test_the_exported_model_of_two_ranks_reaches_the_held_out_loss(folders, plain, records):
    """The last row's held-out NLL, from the published folder and without any of the trainer's code."""
    folder = folders[2]["stage1"]
    with torch.no_grad():
        logps = torch.cat([tokens for (tokens,), _ in plain(str(folder)).conversations(records["texts"])])
    assert float(-logps.mean()) == pytest.approx(rows(folder)[-1]["eval/loss"], rel=1e-5)
