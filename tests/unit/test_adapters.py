"""Adapters: which layers carry one, what trains then, the merge, and what cannot go together."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mede2.trainer.adapters import adapter_tensors, is_adapter, save_adapter, whole_tensors
from mede2.trainer.data.processing import locate_model
from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.engine import make_optimizer
from mede2.trainer.export import MERGED_TOLERANCE, TOLERANCE, compare
from mede2.trainer.policy import PARTS, freeze, load_policy
from mede2.trainer.prepare import prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import BatchArithmetic, Settings

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True, "lora_target_modules": ("q_proj", "layers.1.mlp.up_proj")}]


def load(folder: Path, adapter=None, **options):
    return load_policy(
        folder, dtype=torch.float32, attention="sdpa", implementation="torch", adapter=adapter, **options
    )  # fmt: skip


@pytest.mark.parametrize("values", VARIANTS, ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_is_merged_and_what_is_saved_are_what_peft_makes_of_it(model_folder, tmp_path, values, quantize):
    """With an adapter of some size: the merge by hand is peft's, and peft loads the saved adapter to the bit."""
    settings = Settings(lora_rank=3, lora_alpha=6, **values)
    model = load(model_folder, settings, quantize=quantize).model
    generator = torch.Generator().manual_seed(0)
    adapter = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, {name: value() for name, _, value in adapter_tensors(model)}, tmp_path, str(model_folder))
    whole = {name: value() for name, _, value in whole_tensors(model)}

    base = load(model_folder, quantize=quantize).model
    theirs = PeftModel.from_pretrained(base, tmp_path)
    for name, parameter in adapter.items():
        assert torch.equal(theirs.get_parameter(f"base_model.model.{name}"), parameter), name
    if quantize:  # peft would quantize the sum again: give it the same base in 32 bits
        dense = {name: value() for name, _, value in whole_tensors(load(model_folder, quantize=quantize).model)}
        base = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
        base.load_state_dict(dense)
        theirs = PeftModel.from_pretrained(base, tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    assert whole.keys() == merged.keys()
    assert len({whole[name].data_ptr() for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")}) == 1
    for name, value in merged.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_new_adapter_changes_nothing_and_starts_alike_everywhere(model_folder):
    first = load(model_folder, Settings(lora_rank=3)).model
    torch.rand(7)
    again = load(model_folder, Settings(lora_rank=3)).model
    plain = load(model_folder).model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, plain(input_ids=ids).logits)
    for (name, ours), (_, theirs) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert first.get_parameter("model.language_model.layers.0.mlp.up_proj.lora_A.default.weight").any()


def test_a_new_adapter_leaves_the_generators_of_the_gpus_alone(model_folder, monkeypatch):
    """Dropout draws from them, and differs from rank to rank."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load(model_folder, Settings(lora_rank=3))
    assert seeds == [3]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_sits_on_the_language_model_alone_and_trains_in_its_place(model_folder):
    """The tower of this model has layers of the same names."""
    policy = load(model_folder, Settings(lora_rank=3))
    counts = freeze(policy, {part: part != "vision_tower" for part in PARTS})
    named = dict(policy.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    adapter = {name for name in named if ".lora_" in name}
    assert {name for name in trained if ".visual." not in name} == adapter
    assert {name.split(".visual.")[1].split(".")[0] for name in trained - adapter} == {"merger"}
    assert len(adapter) == 2 * 7 * len(policy.model.model.language_model.layers)
    assert counts["language_model"] == sum(named[name].numel() for name in adapter)


def test_quantized_are_the_linear_layers_of_the_language_model(model_folder):
    model = load(model_folder, Settings(lora_rank=3), quantize="nf4").model
    quantized = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-3] for name in quantized} == set(layers)
    assert len(quantized) == 7 * len(model.model.language_model.layers)
    assert not [name for name in quantized if ".visual." in name]


def test_groups_of_the_optimizer(model_folder):
    """Part and decay make a group; each keeps its share of the main learning rate."""
    settings = Settings(
        learning_rate=1e-4, train_vision_tower=True, train_merger=True, merger_lr=5e-4, weight_decay=0.1
    )  # fmt: skip
    policy = load(model_folder)
    freeze(policy, dict.fromkeys(PARTS, True))
    groups = make_optimizer(policy, settings).param_groups
    found = {(group["lr"], round(group["lr_ratio"], 9), group["weight_decay"]) for group in groups}
    assert found == {(1e-4, 1.0, 0.1), (1e-4, 1.0, 0.0), (5e-4, 5.0, 0.1), (5e-4, 5.0, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(list(policy.parameters()))


REFUSED = {
    "merger_lr": ({"merger_lr": 1e-5}, "merger_lr: the merger does not train; set train_merger=true"),
    "tower_lr": ({"vision_tower_lr": 1e-5}, "vision_tower_lr: the vision_tower does not train"),
    "nf4_alone": ({"quantize": "nf4"}, "quantize: 'nf4' has a meaning only with an adapter; set lora_rank"),
    "dora_alone": ({"use_dora": True}, "use_dora: True has a meaning only with an adapter"),
    "targets_alone": ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: ('q_proj',) has a meaning only with"),
    "no_merge_alone": ({"merge_adapter": False}, "merge_adapter: False has a meaning only with an adapter"),
    "no_targets": ({"lora_rank": 4, "lora_target_modules": []}, "lora_target_modules: empty; name layers, or"),
    "no_language": (
        {"lora_rank": 4, "train_language_model": False, "train_merger": True},
        "lora_rank: 4 puts an adapter on the language model, but train_language_model is false",
    ),
    "lost_merger": (
        {"lora_rank": 4, "train_merger": True, "merge_adapter": False},
        "merge_adapter: false writes the adapter of the language model alone, and the trained merger would be lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_go_together(given, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked
        resolve(1, [("test", given)])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        ("z3", {"lora_rank": 4, "quantize": "nf4"}, "quantize: ZeRO-3 cannot partition nf4 weights; name a --ds file"),
        ("z3_offload", {"optimizer": "paged_adamw_8bit"}, "optimizer: paged_adamw_8bit pages its state itself; remove"),
        ("z2", {"optimizer": "cpu_adam"}, "optimizer: cpu_adam needs zero_optimization.offload_optimizer.device cpu"),
    ],
)
def test_settings_that_the_deepspeed_file_cannot_serve(file, given, message):
    config, settings = read_deepspeed_file(DS_CONFIGS / f"{file}.json"), Settings(**given)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked
        fill_deepspeed_config(config, settings, BatchArithmetic(16, 1, 1), torch.float32, 96, 999)
    assert message in str(raised.value)


def test_a_target_that_the_model_lacks_is_refused_before_any_weight_is_loaded(
    model_folder, stage1_file, tmp_path, world, monkeypatch
):
    """`fc1` is nowhere, `qkv` in the vision tower alone."""
    monkeypatch.setattr("mede2.trainer.policy._load_model", None)
    for target in ("fc1", "qkv"):
        given = {
            "model": str(model_folder), "train": [str(stage1_file)], "lora_rank": 4, "lora_target_modules": [target],
        }  # fmt: skip
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked
            prepare(resolve(1, [("test", given)]), str(DS_CONFIGS / "z2.json"), tmp_path / "output", world)
        assert f"lora_target_modules: {target!r} is no linear layer of the language model" in str(raised.value)
        assert "down_proj, gate_proj, k_proj" in str(raised.value)


def test_a_folder_of_an_adapter_is_no_model_and_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and no whole model; merge it"):
        locate_model(str(tmp_path))


def test_a_merge_is_compared_by_its_mean(world):
    """One log-probability far off passes in bf16, all of them a little off do not; a model copied as it is may not."""
    ours = torch.zeros(100)
    one, all_of_them = ours.clone(), ours + 2 * MERGED_TOLERANCE[torch.bfloat16]
    one[3] = 10 * TOLERANCE[torch.bfloat16]
    assert compare(ours, one, torch.bfloat16, world, merged=True) == pytest.approx(0.2)
    for wrong, merged in ((all_of_them, True), (one, False)):
        with pytest.raises(RuntimeError, match="does not answer as the trained one"):
            compare(ours, wrong, torch.bfloat16, world, merged=merged)
