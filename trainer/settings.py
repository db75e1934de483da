"""Every setting of both stages: its type, default, help, and the values that it may take."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mede2.trainer.redaction import has_credentials
from mede2.trainer.stopping import MARGIN_S

ELICIT, ENHANCE = 1, 2
STAGE_NAMES = {ELICIT: "Stage I (elicit)", ENHANCE: "Stage II (enhance)"}
OF_ADAPTERS = (
    "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora", "quantize", "merge_adapter",
)  # fmt: skip

CORRUPTIONS = ("crop", "blank", "noise", "shuffle")
_OF_REFERENCE = ("beta", "reference", "reference_cache")
OBJECTIVES = {  # the losses that `objective` may mix, and the settings that each reads
    "sigmoid": (*_OF_REFERENCE, "label_smoothing"),
    "robust": (*_OF_REFERENCE, "label_smoothing"),
    "sigmoid_norm": _OF_REFERENCE,
    "hinge": _OF_REFERENCE,
    "ipo": _OF_REFERENCE,
    "bco_pair": _OF_REFERENCE,
    "bco_pair_shifted": _OF_REFERENCE,
    "simpo": ("beta", "simpo_gamma"),
    "orpo": (),
    "image_conditional": _OF_REFERENCE,
    "anchor": _OF_REFERENCE,
    "nll": (),
}


def _setting(
    default, help, *, at_least=None, above=None, below=None, at_most=None, choices=None, stage=None, harmless=False
):
    """One setting: its default, its help, the values it may take, the only stage it has a meaning in, and whether
    it may differ between a run and its resumption (`harmless`: it changes no update beyond rounding)."""
    metadata = dict(
        help=help,
        at_least=at_least,
        above=above,
        below=below,
        at_most=at_most,
        choices=choices,
        stage=stage,
        harmless=harmless,
    )
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Units are in the names or in the help; `None` means "not set"."""

    model: str | None = _setting(
        None,
        "Model folder or hub name; unset: the small model that ships with MedE2 "
        "(Stage II: what Stage I wrote beside --output).",
    )
    train: tuple[str, ...] = _setting((), "Training records, jsonl; unset: the embedded case set.")
    eval: str | None = _setting(None, "Held-out records, jsonl, in the form of the training records.")
    output: str | None = _setting(None, "Folder that the run writes; unset: runs/stage1 or runs/stage2.", harmless=True)
    epochs: float = _setting(1.0, "Passes over the training records.", above=0)
    max_steps: int | None = _setting(None, "Stop after so many updates, whatever --epochs says.", at_least=1)
    learning_rate: float = _setting(1e-5, "Peak learning rate.", above=0)
    beta: float = _setting(0.1, "DPO's inverse temperature.", above=0, stage=ENHANCE)
    global_batch_size: int = _setting(16, "Examples (Stage II: pairs) per update, over all ranks.", at_least=1)
    micro_batch_size: int = _setting(
        1, "Examples (Stage II: pairs) per forward on one rank.", at_least=1, harmless=True
    )
    shared_prefix: bool = _setting(
        True, "Run prompt and images of a pair once, with both answers behind them.", stage=ENHANCE, harmless=True
    )
    pack_length: int = _setting(
        0,
        "Tokens of a packed row, image tokens counted: a micro-batch is then one row of as many examples as fit "
        "(0: a row for each, padded).",
        at_least=0,
        harmless=True,
    )
    sequence_parallel_size: int = _setting(
        1,
        "Ranks that share each micro-batch, for long rows: each runs the language model on its share of the tokens, "
        "and attention on its share of the heads (Ulysses).",
        at_least=1,
        harmless=True,
    )
    mlp_tiles: int = _setting(
        1,
        "Tiles that the language model's MLPs cut their tokens into, for long rows; more than one: they are computed "
        "again in backward, one tile at a time.",
        at_least=1,
        harmless=True,
    )
    num_workers: int = _setting(
        2, "Processes on each rank that decode and collate ahead of the step (0: none).", at_least=0, harmless=True
    )
    max_pixels: int | None = _setting(
        None, "Largest image, pixels; unset: what the model's processor says.", at_least=1
    )
    max_length: int = _setting(
        4096, "Longest sequence, tokens, image tokens counted; longer rows are refused.", at_least=8
    )
    seed: int = _setting(
        0, "Seed of the data order and of every random number generator.", at_least=0, at_most=2**63 - 1
    )
    hang_minutes: float = _setting(
        15.0,
        "A rank without a sign of life (a micro-batch, an update, its data) for so long counts as hung: its stacks go "
        "into the log and the run ends with 1. Loading, checking, saving and exporting may take two hours.",
        above=0,
        harmless=True,
    )
    pace_every: int = _setting(
        50, "Compare the speed of the ranks every so many updates and name a slow one (0: never).",
        at_least=0, harmless=True,
    )  # fmt: skip
    save_every: int = _setting(0, "Checkpoint every so many updates (0: only at the end).", at_least=0, harmless=True)
    keep_checkpoints: int = _setting(3, "Newest checkpoints that are kept (0: all).", at_least=0, harmless=True)
    keep_every: int = _setting(
        0, "Checkpoints after a multiple of so many updates are kept whatever keep_checkpoints says (0: none).",
        at_least=0, harmless=True,
    )  # fmt: skip
    stop_margin_s: float = _setting(
        MARGIN_S,
        "Seconds before the end of the SLURM job (SLURM_JOB_END_TIME) at which a run stops, writes a checkpoint and "
        "asks to be requeued.",
        at_least=0,
        harmless=True,
    )
    async_checkpoints: bool = _setting(
        False, "Train on while a checkpoint is written, from a copy of each rank's state in host memory.", harmless=True
    )
    eval_every: int = _setting(0, "Evaluate every so many updates (0: only at the end).", at_least=0, harmless=True)
    resume: str = _setting(
        "auto",
        "auto: continue the newest complete checkpoint; never: start over (an older run is "
        "moved aside); PATH: continue that checkpoint.",
        harmless=True,
    )
    wandb: str | None = _setting(
        None,
        "Project of Weights & Biases that gets the metrics and alarms too (pip install 'mede2[watch]').",
        harmless=True,
    )
    dry_run: bool = _setting(False, "Check settings and data, print what would run, train nothing.", harmless=True)

    objective: Mapping[str, float] = _setting(
        {"sigmoid": 1.0, "nll": 1.0},
        f"Weights of the losses that are added up, such as {{sigmoid: 1, nll: 2}}; known: {', '.join(OBJECTIVES)}.",
        above=0,
        choices=OBJECTIVES,
        stage=ENHANCE,
    )
    label_smoothing: float = _setting(
        0.0,
        "Probability that a preference label is flipped (sigmoid: conservative DPO; robust).",
        at_least=0,
        below=0.5,
        stage=ENHANCE,
    )
    simpo_gamma: float = _setting(
        0.5, "SimPO's target margin; goes with a beta of 2 and more.", at_least=0, stage=ENHANCE
    )
    corruption: str | None = _setting(
        None,
        "Chosen answers once more under a corrupted image, for image_conditional and the metric image_gap (without "
        "image_conditional: in evaluation only).",
        choices=CORRUPTIONS,
        stage=ENHANCE,
    )
    reference: str | None = _setting(
        None, "Reference model, folder or hub name; unset: the starting policy.", stage=ENHANCE
    )
    reference_cache: str | None = _setting(
        None,
        "Folder of cached reference log-probabilities; unset: reference_cache beside the output.",
        stage=ENHANCE,
        harmless=True,
    )
    cache_image_features: bool = _setting(
        True,
        "Run a frozen vision tower once for each image and keep what it says in reference_cache, instead of running it "
        "in every step.",
        harmless=True,
    )
    optimizer: str = _setting(
        "adamw",
        "adamw: torch; adamw_8bit: bitsandbytes; paged_adamw_8bit: the same, its state moving to host memory when the "
        "device is full; cpu_adam: DeepSpeed's, for offload.",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit", "cpu_adam"),
    )
    adam_beta1: float = _setting(0.9, "Adam's first decay rate.", at_least=0, below=1)
    adam_beta2: float = _setting(0.95, "Adam's second decay rate.", at_least=0, below=1)
    adam_epsilon: float = _setting(1e-8, "Adam's epsilon.", above=0)
    weight_decay: float = _setting(0.0, "Decoupled weight decay; norms and biases are exempt.", at_least=0)
    max_grad_norm: float = _setting(1.0, "Gradient norm above which gradients are scaled down (0: never).", at_least=0)
    on_non_finite: str = _setting(
        "stop",
        "A loss or gradient that is not finite. stop: end the run before the update; skip: leave the update out and "
        "name its rows.",
        choices=("stop", "skip"),
        harmless=True,
    )
    max_skipped: int = _setting(
        10, "Updates that on_non_finite=skip may leave out in all before the run ends after all.",
        at_least=0, harmless=True,
    )  # fmt: skip
    scheduler: str = _setting("cosine", "Learning rate after the warm-up.", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = _setting(
        0.05, "Share of the updates in which the learning rate rises.", at_least=0, at_most=1
    )
    final_lr_ratio: float = _setting(
        0.1, "Learning rate of the last update, as a share of the peak.", at_least=0, at_most=1
    )
    dtype: str = _setting(
        "auto", "Weights and activations; auto: bf16 on a GPU that has it, else fp32.", choices=("auto", "fp32", "bf16")
    )
    attention: str = _setting(
        "sdpa", "Attention implementation of transformers.", choices=("sdpa", "eager", "flash_attention_2")
    )
    logps: str = _setting(
        "auto", "Implementation of the log-probability operation.", choices=("auto", "torch", "triton", "reference")
    )
    activation_checkpointing: bool = _setting(
        False, "Recompute activations in backward instead of keeping them.", harmless=True
    )
    activation_offload: bool = _setting(
        False,
        "Keep what activation_checkpointing recomputes from (each layer's input) in host memory.",
        harmless=True,
    )
    nvme_path: str | None = _setting(
        None,
        "Folder, of this run alone, for an offload to NVMe (ds_configs/z3_nvme.json; needs libaio and its headers).",
        harmless=True,
    )
    train_language_model: bool = _setting(True, "Train the language model and its head.")
    train_vision_tower: bool = _setting(False, "Train the vision tower.")
    train_merger: bool = _setting(False, "Train the merger between vision tower and language model.")
    vision_tower_lr: float | None = _setting(
        None, "Peak learning rate of the vision tower; unset: learning_rate. The schedule's shape is the same.", above=0
    )
    merger_lr: float | None = _setting(None, "Peak learning rate of the merger; unset: learning_rate.", above=0)
    lora_rank: int = _setting(
        0, "Rank of a LoRA adapter that trains in place of the language model (0: none).", at_least=0
    )
    lora_alpha: int = _setting(
        32, "The adapter counts alpha / rank times (with use_rslora: alpha / sqrt(rank) times).", at_least=1
    )
    lora_dropout: float = _setting(0.0, "Dropout before the adapter, in training only.", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = _setting(
        ("all-linear",),
        "Linear layers of the language model that get one, such as q_proj; all-linear: each but the head.",
    )
    use_rslora: bool = _setting(False, "Rank-stabilized LoRA: another scale, see lora_alpha.")
    use_dora: bool = _setting(False, "DoRA: the norms of the adapted weights' rows train too.")
    quantize: str | None = _setting(
        None,
        "nf4: hold the language model's frozen linear layers in 4 bits (QLoRA; a reference model too); needs lora_rank "
        "and ZeRO-1 or ZeRO-2.",
        choices=("nf4",),
    )
    merge_adapter: bool = _setting(
        True,
        "Write the whole model with the adapter merged in, which Stage II starts from and servers load; false: write "
        "the adapter alone, as peft loads it.",
        harmless=True,
    )
    max_shard_gb: float = _setting(
        5.0,
        "Largest safetensors file of the model written, 1e9 bytes; a larger model is split.",
        above=0,
        harmless=True,
    )
    grey_window: tuple[float, float] | None = _setting(
        None, "Low and high intensity of 16-bit grey images, shown as black and white; unset: such images are refused."
    )
    on_bad_row: str = _setting(
        "stop", "stop: list unusable rows and stop; skip: leave them out and write the list.", choices=("stop", "skip")
    )

    def __post_init__(self):
        for item in fields(self):
            _check_value(item, getattr(self, item.name))
        if self.pack_length and self.micro_batch_size > 1:
            raise ValueError(
                f"pack_length: a micro-batch is one packed row; micro_batch_size must be 1, not {self.micro_batch_size}"
            )
        if self.grey_window is not None and self.grey_window[0] >= self.grey_window[1]:
            raise ValueError(
                f"grey_window: the low end {self.grey_window[0]} must be below the high end {self.grey_window[1]}"
            )
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError("activation_offload: true needs activation_checkpointing: true")
        if not (self.train_language_model or self.train_vision_tower or self.train_merger):
            raise ValueError(
                "train_language_model, train_vision_tower and train_merger are all false: nothing would train"
            )
        for name in ("vision_tower", "merger"):
            if getattr(self, f"{name}_lr") is not None and not getattr(self, f"train_{name}"):
                raise ValueError(f"{name}_lr: the {name} does not train; set train_{name}=true or leave {name}_lr out")
        self._check_adapter()
        self._check_objective()

    def _check_adapter(self) -> None:
        if not self.lora_rank:
            for name in OF_ADAPTERS:
                if (value := getattr(self, name)) != _default(FIELDS[name]):
                    raise ValueError(f"{name}: {value!r} has a meaning only with an adapter; set lora_rank, such as 16")
            return
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules: empty; name layers, or all-linear")
        if not self.train_language_model:
            raise ValueError(
                f"lora_rank: {self.lora_rank} puts an adapter on the language model, but train_language_model is "
                "false; set lora_rank=0 or train_language_model=true"
            )
        for part in ("vision_tower", "merger"):
            if getattr(self, f"train_{part}") and not self.merge_adapter:
                raise ValueError(
                    f"merge_adapter: false writes the adapter of the language model alone, and the trained {part} "
                    f"would be lost; set merge_adapter=true or train_{part}=false"
                )

    def _check_objective(self) -> None:
        mix = ", ".join(self.objective)
        if not self.objective:
            raise ValueError("objective: {} is empty; name at least one loss and its weight, such as {sigmoid: 1}")
        for item in fields(self):
            readers = [name for name, reads in OBJECTIVES.items() if item.name in reads]
            if readers and getattr(self, item.name) != item.default and not set(readers) & set(self.objective):
                value = getattr(self, item.name)
                raise ValueError(
                    f"{item.name}: {value!r} has no meaning with objective {mix}; it belongs to {', '.join(readers)}"
                )
        if "robust" in self.objective and not self.label_smoothing:
            raise ValueError("label_smoothing: objective robust needs one above 0; at 0 it is sigmoid")
        if "image_conditional" in self.objective and self.corruption is None:
            raise ValueError(f"corruption: objective image_conditional needs one of {', '.join(CORRUPTIONS)}")

    @property
    def needs_reference(self) -> bool:
        """Whether any loss of the objective compares with a reference model."""
        return any("reference" in OBJECTIVES[name] for name in self.objective)

    def as_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


FIELDS = {item.name: item for item in fields(Settings)}


def _check_value(item, value) -> None:
    """Raise a ValueError that names the field, the value and the values that would do."""
    rules = item.metadata
    if value is None:
        return
    names = value if isinstance(value, Mapping) else (value,)
    if rules["choices"] and (unknown := [repr(name) for name in names if name not in rules["choices"]]):
        raise ValueError(f"{item.name}: {', '.join(unknown)} is not one of {', '.join(rules['choices'])}")
    for where, part in _parts(item.name, value):
        if isinstance(part, str) and has_credentials(part):
            raise ValueError(f"{where}: an address with a user, password or key in it; settings are told and written")
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{where}: {part} is not a finite number")
        for rule, holds, words in (
            ("at_least", lambda v, limit: v >= limit, "at least"),
            ("above", lambda v, limit: v > limit, "above"),
            ("below", lambda v, limit: v < limit, "below"),
            ("at_most", lambda v, limit: v <= limit, "at most"),
        ):
            if rules[rule] is not None and not holds(part, rules[rule]):
                raise ValueError(f"{where}: {part} must be {words} {rules[rule]}")


def _parts(name: str, value) -> list[tuple[str, Any]]:
    """The single values in a value, each with the name that an error gives it."""
    if isinstance(value, Mapping):
        return [(f"{name}.{key}", part) for key, part in value.items()]
    return [(name, part) for part in value] if isinstance(value, tuple) else [(name, value)]


@dataclass(frozen=True)
class BatchArithmetic:
    """global = micro x accumulation x ranks; ranks that share their micro-batches count as one."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    sequence_parallel_size: int = 1

    def __post_init__(self):
        if self.world_size % self.sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size: {self.world_size} ranks are not groups of {self.sequence_parallel_size}; "
                "choose a divisor of the number of ranks"
            )
        per_forward = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % per_forward:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is not micro_batch_size {self.micro_batch_size} x "
                f"accumulation x {self._ranks}; choose a multiple of {per_forward} (a run that continues "
                "keeps its global batch: choose another micro_batch_size or number of ranks)"
            )

    @classmethod
    def of(cls, settings: Settings, world_size: int) -> "BatchArithmetic":
        return cls(settings.global_batch_size, settings.micro_batch_size, world_size, settings.sequence_parallel_size)

    @property
    def data_parallel_size(self) -> int:
        """Micro-batches that run at the same time."""
        return self.world_size // self.sequence_parallel_size

    @property
    def grad_accum_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = micro-batch {self.micro_batch_size} x "
            f"accumulation {self.grad_accum_steps} x {self._ranks}"
        )

    @property
    def _ranks(self) -> str:
        if self.sequence_parallel_size > 1:
            return f"{self.data_parallel_size} x {self.sequence_parallel_size} ranks that share it"
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"


def learning_rate_at(settings: Settings, step: int, num_steps: int) -> float:
    """Learning rate of update `step` (from 0) of `num_steps`: linear warm-up, then the schedule to `final_lr_ratio`."""
    peak, floor = settings.learning_rate, settings.learning_rate * settings.final_lr_ratio
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.scheduler == "constant":
        return peak
    done = (step - warmup) / max(1, num_steps - 1 - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if settings.scheduler == "cosine" else 1 - done
    return floor + (peak - floor) * shape
