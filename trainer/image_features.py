"""Image features of a run whose vision tower and merger are frozen: computed once, then read in every epoch.

A frozen tower says the same of an image each time. What it says is kept beside the reference log-probabilities, under a
hash of all that it depends on, and training runs the language model only.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mede2.trainer.data.batches import Batches
from mede2.trainer.data.features import ImageFeatures, name_of
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_json
from mede2.trainer.reference import differing

GIB = 2**30


def features_path(folder: Path, components: dict[str, str]) -> Path:
    return folder / f"{hash_json(components)[:32]}.image_features"


def read_features(folder: Path, components: dict[str, str]) -> ImageFeatures | None:
    """The features of a data set, or None where there are none.

    Raises:
        ValueError: files that are damaged or were made from something else; says what differs.
    """
    path = features_path(folder, components)
    if not path.exists():
        return None
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                made_from = json.loads((opened.metadata() or {}).get("components", "{}"))
            if names := differing(components, made_from):
                raise ValueError(
                    f"image features {file}: made from another {', '.join(names)}; delete {path} to compute them again"
                )
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"image features {file}: damaged ({error}); delete {path} to compute them again") from error
    return ImageFeatures(path)


def compute_features(
    engine: Engine, batches: Batches, folder: Path, components: dict[str, str], progress: Callable
) -> ImageFeatures:
    """Run the vision tower over the images of a data set, each rank over its share, and keep what it gives.

    Args:
        engine: the policy; it need not train.
        batches: the data set, with pixels.
        folder: of the files.
        components: what the key is made of.
        progress: called with (steps done, steps).

    Raises:
        ValueError: the disk has too little room.
        StopRequested: on every rank; the pass begins anew.
    """
    world, path = engine.world, features_path(folder, components)
    partial = path.with_suffix(".partial")
    world.on_main(lambda: _make_room(partial, _num_bytes(engine, batches)))
    share: dict[str, Tensor] = {}
    engine.deepspeed.eval()
    steps = range(batches.sampler.steps_per_epoch)
    feed = batches.feed(steps, "image batch")
    for step in steps:
        world.stop_if_asked("while the vision tower ran over the images")
        for micro_batch in feed.micro_batches(step):
            micro_batch = micro_batch.to(world.device, engine.dtype)
            features = engine.image_features(micro_batch).cpu()
            grids = micro_batch.inputs.get("image_grid_thw")
            share |= _by_example(features, None if grids is None else grids.cpu(), batches, micro_batch.indices)
        progress(step + 1, len(steps))
    engine.deepspeed.train()
    save_file(share, partial / f"rank-{world.rank:05d}.safetensors", metadata={"components": json.dumps(components)})
    world.barrier()  # all ranks have written
    world.on_main(lambda: os.replace(partial, path))
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


def _num_bytes(engine: Engine, batches: Batches) -> int:
    """What the features take on disk, those of deeper layers not counted."""
    collator, examples = batches.collator, batches.dataset.examples
    shown = set(collator.shown(examples, range(len(examples))))
    num_tokens = sum(collator.num_image_tokens(examples[index]) for index, _ in shown)
    width = engine.policy.model.config.get_text_config().hidden_size
    return num_tokens * width * engine.dtype.itemsize


def _make_room(partial: Path, need: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    if (free := shutil.disk_usage(partial).free) < need:
        raise ValueError(
            f"cache_image_features: {partial.parent} has {free / GIB:.3g} GiB free and the features take "
            f"{need / GIB:.3g}; make room, name another reference_cache, or set cache_image_features=false"
        )
