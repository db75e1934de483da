"""The plan of a stage on a cluster: memory for its longest examples, time for its average ones, and a verdict."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mede2.trainer.deepspeed_file import read_deepspeed_file
from mede2.trainer.heads import check_heads
from mede2.trainer.planning.hardware import Cluster
from mede2.trainer.planning.lengths import Lengths, patches_of_image
from mede2.trainer.planning.memory import Memory, plan_memory
from mede2.trainer.planning.run import Run, Zero
from mede2.trainer.planning.shapes import Shape
from mede2.trainer.planning.timing import Timing, plan_time
from mede2.trainer.planning.work import Sizes
from mede2.trainer.settings import ENHANCE, Settings

DEFAULT_PIXELS = 448 * 448
SHARING, TILES = (2, 4, 8), 8  # of sequence_parallel_size and mlp_tiles, what is tried
HOST_SHARE = 0.9  # of a node's memory that a run may take


@dataclass(frozen=True)
class Data:
    """What the planner is told of the records.

    Attributes:
        examples, held_out: how many.
        prompt_tokens: of an average prompt, image tokens not counted.
        answer_tokens: of an average answer.
        images: of an average prompt; for InternVL of tiles of 448 x 448.
        image_pixels: of one, after `max_pixels`.
    """

    examples: int = 10_000
    held_out: int = 0
    prompt_tokens: int = 256
    answer_tokens: int = 512
    images: int = 1
    image_pixels: int | None = None


@dataclass(frozen=True)
class Stage:
    """A stage to plan: settings, data, DeepSpeed file, cluster."""

    shape: Shape
    settings: Settings
    stage: int
    deepspeed_file: Path
    cluster: Cluster
    data: Data

    @cached_property
    def zero(self) -> Zero:
        return Zero.of(read_deepspeed_file(self.deepspeed_file), self.settings, self.shape.text.hidden)

    @property
    def num_images(self) -> int:
        return self.data.images if self.stage == ENHANCE else 0

    @cached_property
    def sizes(self) -> Sizes:
        pixels = self.data.image_pixels or self.settings.max_pixels or DEFAULT_PIXELS
        patches, tokens = patches_of_image(self.shape, pixels)
        num = self.num_images
        return Sizes(self.data.prompt_tokens + num * tokens, self.data.answer_tokens, num * patches, num * tokens, num)

    @cached_property
    def average(self) -> Run:
        """The run with average examples."""
        answers = (self.data.answer_tokens,) * (2 if self.stage == ENHANCE else 1)
        lengths = Lengths(round(self.sizes.prompt), answers, round(self.sizes.patches), self.num_images)
        in_triton = self.settings.dtype != "fp32" and self.settings.logps in ("auto", "triton")
        return Run(self.shape, self.settings, self.stage, self.zero, self.cluster.ranks, lengths, in_triton)

    @cached_property
    def longest(self) -> Run:
        """The run with examples whose prompt and answer have `max_length` tokens, in the average's proportion."""
        lengths, limit = self.average.lengths, self.settings.max_length
        if lengths.prompt + lengths.answers[0] > limit:
            raise ValueError(
                f"max_length: {limit} tokens are fewer than an average prompt and answer, "
                f"{lengths.prompt} + {lengths.answers[0]}"
            )
        answer = limit * lengths.answers[0] // (lengths.prompt + lengths.answers[0])
        longest = replace(lengths, prompt=limit - answer, answers=(answer,) * len(lengths.answers))
        return self.average.replaced(lengths=longest)

    def with_settings(self, **values) -> "Stage":
        return replace(self, settings=replace(self.settings, **values))


@dataclass(frozen=True)
class Plan:
    """What came of a stage."""

    stage: Stage
    memory: Memory
    timing: Timing

    @property
    def fits_device(self) -> bool:
        return self.memory.total <= self.stage.cluster.memory_gb * 1e9

    @property
    def fits_host(self) -> bool:
        cluster = self.stage.cluster
        return self.memory.host_total * cluster.gpus_per_node <= HOST_SHARE * cluster.host_memory_gb * 1e9

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def updates(self) -> int:
        settings = self.stage.settings
        per_epoch = math.ceil(self.stage.data.examples / settings.global_batch_size)
        updates = max(1, round(settings.epochs * per_epoch))
        return min(updates, settings.max_steps or updates)

    @cached_property
    def hours(self) -> dict[str, float]:
        """Of the features of images, of training, of the reference pass, of evaluations."""
        settings, data, ranks = self.stage.settings, self.stage.data, self.stage.cluster.ranks
        evaluations = self.updates // settings.eval_every if settings.eval_every else 0
        evaluations += not settings.eval_every or self.updates % settings.eval_every > 0
        reads_reference = self.stage.stage == ENHANCE and settings.needs_reference
        forward = self.timing.forward_s / 3600 / ranks
        tower = self.timing.tower_s / 3600 / ranks
        return {
            "image features": tower * (data.examples + data.held_out),
            "training": self.updates * self.timing.step_s / 3600,
            "reference pass": forward * (data.examples + data.held_out) * reads_reference,
            "evaluation": forward * data.held_out * evaluations,
        }

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def gpu_hours(self) -> float:
        return self.total_hours * self.stage.cluster.ranks


def make_plan(stage: Stage) -> Plan:
    """Plan a stage. Raises ValueError where settings, DeepSpeed file and cluster do not go together."""
    _check(stage)
    return Plan(stage, plan_memory(stage.longest), plan_time(stage.average, stage.cluster, stage.sizes))


