"""The model's own processor (tokenizer, chat template, image processor). Imports transformers."""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES


@cache
def _image_only(base: type) -> type:
    """`base` without its video half, which needs torchvision; MedE2 has no videos."""

    class ImageOnly(base):
        @classmethod
        def get_attributes(cls):
            return [name for name in super().get_attributes() if name != "video_processor"]

    ImageOnly.__name__ = ImageOnly.__qualname__ = base.__name__
    return ImageOnly


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")  # causal throughout: packed rows and prefixes are exact
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
CONFIGS = (  # what can name classes in Python files that come with the model
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def locate_model(model: str) -> Path:
    """The folder of a model: itself, or where the hub's files lie after a download (or in the cache, offline).

    Raises:
        ValueError: neither a model folder nor a hub name that can be reached, or a model that cannot be trained; the
            config.json alone tells, before any weights are fetched. Or weights that are not safetensors, or code that
            would come with the model.
    """
    folder = Path(model)
    is_on_disk = folder.is_dir()
    if not is_on_disk:
        folder = _download(model, ["config.json"])
    if (folder / "adapter_config.json").is_file():  # beside a whole model transformers would load it too, untold
        what = "an adapter beside the model" if (folder / "config.json").is_file() else "an adapter and no whole model"
        raise ValueError(
            f"model: {model} holds {what}; merge it with peft's merge_and_unload, or continue its last checkpoint "
            "(--resume PATH) into another --output with merge_adapter=true"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {model} holds no config.json, so it is no model folder")
    _check_config(model, folder / "config.json")
    if not is_on_disk:
        folder = _download(model, WANTED_FILES)
    _refuse_code(folder)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"model: {model} holds no safetensors weights (GGUF and .bin files are not read), neither "
            f"{' nor '.join(WEIGHTS)}; where you trust a .bin file, which is a pickle, transformers converts it: "
            "AutoModelForImageTextToText.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return folder


def _refuse_code(folder: Path) -> None:
    """Raise ValueError where a config names code that comes with the model: it is not run, and transformers would ask
    on the terminal whether it may, where a job in a queue has none."""
    for name in CONFIGS:
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # of a file that is none: whoever reads it says so
            continue
        if "auto_map" in _keys(config):
            raise ValueError(
                f"model: {folder / name} names code that comes with the model (auto_map), and such code is not run; "
                "name the model in transformers' own form, or take auto_map out if transformers has its classes"
            )


def _keys(value) -> set[str]:
    """Every key of a JSON value, however deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(_keys, parts))


def _download(model: str, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {model!r} is no folder and no hub name that can be reached: {error}") from error


def _check_config(model: str, path: Path) -> None:
    """Refuse what transformers has no classes of its own for, what reads no images, and what is quantized."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: the config.json of {model} does not load: {error}") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family == "internvl_chat":
        twin = "OpenGVLab/InternVL3-8B-hf" if Path(model).is_dir() else f"{model}-hf"
        raise ValueError(
            f"model: {model} is InternVL in its original form (internvl_chat), which runs only by code of its own; "
            f"name the model in transformers' own form, whose name ends in -hf, such as {twin}"
        )
    if family not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"model: the config.json of {model} names the family {family}, for which transformers "
            f"{transformers.__version__} has no classes (code that comes with a model is not run)"
        )
    if family not in PROCESSOR_MAPPING_NAMES:
        raise ValueError(f"model: {model} is a {family}, which has no processor for images and text")
    if family not in FAMILIES:
        raise ValueError(
            f"model: {model} is a {family}, whose attention and positions are not known here; known: "
            f"{', '.join(FAMILIES)}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method")
        raise ValueError(f"model: {model} is quantized ({method}); name the model with 16-bit weights that it is from")


def load_processor(model: Path, max_pixels: int | None = None):
    """Load the processor of a model folder.

    Args:
        model: the folder.
        max_pixels: largest image in pixels; larger ones are scaled down, or cut into fewer tiles. None keeps the
            model's own limit.

    Raises:
        ValueError: a model with no processor for images and text, or `max_pixels` where the image processor has no
            such limit or a higher lower one.
    """
    _check_config(str(model), model / "config.json")
    _refuse_code(model)
    try:
        model_type = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"model: the config.json of {model} does not load: {error}") from error
    base = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    try:
        processor = _image_only(base).from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: the processor of {model} does not load: {error}") from error
    if processor.chat_template is None and getattr(processor.tokenizer, "chat_template", None) is None:
        raise ValueError(f"model: {model} has no chat template")
    if processor.tokenizer.eos_token is None:
        raise ValueError(f"model: the tokenizer of {model} names no end-of-sequence token")
    if max_pixels is not None:
        limit = _pixel_limit(model, processor.image_processor, max_pixels)
        processor = _image_only(base).from_pretrained(model, **limit)
    return processor


def _pixel_limit(model: Path, image_processor, max_pixels: int) -> dict:
    """What limits images to `max_pixels` in the configuration of an image processor."""
    size, most_tiles = image_processor.size, getattr(image_processor, "max_patches", None)
    if size.get("longest_edge") and size.get("shortest_edge"):  # Qwen's, of the whole image
        least = size["shortest_edge"]
        limit = {"size": {"shortest_edge": least, "longest_edge": max_pixels}}
        limit["max_pixels"] = max_pixels  # its older name, which wins where a published file still has it
    elif most_tiles and size.get("height") and size.get("width"):  # InternVL's, of its tiles but for the thumbnail
        least = size["height"] * size["width"]
        limit = {"max_patches": max_pixels // least}
    else:
        raise ValueError(f"max_pixels: the image processor of {model} has no pixel limit (its size is {dict(size)})")
    if max_pixels < least:
        raise ValueError(f"max_pixels: {max_pixels} is below the least that {model} takes, {least}")
    return limit


def describe_processor(processor) -> dict:
    """What the tokens and pixels of a record depend on beside the record: for the key of the reference cache."""
    return {
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "chat_template": processor.chat_template or processor.tokenizer.chat_template,
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
    }


PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip


def save_processor(source: Path, folder: Path, max_pixels: int | None) -> None:
    """Copy the processor of the model folder `source` byte for byte, but for the pixel limit it was used with."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if max_pixels is None:
        return
    limit = _pixel_limit(source, load_processor(source).image_processor, max_pixels)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            image_config = config.get("image_processor", config)
            if "image_processor_type" in image_config:
                image_config.update(limit)
                (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
