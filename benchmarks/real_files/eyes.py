"""The first step of a base model made here: what each visual token shows, and where it lies, before any word.

On few pictures and two cores a random tower that hears only of words does not begin to look. So two linear heads,
thrown away afterwards, read what the language model's second layer has at each visual token.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

LAYERS = 2  # of the language model, below the heads; words are read from the layers above
LEARNING_RATE, WARMUP = 2e-3, 30  # peak, updates
BATCH = 32  # pictures of an update
Batch = tuple[list[Image.Image], list[list[int]]]  # pictures, and for each the class of each visual token


def learn_to_see(
    source: Path, folder: Path, *, draw_batch: Callable[[int], Batch], num_classes: int, num_tokens: int, num_steps: int
) -> None:
    """Train a model on what its visual tokens show, with Adam and a linear decay.

    Args:
        source: folder of the model.
        folder: where the trained model goes, complete.
        draw_batch: so many pictures, all of one size.
        num_classes: that a visual token can be of.
        num_tokens: visual tokens of a picture.
        num_steps: updates.
    """
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, use_safetensors=True)
    tokenizer, processor = AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    width = model.config.text_config.hidden_size
    what, where = torch.nn.Linear(width, num_classes), torch.nn.Linear(width, num_tokens)
    trained = [*model.parameters(), *what.parameters(), *where.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    for step in range(num_steps):
        pictures, labels = draw_batch(BATCH)
        classes = torch.tensor(labels)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, 1 - step / num_steps)
        hidden = _at_visual_tokens(model, tokenizer, processor, pictures, num_tokens)
        places = torch.arange(num_tokens).expand_as(classes)
        loss = cross_entropy(what(hidden).flatten(0, 1), classes.flatten())
        loss_of_places = cross_entropy(where(hidden).flatten(0, 1), places.flatten())
        optimizer.zero_grad()
        (loss + loss_of_places).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise ValueError(f"loss {loss.item()} in update {step + 1}")
        if (step + 1) % 25 == 0 or step + 1 == num_steps:
            print(
                f"eyes  {step + 1}/{num_steps}  what {loss.item():.3f}  where {loss_of_places.item():.3f}", flush=True
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def _at_visual_tokens(model, tokenizer, processor, pictures: list[Image.Image], num_tokens: int) -> torch.Tensor:
    """(pictures, visual tokens, H): the hidden states of layer LAYERS, in reading order."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * num_tokens)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)] * len(pictures))
    visual = ids == model.config.image_token_id
    images = processor(images=pictures, return_tensors="pt")
    states = model.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=visual.int(), output_hidden_states=True,
        pixel_values=images["pixel_values"], image_grid_thw=images["image_grid_thw"], use_cache=False,
    ).hidden_states[LAYERS]  # fmt: skip
    return states[visual].view(len(pictures), num_tokens, -1)
