"""Corrupted images: the same size, the same for the same key, never the image itself, and little of it left."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from mede2.trainer.data.corruption import KINDS, corrupt
from mede2.trainer.settings import CORRUPTIONS

SIZES = [(1, 1), (1, 7), (3, 2), (64, 48), (101, 33)]


def picture(size=(64, 48), seed: int = 0) -> Image.Image:
    """Colours that differ from place to place: red rises to the right, green falls downwards, blue is speckle."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(255, 0, height)[:, None]
    pixels[..., 2] = np.random.default_rng(seed).integers(0, 256, (height, width))
    return Image.fromarray(pixels)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def test_settings_and_code_know_the_same_kinds():
    assert KINDS.keys() == set(CORRUPTIONS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_size_and_mode_stay_and_pixels_do_not(kind, size):
    image = picture(size)
    before = image.tobytes()
    for key in ("a", "b", "c"):
        corrupted = corrupt(image, kind, key, picture((20, 30), seed=1))
        assert (corrupted.size, corrupted.mode) == (size, "RGB")
        assert corrupted.tobytes() != before
    assert image.tobytes() == before


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_key_decides(kind):
    """Whatever the global generators say, and without moving them."""
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        results.append(corrupt(picture(), kind, "rows.jsonl:7 seed 3", picture(seed=1)).tobytes())
        assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert results[0] == results[1]
    other = corrupt(picture(), kind, "rows.jsonl:8 seed 3", picture(seed=1)).tobytes()
    assert (other != results[0]) == (kind in ("crop", "noise"))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (16, 9)])
def test_an_image_of_one_colour_changes_too(kind, size):
    image = Image.new("RGB", size, (128, 128, 128))
    assert corrupt(image, kind, "key", image.copy()).tobytes() != image.tobytes()


def test_a_crop_shows_at_most_a_fifth():
    """Red tells the column and green the row: their ranges are the sides of the crop. 100 crops keep 1 to 20 per cent,
    here and there in the image."""
    image, shares, lefts = picture((400, 400)), [], []
    for key in range(100):
        red, green, _ = np.moveaxis(array(corrupt(image, "crop", str(key))), 2, 0)
        shares.append((red.max() - red.min()) * (green.max() - green.min()) / 255**2)
        lefts.append(red.min() / 255)
    assert 0.005 < min(shares) < 0.05
    assert 0.15 < max(shares) < 0.21
    assert min(lefts) < 0.1
    assert max(lefts) > 0.7


def test_blank_is_the_mean_colour():
    image = Image.new("RGB", (4, 1), (10, 20, 30))
    image.putpixel((0, 0), (50, 20, 10))
    assert array(corrupt(image, "blank", "key")).tolist() == [[[20, 20, 25]] * 4]  # 80 / 4, 20, 100 / 4


def test_noise_leaves_a_seventh_of_the_amplitude():
    """sqrt(1 - 0.98) = 0.14 of the difference between black and white, less what is clipped at both ends."""
    dark, bright = (
        array(corrupt(Image.new("RGB", (200, 200), (level,) * 3), "noise", "key")).mean() for level in (0, 255)
    )
    assert 0.05 < (bright - dark) / 255 < 0.15
    spread = array(corrupt(Image.new("RGB", (200, 200), (127,) * 3), "noise", "key")).std()
    assert spread > 80  # uniform over 0..255 would be 74


def test_shuffle_is_the_other_image():
    other = picture((128, 96), seed=1)
    shuffled = corrupt(picture(), "shuffle", "key", other)
    np.testing.assert_allclose(array(shuffled)[..., :2], array(other.resize((64, 48)))[..., :2], atol=8)
    assert corrupt(picture(), "shuffle", "key", picture(seed=2)).tobytes() == picture(seed=2).tobytes()


def test_shuffle_needs_another_image():
    with pytest.raises(ValueError, match="corruption: shuffle needs another record with an image"):
        corrupt(picture(), "shuffle", "key")
