"""Proof, taken at the first updates, that all that trains has begun to move and all that is frozen keeps its bits."""

import torch
from torch import Tensor

from mede2.trainer.engine import Engine
from mede2.trainer.policy import part_of

LISTED = 8  # names shown in an error


class NotMoved(RuntimeError):
    """Something that should train does not, or something frozen does."""


class MovedCheck:
    """Watches the first updates of a run until every trained parameter has been in one.

    Adam's first moment must be somewhere not zero: after the first update; of a LoRA A, whose gradient is zero while B
    is, after the second; of the vision tower and the merger, after the first whose global batch holds an image.

    Args:
        engine: before its first update; made on every rank.
    """

    def __init__(self, engine: Engine):
        self.engine, self.num_updates, self.image_seen = engine, 0, False
        self.waiting = [name for name, parameter, _ in engine.weights() if parameter.requires_grad]
        self.frozen = {
            name: checksum(held) for name, parameter, held in engine.weights() if not parameter.requires_grad
        }

    def __call__(self, has_image: bool) -> None:
        """Look after an update. All ranks call it.

        Args:
            has_image: whether the update's global batch held an image; the same on all ranks.

        Raises:
            NotMoved: on every rank; names the parameters.
        """
        if not self.waiting:
            return
        self.num_updates += 1
        self.image_seen |= has_image
        flags = {}
        for name, parameter, held in self.engine.weights():
            if name in self.frozen:
                flags[name] = float(checksum(held) != self.frozen[name])
            else:
                flags[name] = float(self.engine.has_moment(parameter))
        moved = {name for name, ranks in self.engine.world.sum(flags).items() if ranks}
        self.waiting = [name for name in self.waiting if name not in moved]
        faults = {
            "trained, but without a gradient": list(filter(self._is_due, self.waiting)),
            "frozen, but changed": [name for name in self.frozen if name in moved],
        }
        if said := [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]:
            raise NotMoved(f"after update {self.num_updates} of this start, {'; '.join(said)}")

    def _is_due(self, name: str) -> bool:
        if ".lora_A." in name:
            return self.num_updates > 1
        return self.image_seen or part_of(name) == "language_model"


def checksum(values: Tensor) -> int:
    """Sum of a tensor's values, their bits read as integers."""
    bits = values.reshape(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
    return sum(int(part.sum()) for part in bits.split(2**24))


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
