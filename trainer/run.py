"""One run of a stage, from settings to a verified model: the order in which everything happens."""

import dataclasses
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from mede2.trainer import reference
from mede2.trainer.checkpoint import load_checkpoint, save_checkpoint
from mede2.trainer.data.batches import Batches, Feed
from mede2.trainer.data.dataset import write_bad_rows
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.deepspeed_file import on_nvme
from mede2.trainer.demo import defaults
from mede2.trainer.engine import Engine, check_nvme, make_optimizer
from mede2.trainer.export import compare, export, model_card, publish
from mede2.trainer.files import hash_json, write_json, write_text
from mede2.trainer.loop import evaluate, train
from mede2.trainer.metrics import Metrics, read_metrics
from mede2.trainer.moved import MovedCheck
from mede2.trainer.objectives import Enhance, Objective, elicit
from mede2.trainer.policy import PARTS, Policy, freeze, load_policy
from mede2.trainer.prepare import SUMMARY, Prepared, describe, find_checkpoint, prepare, settings_yaml
from mede2.trainer.rehearsal import rehearse
from mede2.trainer.resolution import Resolved, resolve
from mede2.trainer.settings import ELICIT, ENHANCE, STAGE_NAMES, Settings
from mede2.trainer.weights_and_biases import check_wandb, start_wandb, started_run
from mede2.trainer.world import World

# Mean |margin| before the first update, in nats (without beta), over the square root of a pair's answer tokens. It is
# rounding alone, which differs with layout and micro-batch: hundredths of a nat for a token in bf16, nearly independent
# from token to token, so that a sum over them grows as the root. Another model's tokens lie apart by tenths and more.
START_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def run_stage(resolved: Resolved, deepspeed_file: str, world: World) -> Path | None:
    """Run a stage to its end, or continue it, and return the folder of the trained model (None after a dry run).

    Args:
        resolved: settings of the stage, as far as flags, recipe and defaults give them.
        deepspeed_file: the --ds file.
        world: the ranks.

    Raises:
        ValueError: anything that a user can mend, before the first update.
    """
    started = time.perf_counter()
    if resolved.settings.wandb:
        world.on_main(check_wandb)
    output = Path(resolved.settings.output or f"runs/stage{resolved.stage}")
    if resolved.stage == ENHANCE and resolved.settings.model is None:
        resolved = _start_from_stage1(resolved, deepspeed_file, output, world)
    run = prepare(resolved, deepspeed_file, output, world)
    for line in describe(run):
        world.say(line)
    if run.settings.dry_run:
        world.say("dry run: nothing was trained")
        return None
    checkpoint = find_checkpoint(run)
    check_nvme(run.config, resumes=checkpoint is not None)
    if checkpoint is None and world.on_main((output / SUMMARY).exists):
        world.say(f"{output} holds this very run, done; --resume never runs it again")
        return output
    world.on_main(lambda: _write_inputs(run))
    if run.settings.wandb:
        world.on_main(lambda: start_wandb(run.settings, output, STAGE_NAMES[run.stage]))
    torch.manual_seed(run.settings.seed + world.rank)  # dropout differs from rank to rank

    first_step = checkpoint.step if checkpoint else 0
    feed = run.train.feed(range(first_step, run.num_steps))  # forks its workers, so before there is an engine
    objective, held_out_objective, engine = _objectives_and_engine(run)
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        objective.load_state_dict(checkpoint.objective)
        world.say(f"continuing {checkpoint.path} at update {first_step} of {run.num_steps}")
    _train(run, engine, objective, held_out_objective, feed)
    rows = world.on_main(lambda: read_metrics(output / "metrics.jsonl"))
    last = rows[-1] if rows else {}  # none where a finished checkpoint continues in a new output
    difference = _export(run, engine, last)
    seconds = time.perf_counter() - started
    summary = {
        "stage": run.stage, "updates": run.num_steps, "world_size": world.size, "seconds": round(seconds, 1),
        "metrics": last, "export_logps_difference": difference,
        "finished": datetime.now().isoformat(timespec="seconds"),
    }  # fmt: skip
    world.on_main(lambda: write_json(output / SUMMARY, summary))
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
    write_text(run.output / "settings.yaml", settings_yaml(run.resolved))
    write_json(run.output / "identity.json", run.identity)
    if run.train.dataset.bad_rows:
        run.world.say(f"skipped rows are listed in {write_bad_rows(run.train.dataset, run.output)}")


