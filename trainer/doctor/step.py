"""A training step on the ranks of a node or of several: one update of the small model that ships here, under ZeRO-3."""

import contextlib
import io
import json
import logging
import math
import shutil
import time
from pathlib import Path

import torch

from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.demo.records import write_stage2
from mede2.trainer.doctor.findings import FAIL, OK, Finding
from mede2.trainer.engine import Engine, make_optimizer
from mede2.trainer.export import TOLERANCE
from mede2.trainer.loop import train
from mede2.trainer.objectives import Enhance
from mede2.trainer.policy import PARTS, freeze, load_policy, quiet_transformers
from mede2.trainer.prepare import prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import ENHANCE
from mede2.trainer.world import World

STEP = {
    "model": str(BASE_MODEL), "objective": {"nll": 1.0}, "learning_rate": 1e-3, "warmup_ratio": 0.0, "max_steps": 1,
    "num_workers": 0,
}  # fmt: skip


def training_step(world: World, folder: Path) -> Finding:
    """One update of the small model that ships here, on pairs with images, under ZeRO-3.

    Args:
        world: the ranks.
        folder: on the shared disk; made, and deleted again.
    """
    notes = io.StringIO()
    before = logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(notes):
            logging.disable(logging.WARNING)  # what DeepSpeed tells of its set-up
            return _training_step(world, folder)
    except (RuntimeError, ValueError, OSError) as error:
        return Finding("step", FAIL, f"a step under ZeRO-3 ends in {type(error).__name__}: {error}", "see above")
    finally:
        logging.disable(before)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _training_step(world: World, folder: Path) -> Finding:
    quiet_transformers()
    started = time.perf_counter()
    records = world.on_main(lambda: write_stage2(folder, 2 * world.size, seed=0))
    config = folder / "zero3.json"
    world.on_main(lambda: config.write_text(json.dumps({"zero_optimization": {"stage": 3}})))
    asked = STEP | {"train": [str(records)], "global_batch_size": 2 * world.size}
    run = prepare(resolve(ENHANCE, [("doctor", asked)]), str(config), folder / "stage2", world)
    policy = load_policy(
        run.model, dtype=run.dtype, attention=run.settings.attention, implementation=run.implementation,
        deepspeed_config=run.config,
    )  # fmt: skip
    freeze(policy, dict.fromkeys(PARTS, True))
    engine = Engine(policy, run.config, world, run.dtype, make_optimizer(policy, run.settings))
    first = run.train.sampler.micro_batches(0, 0)[0]  # rank 0's: the same rows on all ranks
    probe = run.train.collator(run.train.dataset.examples, first).to(world.device, run.dtype)
    seen: dict[str, float] = {}

    def keep(step: int, metrics: dict[str, float]) -> None:
        seen.update(metrics)

    with torch.no_grad():
        before = engine(probe)
    train(
        engine, Enhance(run.settings, None), run.train.feed(range(1)), run.settings, num_steps=1,
        before_update=lambda step, metrics: None, after_update=keep,
    )  # fmt: skip
    with torch.no_grad():
        after = engine(probe)
    engine.close()
    moved = float((after - before).abs().max())
    everyones = torch.tensor(world.gather(after.tolist()))  # (ranks, N), of the same rows under weights that are one
    apart = float((everyones - everyones[0]).abs().max())
    faults = {
        f"the loss is {seen['loss']}": not math.isfinite(seen["loss"]),
        "no weight has moved": not moved > 0,
        f"ranks hold weights whose log-probabilities differ by {apart:.1e}": not apart <= TOLERANCE[run.dtype],
    }
    if told := [fault for fault, holds in faults.items() if holds]:
        return Finding("step", FAIL, "; ".join(told), "a GPU or the network is broken: try other nodes")
    text = f"ZeRO-3, {world.size} ranks, {time.perf_counter() - started:.0f} s: loss {seen['loss']:.3g}"
    return Finding("step", OK, f"{text}, weights moved and are alike on all ranks")
