"""Which tokens of a row see each other when several answers share a prompt, or several examples a row."""

import torch
from torch import Tensor


def branch_mask(pieces: Tensor, branches: Tensor, dtype: torch.dtype) -> Tensor:
    """The 4-D attention mask of packed rows: a token sees earlier ones of its piece, in the prefix or its own branch.

    Args:
        pieces: (R, T) int64, number of the piece that a token belongs to.
        branches: (R, T) int64, 0 in a piece's prefix, else the number of its answer.
        dtype: of the model.

    Returns:
        (R, 1, T, T), to be added to the scores: 0, or the lowest number of `dtype`. (Eager attention would add a
        boolean mask as 0 and 1 without a word, and sdpa would convert it in every layer.) Every token sees itself, so
        no row of the softmax is empty.
    """
    length = pieces.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=pieces.device).tril()
    same_piece = pieces[:, :, None] == pieces[:, None, :]
    in_view = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    hidden = ~(earlier & same_piece & in_view)[:, None]
    # Rows begin at multiples of 16 bytes, or CUDA's memory-efficient attention would copy the mask in every layer.
    mask = torch.zeros(*hidden.shape[:3], -(-length // 8) * 8, dtype=dtype, device=hidden.device)[..., :length]
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)