def closing_summary(first: dict[str, float], last: dict[str, float]) -> list[str]:
    """The numbers that matter, from the first to the last update, then those of the held-out records."""
    moved = [f"{name} {first[name]:.4g} -> {last[name]:.4g}" for name in first if name.startswith(("loss", "rewards/"))]
    held_out = [f"{name} {value:.4g}" for name, value in last.items() if name.startswith(("eval/loss", "eval/rewards"))]
    return ["  ".join(line) for line in (moved, held_out) if line]


def _objectives_and_engine(run: Prepared) -> tuple[Objective, Objective | None, Engine]:
    """The engine with its optimizer, and what it minimizes; the reference model is gone when this returns."""
    if run.stage == ELICIT:
        return elicit, elicit, _engine(run)
    settings = run.settings
    if not settings.needs_reference:
        run.world.say(f"objective {', '.join(settings.objective)}: nothing in it reads a reference, none is computed")
        objective = Enhance(settings, None)
        return objective, objective if run.held_out else None, _engine(run)
    sets = {"train": run.train} | ({"eval": run.held_out} if run.held_out else {})
    folder = Path(settings.reference_cache or run.output.parent / "reference_cache")
    components = {name: _reference_components(run, batches) for name, batches in sets.items()}
    found = run.world.on_main(lambda: {
        name: reference.read_cache(folder, components[name], len(batches.dataset.examples))
        for name, batches in sets.items()
    })  # fmt: skip
    missing = [name for name, values in found.items() if values is None]
    if missing:  # by an engine of its own, so that training starts alike whether the cache was there or not
        engine, computed = _reference_engine(run), {}
        for name in missing:
            path = reference.cache_path(folder, components[name])
            if path not in computed:  # the same records may train and evaluate
                run.world.say(f"reference log-probabilities of the {name} records: computing")
                computed[path] = reference.compute(engine, sets[name], folder, components[name], _Ticker(run.world))
            found[name] = computed[path]
        engine.close()
    for name in found.keys() - missing:
        run.world.say(f"reference log-probabilities of the {name} records: found in {folder}")
    engine = _engine(run)
    values = {name: found[name].to(run.world.device) for name in found}
    objective = Enhance(settings, values["train"])
    return objective, dataclasses.replace(objective, reference=values["eval"]) if run.held_out else None, engine


class _Ticker:
    """A line of progress every fifth of the way."""

    def __init__(self, world: World):
        self.world, self.shown = world, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 5 // total > self.shown:
            self.shown = done * 5 // total
            self.world.say(f"  reference pass {done}/{total}")


