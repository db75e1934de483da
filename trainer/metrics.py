"""Watching a run: metrics.jsonl (one row an update), TensorBoard, alarms, a progress line. Only rank 0 writes."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from mede2.trainer.alarms import Alarms
from mede2.trainer.files import write_text
from mede2.trainer.stopping import StopRequested

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "tokens_per_s")
PLAIN_LINES = 20  # lines of progress in a log file


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a crash does not count."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Writes the rows of a run that continues after `first_step` updates.

    Rows of later updates, left by a process that died, are taken out, so that no update is there twice; if one is
    missing, that is said.

    Args:
        output: folder of metrics.jsonl and tensorboard/.
        first_step: updates already done.
        num_steps: updates of the whole run.
        title: of the progress line.
        tracker: the started run of Weights & Biases, or None.
    """

    def __init__(self, output: Path, first_step: int, num_steps: int, title: str, tracker=None):
        path = output / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        steps = [row["step"] for row in kept]
        if kept and steps != list(range(steps[0], first_step + 1)):
            print(f"warning: {path} has the rows of updates {steps}, not of all up to {first_step}", flush=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        self.alarms = Alarms()
        for row in kept:
            self.alarms(row)
        self.num_steps, self.title, self.tracker = num_steps, title, tracker
        self.done_here, self.started = 0, time.perf_counter()
        self.start_lap()
        self.console = console = Console(stderr=False)
        self.progress = None
        if console.is_terminal:
            self.progress = Progress(
                TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"), console=console,
            )  # fmt: skip
            self.task = self.progress.add_task(title, total=num_steps, completed=first_step, shown="")
            self.progress.start()

    def start_lap(self) -> None:
        """Start the clock of the next update; saving and evaluating stay out of it."""
        self.lap_started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since `start_lap`."""
        return time.perf_counter() - self.lap_started

    def row(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Write the row of update `step` (from 1), which took `seconds`; adds step_ms, tokens_per_s, peak_gib and the
        marks of alarms."""
        row = {"step": step} | metrics
        row |= {"step_ms": seconds * 1e3, "tokens_per_s": metrics["num_tokens"] / seconds, "peak_gib": peak_gib()}
        starting, marks = self.alarms(row)
        row |= marks
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(row)
        for name, text in starting.items():
            line = f"alarm at update {step}, {name}: {text}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.board.add_text(f"alarms/{name}", text, step)
            if self.tracker:
                self.tracker.alert(f"{name} at update {step}", text)
        self._show(step, row)

    def sync(self) -> None:
        """Let the rows written so far outlive the machine, as the checkpoint does that counts on them."""
        os.fsync(self.file.fileno())

    def _show(self, step: int, row: dict[str, float]) -> None:
        self.done_here += 1
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
        if self.progress:
            self.progress.update(self.task, completed=step, shown=shown)
        elif step % max(1, self.num_steps // PLAIN_LINES) == 0 or step == self.num_steps or self.done_here == 1:
            seconds_left = (time.perf_counter() - self.started) / self.done_here * (self.num_steps - step)
            print(f"{self.title}  {step}/{self.num_steps}  {shown}  {seconds_left:.0f} s left", flush=True)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        self.file.close()
        self.board.close()
        if self.tracker:
            if isinstance(sys.exception(), StopRequested):
                self.tracker.mark_preempting()  # "preempted" there, not "failed"
            self.tracker.finish(exit_code=int(sys.exception() is not None))


def peak_gib() -> float:
    """Most memory in use so far, GiB: the allocator's on a GPU, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20
