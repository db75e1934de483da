"""Examples to the tensors of one micro-batch: rows, positions, answer tokens, one vision call on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mede2.trainer.data.corruption import corrupt
from mede2.trainer.data.encoding import Example
from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.layout import CORRUPTED, Layout, Piece
from mede2.trainer.data.positions import Positions, continued
from mede2.trainer.data.sampler import Slot


@dataclass(frozen=True)
class MicroBatch:
    """One forward on one rank: B examples in R rows of T tokens, N answer tokens, S = sides x B sequences.

    Attributes:
        inputs: of the model: input_ids (R, T) int64, position_ids (4, R, T) or (R, T) int64, and the images' tensors.
        branches: (2, R, T) int64, piece and branch of each token (`attention.branch_mask`), or None where no answers
            share a prompt: then the model's own causal mask serves, which tells packed examples apart by positions
            that begin anew.
        rows: (N,) int64, positions in the flattened (R * T) hidden states that predict an answer token.
        targets: (N,) int64, those tokens.
        sequence: (N,) int64, the sequence that each belongs to: side * B + example, sides as in `layout`.
        weights: (S,) fp32, 0 for filler.
        has_image: (B,) fp32, 1 for an example with an image.
        indices: of the examples in the data set.
        sources: file and line of the examples.
    """

    inputs: dict[str, Tensor]
    branches: Tensor | None
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    weights: Tensor
    has_image: Tensor
    indices: tuple[int, ...]
    sources: tuple[str, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> "MicroBatch":
        """On `device`, with the images in `dtype`."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
            for name, tensor in self.inputs.items()
        }
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), inputs=inputs)

    def pin_memory(self) -> "MicroBatch":
        """In page-locked memory, which a GPU copies from without the processor; torch's DataLoader calls it."""
        inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return replace(self._map(Tensor.pin_memory), inputs=inputs)

    def _map(self, function) -> "MicroBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})


