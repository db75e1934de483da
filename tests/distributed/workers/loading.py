"""Memory and reads while a model is loaded."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import DS_CONFIGS, main, make_settings
from transformers import modeling_utils

from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.policy import load_policy
from mede2.trainer.settings import BatchArithmetic
from mede2.trainer.world import World


def anonymous_bytes() -> int:
    """Resident memory of this process without mapped files: what was copied out of a safetensors file counts, the
    file's own pages do not."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory() -> None:
    """Have malloc map every block of 64 KiB and more by itself, so that what is freed leaves the resident memory."""
    m_mmap_threshold = -3  # of mallopt(3)
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024) == 1


class Peak:
    """Most anonymous memory above that at the start, sampled every millisecond."""

    def __enter__(self):
        gc.collect()
        self.start, self.bytes, self.running = anonymous_bytes(), 0, True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes() - self.start)
            time.sleep(1e-3)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.bytes = max(self.bytes, anonymous_bytes() - self.start)


class CountingFile:
    """A safetensors file, as transformers opens it, that counts the values read out of it."""

    values_read = 0
    real_open = staticmethod(modeling_utils.safe_open)

    def __init__(self, *arguments, **options):
        self.file = self.real_open(*arguments, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        CountingFile.values_read += tensor.numel()
        return tensor

    def get_slice(self, name):
        return CountingSlice(self.file.get_slice(name))


class CountingSlice:
    def __init__(self, part):
        self.part = part

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __getitem__(self, index):
        tensor = self.part[index]
        CountingFile.values_read += tensor.numel()
        return tensor


def load(world: World, job: dict, model: str, partitioned: bool) -> dict:
    settings = make_settings(1)
    batch = BatchArithmetic(settings.global_batch_size, settings.micro_batch_size, world.size)
    config = fill_deepspeed_config(
        read_deepspeed_file(DS_CONFIGS / "z3.json"), settings, batch, torch.float32, 512, 10**6
    )
    CountingFile.values_read = 0
    with Peak() as peak:
        policy = load_policy(
            Path(job["models"][model]), dtype=torch.float32, attention="sdpa", implementation="torch",
            deepspeed_config=config if partitioned else None,
        )  # fmt: skip
        for parameter in policy.parameters():  # a mapped file hides what was not touched yet
            parameter.data.add_(0.0)
    here = {id(p): getattr(p, "ds_tensor", p) for p in policy.parameters()}
    return {
        "peak": peak.bytes,
        "values_read": CountingFile.values_read,
        "held": sum(tensor.numel() * tensor.element_size() for tensor in here.values()),
        "whole": sum(getattr(p, "ds_numel", p.numel()) * 4 for p in policy.parameters()),
        "checksum": float(sum(tensor.double().sum() for tensor in here.values())),
    }


SCENARIOS: dict[str, Callable] = {
    "warm_up": lambda world, job: load(world, job, "tied", True),  # imports and communication buffers
    "partitioned": lambda world, job: load(world, job, "wide", True),
    "plain": lambda world, job: load(world, job, "wide", False),
}

if __name__ == "__main__":
    return_freed_memory()
    modeling_utils.safe_open = CountingFile
    main(SCENARIOS)
