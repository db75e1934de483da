"""The real command, and cases to run it on."""

from functools import partial
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pairs(launched):
    """`pairs(*arguments, wait=True, **environment)` runs launch/pairs.py; with `wait=False` it returns the process."""
    return partial(launched, "pairs.py")


@pytest.fixture(scope="session")
def demo_cases(tmp_path_factory) -> Path:
    """12 of the demo's cases: cases.jsonl with pictures beside it."""
    from mede2.trainer.demo.records import write_cases

    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 12, seed=3, split="stage2")
