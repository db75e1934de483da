"""Updates that are not finite, left out: against runs in which their batch never was, and in a whole run."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import DS_CONFIGS, main, make_batches, make_engine, make_settings, no_hook
from training import Poisoned

from mede2.trainer import run
from mede2.trainer.checkpoint import checkpoint_folders, first_whole, load_checkpoint, save_checkpoint
from mede2.trainer.engine import Engine, NonFiniteUpdate
from mede2.trainer.loop import train
from mede2.trainer.objectives import elicit
from mede2.trainer.resolution import resolve
from mede2.trainer.world import World

BAD_ROW = 5  # of seven, four in an update: in the second of three updates, on rank 1
INF, NAN = float("inf"), float("nan")
KINDS = {"loss": (NAN, False), "gradient": (INF, True)}


@dataclass(frozen=True)
class Drawing(Poisoned):
    """As with dropout, every micro-batch draws random numbers."""

    def __call__(self, *arguments):
        torch.rand(3)
        return super().__call__(*arguments)


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank holds of weights, masters, moments and Adam's step; copies."""
    found = {}
    for number, (master, held) in enumerate(engine.deepspeed.optimizer.optimizer.state.items()):
        held = held | {"master": master.detach()}
        found |= {f"{number} {name}": torch.as_tensor(value).clone() for name, value in held.items()}
    return found | {name: held.clone() for name, _, held in engine.weights()}


def compared(world: World, job: dict, zero: str, dtype: str, kind: str) -> dict:
    """Updates 1, 2, 3 of which the second is left out, beside updates 1 and 3; two micro-batches each."""
    settings = make_settings(
        1, global_batch_size=4, dtype=dtype, adam_beta1=0.9, max_grad_norm=1.0, on_non_finite="skip", weight_decay=0.1,
    )  # fmt: skip
    model, config = job["models"]["tied"], job["configs"].get(zero, zero)
    batches = make_batches(world, model, job["records"]["mixed"], 1, settings)
    found = {}
    for name, steps in {"left out": range(3), "never there": range(0, 3, 2)}.items():
        states, rows = {}, {}
        torch.manual_seed(world.rank)
        engine = make_engine(world, model, settings, config)

        def after_update(step, metrics, engine=engine, states=states, rows=rows):
            states[step], rows[step] = state(engine), metrics

        objective = Drawing(elicit, BAD_ROW, *KINDS[kind])
        train(
            engine, objective, batches.feed(steps), settings, num_steps=3, before_update=no_hook,
            after_update=after_update,
        )  # fmt: skip
        found[name] = {"states": states, "rows": rows, "drawn": torch.rand(3)}
        found[name]["counted"] = (engine.num_skipped, engine.deepspeed.global_steps)
        engine.close()
    ours, theirs = found["left out"], found["never there"]

    def differing(some: dict, others: dict) -> list[str]:
        assert some.keys() == others.keys()
        return [name for name in some if not torch.equal(some[name], others[name])]

    metrics = [{name: run["rows"][2].get(name) for name in ("loss", "grad_norm")} for run in (ours, theirs)]
    return {
        "moved by the first": len(differing(ours["states"][0], ours["states"][2])),
        "moved by the second": differing(ours["states"][0], ours["states"][1]),
        "other at the end": differing(ours["states"][2], theirs["states"][2]), "size": len(ours["states"][2]),
        "metrics": metrics, "drawn alike": torch.equal(ours["drawn"], theirs["drawn"]), "counted": ours["counted"],
        "num_skipped": [ours["rows"][step]["num_skipped"] for step in range(3)], "row": ours["rows"][1],
    }  # fmt: skip


def counted(world: World, job: dict) -> dict:
    """The count of a run that continues from a checkpoint, and what ends it."""
    settings = make_settings(1, global_batch_size=4, on_non_finite="skip", max_skipped=1)
    model, folder = job["models"]["tied"], Path(job["runs"]) / "counted"
    batches, before = make_batches(world, model, job["records"]["mixed"], 1, settings), []
    message = ""
    for steps in (range(2), range(2, 4)):  # the bad row is in updates 2 and 4
        engine = make_engine(world, model, settings, "z2")
        if steps.start:
            load_checkpoint(engine, first_whole(checkpoint_folders(folder), world))
        before.append(engine.num_skipped)
        try:
            train(
                engine, Poisoned(elicit, BAD_ROW, NAN, True), batches.feed(steps), settings, num_steps=4,
                before_update=no_hook, after_update=no_hook,
            )  # fmt: skip
        except NonFiniteUpdate as error:
            message = str(error)
        else:
            save_checkpoint(engine, folder, steps.stop, {}, {})
        engine.close()
    return {"before": before, "message": message}


def whole(world: World, job: dict) -> dict:
    """A run whose longest micro-batch, first update and last update are not finite."""
    output, texts = Path(job["runs"]) / "whole", job["records"]["texts"]
    values = {
        "global_batch_size": 4, "micro_batch_size": 2, "max_length": 512, "dtype": "fp32", "eval": texts,
        "model": job["models"]["tied"], "train": [texts], "max_steps": 4, "epochs": 3, "seed": 6,
        "on_non_finite": "skip", "output": str(output),
    }  # fmt: skip
    run.elicit = Poisoned(elicit, 3, NAN, False)  # the longest row
    run.run_stage(resolve(1, [("test", values)]), str(DS_CONFIGS / "z3.json"), world)
    run.elicit = elicit
    return {"rows": [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]}


ZEROS = ("z1", "z2", "z3", "z2_offload", "z3_offload")
SCENARIOS = {"counted": counted, "whole": whole} | {
    f"{zero}_{dtype}_{kind}": lambda world, job, case=(zero, dtype, kind): compared(world, job, *case)
    for zero in ZEROS for dtype in ("fp32", "bf16") for kind in KINDS
}  # fmt: skip

if __name__ == "__main__":
    main(SCENARIOS)
