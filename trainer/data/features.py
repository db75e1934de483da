"""Image features that a frozen vision tower gave once, read from disk in place of the images."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class ImageFeatures:
    """The features of a data set's images, in the files that the ranks wrote (`image_features.compute`).

    Args:
        folder: of the files, whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, safe_open]:
        """The open file of each tensor; every process that reads opens its own."""
        files = [safe_open(path, "pt") for path in sorted(self.folder.glob("*.safetensors"))]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dict

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __call__(self, index: int, corrupted: bool) -> tuple[Tensor, Tensor | None]:
        """Of all images of one example, right or corrupted: the features (tokens, 1 + d, H), d those of deeper layers
        (Qwen3-VL's), and the grids (num_images, 3) int64 of models that have them."""
        name = name_of(index, corrupted)
        grids = self._files.get(f"grids/{name}")
        return self._files[f"features/{name}"].get_tensor(f"features/{name}"), (
            None if grids is None else grids.get_tensor(f"grids/{name}")
        )

    def zeros(self, num_tokens: int) -> Tensor:
        """(num_tokens, 1 + d, H): features that nothing sees."""
        name, file = next(item for item in self._files.items() if item[0].startswith("features/"))
        _, *width = file.get_slice(name).get_shape()
        return torch.zeros(num_tokens, *width)


def name_of(index: int, corrupted: bool) -> str:
    """Of an example's images in the files."""
    return f"{index}/corrupted" if corrupted else f"{index}/right"
