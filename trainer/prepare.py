"""A run before its weights are loaded: settings, data and configuration checked, described, and where it continues."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mede2.kernels.logps import choose_implementation
from mede2.trainer import watchdog
from mede2.trainer.checkpoint import Checkpoint, checkpoint_folders, first_whole
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import DataSet, load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.data.remarks import briefly
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.demo import defaults
from mede2.trainer.engine import check_nvme
from mede2.trainer.files import hash_json, hash_weights
from mede2.trainer.other_world import check_convertible, convert
from mede2.trainer.ownership import OWNER, Ownership
from mede2.trainer.policy import (
    Policy,
    check_adapter,
    has_sliding_layers,
    largest_parameter,
    load_policy,
    takes_image_features,
)
from mede2.trainer.resolution import Resolved
from mede2.trainer.sequence_parallel import SequenceGroup, check_sequence_parallel, join_group
from mede2.trainer.settings import ENHANCE, FIELDS, STAGE_NAMES, BatchArithmetic, Settings
from mede2.trainer.world import World

SUMMARY = "summary.json"  # of an output folder; written last: the run is done


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
        caches_image_features: the vision tower runs once for each image, not in every step.
        identity: what a run must share with the one it continues: settings, weights and data, by hash.
    """

    resolved: Resolved
    world: World
    model: Path
    output: Path
    dtype: torch.dtype
    implementation: str
    sharing: SequenceGroup | None
    config: dict[str, Any]
    batch: BatchArithmetic
    train: Batches
    held_out: Batches | None
    num_steps: int
    caches_image_features: bool
    identity: dict[str, Any]

    @property
    def settings(self) -> Settings:
        return self.resolved.settings

    @property
    def stage(self) -> int:
        return self.resolved.stage

    @property
    def sets(self) -> dict[str, Batches]:
        """The data sets by name."""
        return {"train": self.train} | ({"eval": self.held_out} if self.held_out else {})

    def load(self, folder: Path, adapter: Settings | Path | None = None, quantize: str | None = None) -> Policy:
        """A policy from `folder` as this run's settings want it; see `load_policy`."""
        self.world.stop_if_asked(f"before the weights of {folder} were loaded")
        watchdog.phase(f"loading {folder}")
        return load_policy(
            folder, dtype=self.dtype, attention=self.settings.attention, implementation=self.implementation,
            deepspeed_config=self.config, activation_checkpointing=self.settings.activation_checkpointing,
            activation_offload=self.settings.activation_offload, adapter=adapter, quantize=quantize,
            sharing=self.sharing, mlp_tiles=self.settings.mlp_tiles,
        )  # fmt: skip


