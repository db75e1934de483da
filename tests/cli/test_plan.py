"""`launch/plan.py` as the README says it: plans of recipes, their headers, its errors, and its check on real runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from mede2.trainer.planning import check
from mede2.trainer.planning.cases import CASES
from mede2.trainer.planning.command import read_stage, with_header
from mede2.trainer.planning.plan import make_plan

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
LARGEST = "launch/recipes/qwen2_5_vl_72b_stage2.yaml"


def plan(run, *arguments: str, check: bool = True):
    return run(sys.executable, "launch/plan.py", *arguments, timeout_s=60, check=check)


def test_the_largest_recipe(run):
    shown = plan(run, "--recipe", LARGEST, "--cluster", "h100:4x8").stdout
    for words in ("Stage II (enhance) on h100:4x8", "gathered weights", "reduce_scatter_tensor", "MFU", "fits:"):
        assert words in shown
    done = json.loads(plan(run, "--recipe", LARGEST, "--cluster", "h100:1x8", "--json").stdout)
    (small,) = done["plans"]
    assert not small["fits"]
    assert "does not fit: a GPU lacks" in small["verdict"]
    assert "z3_offload.json" in small["verdict"]


def test_it_needs_neither_torch_nor_a_library_of_models(run):
    code = (
        "import sys, mede2.trainer.planning.command, mede2.trainer.planning.plan;"
        "print({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"


def test_both_stages_and_a_search(run):
    recipes = [word for stage in (1, 2) for word in ("--recipe", f"launch/recipes/qwen2_5_vl_3b_stage{stage}.yaml")]
    done = json.loads(plan(run, *recipes, "--search", "--json").stdout)
    assert [each["stage"] for each in done["plans"]] == [1, 2]
    assert done["gpu_hours"] == pytest.approx(sum(each["gpu_hours"] for each in done["plans"]))
    assert done["search"]["2"][0]["change"].startswith("--ds ")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_fits_and_says_what_the_planner_says(recipe):
    """After a change of the planner or a recipe: python launch/plan.py header launch/recipes/*.yaml"""
    assert recipe.read_text(encoding="utf-8") == with_header(ROOT, recipe)
    stage = read_stage(ROOT, str(recipe), None, (), {})
    assert make_plan(stage).fits
    assert f"--recipe launch/recipes/{recipe.name}" in recipe.read_text(encoding="utf-8")


def test_there_is_a_recipe_for_each_model_kind_and_stage():
    names = {path.stem for path in RECIPES}
    for model in (
        "qwen2_5_vl_3b",
        "qwen2_5_vl_7b",
        "qwen2_5_vl_32b",
        "qwen2_5_vl_72b",
        "internvl3_8b",
        "internvl3_38b",
    ):
        assert {f"{model}{kind}_stage{stage}" for kind in ("", "_lora") for stage in (1, 2)} <= names
    for stage in (1, 2):
        path = ROOT / "launch" / "recipes" / f"qwen2_5_vl_7b_qlora_stage{stage}.yaml"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["quantize"] == "nf4"
        assert read_stage(ROOT, str(path), None, (), {}).cluster.name == "rtx4090"


def test_a_header_is_written_anew(run, tmp_path):
    recipe = tmp_path / "mine_stage2.yaml"
    shutil.copy(ROOT / LARGEST, recipe)
    text = recipe.read_text(encoding="utf-8").replace("micro_batch_size: 1", "micro_batch_size: 2")
    recipe.write_text(text, encoding="utf-8")
    plan(run, "header", str(recipe))
    now = recipe.read_text(encoding="utf-8")
    assert now != text
    assert now.splitlines()[:3] == text.splitlines()[:3]
    assert "micro_batch_size: 2" in now


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "h100:8"], "--recipe or --model: name what to plan"),
        (["--recipe", LARGEST, "--cluster", "h100:8by4"], "cluster: 'h100:8by4' is not NAME:NODESxGPUS"),
        (["--recipe", LARGEST, "--stage", "1"], "beta: has a meaning only in Stage II (enhance)"),
        (["--recipe", LARGEST, "--set", "global_batch_size=63"], "global_batch_size: 63 is not micro_batch_size"),
        (["--recipe", LARGEST, "--set", "max_length=500"], "max_length: 500 tokens are fewer than an average"),
        (["--recipe", LARGEST, "--ds", "nowhere.json"], "--ds"),
        (["--model", "Qwen2.5-VL-3B-Instruct"], "--cluster: not given"),
        (["--model", "setup.py", "--cluster", "h100"], "model: setup.py is not JSON"),
        (["--model", "Qwen2.5-VL-3B-Instruct", "--cluster", "h100", "--set", "quantize=nf4", "--set", "lora_rank=8"],
         "quantize: ZeRO-3 cannot partition nf4 weights"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(run, arguments, said):
    done = plan(run, *arguments, check=False)
    assert done.returncode
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_header_with_an_unknown_word_is_refused(tmp_path):
    recipe = tmp_path / "mine_stage2.yaml"
    recipe.write_text("# plan: --clutser h100:8\nbeta: 0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="# plan: --clutser: unknown; known: "):
        read_stage(ROOT, str(recipe), None, (), {})
    recipe.write_text("# plan: --examples many\nbeta: 0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="# plan: --examples many: 'many' is not a valid integer"):
        read_stage(ROOT, str(recipe), None, (), {})


def test_what_is_planned_is_what_runs_measure():
    """Part of `plan.py check --quick`: a run by ZeRO-3 on two ranks. A tenth would let a tensor of each layer go
    missing; nothing is fitted, so a hundredth is enough."""
    found = check.check([case for case in CASES if case.quick and case.zero == "z3"], ROOT)
    summary = check.summary(found)
    assert summary["worst_memory_error"] < 0.01, summary
    assert summary["worst_communication_error"] < 0.01, summary
    assert all(each.measured[category] > 0 for each in found for category in check.CATEGORIES)
