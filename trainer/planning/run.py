"""A run to plan for: model, settings, DeepSpeed file, ranks and lengths, with what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from mede2.trainer.deepspeed_file import check_offload, fill_sizes, get_field
from mede2.trainer.planning.gathering import Gathered, play
from mede2.trainer.planning.lengths import Lengths, Row, rows_of
from mede2.trainer.planning.saved import Training
from mede2.trainer.planning.shapes import Module, Parameter, Shape
from mede2.trainer.settings import ENHANCE, BatchArithmetic, Settings

DEFAULT_BUCKET = int(5e8)  # DeepSpeed's, where a file names no size
DEFAULT_PREFETCH, DEFAULT_THRESHOLD = int(5e7), int(1e5)


@dataclass(frozen=True)
class Zero:
    """What the DeepSpeed file decides. `offload_optimizer`, `offload_param`: None, "cpu" or "nvme"; sizes in values;
    `overlap`: collectives run beside the computation."""

    stage: int
    offload_optimizer: str | None = None
    offload_param: str | None = None
    reduce_bucket: int = DEFAULT_BUCKET
    prefetch_bucket: int = DEFAULT_PREFETCH
    persistence_threshold: int = DEFAULT_THRESHOLD
    max_live: int = 10**9
    max_reuse: int = 10**9
    overlap: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], settings: Settings, hidden: int) -> "Zero":
        """From a DeepSpeed file (`read_deepspeed_file`) and the settings; raises ValueError where the two disagree."""
        filled = dict(config) | {"zero_optimization": dict(config["zero_optimization"])}
        fill_sizes(filled, hidden)
        check_offload(filled, settings)

        def size(name: str, default: int) -> int:
            value = get_field(filled, f"zero_optimization.{name}")
            return default if value is None else int(value)

        devices = [get_field(filled, f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")]
        return cls(
            filled["zero_optimization"]["stage"], *(None if device == "none" else device for device in devices),
            size("reduce_bucket_size", DEFAULT_BUCKET), size("stage3_prefetch_bucket_size", DEFAULT_PREFETCH),
            size("stage3_param_persistence_threshold", DEFAULT_THRESHOLD),
            size("stage3_max_live_parameters", 10**9), size("stage3_max_reuse_distance", 10**9),
            bool(get_field(filled, "zero_optimization.overlap_comm")),
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
        shape: of the model.
        settings: of the stage.
        stage: ELICIT or ENHANCE.
        zero: of the DeepSpeed file.
        ranks: GPUs.
        lengths: of the longest example; memory is planned for it.
        in_triton: the log-probabilities run in Triton (bf16 on a GPU), not in plain torch.
    """

    shape: Shape
    settings: Settings
    stage: int
    zero: Zero
    ranks: int
    lengths: Lengths
    in_triton: bool = True

    def replaced(self, **values) -> "Run":
        return replace(self, **values)

    def with_settings(self, **values) -> "Run":
        return replace(self, settings=replace(self.settings, **values))

    @property
    def item(self) -> int:
        """Bytes of a weight; "auto" is bf16, as on every GPU that is planned for."""
        return 4 if self.settings.dtype == "fp32" else 2

    @cached_property
    def batch(self) -> BatchArithmetic:
        return BatchArithmetic.of(self.settings, self.ranks)

    @property
    def turns(self) -> int:
        """Micro-batches of a rank in an update; of packed rows, as many as examples of these lengths need."""
        if self.settings.pack_length:
            return -(-self.settings.global_batch_size // (self.batch.data_parallel_size * self.examples))
        return self.batch.grad_accum_steps

    @property
    def shared_prefix(self) -> bool:
        return self.stage == ENHANCE and self.settings.shared_prefix

    @property
    def runs_tower(self) -> bool:
        """The vision tower runs in every step: there are images, and their features are not kept (as those of a frozen
        tower and merger are, unless `cache_image_features` says no)."""
        settings = self.settings
        frozen = not (settings.train_vision_tower or settings.train_merger)
        return self.lengths.num_images > 0 and not (settings.cache_image_features and frozen)

    @property
    def corrupted(self) -> bool:
        """Every pair has its chosen answer once more, under a corrupted image."""
        trains_on_it = "image_conditional" in self.settings.objective
        return self.stage == ENHANCE and trains_on_it and self.lengths.num_images > 0

    @cached_property
    def examples(self) -> int:
        """Of a micro-batch: micro_batch_size, or as many of the longest as a packed row takes."""
        rows = rows_of(self.lengths, self.shared_prefix, self.corrupted)
        if self.settings.pack_length:
            return max(1, self.settings.pack_length // sum(row.tokens for row in rows))
        return self.settings.micro_batch_size

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Of a micro-batch of the longest examples."""
        return rows_of(self.lengths, self.shared_prefix, self.corrupted) * self.examples

    @cached_property
    def num_patches(self) -> int:
        """Of the images of a micro-batch: each row of its own prompt has them again."""
        return self.lengths.num_patches * len(self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def own_tokens(self) -> int:
        """Of a micro-batch, those that a rank runs through the language model."""
        return self.training.own(self.num_tokens)

    @cached_property
    def training(self) -> Training:
        settings = self.settings
        return Training(
            item=self.item, trains_text=settings.train_language_model and not settings.lora_rank,
            lora_rank=settings.lora_rank, lora_dropout=settings.lora_dropout,
            trains_tower=settings.train_vision_tower, trains_merger=settings.train_merger,
            masked_by_branches=settings.attention == "sdpa", sequence_parallel=settings.sequence_parallel_size,
            mlp_tiles=settings.mlp_tiles,
        )  # fmt: skip

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The model's, and behind each linear layer that carries an adapter its two."""
        settings = self.settings
        if not settings.lora_rank:
            return self.shape.modules
        return _with_adapter(self.shape, settings.lora_rank, settings.lora_target_modules, settings.use_dora)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple({p.name: p for module in self.modules for p in module.parameters}.values())

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        settings = self.settings
        parts = {
            "vision_tower": settings.train_vision_tower, "merger": settings.train_merger,
            "language_model": settings.train_language_model, "embedding": settings.train_language_model,
        }  # fmt: skip
        text = ("language_model", "embedding")
        return tuple(
            parameter for parameter in self.parameters
            if parts[parameter.part]
            and (".lora_" in parameter.name if settings.lora_rank and parameter.part in text else True)
        )  # fmt: skip

    @cached_property
    def num_trained(self) -> int:
        return sum(parameter.numel for parameter in self.trained)

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def gathered(self) -> Gathered:
        """What ZeRO-3 gathers in a micro-batch; nothing elsewhere, and nothing is copied on one rank."""
        return self._gathered(backward=True)

    @cached_property
    def gathered_in_forward(self) -> Gathered:
        """The same for a forward alone, as of the reference."""
        return self._gathered(backward=False)

    def _gathered(self, backward: bool) -> Gathered:
        if self.zero.stage != 3 or self.ranks == 1:
            return Gathered(0, 0, 0, 0)
        training, differentiated = self.training, []
        modules = tuple(
            module for module in self.modules
            if self.runs_tower or module.parameters[0].part not in ("vision_tower", "merger")
        )  # fmt: skip
        for module in modules:
            part = module.parameters[0].part
            if (
                (part in ("language_model", "embedding") and (module.kind != "embedding" or training.trains_text))
                or (part == "merger" and (training.trains_merger or training.trains_tower))
                or (part == "vision_tower" and training.trains_tower)
            ):
                differentiated.append(module)
        return play(
            modules, tuple(differentiated), frozenset(self.parameters) - frozenset(self.trained),
            recomputed=self.settings.activation_checkpointing, backward=backward,
            prefetch_bucket=self.zero.prefetch_bucket, persistence_threshold=self.zero.persistence_threshold,
            max_live=self.zero.max_live, max_reuse=self.zero.max_reuse,
        )  # fmt: skip

    @cached_property
    def num_quantized(self) -> int:
        """Values held in 4 bits: the linear layers of the language model."""
        if not self.settings.quantize:
            return 0
        return sum(module.parameters[0].numel for module in self.shape.modules if _is_adapted(module))


@lru_cache(maxsize=16)
def _with_adapter(shape: Shape, rank: int, wanted: tuple[str, ...], use_dora: bool) -> tuple[Module, ...]:
    found = []
    for module in shape.modules:
        found.append(module)
        last = module.name.rpartition(".")[2]
        if _is_adapted(module) and ("all-linear" in wanted or last in wanted or module.name in wanted):
            outputs, inputs = module.parameters[0].shape
            added = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
            if use_dora:
                added["lora_magnitude_vector"] = (outputs,)
            for name, size in added.items():
                parameter = Parameter(f"{module.name}.{name}.weight", size, "language_model")
                found.append(Module(f"{module.name}.{name}", "adapter", (parameter,), module.layer))
    return tuple(found)


def _is_adapted(module: Module) -> bool:
    return module.kind == "linear" and module.parameters[0].part == "language_model"