def prepare(resolved: Resolved, deepspeed_file: str, output: Path, world: World) -> Prepared:
    """Check everything that can be checked before weights are loaded; see `Prepared`."""
    config = read_deepspeed_file(deepspeed_file)
    check_nvme(config)
    batch = BatchArithmetic.of(resolved.settings, world.size)
    if resolved.settings.model is None:
        resolved = resolved.replaced("embedded default", model=str(defaults.BASE_MODEL))
    if not resolved.settings.train:
        folder = output.parent / "demo_records" / f"stage{resolved.stage}"
        stage = resolved.stage
        train_file, eval_file = world.on_main(lambda: defaults.write_records(stage, folder))
        files = {"train": (str(train_file),)}
        if resolved.settings.eval is None:
            files["eval"] = str(eval_file)
        resolved = resolved.replaced("embedded default", **files)
    resolved = resolved.replaced(resolved.origins["output"], output=str(output))
    settings = resolved.settings

    dtype = _dtype(settings.dtype, world.device)
    implementation = choose_implementation(settings.logps, world.device.type, dtype)
    model = locate_model(settings.model)
    processor = load_processor(model, settings.max_pixels)
    model_config = AutoConfig.from_pretrained(model)
    text_config = model_config.get_text_config()
    _check_attention(settings, resolved.stage, text_config)
    check_sequence_parallel(settings.sequence_parallel_size, settings.attention, text_config)
    if settings.lora_rank:
        check_adapter(model_config, settings)
    encoder = Encoder(processor, settings.max_length, settings.grey_window)
    train_set = load_dataset(settings.train, resolved.stage, encoder, settings.on_bad_row, world)
    eval_set = settings.eval and load_dataset((settings.eval,), resolved.stage, encoder, settings.on_bad_row, world)
    if settings.train_vision_tower and not train_set.has_images:
        raise ValueError("train_vision_tower: no training record has an image")
    if settings.train_merger and not train_set.has_images:
        raise ValueError("train_merger: no training record has an image")
    positions = Positions(model)

    def batches(dataset: DataSet, seed: int | None, corrupted: bool) -> Batches:
        layout = Layout(settings.shared_prefix, corrupted)
        collator = Collator(
            processor, positions, dataset.has_images, layout, packed=settings.pack_length > 0,
            corruption=(settings.corruption, settings.seed) if corrupted else None, grey_window=settings.grey_window,
            multiple=settings.sequence_parallel_size,
        )  # fmt: skip
        sampler = Sampler(tuple(map(layout.lengths, dataset.examples)), batch, seed, settings.pack_length)
        longest = max(range(len(dataset.examples)), key=sampler.num_tokens)
        if 0 < settings.pack_length < sampler.num_tokens(longest):
            raise ValueError(
                f"pack_length: {settings.pack_length} is less than the {sampler.num_tokens(longest)} tokens of "
                f"{dataset.examples[longest].source}"
            )
        return Batches(dataset, sampler, collator, world, settings.num_workers)

    _check_corruption(settings, train_set, eval_set)
    train_batches = batches(train_set, settings.seed, "image_conditional" in settings.objective)
    num_steps = max(1, round(settings.epochs * train_batches.sampler.steps_per_epoch))
    if settings.max_steps is not None:
        num_steps = min(num_steps, settings.max_steps)
    identity = {
        "stage": resolved.stage,
        "settings": {
            name: value for name, value in settings.as_dict().items()
            if not FIELDS[name].metadata["harmless"] and name not in ("model", "train", "eval", "reference")
        },
        "model": hash_weights(model, world),
        "processor": hash_json(describe_processor(processor)),
        "train": train_set.fingerprint,
        "eval": eval_set.fingerprint if eval_set else None,
        "reference": hash_weights(locate_model(settings.reference), world) if settings.reference else None,
    }  # fmt: skip
    eval_batches = batches(eval_set, None, settings.corruption is not None) if eval_set else None
    return Prepared(
        resolved, world, model, output, dtype, implementation,
        join_group(world, settings.sequence_parallel_size),
        fill_deepspeed_config(
            config, settings, batch, dtype, text_config.hidden_size, largest_parameter(model_config)
        ),
        batch, train_batches, eval_batches, num_steps, _caches_image_features(settings, model_config), identity,
    )  # fmt: skip


def _check_attention(settings: Settings, stage: int, text_config) -> None:
    """Raise ValueError where the model or its attention cannot take the mask of a shared prefix."""
    if stage != ENHANCE or not settings.shared_prefix:
        return
    if settings.attention == "flash_attention_2":
        raise ValueError(
            "attention: flash_attention_2 takes no mask of answers that share a prompt; use sdpa, or add "
            "--set shared_prefix=false"
        )
    if has_sliding_layers(text_config):
        raise ValueError(
            "shared_prefix: this model has layers of sliding attention, which its mask would undo; add "
            "--set shared_prefix=false"
        )


def _caches_image_features(settings: Settings, config) -> bool:
    frozen = not (settings.train_vision_tower or settings.train_merger)
    return settings.cache_image_features and frozen and takes_image_features(config)


