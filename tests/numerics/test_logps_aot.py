"""Every launch of the Triton kernels, compiled for every architecture: nothing spills, and shared memory suffices."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "logps_aot.py"


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """One row a launch, from the command, in a process that does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def script(compiled):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("logps_aot", SCRIPT)
    module = sys.modules["logps_aot"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["logps_aot"]


def test_every_launch_is_compiled(compiled, script):
    assert len(compiled) == sum(len(script.launches(arch)) for arch in script.BLOCKS)
    assert {row["arch"] for row in compiled} == {80, 90, 100}
    assert {row["dtype"] for row in compiled} == {"bf16", "fp16", "fp32"}


def test_nothing_spills_and_shared_memory_suffices(compiled, script):
    for row in compiled:
        assert row["spilled"] == 0, row
        assert 0 < row["shared"] <= script.SHARED_LIMIT[row["arch"]], row
        assert 0 < row["registers"] <= 255, row


def test_16_bit_products_run_on_the_new_tensor_cores(compiled):
    for row in compiled:
        assert row["wgmma"] == (row["arch"] >= 90 and row["dtype"] != "fp32"), row


def test_a_spill_or_too_much_shared_memory_does_not_fit(script):
    good = dict(arch=90, kernel="forward", extras=False, dtype="bf16", blocks=None, registers=255, wgmma=True)
    assert script.Compiled(**good, spilled=0, shared=script.SHARED_LIMIT[90]).fits
    assert not script.Compiled(**good, spilled=4, shared=1024).fits
    assert not script.Compiled(**good, spilled=0, shared=script.SHARED_LIMIT[90] + 1).fits
