"""`evaluate.py run` as users run it: models on a server that look or do not, one in this process, kills, mistakes."""

import base64
import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.evaluation.answered import PROBES

FORM = "<think>seen</think> <answer>{}</answer>"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def looks(body: dict) -> str:
    """A model that looks: `above` or `below` as the picture has it, `above` where there is none; it can add, too."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        last = content.rstrip("?").split()[-1]
        return FORM.format(int(last) + 2 if last.isdigit() else "above")
    url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"), dtype=float)
    return FORM.format("above" if pixels[:16].mean() >= pixels[16:].mean() else "below")


def guesses(body: dict) -> str:
    """A model that does not: always `below`, in its own words, and nothing on sums. Drawn answers vary by seed."""
    if "lighter" not in json.dumps(body["messages"]):
        return "I cannot tell."
    return "The answer is (B)." if body["temperature"] == 0 or body["seed"] % 2 else "The answer is (A)."


def either(body: dict) -> str:
    return looks(body) if body["model"] == "looks" else guesses(body)


def test_two_models_and_what_they_look_at(evaluate, chat_server, shades, tmp_path):
    """Every answer of the two is known, so every figure of the report is."""
    server = chat_server(either)
    command = [
        "run", "--model", f"guesses=guesses@{server.url}", "--model", f"looks=looks@{server.url}", "--benchmark",
        f"cases={shades}", "--output", str(tmp_path / "out"), "--probe", "all", "--samples", "4",
    ]  # fmt: skip
    done = evaluate(*command)
    assert done.returncode == 0, done.stdout
    rows = rows_of(tmp_path / "out" / "answers.jsonl")
    assert Counter((row["model"], row["probe"], row["sample"]) for row in rows) == {
        **{(model, "image", sample): 8 for model in ("guesses", "looks") for sample in (None, 0, 1, 2, 3)},
        **{(model, probe, None): 6 for model in ("guesses", "looks") for probe in PROBES},
    }  # fmt: skip
    assert {row["benchmark"] for row in rows} == {"shades"}
    greedy = {(row["model"], row["probe"], row["case"]): row for row in rows if row["sample"] is None}
    images = [f"q{number}" for number in range(6)]
    assert [greedy["looks", "image", f"q{number}"]["right"] for number in range(8)] == [True] * 8
    assert [greedy["guesses", "image", f"q{number}"]["right"] for number in range(8)] == [False, True] * 3 + [False] * 2
    assert [greedy["looks", "blank", case]["answer"] for case in images] == ["above"] * 6  # as light above as below
    assert [greedy["looks", "text_only", case]["right"] for case in images] == [True, False] * 3
    assert all(greedy["guesses", probe, case]["answer"] == "below" for probe in ("noise", "shuffle") for case in images)
    assert {row["rung"] for row in rows if row["model"] == "looks"} == {"format"}
    assert greedy["guesses", "image", "q6"] == greedy["guesses", "image", "q6"] | {"rung": None, "answer": None}
    assert [greedy["looks", "image", f"q{number}"]["recall"] for number in (0, 7)] == [None, 1.0]

    for word in ("guesses", "looks", "report.html"):
        assert word in done.stdout
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert "Nobody looked whether the questions stand in the training files" in html
    asked, written = len(server.requests), (tmp_path / "out" / "answers.jsonl").read_bytes()
    again = evaluate(*command)
    assert again.returncode == 0, again.stdout
    assert len(server.requests) == asked
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == written

    more = evaluate(*command, "--model", f"third=guesses@{server.url}", "--samples", "5")
    assert more.returncode == 0, more.stdout
    assert len(server.requests) - asked == 2 * 8  # a fifth answer of each; the third is the first by another name


def test_killed_in_the_middle_no_answer_is_lost(evaluate, chat_server, shades, tmp_path):
    server = chat_server(either, delay_s=0.1)
    command = [
        "run", "--model", f"looks=looks@{server.url}", "--benchmark", f"cases={shades}", "--output",
        str(tmp_path / "out"), "--samples", "6", "--concurrency", "4",
    ]  # fmt: skip
    process = evaluate(*command, wait=False)
    deadline = time.monotonic() + 60
    while len(server.completed) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)
    assert 20 <= len(server.completed) < 56
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    done = evaluate(*command)
    assert done.returncode == 0, done.stdout
    rows = rows_of(tmp_path / "out" / "answers.jsonl")
    assert len(rows) == 8 * 7
    assert all(row["right"] for row in rows)
    assert len(server.completed) <= 8 * 7 + 4


def test_a_model_here_on_one_rank_and_on_two(evaluate, on_two_ranks, demo_cases, tmp_path):
    """The demo's base model: the same answers to the byte; then one report of both runs."""

    def command(name: str) -> list[str]:
        return [
            "run", "--model", f"{name}={BASE_MODEL}", "--benchmark", f"cases={demo_cases}", "--probe", "blank",
            "--output", str(tmp_path / name), "--max-tokens", "16", "--batch-size", "4", "--limit", "6",
        ]  # fmt: skip

    one = evaluate(*command("one"))
    assert one.returncode == 0, one.stdout
    on_two_ranks("evaluate.py", *command("two"))
    first, second = (rows_of(tmp_path / name / "answers.jsonl") for name in ("one", "two"))
    assert len(first) == 12
    assert [row | {"model": "two"} for row in first] == second
    both = evaluate("report", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "both"))
    assert both.returncode == 0, both.stdout
    report = json.loads((tmp_path / "both" / "report.json").read_text(encoding="utf-8"))
    assert report["models"] == ["one", "two"]


MISTAKES = {
    "no name": (["--model", "runs/x"], "--model runs/x: NAME=FOLDER or NAME=MODEL@URL"),
    "a name twice": (["--model", "base=a", "--model", "base=b"], "'base' is the name of a already"),
    "an unknown format": (["--model", "a=b", "--benchmark", "medqaa=x"], "medqaa"),
    "a benchmark twice": (["--benchmark", "cases={cases}", "--benchmark", "cases={cases}"], "twice; the other is"),
    "greedy samples": (["--samples", "2", "--temperature", "0"], "--samples 2: at temperature 0"),
    "a server's option": (["--concurrency", "3"], "--concurrency: only with a --model NAME=MODEL@URL"),
    "a local option": (
        ["--model", "a=b@http://127.0.0.1:1/v1", "--batch-size", "3"],
        "only with a --model NAME=FOLDER",
    ),
    "no such file": (["--benchmark", "cases=none.jsonl"], "none.jsonl: No such file"),
    "no such model": ([], "runs/none"),
}


@pytest.mark.parametrize(("changes", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(evaluate, shades, tmp_path, changes, told):
    changes = [change.format(cases=shades) for change in changes]
    model = [] if "--model" in changes else ["--model", "base=runs/none"]
    benchmark = [] if "--benchmark" in changes else ["--benchmark", f"cases={shades}"]
    done = evaluate("run", *model, *benchmark, "--output", str(tmp_path / "out"), *changes)
    assert done.returncode == 2, done.stdout
    assert done.stdout.count("Error: ") == 1
    assert told in done.stdout
    assert "Traceback" not in done.stdout
