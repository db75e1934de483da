"""Rotary positions of a conversation, as the model's own class counts them. Imports transformers."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText


class Positions:
    """Positions of the models of a folder.

    Args:
        folder: of a model; only its config is read.
    """

    def __init__(self, folder: Path):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        self._rope_index = getattr(model.model, "get_rope_index", None)

    def __call__(self, input_ids: Tensor, types: Tensor, grids: Tensor | None) -> Tensor:
        """Positions of one conversation.

        Args:
            input_ids: (T,) int64.
            types: (T,) int64, 1 in image tokens.
            grids: (num_images, 3) int64, patches of each image in time, height and width; None for a model that has
                none, or without images.

        Returns:
            (4, T) int64: place in the text, then time, height and width (M-RoPE, arXiv 2409.12191); (1, T) for models
            whose images have places in the text like words.
        """
        places = torch.arange(len(input_ids))[None]
        if self._rope_index is None:
            return places
        if grids is None:
            return places.expand(4, -1)
        rotary, _ = self._rope_index(input_ids[None], mm_token_type_ids=types[None], image_grid_thw=grids)
        return torch.cat([places, rotary[:, 0]])


def continued(prefix: Tensor, length: int) -> Tensor:
    """Positions (k, length) of a text behind `prefix` (k, P): all rotary rows go on one past the prefix's largest."""
    starts = prefix.amax(1)
    starts[1:] = starts[1:].amax() if len(starts) > 1 else starts[1:]
    return starts[:, None] + 1 + torch.arange(length)
