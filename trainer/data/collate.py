"""Examples to the tensors of one micro-batch: right-padded rows, answer positions, one vision call on every rank."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mede2.trainer.data.encoding import Example, Sequence
from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.sampler import Slot


@dataclass(frozen=True)
class MicroBatch:
    """One forward on one rank. S sequences (Stage II: the chosen ones, then the rejected ones), N answer tokens.

    Attributes:
        inputs: of the model: input_ids, attention_mask, mm_token_type_ids (S, T) int64, and the images' tensors.
        rows: (N,) int64, positions in the flattened (S * T) hidden states that predict an answer token.
        targets: (N,) int64, those tokens.
        sequence: (N,) int64, the sequence that each belongs to.
        weights: (S,) fp32, 0 for filler.
        indices: of the examples in the data set.
        sources: file and line of the examples.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    weights: Tensor
    indices: tuple[int, ...]
    sources: tuple[str, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> "MicroBatch":
        """On `device`, with the images in `dtype`."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
            for name, tensor in self.inputs.items()
        }
        moved = (
            tensor.to(device, non_blocking=True) for tensor in (self.rows, self.targets, self.sequence, self.weights)
        )
        return MicroBatch(inputs, *moved, self.indices, self.sources)


class Collator:
    """Builds micro-batches.

    Args:
        processor: of the model.
        with_images: whether the vision tower runs: in every micro-batch on every rank, or (no example of any rank
            has an image) in none. Micro-batches without an image get a masked one, so that under ZeRO-3 all ranks
            call the same modules in the same order.
        grey_window: see `images.load_image`.
    """

    def __init__(self, processor, with_images: bool, grey_window: Window = None):
        self.processor, self.with_images, self.grey_window = processor, with_images, grey_window
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        self.with_types = "mm_token_type_ids" in processor.model_input_names
        if with_images:
            self.filler_ids, self.filler_types, self.filler_pixels = self._filler()

    def __call__(self, examples: list[Example], slots: list[Slot]) -> MicroBatch:
        """The micro-batch of `slots`, whose indices point into `examples`."""
        chosen = [examples[slot.index] for slot in slots]
        width = len(chosen[0].sequences)
        sequences = [example.sequences[side] for side in range(width) for example in chosen]
        images = [path for _ in range(width) for example in chosen for path in example.images]

        trailing = len(self.filler_ids) if self.with_images and not images else 0
        length = max(map(len, sequences)) + trailing
        input_ids = np.full((len(sequences), length), self.pad_token_id)
        attention_mask = np.zeros((len(sequences), length), dtype=np.int64)
        types = np.zeros((len(sequences), length), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence)] = sequence.input_ids
            attention_mask[row, : len(sequence)] = 1
            types[row, : len(sequence)] = sequence.mm_token_type_ids
        if trailing:
            input_ids[0, -trailing:], types[0, -trailing:] = self.filler_ids, self.filler_types

        inputs = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
        }
        if self.with_types:
            inputs["mm_token_type_ids"] = torch.from_numpy(types)
        if self.with_images:
            inputs |= self._pixels(images) if images else self.filler_pixels
        rows, targets, owner = _answer_rows(sequences, length)
        weights = torch.tensor([float(slot.weight) for slot in slots] * width)
        return MicroBatch(
            inputs, rows, targets, owner, weights, tuple(slot.index for slot in slots), tuple(e.source for e in chosen)
        )

    def _pixels(self, paths: list[str]) -> dict[str, Tensor]:
        """The images' tensors as the model's forward takes them (Qwen: pixel_values, image_grid_thw)."""
        decoded = {path: load_image(Path(path), self.grey_window) for path in dict.fromkeys(paths)}
        return self._process([decoded[path] for path in paths])[1]

    def _process(self, images: list) -> tuple[dict, dict[str, Tensor]]:
        output = self.processor(text=[self.processor.image_token * len(images)], images=images, return_tensors="pt")
        text_keys = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        return output, {name: tensor for name, tensor in output.items() if name not in text_keys}

    def _filler(self) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """Tokens and zero pixels of the smallest image, for micro-batches that have none."""
        from PIL import Image

        output, pixels = self._process([Image.new("RGB", (28, 28))])
        ids = output["input_ids"][0].numpy()
        types = output["mm_token_type_ids"][0].numpy() if "mm_token_type_ids" in output else np.zeros_like(ids)
        zeros = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in pixels.items()}
        return ids, types, zeros


def _answer_rows(sequences: list[Sequence], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flattened positions that predict the answer tokens, the tokens, and the sequence of each; all (N,) int64."""
    rows, targets, owner = [], [], []
    for number, sequence in enumerate(sequences):
        positions = np.flatnonzero(sequence.answer_mask)
        rows.append(number * length + positions - 1)  # the hidden state before a token predicts it
        targets.append(sequence.input_ids[positions])
        owner.append(np.full(len(positions), number))
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in (rows, targets, owner))
