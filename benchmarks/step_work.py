"""What bench_step.py trains on: models of three sizes, their records, and the operations that a pair costs. Imports
transformers.

Legend: P prompt tokens (image tokens counted), A answer tokens, V vocabulary; operations are multiplications and
additions, two for each weight that a token meets.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mede2.trainer.data.processing import load_processor, save_processor
from mede2.trainer.demo.defaults import BASE_MODEL

IMAGE_SIDE = 448  # pixels
TEMPLATE_TOKENS = 12  # of a prompt that are neither image nor words, about
BUILT = {  # text: hidden, intermediate, layers, heads, key-value heads, V; vision: hidden, intermediate, layers, heads
    "wide": ((512, 1536, 8, 8, 2, 32768), (384, 1024, 6, 6), (2, 5)),
    "3b": ((2048, 11008, 36, 16, 2, 151936), (1280, 3420, 32, 16), (7, 15, 23, 31)),  # Qwen2.5-VL-3B's shape
}  # and the vision layers that see the whole image


def make_model(name: str, folder: Path, device: str, dtype: torch.dtype) -> Path:
    """The folder of a model: "demo" is the one that ships, the others get random weights and its tokenizer."""
    if name == "demo":
        return BASE_MODEL
    (hidden, intermediate, layers, heads, kv_heads, num_vocab), vision, whole = BUILT[name]
    base = AutoConfig.from_pretrained(BASE_MODEL)
    half = hidden // heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": num_vocab, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": None,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "eos_token_id": base.text_config.eos_token_id, "pad_token_id": base.text_config.pad_token_id,
        },
        vision_config={
            **dict(zip(("hidden_size", "intermediate_size", "depth", "num_heads"), vision, strict=True)),
            "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": list(whole),
        },
        image_token_id=base.image_token_id, video_token_id=base.video_token_id,
        vision_start_token_id=base.vision_start_token_id, vision_end_token_id=base.vision_end_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    save_processor(BASE_MODEL, folder, None)
    path = folder / "preprocessor_config.json"
    size = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 28 * 28}
    images = json.loads(path.read_text(encoding="utf-8")) | {"patch_size": 14, "size": size}
    path.write_text(json.dumps(images), encoding="utf-8")
    return folder


def make_records(model: Path, folder: Path, num: int, num_prompt: int, num_answer: int) -> Path:
    """Write `num` pairs: a smooth grey picture, a prompt of about P tokens, answers of A tokens give or take an eighth.

    The texts are words of one token each, drawn at random.
    """
    processor = load_processor(model)
    blank = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
    encoded = processor(text=[processor.image_token], images=[blank], return_tensors="np")
    num_words = num_prompt - encoded["input_ids"].size - TEMPLATE_TOKENS
    if num_words < 1:
        raise ValueError(f"a prompt of {num_prompt} tokens has no room for {encoded['input_ids'].size} image tokens")
    rng = np.random.default_rng(0)
    words = sorted(
        token.replace("Ġ", " ") for token in processor.tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha()
    )
    words = [word for word in words if len(processor.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]

    def text(length: int) -> str:
        return "".join(rng.choice(words, length))

    def answer() -> list[dict]:
        length = num_answer + rng.integers(-num_answer // 8, num_answer // 8 + 1)
        return [{"role": "assistant", "content": text(length - 1)}]  # and the turn's end

    folder.mkdir(parents=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
            coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
            content = [{"type": "image"}, {"type": "text", "text": text(num_words)}]
            row = {"prompt": [{"role": "user", "content": content}], "chosen": answer(), "rejected": answer()}
            file.write(json.dumps(row | {"images": [f"{number}.png"]}) + "\n")
    return folder / "pairs.jsonl"


@dataclass(frozen=True)
class Sizes:
    """Means over the pairs: P, A of one answer, image patches, image tokens."""

    prompt: float
    answer: float
    patches: float
    image_tokens: float


@dataclass(frozen=True)
class Work:
    """Operations of a forward over one pair."""

    vision: float
    language: float
    head: float


def forward_work(config, sizes: Sizes, *, prompts: int, head_rows: float) -> Work:
    """Operations of one forward over a pair, from the configuration of a Qwen2.5-VL.

    Args:
        config: of the model.
        sizes: of the pair.
        prompts: 1 where both answers share one prompt and its image, 2 where each has its own.
        head_rows: positions that the language head scores.
    """
    vision, text = config.vision_config, config.get_text_config()
    hidden, patches = vision.hidden_size, sizes.patches
    side = vision.window_size // vision.patch_size  # patches of a window's side
    seen = [
        patches if layer in vision.fullatt_block_indexes else min(patches, side**2) for layer in range(vision.depth)
    ]
    merged = hidden * vision.spatial_merge_size**2
    per_image = patches * (
        2 * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * hidden
        + vision.depth * 2 * (4 * hidden**2 + 3 * hidden * vision.intermediate_size)
        + sum(4 * hidden * each for each in seen)
    ) + sizes.image_tokens * 2 * (merged**2 + merged * vision.out_hidden_size)
    width = text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    per_token = 2 * text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    tokens = prompts * sizes.prompt + 2 * sizes.answer
    looks = prompts * sizes.prompt**2 / 2 + 2 * sizes.answer * (sizes.prompt + sizes.answer / 2)  # causal
    return Work(
        vision=prompts * per_image,
        language=text.num_hidden_layers * (tokens * per_token + looks * 4 * queries),
        head=head_rows * 2 * text.hidden_size * text.vocab_size,
    )


@dataclass(frozen=True)
class Spent:
    """Operations of a training step, by pair; the reference's own vision and head are counted with the reference."""

    vision: float
    language: float
    reference: float

    @property
    def total(self) -> float:
        return self.vision + self.language + self.reference


def step_work(
    config, sizes: Sizes, *, shared: bool, all_rows: bool, reference_passes: float, vision_passes: float | None = None
) -> Spent:
    """Operations of a DPO step with a frozen vision tower: forward and backward of the language model (three times
    its forward), forward of the vision tower, and `reference_passes` forwards of the reference.

    Args:
        config: of the model.
        sizes: of the pair.
        shared: the two answers share their prompt.
        all_rows: the head scores every position, not only those of answers.
        reference_passes: 1 where the reference runs in every step, 1 over the epochs where it runs once.
        vision_passes: of the tower, for policy and reference together: 1 over the epochs where its features are kept;
            None: one for each of their forwards.
    """
    head_rows = 2 * (sizes.prompt + sizes.answer) if all_rows else 2 * sizes.answer
    once = forward_work(config, sizes, prompts=1 if shared else 2, head_rows=head_rows)
    language = once.language + once.head
    if vision_passes is not None:
        return Spent(vision_passes * once.vision, 3 * language, reference_passes * language)
    return Spent(once.vision, 3 * language, reference_passes * (once.vision + language))


def measure_sizes(examples, processor) -> Sizes:
    """Sizes of encoded pairs whose images are all of `IMAGE_SIDE`."""
    chosen, rejected = zip(*(example.sequences for example in examples), strict=True)
    prompt = np.mean([len(sequence) - sequence.num_answer_tokens for sequence in chosen])
    answer = np.mean([sequence.num_answer_tokens for sequence in (*chosen, *rejected)])
    image_tokens = np.mean([sequence.mm_token_type_ids.sum() for sequence in chosen])
    patches = image_tokens * processor.image_processor.merge_size**2
    return Sizes(float(prompt), float(answer), float(patches), float(image_tokens))
