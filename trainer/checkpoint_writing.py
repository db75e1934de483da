"""A rank's part of a checkpoint on its way to disk: at once, or from a copy in host memory while training goes on."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mede2.trainer.files import hash_file


class Writing:
    """The files that this rank writes to a checkpoint's folder.

    What the disk refuses is kept in `problem`, not raised: the other ranks have to hear of it, too.

    DeepSpeed 0.19 has writers of its own that go on in the background. They do not serve: `decoupled` starts under its
    own launcher only (it reads CROSS_SIZE), with ZeRO-1 and 2 it cannot hand over its state, it waits before the very
    next update, and of a full disk one rank alone hears, without the reason. `fast` needs libaio and a GPU.

    Args:
        folder: of the checkpoint, as long as it is not whole.
        in_background: copy what is handed over and write it in a thread.
    """

    def __init__(self, folder: Path, *, in_background: bool):
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}  # bytes and sha256 of what is on disk
        self.problem = ""
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._under_way: list[Future] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Write a state as DeepSpeed lays it out; it may change as soon as this returns."""
        state = host_copy(state_dict) if self._thread else state_dict

        def write(path: Path) -> None:
            with open(path, "wb") as file:  # torch alone would not say what the disk said
                torch.save(state, file)

        self.write(Path(path), write)

    def write(self, path: Path, write: Callable[[Path], None]) -> None:
        """Have `write(path)` done, behind what was asked before; the file is on disk and hashed after it."""
        if self._thread:
            self._under_way.append(self._thread.submit(self._write, path, write))
        else:
            self._write(path, write)

    @property
    def done(self) -> bool:
        """Whether nothing is under way any more."""
        return all(future.done() for future in self._under_way)

    def wait(self) -> None:
        """Until all is written, or the disk has refused."""
        for future in self._under_way:
            future.result()
        if self._thread:
            self._thread.shutdown()

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        if self.problem:
            return
        try:
            write(path)
            self.files[str(path.relative_to(self.folder))] = on_disk(path)
        except (OSError, SafetensorError) as error:
            self.problem = str(error)
        except RuntimeError as error:  # by torch, which cannot end its archive after the disk has refused
            if not isinstance(error.__context__, OSError):
                raise
            self.problem = str(error.__context__)


def on_disk(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, which the disk has when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def host_copy(value: Any, copied: dict[int, torch.UntypedStorage] | None = None) -> Any:
    """A copy in host memory that shares nothing with a state of nested dicts, lists and tuples.

    Tensors that share memory do so in the copy as well, so that it takes no more room than the state, in memory as in a
    file; `copied` holds what was copied already.
    """
    copied = {} if copied is None else copied
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in copied:
            copied[storage._cdata] = torch.UntypedStorage(storage.nbytes()).copy_(storage)
        tensor = torch.empty(0, dtype=value.dtype)
        tensor.set_(copied[storage._cdata], value.storage_offset(), value.size(), value.stride())
        if isinstance(value, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, value.requires_grad)
        tensor.__dict__.update(host_copy(value.__dict__, copied))  # DeepSpeed's numbers, which are saved as well
        return tensor.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        same = copy.copy(value)  # of its type, with its attributes
        for key, part in value.items():
            same[key] = host_copy(part, copied)
        return same
    if type(value) in (list, tuple):
        return type(value)(host_copy(part, copied) for part in value)
    return copy.deepcopy(value)
