"""The client against a real server on loopback: what is sent, what is asked again, what is told, what never leaves."""

import asyncio
import base64
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mede2.trainer.answering.chat import MOST_REFUSED, ChatClient, Refused, ask_all, is_loopback
from mede2.trainer.answering.journal import Journal
from mede2.trainer.questions.cases import read_cases


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://127.8.9.1/v1", True),
        ("https://[::1]:8000/v1", True),
        ("http://[::ffff:127.0.0.1]/v1", True),
        ("http://10.0.0.7:8000/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://127.0.0.1@example.org/v1", False),
        ("http://127.0.0.1#@example.org/v1", True),
        ("http://0.0.0.0/v1", False),
    ],
)
def test_only_this_machines_own_addresses_are_loopback(url, here):
    assert is_loopback(url) is here


def ask(url: str, demo_cases: Path, settings=(), schema=None, **options):
    """One question with a picture."""
    case = read_cases(demo_cases)[0]

    async def run():
        async with ChatClient(url, "m", **options) as client:
            return await client.ask(case.prompt, case.images, dict(settings), schema)

    return asyncio.run(run())


def test_a_question_arrives_as_it_is_meant(chat_server, demo_cases, monkeypatch):
    """Text and picture in their places; the picture's pixels, and nothing else of its file."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # what is for this machine goes past a proxy
    case = read_cases(demo_cases)[0]
    server = chat_server(lambda body: "mass it is")
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    reply = ask(server.url, demo_cases, {"seed": 5, "temperature": 0.5}, schema)
    assert (reply.text, reply.finish, reply.num_tokens) == ("mass it is", "stop", 3)
    ((_, body),) = server.requests
    assert (body["model"], body["seed"], body["temperature"]) == ("m", 5, 0.5)
    assert body["response_format"]["json_schema"] == {"name": "reply", "strict": True, "schema": schema}
    picture, text = body["messages"][0]["content"]
    assert text == case.prompt[0]["content"][1]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    with Image.open(case.images[0]) as original, Image.open(io.BytesIO(data)) as sent:
        assert sent.tobytes() == original.convert("RGB").tobytes()
        assert sent.info == {}


def test_what_may_be_asked_again_is_asked_again_and_when_the_server_says(chat_server, fault, demo_cases):
    server = chat_server(lambda body: "yes")
    server.faults += [
        fault(cut=0),
        fault(cut=200),
        fault(429, {"Retry-After": "0.1"}),
        fault(500, {"Retry-After": "2"}),
    ]
    assert ask(server.url, demo_cases).text == "yes"
    times = [at for at, _ in server.requests]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert len(server.completed) == 1
    assert len(waits) == 4
    assert 0.1 <= waits[2] < 1.4  # of its own accord it waits 1.5 to 2 s the third time
    assert 2 <= waits[3] < 2.9  # and 3 to 4 s the fourth


def test_what_cannot_be_answered_is_told_in_a_line(chat_server, fault, demo_cases):
    server = chat_server(lambda body: "yes")
    for failure, kind, told in [
        (fault(400), Refused, r"/v1 \(m\) answers 400: .*injected"),
        (fault(401), ValueError, "answers 401.* key is read from the variable OPENAI_API_KEY"),
        (fault(404), ValueError, "answers 404"),
        (fault(500), ValueError, "answers 500"),
        (fault(cut=100), ValueError, "cannot be reached"),
        (fault(delay_s=1.0), ValueError, "did not answer within --timeout-s"),
        (fault(body=b'{"choices": [{"mess'), ValueError, "no chat completion"),
        (fault(body=b"<html>", headers={"Content-Type": "text/html"}), ValueError, "no chat completion: <html>"),
        (fault(body=b"{}"), ValueError, "no chat completion"),
        (fault(body=b'{"choices": []}'), ValueError, "no chat completion"),
    ]:
        server.faults.append(failure)
        with pytest.raises(ValueError, match=told) as error:
            ask(server.url, demo_cases, max_retries=0, timeout_s=0.6)
        assert type(error.value) is kind
        assert "\n" not in str(error.value)


def test_an_answer_withheld_or_no_text_is_refused(chat_server, demo_cases):
    with pytest.raises(Refused, match=r"withholds its answer \(content_filter"):
        ask(chat_server(lambda body: "", finish="content_filter").url, demo_cases)
    with pytest.raises(Refused, match="not valid Unicode"):
        ask(chat_server(lambda body: "\ud800").url, demo_cases)


def test_images_do_not_leave_without_leave(chat_server, fault, demo_cases):
    """0.0.0.0 reaches this machine but is no loopback address, so it stands for any other. A redirection takes no
    image anywhere either."""
    server, elsewhere = chat_server(lambda body: "yes"), chat_server(lambda body: "yes")
    url = f"http://0.0.0.0:{server.port}/v1"
    with pytest.raises(ValueError, match=rf"--base-url {url}: 1 images .*--allow-remote-images"):
        ask(url, demo_cases)
    assert not server.requests
    assert ask(url, demo_cases, allow_remote_images=True).text == "yes"
    server.faults.append(fault(307, {"Location": f"{elsewhere.url}/chat/completions"}))
    with pytest.raises(ValueError, match="answers 307"):
        ask(server.url, demo_cases, max_retries=0)
    assert not elsewhere.requests


def test_an_address_that_is_none_is_told():
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://[::1", ""):
        with pytest.raises(ValueError, match=f"--base-url '{re.escape(url)}'"):
            ChatClient(url, "m")


def ask_many(url: str, output: Path, num: int, concurrency: int) -> None:
    """Questions 0, 1, ... without pictures, journalled."""

    async def run():
        async with ChatClient(url, "m", max_retries=0) as client:

            async def ask(number: int) -> dict:
                message = {"role": "user", "content": [{"type": "text", "text": str(number)}]}
                return {"text": (await client.ask([message], [], {})).text}

            with Journal(output) as journal:
                jobs = {f"key {number}": number for number in range(num)}
                await ask_all(jobs, ask, journal, concurrency=concurrency, title="answers")

    asyncio.run(run())


def journalled(output: Path) -> dict[str, str]:
    lines = (output.parent / f".{output.name}.journal" / "0.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row["text"] for row in map(json.loads, lines)}


def echo(body: dict) -> str:
    return body["messages"][0]["content"]


def test_no_more_questions_at_a_time_than_said(chat_server, tmp_path):
    server = chat_server(echo, delay_s=0.05)
    ask_many(server.url, tmp_path / "out.jsonl", num=20, concurrency=4)
    assert server.busiest == 4
    assert journalled(tmp_path / "out.jsonl") == {f"key {number}": str(number) for number in range(20)}


def test_refused_questions_are_listed_when_all_others_are_answered(chat_server, fault, tmp_path):
    server = chat_server(echo)
    server.faults += [None, fault(400), None, fault(413)]
    with pytest.raises(ValueError, match="2 were refused") as error:
        ask_many(server.url, tmp_path / "out.jsonl", num=10, concurrency=1)
    assert "400" in str(error.value)
    assert "413" in str(error.value)
    assert len(journalled(tmp_path / "out.jsonl")) == 8
    ask_many(server.url, tmp_path / "out.jsonl", num=10, concurrency=1)
    assert len(server.requests) == 12
    server.faults += [fault(400)] * 100
    with pytest.raises(ValueError, match=f"{MOST_REFUSED} were refused"):
        ask_many(server.url, tmp_path / "out.jsonl", num=100, concurrency=1)


def test_at_a_failure_what_is_under_way_is_still_taken_in(chat_server, fault, tmp_path):
    server = chat_server(echo)
    server.faults += [fault(delay_s=0.3), fault(delay_s=0.3), fault(404)]
    with pytest.raises(ValueError, match="answers 404"):
        ask_many(server.url, tmp_path / "out.jsonl", num=50, concurrency=3)
    assert len(server.requests) == 3
    assert len(journalled(tmp_path / "out.jsonl")) == len(server.completed) == 2
