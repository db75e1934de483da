"""What the planner is told about the data: tokens of prompts and answers, images, rows of a micro-batch."""

import math
from dataclasses import dataclass

from mede2.trainer.planning.shapes import Shape


@dataclass(frozen=True)
class Lengths:
    """An example, on average or at its longest.

    Attributes:
        prompt: tokens, image tokens counted.
        answers: tokens of each answer: two in Stage II, one in Stage I.
        num_patches: of all its images, before they are merged to tokens.
        num_images: in its prompt.
    """

    prompt: int
    answers: tuple[int, ...]
    num_patches: int
    num_images: int


@dataclass(frozen=True)
class Row:
    """A row as it runs: a prompt, then answers that see it and themselves."""

    prompt: int
    answers: tuple[int, ...]
    padding: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.answers) + self.padding


def rows_of(lengths: Lengths, shared_prefix: bool, corrupted: bool = False) -> tuple[Row, ...]:
    """The rows of one example, padded to the longest: one where its answers share a prompt, else one for each; where it
    is `corrupted`, one more for the chosen answer under a corrupted image."""
    shared = shared_prefix or len(lengths.answers) == 1
    layouts = [lengths.answers] if shared else [(answer,) for answer in lengths.answers]
    layouts += [lengths.answers[:1]] * corrupted
    longest = max(map(sum, layouts))
    return tuple(Row(lengths.prompt, answers, longest - sum(answers)) for answers in layouts)


def patches_of_image(shape: Shape, pixels: int) -> tuple[int, int]:
    """Patches and tokens of a square image of so many pixels: InternVL scales each to tiles of 448 x 448 (one is
    counted; `num_images` counts tiles), Qwen keeps the size to whole tokens."""
    vision = shape.vision
    if shape.family == "internvl":
        patches = (448 // vision.patch) ** 2
        return patches, patches // vision.merge**2
    side = max(1, round(math.sqrt(pixels) / (vision.patch * vision.merge)))
    return (side * vision.merge) ** 2, side**2
