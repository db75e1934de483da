"""The real command, and questions whose right answer depends on what their image shows."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def evaluate(launched):
    """`evaluate(*arguments, wait=True, **environment)` runs launch/evaluate.py."""
    return partial(launched, "evaluate.py")


@pytest.fixture(scope="session")
def shades(tmp_path_factory, write_rows, user) -> Path:
    """Six questions on whether a picture is lighter above or below, right answers in turn, and two without images."""
    folder = tmp_path_factory.mktemp("shades")
    rows = []
    for number in range(6):
        pixels = np.full((32, 32, 3), 40 + 10 * number, dtype=np.uint8)
        half = slice(0, 16) if number % 2 == 0 else slice(16, 32)
        pixels[half] = 200
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({
            "id": f"q{number}", "prompt": [user("Is it lighter above or below?", 1)], "images": [f"{number}.png"],
            "answer": ("above", "below")[number % 2], "options": ["above", "below"],
            "meta": {"modality": "photograph" if number < 4 else "drawing"},
        })  # fmt: skip
    for number in (6, 7):
        question = {"id": f"q{number}", "prompt": [user(f"Two and {number}?")], "answer": str(2 + number)}
        rows.append(question | {"meta": {"modality": "none"}})
    return write_rows(folder / "shades.jsonl", rows)
