"""A real chat server on loopback for the steps that ask one, with faults on demand, and the real commands."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """What the server does to one request in place of answering it.

    Attributes:
        status: HTTP status of the refusal; 0 cuts the connection, 200 answers after the delay.
        retry_after: seconds that the header Retry-After asks for.
        delay_s: how long it takes.
        cut_after: for status 0, bytes of the finished answer that still go out.
    """

    status: int
    retry_after: float | None = None
    delay_s: float = 0.0
    cut_after: int = 0


class ChatServer:
    """Speaks /v1/chat/completions.

    Attributes:
        answer: maps a request's body to the text of the answer.
        faults: taken in turn, one by each request that arrives; None stands for an ordinary answer.
        requests: bodies of every request, in order of arrival, with arrival times.
        completed: bodies of the requests whose answer went out whole.
        busiest: most requests under way at a time.
        delay_s: how long every answer takes.
    """

    def __init__(self, answer: Callable[[dict], str]):
        self.answer, self.delay_s = answer, 0.0
        self.faults: deque[Fault | None] = deque()
        self.requests: list[tuple[float, dict]] = []
        self.completed: list[dict] = []
        self.finish, self.extra = "stop", {}
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                chat.serve(self)

            def log_message(self, *_):
                """Not into the test's output."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def serve(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            self.requests.append((time.monotonic(), body))
            fault = self.faults.popleft() if self.faults else None
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            time.sleep(fault.delay_s if fault else self.delay_s)
            if fault and fault.status not in (0, 200):
                self._send(http, fault.status, {"error": {"message": "injected"}}, fault.retry_after)
                return
            text = self.answer(body)
            message = {"role": "assistant", "content": text} | self.extra
            reply = {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
                "usage": {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 7},
            }  # fmt: skip
            if fault and fault.status == 0:
                http.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"[: fault.cut_after])
                http.close_connection = True
                return
            self._send(http, 200, reply)
            with self.lock:
                self.completed.append(body)
        except (BrokenPipeError, ConnectionResetError):
            http.close_connection = True  # whoever asked was killed
        finally:
            with self.lock:
                self.busy -= 1

    def _send(self, http: BaseHTTPRequestHandler, status: int, value: dict, retry_after: float | None = None) -> None:
        data = json.dumps(value).encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            http.send_header("Retry-After", str(retry_after))
        http.end_headers()
        http.wfile.write(data)


@pytest.fixture
def chat_server():
    """`chat_server(answer)` starts a server whose answers `answer(body)` gives."""
    started = []

    def start(answer: Callable[[dict], str]) -> ChatServer:
        started.append(ChatServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="session")
def pairs():
    """`pairs(*arguments, wait=True, **environment)` runs launch/pairs.py; with `wait=False` it returns the process."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TRITON_INTERPRET", "OPENAI_API_KEY")
    base = {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}

    def run(*arguments: str, wait: bool = True, launcher: tuple[str, ...] = (sys.executable,), **environment: str):
        process = subprocess.Popen(
            [*launcher, str(ROOT / "launch/pairs.py"), *arguments], cwd=ROOT, env=base | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if not wait:
            return process
        output, _ = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run


@pytest.fixture(scope="session")
def demo_cases(tmp_path_factory) -> Path:
    """12 of the demo's cases: cases.jsonl with pictures beside it."""
    from mede2.trainer.demo.records import write_cases

    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 12, seed=3, split="stage2")
