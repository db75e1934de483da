"""Two ranks of a command, started, killed, and waited for; see campaign_faults.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import campaign_rank
from campaign_rank import JOB, Job, Moment

LAUNCHERS = {  # with their options; the port follows
    "torchrun": ("--nproc_per_node", "2", "--master_port"),
    "deepspeed": ("--num_gpus", "2", "--master_port"),
}
RANKS = range(2)
GRACE_S, TERM_S = 3.0, 3.0  # for a forked rank whose peer has ended: to end by itself, and after SIGTERM
HANGS_S = 600.0  # a start that takes longer hangs
TICK_S = 0.01


@dataclass(frozen=True)
class Start:
    """One start of the ranks, which have ended.

    Attributes:
        codes: of the ranks, or of their launcher; negative: the signal that ended it.
        moment: at which victims were killed; None: they were not.
        came_from: the update whose checkpoint was loaded; None: none was.
        survivors: how those ended that were not killed.
        seconds: from the ranks' beginning to their end.
        log: what they printed.
    """

    codes: list[int]
    moment: Moment | None
    came_from: int | None
    survivors: str
    seconds: float
    log: str


class Forked:
    """Ranks that a fork server starts; this process stands for their launcher."""

    def __init__(self, arguments: list[str], job: Job, log: Path, port: str):
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        for rank in RANKS:
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = get_context("forkserver").Process(
                target=campaign_rank.forked, args=(arguments, environment, job, log), name=f"rank {rank}"
            )
            process.start()
            self.processes.append(process)
        self.first_end: float | None = None
        self.told = "by itself"

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def look_after(self) -> None:
        """What launchers do when a rank has failed: the others may end by themselves, are asked to, are killed."""
        if not any(self.codes()):
            return
        self.first_end = self.first_end or time.monotonic()
        waited = time.monotonic() - self.first_end
        if waited > GRACE_S + TERM_S:
            self.told = "killed"
            self.send(signal.SIGKILL)
        elif waited > GRACE_S and self.told == "by itself":
            self.told = "after SIGTERM"
            self.send(signal.SIGTERM)

    def survivors(self, victims: tuple[int, ...]) -> str:
        left = [code for rank, code in enumerate(self.codes()) if rank not in victims]
        return ", ".join(f"exit {code} {self.told}" for code in left) or "none"


class Launched:
    """Ranks of a real launcher."""

    def __init__(self, launcher: str, arguments: list[str], job: Job, log: Path, port: str):
        left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_SIZE", "PYTHONSAFEPATH")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        beside_python = str(Path(sys.executable).with_name(launcher))
        command = [beside_python, *LAUNCHERS[launcher], port, campaign_rank.__file__, *arguments]
        self.folder = Path(job.folder)
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, env=environment | {JOB: job.as_json()}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def codes(self) -> list[int | None]:
        return [self.process.poll()]

    def send(self, number: int) -> None:
        pids = [int(path.read_text() or 0) for path in self.folder.glob("pid-*")]
        for pid in [*filter(is_there, pids), self.process.pid]:
            os.kill(pid, number)

    def look_after(self) -> None:
        """It does so itself."""

    def survivors(self, victims: tuple[int, ...]) -> str:
        return f"launcher: exit {self.process.poll()}"


def is_there(pid: int) -> bool:
    """Whether a rank is still running."""
    path = Path(f"/proc/{pid}/stat")
    return pid > 0 and path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def start_ranks(arguments: list[str], job: Job, launcher: str, after_s: float | None = None) -> Start:
    """Start two ranks and wait until they have ended.

    Args:
        arguments: of launch/stage2.py.
        job: of the ranks; its folder is there, and empty.
        launcher: "fork", or one of LAUNCHERS.
        after_s: kill the victims this long after both ranks have begun, instead of at a moment.
    """
    folder = Path(job.folder)
    log, reached, resumed = folder / "log", folder / "reached", folder / "resumed"
    log.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = (arguments, job, log, port)
    ranks = Forked(*place) if launcher == "fork" else Launched(launcher, *place)
    began, hangs_at, hung = None, time.monotonic() + HANGS_S, False
    try:
        while None in ranks.codes():
            if began is None and all((folder / f"where-{rank}").exists() for rank in RANKS):
                began = time.monotonic()
            if after_s is not None and began and time.monotonic() > began + after_s:
                _kill_now(job, folder)
                after_s = None
            if time.monotonic() > hangs_at:
                hung = True
                break
            ranks.look_after()
            time.sleep(TICK_S)
    finally:
        if None in ranks.codes():
            ranks.send(signal.SIGKILL)
    while None in ranks.codes():
        time.sleep(TICK_S)
    return Start(
        ranks.codes(), Moment(**json.loads(reached.read_text())) if reached.exists() else None,
        int(resumed.read_text()) if resumed.exists() else None,
        f"hung for {HANGS_S:.0f} s" if hung else ranks.survivors(job.victims), time.monotonic() - (began or hangs_at),
        log.read_text(errors="replace"),
    )  # fmt: skip


def _kill_now(job: Job, folder: Path) -> None:
    """Kill the victims wherever they are, and note where the first of them was."""
    pids = [int((folder / f"pid-{rank}").read_text()) for rank in job.victims]
    if not all(map(is_there, pids)):
        return
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    where = (folder / f"where-{job.victims[0]}").read_text().strip()
    found = Moment(**json.loads(where)) if where else Moment("start", "begins", "", 0, 1)
    last = replace(found, phase="any", name=f"after {found.phase}: {found.name}")
    (folder / "reached").write_text(json.dumps(asdict(last)))
