"""Reference log-probabilities: computed once by the policy's own forward, cached under a hash of all they depend on."""

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mede2.trainer.data.batches import Batches
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_json, save_tensors
from mede2.trainer.stopping import StopRequested

TENSOR = "answer_logps"


def differing(components: dict[str, str], others: dict[str, str]) -> list[str]:
    """Names of the components that two sets disagree on."""
    return sorted(name for name in components.keys() | others.keys() if components.get(name) != others.get(name))


def cache_path(folder: Path, components: dict[str, str]) -> Path:
    return folder / f"{hash_json(components)[:32]}.safetensors"


def read_cache(folder: Path, components: dict[str, str], num_examples: int) -> Tensor | None:
    """The cached (num_examples, sides) fp64 log-probabilities, or None where there are none.

    Raises:
        ValueError: a file of that name that is damaged or was made from something else; says what differs.
    """
    path = cache_path(folder, components)
    values = _read(path, components, num_examples)
    if values is not None and not torch.isfinite(values).all():
        raise ValueError(f"reference cache {path}: values that are not finite; delete it to compute it again")
    return values


def _read(path: Path, components: dict[str, str], num_examples: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            made_from = json.loads((file.metadata() or {}).get("components", "{}"))
            values = file.get_tensor(TENSOR)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"reference cache {path}: damaged ({error}); delete it to compute it again") from error
    if names := differing(components, made_from):
        raise ValueError(f"reference cache {path}: made from another {', '.join(names)}; delete it to compute it again")
    if len(values) != num_examples:
        raise ValueError(f"reference cache {path}: {len(values)} rows for {num_examples} records; delete it")
    return values


def compute(engine: Engine, batches: Batches, folder: Path, components: dict[str, str], progress: Callable) -> Tensor:
    """Run the reference over a data set, each rank over its share, and cache the result.

    The rows go in the order and the micro-batches of the first epoch, so that the first updates of training meet the
    very same tensors and their margins are zero. A pass that is stopped leaves what it has in a file beside the cache,
    and the next one starts with the first step that still lacks a row: the same steps as if nothing had happened.

    Args:
        engine: the reference model.
        batches: the data set.
        folder: of the cache.
        components: what the key is made of.
        progress: called with (steps done, steps).

    Returns:
        (num_examples, sides) fp64 on the CPU, the same on all ranks.

    Raises:
        ValueError: values that are not finite; names their rows.
        StopRequested: on every rank.
    """
    path, num_examples = cache_path(folder, components), len(batches.dataset.examples)
    unfinished = path.with_suffix(".unfinished.safetensors")
    known = engine.world.on_main(lambda: _known(unfinished, components, num_examples))
    total = batches.sampler.steps_per_epoch
    missing = (step for step in range(total) if not known.keys() >= set(batches.sampler.global_batch(step)))
    steps = range(next(missing, total), total)
    share: dict[int, list[float]] = {}
    asked = None
    engine.deepspeed.eval()
    feed = batches.feed(steps, "reference batch")
    for step in steps:
        for micro_batch in feed.micro_batches(step):
            micro_batch = micro_batch.to(engine.world.device, engine.dtype)
            answers = engine.answer_logps(micro_batch)  # (S,), the chosen answers first
            per_row = answers.view(-1, len(micro_batch.indices)).T
            share |= zip(micro_batch.indices, per_row.tolist(), strict=True)
        progress(step + 1, total)
        if asked := engine.world.asked_to_stop():
            break
    engine.deepspeed.train()
    rows = known | {index: values for part in engine.world.gather(share) for index, values in part.items()}
    if asked:
        lacking = [math.nan] * len(next(iter(rows.values())))
        values = torch.tensor([rows.get(index, lacking) for index in range(num_examples)], dtype=torch.float64)
        engine.world.on_main(lambda: _write_cache(values, unfinished, components))
        raise StopRequested(f"stopped by {asked} in the reference pass, after step {step + 1} of {total}")
    values = torch.tensor([rows[index] for index in range(num_examples)], dtype=torch.float64)
    if not torch.isfinite(values).all():
        bad = [batches.dataset.examples[i].source for i in (~torch.isfinite(values).all(1)).nonzero()[:, 0].tolist()]
        raise ValueError(f"the reference log-probabilities of {', '.join(bad[:5])} are not finite")
    engine.world.on_main(lambda: _write_cache(values, path, components))
    engine.world.on_main(lambda: unfinished.unlink(missing_ok=True))
    return values


def _known(path: Path, components: dict[str, str], num_examples: int) -> dict[int, list[float]]:
    """What an unfinished pass has left, by row."""
    values = _read(path, components, num_examples)
    rows = enumerate(values.tolist() if values is not None else [])
    return {index: row for index, row in rows if all(map(math.isfinite, row))}


def _write_cache(values: Tensor, path: Path, components: dict[str, str]) -> None:
    beside = path.with_suffix(f".{secrets.token_hex(8)}.partial")  # other hosts have processes of the same number
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({TENSOR: values}, beside, {"components": json.dumps(components)})
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"reference_cache: {path.parent} cannot be written ({error}); name another folder") from error
