"""Real processes for the distributed tests, tiny real models and records, and the plain single-process truth."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from mede2.trainer.data.processing import load_processor
from mede2.trainer.demo.model import build_base

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
WORKERS = Path(__file__).parent / "workers"
GRACE_S = 5.0  # between the first rank's failure and the end of the others
BETA = 0.1


def run_distributed(worker: str, world_size: int, folder: Path, *, timeout_s: float = 240.0, **job) -> list[dict]:
    """Run `workers/<worker>.py` in `world_size` processes and return what each rank stored.

    Args:
        worker: name of a worker.
        world_size: number of ranks.
        folder: for the job file, the ranks' output and their results.
        timeout_s: after it every process is killed and the test fails. The first run on a machine compiles DeepSpeed's
            shared-memory communication, most of a minute.
        job: handed to the worker as JSON; "scenarios" names what to run.

    Raises:
        AssertionError: a rank failed or the time is over; shows the end of each rank's output.
    """
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job | {"results": str(folder)}), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    outputs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, output in enumerate(outputs):
        with open(output, "wb") as log:
            processes.append(subprocess.Popen(
                [sys.executable, str(WORKERS / f"{worker}.py"), str(folder / "job.json")],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=folder,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            ))  # fmt: skip
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if any(codes) or None in codes:
        ends = ["killed" if code is None else f"exit {code}" for code in codes]
        shown = "\n".join(
            f"--- rank {rank}: {end}\n{output.read_text(errors='replace')[-4000:]}"
            for rank, (end, output) in enumerate(zip(ends, outputs, strict=True))
        )
        raise AssertionError(f"{worker} on {world_size} ranks did not finish within {timeout_s:.0f} s:\n{shown}")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Callable[..., list[dict]]:
    """`run_distributed` with a folder of its own for each launch."""

    def start(worker: str, world_size: int, **job) -> list[dict]:
        return run_distributed(worker, world_size, tmp_path_factory.mktemp(f"{worker}-{world_size}") / "job", **job)

    return start


@pytest.fixture(scope="session")
def models(tmp_path_factory, sharpen) -> dict[str, str]:
    """Model folders: tied and untied heads; `other` has other weights, `one_key` one key-value head; `wide` is large
    enough to weigh in memory."""
    folder = tmp_path_factory.mktemp("models")
    tied = build_base(folder / "tied", seed=0)
    wide = {"hidden_size": 512, "intermediate_size": 2560, "num_attention_heads": 8}
    wide |= {"num_key_value_heads": 8, "mrope_section": [8, 12, 12], "out_hidden_size": 512}
    _variant(tied, tied, sharpen, seed=1, tie=True)
    _variant(tied, folder / "other", sharpen, seed=2, tie=True)
    _variant(tied, folder / "untied", sharpen, seed=3, tie=False)
    _variant(tied, folder / "wide", sharpen, seed=4, tie=False, **wide)
    _variant(tied, folder / "one_key", sharpen, seed=5, tie=True, num_key_value_heads=1)
    return {name: str(folder / name) for name in ("tied", "untied", "other", "wide", "one_key")}


def _variant(base: Path, folder: Path, sharpen: Callable, *, seed: int, tie: bool, **sizes) -> None:
    """Write `base` with other sizes and with sharp weights."""
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tie
    for name, value in sizes.items():
        if name == "mrope_section":
            config.text_config.rope_parameters["mrope_section"] = value
        elif name == "out_hidden_size":
            config.vision_config.out_hidden_size = value
        else:
            setattr(config.text_config, name, value)
    model = sharpen(AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32), seed)
    processor_files = [p for p in base.iterdir() if p.suffix in (".json", ".jinja", ".txt") and p.name != "config.json"]
    contents = {path.name: path.read_bytes() for path in processor_files}
    model.save_pretrained(folder)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


ANSWERS = (
    "effusion", "left upper zone clear, therefore consolidation is not likely; the history decides for effusion",
    "no", "a mass in the right lower zone, fever, cough, two weeks of weight loss, and so the diagnosis is open",
    "pneumothorax on the left side", "clear", "nodule, nodule, effusion, and again a nodule in the middle zone",
)  # fmt: skip


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> dict[str, str]:
    """Seven rows each, answers of 2 to 40 tokens. `texts`: Stage I without images. `mixed` (Stage I) and `pairs`
    (Stage II): even rows have an image, odd rows none, so that with micro-batches of one row rank 0 of two sees
    images only and rank 1 (but for the filler row) none."""
    folder = tmp_path_factory.mktemp("records")
    names = []
    for number in range(len(ANSWERS)):
        pixels = [(number * 37 + x * 11 + y * 5 + (x * y) % 17) % 256 for y in range(40) for x in range(56)]
        image = Image.new("L", (56, 40))
        image.putdata(pixels)
        image.save(folder / f"{number}.png")
        Image.new("L", image.size, round(sum(pixels) / len(pixels))).save(folder / f"{number}-blank.png")
        names.append(f"{number}.png")
    rows: dict[str, list[dict]] = {"texts": [], "mixed": [], "pairs": [], "long": []}
    for number, answer in enumerate(ANSWERS):
        text = {"type": "text", "text": f"Case {number}: which finding? " + "Write the zones. " * (number % 3)}
        parts, images = ([{"type": "image"}, text], [names[number]]) if number % 2 == 0 else ([text], [])
        say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731 - three uses, one line
        rows["texts"].append({"messages": [{"role": "user", "content": [text]}, *say(answer)]})
        rows["mixed"].append({"messages": [{"role": "user", "content": parts}, *say(answer)], "images": images})
        rows["pairs"].append({
            "prompt": [{"role": "user", "content": parts}], "chosen": say(answer),
            "rejected": say(ANSWERS[(number + 3) % len(ANSWERS)]), "images": images,
        })  # fmt: skip
    for number, length in enumerate((20, 6000)):
        prompt = [{"role": "user", "content": f"Case {number}: " + "a " * length}]
        rows["long"].append({"prompt": prompt, "chosen": say("mass"), "rejected": say("clear")})
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


class Plain:
    """A model as transformers loads it, run one conversation at a time: no padding, no filler, no DeepSpeed, logits
    and all. Shares no code with the trainer but the loading of the processor."""

    def __init__(self, folder: str):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.processor = load_processor(Path(folder))

    def token_logps(self, messages: list[dict], images: list[Path]) -> torch.Tensor:
        """Log-probabilities (N,) of the last message's tokens and of its end token, differentiable."""
        render = self.processor.apply_chat_template
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = render(messages, tokenize=False).rstrip("\n")
        pictures = [Image.open(path).convert("RGB") for path in images] or None
        start = self.processor(text=[prompt], images=pictures, return_tensors="pt")["input_ids"].shape[1]
        inputs = self.processor(text=[whole], images=pictures, return_tensors="pt")
        logits = self.model(**inputs).logits[0, :-1]
        targets = inputs["input_ids"][0, 1:, None]
        return logits.log_softmax(-1).gather(1, targets)[start - 1 :, 0]

    def conversations(self, records: str) -> list[tuple[list[torch.Tensor], dict]]:
        """Per row of a file the token log-probabilities of each of its conversations, and the row."""
        found = []
        for line in Path(records).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            images = [Path(records).parent / image for image in row.get("images", [])]
            pair = [row["prompt"] + row[side] for side in ("chosen", "rejected")] if "prompt" in row else []
            talks = pair or [row["messages"]]
            found.append(([self.token_logps(_parts(talk), images) for talk in talks], row))
        return found

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def _parts(messages: list[dict]) -> list[dict]:
    text = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content  # noqa: E731
    return [{"role": message["role"], "content": text(message["content"])} for message in messages]


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    return Plain


