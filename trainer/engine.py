"""The DeepSpeed engine around a policy: its configuration, the update, and its weights. Imports deepspeed."""

import copy
import ctypes
import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidiactl") else "cpu")

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

from mede2.trainer.adapters import adapter_tensors, whole_tensors
from mede2.trainer.gradients import clear_gradients
from mede2.trainer.losses import sum_by_sequence
from mede2.trainer.policy import Policy, part_of
from mede2.trainer.redaction import SECRET_NAMES
from mede2.trainer.settings import BatchArithmetic, Settings
from mede2.trainer.world import World

# A collective of inference that training never calls; on a CPU its C++ would compile for a minute or more in the first
# run, and again whenever a run from another virtual environment shares the cache.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls

OURS = {  # sections of a DeepSpeed file that would say again, or otherwise, what a setting says
    "optimizer": "optimizer, learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "scheduler, warmup_ratio, final_lr_ratio",
    "fp16": "dtype (fp16 is not supported; use bf16)",
    "activation_checkpointing": "activation_checkpointing",
    "managed_gradient_accumulation": "global_batch_size and micro_batch_size",
}
BLOCK_8BIT = 256  # values that share a scale in bitsandbytes' 8-bit state
MOMENTS_AT_ONCE = 2**20  # values looked at together; most tensors show one that is not zero at once


