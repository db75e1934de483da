"""Image features of a run whose vision tower and merger are frozen: computed once, then read in every epoch.

A frozen tower says the same of an image each time. What it says is kept beside the reference log-probabilities, under a
hash of all that it depends on, and training runs the language model only.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mede2.trainer import watchdog
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.features import ImageFeatures, name_of
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_json, save_tensors
from mede2.trainer.reference import differing
from mede2.trainer.stopping import StopRequested

GIB = 2**30
FLUSH_BYTES = 2**30  # of a rank's features in host memory
STALE_S = 86_400
HELP = "make room, or set cache_image_features=false"


def features_path(folder: Path, components: dict[str, str]) -> Path:
    return folder / f"{hash_json(components)[:32]}.image_features"


def read_features(folder: Path, components: dict[str, str], batches: Batches) -> ImageFeatures | None:
    """The features of a data set, or None where there are none.

    Raises:
        ValueError: files that are damaged, incomplete or made from something else; says what differs.
    """
    path = features_path(folder, components)
    if not path.exists():
        return None
    found: set[str] = set()
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                made_from = json.loads((opened.metadata() or {}).get("components", "{}"))
                found.update(opened.keys())
            if names := differing(components, made_from):
                raise ValueError(
                    f"image features {file}: made from another {', '.join(names)}; delete {path} to compute them again"
                )
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"image features {file}: damaged ({error}); delete {path} to compute them again") from error
    missing = [index for index, corrupted in _shown(batches) if f"features/{name_of(index, corrupted)}" not in found]
    if missing:
        source = batches.dataset.examples[missing[0]].source
        raise ValueError(f"image features {path}: those of {source} are missing; delete it to compute them again")
    return ImageFeatures(path)


def compute_features(
    engine: Engine, batches: Batches, folder: Path, components: dict[str, str], progress: Callable
) -> ImageFeatures:
    """Run the vision tower over the images of a data set, each rank over its share, and keep what it gives; of ranks
    that share their micro-batches one keeps it.

    A rank writes a file whenever it holds FLUSH_BYTES. Several runs may compute the same at once; the first serves all.

    Args:
        engine: the policy; it need not train.
        batches: the data set, with pixels.
        folder: of the files.
        components: what the key is made of.
        progress: called with (steps done, steps).

    Raises:
        ValueError: the disk has too little room, or refuses; on every rank.
        StopRequested: on every rank; the pass begins anew.
    """
    world, path = engine.world, features_path(folder, components)
    keeps = world.rank % batches.sampler.batch.sequence_parallel_size == 0
    partial = world.on_main(lambda: _make_folder(path, _num_bytes(engine, batches)))
    metadata, number, problem = {"components": json.dumps(components)}, 0, ""
    share: dict[str, Tensor] = {}
    engine.deepspeed.eval()
    steps = range(batches.sampler.steps_per_epoch)
    feed = batches.feed(steps, "image batch")
    try:
        for step in steps:
            world.stop_if_asked("while the vision tower ran over the images")
            for micro_batch in feed.micro_batches(step):
                micro_batch = micro_batch.to(world.device, engine.dtype)
                features = engine.image_features(micro_batch).cpu()
                if not keeps:
                    continue
                grids = micro_batch.inputs.get("image_grid_thw")
                share |= _by_example(features, None if grids is None else grids.cpu(), batches, micro_batch.indices)
            if keeps and (step + 1 == len(steps) or sum(tensor.nbytes for tensor in share.values()) > FLUSH_BYTES):
                watchdog.phase("writing image features")
                try:
                    save_tensors(share, partial / f"rank-{world.rank:05d}-{number:05d}.safetensors", metadata)
                except (OSError, SafetensorError) as error:
                    problem = str(error)
                share, number = {}, number + 1
            progress(step + 1, len(steps))
        if problems := [each for each in world.gather(problem) if each]:
            raise ValueError(f"cache_image_features: {folder} cannot be written ({problems[0]}); {HELP}")
    except (StopRequested, ValueError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    engine.deepspeed.train()
    world.on_main(lambda: _publish(partial, path))
    return ImageFeatures(path)


def _by_example(features: Tensor, grids: Tensor | None, batches: Batches, indices: tuple[int, ...]):
    """A micro-batch's features and grids, cut by example: tensors by their names in the files."""
    examples, found = batches.dataset.examples, {}
    start = first = 0
    for index, corrupted in batches.collator.shown(examples, indices):
        tokens, images = batches.collator.num_image_tokens(examples[index]), len(examples[index].images)
        name = name_of(index, corrupted)
        found[f"features/{name}"] = features[start : start + tokens].clone()
        if grids is not None:
            found[f"grids/{name}"] = grids[first : first + images].clone()
        start, first = start + tokens, first + images
    return found


def _shown(batches: Batches) -> set[tuple[int, bool]]:
    examples = batches.dataset.examples
    return set(batches.collator.shown(examples, range(len(examples))))


def _num_bytes(engine: Engine, batches: Batches) -> int:
    """What the features take on disk."""
    examples, config = batches.dataset.examples, engine.policy.model.config
    num_tokens = sum(batches.collator.num_image_tokens(examples[index]) for index, _ in _shown(batches))
    num_layers = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    return num_tokens * num_layers * config.get_text_config().hidden_size * engine.dtype.itemsize


def _make_folder(path: Path, need: int) -> Path:
    """A folder of this run alone, for what will be at `path`; those that killed runs left go after STALE_S."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob("*.image_features.*.partial"):
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(path.parent).free) < need:
        raise ValueError(
            f"cache_image_features: {path.parent} has {free / GIB:.3g} GiB free and the features take "
            f"{need / GIB:.3g}; {HELP}"
        )
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir()
    return partial


def _publish(partial: Path, path: Path) -> None:
    try:
        os.rename(partial, path)
    except OSError:  # another run was first, with the same
        if not path.exists():
            raise
        shutil.rmtree(partial)
