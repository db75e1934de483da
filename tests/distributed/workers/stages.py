"""Whole runs of both stages, as the commands start them."""

from contextlib import contextmanager
from pathlib import Path

from harness import DS_CONFIGS, main

from mede2.trainer import reference
from mede2.trainer.resolution import resolve
from mede2.trainer.run import run_stage
from mede2.trainer.world import World

SMALL = {"global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-4, "max_length": 512, "dtype": "fp32"}


def stage(world: World, job: dict, number: int, name: str, **values) -> str:
    """Run a stage into the folder `name` of this number of ranks; returns the folder of the model."""
    output = str(Path(job["runs"]) / f"{world.size}-ranks" / name)
    resolved = resolve(number, [("test", SMALL | values | {"output": output})])
    return str(run_stage(resolved, str(DS_CONFIGS / "z3.json"), world))


def stage1(world: World, job: dict) -> str:
    texts = job["records"]["texts"]
    start = job["models"]["tied"]
    return stage(world, job, 1, "stage1", model=start, train=[texts], epochs=2, eval=texts, save_every=3)


def stage2(world: World, job: dict) -> str:
    """Starts from the Stage I beside its output."""
    pairs = job["records"]["pairs"]
    return stage(world, job, 2, "stage2", train=[pairs], eval=pairs, epochs=1, train_vision_tower=True)


@contextmanager
def no_reference_pass():
    """Whoever computes reference log-probabilities is caught."""

    def refuse(*arguments):
        raise AssertionError("reference log-probabilities were computed")

    compute, reference.compute = reference.compute, refuse
    try:
        yield
    finally:
        reference.compute = compute


def stage2_cached(world: World, job: dict) -> str:
    """The same records and starting policy again, with a frozen tower."""
    with no_reference_pass():
        return stage(world, job, 2, "stage2_cached", train=[job["records"]["pairs"]], epochs=2)


def stage2_pixels(world: World, job: dict) -> str:
    """The same once more, with the tower running in every step."""
    pairs = [job["records"]["pairs"]]
    return stage(world, job, 2, "stage2_pixels", train=pairs, epochs=2, cache_image_features=False)


def stage2_shared(world: World, job: dict) -> str:
    """As `stage2_cached`, by two ranks that share every micro-batch, from caches of their own making."""
    pairs, cache = job["records"]["pairs"], str(Path(job["runs"]) / "shared_cache")
    return stage(
        world, job, 2, "stage2_shared", train=[pairs], eval=pairs, epochs=2, reference_cache=cache,
        sequence_parallel_size=2, mlp_tiles=2,
    )  # fmt: skip


def stage2_simpo(world: World, job: dict) -> str:
    """Without a reference, and with a folder for its cache of its own, where none can be found."""
    pairs, mix = job["records"]["pairs"], {"simpo": 1.0, "nll": 0.5}
    with no_reference_pass():
        return stage(
            world, job, 2, "simpo/stage2_simpo", model=job["models"]["tied"], train=[pairs], eval=pairs, max_steps=1,
            objective=mix, beta=2.0,
        )  # fmt: skip


def stage2_reference(world: World, job: dict) -> str:
    """Against a reference that is not the starting policy."""
    other = job["models"]["other"]
    return stage(world, job, 2, "stage2_reference", train=[job["records"]["pairs"]], max_steps=1, reference=other)


SCENARIOS = {
    "stage1": stage1, "stage2": stage2, "stage2_cached": stage2_cached, "stage2_pixels": stage2_pixels,
    "stage2_reference": stage2_reference, "stage2_simpo": stage2_simpo,
    "stage2_shared": stage2_shared,
}  # fmt: skip

if __name__ == "__main__":
    main(SCENARIOS)
