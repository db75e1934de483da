"""Each model family on two ranks under ZeRO-3, rows with 0 to 3 images: gradients, and a run with its export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mede2.trainer.policy import part_of

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl3")
UPDATES = ("update", "update_shared")
WHOLE_RUNS = ("qwen3_vl", "internvl3")  # those of Qwen2.5-VL are in test_stages.py
TOLERANCE = 2e-6  # of a tensor's gradient, as a share of the norm of all; fp32 sums in another order


@pytest.fixture(scope="session")
def models(family_folders) -> dict[str, str]:
    return {family: str(folder) for family, folder in family_folders.items()}


@pytest.fixture(scope="session")
def pairs(family_files) -> str:
    return str(family_files[2])


@pytest.fixture(scope="session")
def references(make_reference, models, pairs) -> dict[str, list[list[float]]]:
    return {family: make_reference(model, pairs) for family, model in models.items()}


@pytest.fixture(scope="session")
def results(launch, models, references, pairs, tmp_path_factory) -> list[dict]:
    """By rank."""
    scenarios = [
        *(f"{update}_{family}" for update in UPDATES for family in FAMILIES),
        *(f"run_{family}" for family in WHOLE_RUNS),
    ]
    runs = str(tmp_path_factory.mktemp("runs"))
    job = {"models": models, "references": references, "records": {"pairs": pairs}, "runs": runs}
    return launch("families", 2, scenarios=scenarios, **job)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_a_run_without_deepspeed(
    results, models, references, dpo_and_nll, pairs, family, update
):
    """Of every parameter, those of the vision tower and the mergers among them."""
    true = dpo_and_nll(models[family], pairs, references[family])
    for rank, result in enumerate(of_rank[f"{update}_{family}"] for of_rank in results):
        gradients = result["gradients"]
        assert gradients.keys() == true["gradients"].keys()
        assert result["metrics"]["loss"] == pytest.approx(true["loss"], rel=1e-6), f"rank {rank}"
        errors = {name: float((gradients[name] - of_name).norm()) for name, of_name in true["gradients"].items()}
        whole = float(torch.cat([of_name.flatten() for of_name in true["gradients"].values()]).norm())
        worst = max(errors, key=errors.get)
        assert errors[worst] < TOLERANCE * whole, f"rank {rank}, {worst}"


def test_a_rank_without_images_stood_beside_one_with_them(results):
    for family in FAMILIES:
        of_ranks = [result[f"update_{family}"]["micro_batches_with_image"] for result in results]
        assert [True, False] in list(map(list, zip(*of_ranks, strict=True)))


@pytest.mark.parametrize("family", WHOLE_RUNS)
def test_the_exported_model_answers_as_the_run_says(results, models, plain, pairs, family):
    """Loaded by transformers alone, it has the held-out NLL of the run's last row."""
    folder = Path(results[0][f"run_{family}"])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["export_logps_difference"] <= 1e-5
    with torch.no_grad():
        chosen = torch.cat([of_chosen for (of_chosen, _), _ in plain(str(folder)).conversations(pairs)])
    assert float(-chosen.mean()) == pytest.approx(summary["metrics"]["eval/loss/nll"], rel=1e-5)


@pytest.mark.parametrize("family", WHOLE_RUNS)
def test_the_vision_tower_stayed_as_it_was(results, models, family):
    before = load_file(Path(models[family]) / "model.safetensors")
    after = load_file(Path(results[0][f"run_{family}"]) / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if part_of(name) == "vision_tower"} == same
