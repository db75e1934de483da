"""The random number generators of a rank: their states, taken and put back."""

from collections.abc import Mapping

import torch
from torch import Tensor


def generator_states() -> dict[str, Tensor]:
    """The states of this rank's generators, uint8, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Put back what `generator_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
