"""A real chat server on loopback for the steps that ask one, with faults on demand, and the commands of launch/."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """What the server does with one request, other than to answer it well.

    Attributes:
        status: HTTP status of the reply.
        headers: of the reply, beside the usual ones.
        body: of the reply; without it the answer (status 200) or an error.
        delay_s: how long it takes.
        cut: so many bytes of the reply go out, then the connection ends.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay_s: float = 0.0
    cut: int | None = None


class ChatServer:
    """Speaks /v1/chat/completions.

    Attributes:
        answer: maps a request's body to the text of the answer, or to the whole message.
        delay_s: how long every answer takes.
        finish: reason for which answers end.
        faults: taken in turn, one by each request that arrives; None stands for a good answer.
        requests: time of arrival and body of every request.
        completed: bodies of the requests whose answer went out whole.
        busiest: most requests under way at a time.
    """

    def __init__(self, answer: Callable[[dict], str | dict], delay_s: float, finish: str):
        self.answer, self.delay_s, self.finish = answer, delay_s, finish
        self.faults: deque[Fault | None] = deque()
        self.requests: list[tuple[float, dict]] = []
        self.completed: list[dict] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                chat.serve(self)

            def log_message(self, *_):
                """Not into the output of the tests."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def serve(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            self.requests.append((time.monotonic(), body))
            fault = (self.faults.popleft() if self.faults else None) or Fault(delay_s=self.delay_s)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        time.sleep(fault.delay_s)
        reply = fault.body
        if reply is None:
            value = self._completion(body) if fault.status == 200 else {"error": {"message": "injected"}}
            reply = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply))} | fault.headers
        head = [f"HTTP/1.1 {fault.status} Said", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        with self.lock:
            self.busy -= 1
        try:
            http.wfile.write(("\r\n".join(head).encode() + reply)[: fault.cut])
        except (BrokenPipeError, ConnectionResetError):
            return  # who asked is gone
        http.close_connection = fault.cut is not None
        if fault.status == 200 and fault.cut is None:
            with self.lock:
                self.completed.append(body)

    def _completion(self, body: dict) -> dict:
        said = self.answer(body)
        message = {"role": "assistant"} | (said if isinstance(said, dict) else {"content": said})
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
            "usage": {"prompt_tokens": 7, "completion_tokens": len(message["content"].split()), "total_tokens": 9},
        }  # fmt: skip


@pytest.fixture
def chat_server():
    """`chat_server(answer, delay_s=, finish=)` starts a server whose answers `answer(body)` gives."""
    started = []

    def start(answer: Callable[[dict], str | dict], delay_s: float = 0.0, finish: str = "stop") -> ChatServer:
        started.append(ChatServer(answer, delay_s, finish))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="session")
def fault():
    """`fault(status, headers=, body=, delay_s=, cut=)`, for a server's `faults`."""
    return Fault


@pytest.fixture(scope="session")
def launched():
    """`launched(script, *arguments, wait=True, timeout=120, **environment)` runs a script of launch/; with `wait=False`
    it returns the process."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TRITON_INTERPRET", "OPENAI_API_KEY")
    base = {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}

    started = []

    def run(script: str, *arguments: str, wait: bool = True, timeout: int = 120, **environment: str):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / script), *arguments], cwd=ROOT, env=base | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        if not wait:
            return process
        output, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def on_two_ranks(launched):
    """`on_two_ranks(script, *arguments)` runs a script of launch/ as launchers do; returns what each printed."""

    def run(script: str, *arguments: str) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            launched(script, *arguments, wait=False, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], outputs
        return outputs

    return run
