"""One run of a stage, from settings to a verified model: the order in which everything happens."""

import json
import shutil
import time
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mede2.kernels.logps import choose_implementation
from mede2.trainer import reference
from mede2.trainer.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import Batches, DataSet, load_dataset, write_bad_rows
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.demo import defaults
from mede2.trainer.engine import Engine, fill_deepspeed_config, make_optimizer, read_deepspeed_file
from mede2.trainer.export import compare, export, model_card, publish
from mede2.trainer.files import hash_weights, write_json, write_text
from mede2.trainer.loop import evaluate, train
from mede2.trainer.metrics import Metrics
from mede2.trainer.objectives import Enhance, Objective, elicit
from mede2.trainer.policy import PARTS, freeze, load_policy
from mede2.trainer.settings import ELICIT, ENHANCE, FIELDS, STAGE_NAMES, BatchArithmetic, Resolved, resolve
from mede2.trainer.world import World

START_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # mean |margin| before the first update
SUMMARY = "summary.json"  # written last: the run is done


@dataclass(frozen=True)
class Prepared:
    """A run after everything that can be checked without the model's weights.

    Attributes:
        resolved: the settings, complete.
        world: the ranks.
        model: folder that training starts from.
        output: folder that the run writes.
        dtype: of the weights.
        implementation: of the log-probabilities.
        config: of DeepSpeed.
        batch: the batch arithmetic.
        train, held_out: batches of the training records, and of the held-out ones where there are any.
        num_steps: updates of the whole run.
        identity: what a run must share with the one it continues: settings, weights and data, by hash.
    """

    resolved: Resolved
    world: World
    model: Path
    output: Path
    dtype: torch.dtype
    implementation: str
    config: dict[str, Any]
    batch: BatchArithmetic
    train: Batches
    held_out: Batches | None
    num_steps: int
    identity: dict[str, Any]

    @property
    def settings(self):
        return self.resolved.settings

    @property
    def stage(self) -> int:
        return self.resolved.stage


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
    output = Path(resolved.settings.output or f"runs/stage{resolved.stage}")
    if resolved.stage == ENHANCE and resolved.settings.model is None:
        resolved = _start_from_stage1(resolved, deepspeed_file, output, world)
    run = prepare(resolved, deepspeed_file, output, world)
    for line in describe(run):
        say(world, line)
    if run.settings.dry_run:
        say(world, "dry run: nothing was trained")
        return None
    checkpoint = find_checkpoint(run)
    if checkpoint is None and (output / SUMMARY).exists():
        say(world, f"{output} holds this very run, done; --resume never runs it again")
        return output
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "settings.yaml", settings_yaml(run.resolved))
        write_json(output / "identity.json", run.identity)
        if run.train.dataset.bad_rows:
            say(world, f"skipped rows are listed in {write_bad_rows(run.train.dataset, output)}")
    torch.manual_seed(run.settings.seed)

    objective, held_out_objective, engine = _objectives_and_engine(run)
    first_step = 0
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        first_step = checkpoint.step
        say(world, f"continuing {checkpoint.path} at update {first_step} of {run.num_steps}")
    last = _train(run, engine, objective, held_out_objective, first_step)
    difference = _export(run, engine, last)
    seconds = time.perf_counter() - started
    if world.is_main:
        write_json(output / SUMMARY, {
            "stage": run.stage, "updates": run.num_steps, "world_size": world.size, "seconds": round(seconds, 1),
            "metrics": last, "export_logps_difference": difference, "finished": datetime.now().isoformat(timespec="seconds"),
        })  # fmt: skip
    say(world, f"done: {run.num_steps} updates, {seconds:.0f} s; model in {output} "
               f"(loaded again: log-probabilities within {difference:.1e} of the trained ones)")
    engine.close()
    return output


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def _start_from_stage1(resolved: Resolved, deepspeed_file: str, output: Path, world: World) -> Resolved:
    """Stage II without --model starts from the Stage I beside its output; if there is none, that runs first."""
    stage1 = output.parent / "stage1"
    if not (stage1 / SUMMARY).exists():
        say(world, f"no --model and no finished Stage I in {stage1}: running Stage I first, with its embedded default")
        layers = [("embedded default", defaults.recipe(ELICIT)), ("Stage II's flag", {"output": str(stage1)})]
        if resolved.settings.dry_run:
            layers.append(("Stage II's flag", {"dry_run": True}))
        run_stage(resolve(ELICIT, layers), deepspeed_file, world)
        if resolved.settings.dry_run:
            return resolved.replaced("embedded default (a dry run trains no Stage I)", model=str(defaults.BASE_MODEL))
    return resolved.replaced("Stage I beside the output", model=str(stage1))


