"""DeepSpeed's checkpoint files, which are pickles, read as tensors and plain values alone: no file can run code.

`python -m mede2.trainer.unpickling MODULE ARGUMENT...` runs a program of DeepSpeed that reads them in the same way.
"""

import multiprocessing
import os
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pickle import UnpicklingError

import torch

NAMED = re.compile(r"GLOBAL (\S+)")  # in torch's error: what the file would call
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch heeds it even where a call says weights_only=False, as DeepSpeed's do
CLASSES = (  # of DeepSpeed, in its own files; they hold plain values and do nothing when they are made
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)


def _member(of: type, name: str) -> Enum:
    """What stands in for `getattr`, by which Python 3.11 pickled the members of enumerations until 3.11.4, and which
    could fetch anything from anything."""
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise UnpicklingError(f"Unsupported global: GLOBAL getattr of {of!r:.80}")
    return of[name]


@contextmanager
def tensors_only(where: object) -> Iterator[None]:
    """Within it `torch.load` makes nothing but tensors, plain values and CLASSES, whatever its caller asks of it.

    Args:
        where: what is read, for the error.

    Raises:
        ValueError: a file holds anything else, which is then not made.
    """
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        classes = [pkgutil.resolve_name(name) for name in CLASSES]
        with torch.serialization.safe_globals([*classes, (_member, "builtins.getattr")]):
            yield
    except UnpicklingError as error:
        named = NAMED.search(str(error))
        raise ValueError(
            f"resume: a file of {where} is not read, for it holds more than tensors and values"
            f"{f' ({named[1]})' if named else ''} and could run code; no run wrote it like that: start over with "
            "--resume never"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # so that its workers are held to it, too
    sys.argv = sys.argv[1:]
    with tensors_only("the checkpoint"):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
