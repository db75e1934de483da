"""Checkpoints of a run: written beside, completed, renamed; the newest complete one is where a run continues."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mede2.trainer.engine import Engine
from mede2.trainer.files import write_json

MARKER = "complete.json"  # written last; a folder without it is not a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the updates it holds, the identity of its run, the state of its objective."""

    path: Path
    step: int
    world_size: int
    identity: dict[str, Any]
    objective: dict[str, float]


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError where `path` is no complete checkpoint."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        return Checkpoint(path, marker["step"], marker["world_size"], marker["identity"], marker["objective"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"resume: {path} is no complete checkpoint ({MARKER} is missing or damaged)") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The complete checkpoint of the highest step under `folder`; half-written ones do not count."""
    complete = [read_checkpoint(marker.parent) for marker in folder.glob(f"step-*/{MARKER}")]
    return max(complete, key=lambda checkpoint: checkpoint.step, default=None)


def save_checkpoint(
    engine: Engine, folder: Path, step: int, identity: dict[str, Any], objective: dict[str, float]
) -> Path:
    """Write the state after `step` updates: trained weights, optimizer, every rank's random number generators, and
    what the objective carries (its `state_dict`, the same on all ranks).

    What is frozen comes from the model folder again, whose hash is in the identity.
    """
    world, final = engine.world, folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"

    def make_room() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def complete() -> None:
        marker = {"step": step, "world_size": world.size, "identity": identity, "objective": objective}
        write_json(partial / MARKER, marker)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier run through the same step
        os.rename(partial, final)

    world.on_main(make_room)
    engine.deepspeed.save_checkpoint(folder, tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    save_file(_generator_states(), partial / _generator_file(world.rank))
    world.barrier()  # all ranks have written
    world.on_main(complete)
    return final


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the engine and the random number generators back to where the checkpoint left them.

    Raises:
        ValueError: the checkpoint was written by another number of ranks.
    """
    if checkpoint.world_size != engine.world.size:
        raise ValueError(
            f"resume: {checkpoint.path} was written by {checkpoint.world_size} ranks and cannot be continued by "
            f"{engine.world.size}; start as many, or start over with --resume never"
        )
    folder, tag = checkpoint.path.parent, checkpoint.path.name
    loaded, _ = engine.deepspeed.load_checkpoint(folder, tag=tag, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"resume: DeepSpeed finds nothing to load in {checkpoint.path}")
    states = load_file(checkpoint.path / _generator_file(engine.world.rank))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _generator_file(rank: int) -> str:
    return f"generators-rank-{rank:05d}.safetensors"


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
