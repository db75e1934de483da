"""MLPs of the language model run tile by tile, as of long rows what they hold between their layers is the largest part
of a decoder layer (ALST, arXiv 2506.13996)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def tile_mlps(language_model: nn.Module, num_tiles: int) -> None:
    """Cut the tokens of every MLP into tiles; each is computed again in backward, so one at a time is held.

    The number of tiles is fixed and not their length: under ZeRO-3 all ranks call the same modules equally often,
    whatever rows they hold.

    Args:
        language_model: its decoder layers have an `mlp` from (R, T, H) to (R, T, H), token by token.
        num_tiles: of each micro-batch.

    Raises:
        ValueError: no layer has an MLP.
    """
    mlps = [module for name, module in language_model.named_modules() if name.rpartition(".")[2] == "mlp"]
    if not mlps:
        raise ValueError(f"mlp_tiles: no layer of {type(language_model).__name__} has an mlp; leave mlp_tiles out")
    for mlp in mlps:
        mlp.forward = _Tiled(mlp.forward, num_tiles)


class _Tiled:
    def __init__(self, forward, num_tiles: int):
        self.forward, self.num_tiles = forward, num_tiles

    def __call__(self, hidden: Tensor) -> Tensor:
        tiles = hidden.flatten(0, 1)[None].tensor_split(self.num_tiles, 1)  # (1, t, H): experts want three dimensions
        done = [checkpoint(self.forward, tile, use_reentrant=False) for tile in tiles]
        return torch.cat(done, 1).view_as(hidden)
