"""Who may write an output folder: refusals, takeovers, and what an attempt that was thought dead can do."""

import dataclasses
import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mede2.trainer.files import write_json
from mede2.trainer.metrics import Metrics, read_metrics
from mede2.trainer.ownership import OWNER, Attempt, OutputLost, Ownership, _start_ticks, this_attempt


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen]:
    """Another process of this host."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def attempt(**changes) -> Attempt:
    return dataclasses.replace(this_attempt(), **changes)


def owned_by(output: Path, owner: Attempt) -> None:
    output.mkdir(exist_ok=True)
    write_json(output / OWNER, dataclasses.asdict(owner))


def of(process: subprocess.Popen, **changes) -> Attempt:
    return attempt(pid=process.pid, started=_start_ticks(process.pid), **changes)


def test_an_attempt_is_named_by_slurm_or_by_its_process(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    outside = this_attempt()
    assert str(outside) == f"process {os.getpid()} on {outside.host}"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = this_attempt()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    third = this_attempt()
    assert str(third) == f"job 4711, restart 2 (process {os.getpid()} on {third.host})"
    assert (third.succeeds(first), first.succeeds(third), third.succeeds(outside)) == (True, False, False)
    assert len({outside.token, first.token, third.token}) == 3


def test_the_owner_may_write_until_another_takes_over(output, said):
    """Nobody waits for anybody: of two that start at once, the last to take the folder has it."""
    first, second = Ownership(output), Ownership(output, attempt(job="8", restart=1, host="elsewhere"))
    assert first.check_free() is None
    first.take(said.append)
    second.take(said.append)
    second.check()
    assert said == [f"{output} is taken over from {first.ours}, which did not end in order"]
    told = rf"now belongs to job 8, restart 1 \(process {os.getpid()} on elsewhere\); this attempt, process"
    for forbidden in (first.check, first.release, lambda: first.write(output.rmdir)):
        with pytest.raises(OutputLost, match=told):
            forbidden()
    second.check()
    assert [path.name for path in output.iterdir()] == [OWNER]


def test_what_ended_in_order_is_taken_without_a_word(output, said):
    first, second = Ownership(output), Ownership(output)
    first.take(said.append)
    first.release()
    second.take(said.append)
    second.check()
    assert said == []


@pytest.mark.parametrize("halted", [False, True])
def test_a_living_process_of_this_host_is_not_pushed_out(output, neighbour, said, halted):
    if halted:
        neighbour.send_signal(signal.SIGSTOP)
    owned_by(output, of(neighbour, job="7"))
    before = (output / OWNER).read_bytes()
    for refused in (Ownership(output), Ownership(output, attempt(job="8", restart=3))):
        with pytest.raises(ValueError, match=rf"is being written by job 7, restart 0 \(process {neighbour.pid} on"):
            refused.take(said.append)
    assert (output / OWNER).read_bytes() == before


@pytest.mark.parametrize("why", ["ended in order", "another with its number", "dead", "not waited for"])
def test_a_process_that_is_gone_does_not_keep_the_folder(output, neighbour, said, why):
    owner = of(neighbour, ended=why == "ended in order")
    if why == "another with its number":
        owner = dataclasses.replace(owner, started=owner.started - 1)
    if why in ("dead", "not waited for"):
        neighbour.kill()
        os.waitid(os.P_PID, neighbour.pid, os.WEXITED | os.WNOWAIT)
    if why == "dead":
        neighbour.wait()
    owned_by(output, owner)
    Ownership(output).take(said.append)
    told = f"{output} is taken over from {owner}, which did not end in order"
    assert said == ([] if owner.ended else [told])


def test_slurm_has_given_up_what_it_starts_again(output, neighbour, said):
    """Living or not, the former start of a requeued job gives way, and a later one does not."""
    owned_by(output, of(neighbour, job="7", restart=1))
    with pytest.raises(OutputLost, match=r"belongs to job 7, restart 1 .*, a later start of this job"):
        Ownership(output, attempt(job="7", restart=0)).take(said.append)
    later = Ownership(output, attempt(job="7", restart=2))
    later.take(said.append)
    later.check()
    with pytest.raises(OutputLost, match="a later start of this job"):
        Ownership(output, attempt(job="7", restart=1)).take(said.append)
    later.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "7"}'])
def test_a_damaged_file_is_nobodys(output, said, content):
    ours = Ownership(output)
    ours.take(said.append)
    (output / OWNER).write_text(content, encoding="utf-8")
    with pytest.raises(OutputLost, match=r"now belongs to nobody \(owner.json is gone or damaged\)"):
        ours.check()
    (output / OWNER).unlink()
    with pytest.raises(OutputLost, match="now belongs to nobody"):
        ours.check()
    ours.take(said.append)
    ours.check()


def test_of_many_that_take_at_once_one_has_the_folder(output, said):
    claims = [Ownership(output, attempt(host="elsewhere")) for _ in range(16)]
    threads = [threading.Thread(target=claim.take, args=(said.append,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holding = 0
    for claim in claims:
        try:
            claim.check()
            holding += 1
        except OutputLost:
            """It knows that it may not write."""
    assert holding == 1
    assert [path.name for path in output.iterdir()] == [OWNER]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, said):
    """Permission bits do not bind root: the folder is made immutable."""
    folder = tmp_path / "closed"
    folder.mkdir()
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system or user cannot make a folder immutable")
    try:
        for output in (folder, folder / "new"):
            with pytest.raises(ValueError, match=rf"^output: {output} cannot be written \(Operation not permitted\); "):
                Ownership(output).take(said.append)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_all_ranks_get_the_claim_and_the_refusal(output):
    """Both are pickled on their way between ranks."""
    claim, refusal = Ownership(output), OutputLost("why")
    assert pickle.loads(pickle.dumps(claim)) == claim
    again = pickle.loads(pickle.dumps(refusal))
    assert (type(again), str(again)) == (OutputLost, "why")


def test_rows_of_who_was_thought_dead_go_nowhere(output):
    """A successor gives the rows a new file."""
    output.mkdir()
    halted = Metrics(output, 0, 8, "stage 1")
    halted.row(1, {"loss": 1.0, "num_tokens": 30}, seconds=0.5)
    successor = Metrics(output, 1, 8, "stage 1")
    halted.row(2, {"loss": 1.0, "num_tokens": 30}, seconds=0.5)
    successor.row(2, {"loss": 2.0, "num_tokens": 30}, seconds=0.5)
    halted.row(3, {"loss": 1.0, "num_tokens": 30}, seconds=0.5)
    halted.close()
    successor.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl")] == [(1, 1.0), (2, 2.0)]


def test_tensorboard_has_nothing_to_write_after_a_row(output):
    output.mkdir()
    metrics = Metrics(output, 0, 8, "stage 1")
    metrics.row(1, {"loss": 1.0, "num_tokens": 30}, seconds=0.5)
    (board,) = (output / "tensorboard").iterdir()
    written = board.read_bytes()
    assert b"tokens_per_s" in written
    metrics.close()
    assert board.read_bytes() == written
