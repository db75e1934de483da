"""`sample` as users run it: from a server that fails and a command that is killed, and from the demo's model here."""

import itertools
import json
import math
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mede2.trainer.answering.generation import Draw, Generator
from mede2.trainer.answering.jobs import plan
from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.local import LocalModel, with_pictures
from mede2.trainer.data.images import load_image
from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.preference.sample import command, write_samples
from mede2.trainer.questions.cases import FORMAT, read_cases

HERE = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 48, "system": None, "grey_window": None}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def journal_of(output: Path, rank: int = 0) -> Path:
    return output.parent / f".{output.name}.journal" / f"{rank}.jsonl"


def test_more_cases_and_answers_leave_seeds_as_they_are(demo_cases):
    cases = read_cases(demo_cases)
    few, many = plan(cases[3:5], 2, 7, None), plan(cases, 4, 7, None)
    seeds = {(job.case.id, job.sample): job.seed for job in many}
    assert all(seeds[job.case.id, job.sample] == job.seed for job in few)
    assert len(set(seeds.values())) == len(many)
    assert {job.seed for job in plan(cases, 4, 8, None)}.isdisjoint(seeds.values())


def test_a_key_is_of_all_that_the_answer_depends_on_and_of_nothing_else(tmp_path, write_rows, write_image):
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    image = write_image(tmp_path / "a.png")
    row = {"id": "a", "prompt": prompt, "images": ["a.png"], "answer": "mass"}

    def key(row=row, settings=HERE, system=None) -> str:
        (job,) = plan(read_cases(write_rows(tmp_path / "cases.jsonl", [row])), 1, 0, system)
        return job.key(settings)

    first = key()
    assert key(row | {"answer": "other", "meta": {"note": 1}}) == first
    others = [key(settings=HERE | {"top_p": 0.8}), key(system=FORMAT), key(row | {"id": "b"})]
    others.append(key(row | {"prompt": [prompt[0] | {"content": [{"type": "image"}]}]}))
    write_image(image, seed=1)
    assert len({first, key(), *others}) == 6


# From a server


def seed_of(body: dict) -> str:
    """An answer that says which question it answers."""
    return f"<think>{body['seed']}</think> <answer>{body['temperature']}</answer>"


def asked(demo_cases: Path, output: Path, url: str, *more: str) -> list[str]:
    return [
        "sample", "--cases", str(demo_cases), "--output", str(output), "--base-url", url, "--model", "m",
        "--concurrency", "4", *more,
    ]  # fmt: skip


def test_killed_in_the_middle_no_answer_is_lost_and_none_paid_for_twice(
    pairs, chat_server, fault, demo_cases, tmp_path
):
    """12 cases x 4 answers, with refusals, errors and a cut connection, then kill -9. What the second run asks is
    exactly what the first had not journalled; of all that, only answers that were on their way when the first was
    killed, four at most, are answered by the server a second time."""
    gate, output = threading.Event(), tmp_path / "samples.jsonl"

    def answer(body: dict) -> str:
        if len(server.completed) >= 20:
            gate.wait(60)
        return seed_of(body)

    server = chat_server(answer)
    server.faults += [None, fault(429, {"Retry-After": "0.1"}), None, fault(500), fault(cut=150), None]
    command = asked(demo_cases, output, server.url, "--system", "format")
    process = pairs(*command, wait=False)
    deadline = time.monotonic() + 60
    while len(server.completed) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    gate.set()
    while server.busy:
        time.sleep(0.01)
    assert not output.exists()
    kept = [row["key"] for row in map(json.loads, journal_of(output).read_bytes().split(b"\n")[:-1])]
    assert 16 <= len(set(kept)) == len(kept) <= 24

    before = len(server.requests)
    done = pairs(*command)
    assert done.returncode == 0, done.stdout
    assert f"answers: {len(kept)} of 48 were there already" in done.stdout
    assert len(server.requests) - before == 48 - len(kept)
    answered = Counter(body["seed"] for body in server.completed)
    assert len(answered) == 48
    assert sum(answered.values()) <= 48 + 4

    rows = rows_of(output)
    cases = read_cases(demo_cases)
    assert [(row["case"], row["sample"]) for row in rows] == [(case.id, k) for case in cases for k in range(4)]
    assert all(row["text"] == seed_of({"seed": row["seed"], "temperature": 1.0}) for row in rows)
    assert len({row["key"] for row in rows}) == 48
    assert rows[0] == rows[0] | {"finish": "stop", "num_tokens": 2, "model": "m"}
    assert rows[0]["settings"] == {
        "temperature": 1.0, "top_p": 1.0, "max_tokens": 1024, "system": FORMAT, "grey_window": None,
        "server": server.url, "model": "m",
    }  # fmt: skip
    assert server.requests[0][1]["messages"][0] == {"role": "system", "content": FORMAT}
    assert server.requests[0][1]["max_completion_tokens"] == 1024

    before, written = len(server.requests), output.read_bytes()
    assert pairs(*command).returncode == 0
    assert len(server.requests) == before
    assert output.read_bytes() == written


