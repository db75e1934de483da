"""The contenders of bench_step.py: TRL's DPOTrainer and our Stage II, each in its own loop on the same records.

Each runs in a process of its own that stops at a `Gate` between two updates, so that contenders take turns. Both train
the language model only, by DPO without NLL, with the same Adam, clipping, constant learning rate, and pairs in each
update. TRL learns the newline that the template writes behind the answer too, we do not; here TRL gets a template that
writes it before the next turn, so that both see the same tokens. In bf16, DeepSpeed keeps fp32 masters of bf16 weights;
TRL without it has fp32 weights and autocast. Imports transformers and, in the processes, trl.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bench_logps import DTYPES, resident_mib

BETA = 0.1
ADAM = {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class Job:
    """What is trained. `order` is that of the pairs; sizes count pairs; `scratch` is a folder that may be written."""

    model: Path
    records: Path
    order: tuple[int, ...]
    global_batch_size: int
    micro_batch_size: int
    dtype: str
    device: str
    deepspeed_file: Path
    scratch: Path


@dataclass(frozen=True)
class Contender:
    """Attributes:
    trainer: "trl" or "ours".
    compact: TRL: score answer positions only, as it does by itself where Triton runs.
    deepspeed: TRL: under the same DeepSpeed file as ours.
    settings: ours: what differs from the defaults.
    """

    trainer: str
    compact: bool = False
    deepspeed: bool = False
    settings: dict = field(default_factory=dict)

    def run(self, job: Job, gate: "Gate") -> None:
        if self.trainer == "trl":
            train_trl(job, gate, self.compact, self.deepspeed)
        else:
            train_ours(job, gate, self.settings)


class Gate:
    """Where a training process waits for its turn: `arrive` is called between two updates.

    The peak is of the allocator on CUDA, else of the process's resident set above what it was when the gate was made.
    """

    def __init__(self, connection: Connection, device: str):
        self.connection, self.device = connection, device
        self.extra: dict[str, float] = {}  # what a contender measures itself, for the next report
        self.base_mib = 0.0 if device == "cuda" else resident_mib("VmRSS")
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.left = time.perf_counter()

    def arrive(self, metrics: dict[str, float]) -> None:
        """Report the update that is done, and wait for leave to do the next, or to end the process."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        report = {"ms": 1e3 * (time.perf_counter() - self.left), "peak_mib": self._peak_mib(), **metrics, **self.extra}
        self.connection.send(report)
        if not self.connection.recv():
            sys.exit()
        self.left = time.perf_counter()

    def _peak_mib(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resident_mib("VmHWM") - self.base_mib


def contend(contender: Contender, job: Job, connection: Connection, log: Path) -> None:
    """The whole life of a contender's process; it and what it starts are one process group, named by its id."""
    os.setpgrp()
    pr_set_pdeathsig = 1  # of prctl(2): if the benchmark is killed, its contenders do not stay
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # a command's own default
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    import trl.trainer.dpo_trainer  # noqa: F401 - of both, so that memory begins at the same libraries

    import mede2.trainer.run  # noqa: F401

    contender.run(job, Gate(connection, job.device))


def train_ours(job: Job, gate: Gate, settings: dict) -> None:
    """`run_stage`, the whole run of a stage, with the gate behind every update and a clock around what is computed
    once: image features and the reference."""
    from mede2.trainer import once, reference, run
    from mede2.trainer.metrics import read_metrics
    from mede2.trainer.resolution import resolve
    from mede2.trainer.settings import ENHANCE
    from mede2.trainer.world import join_world

    output = job.scratch / "run"

    def clocked(compute: Callable, *arguments, **keywords):
        started = time.perf_counter()
        values = compute(*arguments, **keywords)
        ms = 1e3 * (time.perf_counter() - started) / len(job.order)
        gate.extra["once_ms_per_pair"] = gate.extra.get("once_ms_per_pair", 0.0) + ms
        return values

    def gated(train: Callable, *arguments, after_update: Callable, **keywords) -> None:
        def then_wait(step: int, metrics: dict[str, float]) -> None:
            after_update(step, metrics)
            gate.arrive(read_metrics(output / "metrics.jsonl")[-1])

        train(*arguments, after_update=then_wait, **keywords)

    reference.compute = partial(clocked, reference.compute)
    once.compute_features = partial(clocked, once.compute_features)
    run.train = partial(gated, run.train)
    values = ADAM | {
        "model": str(job.model), "train": [str(job.records)], "output": str(output), "dtype": job.dtype, "beta": BETA,
        "objective": {"sigmoid": 1.0}, "scheduler": "constant", "warmup_ratio": 0.0,
        "global_batch_size": job.global_batch_size, "micro_batch_size": job.micro_batch_size,
    }  # fmt: skip
    run.run_stage(resolve(ENHANCE, [("bench_step", values | settings)]), str(job.deepspeed_file), join_world())


def train_trl(job: Job, gate: Gate, compact: bool, deepspeed: bool) -> None:
    """TRL's DPOTrainer on a model of ours, its default settings where none is named here."""
    import trl.trainer.utils
    from datasets import Dataset, Image, List
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from mede2.trainer.data.processing import load_processor
    from mede2.trainer.policy import PARTS, freeze
    from mede2.trainer.world import join_world

    if compact:
        trl.trainer.utils._use_triton = lambda device: True
    processor = load_processor(job.model)
    processor.chat_template = _newline_before_turns(processor.chat_template)
    if deepspeed:
        join_world()
    arguments = DPOConfig(
        **ADAM, output_dir=str(job.scratch), beta=BETA, lr_scheduler_type="constant", max_grad_norm=1.0,
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.global_batch_size // job.micro_batch_size,
        train_sampling_strategy="sequential", bf16=job.dtype == "bf16", use_cpu=job.device == "cpu",
        deepspeed=str(job.deepspeed_file) if deepspeed else None, gradient_checkpointing=False, max_length=None,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    weights = DTYPES[job.dtype] if deepspeed else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(job.model, dtype=weights, use_safetensors=True)
    freeze(model, {part: part == "language_model" for part in PARTS})

    class AtTheGate(TrainerCallback):
        last: dict[str, float] = {}  # noqa: RUF012 - of the update before

        def on_log(self, args, state, control, logs=None, **others):
            self.last = {name: logs[name] for name in ("loss", "logps/chosen", "logps/rejected") if name in logs}

        def on_step_begin(self, args, state, control, **others):  # its batches are fetched, the update before is logged
            if state.global_step:
                gate.arrive(self.last)

    rows = [json.loads(line) for line in job.records.read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list([_trl_row(rows[index], job.records.parent) for index in job.order])
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=dataset.cast_column("images", List(Image())), processing_class=processor,
        callbacks=[AtTheGate()],
    )  # fmt: skip

    def clocked(fetch: Callable, *arguments):
        started = time.perf_counter()
        batches = fetch(*arguments)
        gate.extra["data_wait_ms"] = 1e3 * (time.perf_counter() - started)
        return batches

    trainer.get_batch_samples = partial(clocked, trainer.get_batch_samples)
    trainer.train()


def _newline_before_turns(template: str) -> str:
    """The demo's chat template with each newline after a turn moved before the next turn."""
    begin = "{% for message in messages %}<|im_start|>"
    end = "<|im_end|>\n{% endfor %}"
    answer = "{% if add_generation_prompt %}<|im_start|>"
    assert all(template.count(part) == 1 for part in (begin, end, answer)), template
    newline = "{{ '\\n' }}"
    return (
        template.replace(end, "<|im_end|>{% endfor %}")
        .replace(begin, "{% for message in messages %}{% if not loop.first %}" + newline + "{% endif %}<|im_start|>")
        .replace(answer, "{% if add_generation_prompt %}" + newline + "<|im_start|>")
    )


def _trl_row(row: dict, folder: Path) -> dict:
    """A record as TRL takes it: contents are texts, and it puts the images before the first one itself."""
    image, text = row["prompt"][0]["content"]
    assert image == {"type": "image"}
    return {
        "prompt": [{"role": "user", "content": text["text"]}], "chosen": row["chosen"], "rejected": row["rejected"],
        "images": [str(folder / name) for name in row["images"]],
    }  # fmt: skip
