"""Checks of the ranks together: clocks, the shared folder, bandwidth, and a training step under ZeRO-3."""

import contextlib
import io
import json
import logging
import math
import shutil
import time
from pathlib import Path
from uuid import uuid4

import torch

from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.demo.records import write_stage2
from mede2.trainer.doctor.findings import FAIL, OK, WARN, Finding, worst
from mede2.trainer.engine import Engine, make_optimizer
from mede2.trainer.export import TOLERANCE
from mede2.trainer.loop import train
from mede2.trainer.objectives import Enhance
from mede2.trainer.policy import PARTS, freeze, load_policy, quiet_transformers
from mede2.trainer.prepare import prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import ENHANCE
from mede2.trainer.world import World

ROUNDS = 5
SKEW_S = {WARN: 1.0, FAIL: 60.0}
SEEN_WITHIN_S = 10.0  # what network folders keep of a listing
ALL_REDUCE_BYTES = {"cuda": 2**28, "cpu": 2**24}
SLOW_GB_S = 5.0  # bus bandwidth of GPUs: less than a PCIe link or a 100 Gb/s network gives
STEP = {
    "model": str(BASE_MODEL), "objective": {"nll": 1.0}, "learning_rate": 1e-3, "warmup_ratio": 0.0, "max_steps": 1,
    "num_workers": 0,
}  # fmt: skip


def clocks(world: World) -> Finding:
    """How far the ranks' clocks are apart, as far as a barrier can tell: the least of some rounds."""
    spreads = []
    for _ in range(ROUNDS):
        world.barrier()
        times = world.gather(time.time())
        spreads.append(max(times) - min(times))
    level = worst({name: min(spreads) > limit for name, limit in SKEW_S.items()})
    text = f"clocks of {world.size} ranks within {min(spreads):.3g} s"
    return Finding("skew", level, text, "" if level == OK else "chrony or ntpd on every node")


def shared(world: World, output: Path) -> Finding:
    """Whether what rank 0 writes into the output folder is seen, and alike, by all ranks."""
    token, path = world.on_main(lambda: uuid4().hex), output / ".doctor-shared"
    world.on_main(lambda: path.write_text(token))
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (seen := _holds(path, token)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(world.gather(seen)) if not sees]
    world.on_main(lambda: path.unlink(missing_ok=True))
    if blind:
        return Finding(
            "shared", FAIL, f"ranks {', '.join(map(str, blind))} do not see what rank 0 writes in {output}",
            "name an --output on a disk that all nodes share",
        )  # fmt: skip
    return Finding("shared", OK, f"all {world.size} ranks see what rank 0 writes in the output folder")


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def bandwidth(world: World) -> Finding:
    """An all-reduce of 256 MiB (on a CPU 16) over all ranks: its sum, and its rate.

    The bus bandwidth is what each rank's link carries, 2 (n - 1) / n of the bytes in the time, and so comparable
    between numbers of ranks (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    backend = torch.distributed.get_backend()
    if world.size == 1:
        return Finding(backend, OK, "one rank: nothing goes between ranks")
    num_bytes = ALL_REDUCE_BYTES[world.device.type]
    tensor = torch.full((num_bytes // 4,), float(world.rank + 1), device=world.device)
    torch.distributed.all_reduce(tensor)  # opens the connections, too
    right = bool((tensor == world.size * (world.size + 1) / 2).all())
    seconds = []
    for _ in range(ROUNDS):
        world.barrier()
        _wait(world)
        started = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        _wait(world)
        seconds.append(max(world.gather(time.perf_counter() - started)))
    rate = num_bytes / sorted(seconds)[ROUNDS // 2] / 1e9
    bus = rate * 2 * (world.size - 1) / world.size
    text = f"all-reduce of {num_bytes >> 20} MiB over {world.size} ranks: {rate:.3g} GB/s, bus {bus:.3g} GB/s"
    if not all(world.gather(right)):
        return Finding(backend, FAIL, f"{text}, and its sum is wrong", "the network or a GPU is broken; try others")
    if backend == "nccl" and bus < SLOW_GB_S:
        return Finding(backend, WARN, text, "NCCL_DEBUG=INFO says by which way it goes (NVLink, InfiniBand, sockets)")
    return Finding(backend, OK, text)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


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