class Collator:
    """Builds micro-batches.

    Args:
        processor: of the model.
        positions: of the model.
        with_images: whether the vision tower runs: in every micro-batch on every rank, or (no example of any rank
            has an image) in none. Micro-batches without an image get one that nothing sees, so that under ZeRO-3 all
            ranks call the same modules in the same order.
        layout: how examples are cut into pieces.
        packed: all pieces of a micro-batch lie in one row; otherwise each has a row of its own, padded at the right.
        corruption: kind of `corruption.corrupt` that `layout.corrupted` calls for, and its seed.
        grey_window: see `images.load_image`.
    """

    def __init__(
        self, processor, positions: Positions, with_images: bool, layout: Layout, *, packed: bool = False,
        corruption: tuple[str, int] | None = None, grey_window: Window = None,
    ):  # fmt: skip
        self.processor, self.positions, self.with_images, self.layout = processor, positions, with_images, layout
        self.packed, self.corruption, self.grey_window = packed, corruption, grey_window
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        if with_images:
            self.filler_ids, self.filler_types, self.filler_pixels = self._filler()

    def __call__(self, examples: Sequence[Example], slots: list[Slot]) -> MicroBatch:
        """The micro-batch of `slots`, whose indices point into `examples`."""
        chosen = [examples[slot.index] for slot in slots]
        pieces = [(number, piece) for number, example in enumerate(chosen) for piece in self.layout.pieces(example)]
        rows = [pieces] if self.packed else [[piece] for piece in pieces]
        images = [image for slot, example in zip(slots, chosen, strict=True) for image in self._images(examples, slot)]
        pixels = self._process(images)[1] if images else self.filler_pixels if self.with_images else {}
        grids = iter(pixels.get("image_grid_thw", ()))

        needs_filler = self.with_images and not images
        ids, positions, numbers, branches, answers = [], [], [], [], []
        for row in rows:
            parts = []
            start = 0
            for place, (number, piece) in enumerate(row):
                parts.append((piece.input_ids(), self._positions(piece, grids), place + 1, piece.branches()))
                for side, (before, targets) in zip(piece.sides, piece.answers(), strict=True):
                    answers.append((side * len(slots) + number, len(ids), start + before, targets))
                start += len(piece)
            if needs_filler and not ids:
                parts.append((self.filler_ids, self._filler_positions(pixels), len(row) + 1, 0 * self.filler_ids))
            ids.append(np.concatenate([part[0] for part in parts]))
            positions.append(torch.cat([part[1] for part in parts], 1))
            numbers.append(np.repeat([part[2] for part in parts], [len(part[0]) for part in parts]))
            branches.append(np.concatenate([part[3] for part in parts]))

        length = max(map(len, ids))
        answers.sort(key=lambda answer: answer[0])
        num_sides = self.layout.num_sides(chosen[0])
        place = torch.stack([torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in positions], 1)  # (k, R, T)
        inputs = {"input_ids": _padded(ids, length, self.pad_token_id)}
        inputs |= {"position_ids": place if len(place) > 1 else place[0]} | pixels
        shares = any(len(piece.sequences) > 1 for _, piece in pieces)
        return MicroBatch(
            inputs=inputs,
            branches=torch.stack([_padded(numbers, length, 0), _padded(branches, length, 0)]) if shares else None,
            rows=torch.from_numpy(np.concatenate([row * length + before for _, row, before, _ in answers])),
            targets=torch.from_numpy(np.concatenate([targets for *_, targets in answers])),
            sequence=torch.from_numpy(np.concatenate([np.full(len(t), s) for s, _, _, t in answers])),
            weights=torch.tensor([float(slot.weight) for slot in slots] * num_sides),
            has_image=torch.tensor([float(bool(example.images)) for example in chosen]),
            indices=tuple(slot.index for slot in slots),
            sources=tuple(example.source for example in chosen),
        )

    def _images(self, examples: Sequence[Example], slot: Slot) -> list[Image.Image]:
        """The images of an example's pieces, in the order of their placeholders; each file is decoded once."""
        example = examples[slot.index]
        right = [load_image(Path(path), self.grey_window) for path in example.images]
        found = []
        for piece in self.layout.pieces(example):
            found += self._corrupted(examples, slot.index, right) if CORRUPTED in piece.sides else right
        return found

    def _corrupted(self, examples: Sequence[Example], index: int, right: list[Image.Image]) -> list[Image.Image]:
        """The images of an example, each spoilt by a pure function of the record and the seed."""
        kind, seed = self.corruption
        key = f"{examples[index].digest}-{seed}"
        other = None
        if kind == "shuffle":
            start = index + 1 + int(examples[index].digest[:8], 16)
            others = (examples[(start + step) % len(examples)] for step in range(len(examples)))
            foreign = (e.images[0] for e in others if e.images and e.digest != examples[index].digest)
            if path := next(foreign, None):
                other = load_image(Path(path), self.grey_window)
        return [corrupt(image, kind, f"{key}-{number}", other) for number, image in enumerate(right)]

    def _positions(self, piece: Piece, grids) -> Tensor:
        """(k, T) int64; takes the grids of the piece's images from `grids`."""
        first = piece.sequences[0]
        ids, types = (torch.from_numpy(v[: piece.prefix]) for v in (first.input_ids, first.mm_token_type_ids))
        own = [grid for _, grid in zip(piece.images, grids, strict=False)]
        prefix = self.positions(ids, types, torch.stack(own) if own else None)
        if len(piece.sequences) == 1:
            return prefix
        behind = [continued(prefix, len(sequence) - piece.prefix) for sequence in piece.sequences]
        return torch.cat([prefix, *behind], 1)

    def _process(self, images: list[Image.Image]) -> tuple[dict, dict[str, Tensor]]:
        """The processor's output, and those of its tensors that the model's forward takes for images."""
        output = self.processor(text=[self.processor.image_token * len(images)], images=images, return_tensors="pt")
        text_keys = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        return output, {name: tensor for name, tensor in output.items() if name not in text_keys}

    def _filler(self) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
        """Tokens and zero pixels of the smallest image, for micro-batches that have none."""
        output, pixels = self._process([Image.new("RGB", (28, 28))])
        ids = output["input_ids"][0].numpy()
        types = output["mm_token_type_ids"][0].numpy() if "mm_token_type_ids" in output else np.zeros_like(ids)
        zeros = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in pixels.items()}
        return ids, types, zeros

    def _filler_positions(self, pixels: dict[str, Tensor]) -> Tensor:
        ids, types = torch.from_numpy(self.filler_ids), torch.from_numpy(self.filler_types)
        return self.positions(ids, types, pixels.get("image_grid_thw"))


def _padded(rows: list[np.ndarray], length: int, fill: int) -> Tensor:
    """(R, length) int64, filled at the right."""
    padded = np.full((len(rows), length), fill)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)
