"""What trains, on one and two ranks: adapters against peft on a plain model in one process without DeepSpeed; the
learning rates of the parts; the check of the first updates; and whole runs, their exports read by transformers and peft."""

import json
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
    "nf4_lora_z2": "nf4_lora", "nf4_dora_recomputed_z2": "nf4_dora",
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
    names = [*CASES, *CHECKS, *(f"run_{name}" for name in RUNS), *(f"again_{name}" for name in AGAIN)]
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


def moved(result: dict) -> dict[str, torch.Tensor]:
    """By how much each tensor's values changed."""
    before = result["before"]
    return {name: (value - before[name]).abs() for name, value in result["after"].items()}

def test_runs(two):
    for name in [*(f"run_{name}" for name in RUNS), *(f"again_{name}" for name in AGAIN)]:
        folder = Path(two[0][name])
        print(name, json.loads((folder / "summary.json").read_text()), sorted(p.name for p in folder.iterdir()))
    for name in CHECKS:
        for r in two:
            x = r[name]
            print(name, x["waiting"][:3], x["raised"])
