"""Checkpoints of a run: written beside, completed, renamed; the newest whole one is where a run continues."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mede2.trainer import other_world
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_file, write_json
from mede2.trainer.unpickling import tensors_only
from mede2.trainer.world import World

MARKER = "complete.json"  # the manifest, written last; a folder without it is not a checkpoint
GIB = 2**30
WRITER = re.compile("PytorchStreamWriter|inline_container|iostream")  # in what torch.save raises on a full disk


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: updates that it holds.
        world_size: ranks that wrote it.
        identity: of its run.
        objective: what the objective carries.
        files: bytes and sha256 of each file, by its name within the folder.
        owed: metrics of update `step` whose row is not yet in the metrics file, because the evaluation that belongs to
            it was stopped; None: nothing is owed.
        converted: where it is for another number of ranks, from `other_world.convert`.
    """

    path: Path
    step: int
    world_size: int
    identity: dict[str, Any]
    objective: dict[str, float]
    files: dict[str, dict[str, Any]]
    owed: dict[str, float] | None = None
    converted: Path | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError where `path` is no complete checkpoint, or one of its files is missing or of another size."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        names = ("step", "world_size", "identity", "objective")
        checkpoint = Checkpoint(path, *(marker[name] for name in names), marker.get("files", {}), marker.get("owed"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no complete checkpoint ({MARKER} is missing or damaged)") from error
    for name, file in checkpoint.files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != file["bytes"]:
            raise ValueError(f"{path / name} is damaged ({found or 'no'} bytes, {file['bytes']} were written)")
    return checkpoint


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of complete checkpoints under `folder`, the newest first; half-written ones do not count."""
    complete = [marker.parent for marker in folder.glob(f"step-*/{MARKER}")]
    return sorted(complete, key=_step_of, reverse=True)


def first_whole(folders: Sequence[Path], world: World) -> Checkpoint:
    """The first of these checkpoints whose files are all as they were written, by their sha256; what is wrong with
    those before it is said. All ranks call it, and share the reading.

    Raises:
        ValueError: none of them is whole.
    """
    damage = []
    for folder in folders:
        try:
            checkpoint = world.on_main(lambda folder=folder: read_checkpoint(folder))
            _compare(checkpoint, _hashes(checkpoint.path, list(checkpoint.files), world))
        except ValueError as error:
            damage.append(str(error))
        else:
            for text in damage:
                world.say(f"warning: {text}; an older checkpoint serves")
            return checkpoint
    raise ValueError(f"resume: {'; '.join(damage)}; start over with --resume never")


def save_checkpoint(
    engine: Engine, folder: Path, step: int, identity: dict[str, Any], objective: dict[str, float],
    keep: int = 0, keep_every: int = 0, owed: dict[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write the state after `step` updates: trained weights, optimizer, every rank's random number generators, and
    what the objective carries (its `state_dict`, the same on all ranks).

    What is frozen comes from the model folder again, whose hash is in the identity.

    Args:
        engine: of the run.
        folder: of all checkpoints of the run.
        step: updates done.
        identity: of the run.
        objective: state of the objective.
        keep: newest checkpoints that stay; older ones are deleted when this one is whole. 0: all.
        keep_every: checkpoints whose step is a multiple of it stay whatever `keep` says. 0: none.
        owed: see `Checkpoint`.

    Raises:
        ValueError: the disk has too little room or refuses; the checkpoints that were there are as they were.
    """
    world, final = engine.world, folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"

    def make_room() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):  # by a run that was killed while it wrote
            shutil.rmtree(left)
        _check_room(folder, least)

    def complete() -> None:
        if unread := [f"{name} {value}" for name, value in hashes.items() if " " in value]:
            raise OSError("; ".join(unread))
        files = {name: {"bytes": (partial / name).stat().st_size, "sha256": value} for name, value in hashes.items()}
        marker = {"step": step, "world_size": world.size, "identity": identity, "objective": objective, "files": files}
        marker |= {"owed": owed} if owed else {}
        write_json(partial / MARKER, marker)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier run through the same step
        os.rename(partial, final)
        _delete_old(folder, step, keep, keep_every)

    least = engine.num_state_bytes()
    try:
        world.on_main(make_room)
        engine.deepspeed.save_checkpoint(folder, tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
        save_file(_generator_states(), partial / _generator_file(world.rank))
        world.barrier()  # all ranks have written
        hashes = _hashes(partial, world.on_main(lambda: _names(partial)), world)
        world.on_main(complete)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not WRITER.search(str(error)):
            raise
        raise ValueError(
            f"checkpoint of update {step}: {partial} cannot be written ({error}); the earlier ones in {folder} are "
            "whole: make room, then the same command continues from there"
        ) from error
    return final


def _check_room(folder: Path, least: int) -> None:
    """Raise ValueError unless the disk takes a checkpoint as large as the last one, or as `least` bytes."""
    folders = checkpoint_folders(folder)
    need = sum(path.stat().st_size for path in folders[0].rglob("*")) if folders else least
    free = shutil.disk_usage(folder).free
    if free < need:
        last = f"the last one, {folders[0]}, is whole" if folders else "there is none yet"
        raise ValueError(
            f"checkpoint: {folder} has {free / GIB:.3g} GiB free and a checkpoint takes {need / GIB:.3g}; {last}: make "
            "room (--set keep_checkpoints=1 keeps but the newest), then the same command continues from there"
        )


def _names(folder: Path) -> list[str]:
    """Every file of a checkpoint but its manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return sorted(str(path.relative_to(folder)) for path in files)


def _hashes(folder: Path, names: Sequence[str], world: World) -> dict[str, str]:
    """sha256 of the files, which are on disk when this returns, or what is in the way. Ranks share the files."""
    share = {}
    for name in names[world.rank :: world.size]:
        try:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            share[name] = hash_file(folder / name)
        except OSError as error:
            share[name] = f"cannot be read: {error.strerror}"
    return {name: value for part in world.gather(share) for name, value in sorted(part.items())}


def _compare(checkpoint: Checkpoint, hashes: dict[str, str]) -> None:
    for name, file in checkpoint.files.items():
        if hashes[name] != file["sha256"]:
            told = hashes[name] if " " in hashes[name] else "its sha256 is not the one that was written"
            raise ValueError(f"{checkpoint.path / name} is damaged ({told})")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _delete_old(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Delete what is older than the newest `keep` up to `step`; later ones, of a run that was taken back, are left. A
    folder loses its name first, so it is never half a checkpoint."""
    so_far = [path for path in checkpoint_folders(folder) if _step_of(path) <= step]
    for path in so_far[keep:] if keep else ():
        if not keep_every or _step_of(path) % keep_every:
            aside = path.with_name(f".{path.name}.partial")
            os.rename(path, aside)
            shutil.rmtree(aside)


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put the engine and the random number generators back to where the checkpoint left them.

    With another number of ranks those that the checkpoint has generators of take them up, and the others get theirs
    from the run's seed, their rank and the step.

    Raises:
        ValueError: there is nothing to load, or it holds what is neither tensor nor value.
    """
    assert checkpoint.converted or checkpoint.world_size == engine.world.size
    folder, tag = checkpoint.path.parent, checkpoint.path.name
    with tensors_only(checkpoint.path):
        if checkpoint.converted:
            other_world.load(engine, checkpoint.converted)
        elif engine.deepspeed.load_checkpoint(folder, tag=tag, load_module_strict=False)[0] is None:
            raise ValueError(f"resume: DeepSpeed finds nothing to load in {checkpoint.path}")
    if engine.world.rank >= checkpoint.world_size:
        other_world.seed_generators(checkpoint.identity["settings"]["seed"], engine.world.rank, checkpoint.step)
        return
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
