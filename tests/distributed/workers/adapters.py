"""What trains: adapters on whole and 4-bit weights, learning rates of parts, the check of the first updates, runs."""

from contextlib import contextmanager
from pathlib import Path

import torch
from harness import DS_CONFIGS, applied_gradients, main, make_batches, make_engine, make_settings, no_hook

from mede2.trainer import once, run
from mede2.trainer.engine import Engine
from mede2.trainer.loop import train
from mede2.trainer.moved import MovedCheck, NotMoved
from mede2.trainer.objectives import Enhance, elicit
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import Settings
from mede2.trainer.world import World

NF4 = {"quantize": "nf4", "micro_batch_size": 4}
RECOMPUTED = {"activation_checkpointing": True, "micro_batch_size": 2}
# name: saved adapter, ZeRO file, settings beyond the usual
CASES = {
    "lora_z3": ("lora", "z3", {"micro_batch_size": 2}),
    "lora_recomputed_merger_z3": ("lora", "z3", RECOMPUTED | {"train_merger": True}),
    "lora_z2": ("lora", "z2", {"micro_batch_size": 4}),
    "dora_z3": ("dora", "z3", {"micro_batch_size": 4}),
    "dora_dropout_z3": ("dora_dropout", "z3", {"micro_batch_size": 4}),
    "nf4_lora_z2": ("lora", "z2", NF4),
    "nf4_dora_recomputed_z2": ("dora", "z2", NF4 | RECOMPUTED),
}


def gradients(world: World, job: dict, case: str) -> dict:
    """One update of Stage II that goes on from a saved adapter, whose B is not zero."""
    adapter, zero, values = CASES[case]
    settings = make_settings(2, lora_rank=4, **values)
    model = job["models"]["tied"]
    batches = make_batches(world, model, job["records"]["pairs"], 2, settings)
    reference = torch.tensor(job["reference"], dtype=torch.float64)
    objective = Enhance(settings, reference)
    engine = make_engine(world, model, settings, zero, adapter=Path(job["adapters"]) / adapter)
    result = {}

    def keep(step: int, metrics: dict[str, float]) -> None:
        result.update(metrics=dict(metrics), gradients=applied_gradients(engine))

    train(
        engine, objective, batches.feed(range(1)), settings, num_steps=1, before_update=no_hook, after_update=keep
    )  # fmt: skip
    engine.close()
    return result


def elicit_run(
    world: World, job: dict, zero: str, records: str, num_steps: int, settings: Settings, *, has_image: bool = True,
    between=None,
) -> dict:  # fmt: skip
    """Updates of Stage I under the check; returns what still waits for a gradient, and what the check raised.
    `between(engine)` may do harm after the check was made."""
    model = job["models"]["tied"]
    batches = make_batches(world, model, job["records"][records], 1, settings)
    engine = make_engine(world, model, settings, zero)
    check, raised = MovedCheck(engine), ""
    if between:
        between(engine)
    try:
        train(
            engine, elicit, batches.feed(range(num_steps)), settings, num_steps=num_steps, before_update=no_hook,
            after_update=lambda step, metrics: check(has_image),
        )  # fmt: skip
    except NotMoved as error:
        raised = str(error)
    engine.close()
    return {"waiting": check.waiting, "raised": raised}


def rates(world: World, job: dict) -> dict:
    """The first of two updates of warm-up: half of the learning rates, by which Adam moves each value at first."""
    every_part = {"train_vision_tower": True, "train_merger": True, "vision_tower_lr": 1e-4, "merger_lr": 4e-3}
    settings = make_settings(1, warmup_ratio=1.0, micro_batch_size=4, **every_part)
    model = job["models"]["tied"]
    batches = make_batches(world, model, job["records"]["mixed"], 1, settings)
    engine = make_engine(world, model, settings)
    before, after = engine.state_dict() or {}, {}
    train(
        engine, elicit, batches.feed(range(2)), settings, num_steps=2, before_update=no_hook,
        after_update=lambda step, metrics: after.update(engine.state_dict() or {}) if step == 0 else None,
    )  # fmt: skip
    engine.close()
    return {"before": before, "after": after}


def no_gradient(world: World, job: dict, zero: str, has_image: bool) -> dict:
    """The vision tower trains on texts alone: no gradient, but weight decay shrinks it."""
    settings = make_settings(1, train_vision_tower=True, weight_decay=0.5, micro_batch_size=4)
    return elicit_run(world, job, zero, "texts", 1, settings, has_image=has_image)