@pytest.fixture(scope="session")
def make_reference() -> Callable[[str, str], list[list[float]]]:
    """`make_reference(model, pairs)`: made-up reference log-probabilities of each pair of a file, some nats away from
    the model's, so that no margin is zero."""

    def make(model: str, pairs: str) -> list[list[float]]:
        with torch.no_grad():
            rows = Plain(model).conversations(pairs)
        return [
            [float(chosen.sum()) + 2.0 * number - 5.0, float(rejected.sum()) - 1.5 * number + 4.0]
            for number, ((chosen, rejected), _) in enumerate(rows)
        ]

    return make


@pytest.fixture(scope="session")
def reference_logps(make_reference, models, records) -> list[list[float]]:
    return make_reference(models["tied"], records["pairs"])


@pytest.fixture(scope="session")
def with_blank() -> Callable[[list[list[float]]], list[list[float]]]:
    """Adds made-up reference log-probabilities of the chosen answers under a blank image."""
    return lambda reference: [[*row, row[0] - 3.0 + number] for number, row in enumerate(reference)]


@pytest.fixture(scope="session")
def dpo_and_nll() -> Callable[[str, str, list[list[float]]], dict]:
    """`dpo_and_nll(model, pairs, reference)`: loss and gradients of Stage II, written out by hand over the plain
    model's log-probabilities."""

    def compute(model: str, pairs: str, reference: list[list[float]]) -> dict:
        run = Plain(model)
        sides = [pair for pair, _ in run.conversations(pairs)]
        margins = torch.stack([
            (chosen.double().sum() - rejected.double().sum()) - (of_chosen - of_rejected)
            for (chosen, rejected), (of_chosen, of_rejected) in zip(sides, reference, strict=True)
        ])  # fmt: skip
        preference = -torch.nn.functional.logsigmoid(BETA * margins).mean()
        loss = preference - torch.cat([chosen for chosen, _ in sides]).mean()
        loss.backward()
        return {"loss": float(loss.detach()), "gradients": run.gradients()}

    return compute


