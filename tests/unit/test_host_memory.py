"""Freed memory goes back to the system when it is much, and only then."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from mede2.trainer.host_memory import KEPT_BYTES, Resident, _resident_bytes

ctypes.CDLL(None).mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD: blocks of a MiB come from the heap
resident = Resident()
before = _resident_bytes()
blocks = [bytearray(b"x" * 2**20) for _ in range(int(float(sys.argv[1]) * KEPT_BYTES) >> 20)]
last = bytearray(b"y" * 2**20)  # behind them, so that the heap cannot shrink by itself
del blocks
freed = _resident_bytes()
resident.limit()
print(KEPT_BYTES >> 20, (freed - before) >> 20, (_resident_bytes() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is of glibc")
@pytest.mark.parametrize(("share", "returned"), [(0.5, False), (2.0, True)])
def test_much_goes_back_and_little_stays(share, returned):
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(share)], capture_output=True, text=True, check=True)
    limit, kept, left = map(int, run.stdout.split())
    assert kept >= share * limit, "the heap gave the blocks back by itself, so this shows nothing"
    assert (left < 32) == returned
    assert left == kept or returned
