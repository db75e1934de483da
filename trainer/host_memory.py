"""Freed memory that the C library keeps for itself, and gives back to the system when asked."""

import ctypes
import os
from pathlib import Path

# What micro-batches may free and the library keep, as to have a page again takes time. The wide model of
# benchmarks/bench_step.py frees about 300 MiB with each, and so returns them after every second.
KEPT_BYTES = 320 * 2**20


def return_free_memory() -> None:
    """Hand what is freed back to the system: after a model, hundreds of MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3); other C libraries than glibc have none
    if trim:
        trim(0)


class Resident:
    """A process that trains on a CPU, whose resident set would grow by what its largest micro-batches once took, and
    from update to update by the gaps between."""

    def __init__(self):
        self.least = _resident_bytes()

    def limit(self) -> None:
        """Call where much has just been freed."""
        if _resident_bytes() - self.least > KEPT_BYTES:
            return_free_memory()
            self.least = _resident_bytes()


def _resident_bytes() -> int:
    """0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