def prepare(resolved: Resolved, deepspeed_file: str, output: Path, world: World) -> Prepared:
    """Check everything that can be checked before weights are loaded; see `Prepared`."""
    config = read_deepspeed_file(deepspeed_file)
    batch = BatchArithmetic(resolved.settings.global_batch_size, resolved.settings.micro_batch_size, world.size)
    if resolved.settings.model is None:
        resolved = resolved.replaced("embedded default", model=str(defaults.BASE_MODEL))
    if not resolved.settings.train:
        folder = output.parent / "demo_records" / f"stage{resolved.stage}"
        if world.is_main:
            defaults.write_records(resolved.stage, folder)
        world.barrier()
        files = {"train": (str(folder / "train" / f"stage{resolved.stage}.jsonl"),)}
        if resolved.settings.eval is None:
            files["eval"] = str(folder / "eval" / f"stage{resolved.stage}.jsonl")
        resolved = resolved.replaced("embedded default", **files)
    resolved = resolved.replaced(resolved.origins["output"], output=str(output))
    settings = resolved.settings

    dtype = _dtype(settings.dtype, world.device)
    implementation = choose_implementation(settings.logps)
    model = locate_model(settings.model)
    processor = load_processor(model, settings.max_pixels)
    encoder = Encoder(processor, settings.max_length, settings.grey_window)
    train_set = load_dataset(settings.train, resolved.stage, encoder, settings.on_bad_row, world)
    eval_set = settings.eval and load_dataset((settings.eval,), resolved.stage, encoder, settings.on_bad_row, world)
    if settings.train_vision_tower and not train_set.has_images:
        raise ValueError("train_vision_tower: no training record has an image")
    if settings.train_merger and not train_set.has_images:
        raise ValueError("train_merger: no training record has an image")

    def batches(dataset: DataSet, seed: int | None) -> Batches:
        collator = Collator(processor, dataset.has_images, settings.grey_window)
        return Batches(dataset, Sampler(len(dataset.examples), batch, seed), collator, world)

    train_batches = batches(train_set, settings.seed)
    num_steps = max(1, round(settings.epochs * train_batches.sampler.steps_per_epoch))
    if settings.max_steps is not None:
        num_steps = min(num_steps, settings.max_steps)
    text_config = AutoConfig.from_pretrained(model).get_text_config()
    identity = {
        "stage": resolved.stage,
        "settings": {
            name: value for name, value in settings.as_dict().items()
            if not FIELDS[name].metadata["harmless"] and name not in ("model", "train", "eval", "reference")
        },
        "model": hash_weights(model, world),
        "processor": reference.key_of(describe_processor(processor)),
        "train": train_set.fingerprint,
        "eval": eval_set.fingerprint if eval_set else None,
        "reference": hash_weights(locate_model(settings.reference), world) if settings.reference else None,
    }  # fmt: skip
    return Prepared(
        resolved, world, model, output, dtype, implementation,
        fill_deepspeed_config(config, settings, batch, dtype, text_config.hidden_size), batch,
        train_batches, batches(eval_set, None) if eval_set else None, num_steps, identity,
    )  # fmt: skip


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def describe(run: Prepared) -> list[str]:
    """What will run, for people: every setting with its origin, the data, the batch arithmetic."""
    width = max(len(name) for name, _, _ in run.resolved.described())
    lines = [STAGE_NAMES[run.stage]]
    lines += [f"  {name:<{width}}  {json.dumps(value)}  ({origin})" for name, value, origin in run.resolved.described()]
    lines.append(f"train: {run.train.dataset}")
    if run.held_out:
        lines.append(f"eval: {run.held_out.dataset}")
    lines.append(f"batch: {run.batch}; {run.train.sampler.steps_per_epoch} updates an epoch, {run.num_steps} in all")
    vision = "runs in every micro-batch" if run.train.dataset.has_images else "does not run (no record has an image)"
    lines.append(
        f"model: {run.model}, {str(run.dtype).removeprefix('torch.')} on {run.world.device.type}, "
        f"ZeRO-{run.config['zero_optimization']['stage']}, attention {run.settings.attention}, log-probabilities "
        f"{run.implementation}; vision tower {vision}"
    )
    return lines


