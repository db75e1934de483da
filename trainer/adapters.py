"""Low-rank adapters of the language model (LoRA, rsLoRA, DoRA): added, saved, merged. Imports peft where needed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mede2.trainer.files import save_tensors
from mede2.trainer.settings import Settings

ALL_LINEAR = "all-linear"
NAME = "default"  # peft's own name of an only adapter
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# A tensor to save: its name, the parameters that it is made of, and how, once those are whole.
SavedTensor = tuple[str, list[Tensor], Callable[[], Tensor]]


def is_adapter(name: str) -> bool:
    """Whether a parameter or module is of an adapter, by its name."""
    return ".lora_" in name


def add_adapter(model: nn.Module, adapter: Settings | Path, linears: Sequence[str], dtype: torch.dtype) -> None:
    """Put an adapter on a model, in place. Under ZeRO-3 while transformers knows of it: DoRA reads base weights.

    The adapter's own parameters are whole on every rank, and alike; the engine partitions them.

    Args:
        model: as transformers loads it.
        adapter: the settings of a new one, or the folder of a saved one.
        linears: full names of the linear layers that may carry it.
        dtype: of its weights.

    Raises:
        ValueError: a target that is none of `linears`, or a folder that does not hold the adapter its config promises.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if isinstance(adapter, Path):
        if not (adapter / WEIGHTS_FILE).is_file():
            raise ValueError(f"adapter: {adapter} holds no {WEIGHTS_FILE} (adapter_model.bin, a pickle, is not read)")
        config = LoraConfig.from_pretrained(adapter)
    else:
        config = LoraConfig(
            r=adapter.lora_rank, lora_alpha=adapter.lora_alpha, lora_dropout=adapter.lora_dropout,
            target_modules=targets(adapter.lora_target_modules, linears), use_rslora=adapter.use_rslora,
            use_dora=adapter.use_dora,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the same start on every rank, whatever was drawn before
        if isinstance(adapter, Settings):  # on the CPU; `torch.manual_seed` would seed the GPUs too, and for good
            torch.default_generator.manual_seed(adapter.seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    if isinstance(adapter, Path):
        loaded = set_peft_model_state_dict(model, load_file(adapter / WEIGHTS_FILE))
        if wrong := [*filter(is_adapter, loaded.missing_keys), *loaded.unexpected_keys]:
            raise ValueError(f"adapter: {adapter} does not hold what its {CONFIG_FILE} says: {', '.join(wrong[:5])}")


def targets(wanted: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Those of the layers `linears` that `wanted` names by their full names or last parts; a ValueError if it names
    another."""
    if ALL_LINEAR in wanted:
        return list(linears)
    for target in wanted:
        if not any(_is_named(name, target) for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"lora_target_modules: {target!r} is no linear layer of the language model; there are {ALL_LINEAR}, "
                f"{', '.join(known)}"
            )
    return [name for name in linears if any(_is_named(name, target) for target in wanted)]


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_tensors(model: nn.Module) -> Iterator[SavedTensor]:
    """The tensors of the adapter alone."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            yield name, [parameter], partial(Tensor.detach, parameter)


def whole_tensors(model: nn.Module) -> Iterator[SavedTensor]:
    """Every tensor of the model as transformers names it, dequantized and with the adapter merged."""
    layer_of = {layer.get_base_layer(): layer for layer in model.modules() if hasattr(layer, "lora_A")}
    for place, module in model.named_modules():
        if is_adapter(place):
            continue
        layer = layer_of.get(module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            whole = f"{place}.{name}".replace(".base_layer.", ".")
            if layer is not None and name == "weight":
                adapter = [parameter for name, parameter in layer.named_parameters() if name.startswith("lora_")]
                yield whole, [tensor, *adapter], partial(_merged, layer)
            elif name not in module._non_persistent_buffers_set:
                yield whole, [tensor], partial(_dense, tensor)


def _dense(weight: Tensor) -> Tensor:
    if not hasattr(weight, "quant_state"):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _merged(layer: nn.Module) -> Tensor:
    """Weight (out, in) of a linear layer with its adapter in it, summed in fp32.

    W + s B A (LoRA, arXiv 2106.09685), where s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); with
    DoRA (arXiv 2402.09353) its rows are scaled to the trained norms.
    """
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    whole = _dense(layer.get_base_layer().weight).float() + layer.scaling[NAME] * (up.float() @ down.float())
    if NAME in layer.lora_magnitude_vector:
        norms = layer.lora_magnitude_vector[NAME].weight.float()
        whole *= (norms / torch.linalg.norm(whole, dim=1))[:, None]
    return whole.detach().to(down.dtype)


def save_adapter(model: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write an adapter as peft's `PeftModel.from_pretrained` reads it.

    Args:
        model: carries the adapter; its values may be partitioned.
        tensors: from `adapter_tensors`, whole.
        folder: that is there.
        base: folder or hub name of the model that it belongs to.
    """
    from peft import get_peft_model_state_dict

    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs from run to run
    names = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(folder, auto_mapping_dict=names)
    named = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(model, tensors).items()}
    save_tensors(named, folder / WEIGHTS_FILE, {"format": "pt"})
