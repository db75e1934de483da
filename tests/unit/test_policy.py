"""Which parameters train: the parts of three model families, by the real names of their parameters."""

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForImageTextToText
from transformers.integrations import replace_with_bnb_linear

from mede2.trainer.policy import (
    PARTS,
    Policy,
    freeze,
    language_linears,
    largest_parameter,
    load_policy,
    nf4_config,
    part_of,
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
TEXT = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 64}
FAMILIES = {  # configuration; where the vision tower and the mergers are in the model
    "qwen2_5_vl": (
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=TEXT, vision_config={**SIZES, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
        ),
        lambda model: (model.visual, [model.visual.merger]),
    ),
    "qwen3_vl": (
        lambda: transformers.Qwen3VLConfig(
            text_config=TEXT,
            vision_config={
                **SIZES, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
            },
        ),
        lambda model: (model.visual, [model.visual.merger, model.visual.deepstack_merger_list]),
    ),
    "internvl": (
        lambda: transformers.InternVLConfig(
            text_config=TEXT | {"model_type": "qwen2"}, vision_config=SIZES | {"num_hidden_layers": 2}
        ),
        lambda model: (model.vision_tower, [model.multi_modal_projector]),
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def on_meta(request):
    """A model without values, and for each part the ids of its parameters, by the modules that hold them."""
    config, places = FAMILIES[request.param]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config())
    tower, mergers = places(model.model)
    merger = {id(parameter) for module in mergers for parameter in module.parameters()}
    vision = {id(parameter) for parameter in tower.parameters()} - merger
    rest = {id(parameter) for parameter in model.parameters()} - merger - vision
    assert merger
    assert vision
    return model, {"language_model": rest, "vision_tower": vision, "merger": merger}


def test_each_parameter_is_of_the_part_that_holds_it(on_meta):
    model, expected = on_meta
    found = {part: {id(p) for name, p in model.named_parameters() if part_of(name) == part} for part in PARTS}
    assert found == expected


@pytest.mark.parametrize("trained", PARTS)
def test_freeze_lets_the_named_part_train_alone(on_meta, trained):
    model, expected = on_meta
    policy = Policy(model, "torch")
    counts = freeze(policy, {part: part == trained for part in PARTS})
    assert {id(p) for p in policy.parameters() if p.requires_grad} == expected[trained]
    num_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert counts == dict.fromkeys(PARTS, 0) | {trained: num_trained}


def test_adapters_and_4_bits_are_for_the_linear_layers_of_the_language_model(on_meta):
    """All of them but the head; the towers have layers of the same kinds."""
    model, expected = on_meta
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name, m in linears.items() if id(m.weight) in expected["language_model"]} - {"lm_head"}
    assert wanted
    assert set(language_linears(model)) == wanted
    config = nf4_config(torch.float32)
    model = replace_with_bnb_linear(model, config.llm_int8_skip_modules, config)
    assert {name for name, module in model.named_modules() if isinstance(module, Linear4bit)} == wanted


def test_the_head_still_gives_logits_for_generation(model_folder):
    policy = load_policy(model_folder, dtype=torch.float32, attention="sdpa", implementation="torch")
    plain = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(policy.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_largest_parameter_is_found_without_the_weights(model_folder):
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    largest = largest_parameter(transformers.AutoConfig.from_pretrained(model_folder))
    assert largest == max(parameter.numel() for parameter in model.parameters())


def test_loading_counts_a_tied_head_as_there(model_folder):
    """The small model's head is its embedding; the file holds it once."""
    policy = load_policy(model_folder, dtype=torch.float32, attention="eager", implementation="torch")
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
