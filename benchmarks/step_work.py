"""What bench_step.py trains on: models of three sizes and their records. Imports transformers.

Legend: P prompt tokens (image tokens counted), A answer tokens, V vocabulary.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mede2.trainer.data.processing import load_processor, save_processor
from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.planning.work import Sizes

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


def measure_sizes(examples, processor) -> Sizes:
    """Sizes of encoded pairs whose images are all of `IMAGE_SIDE`."""
    chosen, rejected = zip(*(example.sequences for example in examples), strict=True)
    prompt = np.mean([len(sequence) - sequence.num_answer_tokens for sequence in chosen])
    answer = np.mean([sequence.num_answer_tokens for sequence in (*chosen, *rejected)])
    image_tokens = np.mean([sequence.mm_token_type_ids.sum() for sequence in chosen])
    patches = image_tokens * processor.image_processor.merge_size**2
    return Sizes(float(prompt), float(answer), float(patches), float(image_tokens))
