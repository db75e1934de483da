"""All checks in their order, on the ranks that a launcher started or on two of this node's own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mede2.trainer.doctor.findings import FAIL, WARN, Finding, Report, of_all_nodes

PATIENCE_MINUTES = 2  # that ranks wait for each other
LONGEST_S = 600.0  # that ranks started here may take
GRACE_S = 30.0  # that the others have when one has died
SHARED_CHECKS = ("output", "shared")  # without which no step can be tried


def examine(output: Path, need_gib: float, model: str | None) -> list[str]:
    """Run every check on this rank, and print on rank 0 what all of them found.

    Args:
        output, need_gib, model: see `node.check_node`.

    Returns:
        The checks that FAIL; the same on every rank.
    """
    from mede2.trainer.doctor.node import check_node
    from mede2.trainer.world import join_world

    report = Report(shown=os.environ.get("RANK", "0") == "0")
    try:
        world = join_world(PATIENCE_MINUTES)
    except (RuntimeError, ValueError) as error:
        report(check_node(output, need_gib, model))
        told = str(error).splitlines()[0]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        report([
            Finding(
                "ranks", FAIL, f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot join at {where}"
                f" ({told})", "look at the address, a firewall, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME",
            )
        ])  # fmt: skip
        return report.failed

    from mede2.trainer.doctor.ranks import bandwidth, clocks, shared

    with world:
        mine = [(socket.gethostname(), check_node(output, need_gib, model))] if world.local_rank == 0 else []
        report(of_all_nodes([node for part in world.gather(mine) for node in part]))
        report([clocks(world), bandwidth(world)])
        if "output" not in report.failed:
            report([shared(world, output)])
        if set(SHARED_CHECKS) & set(report.failed):
            report([Finding("step", WARN, "not tried, for want of a folder that all ranks can write and read")])
        else:
            from mede2.trainer.doctor.step import training_step

            name = world.on_main(lambda: f".doctor-step-{os.getpid()}")
            report([training_step(world, output / name)])
    return report.failed


def ranks_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch's launchers would have set, for a process that srun started as one of several; else nothing."""
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1 or "RANK" in environment:
        return {}
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    found = {name: environment[theirs] for name, theirs in names.items()} | {"WORLD_SIZE": str(num_tasks)}
    if "MASTER_ADDR" not in environment:
        command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found["MASTER_ADDR"] = hosts[0]
    if "MASTER_PORT" not in environment:
        found["MASTER_PORT"] = str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    return found


def num_own_ranks() -> int:
    """One for each GPU; two where there is none."""
    if not os.path.exists("/dev/nvidiactl"):
        return 2
    import torch

    return max(1, torch.cuda.device_count())


def start_ranks(num: int) -> int:
    """Run this process's own command once for each of `num` ranks; returns 0 or, where one of them failed, 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num)
    ]
    deadline = time.monotonic() + LONGEST_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.1)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
    return int(any(rank.returncode for rank in ranks))
