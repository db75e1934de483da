"""Who may write an output folder: one attempt of one job. An attempt that was thought dead finds that it may not."""

import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mede2.trainer.files import write_json

OWNER = "owner.json"  # of an output folder


class OutputLost(RuntimeError):
    """The output folder belongs to a later attempt: this one has to end, and must not be started again."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        job: SLURM's job id; None outside SLURM.
        restart: how often SLURM has requeued the job.
        host: where rank 0 runs.
        pid: of rank 0.
        started: clock ticks from the host's boot to the start of rank 0; with `pid` it tells processes apart.
        token: no other attempt has it.
        ended: whether it came to an end in order.
    """

    job: str | None
    restart: int
    host: str
    pid: int
    started: int | None
    token: str
    ended: bool = False

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return f"job {self.job}, restart {self.restart} ({process})" if self.job else process

    @property
    def lives_here(self) -> bool:
        """Whether it is another process of this host that is still there, be it halted."""
        here = self.host == socket.gethostname() and self.pid != os.getpid()
        return here and self.started is not None and self.started == _start_ticks(self.pid)

    def succeeds(self, other: "Attempt") -> bool:
        """Whether it is a later start of the same job, so that SLURM has given the other one up."""
        return self.job is not None and self.job == other.job and self.restart > other.restart


def this_attempt() -> Attempt:
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    pid = os.getpid()
    return Attempt(job or None, restart, socket.gethostname(), pid, _start_ticks(pid), secrets.token_hex(8))


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, proc(5); None where there is no such process, or only its exit code waits."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name, in parentheses before it, may hold anything
    return None if state in "ZX" else int(fields[18])


@dataclass(frozen=True)
class Ownership:
    """The claim of this attempt on an output folder. Rank 0 makes the calls; all ranks hold the same claim.

    A lock would die with its host's connection to the shared folder, or outlive it. The owner's file does neither: it
    is replaced as a whole, the last to replace it is the owner, and who finds another's token there writes no more.
    Opening it asks a network file system for its newest content.
    """

    output: Path
    ours: Attempt = field(default_factory=this_attempt)

    @property
    def token(self) -> str:
        return self.ours.token

    def check_free(self) -> Attempt | None:
        """The attempt that `take` would take the folder from, if there is one.

        Raises:
            ValueError: it is a process of this host that is still there; a later start of the same job does not wait
                for it.
            OutputLost: it is a later start of our own job.
        """
        owner = self._read()
        if owner is None or owner.token == self.token:
            return None
        if owner.succeeds(self.ours):
            raise OutputLost(f"output: {self.output} belongs to {owner}, a later start of this job")
        if owner.lives_here and not owner.ended and not self.ours.succeeds(owner):
            raise ValueError(
                f"output: {self.output} is being written by {owner}, which is still there; wait for it, end it, or "
                "name another --output"
            )
        return owner

    def take(self, say: Callable[[str], None]) -> None:
        """Make the folder ours, and say from whom where that one did not end in order.

        Raises:
            ValueError, OutputLost: as `check_free`; the folder cannot be written.
        """
        former = self.check_free()
        self._write(self.ours)
        if former and not former.ended:
            say(f"{self.output} is taken over from {former}, which did not end in order")

    def check(self) -> None:
        """Called before everything that others would see.

        Raises:
            OutputLost: the folder is no longer ours; names who has it.
        """
        owner = self._read()
        if owner is None or owner.token != self.token:
            has_it = owner or f"nobody ({OWNER} is gone or damaged)"
            raise OutputLost(
                f"output: {self.output} now belongs to {has_it}; this attempt, {self.ours}, ends and writes no more"
            )

    def write(self, do: Callable[[], None]) -> None:
        """Do what others would see in the folder.

        Raises:
            OutputLost: as `check`; nothing was done.
            ValueError: the disk refuses.
        """
        self.check()
        with self._refusals():
            do()

    def release(self) -> None:
        """Leave word that this attempt came to its end in order."""
        self.check()
        self._write(Attempt(**asdict(self.ours) | {"ended": True}))

    def _read(self) -> Attempt | None:
        try:
            return Attempt(**json.loads((self.output / OWNER).read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def _write(self, attempt: Attempt) -> None:
        beside = self.output / f".{self.token}.{OWNER}"  # a name of its own: two may take the folder at once
        with self._refusals():
            self.output.mkdir(parents=True, exist_ok=True)
            write_json(beside, asdict(attempt))
            os.replace(beside, self.output / OWNER)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"output: {self.output} cannot be written ({error.strerror or error}); when it can, the same command "
                "continues from the last checkpoint"
            ) from error
