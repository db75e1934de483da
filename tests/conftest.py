"""Fixtures that all tests share: one rank, a small real Qwen2.5-VL, and writers of images and records.

Helpers are fixtures that return functions, as pytest's importlib mode lets test files import nothing from each other.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest_plugins = ["commands"]  # tests/plugins/commands.py

MAX_PIXELS = 96 * 64
MIN_PIXELS = 32 * 32


def _chat_template(image: str, opening: str = "") -> str:
    """A template in the manner of Qwen's: turns in <|im_start|> and <|im_end|>, each with a line break behind it.

    Args:
        image: what stands for an image.
        opening: stands before a conversation that has no system message.
    """
    return (
        "{% if messages[0]['role'] != 'system' %}{{ " + repr(opening) + " }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\\n' }}"
        "{% set parts = [{'text': message['content']}] if message['content'] is string else message['content'] %}"
        "{% for part in parts %}{{ " + repr(image) + " if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    )


# They render what the published ones render: Qwen/Qwen2.5-VL-7B-Instruct, chat_template.json, a default system prompt
# where none is given; Qwen/Qwen3-VL-8B-Instruct, chat_template.jinja, none; OpenGVLab/InternVL3-8B-hf,
# chat_template.jinja, none, and an image on a line of its own.
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = {
    "qwen2_5_vl": _chat_template(QWEN_IMAGE, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    "qwen3_vl": _chat_template(QWEN_IMAGE),
    "internvl3": _chat_template("<IMG_CONTEXT>\n"),
}


@pytest.fixture(autouse=True)
def signals():
    """Commands that run in this process leave it the signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def world():
    """One rank without a launcher. What `join_world` writes to the environment does not reach other processes."""
    from mede2.trainer.world import join_world

    before = dict(os.environ)
    joined = join_world()
    os.environ.clear()
    os.environ.update(before)
    yield joined
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A Qwen2.5-VL of under a million parameters, untrained, whose images take 4 to 24 tokens by their size."""
    from mede2.trainer.demo.model import build_base

    folder = build_base(tmp_path_factory.mktemp("model"), seed=0)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("min_pixels", None)
    config.pop("max_pixels", None)
    config["size"] = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def processor(model_folder):
    """The processor of `model_folder`. Shared: a test that changes it loads its own."""
    from mede2.trainer.data.processing import load_processor

    return load_processor(model_folder)


@pytest.fixture(scope="session")
def write_image():
    """`write_image(path, width, height, seed)` writes an RGB picture of noise and returns its path."""

    def write(path: Path, width: int = 48, height: int = 32, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def write_rows():
    """`write_rows(path, rows)` writes jsonl (a row that is a str goes in as it is) and returns the path."""

    def write(path: Path, rows: list) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def user():
    """`user(text, num_images)`: a user's message, its images first."""

    def message(text: str, num_images: int = 0) -> dict:
        return {"role": "user", "content": [*({"type": "image"},) * num_images, {"type": "text", "text": text}]}

    return message


@pytest.fixture(scope="session")
def assistant():
    """`assistant(text)`: an assistant's message."""

    def message(text: str) -> dict:
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    return message


