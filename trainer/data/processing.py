"""The model's own processor (tokenizer, chat template, image processor). Imports transformers."""

import json
import shutil
from functools import cache
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig
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


def locate_model(model: str) -> Path:
    """The folder of a model: itself, or where the hub's files lie after a download (or in the cache, offline).

    Raises:
        ValueError: neither a model folder nor a hub name that can be reached.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"model: {model!r} is no folder and no hub name that can be reached: {error}") from error
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model: {model} holds an adapter and no whole model; merge it with peft's merge_and_unload, or continue "
            "its last checkpoint (--resume PATH) into another --output with merge_adapter=true"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {model} holds no config.json, so it is no model folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"model: {model} holds no safetensors weights")
    return folder


def load_processor(model: Path, max_pixels: int | None = None):
    """Load the processor of a model folder.

    Args:
        model: the folder.
        max_pixels: largest image in pixels (larger ones are scaled down); None keeps the model's own limit.

    Raises:
        ValueError: a model with no processor for images and text, or `max_pixels` where the image processor has no
            such limit or a higher lower one.
    """
    try:
        model_type = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"model: the config.json of {model} does not load: {error}") from error
    if model_type not in PROCESSOR_MAPPING_NAMES:
        raise ValueError(f"model: {model} is a {model_type}, which has no processor for images and text")
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
        size = processor.image_processor.size
        if size.get("longest_edge") is None or size.get("shortest_edge") is None:
            raise ValueError(
                f"max_pixels: the image processor of {model} has no pixel limit (its size is {dict(size)})"
            )
        if max_pixels < size["shortest_edge"]:
            raise ValueError(f"max_pixels: {max_pixels} is below the least that {model} takes, {size['shortest_edge']}")
        processor = _image_only(base).from_pretrained(
            model, size={"shortest_edge": size["shortest_edge"], "longest_edge": max_pixels}
        )
    return processor


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
    for name in ("preprocessor_config.json", "processor_config.json"):
        if max_pixels is not None and (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            image_config = config.get("image_processor", config)
            if "max_pixels" in image_config:
                image_config["max_pixels"] = max_pixels
            if "longest_edge" in image_config.get("size", {}):
                image_config["size"]["longest_edge"] = max_pixels
            (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
