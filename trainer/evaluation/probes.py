"""Grounding probes: the same question with an image that does not show the case, or without any."""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.records import Message
from mede2.trainer.evaluation.answered import AS_IT_IS
from mede2.trainer.files import hash_json
from mede2.trainer.questions.cases import Case

GREY = (128, 128, 128)


def probe(cases: Sequence[Case], kind: str, folder: Path, *, seed: int = 0, window: Window = None) -> list[Case]:
    """The questions that have images, in their order, as a probe asks them.

    Args:
        cases: of one benchmark.
        kind: AS_IT_IS leaves every question as it is, those without images, too; text_only takes the images away;
            blank (grey), noise (white) and shuffle (an image of another question, scaled) put others of the same size
            in their place.
        folder: where the images are written, as PNG under a name that says what they are. Those that are there already
             are not made again.
        seed: of noise and of the choice among other questions.
        window: see `images.load_image`.

    Raises:
        ValueError: an image that does not decode; shuffle where all questions show the same images.
    """
    if kind == AS_IT_IS:
        return list(cases)
    shown = [case for case in cases if case.images]
    if kind == "text_only":
        return [replace(case, prompt=tuple(map(_without_images, case.prompt)), images=()) for case in shown]
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted({pair for case in shown for pair in zip(case.image_hashes, case.images, strict=True)})

    def replaced(case: Case) -> Case:
        places = range(len(case.images))
        return replace(
            case, images=tuple(_replaced(case, place, kind, others, folder, seed, window) for place in places)
        )

    return [replaced(case) for case in shown]


def _without_images(message: Message) -> Message:
    return message | {"content": [part for part in message["content"] if part["type"] != "image"]}


def _replaced(
    case: Case, place: int, kind: str, others: Sequence[tuple[str, Path]], folder: Path, seed: int, window: Window
) -> Path:
    """The file of the image that a probe shows in place of one of a case's. Blank and noise tell nothing of it but its
    size: even a mean colour, or a trace of the picture under noise, can give an answer away."""
    picture = load_image(case.images[place], window)
    width, height = picture.size
    if kind == "shuffle":
        digest, other = _other(case, place, others, seed)
        path = folder / f"shuffle-{hash_json([digest, window, width, height])[:32]}.png"
    else:
        path = folder / f"{kind}-{width}x{height}-{seed}.png"
    if path.exists():
        return path
    if kind == "shuffle":
        shown = load_image(other, window).resize(picture.size, Image.Resampling.BICUBIC)
    elif kind == "noise":
        shown = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    else:
        shown = Image.new("RGB", picture.size, GREY)
    _save(shown, path)
    return path


def _other(case: Case, place: int, others: Sequence[tuple[str, Path]], seed: int) -> tuple[str, Path]:
    """One of the images that are none of the case's own."""
    start = int.from_bytes(hashlib.sha256(f"{seed} {place} {case.id}".encode()).digest()[:8], "big")
    for step in range(len(others)):
        other = others[(start + step) % len(others)]
        if other[0] not in case.image_hashes:
            return other
    raise ValueError(f"{case.source}: the probe shuffle needs a question with another image")


def _save(picture, path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(buffer.getvalue())
    os.replace(beside, path)
