"""A Stage II that is asked to stop in one phase after another, beside one that nobody disturbs."""

import functools
import importlib
import os
import signal
import subprocess
from pathlib import Path

from harness import DS_CONFIGS, main

from mede2.trainer import stopping
from mede2.trainer.resolution import resolve
from mede2.trainer.run import run_stage
from mede2.trainer.stopping import FOLDER_VARIABLE, STOP_FILE, StopRequested
from mede2.trainer.world import World

SETTINGS = {
    "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-4, "max_length": 512, "dtype": "fp32",
    "epochs": 2, "eval_every": 2, "save_every": 3, "objective": {"sigmoid": 0.8, "bco_pair_shifted": 0.2, "nll": 1.0},
    "lora_rank": 4, "lora_dropout": 0.2,  # so that the random number generators matter
}  # fmt: skip


def one(*numbers: int):
    """Signals to this rank alone."""
    for number in numbers:
        os.kill(os.getpid(), number)


def group(*numbers: int):
    """Signals to this rank and its data workers, by somebody else, as SLURM and the launchers send them."""
    for number in numbers:
        kill = ["kill", "-s", signal.Signals(number).name, "--", f"-{os.getpgid(0)}"]
        subprocess.run(kill, start_new_session=True, check=True)


def touch(*_):
    (Path(os.environ[FOLDER_VARIABLE]) / STOP_FILE).touch()


# phase: the function in which it happens, at which of its calls, on which ranks, and what
MOMENTS = {
    "data": ("data.encoding", "Encoder.__call__", 2, [1], one, signal.SIGUSR1),
    "loading": ("run", "describe", 1, [0], one, signal.SIGTERM),
    "reference": ("engine", "Engine.answer_logps", 1, [1], one, signal.SIGTERM),
    "training": ("engine", "Engine.backward", 2, [0, 1], group, signal.SIGUSR1, signal.SIGTERM),  # 1: the rehearsal's
    "evaluation": ("engine", "Engine.__call__", 3, [0], touch),  # after the rehearsal and the update
    "owed evaluation": ("engine", "Engine.__call__", 1, [0], one, signal.SIGUSR1),
    "saving": ("checkpoint", "save_tensors", 1, [1], one, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM),
    "last evaluation": ("engine", "Engine.__call__", 3, [1], one, signal.SIGTERM),
    "export": ("run", "export", 1, [1], one, signal.SIGTERM),
    "": ("run", "export", 0, [], one),
}


def run(world: World, job: dict, name: str, phase: str) -> dict:
    """Start the run of this name, to be asked to stop in `phase`; what it says, and what it leaves."""
    module, function, wanted, ranks, ask, *numbers = MOMENTS[phase]
    holder = importlib.import_module(f"mede2.trainer.{module}")
    *owner, attribute = function.split(".")
    holder = getattr(holder, owner[0]) if owner else holder
    real, calls = getattr(holder, attribute), []

    @functools.wraps(real)
    def asking(*arguments, **options):
        calls.append(attribute)
        if len(calls) == wanted and world.rank in ranks:
            ask(*numbers)
        return real(*arguments, **options)

    output = Path(job["runs"]) / name / "stage2"
    folder = Path(job["runs"]) / f"signals of {name} in {phase or 'no phase'}"
    world.on_main(lambda: folder.mkdir(parents=True))
    os.environ[FOLDER_VARIABLE] = str(folder)
    stopping.POLL_S = 0.0
    stopping.watcher.__init__()  # as in a new process
    stopping.watcher.install()
    pairs = job["records"]["pairs"]
    values = SETTINGS | {"model": job["models"]["tied"], "train": [pairs], "eval": pairs, "output": str(output)}
    setattr(holder, attribute, asking)
    try:
        run_stage(resolve(2, [("test", values)]), str(DS_CONFIGS / "z3.json"), world)
        said = "done"
    except StopRequested as stop:
        said = str(stop)
    finally:
        setattr(holder, attribute, real)
    world.barrier()
    rows = output / "metrics.jsonl"
    return {
        "said": said, "calls": len(calls), "rows": len(rows.read_text().splitlines()) if rows.exists() else 0,
        "checkpoints": sorted(path.name for path in (output / "checkpoints").glob("step-*")),
        "cache": sorted(path.suffixes[0] for path in (output.parent / "reference_cache").glob("*")),
        "published": (output / "model.safetensors").exists(),
    }  # fmt: skip


def undisturbed(world: World, job: dict) -> dict:
    return run(world, job, "undisturbed", "")


def stopped(world: World, job: dict) -> dict:
    """Each start goes on where the one before it was stopped."""
    return {phase: run(world, job, "stopped", phase) for phase in MOMENTS}


SCENARIOS = {"undisturbed": undisturbed, "stopped": stopped}

if __name__ == "__main__":
    main(SCENARIOS)
