"""Checkpoints written in the background, and disks that refuse."""

import json
import subprocess
import threading
from pathlib import Path

import torch
from harness import main, make_batches, make_engine, make_settings, no_hook

from mede2.trainer import checkpoint_writing
from mede2.trainer.checkpoint import Checkpoints, checkpoint_folders, first_whole, load_checkpoint
from mede2.trainer.data.batches import Batches
from mede2.trainer.engine import Engine
from mede2.trainer.export import export
from mede2.trainer.loop import train
from mede2.trainer.objectives import elicit
from mede2.trainer.settings import Settings
from mede2.trainer.world import World


def run(engine: Engine, batches: Batches, settings: Settings, steps: range) -> list[float]:
    """Losses of Stage I."""
    losses = []
    train(
        engine, elicit, batches.feed(steps), settings, num_steps=10, before_update=no_hook,
        after_update=lambda step, metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    return losses


class SlowDisk:
    """As long as it is closed, torch.save waits on this rank before it begins."""

    def __init__(self):
        self.open, self.save = threading.Event(), torch.save

    def __enter__(self) -> "SlowDisk":
        checkpoint_writing.torch.save = lambda *arguments: self.open.wait() and self.save(*arguments)
        return self

    def __exit__(self, *_) -> None:
        checkpoint_writing.torch.save = self.save


def alike(world: World, job: dict, zero: str, **values) -> dict:
    """The same state written at once and in the background, the latter while two updates are made; then those two
    updates again, from the checkpoint."""
    settings = make_settings(1, micro_batch_size=4, adam_beta1=0.9, **values)
    model, folder = job["models"]["tied"], Path(job["checkpoints"]) / "-".join([zero, *values.values()])
    batches = make_batches(world, model, job["records"]["texts"], 1, settings)
    engine = make_engine(world, model, settings, zero)
    run(engine, batches, settings, range(1))
    Checkpoints(engine, folder / "at once", {}).save(1, {})
    checkpoints = Checkpoints(engine, folder / "behind", {}, in_background=True)
    with SlowDisk() as disk:
        checkpoints.save(1, {})
        losses = run(engine, batches, settings, range(1, 3))
        seen = []
        for opens in (None, 0, 1):  # the disk of no rank, of one, of both
            if opens == world.rank:
                disk.open.set()
                checkpoints._begun[0].wait()
            world.barrier()
            checkpoints.settle()
            seen.append([path.name for path in checkpoint_folders(folder / "behind")])
            world.barrier()
    engine.close()

    engine = make_engine(world, model, settings, zero)
    load_checkpoint(engine, first_whole(checkpoint_folders(folder / "behind"), world))
    again = run(engine, batches, settings, range(1, 3))
    engine.close()
    files = [
        json.loads((folder / way / "step-000001" / "complete.json").read_text())["files"]
        for way in ("at once", "behind")
    ]  # fmt: skip
    return {"losses": losses, "again": again, "seen": seen, "files": files}


def kept(world: World, job: dict) -> dict:
    """Six checkpoints behind each other, each begun while the one before may be under way; two are kept."""
    engine = make_engine(world, job["models"]["tied"], make_settings(1))
    folder = Path(job["checkpoints"]) / "kept"
    checkpoints = Checkpoints(engine, folder, {}, keep=2, keep_every=3, in_background=True)
    for step in range(1, 7):
        checkpoints.save(step, {})
    before = first_whole(checkpoint_folders(folder), world).step
    world.barrier()
    checkpoints.finish()
    after = first_whole(checkpoint_folders(folder), world).step
    checkpoints.finish()  # nothing is left to do
    engine.close()
    return {"before": before, "after": after, "left": sorted(path.name for path in folder.iterdir())}


def refused(world: World, job: dict, disk: str, in_background: bool) -> dict:
    """What is said where a disk with a whole checkpoint on it is too small for the next and for the model, or
    read-only."""
    engine = make_engine(world, job["models"]["tied"], make_settings(1))
    folder = Path(job["disks"][disk]) / "checkpoints"
    checkpoints = Checkpoints(engine, folder, {}, keep=1, in_background=in_background)
    if world.is_main and disk == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    world.barrier()
    said = ""
    try:
        checkpoints.save(7, {})
        checkpoints.finish()
    except ValueError as error:
        said = str(error)
    whole = first_whole(checkpoint_folders(folder), world).step
    exported = ""
    try:
        export(engine, Path(job["models"]["tied"]), folder.parent / ".export.partial", None, "a card")
    except ValueError as error:
        exported = str(error)
    engine.close()
    return {"said": said, "whole": whole, "exported": exported}


SCENARIOS = {
    "z1_bf16": lambda world, job: alike(world, job, "z1", dtype="bf16"),
    "z2": lambda world, job: alike(world, job, "z2"),
    "z3": lambda world, job: alike(world, job, "z3"),
    "kept": kept,
    "full": lambda world, job: refused(world, job, "full", in_background=False),
    "full_behind": lambda world, job: refused(world, job, "full", in_background=True),
    "read-only": lambda world, job: refused(world, job, "read-only", in_background=False),
}

if __name__ == "__main__":
    main(SCENARIOS)
