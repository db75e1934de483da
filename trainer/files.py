"""Files written whole or not at all, and their hashes."""

import hashlib
import json
import os
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and files have no need of it
    from torch import Tensor

    from mede2.trainer.world import World


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_tensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors with the mode of any new file: the library closes its own to all but their owner."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(S_IMODE(mode))


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_weights(folder: Path, world: "World") -> str:
    """sha256 over a model folder's config and safetensors files, which the ranks share out among them."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    share = {path.name: hash_file(path) for path in files[world.rank :: world.size]}
    hashes = {name: value for part in world.gather(share) for name, value in part.items()}
    return hash_json(hashes)
