"""The ranks of a run: who we are, and the few things that all ranks do together."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from mede2.trainer import watchdog
from mede2.trainer.stopping import ASKED_BY, StopRequested, watcher

Result = TypeVar("Result")
TIMEOUT_MINUTES = 30  # of a collective


@dataclass(frozen=True)
class World:
    """Rank, number of ranks and device of this process. Without a launcher there is one rank."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def on_main(self, do: Callable[[], Result]) -> Result:
        """Do something on rank 0 alone: its result, or what it raises, reaches every rank, so that none waits in vain
        and all ranks see the same files."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [(do(), None)]
            except (ValueError, OSError, RuntimeError) as error:
                outcome = [(None, error)]
        torch.distributed.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in the order of ranks."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: dict[str, torch.Tensor | float]) -> dict[str, float]:
        """Sums over ranks of named scalars, in one fp64 reduction. All ranks pass the same names."""
        total = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values.values()]
        )
        torch.distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def barrier(self) -> None:
        torch.distributed.barrier()

    def asked_to_stop(self) -> str | None:
        """Who asked any of the ranks to stop, or None. All ranks call it, and hear the same."""
        asked = torch.tensor(watcher.asked, device=self.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        index = int(asked)
        return ASKED_BY[index] if index else None

    def stop_if_asked(self, where: str) -> None:
        """Raise StopRequested on every rank if any of them was asked to stop. All ranks call it, where nothing that
        was done would be lost; `where` says so to people."""
        if who := self.asked_to_stop():
            watchdog.phase("stopping")
            raise StopRequested(f"stopped by {who} {where}")

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """End the group, the last thing that its ranks do together: a process that ends without it now and then aborts
        in the group's own threads. After an error the others may not get here, and the process just exits."""
        if kind is None or kind is StopRequested:
            self.barrier()  # launchers end all ranks as soon as one exits with anything but 0
            torch.distributed.destroy_process_group()


def join_world(timeout_minutes: float = TIMEOUT_MINUTES) -> World:
    """Join the ranks that the launcher started (`deepspeed`, `torchrun`, SLURM), or be the only one.

    DeepSpeed reads the same environment; a process started by plain python gets it filled in here.

    Args:
        timeout_minutes: longest wait for the others in a collective. Then gloo raises, and NCCL's own thread ends the
            process, whatever it waits in.
    """
    rank, size = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if not torch.distributed.is_initialized():
        store = None
        if "MASTER_PORT" not in os.environ:
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
            os.environ["MASTER_PORT"] = str(store.port)
        torch.distributed.init_process_group(
            backend, rank=rank, world_size=size, store=store, timeout=timedelta(minutes=timeout_minutes)
        )
    return World(rank, local_rank, size, device)
