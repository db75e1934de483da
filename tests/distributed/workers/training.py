"""What happens to the weights: frozen parts, failed updates, bf16, checkpoints, export, the reference cache."""

import dataclasses
import os
import resource
from pathlib import Path

import torch
from harness import main, make_batches, make_engine, make_settings, no_hook

from mede2.trainer import reference
from mede2.trainer.between import check_start
from mede2.trainer.checkpoint import Checkpoints, checkpoint_folders, first_whole, load_checkpoint
from mede2.trainer.data.batches import Batches, Totals
from mede2.trainer.data.collate import MicroBatch
from mede2.trainer.engine import Engine, NonFiniteUpdate
from mede2.trainer.export import export
from mede2.trainer.loop import train
from mede2.trainer.objectives import Enhance, Objective, elicit
from mede2.trainer.rehearsal import rehearse
from mede2.trainer.settings import Settings
from mede2.trainer.world import World


def run(
    engine: Engine, objective: Objective, batches: Batches, settings: Settings, num_steps: int, first_step: int = 0,
    after_update=no_hook,
) -> list[float]:  # fmt: skip
    """Updates `first_step` .. `num_steps` - 1; returns the losses."""
    losses = []

    def after(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        after_update(step, metrics)

    feed = batches.feed(range(first_step, num_steps))
    train(engine, objective, feed, settings, num_steps=num_steps, before_update=no_hook, after_update=after)
    return losses


def enhance(job: dict, settings: Settings) -> Enhance:
    reference = torch.tensor(job["reference"], dtype=torch.float64)
    return Enhance(settings, reference)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The whole model, on rank 0; copies."""
    return {name: tensor.clone() for name, tensor in (engine.state_dict() or {}).items()}


def frozen_elicit(world: World, job: dict) -> dict:
    """Stage I on texts with weight decay, which would shrink whatever the optimizer holds."""
    settings = make_settings(1, weight_decay=0.5, learning_rate=1e-2, micro_batch_size=4)
    engine = make_engine(world, job["models"]["tied"], settings)
    run(engine, elicit, make_batches(world, job["models"]["tied"], job["records"]["texts"], 1, settings), settings, 2)
    after = weights(engine)
    engine.close()
    return after


@dataclasses.dataclass(frozen=True)
class Poisoned(Objective):
    """An objective that goes wrong in one row: its loss becomes `factor` times itself, or only its gradient does."""

    objective: Objective
    row: int
    factor: float
    only_gradient: bool

    def __call__(self, token_logps: torch.Tensor, batch: MicroBatch, totals: Totals):
        if self.row in batch.indices and self.only_gradient:
            token_logps.register_hook(lambda gradient: gradient * self.factor)
        loss, shares = self.objective(token_logps, batch, totals)
        if self.row in batch.indices and not self.only_gradient:
            loss = loss * self.factor
            shares = shares | {"loss": loss.detach()}
        return loss, shares


def not_finite(world: World, job: dict, zero: str, dtype: str, factor: float, only_gradient: bool) -> dict:
    """Row 5 (on rank 1) goes wrong in the second update. What is raised on this rank, and whether the weights are those
    after the first."""
    settings = make_settings(2, dtype=dtype, global_batch_size=4)
    model = job["models"]["tied"]
    batches = make_batches(world, model, job["records"]["pairs"], 2, settings)
    engine = make_engine(world, model, settings, zero)
    objective = enhance(job, settings)
    run(engine, objective, batches, settings, 1)
    before, message = weights(engine), ""
    try:
        run(engine, Poisoned(objective, 5, factor, only_gradient), batches, settings, 2, first_step=1)
    except NonFiniteUpdate as error:
        message = str(error)
    after = weights(engine)
    engine.close()
    kept = all(torch.equal(before[name], after[name]) for name in before)
    return {"message": message, "weights_kept": kept, "num_weights": len(before)}


def bf16(world: World, job: dict) -> dict:
    """Stage I in bf16 on one batch again and again."""
    settings = make_settings(1, dtype="bf16", adam_beta1=0.9, learning_rate=4e-3, micro_batch_size=4)
    engine = make_engine(world, job["models"]["tied"], settings)
    batches = make_batches(world, job["models"]["tied"], job["records"]["mixed"], 1, settings)
    losses = run(engine, elicit, batches, settings, 6)
    dtypes = sorted({str(parameter.dtype) for parameter in engine.policy.parameters()})
    engine.close()
    return {"losses": losses, "dtypes": dtypes}


def resume(world: World, job: dict) -> dict:
    """Five updates of two an epoch without a break; then the last two again in a fresh engine from a checkpoint."""
    mix = {"sigmoid": 0.8, "bco_pair_shifted": 0.2, "nll": 1.0}  # with a state that must come back
    settings = make_settings(2, global_batch_size=4, micro_batch_size=2, adam_beta1=0.9, objective=mix)
    model, folder = job["models"]["tied"], Path(job["checkpoints"])
    batches = make_batches(world, model, job["records"]["pairs"], 2, settings)
    objective = enhance(job, settings)
    identity = {"settings": {"seed": 0}}
    drawn = {}
    torch.manual_seed(100 + world.rank)

    def save(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            Checkpoints(engine, folder, identity).save(3, objective.state_dict())
            drawn["after saving"] = torch.rand(4)

    engine = make_engine(world, model, settings)
    losses = run(engine, objective, batches, settings, 5, after_update=save)
    uninterrupted = weights(engine)
    engine.close()

    if world.is_main:  # what a process killed while it writes would leave behind
        (folder / ".step-000004.partial").mkdir()
        (folder / "step-000004").mkdir()
        (folder / "step-000004" / "generators-rank-00000.safetensors").write_bytes(b"")
    world.barrier()
    checkpoint = first_whole(checkpoint_folders(folder), world)
    torch.manual_seed(7)
    engine = make_engine(world, model, settings)
    load_checkpoint(engine, checkpoint)
    objective = enhance(job, settings)
    objective.load_state_dict(checkpoint.objective)
    drawn["after loading"] = torch.rand(4)
    losses_resumed = run(engine, objective, batches, settings, 5, first_step=checkpoint.step)
    resumed = weights(engine)
    engine.close()
    return {
        "step": checkpoint.step, "world_size": checkpoint.world_size, "identity": checkpoint.identity, "losses": losses,
        "losses_resumed": losses_resumed, "drawn": drawn, "uninterrupted": uninterrupted, "resumed": resumed,
        "left": sorted(path.name for path in folder.iterdir()),
    }  # fmt: skip


def saved(world: World, job: dict) -> dict:
    """What stays of six checkpoints of which two are kept, and every third; then a disk that refuses large files, and
    one without room."""
    folder = Path(job["checkpoints"]).with_name("saved")
    engine = make_engine(world, job["models"]["tied"], make_settings(1))
    left = []
    for step in range(1, 7):
        Checkpoints(engine, folder, {}, keep=2, keep_every=3).save(step, {})
        left.append([path.name for path in checkpoint_folders(folder)])
        world.barrier()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    refused = raised(lambda: Checkpoints(engine, folder, {}, keep=1).save(7, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    large = folder / "step-000006" / "large"  # as if the last one had been of a larger model
    if world.is_main:
        large.touch()
        os.truncate(large, 2**43)
    world.barrier()
    full = raised(lambda: Checkpoints(engine, folder, {}, keep=1).save(7, {}))
    world.barrier()
    if world.is_main:
        large.unlink()
    world.barrier()
    whole = first_whole(checkpoint_folders(folder), world)
    Checkpoints(engine, folder, {}, keep=1, keep_every=3).save(7, {})
    least = engine.num_state_bytes()
    engine.close()
    return {
        "left": left, "refused": refused, "full": full, "whole": whole.step, "num_bytes": whole.num_bytes,
        "at_last": sorted(path.name for path in folder.iterdir() if path.is_dir()), "least": least,
    }  # fmt: skip


def raised(do) -> str:
    try:
        do()
    except ValueError as error:
        return str(error)
    return ""


def exported(world: World, job: dict, model: str, zero: str) -> dict:
    """Train all but the vision tower with weight decay, export, and say what the engine answers: {row: [token
    log-probabilities of chosen, of rejected]}."""
    settings = make_settings(2, micro_batch_size=4, weight_decay=0.5, learning_rate=1e-2, train_merger=True)
    batches = make_batches(world, job["models"][model], job["records"]["pairs"], 2, settings)
    engine = make_engine(world, job["models"][model], settings, zero)
    run(engine, enhance(job, settings), batches, settings, 1)
    answers = {}
    engine.deepspeed.eval()
    for batch in batches.micro_batches(0):
        with torch.no_grad():
            logps = engine(batch)
        for place, index in enumerate(batch.indices):
            sides = (place, place + len(batch.indices))
            answers.setdefault(index, [logps[batch.sequence == side].clone() for side in sides])
    export(engine, Path(job["models"][model]), Path(job["exports"]) / f"{model}-{zero}", None, "a card")
    engine.close()
    return {row: values for part in reversed(world.gather(answers)) for row, values in part.items()}


def first_metrics(values: torch.Tensor, engine: Engine, batches: Batches, settings: Settings) -> dict[str, float]:
    """Metrics of the first global batch, before its update, against the reference log-probabilities `values`."""
    found = {}

    class Enough(Exception):
        pass

    def before_update(step: int, metrics: dict[str, float]) -> None:
        found.update(metrics)
        raise Enough

    objective = Enhance(settings, values)
    try:
        train(
            engine, objective, batches.feed(range(1)), settings, num_steps=1, before_update=before_update,
            after_update=no_hook,
        )  # fmt: skip
    except Enough:
        return found
    raise AssertionError("before_update was not called")


def reference_elsewhere(world: World, job: dict) -> dict:
    """What is said of the first margins, in bf16 and with a large beta, when the reference's values come from other
    micro-batches in another layout; and when they come from another model."""
    ours = make_settings(2, dtype="bf16", beta=10_000.0, global_batch_size=8, micro_batch_size=4)
    theirs = make_settings(2, dtype="bf16", global_batch_size=2, micro_batch_size=1, shared_prefix=False)
    pairs, folder, said = job["records"]["pairs"], Path(job["cache"]) / "elsewhere", {}
    for name in ("tied", "other"):
        engine = make_engine(world, job["models"][name], theirs, trains=False)
        batches = make_batches(world, job["models"][name], pairs, 2, theirs)
        values = reference.compute(engine, batches, folder, {"weights": name}, lambda done, total: None)
        engine.close()
        engine = make_engine(world, job["models"]["tied"], ours)
        metrics = first_metrics(values, engine, make_batches(world, job["models"]["tied"], pairs, 2, ours), ours)
        engine.close()
        said[name] = {"gap": metrics["rewards/margins_abs"], "raised": ""}
        try:
            check_start(metrics, ours.beta, torch.bfloat16)
        except ValueError as error:
            said[name]["raised"] = str(error)
    return said


def reference_cache(world: World, job: dict) -> dict:
    """Compute, read back, and take the first update's margins; then those against another reference."""
    settings = make_settings(2, global_batch_size=4, micro_batch_size=2)
    model, folder = job["models"]["tied"], Path(job["cache"]) / str(world.size)
    batches = make_batches(world, model, job["records"]["pairs"], 2, settings)
    components = {"records": batches.dataset.fingerprint, "weights": "those of tied"}
    absent = reference.read_cache(folder, components, len(batches.dataset.examples)) is None
    world.barrier()
    engine = make_engine(world, model, settings)
    computed = reference.compute(engine, batches, folder, components, lambda done, total: None)
    read = reference.read_cache(folder, components, len(batches.dataset.examples))

    own = first_metrics(read, engine, batches, settings)["rewards/margins_abs"]
    engine.close()
    other = make_engine(world, job["models"]["other"], settings, trains=False)
    of_other = reference.compute(other, batches, folder, components | {"weights": "other"}, lambda done, total: None)
    other.close()
    engine = make_engine(world, model, settings)
    against_other = first_metrics(of_other, engine, batches, settings)["rewards/margins_abs"]
    engine.close()
    return {"absent": absent, "computed": computed, "read": read, "gap": own, "gap_other": against_other,
            "files": len(list(folder.iterdir()))}  # fmt: skip


def rehearsed(world: World, job: dict, between) -> dict:
    """One update after a dry run of the heaviest micro-batch: its loss and gradient norm."""
    settings = make_settings(2, global_batch_size=4, micro_batch_size=2)
    model = job["models"]["tied"]
    batches = make_batches(world, model, job["records"]["pairs"], 2, settings)
    engine = make_engine(world, model, settings)
    objective, found = enhance(job, settings), {}
    before = weights(engine)
    between(engine, objective, batches)
    kept = all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
    run(engine, objective, batches, settings, 1, after_update=lambda step, metrics: found.update(metrics))
    engine.close()
    return {"kept": kept, "loss": found["loss"], "grad_norm": found["grad_norm"]}


def closed(world: World, job: dict) -> dict:
    """Bytes of the parameters before and after an engine is closed, by ZeRO file: nothing else may keep them."""
    found = {}
    for zero in ("z2", "z3"):
        engine = make_engine(world, job["models"]["tied"], make_settings(2), zero, trains=False)
        tensors = [t for p in engine.policy.parameters() for t in (p, getattr(p, "ds_tensor", None)) if t is not None]
        before = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        engine.close()
        found[zero] = (before, sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    return found


def out_of_memory(world: World, job: dict) -> str:
    """A dry run in an address space that has no room for the attention mask of a long pair, which eager needs."""
    settings = make_settings(2, global_batch_size=2, micro_batch_size=1, max_length=20_000, attention="eager")
    engine = make_engine(world, job["models"]["tied"], settings)
    batches = make_batches(world, job["models"]["tied"], job["records"]["long"], 2, settings)
    objective = Enhance(settings, torch.zeros(2, 2, dtype=torch.float64))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**28, resource.RLIM_INFINITY))
    try:
        rehearse(engine, objective, batches, range(1))
    except ValueError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        engine.close()
    return ""