class NonFiniteUpdate(RuntimeError):
    """A loss or gradient that is not finite; nothing was updated."""


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, with the sections that settings own refused.

    Raises:
        ValueError: names the file and the field.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--ds {path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--ds {path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--ds {path}: a DeepSpeed file holds a JSON object, not {type(config).__name__}")
    for section, setting in OURS.items():
        if section in config:
            raise ValueError(f"--ds {path}: {section}: remove it; the settings decide: {setting}")
    if _get(config, "checkpoint.writer") or "datastates_ckpt" in config:
        raise ValueError(
            f"--ds {path}: checkpoint.writer, datastates_ckpt: remove it; the settings decide: async_checkpoints"
        )
    for section in ("zero_optimization", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"--ds {path}: {section}: {config[section]!r} is not a JSON object")
    if secret := [field for field in _paths(config) if field.upper().endswith(SECRET_NAMES)]:
        raise ValueError(f"--ds {path}: {secret[0]}: DeepSpeed prints its file; give it by an environment variable")
    stage = _get(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"--ds {path}: zero_optimization.stage: {stage!r} is not 1, 2 or 3")
    return config


def fill_deepspeed_config(
    config: Mapping[str, Any], settings: Settings, batch: BatchArithmetic, dtype: torch.dtype, hidden_size: int,
    largest_parameter: int,
) -> dict[str, Any]:  # fmt: skip
    """The DeepSpeed configuration of a run: every "auto" filled from the settings, every explicit value checked.

    Args:
        config: as `read_deepspeed_file` returns it.
        settings: of the run.
        batch: the batch arithmetic.
        dtype: of the weights.
        hidden_size: of the language model, for the sizes of ZeRO's buffers.
        largest_parameter: number of values of the model's largest one; a buffer between NVMe and memory holds a
            rank's share of it.

    Raises:
        ValueError: a value that disagrees with the settings, or an "auto" that nothing fills; names the field.
    """
    bf16 = dtype == torch.bfloat16
    must_agree = {
        "train_batch_size": ("global_batch_size", batch.global_batch_size),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", batch.micro_batch_size),
        "gradient_accumulation_steps": ("global_batch_size, micro_batch_size and ranks", batch.grad_accum_steps),
        "gradient_clipping": ("max_grad_norm", settings.max_grad_norm),
        "bf16.enabled": ("dtype", bf16),
    }
    sizes = {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = copy.deepcopy(dict(config))
    for field, (setting, value) in must_agree.items():
        given = _get(filled, field)
        if given not in ("auto", None) and given != value:
            raise ValueError(
                f'--ds: {field} is {given}, but must be {value} by {setting}; write "auto" or make them agree'
            )
        _put(filled, field, value)
    swaps = [f"zero_optimization.offload_{what}" for what in ("optimizer", "param")]
    swaps = [f"{section}.nvme_path" for section in swaps if _get(filled, f"{section}.device") == "nvme"]
    unset = [field for field in swaps if _get(filled, field) in ("auto", None)]
    if unset and settings.nvme_path is None:
        raise ValueError(f"nvme_path: not set, but the --ds file needs it ({', '.join(unset)}); name a folder on NVMe")
    if settings.nvme_path is not None and not unset:
        raise ValueError(f"nvme_path: {settings.nvme_path}, but no offload to NVMe in the --ds file asks for it")
    for field in unset:
        _put(filled, field, settings.nvme_path)
    if "param" in on_nvme(filled):  # DeepSpeed's own default is less than the share of many an embedding
        field, share = "zero_optimization.offload_param.buffer_size", -(-largest_parameter // batch.world_size)
        given = _get(filled, field)
        if given in ("auto", None):
            _put(filled, field, share)
        elif not isinstance(given, (int, float)) or given < share:
            raise ValueError(
                f"--ds: {field} is {given!r}, but a rank holds {share} values of the largest parameter: give that many "
                'or more, or "auto"'
            )
    for field in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if _get(filled, field) not in (True, None):
            raise ValueError(f"--ds: {field}: remove it; on_non_finite needs DeepSpeed to look before an update")
    for field, value in sizes.items():
        if _get(filled, field) == "auto":
            _put(filled, field, value)
    if left := [field for field in _paths(filled) if _get(filled, field) == "auto"]:
        raise ValueError(f'--ds: {", ".join(left)}: no setting fills this "auto"; write a value')
    stage = _get(filled, "zero_optimization.stage")
    offloads = settings.optimizer == "cpu_adam"
    if offloads and _get(filled, "zero_optimization.offload_optimizer.device") not in ("cpu", "nvme"):
        raise ValueError(
            "optimizer: cpu_adam needs zero_optimization.offload_optimizer.device cpu or nvme in the --ds file"
        )
    if settings.optimizer == "paged_adamw_8bit" and _get(filled, "zero_optimization.offload_optimizer"):
        raise ValueError(
            "optimizer: paged_adamw_8bit pages its state itself; remove zero_optimization.offload_optimizer from the "
            "--ds file, or choose cpu_adam"
        )
    if settings.quantize and stage == 3:
        raise ValueError(
            f"quantize: ZeRO-3 cannot partition {settings.quantize} weights; name a --ds file of ZeRO-1 or ZeRO-2, "
            "such as ds_configs/z2.json"
        )
    filled |= {
        "managed_gradient_accumulation": False,  # the loop's engine.update() is the accumulation boundary
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": offloads,
        "steps_per_print": 10**12,
    }
    return filled


def on_nvme(config: Mapping[str, Any]) -> set[str]:
    """Which of "optimizer" and "param" a configuration offloads to NVMe."""
    sections = {what: f"zero_optimization.offload_{what}.device" for what in ("optimizer", "param")}
    return {what for what, field in sections.items() if _get(config, field) == "nvme"}


def check_nvme(config: Mapping[str, Any], *, resumes: bool = False) -> None:
    """What an offload to NVMe needs, and cannot do.

    Raises:
        ValueError: the run would continue with its optimizer on NVMe, which DeepSpeed 0.19 loads without a word and
            with other weights; or DeepSpeed cannot build the operator, for want of libaio.
    """
    if resumes and "optimizer" in on_nvme(config):
        raise ValueError(
            "resume: a run with its optimizer on NVMe cannot be continued; start over with --resume never, or with "
            "zero_optimization.offload_optimizer.device cpu in the --ds file"
        )
    if on_nvme(config) and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError("nvme_path: DeepSpeed's offload to NVMe needs libaio with its headers (Debian: libaio-dev)")


def _get(config: Mapping, field: str):
    for key in field.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _put(config: dict, field: str, value) -> None:
    *parents, last = field.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


def _paths(config: Mapping, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def make_optimizer(policy: Policy, settings: Settings) -> torch.optim.Optimizer:
    """Adam over the trained parameters; weights of two and more dimensions decay, norms and biases do not.

    Each group holds its `lr_ratio`: its part's learning rate as a share of the main one.
    """
    rates = {"vision_tower": settings.vision_tower_lr, "merger": settings.merger_lr}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(part_of(name)) or settings.learning_rate
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault((rate, settings.weight_decay if dimensions > 1 else 0.0), []).append(parameter)
    groups = [
        {"params": parameters, "lr": rate, "lr_ratio": rate / settings.learning_rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    common = dict(
        lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon
    )
    if settings.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        return (AdamW8bit if settings.optimizer == "adamw_8bit" else PagedAdamW8bit)(groups, **common)
    if settings.optimizer == "cpu_adam":
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


class Engine:
    """A policy sharded over the ranks. With an optimizer it trains; without one it only answers.

    Args:
        policy: loaded under the same DeepSpeed configuration.
        config: from `fill_deepspeed_config`.
        world: the ranks.
        dtype: of the weights.
        optimizer: from `make_optimizer`, or None.
    """

    def __init__(self, policy: Policy, config: dict, world: World, dtype: torch.dtype, optimizer=None):
        if optimizer is None:
            config = {
                k: v
                for k, v in config.items()
                if k not in ("zero_force_ds_cpu_optimizer", "managed_gradient_accumulation")
            }
            if config["zero_optimization"]["stage"] != 3:
                config = config | {"zero_optimization": {"stage": 0}}
        self.world, self.dtype = world, dtype
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
        if optimizer is not None and self.deepspeed.zero_optimization_stage() == 3:
            _share_masters(self.deepspeed.optimizer)
        # Scripts beside every checkpoint, which nobody needs: where the disk is full, rank 0 alone would fail in this.
        self.deepspeed._copy_recovery_script = lambda folder: None
        return_free_memory()  # the weights as they were read, and copies on their way to partitions
        self.policy = policy
        self.deepspeed.train(optimizer is not None)  # transformers hands models over in evaluation mode

    def __call__(self, micro_batch) -> Tensor:
        """Log-probabilities (N,) fp32 of a micro-batch's answer tokens."""
        return self.deepspeed(
            micro_batch.inputs, micro_batch.branches, micro_batch.rows, micro_batch.targets, micro_batch.sequence
        )

    @torch.no_grad()
    def image_features(self, micro_batch) -> Tensor:
        """What the vision tower makes of a micro-batch's images; see `Policy.image_features`."""
        return self.deepspeed(micro_batch.inputs)

    @torch.no_grad()
    def answer_logps(self, micro_batch) -> Tensor:
        """Log-probability (S,) fp64 of each sequence's answer, without gradients."""
        logps = self(micro_batch)
        return sum_by_sequence(logps, micro_batch.sequence, len(micro_batch.weights))

    def num_state_bytes(self) -> int:
        """The least that the state of all ranks takes on disk: the fp32 masters of what trains."""
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        return 4 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)

    def hand_over_state(self, folder: Path, save: Callable[..., None]) -> None:
        """Have `save(state_dict=, path=)` called for each file of a checkpoint that DeepSpeed has this rank write to
        `folder`. What is frozen is left out. All ranks call it."""
        self.deepspeed.checkpoint_engine.save = save
        self.deepspeed.save_checkpoint(
            folder.parent, tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )  # fmt: skip

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the main learning rate; the parts that have their own keep their ratio to it."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's share of a loss that is a sum over all ranks and micro-batches.

        ZeRO averages over ranks, so the share is multiplied by their number.
        """
        self.deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def update(self) -> float:
        """Apply the accumulated gradients; returns their global norm before clipping.

        Raises:
            NonFiniteUpdate: on every rank, if on any rank the engine left the weights as they were, as it does without
                a word when the norm is not finite. It has counted that, and the gradients are gone.
        """
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        applied = self.deepspeed.was_step_applied() and norm == norm and abs(norm) != float("inf")
        if self.world.sum({"skipped": float(not applied)})["skipped"]:
            clear_gradients(self.deepspeed.optimizer)  # its own cleaning leaves those of an offload in bf16
            raise NonFiniteUpdate("the gradient norm is not finite")
        return norm

    def discard(self) -> None:
        """Let go of the accumulated gradients in place of an update, and count that as the engine counts its own."""
        clear_gradients(self.deepspeed.optimizer)
        self.deepspeed.skipped_steps += 1
        self.deepspeed.global_steps += 1

    @property
    def num_skipped(self) -> int:
        """Updates that were left out since the run began; checkpoints carry it."""
        return self.deepspeed.skipped_steps

    def state_dict(self, adapter_only: bool = False) -> dict[str, Tensor] | None:
        """The whole model, an adapter merged into it, on rank 0's host under transformers' names; None elsewhere. All
        ranks call it; each tensor is gathered by itself, and the frozen ones of `adapter_only` not at all."""
        state, names = {}, {}
        for name, parameters, value in (adapter_tensors if adapter_only else whole_tensors)(self.policy.model):
            first = names.setdefault(id(parameters[0]), name)
            if first != name:  # tied
                state[name] = state[first]
                continue
            with deepspeed.zero.GatheredParameters(parameters):  # nothing to do for what ZeRO-3 did not partition
                state[name] = value().to("cpu", copy=True) if self.world.is_main else None
        return state if self.world.is_main else None

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
        """Name (transformers'), parameter, and what this rank holds of its values; all ranks in the same order."""
        for name, parameter in self.policy.named_parameters():
            yield name.removeprefix("model."), parameter, getattr(parameter, "ds_tensor", parameter).detach()

    def has_moment(self, parameter: torch.nn.Parameter) -> bool:
        """Whether Adam's first moment of a trained parameter, as far as this rank holds it, is anywhere not zero.

        The optimizer's own state is asked, as neither a gradient nor 16-bit weights tell: a gradient may not reach the
        optimizer, and 16 bits hide small updates.
        """
        zero = self.deepspeed.optimizer
        if self.deepspeed.zero_optimization_stage() == 3:
            group, start, count = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
        else:
            place = parameter._hp_mapping  # None: this rank holds nothing of it
            if place is None:
                return False
            start, count = place.hp_fragment_address.start, place.hp_fragment_address.numel
            flats = getattr(zero, "single_partition_of_fp32_groups", None)  # ZeRO-1 in bf16 has another optimizer
            flat = (flats or zero.fp32_groups_flat_partition)[place.param_group_index]
        state = zero.optimizer.state[flat]
        moments = state["exp_avg" if "exp_avg" in state else "state1"].view(-1)
        for first in range(start, start + count, MOMENTS_AT_ONCE):
            here = slice(first, min(first + MOMENTS_AT_ONCE, start + count))
            values = moments[here]
            if values.dtype == torch.uint8:  # codes of bitsandbytes, with a scale for each block
                blocks = torch.arange(here.start, here.stop, device=values.device) // BLOCK_8BIT
                values = state["qmap1"][values.long()] * state["absmax1"][blocks]
            if values.any():
                return True
        return False

    def close(self) -> None:
        """Free the engine's memory: DeepSpeed's own references to the parameters outlive it, so they are emptied, and
        what ZeRO-1 and 2 hold hangs together in circles."""
        self.deepspeed.destroy()
        for parameter in self.policy.parameters():
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = tensor.data.new_empty(0)
        self.deepspeed = self.policy = self.optimizer = None
        gc.collect()
        return_free_memory()


def _share_masters(zero) -> None:
    """Let fp32 weights be their own masters, as DeepSpeed 0.19 means to: it compares a `torch.device` with a name,
    finds them unlike, and copies. Where weights are of 16 bits, or masters elsewhere, nothing changes."""
    for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        if weights is not None and (weights.dtype, weights.device, weights.shape) == (
            master.dtype, master.device, master.shape,
        ):  # fmt: skip
            master.data = weights.data


def return_free_memory() -> None:
    """Hand what is freed but kept by the C library's allocator back to the system: after a model, hundreds of MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # malloc_trim(3); other C libraries than glibc have none
    if trim:
        trim(0)
