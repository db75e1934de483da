"""The DeepSpeed engine around a policy: the update, and its weights. Imports deepspeed."""

import gc
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
from mede2.trainer.deepspeed_file import on_nvme
from mede2.trainer.gradients import clear_gradients
from mede2.trainer.host_memory import Resident, return_free_memory
from mede2.trainer.lean_zero3 import spare_copies
from mede2.trainer.losses import sum_by_sequence
from mede2.trainer.policy import Policy, part_of
from mede2.trainer.settings import Settings
from mede2.trainer.world import World

# A collective of inference that training never calls; on a CPU its C++ would compile for a minute or more in the first
# run, and again whenever a run from another virtual environment shares the cache.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls

BLOCK_8BIT = 256  # values that share a scale in bitsandbytes' 8-bit state
MOMENTS_AT_ONCE = 2**20  # values looked at together; most tensors show one that is not zero at once


class NonFiniteUpdate(RuntimeError):
    """A loss or gradient that is not finite; nothing was updated."""


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
            spare_copies(self.deepspeed.optimizer, world.size)
        # Scripts beside every checkpoint, which nobody needs: where the disk is full, rank 0 alone would fail in this.
        self.deepspeed._copy_recovery_script = lambda folder: None
        return_free_memory()  # the weights as they were read, and copies on their way to partitions
        self.resident = Resident() if world.device.type == "cpu" else None
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
        if self.resident:
            self.resident.limit()

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
