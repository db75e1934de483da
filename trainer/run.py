"""One run of a stage, from settings to a verified model: the order in which everything happens."""

import dataclasses
import shutil
import time
from datetime import datetime
from pathlib import Path

import torch

from mede2.trainer import watchdog
from mede2.trainer.between import Between
from mede2.trainer.checkpoint import Checkpoint, load_checkpoint
from mede2.trainer.data.batches import Feed
from mede2.trainer.data.dataset import write_bad_rows
from mede2.trainer.demo import defaults
from mede2.trainer.engine import Engine, NonFiniteUpdate, check_nvme, make_optimizer
from mede2.trainer.export import compare, export, model_card, publish
from mede2.trainer.files import write_json, write_text
from mede2.trainer.loop import train
from mede2.trainer.metrics import read_metrics
from mede2.trainer.objectives import Enhance, Objective, elicit
from mede2.trainer.once import compute_once
from mede2.trainer.ownership import Ownership
from mede2.trainer.policy import PARTS, freeze
from mede2.trainer.prepare import SUMMARY, Prepared, describe, find_checkpoint, for_this_world, prepare, settings_yaml
from mede2.trainer.rehearsal import rehearse
from mede2.trainer.resolution import Resolved, resolve
from mede2.trainer.settings import ELICIT, ENHANCE, STAGE_NAMES
from mede2.trainer.stopping import StopRequested
from mede2.trainer.weights_and_biases import check_wandb, start_wandb
from mede2.trainer.world import World


def run_stage(resolved: Resolved, deepspeed_file: str, world: World) -> Path | None:
    """Run a stage to its end, or continue it, and return the folder of the trained model (None after a dry run).

    Args:
        resolved: settings of the stage, as far as flags, recipe and defaults give them.
        deepspeed_file: the --ds file.
        world: the ranks.

    Raises:
        ValueError: anything that a user can mend, before the first update.
        StopRequested: on every rank; the same command continues.
    """
    started = time.perf_counter()
    if resolved.settings.wandb:
        world.on_main(check_wandb)
    output = Path(resolved.settings.output or f"runs/stage{resolved.stage}")
    if resolved.stage == ENHANCE and resolved.settings.model is None:
        resolved = _start_from_stage1(resolved, deepspeed_file, output, world)
    watchdog.phase("checking settings and data")
    run = prepare(resolved, deepspeed_file, output, world)
    for line in describe(run):
        world.say(line)
    if run.settings.dry_run:
        world.say("dry run: nothing was trained")
        return None
    watchdog.phase("looking for a checkpoint")
    owner = world.on_main(lambda: Ownership(output))
    former = world.on_main(owner.check_free)
    if former and owner.ours.succeeds(former) and run.settings.resume != "auto":  # its first start has done that
        world.say(f"resume: auto, not {run.settings.resume}: this is a later start of job {former.job}")
        run = dataclasses.replace(run, resolved=run.resolved.replaced("a later start of the job", resume="auto"))
    checkpoint = find_checkpoint(run, owner)
    check_nvme(run.config, resumes=checkpoint is not None)
    if checkpoint is None and world.on_main((output / SUMMARY).exists):
        world.say(f"{output} holds this very run, done; --resume never runs it again")
        return output
    try:
        return _carry_out(run, checkpoint, owner, started)
    except StopRequested:
        world.on_main(owner.release)
        raise