def harmed(world: World, job: dict, zero: str) -> dict:
    """A bit of a frozen weight changes on rank 1."""

    def between(engine) -> None:
        (held,) = (held for name, _, held in engine.weights() if name.endswith("visual.blocks.1.attn.qkv.weight"))
        if world.rank == 1:
            held.view(-1).view(torch.int32)[3] += 1

    return elicit_run(world, job, zero, "texts", 1, make_settings(1, micro_batch_size=4), between=between)


def moves(world: World, job: dict, zero: str, num_steps: int, **values) -> dict:
    """Nothing is wrong."""
    settings = make_settings(1, micro_batch_size=4, adam_beta1=0.9, **values)
    return elicit_run(world, job, zero, "mixed", num_steps, settings)


SMALL = {
    "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3, "max_length": 512, "lora_rank": 4,
    "epochs": 2, "save_every": 2, "dtype": "fp32",
}  # fmt: skip
RUNS = {  # stage, ZeRO file, records, settings
    "merged": (1, "z3", "texts", {"max_shard_gb": 1e-3, "use_rslora": True, "lora_dropout": 0.1}),
    "adapter": (1, "z3", "texts", {"merge_adapter": False, "lora_target_modules": ["q_proj", "up_proj"]}),
    "nf4_adapter": (2, "z2", "pairs", {"quantize": "nf4", "merge_adapter": False, "optimizer": "adamw_8bit"}),
    "nf4_merged": (2, "z2", "pairs", {"quantize": "nf4", "optimizer": "paged_adamw_8bit", "train_merger": True}),
    "bf16_merged": (
        2,
        "z3",
        "pairs",
        {"dtype": "bf16", "use_dora": True, "lora_target_modules": ["q_proj", "down_proj"]},
    ),
}


ENGINES: dict[str, list[tuple[int, int]]] = {}  # of each run, by engine: how many others were open, its ZeRO stage


@contextmanager
def watched_engines(name: str):
    opened = []

    class Watched(Engine):
        def __init__(self, *arguments):
            others = sum(engine.deepspeed is not None for engine in opened)
            super().__init__(*arguments)
            opened.append(self)
            ENGINES.setdefault(name, []).append((others, self.deepspeed.zero_optimization_stage()))

    run.Engine = once.Engine = Watched
    try:
        yield
    finally:
        run.Engine = once.Engine = Engine


def whole_run(world: World, job: dict, name: str, **more) -> str:
    """A whole run; Stage II starts from the Stage I that merged its adapter."""
    stage, zero, records, values = RUNS[name]
    runs = Path(job["runs"])
    model = job["models"]["tied"] if stage == 1 else str(runs / "merged")
    file = job["records"][records]
    output = str(runs / name) + ("-again" if more else "")
    given = SMALL | values | more | {"model": model, "train": [file], "eval": file, "output": output}
    with watched_engines(f"again_{name}" if more else f"run_{name}"):
        return str(run.run_stage(resolve(stage, [("test", given)]), str(DS_CONFIGS / f"{zero}.json"), world))


SCENARIOS = {case: lambda world, job, case=case: gradients(world, job, case) for case in CASES}
SCENARIOS |= {f"run_{name}": lambda world, job, name=name: whole_run(world, job, name) for name in RUNS}
SCENARIOS |= {
    f"again_{name}": lambda world, job, name=name: whole_run(
        world, job, name, resume=str(Path(job["runs"]) / name / "checkpoints" / "step-000002")
    )
    for name in RUNS
}
SCENARIOS |= {
    "engines": lambda world, job: ENGINES,
    "rates": rates,
    "no_gradient_z3": lambda world, job: no_gradient(world, job, "z3", True),
    "no_gradient_z2": lambda world, job: no_gradient(world, job, "z2", True),
    "no_image_z3": lambda world, job: no_gradient(world, job, "z3", False),
    "harmed_z3": lambda world, job: harmed(world, job, "z3"),
    "harmed_z2": lambda world, job: harmed(world, job, "z2"),
    "moves_8bit_z3": lambda world, job: moves(world, job, "z3", 1, optimizer="adamw_8bit", dtype="bf16"),
    "moves_lora_z2": lambda world, job: moves(world, job, "z2", 1, lora_rank=2),
    "moves_lora_twice_z3": lambda world, job: moves(world, job, "z3", 2, lora_rank=2),
}

if __name__ == "__main__":
    main(SCENARIOS)
