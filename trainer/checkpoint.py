"""Checkpoints of a run: written beside, completed, renamed; the newest whole one is where a run continues."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mede2.trainer import other_world, watchdog
from mede2.trainer.checkpoint_writing import Writing, on_disk
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_file, save_tensors, write_json
from mede2.trainer.generators import generator_states, set_generator_states
from mede2.trainer.ownership import Ownership
from mede2.trainer.unpickling import tensors_only
from mede2.trainer.world import World

MARKER = "complete.json"  # the manifest, written last; a folder without it is not a checkpoint
GIB = 2**30


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


class Checkpoints:
    """The checkpoints that a run writes, one at a time. All ranks make the same calls.

    A checkpoint holds trained weights, optimizer, every rank's random number generators, and what the objective
    carries. What is frozen comes from the model folder again, whose hash is in the identity.

    Args:
        engine: of the run.
        folder: of all checkpoints of the run.
        identity: of the run.
        keep: newest checkpoints that stay; older ones are deleted when a new one is whole. 0: all.
        keep_every: checkpoints whose step is a multiple of it stay whatever `keep` says. 0: none.
        owner: of the output; None: nobody else writes it.
        in_background: let the training go on while a copy of the state is written.
    """

    def __init__(
        self, engine: Engine, folder: Path, identity: dict[str, Any], keep: int = 0, keep_every: int = 0, *,
        owner: Ownership | None = None, in_background: bool = False,
    ):  # fmt: skip
        self.engine, self.world, self.folder, self.identity = engine, engine.world, folder, identity
        self.keep, self.keep_every, self.owner, self.in_background = keep, keep_every, owner, in_background
        self._begun: tuple[Writing, dict[str, Any]] | None = None
        self.world.on_main(self._clear)

    def save(self, step: int, objective: dict[str, float], owed: dict[str, float] | None = None) -> None:
        """Write the state after `step` updates; in the background, it is whole after a later call of `settle` or
        `finish`.

        Args:
            step: updates done.
            objective: its `state_dict`, the same on all ranks.
            owed: see `Checkpoint`.

        Raises:
            ValueError: the disk has too little room or refuses; the checkpoints that were there are as they were.
            OutputLost: another attempt has the output.
        """
        self.finish()
        token = f".{self.owner.token}" if self.owner else ""  # whoever else writes this step has another folder
        partial = self.folder / f".{_name(step)}{token}.partial"
        least, generators = self.engine.num_state_bytes(), generator_states()
        marker = {"step": step, "world_size": self.world.size, "identity": self.identity, "objective": objective}
        marker |= {"owed": owed} if owed else {}
        with self._refusals(partial, step):
            self.world.on_main(lambda: self._make_room(partial, least))
        writing = Writing(partial, in_background=self.in_background)
        self.engine.hand_over_state(partial, writing.save)
        writing.write(partial / _generator_file(self.world.rank), lambda file: save_tensors(generators, file))
        self._begun = writing, marker
        if not self.in_background:
            self.finish()

    def settle(self) -> None:
        """Complete the checkpoint that was begun, if every rank has written its part; else it stays begun."""
        if self._begun:
            waiting = float(not self._begun[0].done)
            if not self.world.sum({"waiting": waiting})["waiting"]:
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that was begun, if there is one, and complete it. Raises as `save` does."""
        if not self._begun:
            return
        (writing, marker), self._begun = self._begun, None
        watchdog.phase(f"completing the checkpoint of update {marker['step']}")
        writing.wait()
        parts = self.world.gather((writing.files, writing.problem))
        with self._refusals(writing.folder, marker["step"]):
            self.world.on_main(lambda: self._complete(writing.folder, marker, parts))

    def _make_room(self, partial: Path, least: int) -> None:
        self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_room(self.folder, least)
        partial.mkdir()

    def _clear(self) -> None:
        """Delete what a run left that was killed while it wrote or deleted, or was thought dead and is still at it."""
        self._check_owner()
        for left in self.folder.glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def _complete(self, partial: Path, marker: dict[str, Any], parts: list[tuple[dict, str]]) -> None:
        self._check_owner()
        if problems := sorted({problem for _, problem in parts if problem}):
            raise OSError("; ".join(problems))
        files = {name: file for part, _ in parts for name, file in part.items()}
        files |= {name: on_disk(partial / name) for name in _names(partial) if name not in files}  # swapped to NVMe
        write_json(partial / MARKER, marker | {"files": dict(sorted(files.items()))})
        self._check_owner()
        final = self.folder / _name(marker["step"])
        aside = partial.with_name(f".{final.name}.old.partial")
        if final.exists():  # of an earlier run through the same step
            os.rename(final, aside)
        os.rename(partial, final)
        shutil.rmtree(aside, ignore_errors=True)
        _delete_old(self.folder, marker["step"], self.keep, self.keep_every, self.owner)

    def _check_owner(self) -> None:
        if self.owner:
            self.owner.check()

    @contextmanager
    def _refusals(self, partial: Path, step: int) -> Iterator[None]:
        """One error, on every rank, for whatever a disk says."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"checkpoint of update {step}: {partial} cannot be written ({error}); the earlier ones in "
                f"{self.folder} are whole: make room, then the same command continues from there"
            ) from error


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
    """sha256 of the files, or what is in the way. Ranks share the files."""
    share = {}
    for name in names[world.rank :: world.size]:
        try:
            share[name] = hash_file(folder / name)
        except OSError as error:
            share[name] = f"cannot be read: {error.strerror}"
    return {name: value for part in world.gather(share) for name, value in sorted(part.items())}


def _compare(checkpoint: Checkpoint, hashes: dict[str, str]) -> None:
    for name, file in checkpoint.files.items():
        if hashes[name] != file["sha256"]:
            told = hashes[name] if " " in hashes[name] else "its sha256 is not the one that was written"
            raise ValueError(f"{checkpoint.path / name} is damaged ({told})")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _delete_old(folder: Path, step: int, keep: int, keep_every: int, owner: Ownership | None = None) -> None:
    """Delete what is older than the newest `keep` up to `step`; later ones, of a run that was taken back, are left."""
    so_far = [path for path in checkpoint_folders(folder) if _step_of(path) <= step]
    for path in so_far[keep:] if keep else ():
        if not keep_every or _step_of(path) % keep_every:
            if owner:
                owner.check()
            _delete(path)


def _delete(path: Path) -> None:
    """A folder loses its name first, so it is never half a checkpoint."""
    aside = path.with_name(f".{path.name}.old.partial")
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
    set_generator_states(load_file(checkpoint.path / _generator_file(engine.world.rank)))


def _generator_file(rank: int) -> str:
    return f"generators-rank-{rank:05d}.safetensors"
