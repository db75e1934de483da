"""`sample` is asked to stop: it ends with the answers at hand, and the same command asks for the others alone."""

import json
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

from mede2.trainer.answering.jobs import plan
from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.local import LocalModel
from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.preference.sample import write_samples
from mede2.trainer.questions.cases import read_cases
from mede2.trainer.stopping import REQUEUE

DEADLINE_S = 120.0


def kept(output: Path, rank: int = 0) -> int:
    """Answers in a rank's journal."""
    journal = output.parent / f".{output.name}.journal" / f"{rank}.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_on_their_way_from_a_server_are_waited_for(pairs, chat_server, demo_cases, tmp_path):
    """12 cases x 4 answers, four at a time: nothing is asked for twice."""
    server = chat_server(lambda body: f"<answer>{body['seed']}</answer>", delay_s=0.05)
    output = tmp_path / "samples.jsonl"
    command = [
        "sample", "--cases", str(demo_cases), "--output", str(output), "--base-url", server.url, "--model", "m",
        "--concurrency", "4",
    ]  # fmt: skip
    process = pairs(*command, wait=False)
    wait_for(lambda: len(server.completed) >= 12)
    os.kill(process.pid, signal.SIGTERM)
    printed = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == REQUEUE, printed
    assert f"stopped by SIGTERM after {kept(output)} of 48 answers; the same command continues" in printed
    assert 12 <= kept(output) == len(server.completed) < 48
    assert not output.exists()

    assert pairs(*command).returncode == 0
    assert Counter(body["seed"] for body in server.completed) == {
        json.loads(line)["seed"]: 1 for line in output.read_text().splitlines()
    }
    assert len(server.completed) == 48


def test_two_ranks_stop_after_the_batch_at_hand_when_one_of_them_is_asked(
    launched, on_two_ranks, demo_cases, tmp_path, world
):
    """And go on to the file of one process that nobody stopped, to the byte."""
    jobs = plan(read_cases(demo_cases), 3, 0, None)
    model = LocalModel(str(BASE_MODEL), batch_size=4, max_pixels=None, world=world)
    settings = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 48, "system": None, "grey_window": None}
    with Journal(tmp_path / "one.jsonl") as journal:
        answers = model.answer(jobs, settings, journal)
    write_samples(tmp_path / "one.jsonl", jobs, answers, str(BASE_MODEL), settings | model.identity)

    output, folder = tmp_path / "two.jsonl", tmp_path / "signals"
    folder.mkdir()
    command = [
        "pairs.py", "sample", "--cases", str(demo_cases), "--output", str(output), "--model", str(BASE_MODEL),
        "--num", "3", "--top-p", "0.9", "--max-tokens", "48", "--batch-size", "4",
    ]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"MEDE2_SIGNAL_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    ranks = [launched(*command, wait=False, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    wait_for(lambda: kept(output, rank=1))
    os.kill(ranks[1].pid, signal.SIGUSR1)
    printed = [rank.communicate(timeout=DEADLINE_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [REQUEUE, REQUEUE], printed
    assert "stopped by SIGUSR1 between two batches of answers; the same command continues" in printed[0]
    assert "stopped" not in printed[1]
    assert sorted(path.name for path in folder.iterdir()) == ["requeue", "stop"]
    done = [kept(output, rank) for rank in range(2)]
    assert sum(done) < 36
    assert [number % 4 for number in done] == [0, 0]
    assert not output.exists()

    on_two_ranks(*command)
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
