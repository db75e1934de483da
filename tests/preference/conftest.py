"""The real command, and cases to run it on."""

from functools import partial

import pytest


@pytest.fixture(scope="session")
def pairs(launched):
    """`pairs(*arguments, wait=True, **environment)` runs launch/pairs.py; with `wait=False` it returns the process."""
    return partial(launched, "pairs.py")