def settings_yaml(resolved: Resolved) -> str:
    """The settings as a recipe that runs them again, each with its origin as a comment."""
    rows = [f"{name}: {json.dumps(value)}  # {origin}" for name, value, origin in resolved.described()]
    return f"# {STAGE_NAMES[resolved.stage]}\n" + "\n".join(rows) + "\n"


def find_checkpoint(run: Prepared) -> Checkpoint | None:
    """Where the run continues, or None where it starts; with `resume: never` an older run is moved aside.

    Raises:
        ValueError: the output holds another run, or something that is none.
    """
    output, world = run.output, run.world
    if run.settings.resume not in ("auto", "never"):
        checkpoint = read_checkpoint(Path(run.settings.resume))
        _check_identity(run.identity, checkpoint.identity, str(checkpoint.path))
        return checkpoint
    has_run, is_empty = (output / "identity.json").exists(), not (output.exists() and any(output.iterdir()))
    world.barrier()  # all ranks have looked before any rank writes
    if is_empty:
        return None
    if not has_run:
        raise ValueError(f"output: {output} holds files of something else; name another --output")
    if run.settings.resume == "never":
        aside = output.with_name(f"{output.name}.until-{datetime.now():%Y%m%d-%H%M%S}")
        if world.is_main:
            shutil.move(output, aside)
        world.barrier()
        say(world, f"the older run in {output} is now in {aside}")
        return None
    _check_identity(run.identity, json.loads((output / "identity.json").read_text(encoding="utf-8")), str(output))
    return None if (output / SUMMARY).exists() else newest_checkpoint(output / "checkpoints")


def _check_identity(ours: dict, theirs: dict, where: str) -> None:
    changed = [
        f"{name}: {theirs['settings'].get(name)!r} there, {value!r} now"
        for name, value in ours["settings"].items() if theirs["settings"].get(name) != value
    ]  # fmt: skip
    changed += [f"{name}: another one" for name in ours if name != "settings" and theirs.get(name) != ours[name]]
    if changed:
        raise ValueError(
            f"resume: {where} holds another run ({'; '.join(changed)}); give that run's settings, name another --output, "
            "or start over with --resume never"
        )


def _objectives_and_engine(run: Prepared) -> tuple[Objective, Objective | None, Engine]:
    """The engine with its optimizer, and what it minimizes; the reference model is gone when this returns."""
    if run.stage == ELICIT:
        return elicit, elicit, _engine(run)
    settings = run.settings
    sets = {"train": run.train} | ({"eval": run.held_out} if run.held_out else {})
    folder = Path(settings.reference_cache or run.output.parent / "reference_cache")
    components = {name: _reference_components(run, batches.dataset) for name, batches in sets.items()}
    found = {
        name: reference.read_cache(folder, components[name], len(batches.dataset.examples)) for name, batches in sets.items()
    }
    missing = [name for name, values in found.items() if values is None]
    if missing and settings.reference:
        reference_engine = _reference_engine(run)
    engine = None
    if not (missing and settings.reference):
        engine = reference_engine = _engine(run)
    for name in missing:
        say(run.world, f"reference log-probabilities of the {name} records: computing")
        found[name] = reference.compute(reference_engine, sets[name], folder, components[name], _Ticker(run.world))
    for name in found.keys() - missing:
        say(run.world, f"reference log-probabilities of the {name} records: found in {folder}")
    if engine is None:
        reference_engine.close()
        engine = _engine(run)

    def objective(name: str) -> Enhance:
        values = found[name].to(run.world.device)
        return Enhance(values, settings.beta, settings.label_smoothing, settings.nll_weight)

    return objective("train"), objective("eval") if run.held_out else None, engine


class _Ticker:
    """A line of progress every fifth of the way."""

    def __init__(self, world: World):
        self.world, self.shown = world, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 5 // total > self.shown:
            self.shown = done * 5 // total
            say(self.world, f"  reference pass {done}/{total}")


