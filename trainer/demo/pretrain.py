"""How the shipped base model was made: it learns to see, read and copy on one core, in a plain loop without DeepSpeed.

`python -m mede2.trainer.demo.pretrain FOLDER` repeats it. Imports transformers.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, BatchFeature, ProcessorMixin

from mede2.trainer.data.processing import load_processor
from mede2.trainer.demo.model import build_base
from mede2.trainer.demo.records import Row, write_pretraining

NUM_ROWS, BATCH_SIZE = 16_000, 32
NUM_TEXT_STEPS, NUM_STEPS = 300, 1600  # first the rows without pictures: copying is learnt sooner, and far cheaper
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-3, 40, 0.01, 1.0
IGNORE_INDEX = -100


def pretrain(folder: Path, seed: int = 0) -> Path:
    """Build a model from random weights, train it on the pretraining rows, and write it to `folder`."""
    build_base(folder, seed)
    rows_file = write_pretraining(folder / "records", NUM_ROWS, seed)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    told = [row for row in rows if "images" not in row]
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine)
    rng = np.random.default_rng(seed)
    order: list[Row] = []
    started = time.monotonic()
    for step in range(NUM_STEPS):
        source = told if step < NUM_TEXT_STEPS else rows
        if len(order) < BATCH_SIZE or step == NUM_TEXT_STEPS:
            order = [source[i] for i in rng.permutation(len(source))]
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        inputs, labels = _encode(processor, batch, rows_file.parent)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{NUM_STEPS}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.save_pretrained(folder)
    return folder


def _cosine(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)))


def _encode(processor: ProcessorMixin, rows: list[Row], folder: Path) -> tuple[BatchFeature, torch.Tensor]:
    """A batch of B rows: the model's inputs, (B, T) tokens padded on the left, and (B, T) labels.

    Only the answers carry labels, each with its end token (the template's last line break is cut off).
    """
    prompts, texts = [], []
    for row in rows:
        prompts.append(processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True))
        texts.append(processor.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n"))
    images = [Image.open(folder / name) for row in rows for name in row.get("images", ())]
    inputs = processor(text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="left")
    answers = [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
    num_learnt = torch.tensor([len(ids) for ids in processor.tokenizer(answers)["input_ids"]])
    position = torch.arange(inputs["input_ids"].shape[1])
    learnt = position >= len(position) - num_learnt[:, None]
    return inputs, inputs["input_ids"].where(learnt, IGNORE_INDEX)


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]))
