"""The DeepSpeed file of a run: read, checked against the settings, its "auto"s filled. No deepspeed, no torch."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mede2.trainer.redaction import SECRET_NAMES
from mede2.trainer.settings import BatchArithmetic, Settings

if TYPE_CHECKING:
    import torch

OURS = {  # sections of a DeepSpeed file that would say again, or otherwise, what a setting says
    "optimizer": "optimizer, learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon",
    "scheduler": "scheduler, warmup_ratio, final_lr_ratio",
    "fp16": "dtype (fp16 is not supported; use bf16)",
    "activation_checkpointing": "activation_checkpointing",
    "managed_gradient_accumulation": "global_batch_size and micro_batch_size",
}


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
    if get_field(config, "checkpoint.writer") or "datastates_ckpt" in config:
        raise ValueError(
            f"--ds {path}: checkpoint.writer, datastates_ckpt: remove it; the settings decide: async_checkpoints"
        )
    for section in ("zero_optimization", "bf16"):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"--ds {path}: {section}: {config[section]!r} is not a JSON object")
    if secret := [field for field in _paths(config) if field.upper().endswith(SECRET_NAMES)]:
        raise ValueError(f"--ds {path}: {secret[0]}: DeepSpeed prints its file; give it by an environment variable")
    stage = get_field(config, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"--ds {path}: zero_optimization.stage: {stage!r} is not 1, 2 or 3")
    return config


def fill_deepspeed_config(
    config: Mapping[str, Any], settings: Settings, batch: BatchArithmetic, dtype: "torch.dtype", hidden_size: int,
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
    bf16 = str(dtype) == "torch.bfloat16"
    must_agree = {
        "train_batch_size": ("global_batch_size", batch.global_batch_size),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", batch.micro_batch_size),
        "gradient_accumulation_steps": ("global_batch_size, micro_batch_size and ranks", batch.grad_accum_steps),
        "gradient_clipping": ("max_grad_norm", settings.max_grad_norm),
        "bf16.enabled": ("dtype", bf16),
    }
    filled = copy.deepcopy(dict(config))
    for field, (setting, value) in must_agree.items():
        given = get_field(filled, field)
        if given not in ("auto", None) and given != value:
            raise ValueError(
                f'--ds: {field} is {given}, but must be {value} by {setting}; write "auto" or make them agree'
            )
        _put(filled, field, value)
    filled["train_batch_size"] = batch.global_batch_size * batch.sequence_parallel_size  # by its count of the ranks
    swaps = [f"zero_optimization.offload_{what}" for what in ("optimizer", "param")]
    swaps = [f"{section}.nvme_path" for section in swaps if get_field(filled, f"{section}.device") == "nvme"]
    unset = [field for field in swaps if get_field(filled, field) in ("auto", None)]
    if unset and settings.nvme_path is None:
        raise ValueError(f"nvme_path: not set, but the --ds file needs it ({', '.join(unset)}); name a folder on NVMe")
    if settings.nvme_path is not None and not unset:
        raise ValueError(f"nvme_path: {settings.nvme_path}, but no offload to NVMe in the --ds file asks for it")
    for field in unset:
        _put(filled, field, settings.nvme_path)
    if "param" in on_nvme(filled):  # DeepSpeed's own default is less than the share of many an embedding
        field, share = "zero_optimization.offload_param.buffer_size", -(-largest_parameter // batch.world_size)
        given = get_field(filled, field)
        if given in ("auto", None):
            _put(filled, field, share)
        elif not isinstance(given, (int, float)) or given < share:
            raise ValueError(
                f"--ds: {field} is {given!r}, but a rank holds {share} values of the largest parameter: give that many "
                'or more, or "auto"'
            )
    for field in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if get_field(filled, field) not in (True, None):
            raise ValueError(f"--ds: {field}: remove it; on_non_finite needs DeepSpeed to look before an update")
    fill_sizes(filled, hidden_size)
    if left := [field for field in _paths(filled) if get_field(filled, field) == "auto"]:
        raise ValueError(f'--ds: {", ".join(left)}: no setting fills this "auto"; write a value')
    check_offload(filled, settings)
    filled |= {
        "managed_gradient_accumulation": False,  # the loop's engine.update() is the accumulation boundary
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": settings.optimizer == "cpu_adam",
        "steps_per_print": 10**12,
    }
    return filled


def fill_sizes(config: dict[str, Any], hidden_size: int) -> None:
    """Fill ZeRO's buffers where the file says "auto", in place, by the hidden size of the language model."""
    sizes = {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for field, value in sizes.items():
        if get_field(config, field) == "auto":
            _put(config, field, value)


def check_offload(config: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError for an optimizer or a quantization that the file's ZeRO cannot carry."""
    stage, device = (get_field(config, f"zero_optimization.{field}") for field in ("stage", "offload_optimizer.device"))
    if settings.optimizer == "cpu_adam" and device not in ("cpu", "nvme"):
        raise ValueError(
            "optimizer: cpu_adam needs zero_optimization.offload_optimizer.device cpu or nvme in the --ds file"
        )
    if settings.optimizer == "paged_adamw_8bit" and get_field(config, "zero_optimization.offload_optimizer"):
        raise ValueError(
            "optimizer: paged_adamw_8bit pages its state itself; remove zero_optimization.offload_optimizer from the "
            "--ds file, or choose cpu_adam"
        )
    if settings.quantize and stage == 3:
        raise ValueError(
            f"quantize: ZeRO-3 cannot partition {settings.quantize} weights; name a --ds file of ZeRO-1 or ZeRO-2, "
            "such as ds_configs/z2.json"
        )


def on_nvme(config: Mapping[str, Any]) -> set[str]:
    """Which of "optimizer" and "param" a configuration offloads to NVMe."""
    sections = {what: f"zero_optimization.offload_{what}.device" for what in ("optimizer", "param")}
    return {what for what, field in sections.items() if get_field(config, field) == "nvme"}


def get_field(config: Mapping, field: str) -> Any:
    """The value of a field such as "zero_optimization.stage", None where the file does not say."""
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