def _reference_components(run: Prepared, batches: Batches) -> dict[str, str]:
    return {
        "weights": run.identity["reference"] or run.identity["model"],
        "processor": run.identity["processor"],
        "records": batches.dataset.fingerprint,
        "corruption": str(batches.collator.corruption),
        "dtype": str(run.dtype),
        "attention": run.settings.attention,
        "quantize": str(run.settings.quantize),
        "log-probabilities": run.implementation,
        "device": run.world.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _engine(run: Prepared) -> Engine:
    """The policy, sharded, with its optimizer."""
    adapter = run.settings if run.settings.lora_rank else None
    policy = _load(run, run.model, adapter=adapter, quantize=run.settings.quantize)
    counts = freeze(policy, {part: getattr(run.settings, f"train_{part}") for part in PARTS})
    run.world.say("trained parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))
    return Engine(policy, run.config, run.world, run.dtype, make_optimizer(policy, run.settings))


def _reference_engine(run: Prepared) -> Engine:
    """The model that --reference names, or the starting policy, without an optimizer."""
    folder = locate_model(run.settings.reference) if run.settings.reference else run.model
    theirs = hash_json(describe_processor(load_processor(folder, run.settings.max_pixels)))
    if theirs != run.identity["processor"]:
        raise ValueError(f"reference: {folder} has another tokenizer, template or image processor than {run.model}")
    return Engine(_load(run, folder, quantize=run.settings.quantize), run.config, run.world, run.dtype)


def _load(run: Prepared, folder: Path, adapter: Settings | Path | None = None, quantize: str | None = None) -> Policy:
    return load_policy(
        folder, dtype=run.dtype, attention=run.settings.attention, implementation=run.implementation,
        deepspeed_config=run.config, activation_checkpointing=run.settings.activation_checkpointing,
        activation_offload=run.settings.activation_offload,
        adapter=adapter, quantize=quantize,
    )  # fmt: skip


def _train(
    run: Prepared, engine: Engine, objective: Objective, held_out_objective: Objective | None, feed: Feed
) -> None:
    """The loop with its watching, evaluating and saving."""
    settings, world = run.settings, run.world
    watch = None
    if world.is_main:
        tracker = started_run() if settings.wandb else None
        watch = Metrics(run.output, feed.steps.start, run.num_steps, f"stage {run.stage}", tracker)
    check_moved = None if on_nvme(run.config) else MovedCheck(engine)
    if check_moved is None:
        world.say("offload to NVMe: whether all that trains moves is not checked")

    def before_update(step: int, metrics: dict[str, float]) -> None:
        if step == 0 and run.stage == ENHANCE and settings.needs_reference and not settings.reference:
            check_start(metrics, settings.beta, engine.dtype)
        metrics.pop("rewards/margins_abs", None)

    def after_update(step: int, metrics: dict[str, float]) -> None:
        done = step + 1
        seconds = watch.lap() if watch else 0.0
        if check_moved and check_moved.waiting:
            check_moved(has_image=run.train.totals(step).num_with_image > 0)
        metrics["epoch"] = done / run.train.sampler.steps_per_epoch
        if run.held_out and (done == run.num_steps or (settings.eval_every and done % settings.eval_every == 0)):
            metrics |= evaluate(engine, held_out_objective, run.held_out)
            metrics.pop("eval/rewards/margins_abs", None)
        if watch:
            watch.row(done, metrics, seconds)
        if done == run.num_steps or (settings.save_every and done % settings.save_every == 0):
            save_checkpoint(
                engine, run.output / "checkpoints", done, run.identity, objective.state_dict(),
                settings.keep_checkpoints, settings.keep_every,
            )  # fmt: skip
        if watch:
            watch.start_lap()

    try:
        if feed.steps:
            rehearse(engine, objective, run.train, feed.steps)
        train(
            engine, objective, feed, settings, num_steps=run.num_steps,
            before_update=before_update, after_update=after_update,
        )  # fmt: skip
    finally:
        if watch:
            watch.close()


def check_start(metrics: dict[str, float], beta: float, dtype: torch.dtype) -> None:
    """Raise ValueError if the margins of a first update are more than rounding, so that the reference is not the policy
    that starts."""
    gap = metrics["rewards/margins_abs"] / beta
    num_tokens = metrics["length/chosen"] + metrics["length/rejected"]
    allowed = START_TOLERANCE[dtype] * num_tokens**0.5
    if not gap <= allowed:
        raise ValueError(
            f"reference_cache: before the first update policy and reference must agree on every pair, but they are "
            f"{gap:.2g} nats apart, where {str(dtype).removeprefix('torch.')} explains {allowed:.2g} over "
            f"{num_tokens:.0f} answer tokens: the cached log-probabilities are not those of the starting policy; "
            "delete the cache to compute them again"
        )


def _export(run: Prepared, engine: Engine, last: dict[str, float]) -> float:
    """Write the model, load it again, compare, publish; returns the largest difference of a log-probability.

    The engine is closed between: a device that just holds one model has no room for two.
    """
    world = run.world
    probe = next(run.train.micro_batches(0)).to(world.device, engine.dtype)
    partial = run.output / ".export.partial"
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
    export(
        engine, run.model, partial, settings.max_pixels, card, max_shard_gb=settings.max_shard_gb, adapter_of=adapter_of
    )
    engine.close()
    parts = (run.model, partial, settings.quantize) if adapter_of else (partial, None, None)
    if settings.quantize and not adapter_of:  # 16 bits may not fit where 4 did: each rank holds a part of them
        zero = run.config["zero_optimization"] | {"stage": 3}
        run = dataclasses.replace(run, config=run.config | {"zero_optimization": zero})
    again = Engine(_load(run, *parts), run.config, world, run.dtype)
    with torch.no_grad():
        of_export = again(probe)
    merged = bool(settings.lora_rank) and adapter_of is None
    difference = compare(of_engine, of_export, run.dtype, world, merged)
    again.close()
    world.on_main(lambda: publish(partial, run.output))
    return difference
