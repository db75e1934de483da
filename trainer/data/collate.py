"""Examples to the tensors of one micro-batch: rows, positions, answer tokens, one vision call on every rank."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mede2.trainer.data.corruption import corrupt
from mede2.trainer.data.encoding import Example
from mede2.trainer.data.features import ImageFeatures
from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.layout import CORRUPTED, Layout, Piece
from mede2.trainer.data.positions import Positions, continued
from mede2.trainer.data.sampler import Slot


@dataclass(frozen=True)
class MicroBatch:
    """One forward on one rank: B examples in R rows of T tokens, N answer tokens, S = sides x B sequences.

    Attributes:
        inputs: of the model: input_ids (R, T) int64, position_ids (4, R, T) or (R, T) int64, and the images' tensors.
        branches: (2, R, T) int64, piece and branch of each token (`attention.spans_of`), or None where every row is
            one conversation, for which plain causal attention is right, whatever lies behind it.
        rows: (N,) int64, positions in the flattened (R * T) hidden states that predict an answer token.
        targets: (N,) int64, those tokens.
        sequence: (N,) int64, the sequence that each belongs to: side * B + example, sides as in `layout`.
        weights: (S,) fp32, those of the slots: 1, 0 for filler, less where ranks share the micro-batch.
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
        """On `device`, with the images in `dtype`; `branches` stay, as the attention is laid out by them on the CPU."""
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
            for name, tensor in self.inputs.items()
        }
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, inputs=inputs, branches=self.branches)

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
        multiple: rows are padded to a multiple of so many tokens, for as many ranks to share.
    """

    def __init__(
        self, processor, positions: Positions, with_images: bool, layout: Layout, *, packed: bool = False,
        corruption: tuple[str, int] | None = None, grey_window: Window = None, multiple: int = 1,
    ):  # fmt: skip
        self.processor, self.positions, self.with_images, self.layout = processor, positions, with_images, layout
        self.packed, self.corruption, self.grey_window = packed, corruption, grey_window
        self.features: ImageFeatures | None = None
        self.multiple = multiple
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        if with_images:
            self.filler, self.filler_images = self._filler()

    def with_features(self, features: ImageFeatures) -> "Collator":
        """One whose micro-batches carry `image_features` (tokens, 1 + d, H) in place of pixels: the tower never runs,
        and no image is decoded."""
        collator = copy.copy(self)
        collator.features = features
        of_filler = int((self.filler[0] == self.processor.image_token_id).sum())
        collator.filler_images = {"image_features": features.zeros(of_filler)}
        return collator

    def __call__(self, examples: Sequence[Example], slots: list[Slot]) -> MicroBatch:
        """The micro-batch of `slots`, whose indices point into `examples`."""
        chosen = [examples[slot.index] for slot in slots]
        placed = [(number, piece) for number, example in enumerate(chosen) for piece in self.layout.pieces(example)]
        rows = [placed] if self.packed else [[piece] for piece in placed]
        images, grids = self._inputs(examples, slots)
        has_images = bool(images)
        if self.with_images and not has_images:
            images = self.filler_images
        parts = [[self._tokens(piece, number, grids) for number, (_, piece) in enumerate(row, 1)] for row in rows]
        if self.with_images and not has_images:
            filler = self.filler.copy()
            filler[3] += parts[0][-1][3, -1] + 1  # its places go on like those of padding
            parts[0].append(filler)

        tokens = self._padded([np.concatenate(row, 1) for row in parts])
        positions = tokens[3:]
        one_each = len(rows) == len(placed) == sum(len(piece.sequences) for _, piece in placed)
        answers = _answers(rows, len(slots), tokens.shape[2])
        return MicroBatch(
            inputs={"input_ids": tokens[0], "position_ids": positions if len(positions) > 1 else positions[0]} | images,
            branches=None if one_each else tokens[1:3],
            rows=torch.from_numpy(np.concatenate([rows for _, rows, _ in answers])),
            targets=torch.from_numpy(np.concatenate([targets for *_, targets in answers])),
            sequence=torch.from_numpy(np.repeat(*zip(*((number, len(t)) for number, _, t in answers), strict=True))),
            weights=torch.tensor([float(slot.weight) for slot in slots] * self.layout.num_sides(chosen[0])),
            has_image=torch.tensor([float(bool(example.images)) for example in chosen]),
            indices=tuple(slot.index for slot in slots),
            sources=tuple(example.source for example in chosen),
        )

    def _inputs(self, examples: Sequence[Example], slots: list[Slot]) -> tuple[dict[str, Tensor], Iterator[Tensor]]:
        """What the model takes for the images of these examples, and the grid of each; nothing where none has any."""
        if self.features is None:
            images = [image for slot in slots for image in self._images(examples, slot.index)]
            pixels = self._process(images)[1] if images else {}
            return pixels, iter(pixels.get("image_grid_thw", ()))
        shown = self.shown(examples, [slot.index for slot in slots])
        found = [self.features(index, corrupted) for index, corrupted in shown]
        grids = (grid for _, grids in found if grids is not None for grid in grids)
        return {"image_features": torch.cat([features for features, _ in found])} if found else {}, grids

    def shown(self, examples: Sequence[Example], indices: Iterable[int]) -> list[tuple[int, bool]]:
        """Of each piece of these examples that has images, in the order of their placeholders: the example, and whether
        the piece shows them corrupted."""
        return [
            (index, CORRUPTED in piece.sides)
            for index in indices for piece in self.layout.pieces(examples[index]) if piece.images
        ]  # fmt: skip

    def num_image_tokens(self, example: Example) -> int:
        """Tokens of its images in one of its pieces."""
        return int((example.sequences[0].input_ids == self.processor.image_token_id).sum())

    def _images(self, examples: Sequence[Example], index: int) -> list[Image.Image]:
        """The images of an example's pieces, in the order of their placeholders; each file is decoded once."""
        example = examples[index]
        right = [load_image(Path(path), self.grey_window) for path in example.images]
        found = []
        for piece in self.layout.pieces(example):
            found += self._corrupted(examples, index, right) if CORRUPTED in piece.sides else right
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

    def _tokens(self, piece: Piece, number: int, grids: Iterator[Tensor]) -> np.ndarray:
        """(3 + k, T) int64: a piece's tokens, its number in the row, branches and positions. Takes the grids of its
        images from `grids`."""
        first = piece.sequences[0]
        ids, types = (torch.from_numpy(v[: piece.prefix]) for v in (first.input_ids, first.mm_token_type_ids))
        own = [grid for _, grid in zip(piece.images, grids, strict=False)]
        prefix = self.positions(ids, types, torch.stack(own) if own else None)
        behind = [continued(prefix, len(sequence) - piece.prefix) for sequence in piece.sequences]
        positions = torch.cat([prefix, *behind], 1).numpy()
        return np.stack([piece.input_ids(), np.full(len(piece), number), piece.branches(), *positions])

    def _padded(self, rows: list[np.ndarray]) -> Tensor:
        """(3 + k, R, T) int64 from rows of (3 + k, T), filled at the right.

        Padding is piece 0, and its places in the text go on where the row ends: places that begin anew would tell
        transformers that the row is packed, and cost it a mask.
        """
        length = math.ceil(max(row.shape[1] for row in rows) / self.multiple) * self.multiple
        padded = np.zeros((len(rows[0]), len(rows), length), dtype=np.int64)
        padded[0] = self.pad_token_id
        for number, row in enumerate(rows):
            padded[:, number, : row.shape[1]] = row
            padded[3, number, row.shape[1] :] = row[3, -1] + 1 + np.arange(length - row.shape[1])
        return torch.from_numpy(padded)

    def _process(self, images: list[Image.Image]) -> tuple[dict, dict[str, Tensor]]:
        """The processor's output, and those of its tensors that the model's forward takes for images."""
        output = self.processor(text=[self.processor.image_token * len(images)], images=images, return_tensors="pt")
        text_keys = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        return output, {name: tensor for name, tensor in output.items() if name not in text_keys}

    def _filler(self) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Tokens and zero pixels of the smallest image, for micro-batches that have none: a piece of its own, with a
        number that no other piece has."""
        output, pixels = self._process([Image.new("RGB", (28, 28))])
        ids = output["input_ids"][0]
        types = output["mm_token_type_ids"][0] if "mm_token_type_ids" in output else torch.zeros_like(ids)
        positions = self.positions(ids, types, pixels.get("image_grid_thw"))
        zeros = {name: torch.zeros_like(t) if t.is_floating_point() else t for name, t in pixels.items()}
        return np.stack(
            [ids.numpy(), np.full(len(ids), -1), np.zeros(len(ids), dtype=np.int64), *positions.numpy()]
        ), zeros


def _answers(rows: list[list[tuple[int, Piece]]], num_examples: int, length: int) -> list:
    """(sequence, flattened positions (n,), target tokens (n,)) of each answer, by the number of its sequence."""
    found = []
    for row, placed in enumerate(rows):
        start = row * length
        for number, piece in placed:
            for side, (before, targets) in zip(piece.sides, piece.answers(), strict=True):
                found.append((side * num_examples + number, start + before, targets))
            start += len(piece)
    return sorted(found, key=lambda answer: answer[0])
