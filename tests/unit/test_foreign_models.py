"""Model folders from elsewhere: safetensors alone are read, and code that comes with a model is never run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mede2.trainer.adapters import add_adapter
from mede2.trainer.answering.generation import Generator
from mede2.trainer.data.processing import load_processor, locate_model
from mede2.trainer.policy import language_linears, load_policy


class Touches:
    """When it is unpickled, the file `path` is there."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def as_pickle(folder: Path) -> None:
    """Put the weights into pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_folder_of_pickles_is_refused_and_the_way_out_told(folder, model_folder):
    as_pickle(folder)
    with pytest.raises(ValueError, match="holds no safetensors weights") as told:
        locate_model(str(folder))
    assert str(folder) in str(told.value)
    converted = AutoModelForImageTextToText.from_pretrained(folder)  # what the error says to do
    converted.save_pretrained(folder)
    assert locate_model(str(folder)) == folder
    weights, before = load_file(folder / "model.safetensors"), load_file(model_folder / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_other_safetensors_beside_a_pickle_do_not_hide_it(folder):
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    as_pickle(folder)
    with pytest.raises(ValueError, match="holds no safetensors weights"):
        locate_model(str(folder))


def test_wherever_weights_are_loaded_a_pickle_is_not(folder):
    as_pickle(folder)
    with pytest.raises(ValueError, match=f"{folder} does not load"):
        load_policy(folder, dtype=torch.float32, attention="sdpa", implementation="torch")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Generator(folder, dtype=torch.float32, device="cpu")


def test_an_adapter_in_a_pickle_is_refused(model_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    torch.save({"weight": Touches(tmp_path / "touched")}, tmp_path / "adapter_model.bin")
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        add_adapter(model, tmp_path, language_linears(model), torch.float32)
    assert not (tmp_path / "touched").exists()


def test_an_adapter_beside_a_whole_model_is_not_loaded_unasked(folder):
    """transformers would put it on the model, from a pickle, too."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="holds an adapter beside the model; merge it"):
        locate_model(str(folder))


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [
        ("config.json", {"AutoConfig": "theirs.Config"}),
        ("config.json", {"AutoModelForImageTextToText": "theirs.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "theirs.Tokenizer"]}),
        ("preprocessor_config.json", {"AutoImageProcessor": "theirs.Processor"}),
        ("generation_config.json", {"AutoModel": "another/repository--theirs.Model"}),
    ],
)
def test_code_that_comes_with_a_model_is_refused_before_anything_asks(name, auto_map, folder, monkeypatch):
    (folder / "theirs.py").write_text(f"open({str(folder / 'touched')!r}, 'w')")
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | {"auto_map": auto_map}))
    monkeypatch.setattr(sys, "stdin", None)  # a question on the terminal would end in an error of its own
    for load in (locate_model, load_processor):
        with pytest.raises(ValueError, match=rf"{name} names code that comes with the model \(auto_map\)"):
            load(folder)
    assert not (folder / "touched").exists()


def test_a_map_deep_in_a_config_is_found(folder):
    (folder / "processor_config.json").write_text('{"image_processor": {"auto_map": {"AutoImageProcessor": "a.B"}}}')
    with pytest.raises(ValueError, match=r"processor_config\.json names code"):
        locate_model(str(folder))


def test_no_line_of_ours_trusts_remote_code_or_loads_without_saying_safetensors():
    root = Path(__file__).parents[2]
    files = [path for part in ("launch", "trainer", "kernels", "benchmarks") for path in (root / part).rglob("*.py")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        for call in ("AutoModelForImageTextToText.from_pretrained(", "ForConditionalGeneration.from_pretrained("):
            for after in text.split(call)[1:]:
                if not after.lstrip().startswith("FOLDER"):  # in the error that tells how to convert
                    assert "use_safetensors=True" in after.split("\n\n")[0], path