def _check(stage: Stage) -> None:
    _ = stage.zero, stage.average.batch  # settings go with the file, and the global batch divides
    attention, sharing, text = stage.settings.attention, stage.settings.sequence_parallel_size, stage.shape.text
    if attention == "eager":
        raise ValueError("attention: eager keeps the scores of all pairs of tokens, which is not planned for; use sdpa")
    if sharing > 1:
        check_heads(sharing, text.heads, text.kv_heads)
        if attention != "sdpa":
            raise ValueError(f"sequence_parallel_size: {sharing} needs attention: sdpa, not {attention}")


@dataclass(frozen=True)
class Change:
    """A way to change a stage.

    Attributes:
        words: what to say at the command line.
        stage: so changed.
        cost: 0: the same updates; 1: more GPUs for them; 2: another optimizer; 3: an adapter instead.
    """

    words: str
    stage: Stage
    cost: int


def changes(stage: Stage) -> Iterator[Change]:
    """What may make a stage fit, each by itself and together, those that leave the updates as they are first."""
    folder, settings = stage.deepspeed_file.parent, stage.settings
    memory: list[tuple[str, dict, str]] = [("", {}, "")]
    for micro in {1, settings.micro_batch_size}:
        for recompute, offload in ((False, False), (True, False), (True, True)):
            for file in ("", "z1.json", "z2.json", "z3.json", "z3_offload.json"):
                values = {"micro_batch_size": micro, "activation_checkpointing": recompute,
                          "activation_offload": offload}  # fmt: skip
                if file == "z3_offload.json":
                    values["optimizer"] = "cpu_adam"
                elif file and settings.optimizer == "cpu_adam":
                    values["optimizer"] = "adamw"
                memory.append((f"--ds {folder / file}" if file else "", values, file))
    long_rows = [{"mlp_tiles": TILES}, *({"mlp_tiles": TILES, "sequence_parallel_size": size} for size in SHARING)]
    steps: list[tuple[int, dict, int]] = [(0, {}, 1), *((0, values, 1) for values in long_rows)]
    steps += [(1, {}, 2), (1, {}, 4), (1, {}, 8)]
    if settings.optimizer == "adamw":
        steps.append((2, {"optimizer": "adamw_8bit"}, 1))
    if not settings.lora_rank:
        steps.append((3, {"lora_rank": 16}, 1))
    if not settings.quantize:
        steps.append((3, {"lora_rank": settings.lora_rank or 16, "quantize": "nf4"}, 1))
    for cost, more, factor in steps:
        for words, values, file in memory:
            together = values | more
            if not together and factor == 1:
                continue
            cluster = replace(stage.cluster, nodes=stage.cluster.nodes * factor)
            try:
                changed = replace(stage.with_settings(**together), cluster=cluster)
                changed = replace(changed, deepspeed_file=folder / file) if file else changed
                _check(changed)
            except ValueError:  # settings that do not go together, or a global batch that does not divide
                continue
            said = [words] if words else []
            said += [f"--set {k}={_said(v)}" for k, v in together.items() if getattr(settings, k) != v]
            if factor > 1:
                said.append(f"on {cluster}")
            if said:
                yield Change(" ".join(said), changed, cost)


def _said(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def cheapest_change(stage: Stage) -> tuple[Change, Plan] | None:
    """Of the changes of the least cost that make a stage fit, the one that takes the fewest GPU-hours."""
    best: tuple[tuple[int, float], Change, Plan] | None = None
    for change in changes(stage):
        if best and change.cost > best[0][0]:
            break
        plan = make_plan(change.stage)
        key = (change.cost, plan.gpu_hours)
        if plan.fits and (best is None or key < best[0]):
            best = (key, change, plan)
    return best[1:] if best else None


def search(stage: Stage) -> list[tuple[str, Plan]]:
    """Settings of memory that fit the cluster, fastest first; what is learnt stays as it is.

    Looks through micro-batches or packed rows, recomputation, its offload, ranks that share rows, tiles of MLPs, and
    the files of ds_configs/.
    """
    folder, settings, found = stage.deepspeed_file.parent, stage.settings, []
    batches = [{"micro_batch_size": size, "pack_length": 0} for size in (1, 2, 4, 8, 16, 32)]
    longest = sum(row.tokens for row in replace(stage.longest, settings=replace(settings, pack_length=0)).rows)
    batches += [{"micro_batch_size": 1, "pack_length": longest * times} for times in (1, 2, 4)]
    batches += [{"micro_batch_size": 1, "pack_length": 0, "mlp_tiles": TILES, "sequence_parallel_size": size}
                for size in (1, *SHARING)]  # fmt: skip
    for file in ("z1.json", "z2.json", "z3.json", "z3_offload.json"):
        offloaded = file == "z3_offload.json"
        optimizer = "cpu_adam" if offloaded else "adamw" if settings.optimizer == "cpu_adam" else settings.optimizer
        for batch in batches:
            for recompute, offload in ((False, False), (True, False), (True, True)):
                values = batch | {"activation_checkpointing": recompute, "activation_offload": offload}
                values |= {"optimizer": optimizer}
                try:
                    changed = replace(stage.with_settings(**values), deepspeed_file=folder / file)
                    plan = make_plan(changed)
                except ValueError:  # see `changes`
                    continue
                if plan.fits:
                    said = [f"--set {k}={_said(v)}" for k, v in values.items() if getattr(settings, k) != v]
                    found.append((" ".join([f"--ds {folder / file}", *said]), plan))
    return sorted(found, key=lambda pair: pair[1].total_hours)