def _carry_out(run: Prepared, checkpoint: Checkpoint | None, owner: Ownership, started: float) -> Path:
    """Train, export, sum up; `started` is the clock at the start of the run."""
    world, output = run.world, run.output
    world.on_main(lambda: owner.write(lambda: _write_inputs(run)))
    if run.settings.wandb:
        world.on_main(lambda: start_wandb(run.settings, output, STAGE_NAMES[run.stage]))
    if checkpoint:
        run, checkpoint = for_this_world(run, checkpoint)
    torch.manual_seed(run.settings.seed + world.rank)  # dropout differs from rank to rank

    first_step = checkpoint.step if checkpoint else 0
    seen, values = compute_once(run)
    feed = seen.train.feed(range(first_step, run.num_steps))  # forks its workers, so before there is an engine
    objective, held_out_objective = _objectives(run, values)
    engine = _engine(run)
    if checkpoint:
        watchdog.phase("loading the checkpoint")
        load_checkpoint(engine, checkpoint)
        objective.load_state_dict(checkpoint.objective)
        world.say(f"continuing {checkpoint.path} at update {first_step} of {run.num_steps}")
    _train(seen, engine, objective, held_out_objective, feed, owner, checkpoint.owed if checkpoint else None)
    rows = world.on_main(lambda: read_metrics(output / "metrics.jsonl"))
    last = rows[-1] if rows else {}  # none where a finished checkpoint continues in a new output
    watchdog.phase("exporting")
    difference = _export(run, engine, last, owner)
    watchdog.phase("finishing")
    seconds = time.perf_counter() - started
    summary = {
        "stage": run.stage, "updates": run.num_steps, "world_size": world.size, "seconds": round(seconds, 1),
        "metrics": last, "export_logps_difference": difference,
        "finished": datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip
    world.on_main(lambda: owner.write(lambda: write_json(output / SUMMARY, summary)))
    world.on_main(owner.release)
    for line in closing_summary(rows[0], last) if rows else ():
        world.say(line)
    world.say(
        f"done: {run.num_steps} updates, {seconds:.0f} s; model in {output} "
        f"(loaded again: log-probabilities within {difference:.1e} of the trained ones)"
    )
    return output


def _start_from_stage1(resolved: Resolved, deepspeed_file: str, output: Path, world: World) -> Resolved:
    """Stage II without --model starts from the Stage I beside its output; if there is none, that runs first."""
    stage1 = output.parent / "stage1"
    if not world.on_main((stage1 / SUMMARY).exists):
        world.say(f"no --model and no finished Stage I in {stage1}: running Stage I first, with its embedded default")
        given = {name: getattr(resolved.settings, name) for name in ("dry_run", "wandb", "nvme_path")}
        passed = {name: value for name, value in given.items() if value} | {"output": str(stage1)}
        layers = [("embedded default", defaults.recipe(ELICIT)), ("Stage II's flag", passed)]
        run_stage(resolve(ELICIT, layers), deepspeed_file, world)
        if resolved.settings.dry_run:
            return resolved.replaced("embedded default (a dry run trains no Stage I)", model=str(defaults.BASE_MODEL))
    return resolved.replaced("Stage I beside the output", model=str(stage1))


def _write_inputs(run: Prepared) -> None:
    run.output.mkdir(parents=True, exist_ok=True)
    write_json(run.output / "identity.json", run.identity)  # first: a folder with other files and without it is refused
    (run.output / SUMMARY).unlink(missing_ok=True)  # of the run that goes on from one of its checkpoints
    write_text(run.output / "settings.yaml", settings_yaml(run.resolved))
    if run.train.dataset.bad_rows:
        run.world.say(f"skipped rows are listed in {write_bad_rows(run.train.dataset, run.output)}")


def closing_summary(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """The numbers that matter, from the first to the last update, then those of the held-out records."""
    names = [name for name in first if name.startswith(("loss", "rewards/")) and name in last]  # not of one left out
    moved = [f"{name} {first[name]:.4g} -> {last[name]:.4g}" for name in names]
    held_out = [f"{name} {value:.4g}" for name, value in last.items() if name.startswith(("eval/loss", "eval/rewards"))]
    return ["  ".join(line) for line in (moved, held_out) if line]


def _objectives(run: Prepared, values: dict[str, torch.Tensor]) -> tuple[Objective, Objective | None]:
    """What training minimizes, and what the held-out records are measured by."""
    if run.stage == ELICIT:
        return elicit, elicit
    if not run.settings.needs_reference:
        mix = ", ".join(run.settings.objective)
        run.world.say(f"objective {mix}: nothing in it reads a reference, none is computed")
    objective = Enhance(run.settings, values.get("train"))
    return objective, dataclasses.replace(objective, reference=values.get("eval")) if run.held_out else None


def _engine(run: Prepared) -> Engine:
    """The policy, sharded, with its optimizer."""
    adapter = run.settings if run.settings.lora_rank else None
    policy = run.load(run.model, adapter=adapter, quantize=run.settings.quantize)
    counts = freeze(policy, {part: getattr(run.settings, f"train_{part}") for part in PARTS})
    run.world.say("trained parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))
    return Engine(policy, run.config, run.world, run.dtype, make_optimizer(policy, run.settings))


def _train(
    run: Prepared, engine: Engine, objective: Objective, held_out_objective: Objective | None, feed: Feed,
    owner: Ownership, owed: dict[str, float] | None,
) -> None:  # fmt: skip
    """The loop, and what is done between its updates. `owed`: see `Checkpoint`."""
    between = Between(run, engine, objective, held_out_objective, feed, owner, owed)
    try:
        if owed:
            between.complete(feed.steps.start, owed, owed["step_ms"] / 1e3)
        run.world.stop_if_asked(f"before update {feed.steps.start + 1} of {run.num_steps}")
        if feed.steps:
            watchdog.phase("rehearsing the longest micro-batch")
            rehearse(engine, objective, run.train, feed.steps)
        train(
            engine, objective, feed, run.settings, num_steps=run.num_steps,
            before_update=between.before_update, after_update=between.after_update,
        )  # fmt: skip
        between.checkpoints.finish()
    except (StopRequested, NonFiniteUpdate):  # which all ranks raise
        between.checkpoints.finish()
        raise
    finally:
        between.close()


def _export(run: Prepared, engine: Engine, last: dict[str, float], owner: Ownership) -> float:
    """Write the model, load it again, compare, publish; returns the largest difference of a log-probability.

    The engine is closed between: a device that just holds one model has no room for two.
    """
    world = run.world
    world.stop_if_asked("before the export")
    probe = next(run.train.micro_batches(0)).to(world.device, engine.dtype)
    partial = run.output / f".export.{owner.token}.partial"
    inputs = {name: run.identity[name] for name in ("model", "train", "eval", "reference") if run.identity[name]}
    settings, adapter_of = run.settings, None
    if settings.lora_rank and not settings.merge_adapter:  # named as transformers finds it from anywhere
        adapter_of = str(run.model.resolve()) if Path(settings.model).is_dir() else settings.model
    card = model_card(
        STAGE_NAMES[run.stage], settings.as_dict(), {"started from": str(run.model), **inputs}, last, adapter_of
    )
    engine.deepspeed.eval()
    with torch.no_grad():
        of_engine = engine(probe)

    def clear() -> None:
        for left in run.output.glob(".export.*.partial"):  # by attempts that were killed
            shutil.rmtree(left, ignore_errors=True)

    world.on_main(lambda: owner.write(clear))
    export(
        engine, run.model, partial, settings.max_pixels, card, max_shard_gb=settings.max_shard_gb, adapter_of=adapter_of
    )
    engine.close()
    parts = (run.model, partial, settings.quantize) if adapter_of else (partial, None, None)
    if settings.quantize and not adapter_of:  # 16 bits may not fit where 4 did: each rank holds a part of them
        zero = run.config["zero_optimization"] | {"stage": 3}
        run = dataclasses.replace(run, config=run.config | {"zero_optimization": zero})
    again = Engine(run.load(*parts), run.config, world, run.dtype)
    with torch.no_grad():
        of_export = again(probe)
    merged = bool(settings.lora_rank) and adapter_of is None
    difference = compare(of_engine, of_export, run.dtype, world, merged)
    again.close()

    world.on_main(lambda: owner.write(lambda: publish(partial, run.output)))
    return difference
