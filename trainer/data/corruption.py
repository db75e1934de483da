"""Corrupted images: what an answer must owe its image to. A pure function of the image and a key."""

import hashlib
import math

import numpy as np
from PIL import Image

CROP_SHARE = (0.01, 0.2)  # of the area that a crop keeps; at most a fifth, as in mDPO (arXiv 2406.11839)
NOISE_SHARE = 0.98  # of the variance that is noise, near the end of a diffusion


def corrupt(image: Image.Image, kind: str, key: str, other: Image.Image | None = None) -> Image.Image:
    """An image of the same size that no longer shows what the answer is about.

    Args:
        image: RGB.
        kind: crop: a random part, scaled up; blank: the mean colour; noise: mostly gaussian noise, as late in a
            diffusion; shuffle: `other`, scaled.
        key: names the draw, such as the record and the seed; the same key gives the same picture.
        other: another case's image, for shuffle.

    Returns:
        RGB, never the image itself: where the corruption would change nothing (an image of one colour, an `other` that
        is the same picture) it is noise.

    Raises:
        ValueError: shuffle without another image.
    """
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()))
    corrupted = KINDS[kind](image, generator, other)
    while corrupted.tobytes() == image.tobytes():
        corrupted = _noise(image, generator, other)
    return corrupted


def _crop(image: Image.Image, generator: np.random.Generator, other: Image.Image | None) -> Image.Image:
    side = math.sqrt(generator.uniform(*CROP_SHARE))
    width, height = (max(1, int(side * length)) for length in image.size)
    left = generator.integers(0, image.width - width, endpoint=True)
    top = generator.integers(0, image.height - height, endpoint=True)
    return image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def _blank(image: Image.Image, generator: np.random.Generator, other: Image.Image | None) -> Image.Image:
    mean = np.asarray(image).mean((0, 1))
    return Image.new("RGB", image.size, tuple(np.rint(mean).astype(int).tolist()))


def _noise(image: Image.Image, generator: np.random.Generator, other: Image.Image | None) -> Image.Image:
    """x -> sqrt(1 - s) x + sqrt(s) e with x in -1..1 (arXiv 2006.11239, eq. 4)."""
    pixels = np.asarray(image) / np.float32(127.5) - 1
    noise = generator.standard_normal(pixels.shape, np.float32)
    mixed = math.sqrt(1 - NOISE_SHARE) * pixels + math.sqrt(NOISE_SHARE) * noise
    return Image.fromarray(np.rint((mixed.clip(-1, 1) + 1) * 127.5).astype(np.uint8))


def _shuffle(image: Image.Image, generator: np.random.Generator, other: Image.Image | None) -> Image.Image:
    if other is None:
        raise ValueError("corruption: shuffle needs another record with an image")
    return other.resize(image.size, Image.Resampling.BICUBIC)


KINDS = {"crop": _crop, "blank": _blank, "noise": _noise, "shuffle": _shuffle}
