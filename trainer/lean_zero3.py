"""What DeepSpeed 0.19's ZeRO-3 copies without need, and what it then does without. Nothing computed changes."""

import torch
from torch import Tensor

NORM_AT_ONCE = 2**20  # values of a gradient that are turned into fp64 together


def spare_copies(zero, num_ranks: int) -> None:
    """Let ZeRO-3 hold its states once, and one rank send nothing to itself.

    Args:
        zero: DeepSpeed's optimizer for ZeRO-3.
        num_ranks: that it shards over.
    """
    _share_masters(zero)
    zero.flatten = _flatten
    norm = zero.get_grad_norm_direct
    zero.get_grad_norm_direct = lambda gradients, parameters: norm(*_in_pieces(gradients, parameters))
    if num_ranks == 1:  # or gloo copies every bucket twice
        zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = lambda parameters, _: [
            parameter.grad.view(-1).to(zero.gradient_accumulation_dtype) for parameter in parameters
        ]


def _share_masters(zero) -> None:
    """Let fp32 weights be their own masters, as DeepSpeed means to: it compares a `torch.device` with a name, finds
    them unlike, and copies. Where weights are of 16 bits, or masters elsewhere, nothing changes."""
    for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
        if weights is not None and (weights.dtype, weights.device, weights.shape) == (
            master.dtype, master.device, master.shape,
        ):  # fmt: skip
            master.data = weights.data


def _flatten(tensors: list[Tensor]) -> Tensor:
    """One flat tensor. Adam's gradients already lie one behind the other, so it is a view of them: they are clipped
    where they are, and the next update's first micro-batch overwrites them anyway."""
    storage, end = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        if (tensor.untyped_storage().data_ptr(), tensor.data_ptr()) != (storage, end) or not tensor.is_contiguous():
            return torch._utils._flatten_dense_tensors(tensors)
        end += tensor.nbytes
    return tensors[0].as_strided((sum(tensor.numel() for tensor in tensors),), (1,))


def _in_pieces(gradients: list[Tensor], parameters: list) -> tuple[tuple, tuple]:
    """The same gradients in pieces, each with its parameter, as the norm is taken of a copy in fp64."""
    pairs = zip(gradients, parameters, strict=True)
    return tuple(zip(*((piece, p) for gradient, p in pairs for piece in gradient.split(NORM_AT_ONCE)), strict=True))
