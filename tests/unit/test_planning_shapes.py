"""Parameters counted from a config.json are those of the real classes, name for name."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mede2.trainer.planning.published import PUBLISHED
from mede2.trainer.planning.shapes import DEFAULTS, TIED, read_shape, shape_of

# As the hub shows them for the published safetensors.
TOTALS = {
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "InternVL3-38B-hf": 38_388_164_992,
}


def real_parameters(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_of_its_class(name):
    config = dict(PUBLISHED[name])
    if "text_config" not in config:  # transformers reads the sizes of the first files so, too
        sizes = {key: value for key, value in config.items() if key not in ("model_type", "vision_config")}
        config |= {"text_config": {key: value for key, value in sizes.items() if key != "tie_word_embeddings"}}
    model_type = config.pop("model_type")
    real = real_parameters(CONFIG_MAPPING[model_type](**config))
    shape = read_shape(f"SomeOrganisation/{name}")
    assert {parameter.name: parameter.shape for parameter in shape.parameters} == real


def test_totals_are_the_published_ones():
    assert {name: read_shape(name).num_parameters for name in TOTALS} == TOTALS


def test_counts_by_part():
    """By hand: a layer of 7B is 2 x 3584 (norms) + 3584^2 + 3584 + 2 (512 x 3584 + 512) + 3584^2 + 3 x 3584 x 18944."""
    layer = 2 * 3584 + 2 * 3584**2 + 3584 + 2 * (512 * 3584 + 512) + 3 * 3584 * 18944
    counts = read_shape("Qwen2.5-VL-7B-Instruct").counts
    assert counts["language_model"] == 28 * layer + 3584
    assert counts["embedding"] == 2 * 152064 * 3584
    assert read_shape("Qwen2.5-VL-3B-Instruct").counts["embedding"] == 151936 * 2048  # tied: once


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family):
    config = CONFIG_MAPPING[family]()
    text, vision = DEFAULTS[family]
    for given, real in ((text, config.get_text_config()), (vision, config.vision_config)):
        real_values = {key: getattr(real, key) for key in given if hasattr(real, key)}
        as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in real_values.items()}
        assert as_tuples == {key: given[key] for key in real_values}
    assert config.tie_word_embeddings == TIED[family]


def test_a_folder_is_read_as_transformers_reads_it(model_folder):
    shape = read_shape(str(model_folder))
    assert {p.name: p.shape for p in shape.parameters} == real_parameters(AutoConfig.from_pretrained(model_folder))
    assert read_shape(str(model_folder / "config.json")).counts == shape.counts


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model: NoSuchModel is neither .* Qwen2\.5-VL-3B-Instruct"):
        read_shape("NoSuchModel")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"config.json is of model_type 'llava'; supported are qwen2_5_vl"):
        read_shape(str(path))
    path.write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        read_shape(str(tmp_path))
    with pytest.raises(ValueError, match="text model of model_type 'internlm3'"):
        shape_of({"model_type": "internvl", "text_config": {"model_type": "internlm3"}}, "InternVL3-9B-hf")
    with pytest.raises(ValueError, match=r"text_config.hidden_size: -1 is not a whole number above 0"):
        shape_of({"model_type": "qwen3_vl", "text_config": {"hidden_size": -1}}, "x")
