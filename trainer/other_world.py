"""A checkpoint continued by another number of ranks, through DeepSpeed's universal format, which knows no ranks."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from mede2.trainer import watchdog
from mede2.trainer.engine import Engine
from mede2.trainer.world import World

CONVERTIBLE = ("adamw", "cpu_adam")  # the format holds fp32 moments, and 8-bit ones are codes with scales
STATES = ("fp32", "exp_avg", "exp_avg_sq")  # files of each trained parameter
CONVERTED = "universal"  # the converted checkpoint, within the folder that `convert` returns
POLL_S = 5.0
GIB = 2**30


def check_convertible(path: Path, wrote: int, world_size: int, optimizer: str) -> None:
    """Raise ValueError if a checkpoint of `wrote` ranks has moments that `world_size` other ranks cannot take over."""
    if wrote != world_size and optimizer not in CONVERTIBLE:
        raise ValueError(
            f"resume: {path} was written by {wrote} ranks with optimizer {optimizer}, whose state DeepSpeed's "
            f"universal format cannot hold, so {world_size} cannot continue it; start {wrote}, or start over with "
            "--resume never"
        )


def convert(path: Path, step: int, folder: Path, world: World) -> Path:
    """Convert a checkpoint whose manifest was verified (its files are pickles); `load` takes what this returns.

    DeepSpeed's own program does it, in a process of its own: it forks workers, which a rank with the threads of its
    group or of a GPU must not; and the ranks meet every few seconds while it runs, so that however long a large model
    takes, no collective waits as long. The result lives until it is loaded. A run that is interrupted before converts
    again: to keep it would take the room of another checkpoint, and another manifest to verify, for what the first
    checkpoint of the new ranks replaces.

    Args:
        path: the checkpoint.
        step: updates that it holds.
        folder: of this run's checkpoints, where `Checkpoints` deletes what an interrupted conversion leaves.
        world: the ranks.

    Raises:
        ValueError: the disk has too little room, or the conversion fails; says what it said.
    """
    running: list[subprocess.Popen] = []  # on rank 0

    def start() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.universal-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        _check_room(path, folder)
        partial = Path(tempfile.mkdtemp(prefix=f".step-{step:06d}.universal-", suffix=".partial", dir=folder))
        num_workers = str(_num_workers(path))
        command = [sys.executable, "-m", "mede2.trainer.unpickling", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--inject_missing_state"]
        command += ["--num_extract_workers", num_workers, "--num_merge_workers", num_workers]
        # relative, as the program takes folders for patterns, and finds nothing where one has a bracket in its name
        command += ["--input_folder", os.path.relpath(path, partial), "--output_folder", CONVERTED]
        with open(partial / "log", "wb") as log:
            running.append(subprocess.Popen(
                command, cwd=partial, env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            ))  # fmt: skip
        return partial

    def wait() -> int | None:
        try:
            return running[0].wait(POLL_S)
        except subprocess.TimeoutExpired:
            return None

    def check(code: int) -> None:
        if code:
            said = (partial / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            shutil.rmtree(partial)
            raise ValueError(f"resume: {path} cannot be converted for another number of ranks ({' '.join(said[-1:])})")

    try:
        partial = world.on_main(start)
        while (code := world.on_main(wait)) is None:
            watchdog.phase(f"converting {path}")
            world.stop_if_asked("while a checkpoint was converted")
        world.stop_if_asked("while a checkpoint was converted")  # which the same signal may have ended
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
    world.on_main(lambda: check(code))
    return partial


def _check_room(path: Path, folder: Path) -> None:
    """Raise ValueError unless the disk takes the fragments of all ranks and, beside them, what is made of them."""
    need = 2 * sum(file.stat().st_size for file in path.rglob("*"))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(
            f"resume: {folder} has {free / GIB:.3g} GiB free, and to convert {path} for another number of ranks takes "
            f"{need / GIB:.3g}; make room, or start as many ranks as wrote it"
        )


def _num_workers(path: Path) -> int:
    """As many as there are files to read and CPUs to do it, if twice their largest files fit into free memory."""
    sizes = [file.stat().st_size for file in path.glob("*_optim_states.pt")]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(sizes), len(os.sched_getaffinity(0)), free // (2 * max(sizes))))


def load(engine: Engine, converted: Path) -> None:
    """Put the engine where a converted checkpoint left it, and delete the conversion.

    The files are mapped into memory: DeepSpeed opens on every rank those of all parameters, and each then reads its
    share instead of the whole.

    What DeepSpeed 0.19 loads is mended: ZeRO-3 gives all groups of parameters the settings of the first one (learning
    rate, weight decay) and all of them one count of updates, which each then counts up; and the counts come on the CPU,
    where fused Adam on a GPU cannot use them.

    Args:
        engine: its configuration says `load_universal`.
        converted: from `convert`.

    Raises:
        ValueError: a trained parameter, or its moments, are not in the conversion.
    """
    zero, world = engine.deepspeed.optimizer, engine.world
    groups = [{name: value for name, value in group.items() if name != "params"} for group in zero.param_groups]
    world.on_main(lambda: _check_complete(engine, converted / CONVERTED / "zero"))
    with serialization.patch("load.mmap", True):
        engine.deepspeed.load_checkpoint(converted, tag=CONVERTED)
    for group, own in zip(zero.param_groups, groups, strict=True):
        group |= own
    for parameter, state in zero.optimizer.state.items():
        if isinstance(state["step"], torch.Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)
    world.barrier()  # all ranks have read
    world.on_main(lambda: shutil.rmtree(converted, ignore_errors=True))  # what is left, the next checkpoint deletes


def _check_complete(engine: Engine, folder: Path) -> None:
    for parameter, name in engine.deepspeed.param_names.items():
        missing = [state for state in STATES if not (folder / name / f"{state}.pt").exists()]
        if parameter.requires_grad and missing:
            raise ValueError(f"resume: the checkpoint, converted, lacks {', '.join(missing)} of {name}")


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed a rank that the checkpoint has no generators of: a pure function of these three. Only dropout reads them."""
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
