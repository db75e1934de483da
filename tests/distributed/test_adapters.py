"""What trains, on one and two ranks: adapters, against peft on a plain model in one process without DeepSpeed; learning
rates of the parts; the check of the first updates; whole runs, whose exports transformers and peft read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

TOLERANCE = 3e-6  # of the norm of all gradients; fp32 sums in another order
BETA = 0.1
CASES = {  # the plain run that each configuration must equal
    "lora_z3": "lora", "lora_recomputed_merger_z3": "lora", "lora_z2": "lora", "dora_z3": "dora",
    "dora_dropout_z3": "dora", "nf4_lora_z2": "nf4_lora", "nf4_dora_recomputed_z2": "nf4_dora",
}  # fmt: skip
ONE_RANK = ("lora_z3", "nf4_lora_z2")
CHECKS = (
    "rates", "no_gradient_z3", "no_gradient_z2", "no_image_z3", "harmed_z3", "harmed_z2", "moves_8bit_z3",
    "moves_lora_z2", "moves_lora_twice_z3",
)  # fmt: skip
RUNS = ("merged", "adapter", "nf4_adapter", "nf4_merged", "bf16_merged")
AGAIN = ("merged", "nf4_adapter")


@pytest.fixture(scope="session")
def adapters(models, tmp_path_factory) -> str:
    """Adapters made and saved by peft alone, with a B that is not zero: rank-stabilized LoRA on every linear layer of
    the language model, and DoRA on some."""
    folder = tmp_path_factory.mktemp("adapters")
    some = r".*language_model.*\.(q_proj|down_proj)"
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=r".*language_model.*_proj"),
        "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=some),
    }
    for name, config in configs.items():
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(models["tied"], dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
    shutil.copytree(folder / "dora", folder / "dora_dropout")
    path = folder / "dora_dropout" / "adapter_config.json"  # it drops nothing, but goes another way through the layers
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 1e-12}))
    return str(folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapter_runs")


@pytest.fixture(scope="session")
def job(models, records, adapters, reference_logps, runs) -> dict:
    return {
        "models": models, "records": records, "adapters": adapters, "reference": reference_logps, "runs": str(runs),
    }  # fmt: skip


@pytest.fixture(scope="session")
def two(launch, job) -> list[dict]:
    names = [*CASES, *CHECKS, *(f"run_{name}" for name in RUNS), *(f"again_{name}" for name in AGAIN), "engines"]
    return launch("adapters", 2, scenarios=names, **job)


@pytest.fixture(scope="session")
def one(launch, job) -> dict:
    return launch("adapters", 1, scenarios=ONE_RANK, **job)[0]


def in_nf4(folder: str) -> torch.nn.Module:
    """A model whose language model's linear layers are in 4 bits."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' own shortcut in evaluation, in bf16
    return model


@pytest.fixture(scope="session")
def truth(plain, models, records, reference_logps, adapters) -> dict[str, dict]:
    """Loss and gradients of DPO with NLL, by hand over the log-probabilities of peft's own model."""
    found = {}
    for name in set(CASES.values()):
        run = plain(models["tied"])
        base = in_nf4(models["tied"]) if name.startswith("nf4") else run.model
        run.model = PeftModel.from_pretrained(base, f"{adapters}/{name[-4:]}", is_trainable=True)
        for parameter_name, parameter in run.model.named_parameters():
            if ".merger." in parameter_name:
                parameter.requires_grad_(True)
        sides = [pair for pair, _ in run.conversations(records["pairs"])]
        margins = torch.stack([
            (chosen.double().sum() - rejected.double().sum()) - (of_chosen - of_rejected)
            for (chosen, rejected), (of_chosen, of_rejected) in zip(sides, reference_logps, strict=True)
        ])  # fmt: skip
        preference = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        loss = preference - torch.cat([chosen for chosen, _ in sides]).mean()
        loss.backward()
        gradients = {name.removeprefix("base_model.model."): value for name, value in run.gradients().items()}
        found[name] = {"loss": float(loss.detach()), "gradients": gradients}
    return found


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


@pytest.mark.parametrize(("world_size", "case"), [*((1, case) for case in ONE_RANK), *((2, case) for case in CASES)])
def test_gradients_equal_those_of_peft_without_deepspeed(request, truth, world_size, case):
    true = truth[CASES[case]]
    for results in [request.getfixturevalue("one")] if world_size == 1 else request.getfixturevalue("two"):
        result, wanted = results[case], true["gradients"]
        if "merger" not in case:
            wanted = {name: value for name, value in wanted.items() if ".lora_" in name}
        assert result["metrics"]["loss"] == pytest.approx(true["loss"], rel=1e-6)
        assert result["gradients"].keys() == wanted.keys()
        wrong = {name: value - wanted[name] for name, value in result["gradients"].items()}
        assert norm(wrong) < TOLERANCE * norm(wanted)


@pytest.mark.parametrize(("part", "rate"), [("language", 5e-4), ("tower", 5e-5), ("merger", 2e-3)])
def test_each_part_has_its_own_learning_rate_under_the_same_schedule(two, part, rate):
    """Half of the peaks 1e-3, 1e-4 and 4e-3, as the first of two updates of warm-up."""
    before, after = two[0]["rates"]["before"], two[0]["rates"]["after"]

    def part_of(name: str) -> str:
        return "merger" if ".merger." in name else "tower" if ".visual." in name else "language"

    steps = torch.cat([(after[name] - before[name]).abs().flatten() for name in before if part_of(name) == part])
    assert float(steps.median()) == pytest.approx(rate, rel=1e-2)  # Adam's epsilon and fp32 take the rest
    assert float(steps.max()) < 1.01 * rate