INF, NAN = float("inf"), float("nan")
SCENARIOS = {
    "frozen_elicit": frozen_elicit,
    "loss_nan_z3": lambda world, job: not_finite(world, job, "z3", "fp32", NAN, False),
    "gradient_inf_z3": lambda world, job: not_finite(world, job, "z3", "fp32", INF, True),
    "gradient_nan_z3_bf16": lambda world, job: not_finite(world, job, "z3", "bf16", NAN, True),
    "gradient_nan_z2": lambda world, job: not_finite(world, job, "z2", "fp32", NAN, True),
    "gradient_nan_z2_bf16": lambda world, job: not_finite(world, job, "z2", "bf16", NAN, True),
    "unrehearsed": lambda world, job: rehearsed(world, job, lambda *parts: None),
    "rehearsed": lambda world, job: rehearsed(world, job, lambda *parts: rehearse(*parts, range(2))),
    "out_of_memory": out_of_memory,
    "closed": closed,
    "bf16": bf16,
    "resume": resume,
    "saved": saved,
    "export_tied_z3": lambda world, job: exported(world, job, "tied", "z3"),
    "export_untied_z3": lambda world, job: exported(world, job, "untied", "z3"),
    "export_tied_z2": lambda world, job: exported(world, job, "tied", "z2"),
    "reference_cache": reference_cache,
    "reference_elsewhere": reference_elsewhere,
}

if __name__ == "__main__":
    main(SCENARIOS)