def _check_corruption(settings: Settings, train_set: DataSet, eval_set: DataSet | None) -> None:
    """Raise ValueError where no image is there to corrupt, or none to take another's place."""
    if settings.corruption is None:
        return
    for name, dataset in {"training": train_set, "held-out": eval_set}.items():
        if dataset is not None:
            with_image = {example.digest for example in dataset.examples if example.images}
            if len(with_image) < (2 if settings.corruption == "shuffle" else 1):
                raise ValueError(
                    f"corruption: {settings.corruption} needs images, and {len(with_image)} {name} records have one"
                )


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
    lines += briefly(run.train.dataset.remarks)
    if run.held_out:
        lines.append(f"eval: {run.held_out.dataset}")
        lines += briefly(run.held_out.dataset.remarks)
        trained_on = {example.digest for example in run.train.dataset.examples}
        if both := sum(example.digest in trained_on for example in run.held_out.dataset.examples):
            lines.append(f"warning: held-out rows that are trained on, too: {both}")
    lines.append(f"batch: {run.batch}; {run.train.sampler.steps_per_epoch} updates an epoch, {run.num_steps} in all")
    how_often = "once for each image" if run.caches_image_features else "in every micro-batch"
    vision = f"runs {how_often}" if run.train.dataset.has_images else "does not run (no record has an image)"
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


def find_checkpoint(run: Prepared, owner: Ownership | None = None) -> Checkpoint | None:
    """Where the run continues, or None where it starts; with `resume: never` an older run is moved aside.

    Unless the run is done, `owner` takes the output, before checkpoints are read that a former owner might delete.

    Raises:
        ValueError: the output holds another run, or something that is none; no checkpoint is whole; another number of
            ranks wrote it with an optimizer that these cannot take over.
    """
    folders = run.world.on_main(lambda: _folders_to_resume(run))
    if owner and (folders or not run.world.on_main((run.output / SUMMARY).exists)):
        run.world.on_main(lambda: owner.take(run.world.say))
    if not folders:
        return None
    checkpoint = first_whole(folders, run.world)
    _check_identity(run.identity, checkpoint.identity, str(checkpoint.path))
    check_convertible(checkpoint.path, checkpoint.world_size, run.world.size, run.settings.optimizer)
    return checkpoint


def for_this_world(run: Prepared, checkpoint: Checkpoint) -> tuple[Prepared, Checkpoint]:
    """The run and its checkpoint, converted if another number of ranks wrote it; before there is an engine, as both
    take memory."""
    if checkpoint.world_size == run.world.size:
        return run, checkpoint
    ranks = f"{checkpoint.world_size} rank{'s' if checkpoint.world_size > 1 else ''}"
    run.world.say(f"checkpoint of {ranks}, continued by {run.world.size} through the universal format")
    converted = convert(checkpoint.path, checkpoint.step, run.output / "checkpoints", run.world)
    section = run.config.get("checkpoint", {}) | {"load_universal": True}
    return (
        dataclasses.replace(run, config=run.config | {"checkpoint": section}),
        dataclasses.replace(checkpoint, converted=converted),
    )


def _folders_to_resume(run: Prepared) -> list[Path]:
    """Of the checkpoints that may serve, the best first."""
    output, resume = run.output, run.settings.resume
    begun = set(output.glob(".*.partial")) | set(output.glob(f"*{OWNER}"))  # by one that was killed or stopped at once
    is_empty = not output.exists() or set(output.iterdir()) <= begun
    if not is_empty and not (output / "identity.json").exists():
        raise ValueError(f"output: {output} holds files of something else; name another --output")
    if resume not in ("auto", "never"):
        return [Path(resume)]
    if is_empty:
        return []
    if resume == "never":
        aside = output.with_name(f"{output.name}.until-{datetime.now():%Y%m%d-%H%M%S}")
        shutil.move(output, aside)
        run.world.say(f"the older run in {output} is now in {aside}")
        return []
    _check_identity(run.identity, json.loads((output / "identity.json").read_text(encoding="utf-8")), str(output))
    return [] if (output / SUMMARY).exists() else checkpoint_folders(output / "checkpoints")


def _check_identity(ours: dict, theirs: dict, where: str) -> None:
    changed = [
        f"{name}: {theirs['settings'].get(name)!r} there, {value!r} now"
        for name, value in ours["settings"].items() if theirs["settings"].get(name) != value
    ]  # fmt: skip
    changed += [f"{name}: another one" for name in ours if name != "settings" and theirs.get(name) != ours[name]]
    if changed:
        raise ValueError(
            f"resume: {where} holds another run ({'; '.join(changed)}); give that run's settings, name another "
            "--output, or start over with --resume never"
        )