@pytest.mark.parametrize("zero", ["z3", "z2"])
def test_what_trains_without_a_gradient_stops_every_rank(two, zero):
    """The vision tower of a text-only batch that is said to hold an image; weight decay moves it all the same."""
    for results in two:
        raised = results[f"no_gradient_{zero}"]["raised"]
        assert "trained, but without a gradient: model.visual.patch_embed.proj.weight, " in raised
        assert "frozen, but changed" not in raised


def test_a_vision_tower_waits_for_the_first_image(two):
    for results in two:
        assert results["no_image_z3"]["raised"] == ""
        assert {name.split(".")[1] for name in results["no_image_z3"]["waiting"]} == {"visual"}


@pytest.mark.parametrize("zero", ["z3", "z2"])
def test_a_frozen_weight_that_changes_on_one_rank_stops_every_rank(two, zero):
    for results in two:
        raised = results[f"harmed_{zero}"]["raised"]
        assert raised.endswith("frozen, but changed: model.visual.blocks.1.attn.qkv.weight")
        assert "without a gradient" not in raised


def test_what_moves_passes(two):
    """8-bit moments in bf16; and a LoRA A, which waits for the second update."""
    for results in two:
        assert [results[name]["raised"] for name in CHECKS if name.startswith("moves")] == ["", "", ""]
        assert results["moves_8bit_z3"]["waiting"] == results["moves_lora_twice_z3"]["waiting"] == []
        waiting = results["moves_lora_z2"]["waiting"]
        assert len(waiting) == 4 * 7
        assert all(".lora_A." in name for name in waiting)


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out_nll(run, records: str) -> float:
    """NLL of the demonstrations or chosen answers under a plain model."""
    with torch.no_grad():
        return -float(torch.cat([sides[0] for sides, _ in run.conversations(records)]).mean())


def test_a_merged_model_is_a_model_like_any_other_in_shards(two, plain, records):
    folder = Path(two[0]["run_merged"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) == 3
    assert all((folder / shard).stat().st_size < 1.05e6 for shard in shards)
    assert held_out_nll(plain(str(folder)), records["texts"]) == pytest.approx(rows(folder)[-1]["eval/loss"], rel=1e-5)


def test_peft_loads_a_saved_adapter(two, plain, models, records):
    """The base is found by the name in the adapter's config, and nothing but the adapter is in the file."""
    folder = Path(two[0]["run_adapter"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models["tied"]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")} == {
        "q_proj", "up_proj",
    }  # fmt: skip
    assert not (folder / "model.safetensors").exists()
    run = plain(config["base_model_name_or_path"])
    run.model = PeftModel.from_pretrained(run.model, folder)
    assert held_out_nll(run, records["texts"]) == pytest.approx(rows(folder)[-1]["eval/loss"], rel=1e-5)


def test_an_adapter_of_4_bit_weights_is_exact_on_them(two, plain, records):
    folder, base = Path(two[0]["run_nf4_adapter"]), two[0]["run_merged"]
    run = plain(base)
    run.model = PeftModel.from_pretrained(in_nf4(base), folder)
    assert held_out_nll(run, records["pairs"]) == pytest.approx(rows(folder)[-1]["eval/loss/nll"], rel=1e-5)


def test_a_merge_into_4_bit_weights_keeps_what_was_trained_on_them(two, plain, records):
    folder = two[0]["run_nf4_merged"]
    nll = held_out_nll(plain(folder), records["pairs"])
    assert nll == pytest.approx(rows(folder)[-1]["eval/loss/nll"], rel=1e-5)
    for parameter in plain(folder).model.parameters():
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "largest"), [("merged", 1e-5), ("adapter", 0), ("nf4_adapter", 0), ("nf4_merged", 1e-5)]
)
def test_every_export_was_loaded_again_and_compared(two, name, largest):
    summary = json.loads((Path(two[0][f"run_{name}"]) / "summary.json").read_text())
    assert summary["export_logps_difference"] <= largest


def test_one_model_is_held_at_a_time_and_none_whole_in_16_bits_that_trained_in_4(two):
    """The reference where its cache is not there, the policy, the export."""
    for results in two:
        opened = results["engines"]
        assert not [others for engines in opened.values() for others, _ in engines if others]
        stages = {name: [stage for _, stage in engines] for name, engines in opened.items()}
        assert stages["run_nf4_adapter"] == [0, 2, 0]
        assert stages["run_nf4_merged"] == [2, 3]


def test_adapters_learn_and_start_from_the_reference(two):
    """Margins are zero before the first update, on 4-bit weights too; then the loss falls."""
    for name in ("nf4_adapter", "nf4_merged", "bf16_merged"):
        curve = rows(two[0][f"run_{name}"])
        assert abs(curve[0]["rewards/margins"]) <= 1e-5
        assert curve[-1]["eval/loss"] < curve[0]["loss"]
        assert curve[-1]["eval/rewards/margins"] > 0.1


@pytest.mark.parametrize("name", AGAIN)
def test_a_resumed_run_has_the_losses_of_the_first(two, name):
    """Checkpoints hold no frozen weights; dropout goes on where it was."""
    first, again = (rows(two[0][f"{kind}_{name}"]) for kind in ("run", "again"))
    assert [row["step"] for row in again] == [3, 4]
    assert [row["loss"] for row in again] == [row["loss"] for row in first[2:]]
    saved = Path(two[0][f"run_{name}"]).glob("checkpoints/step-000002/*model_states.pt")
    assert sum(path.stat().st_size for path in saved) < 1e6
