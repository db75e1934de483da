"""Whole runs on one number of ranks, cut short and continued on another."""

import contextlib
import io
import shutil
from pathlib import Path

import torch
from harness import DS_CONFIGS, main

from mede2.trainer import run
from mede2.trainer.data.batches import Feed
from mede2.trainer.engine import Engine
from mede2.trainer.objectives import Objective
from mede2.trainer.resolution import resolve
from mede2.trainer.world import World

SMALL = {
    "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "weight_decay": 0.5, "max_length": 512,
    "dtype": "fp32", "epochs": 2, "save_every": 1, "keep_checkpoints": 0, "num_workers": 0,
}  # fmt: skip
MIX = {"sigmoid": 0.8, "bco_pair_shifted": 0.2, "nll": 1.0}  # with a state that must come along
CASES = {  # stage, DeepSpeed file, records, settings beyond the usual; two updates an epoch
    "z3": (2, "z3", "pairs", {"objective": MIX}),
    "z1": (1, "z1", "texts", {"max_steps": 3}),
    "lora": (1, "z2", "texts", {"max_steps": 3, "lora_rank": 4}),
}


def train(world: World, job: dict, case: str, output: str, before_training=lambda engine: None, **values) -> dict:
    """Run a case to its end in the folder `output`, or continue what is there; says what this rank trained on, where
    its optimizer ended, and what the run said."""
    stage, zero, records, more = CASES[case]
    given = SMALL | more | values | {"model": job["models"]["tied"], "train": [job["records"][records]]}
    resolved = resolve(stage, [("test", given | {"output": str(Path(job["runs"]) / output)})])
    result = {"said": ""}

    def watched(engine: Engine, objective: Objective, feed: Feed, *arguments, **named) -> None:
        rows: dict[int, list[int]] = {step: [] for step in feed.steps}
        take = feed.micro_batches

        def micro_batches(step: int):
            for batch in take(step):
                counts = batch.weights[: len(batch.indices)].tolist()
                rows[step] += [index for index, count in zip(batch.indices, counts, strict=True) if count]
                yield batch

        feed.micro_batches = micro_batches
        before_training(engine)
        result["generator"] = torch.get_rng_state()
        original(engine, objective, feed, *arguments, **named)
        states = engine.deepspeed.optimizer.optimizer.state.values()
        result.update(
            rows=rows, counts=sorted({float(state["step"]) for state in states}),
            global_steps=engine.deepspeed.global_steps, skipped_steps=engine.deepspeed.skipped_steps,
        )  # fmt: skip

    original, run.train = run.train, watched
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run.run_stage(resolved, str(DS_CONFIGS / f"{zero}.json"), world)
        result["said"] = said.getvalue()
    except ValueError as error:
        result["refused"] = str(error)
    finally:
        run.train = original
    return result


def cut_short(world: World, job: dict, source: str, target: str, step: int) -> None:
    """Make `target` what the run in `source` would have left, killed an update after its checkpoint of `step`."""
    of, to = Path(job["runs"]) / source, Path(job["runs"]) / target
    if world.is_main:
        name = f"step-{step:06d}"
        shutil.copytree(of / "checkpoints" / name, to / "checkpoints" / name)
        shutil.copy(of / "identity.json", to)
        rows = (of / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (to / "metrics.jsonl").write_text("".join(rows[: step + 1]), encoding="utf-8")
    world.barrier()


def continued(world: World, job: dict, case: str, source: str, step: int, **more) -> dict:
    target = f"{case}-{world.size}" if not more else f"{case}-{world.size}-otherwise"
    cut_short(world, job, source, target, step)
    return train(world, job, case, target, **more)


def forget(engine: Engine) -> None:
    """Lose Adam's moments, as a conversion without them would."""
    for state in engine.deepspeed.optimizer.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


SCENARIOS = {
    **{f"{case} whole": lambda world, job, case=case: train(world, job, case, f"{case}-2") for case in CASES},
    "z1 forgotten": lambda world, job: continued(world, job, "z1", "z1-2", 2, before_training=forget),
    "z3 from two": lambda world, job: continued(world, job, "z3", "z3-2", 1),
    "z3 from one": lambda world, job: continued(world, job, "z3", "z3-1", 2),
    "z1 from two": lambda world, job: continued(world, job, "z1", "z1-2", 2),
    "lora from two": lambda world, job: continued(world, job, "lora", "lora-2", 1),
    "z3 undivided": lambda world, job: continued(world, job, "z3", "z3-2", 1, micro_batch_size=3),
}

if __name__ == "__main__":
    main(SCENARIOS)
