"""Answers of a model in this process: many rows at a time, each drawn with a seed of its own. Imports transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mede2.trainer.data.processing import load_processor
from mede2.trainer.data.records import Message


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: special tokens removed.
        finish: "stop" where the model ended it, "length" where the limit did.
        num_tokens: the end token included.
    """

    text: str
    finish: str
    num_tokens: int


class Generator:
    """A model that answers. The sampling habits of its generation_config.json (penalties, top-k) are not taken over:
    an answer is a draw from the model's own distribution under the temperature and top-p that are stated.

    Args:
        folder: of the model.
        dtype: of the weights.
        device: where it runs.
        max_pixels: see `processing.load_processor`.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device | str, max_pixels: int | None = None):
        self.processor = load_processor(folder, max_pixels)
        self.processor.tokenizer.padding_side = "left"  # the answers of a batch start in the same column
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self.model = model.to(device).eval()
        tokenizer, ends = self.processor.tokenizer, model.generation_config.eos_token_id
        self.ends = [tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=pad)
        self.longest = model.config.get_text_config().max_position_embeddings

    @torch.inference_mode()
    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
    ) -> list[Generation]:
        """Answer every conversation, all in one batch.

        Args:
            conversations: messages with list contents; image parts hold their picture: {"type": "image", "image": ...}.
            max_tokens: of an answer.
            temperature: 0 takes the likeliest token each time.
            top_p: least probability that the tokens to draw from add up to.
            seeds: one for each conversation, unless the temperature is 0. An answer depends on its own seed and
                conversation, on what else is in the batch only by rounding.

        Raises:
            ValueError: a conversation that leaves the model no room for `max_tokens`.
        """
        inputs = self.processor.apply_chat_template(
            [list(conversation) for conversation in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        width = inputs["input_ids"].shape[1]
        if width + max_tokens > self.longest:
            raise ValueError(
                f"--max-tokens {max_tokens}: with a prompt of {width} tokens more than the {self.longest} positions "
                f"that the model has; lower it or --max-pixels"
            )
        drawing = LogitsProcessorList()
        if temperature > 0:
            drawing.append(TemperatureLogitsWarper(float(temperature)))
            if top_p < 1:
                drawing.append(TopPLogitsWarper(float(top_p)))
            drawing.append(Draw(seeds, width, max_tokens))
        output = self.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, use_cache=True, logits_processor=drawing
        )
        return [self._read(row) for row in output[:, width:].tolist()]

    def _read(self, tokens: list[int]) -> Generation:
        """Cut a row where the model ended it; the rest of it is padding."""
        end = next((position for position, token in enumerate(tokens) if token in self.ends), None)
        tokens = tokens if end is None else tokens[: end + 1]
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Generation(text, "length" if end is None else "stop", len(tokens))


class Draw(LogitsProcessor):
    """Leaves of each row the one token that its own random numbers draw, by the inverse of the cumulative distribution.
    One global generator would make an answer depend on the others in its batch and on their order."""

    def __init__(self, seeds: Sequence[int], width: int, max_tokens: int):
        self.width = width
        self.uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(max_tokens) for seed in seeds]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniform[:, input_ids.shape[1] - self.width, None].to(scores.device)  # (N, 1) fp64, below 1
        cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)  # (N, V)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
