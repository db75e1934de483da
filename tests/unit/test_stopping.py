"""Who may ask a process to stop, what it hears, and what reaches the data workers beside it."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mede2.trainer import stopping
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.metrics import Metrics
from mede2.trainer.settings import ENHANCE, BatchArithmetic
from mede2.trainer.stopping import ASKED_BY, StopRequested, Watcher, ask_to_requeue, deadline


@pytest.fixture
def watcher(monkeypatch):
    """An installed one, without SLURM; the signals are pytest's again afterwards."""
    for name in (stopping.FOLDER_VARIABLE, stopping.START_VARIABLE, stopping.END_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    watcher = Watcher()
    watcher.install()
    yield watcher
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_noted_and_a_second_one_changes_nothing(watcher):
    assert watcher.asked == 0
    watcher.stop_alone("here")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
        assert ASKED_BY[watcher.asked] == "SIGUSR1"
    with pytest.raises(StopRequested, match=r"^stopped by SIGUSR1 after 3 of 7 answers$"):
        watcher.stop_alone("after 3 of 7 answers")


def test_the_stop_file_is_noticed_and_made_by_whom_a_signal_reached(watcher, monkeypatch, tmp_path):
    """The other ranks find it there, and need not finish what they do apart from this one."""
    monkeypatch.setenv(stopping.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(stopping, "POLL_S", 0.0)
    other = Watcher()
    assert (watcher.asked, other.asked) == (0, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ASKED_BY[watcher.asked] == "SIGTERM"
    assert ASKED_BY[other.asked] == "the stop file"
    assert [path.name for path in tmp_path.iterdir()] == [stopping.STOP_FILE]


def test_the_disk_is_looked_at_now_and_then(watcher, monkeypatch, tmp_path):
    monkeypatch.setenv(stopping.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(stopping, "POLL_S", math.inf)
    assert watcher.asked == 0
    (tmp_path / stopping.STOP_FILE).touch()
    assert watcher.asked == 0


def test_a_signal_folder_that_is_none_is_refused(watcher, monkeypatch, tmp_path):
    monkeypatch.setenv(stopping.FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"MEDE2_SIGNAL_FOLDER: .*none is no folder"):
        watcher.install()


def test_the_batch_shell_is_asked_to_requeue_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.delenv(stopping.FOLDER_VARIABLE, raising=False)
    ask_to_requeue()
    monkeypatch.setenv(stopping.FOLDER_VARIABLE, str(tmp_path))
    ask_to_requeue()
    assert [path.name for path in tmp_path.iterdir()] == ["requeue"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, math.inf), ({"SLURM_JOB_END_TIME": "1000"}, 880.0), ({"SLURM_JOB_START_TIME": "500"}, math.inf),
     ({"SLURM_JOB_START_TIME": "879", "SLURM_JOB_END_TIME": "1000"}, 880.0)],
)  # fmt: skip
def test_the_deadline_lies_before_the_end_of_the_job(environment, expected):
    assert deadline(environment, 120.0) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [({"SLURM_JOB_START_TIME": "880", "SLURM_JOB_END_TIME": "1000"}, "stop_margin_s: 120, but the whole job has 120 s"),
     ({"SLURM_JOB_END_TIME": "Unknown"}, "SLURM_JOB_END_TIME: 'Unknown' is not a time in epoch seconds")],
)  # fmt: skip
def test_a_job_that_would_stop_before_it_began_is_refused(environment, told):
    with pytest.raises(ValueError, match=told):
        deadline(environment, 120.0)


def test_the_end_of_the_job_asks(watcher, monkeypatch):
    monkeypatch.setenv(stopping.END_VARIABLE, str(time.time() + 60))
    watcher.install(margin_s=30.0)
    assert watcher.asked == 0
    watcher.install(margin_s=61.0)
    assert ASKED_BY[watcher.asked] == "the end of the job's time"


def row(step: int) -> str:
    return f'{{"step": {step}, "loss": 1.0}}\n'


@pytest.mark.parametrize(
    ("found", "first_step", "left", "warns"),
    [([1, 2, 3], 3, [1, 2, 3], False), ([1, 2, 3, 4], 2, [1, 2], False), ([1, 2, 4], 4, [1, 2, 4], True),
     ([1, 2, 2], 2, [1, 2, 2], True), ([1, 2], 4, [1, 2], True), ([], 4, [], False)],
)  # fmt: skip
def test_rows_that_are_missing_or_doubled_where_a_run_continues_are_told(
    tmp_path, capsys, found, first_step, left, warns
):
    """But not those that another output holds, and later ones are taken out."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(map(row, found)))
    Metrics(tmp_path, first_step, 9, "stage 2").close()
    assert file.read_text() == "".join(map(row, left))
    assert ("warning: " in capsys.readouterr().out) == warns


class Tracker:
    """Stands in for a run of Weights & Biases."""

    def __init__(self):
        self.told = []

    def mark_preempting(self) -> None:
        self.told.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.told.append(exit_code)


@pytest.mark.parametrize(("raised", "told"), [(StopRequested, ["preempting", 1]), (RuntimeError, [1]), (None, [0])])
def test_a_stopped_run_is_preempted_to_those_who_watch_it_not_failed(tmp_path, raised, told):
    tracker = Tracker()
    metrics = Metrics(tmp_path, 0, 9, "stage 2", tracker)
    try:
        if raised:
            raise raised
        metrics.close()
    except (StopRequested, RuntimeError):
        metrics.close()
    assert tracker.told == told


@pytest.fixture
def batches(load, stage2_file, processor, model_folder, world):
    dataset = load(stage2_file, ENHANCE)
    sampler = Sampler(tuple(map(Layout().lengths, dataset.examples)), BatchArithmetic(4, 1, 1), seed=3)
    collator = Collator(processor, Positions(model_folder), True, Layout())
    return Batches(dataset, sampler, collator, world, num_workers=2)


def workers() -> list[int]:
    """Processes that this one has forked."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, children) if (Path("/proc") / str(pid) / "cmdline").read_bytes().count(b"pytest")]


def test_data_workers_outlive_a_signal_that_others_send_and_end_by_their_parents(batches, watcher):
    """`kill` stands for SLURM and the launchers, which signal every process of a job."""
    before = set(workers())
    feed = batches.feed(range(8))
    forked = set(workers()) - before
    assert len(forked) == 2
    for name in ("TERM", "USR1", "TERM"):
        subprocess.run(["kill", "-s", name, *map(str, forked)], check=True)
    for step in range(8):
        assert len(list(feed.micro_batches(step))) in (3, 4)
    feed = batches.feed(range(8))
    last = set(workers()) - before - forked
    for pid in last:
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0


WITHOUT_PARENT = """
import os, signal, sys
from mede2.trainer.stopping import end_with_parent, signals_held
import torch
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 9
    def __getitem__(self, number): return number
loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1, worker_init_fn=end_with_parent)
with signals_held():
    rows = iter(loader)
assert next(rows) == 0
print(*open(f"/proc/self/task/{os.getpid()}/children").read().split(), flush=True)
END
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(75)", "raise RuntimeError"])
def test_data_workers_end_with_their_parent_however_it_ends(end):
    program = WITHOUT_PARENT.replace("END", end)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.1)
