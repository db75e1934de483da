"""What no update of a run changes, computed once: features of images, and reference log-probabilities."""

import dataclasses
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from mede2.trainer import reference
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.engine import Engine
from mede2.trainer.files import hash_json
from mede2.trainer.image_features import compute_features, read_features
from mede2.trainer.prepare import Prepared
from mede2.trainer.settings import ENHANCE
from mede2.trainer.world import World


def compute_once(run: Prepared) -> tuple[Prepared, dict[str, Tensor]]:
    """From the cache, or computed by engines of their own, so that training starts alike whether the cache was there.

    Returns:
        the run with features in place of images where its vision tower is frozen, and the reference log-probabilities
        (num_examples, sides) fp64 of each data set; none where no loss reads them. No model stays.
    """
    folder = Path(run.settings.reference_cache or run.output.parent / "reference_cache")
    with closing(_Models(run)) as models:
        seen = _with_features(run, folder, models)
        if run.stage != ENHANCE or not run.settings.needs_reference:
            return seen, {}
        own = run.settings.reference  # another model sees the images otherwise
        return seen, _reference_logps(run if own else seen, folder, models)


class _Models:
    """Engines without an optimizer, loaded when they are needed, one at a time."""

    def __init__(self, run: Prepared):
        self.run, self.folder, self.engine = run, None, None

    def __call__(self, folder: Path) -> Engine:
        if folder != self.folder:
            self.close()
            run, self.folder = self.run, folder
            self.engine = Engine(run.load(folder, quantize=run.settings.quantize), run.config, run.world, run.dtype)
        return self.engine

    def close(self) -> None:
        if self.engine:
            self.engine.close()
        self.folder = self.engine = None


def _with_features(run: Prepared, folder: Path, models: _Models) -> Prepared:
    if not run.caches_image_features:
        return run
    seen = {}
    for name, batches in run.sets.items():
        if batches.dataset.has_images:
            components = _components(run, batches) | {"weights": run.identity["model"]}
            features = run.world.on_main(lambda parts=components, of=batches: read_features(folder, parts, of))
            if features is None:
                run.world.say(f"image features of the {name} records: computing, into {folder}")
                features = compute_features(
                    models(run.model), batches, folder, components, _Ticker(run.world, "vision tower")
                )
            else:
                run.world.say(f"image features of the {name} records: found in {features.folder}")
            seen[name] = batches.with_features(features)
    return dataclasses.replace(run, train=seen.get("train", run.train), held_out=seen.get("eval", run.held_out))


def _reference_logps(run: Prepared, folder: Path, models: _Models) -> dict[str, Tensor]:
    values = {}
    for name, batches in run.sets.items():
        components = _components(run, batches) | {
            "weights": run.identity["reference"] or run.identity["model"],
            "quantize": str(run.settings.quantize),
            "log-probabilities": run.implementation,
        }
        size = len(batches.dataset.examples)
        found = run.world.on_main(lambda parts=components, size=size: reference.read_cache(folder, parts, size))
        if found is None:
            run.world.say(f"reference log-probabilities of the {name} records: computing")
            engine = models(_reference_model(run))
            found = reference.compute(engine, batches, folder, components, _Ticker(run.world, "reference pass"))
        else:
            run.world.say(f"reference log-probabilities of the {name} records: found in {folder}")
        values[name] = found.to(run.world.device)
    return values


def _components(run: Prepared, batches: Batches) -> dict[str, str]:
    """Of the keys of both caches."""
    return {
        "processor": run.identity["processor"],
        "records": batches.dataset.fingerprint,
        "corruption": str(batches.collator.corruption),
        "dtype": str(run.dtype),
        "attention": run.settings.attention,
        "device": run.world.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _reference_model(run: Prepared) -> Path:
    """The model that --reference names, or the starting policy."""
    if run.settings.reference is None:
        return run.model
    folder = locate_model(run.settings.reference)
    theirs = hash_json(describe_processor(load_processor(folder, run.settings.max_pixels)))
    if theirs != run.identity["processor"]:
        raise ValueError(f"reference: {folder} has another tokenizer, template or image processor than {run.model}")
    return folder


class _Ticker:
    """A line of progress every fifth of the way."""

    def __init__(self, world: World, title: str):
        self.world, self.title, self.shown = world, title, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 5 // total > self.shown:
            self.shown = done * 5 // total
            self.world.say(f"  {self.title} {done}/{total}")
