"""The embedded model: a real Qwen2.5-VL of 0.7 million parameters, built from a configuration; the same for other texts
and images. Imports transformers."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from mede2.trainer.demo.cases import CRITERIA, DIAGNOSES, chain, corrupt, make_case
from mede2.trainer.demo.phantoms import HEIGHT, KINDS, WIDTH
from mede2.trainer.demo.records import SECTIONS, image_question, text_question

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # one token each, but ordinary text: decoding keeps them
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE = 8, 2  # pixels of a patch, patches merged on a side: a phantom is 96 patches and 24 visual tokens
VOCABULARY = 512
HIDDEN, LAYERS, HEADS, KV_HEADS = 96, 4, 4, 2
INIT = 0.08  # standard deviation of the weights, near 1 / sqrt(HIDDEN); the family's 0.02 leaves so narrow a model mute
ROPE_THETA = 200.0  # low enough to tell rows of a picture apart, high enough to match words 40 tokens away
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 64, 3, 4


def build_base(
    folder: Path,
    seed: int = 0,
    *,
    texts: Iterable[str] | None = None,
    vocabulary: int = VOCABULARY,
    pixels: tuple[int, int] = (WIDTH * HEIGHT, WIDTH * HEIGHT),
    merge: int = MERGE,
    max_positions: int = 1024,
) -> Path:
    """Write an untrained base model with its tokenizer, chat template, image processor and generation settings.

    Args:
        folder: where it goes.
        seed: of the weights.
        texts: what the tokenizer is trained on, without the chat's special tokens; None: the demo's own texts.
        vocabulary: number of tokens, at least 267: 256 bytes and what a chat needs.
        pixels: smallest and largest image; others are scaled to it.
        merge: patches of a visual token, on a side.
        max_positions: longest sequence, tokens.
    """
    tokenizer = build_tokenizer(texts, vocabulary)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer, vocabulary, merge, max_positions))
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=merge, temporal_patch_size=2, min_pixels=pixels[0], max_pixels=pixels[1]
    ).save_pretrained(folder)
    return folder


def build_tokenizer(texts: Iterable[str] | None = None, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE on these texts: their words become single tokens, and any other text still has bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 11, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(_texts() if texts is None else texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, VISION_START, VISION_END, IMAGE, VIDEO]})
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def build_config(
    tokenizer: PreTrainedTokenizerFast, vocabulary: int, merge: int, max_positions: int
) -> Qwen2_5_VLConfig:
    """The architecture of Qwen2.5-VL at 1/1000 of its width and depth."""
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": HIDDEN,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [4, 4, 4]},
            "tie_word_embeddings": True,
            "initializer_range": INIT,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 2 * VISION_HIDDEN,
            "num_heads": VISION_HEADS,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": merge,
            "temporal_patch_size": 2,
            "window_size": 4 * PATCH,
            "initializer_range": INIT,
            "fullatt_block_indexes": list(range(VISION_LAYERS)),
        },
        image_token_id=ids(IMAGE),
        video_token_id=ids(VIDEO),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=True,
    )


def _texts() -> Iterator[str]:
    """Texts to train the tokenizer on: every word of the task, without the chat's special tokens."""
    words = f"Copy: Write {', '.join(SECTIONS)}. Zones: clear, {', '.join(KINDS)}. Options: {', '.join(DIAGNOSES)}."
    yield from [f"user\n{words}\nassistant\n"] * 500
    for seed in range(500):
        case = make_case(seed)
        answers = [chain(case), *(corrupt(case, criterion) for criterion in CRITERIA)]
        yield from (text_question(case), image_question(case)[1]["text"])
        for tag in TAGS:
            answers = [answer.replace(tag, "") for answer in answers]
        yield from answers
