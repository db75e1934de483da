"""Operations of a forward and of a training step, counted from a model's shape.

Legend: P prompt tokens (image tokens counted), A answer tokens; operations are multiplications and additions, two for
each weight that a token meets. Norms, activations and rotations are not counted; attention is, as far as it looks.
"""

from dataclasses import dataclass

from mede2.trainer.planning.shapes import Shape


@dataclass(frozen=True)
class Sizes:
    """Means over the pairs: P, A of one answer, image patches, image tokens, images."""

    prompt: float
    answer: float
    patches: float
    image_tokens: float
    images: float = 1.0


@dataclass(frozen=True)
class Work:
    """Operations of a forward over one example."""

    vision: float
    language: float
    head: float

    @property
    def total(self) -> float:
        return self.vision + self.language + self.head


def forward_work(shape: Shape, sizes: Sizes, *, prompts: int, head_rows: float, answers: int = 2) -> Work:
    """Operations of one forward over an example.

    Args:
        shape: of the model.
        sizes: of the example.
        prompts: 1 where all answers share one prompt and its images, 2 where each has its own.
        head_rows: positions that the language head scores.
        answers: 2 of a pair, 1 of a demonstration.
    """
    vision, text = shape.vision, shape.text
    met = dict.fromkeys(("patches", "vision_tower", "merger", "language_model"), 0)  # weights by who meets them
    for module in shape.modules:
        if module.kind in ("linear", "patches"):
            weight = module.parameters[0]
            met[weight.part if module.kind == "linear" else "patches"] += weight.numel
    positions = sizes.patches + vision.extra_tokens * sizes.images
    whole = positions / max(sizes.images, 1)
    seen = [whole if layer in vision.whole_layers else min(whole, vision.window**2) for layer in range(vision.layers)]
    per_image = (
        2 * sizes.patches * met["patches"]
        + positions * (2 * met["vision_tower"] + sum(4 * vision.hidden * each for each in seen))
        + sizes.image_tokens * 2 * met["merger"]
    )
    tokens = prompts * sizes.prompt + answers * sizes.answer
    looks = prompts * sizes.prompt**2 / 2 + answers * sizes.answer * (sizes.prompt + sizes.answer / 2)  # causal
    return Work(
        vision=prompts * per_image,
        language=tokens * 2 * met["language_model"] + text.layers * looks * 4 * text.queries,
        head=head_rows * 2 * text.hidden * text.vocabulary,
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
    shape: Shape, sizes: Sizes, *, shared: bool, all_rows: bool, reference_passes: float,
    vision_passes: float | None = None,
) -> Spent:  # fmt: skip
    """Operations of a DPO step with a frozen vision tower: forward and backward of the language model (three times
    its forward), forward of the vision tower, and `reference_passes` forwards of the reference.

    Args:
        shape: of the model.
        sizes: of the pair.
        shared: the two answers share their prompt.
        all_rows: the head scores every position, not only those of answers.
        reference_passes: 1 where the reference runs in every step, 1 over the epochs where it runs once.
        vision_passes: of the tower, for policy and reference together: 1 over the epochs where its features are kept;
            None: one for each of their forwards.
    """
    head_rows = 2 * (sizes.prompt + sizes.answer) if all_rows else 2 * sizes.answer
    once = forward_work(shape, sizes, prompts=1 if shared else 2, head_rows=head_rows)
    language = once.language + once.head
    if vision_passes is not None:
        return Spent(vision_passes * once.vision, 3 * language, reference_passes * language)
    return Spent(once.vision, 3 * language, reference_passes * once.total)
