"""One update, and a short whole run of Stage II, of each model family."""

from gradients import one_update
from harness import main
from stages import stage

from mede2.trainer.world import World


def update(world: World, job: dict, family: str) -> dict:
    return one_update(world, job | {"reference": job["references"][family]}, family)


def update_shared(world: World, job: dict, family: str) -> dict:
    return one_update(world, job | {"reference": job["references"][family]}, f"{family}_shared")


def run(world: World, job: dict, family: str) -> str:
    """Returns the folder of the trained model."""
    pairs, start = job["records"]["pairs"], job["models"][family]
    return stage(world, job, 2, family, model=start, train=[pairs], eval=pairs, max_steps=2, train_merger=True)


SCENARIOS = {
    f"{what.__name__}_{family}": lambda world, job, what=what, family=family: what(world, job, family)
    for what in (update, update_shared, run)
    for family in ("qwen2_5_vl", "qwen3_vl", "internvl3")
}

if __name__ == "__main__":
    main(SCENARIOS)
