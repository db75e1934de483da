"""Stopping on request: how a command ends, who may ask it to stop, and how that is noticed."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

DONE, FAILED, USER_ERROR, REQUEUE = 0, 1, 2, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again later"
EXIT_CODES = (
    f"Exit codes: {DONE} done; {FAILED} failed; {USER_ERROR} an error that you can mend; {REQUEUE} stopped on request "
    "(SIGTERM, SIGUSR1, the job's end), the same command continues."
)

FOLDER_VARIABLE = "MEDE2_SIGNAL_FOLDER"  # of the batch shell and this attempt alone, on the shared disk
STOP_FILE, REQUEUE_FILE = "stop", "requeue"  # in it: made by the shell, and by rank 0 in answer
START_VARIABLE, END_VARIABLE = "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"  # epoch seconds; SLURM sets them from 23.02

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ASKED_BY = ("nobody", "the stop file", "the end of the job's time", "SIGUSR1", "SIGTERM")  # ranks take the last
MARGIN_S = 120.0
POLL_S = 1.0  # from one look at the shared disk to the next


class StopRequested(Exception):
    """The run was asked to stop, and all its ranks have left their work where the same command takes it up again."""


class Watcher:
    """Notices that this process is asked to stop. Nothing is interrupted: a signal is noted, and whoever works asks
    now and then, with the other ranks (`World.stop_if_asked`) or, where ranks work apart, alone (`asked`) and then with
    the others. A rank that a signal alone reached makes the stop file, so that the others need not finish first."""

    def __init__(self):
        self._asked, self._told, self._next_look, self._deadline = 0, False, -math.inf, math.inf

    def install(self, margin_s: float = MARGIN_S) -> None:
        """Note signals from now on, and the end of the SLURM job, `margin_s` before it. A second signal is noted like
        the first.

        Raises:
            ValueError: a job that is not longer than the margin, which would be stopped and requeued for ever; a signal
                folder that is none.
        """
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder and not os.path.isdir(folder):
            raise ValueError(f"{FOLDER_VARIABLE}: {folder} is no folder; the batch shell makes it, on a shared disk")
        self._deadline = deadline(os.environ, margin_s)
        for number in SIGNALS:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # what reads and writes goes on

    def _note(self, number: int, _) -> None:
        self._asked = self._asked or ASKED_BY.index(signal.Signals(number).name)

    @property
    def asked(self) -> int:
        """Index into ASKED_BY of who first asked this process to stop, as far as it knows; 0: nobody."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if not self._asked and time.time() >= self._deadline:
            self._asked = ASKED_BY.index("the end of the job's time")
        if not self._asked and folder and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + POLL_S
            with suppress(OSError):  # one rank must not fail alone because a shared disk does
                if (Path(folder) / STOP_FILE).exists():
                    self._asked = ASKED_BY.index("the stop file")
        if self._asked and folder and not self._told:
            with suppress(OSError):
                (Path(folder) / STOP_FILE).touch()
            self._told = True
        return self._asked

    def stop_alone(self, where: str) -> None:
        """Raise StopRequested if this process, which has no other ranks, was asked."""
        if self.asked:
            raise StopRequested(f"stopped by {ASKED_BY[self.asked]} {where}")


watcher = Watcher()  # signals belong to the process, so there is one


def deadline(environment: Mapping[str, str], margin_s: float) -> float:
    """Epoch seconds at which a run must stop, `margin_s` before the end of its SLURM job; inf where there is none.

    Raises:
        ValueError: see `Watcher.install`; a time that is none.
    """
    times = {}
    for name in (START_VARIABLE, END_VARIABLE):
        try:
            times[name] = float(environment.get(name) or "nan")
        except ValueError as error:
            raise ValueError(f"{name}: {environment[name]!r} is not a time in epoch seconds; unset it") from error
    seconds = times[END_VARIABLE] - times[START_VARIABLE]
    if seconds <= margin_s:
        raise ValueError(
            f"stop_margin_s: {margin_s:g}, but the whole job has {seconds:g} seconds: it would stop before it began, "
            "again after every requeue; ask for more time, or lower stop_margin_s where a stage trains"
        )
    return math.inf if math.isnan(times[END_VARIABLE]) else times[END_VARIABLE] - margin_s


def ask_to_requeue() -> None:
    """Tell the batch shell that the command is to be started again, for launchers that lose exit codes."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        (Path(folder) / REQUEUE_FILE).touch()


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back the signals that ask to stop, for a moment. A process forked meanwhile holds them back for good: they
    are meant for its parent, which decides when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(_=None) -> None:
    """In a process forked while `signals_held`: end on SIGTERM of the parent alone, as the workers of a DataLoader do;
    SLURM and the launchers send it to every process of a job."""

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(SIGNALS)
            if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
