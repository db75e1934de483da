"""Checks of the ranks together: clocks, the shared folder, and what goes between them in a second."""

import time
from pathlib import Path
from uuid import uuid4

import torch

from mede2.trainer.doctor.findings import FAIL, OK, WARN, Finding, worst
from mede2.trainer.world import World

ROUNDS = 5
SKEW_S = {WARN: 1.0, FAIL: 60.0}
SEEN_WITHIN_S = 10.0  # what network folders keep of a listing
ALL_REDUCE_BYTES = {"cuda": 2**28, "cpu": 2**24}
SLOW_GB_S = 5.0  # bus bandwidth of GPUs: less than a PCIe link or a 100 Gb/s network gives


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
    token = world.on_main(lambda: uuid4().hex)
    path = output / f".doctor-shared-{token}"
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