def run_here(arguments: list[str]) -> None:
    """The command in this process."""
    command.main(arguments[1:], standalone_mode=False)


def test_a_server_that_moves_keeps_its_answers(chat_server, demo_cases, tmp_path):
    first, second = chat_server(seed_of), chat_server(seed_of)
    for server, num in ((first, 1), (second, 2)):
        run_here(asked(demo_cases, tmp_path / "samples.jsonl", server.url, "--served-as", "cluster", "--num", str(num)))
    assert len(first.requests) == len(second.requests) == 12


def test_images_stay_here_unless_they_may_leave(pairs, chat_server, demo_cases, tmp_path):
    """One line that names the server, and no request. (0.0.0.0 stands for any address that is not loopback.)"""
    server = chat_server(seed_of)
    url = f"http://0.0.0.0:{server.port}/v1"
    arguments = asked(demo_cases, tmp_path / "samples.jsonl", url, "--num", "1")
    done = pairs(*arguments)
    assert done.returncode == 2
    assert done.stdout.startswith(f"Error: --base-url {url}: 12 images")
    assert done.stdout.count("\n") == 1
    assert not server.requests
    run_here([*arguments, "--allow-remote-images"])
    assert len(server.completed) == 12


@pytest.mark.parametrize(
    ("answer", "finish", "told"),
    [
        ({"content": "mass", "reasoning_content": "I see"}, "stop", "start it without a reasoning parser"),
        ("mass", "tool_calls", "ended an answer by 'tool_calls'"),
    ],
)
def test_an_answer_in_pieces_is_no_answer(chat_server, demo_cases, tmp_path, answer, finish, told):
    server = chat_server(lambda body: answer, finish=finish)
    with pytest.raises(ValueError, match=told):
        run_here(asked(demo_cases, tmp_path / "samples.jsonl", server.url))
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--temperature", "0"], "--num 4: at temperature 0"),
        (["--concurrency", "3"], "--concurrency: only with --base-url"),
        (["--batch-size", "3", "--base-url", "http://127.0.0.1:1/v1"], "--batch-size: only without --base-url"),
        (["--base-url", "nowhere"], "--base-url 'nowhere': an address such as"),
        (["--system", "nowhere"], "--system nowhere: `format` or a text file"),
        (["--grey-window", "9,1"], "--grey-window 9,1: the first is to be the lower one"),
        (["--grey-window", "9"], "--grey-window 9: two numbers"),
    ],
)
def test_wrong_options_are_told_in_a_line(demo_cases, tmp_path, arguments, told):
    base = ["sample", "--cases", str(demo_cases), "--output", str(tmp_path / "samples.jsonl"), "--model", "m"]
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        run_here([*base, *arguments])
    assert "\n" not in str(error.value)