def _reference_components(run: Prepared, dataset: DataSet) -> dict[str, str]:
    return {
        "weights": run.identity["reference"] or run.identity["model"],
        "processor": run.identity["processor"],
        "records": dataset.fingerprint,
        "dtype": str(run.dtype),
        "attention": run.settings.attention,
        "log-probabilities": run.implementation,
        "device": run.world.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _engine(run: Prepared) -> Engine:
    """The policy, sharded, with its optimizer."""
    policy = _load(run, run.model)
    counts = freeze(policy, {part: getattr(run.settings, f"train_{part}") for part in PARTS})
    say(run.world, "trained parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))
    return Engine(policy, run.config, run.world, run.dtype, make_optimizer(policy, run.settings, run.world.device))


def _reference_engine(run: Prepared) -> Engine:
    """The model that --reference names, without an optimizer."""
    folder = locate_model(run.settings.reference)
    theirs = reference.key_of(describe_processor(load_processor(folder, run.settings.max_pixels)))
    if theirs != run.identity["processor"]:
        raise ValueError(f"reference: {folder} has another tokenizer, template or image processor than {run.model}")
    return Engine(_load(run, folder), run.config, run.world, run.dtype)


def _load(run: Prepared, folder: Path):
    return load_policy(
        folder, dtype=run.dtype, attention=run.settings.attention, implementation=run.implementation,
        deepspeed_config=run.config, activation_checkpointing=run.settings.activation_checkpointing,
    )  # fmt: skip


def _train(
    run: Prepared, engine: Engine, objective: Objective, held_out_objective: Objective | None, first_step: int
) -> dict[str, float]:
    """The loop with its watching, evaluating and saving; returns the metrics of the last update."""
    settings, world = run.settings, run.world
    watch = Metrics(run.output, first_step, run.num_steps, f"stage {run.stage}") if world.is_main else None
    last: dict[str, float] = {}

    def before_update(step: int, metrics: dict[str, float]) -> None:
        gap = metrics.pop("rewards/margins_abs", 0.0)
        if step == 0 and not settings.reference and gap > START_TOLERANCE[engine.dtype]:
            raise ValueError(
                f"before the first update the margins must be zero, and their mean size is {gap:.2e} (allowed: "
                f"{START_TOLERANCE[engine.dtype]:.0e}): the reference is not the starting policy"
            )

    def after_update(step: int, metrics: dict[str, float]) -> None:
        done = step + 1
        seconds = watch.lap() if watch else 0.0
        metrics["epoch"] = done / run.train.sampler.steps_per_epoch
        if run.held_out and (done == run.num_steps or (settings.eval_every and done % settings.eval_every == 0)):
            metrics |= evaluate(engine, held_out_objective, run.held_out)
            metrics.pop("eval/rewards/margins_abs", None)
        if watch:
            watch.row(done, metrics, seconds)
        if done == run.num_steps or (settings.save_every and done % settings.save_every == 0):
            save_checkpoint(engine, run.output / "checkpoints", done, run.identity)
        last.update(metrics)
        if watch:
            watch.start_lap()

    try:
        train(
            engine, objective, run.train, settings, first_step=first_step, num_steps=run.num_steps,
            before_update=before_update, after_update=after_update,
        )  # fmt: skip
    finally:
        if watch:
            watch.close()
    return last


def _export(run: Prepared, engine: Engine, last: dict[str, float]) -> float:
    """Write the model, load it again, compare, publish; returns the largest difference of a log-probability."""
    world = run.world
    probe = next(run.train.micro_batches(0)).to(world.device, engine.dtype)
    partial = run.output / ".export.partial"
    inputs = {name: run.identity[name] for name in ("model", "train", "eval", "reference") if run.identity[name]}
    card = model_card(STAGE_NAMES[run.stage], run.settings.as_dict(), {"started from": str(run.model), **inputs}, last)
    engine.deepspeed.eval()
    with torch.no_grad():
        of_engine = engine(probe)
    export(engine, run.model, partial, run.settings.max_pixels, card)
    again = Engine(_load(replace(run), partial), run.config, world, run.dtype)
    with torch.no_grad():
        of_export = again(probe)
    differences = world.gather(compare(of_engine, of_export, engine.dtype))
    again.close()
    if world.is_main:
        publish(partial, run.output)
    world.barrier()
    return max(differences)