@pytest.fixture(scope="session")
def stage1_file(tmp_path_factory, write_rows, user, assistant) -> Path:
    """Seven Stage I rows: text only, unequal answers, one with a system message, one of two turns."""
    rows = [
        {"messages": [user(f"Case {i}: a dense shadow?"), assistant("<think>look" + " again" * i + "</think>mass")]}
        for i in range(5)
    ]
    system = {"role": "system", "content": "You read films."}
    rows.append({"messages": [system, user("Which zone?"), assistant("left upper")]})
    two_turns = [user("Clear?"), assistant("no"), user("Sure?"), assistant("<think>yes</think>quite sure")]
    rows.append({"messages": two_turns})
    return write_rows(tmp_path_factory.mktemp("stage1") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def stage2_file(tmp_path_factory, write_rows, write_image, user, assistant) -> Path:
    """Seven Stage II rows with 1, 0, 2, 1, 0, 1 and 3 images of several sizes; answers of unequal lengths."""
    folder = tmp_path_factory.mktemp("stage2")
    sizes = [(48, 32), (96, 64), (32, 32), (33, 80)]
    rows, written = [], 0
    for i, num_images in enumerate((1, 0, 2, 1, 0, 1, 3)):
        images = []
        for _ in range(num_images):
            images.append(write_image(folder / f"image-{written}.png", *sizes[written % len(sizes)], seed=written).name)
            written += 1
        row = {
            "prompt": [user(f"Question {i}: which finding?", num_images)],
            "chosen": [assistant("<think>" + "look " * (3 + 2 * i) + "</think>mass")],
            "rejected": [assistant("clear" + " and so on" * (6 - i))],
        }
        rows.append(row | ({"images": images} if images else {}))
    return write_rows(folder / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def load(processor, world):
    """`load(file, stage, ...)`: a data set of the small model, encoded."""
    from mede2.trainer.data.dataset import load_dataset
    from mede2.trainer.data.encoding import Encoder

    def load_file(file: Path, stage: int, *, max_length: int = 512, grey_window=None, on_bad_row: str = "stop"):
        return load_dataset((str(file),), stage, Encoder(processor, max_length, grey_window), on_bad_row, world)

    return load_file


@pytest.fixture(scope="session")
def internvl_folder(tmp_path_factory) -> Path:
    """A small InternVL, untrained: 4 tokens for each 32 x 32 tile, square images one tile, others several."""
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    from mede2.trainer.demo.model import build_tokenizer

    folder = tmp_path_factory.mktemp("internvl")
    base = build_tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token=base.pad_token, eos_token=base.eos_token,
        chat_template=TEMPLATES["internvl3"], extra_special_tokens=names | {"video_token": "<video>"},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "InternVLProcessor"}')
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = InternVLConfig(
        text_config={"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": len(tokenizer)} | sizes,
        vision_config={"image_size": [32, 32], "patch_size": [8, 8]} | sizes,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharpen():
    """`sharpen(model, seed)`: weights so large that attention is sharp and every gradient counts."""

    def draw(model: torch.nn.Module, seed: int) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                scale, centre = (0.08, 0.0) if parameter.ndim > 1 else (0.05, float(parameter.mean()))
                parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
        return model

    return draw


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory, model_folder, internvl_folder, sharpen) -> dict[str, Path]:
    """A small model of each family with sharp weights and the chat template of its published models."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mede2.trainer.data.processing import save_processor

    qwen, internvl = AutoConfig.from_pretrained(model_folder), AutoConfig.from_pretrained(internvl_folder)
    sources = {
        "qwen2_5_vl": (model_folder, qwen),
        "qwen3_vl": (model_folder, _qwen3_vl_config(qwen)),  # one tokenizer and image processor serve both
        "internvl3": (internvl_folder, internvl),
    }
    folders = {}
    for family, (source, config) in sources.items():
        folder = folders[family] = tmp_path_factory.mktemp(family)
        sharpen(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), 1).save_pretrained(folder)
        save_processor(source, folder, max_pixels=None)
        (folder / "chat_template.jinja").write_text(TEMPLATES[family], encoding="utf-8")
    return folders


def _qwen3_vl_config(qwen2_5_vl):
    """Of a small Qwen3-VL: interleaved M-RoPE, and deepstack features of two layers of the vision tower."""
    from transformers import Qwen3VLConfig

    older = qwen2_5_vl.text_config
    text = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "eos_token_id", "pad_token_id")
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLConfig(
        text_config={
            **{name: getattr(older, name) for name in text}, "num_hidden_layers": 3, "intermediate_size": 192,
            "head_dim": older.hidden_size // older.num_attention_heads,
            "rope_parameters": older.rope_parameters | {"mrope_interleaved": True},
        },
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "depth": 3, "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": older.hidden_size, "num_position_embeddings": 64, "patch_size": 8,
        },
        tie_word_embeddings=True, **{name: getattr(qwen2_5_vl, name) for name in ids},
    )  # fmt: skip


@pytest.fixture(scope="session")
def family_files(tmp_path_factory, write_image, write_rows, user, assistant) -> dict[int, Path]:
    """Rows with 1, 0, 3 and 2 images of several sizes, by stage. Stage I: two turns, the last image in the second."""
    folder = tmp_path_factory.mktemp("family_files")
    sizes = [(48, 32), (96, 64), (32, 80), (64, 64)]
    demonstrations, pairs, written = [], [], 0
    for number in (1, 0, 3, 2):
        images = []
        for _ in range(number):
            images.append(write_image(folder / f"{written}.png", *sizes[written % len(sizes)], seed=written).name)
            written += 1
        in_second = min(number, 1)
        turns = [
            user(f"Case {number}: where?", number - in_second),
            assistant("<think>" + "left " * number + "</think>mass"),
            user("And here?", in_second),
            assistant("clear" + ", and so on" * (3 - number)),
        ]
        prompt = [user(f"Case {number}: which finding?", number)]
        rejected = [assistant("no finding" + " at all" * (4 - number))]
        with_images = {"images": images} if images else {}
        demonstrations.append({"messages": turns} | with_images)
        pairs.append({"prompt": prompt, "chosen": turns[1:2], "rejected": rejected} | with_images)
    return {
        1: write_rows(folder / "stage1.jsonl", demonstrations), 2: write_rows(folder / "stage2.jsonl", pairs)
    }  # fmt: skip


@pytest.fixture(scope="session")
def families(family_folders) -> dict:
    """The processor of each of `family_folders`."""
    from mede2.trainer.data.processing import load_processor

    return {family: load_processor(folder) for family, folder in family_folders.items()}


@pytest.fixture(scope="session")
def demo_cases(tmp_path_factory) -> Path:
    """12 of the demo's cases: cases.jsonl with pictures beside it."""
    from mede2.trainer.demo.records import write_cases

    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 12, seed=3, split="stage2")