# From a model here


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(BASE_MODEL, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def conversations(demo_cases) -> list:
    """Questions with a picture, of unequal lengths, one of them without a picture."""
    cases = read_cases(demo_cases)[:5]
    shown = [with_pictures(case.prompt, [load_image(image) for image in case.images]) for case in cases]
    shown[1][0]["content"][1]["text"] = "Write look."
    shown.append([{"role": "user", "content": [{"type": "text", "text": "Copy: mass left upper."}]}])
    return shown


def test_answers_of_a_batch_are_those_of_one_by_one(generator, conversations):
    together = generator(conversations, max_tokens=40)
    alone = [generator([conversation], max_tokens=40)[0] for conversation in conversations]
    assert together == alone
    assert len({answer.num_tokens for answer in together}) > 1
    assert {answer.finish for answer in generator(conversations, max_tokens=5)} == {"length"}
    assert all(answer.finish == "stop" or answer.num_tokens == 40 for answer in together)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl3"])
def test_every_familys_batches_are_one_by_one_too(family, family_folders, write_image, tmp_path):
    """Untrained, with several images, with none, and of unequal sizes."""
    generator = Generator(family_folders[family], dtype=torch.float32, device="cpu")
    images = [load_image(write_image(tmp_path / f"{i}.png", 48 + 48 * i, 32 + 32 * i, seed=i)) for i in range(2)]
    shown = [([0], "Which?"), ([1, 0], "What is it, then, mass or nodule?"), ([], "Hm"), ([1], "x")]
    conversations = [
        [{"role": "user", "content": [*({"type": "image", "image": images[i]} for i in those),
                                      {"type": "text", "text": text}]}]
        for those, text in shown
    ]  # fmt: skip
    together = generator(conversations, max_tokens=16)
    assert together == [generator([conversation], max_tokens=16)[0] for conversation in conversations]
    assert len({answer.text for answer in together}) > 1


def test_a_drawn_answer_depends_on_its_own_seed_alone(generator, conversations):
    def draw(order: list[int], seeds: list[int]) -> dict[tuple[int, int], str]:
        drawn = generator([conversations[i] for i in order], max_tokens=40, temperature=1.5, top_p=0.95, seeds=seeds)
        return {(i, seed): answer.text for i, seed, answer in zip(order, seeds, drawn, strict=True)}

    first = draw([0, 1, 2, 3, 0, 0], [1, 2, 3, 4, 5, 6])
    assert draw([0, 3, 0, 2], [6, 4, 1, 3]).items() <= first.items()
    assert len({first[0, 1], first[0, 5], first[0, 6]}) > 1


def test_draws_follow_the_distribution():
    """20,000 rows, each with its own seed, of one known distribution: within five standard deviations, the second draw
    independent of the first, and never a token of probability 0 (as top-p leaves them), not even for the number 0."""
    probabilities, num = [0.0, 0.5, 0.0, 0.2, 0.3, 0.0], 20_000
    scores = torch.tensor(probabilities).log().expand(num, -1)
    draw = Draw(range(num), width=3, max_tokens=2)
    first, second = (draw(torch.zeros(num, 3 + step, dtype=torch.long), scores) for step in range(2))
    assert torch.equal(first.isfinite().sum(-1), torch.ones(num, dtype=torch.long))
    both = torch.bincount(6 * first.argmax(-1) + second.argmax(-1), minlength=36).tolist()
    for count, (one, other) in zip(both, itertools.product(probabilities, repeat=2), strict=True):
        assert abs(count - num * one * other) <= 5 * math.sqrt(num * one * other * (1 - one * other))
    draw.uniform.zero_()
    assert set(draw(torch.zeros(num, 3, dtype=torch.long), scores).argmax(-1).tolist()) == {1}


def test_a_prompt_that_leaves_no_room_is_told(generator, conversations):
    with pytest.raises(
        ValueError, match=r"--max-tokens 1000: with a prompt of \d+ tokens more than the 1024 positions"
    ):
        generator(conversations, max_tokens=1000)


def test_two_ranks_go_on_where_one_stopped_and_write_what_one_writes(on_two_ranks, demo_cases, tmp_path, world):
    """One process makes 3 answers a case. Two ranks of the real command, with a journal that holds the first batches
    and a torn line, write the same file to the byte."""
    jobs = plan(read_cases(demo_cases), 3, 0, None)
    model = LocalModel(str(BASE_MODEL), batch_size=8, max_pixels=None, world=world)
    with Journal(tmp_path / "one.jsonl") as journal:
        answers = model.answer(jobs, HERE, journal)
    write_samples(tmp_path / "one.jsonl", jobs, answers, str(BASE_MODEL), HERE | model.identity)
    whole = (tmp_path / "one.jsonl").read_bytes()
    assert len(whole.splitlines()) == 36
    lines = journal_of(tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    journal = journal_of(tmp_path / "two.jsonl")
    journal.parent.mkdir()
    journal.write_bytes(b"".join(lines[:16]) + lines[16][:20])

    command = [
        "sample", "--cases", str(demo_cases), "--output", str(tmp_path / "two.jsonl"), "--model", str(BASE_MODEL),
        "--num", "3", "--top-p", "0.9", "--max-tokens", "48", "--batch-size", "8",
    ]  # fmt: skip
    outputs = on_two_ranks("pairs.py", *command)
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    made = [len(rows_of(journal_of(tmp_path / "two.jsonl", rank))) for rank in range(2)]
    assert sum(made) == 36
    assert made[1] > 0
    assert "answers of rank 0 of 2" in outputs[0]
    assert "answers" not in outputs[1]
