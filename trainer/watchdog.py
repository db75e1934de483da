"""A rank that hangs, or whose peers are gone, puts its stacks into the log and ends; it does not wait for ever.

The main thread says what it begins (`beat`, `phase`); a thread of its own watches. The time within which a job ends:

- A rank that hangs in training, evaluation or the reference pass: `hang_minutes` after its last sign of life, and
  GRACE_S more. The others wait for it in a collective, so they fall silent and speak at about the same time.
- A rank that hangs in a phase (checking data, loading, saving, exporting): PHASE_MINUTES, or `hang_minutes` if that is
  more.
- A rank that dies: the others hang in their next collective; under gloo only until the dead rank's data workers, which
  hold its sockets too, have noticed and are gone, in 5 s: then a connection error is raised, and its traceback is the
  stack. The launcher notices the death within a second or so and sends SIGTERM, which a Python handler (stopping.py)
  does not see from within a collective, but the thread does. After TERM_S of silence it writes the stacks, and ends the
  rank when the silence is TERM_S longer than twice the longest so far; in a phase, whose length tells nothing, the
  launcher's KILL ends it, 30 s after its TERM. A death that no launcher notices is a hang.

The process group's own timeout (`collective_minutes`) is longer, as NCCL's thread aborts a process without a word of
where it was; TORCH_NCCL_ASYNC_ERROR_HANDLING need not be set (its default tears the process down, too).

A beat costs a microsecond. Where the main thread holds the interpreter's lock, so that no thread can run, the timer of
faulthandler, which needs no lock, writes the stacks and ends the rank MARGIN_S later. A job that was suspended for
longer than its allowance is taken for hung when it wakes.
"""

import faulthandler
import math
import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass

from mede2.trainer.stopping import FAILED

POLL_S = 0.5
GRACE_S = 5.0  # between a rank's stacks and its end: the others write theirs before the launcher ends them
TERM_S = 10.0
MARGIN_S = 30.0
PHASE_MINUTES = 120.0  # a checkpoint of 70 billion parameters, written or read at 100 MB/s a rank, takes less
STDERR = 2  # the descriptor: sys.stderr may be anything
PIPE_BYTES = 4096  # of pipe(7): written in one piece, whoever else writes


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        at: time.monotonic() in seconds.
        doing: what begins.
        allowance_s: how long it may take.
        is_phase: whether its length says nothing about a hang before the allowance is over.
    """

    at: float
    doing: str
    allowance_s: float
    is_phase: bool


class Watchdog:
    """Watches the main thread of this process, which makes it.

    Args:
        rank: of this process.
        hang_minutes: allowance of what is no phase.
    """

    def __init__(self, rank: int, hang_minutes: float):
        self.name = f"rank {rank} on {socket.gethostname()} (pid {os.getpid()})"
        self.hang_s = 60 * hang_minutes
        self.phase_s = max(60 * PHASE_MINUTES, self.hang_s)
        self.last = Beat(time.monotonic(), "starting", self.phase_s, True)
        self.longest_s = math.inf  # between two beats that are no phase; unknown before the second
        self.term_at: float | None = None
        self.told = False  # of the last SIGTERM
        faulthandler.enable(STDERR)  # stacks where NCCL aborts the process, or it crashes
        self.signals, sender = socket.socketpair()
        sender.setblocking(False)
        self.sender, self.signals_before = sender, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self.main_thread, self.ended = threading.get_ident(), False
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def beat(self, doing: str) -> None:
        now, last = time.monotonic(), self.last
        if not last.is_phase:
            self.longest_s = now - last.at if math.isinf(self.longest_s) else max(self.longest_s, now - last.at)
        self.last = Beat(now, doing, self.hang_s, False)

    def phase(self, doing: str) -> None:
        self.last = Beat(time.monotonic(), doing, self.phase_s, True)

    def end(self) -> None:
        """Watch no more."""
        self.ended = True
        self.thread.join()
        signal.set_wakeup_fd(self.signals_before)
        self.signals.close()
        self.sender.close()

    def _watch(self) -> None:
        while not self.ended:
            left_s = self.last.at + self.last.allowance_s - time.monotonic()
            faulthandler.dump_traceback_later(max(0.0, left_s) + GRACE_S + MARGIN_S, exit=True, file=STDERR)
            self._look(time.monotonic(), self.last)
            if select.select([self.signals], [], [], POLL_S)[0] and signal.SIGTERM in self.signals.recv(PIPE_BYTES):
                self.term_at, self.told = time.monotonic(), False
        faulthandler.cancel_dump_traceback_later()

    def _look(self, now: float, last: Beat) -> None:
        silent_s = now - last.at
        if silent_s > last.allowance_s:
            self._tell(f"has given no sign of life for {silent_s:.0f} s, since it began: {last.doing}; it ends")
            self._exit()
        if self.term_at is None:
            return
        silent_s = now - max(self.term_at, last.at)
        if silent_s > TERM_S and not self.told:
            self.told = True
            self._tell(f"got SIGTERM and has been busy for {silent_s:.0f} s since, with: {last.doing}")
        if not last.is_phase and silent_s > TERM_S + 2 * self.longest_s:
            self._tell(f"got SIGTERM and is stuck in: {last.doing}; it ends", with_stacks=False)
            self._exit()

    def _tell(self, text: str, with_stacks: bool = True) -> None:
        """Write a headline and the stacks of all threads in lines that name the rank, as all ranks share the log."""
        lines = [f"watchdog: {self.name} {text}"]
        if with_stacks:
            with os.fdopen(os.memfd_create("stacks"), "rb") as file:  # in memory: the disks may be what hangs
                faulthandler.dump_traceback(file)
                file.seek(0)
                stacks = file.read().decode(errors="replace")
            lines += stacks.replace(f"Thread 0x{self.main_thread:016x}", "Main thread").splitlines()
        rank = self.name.partition(" on ")[0]
        piece = b""
        for line in lines:
            line = f"[{rank}] {line}\n".encode()
            if len(piece) + len(line) > PIPE_BYTES:
                os.write(STDERR, piece)
                piece = b""
            piece += line
        os.write(STDERR, piece)

    def _exit(self) -> None:
        time.sleep(GRACE_S)
        os._exit(FAILED)


_watchdog: Watchdog | None = None  # of this process


def start(rank: int, hang_minutes: float) -> None:
    """Watch this process from now on, which the main thread calls. Without it `beat` and `phase` do nothing.

    Args:
        rank: of this process.
        hang_minutes: how long one micro-batch, one update or the wait for data may take.
    """
    global _watchdog
    stop()
    _watchdog = Watchdog(rank, hang_minutes)


def stop() -> None:
    """Watch no more."""
    global _watchdog
    if _watchdog:
        _watchdog.end()
    _watchdog = None


def beat(doing: str) -> None:
    """The main thread lives, and begins something that takes less than `hang_minutes`."""
    if _watchdog:
        _watchdog.beat(doing)


def phase(doing: str) -> None:
    """The main thread lives, and begins something that takes less than PHASE_MINUTES; until the next `beat`."""
    if _watchdog:
        _watchdog.phase(doing)


def collective_minutes(hang_minutes: float) -> float:
    """Timeout of the process group: the watchdog speaks first."""
    return max(PHASE_MINUTES, hang_minutes) + 30


def _forget() -> None:
    """In a forked child, such as a worker of the data: signals to it are no news of this rank."""
    global _watchdog
    if _watchdog:
        _watchdog = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