def _image_preferences(model: str, pairs: str, reference: list[list[float]]) -> dict:
    """Loss and gradients of DPO, half of mDPO's image preference (blank images) and a quarter of its anchor."""
    run = Plain(model)
    logsigmoid, terms = torch.nn.functional.logsigmoid, {"pair": [], "image": [], "anchor": []}
    for ((chosen, rejected), row), (of_chosen, of_rejected, of_blank) in zip(
        run.conversations(pairs), reference, strict=True
    ):
        own = chosen.double().sum() - of_chosen
        terms["pair"].append(-logsigmoid(BETA * (own - (rejected.double().sum() - of_rejected))))
        terms["anchor"].append(-logsigmoid(BETA * own))
        if row["images"]:
            blank = [Path(pairs).parent / image.replace(".png", "-blank.png") for image in row["images"]]
            under_blank = run.token_logps(_parts(row["prompt"] + row["chosen"]), blank).double().sum() - of_blank
            terms["image"].append(-logsigmoid(BETA * (own - under_blank)))
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    loss = means["pair"] + 0.5 * means["image"] + 0.25 * means["anchor"]
    loss.backward()
    return {"loss": float(loss.detach()), "gradients": run.gradients()}


@pytest.fixture(scope="session")
def truth(models, records, reference_logps, with_blank, dpo_and_nll) -> dict[str, dict]:
    """Loss and gradients of each objective, by hand."""

    def nll(folder: str, file: str) -> dict:
        run = Plain(folder)
        logps = [tokens for (tokens,), _ in run.conversations(file)]
        loss = -torch.cat(logps).mean()
        loss.backward()
        return {"loss": float(loss.detach()), "gradients": run.gradients()}

    return {
        "elicit": nll(models["tied"], records["texts"]),
        "elicit_mixed": nll(models["tied"], records["mixed"]),
        "enhance": dpo_and_nll(models["tied"], records["pairs"], reference_logps),
        "mdpo": _image_preferences(models["tied"], records["pairs"], with_blank(reference_logps)),
        "enhance_one_key": dpo_and_nll(models["one_key"], records["pairs"], reference_logps),
        "enhance_untied": dpo_and_nll(models["untied"], records["pairs"], reference_logps),
    }
