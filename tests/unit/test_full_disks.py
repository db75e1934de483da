"""Disks that refuse a row of metrics or the cached reference: real file systems, one full and one read-only."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mede2.trainer.metrics import Metrics, read_metrics
from mede2.trainer.ownership import Ownership
from mede2.trainer.reference import _write_cache, cache_path, read_cache

VALUES = torch.linspace(-9, 0, 10_000, dtype=torch.float64)[:, None]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 40 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", tmp_path]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread, told below
def test_a_full_disk_ends_the_metrics_with_one_error_and_keeps_the_rows(disk):
    metrics, wide = Metrics(disk, 0, 999, "stage 1"), {f"metric {number}": 1.0 for number in range(40)}

    def write() -> None:
        try:
            for step in range(1, 999):
                metrics.row(step, {"num_tokens": 30} | wide, seconds=0.5)
        finally:
            metrics.close()

    with pytest.raises(OSError, match="No space left on device") as refused:
        write()
    assert refused.value.__context__ is None  # closing has added nothing
    rows = read_metrics(disk / "metrics.jsonl")
    assert len(rows) > 5
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(("options", "why"), [("rw", "No space left on device"), ("ro", "Read-only file system")])
def test_a_reference_cache_that_cannot_be_written_is_named(disk, options, why):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
    path = cache_path(disk / "cache", {})
    with pytest.raises(ValueError, match=rf"^reference_cache: {disk}/cache cannot be written \(.*{why}.*\); name "):
        _write_cache(VALUES, path, {})
    assert read_cache(disk / "cache", {}, len(VALUES)) is None


def test_an_output_that_became_read_only_is_named(disk):
    owner = Ownership(disk)
    owner.take(print)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ValueError, match=rf"^output: {disk} cannot be written \(Read-only file system\); when it can"):
        owner.write(lambda: Metrics(disk, 0, 9, "stage 1"))
