"""Per-token log-probabilities of a linear head: the entry point, its checks and the choice of implementation.

Legend: N token rows, M of them counted (target not IGNORE_INDEX), H hidden size, V vocabulary.
Run it inside `lm_head.forward` under ZeRO-3, where the gathered weight is whole.
"""

import torch
from torch import Tensor

from mede2.kernels.logps_reference import reference_logps
from mede2.kernels.logps_torch import torch_logps

IGNORE_INDEX = -100

# Each takes hidden (M, H), weight (V, H), targets (M,) int64 within [0, V) and bias (V,) or None, all checked, and
# returns (M,) log-probabilities. M may be 0: the gradients are then zeros.
IMPLEMENTATIONS = {"reference": reference_logps, "torch": torch_logps}


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """log_softmax(hidden @ weight.T + bias)[targets] for each row, differentiable in hidden, weight and bias.

    Rows whose target is IGNORE_INDEX are dropped before any product; they return 0.0 and their gradient is zero.
    The dtypes of the arguments alone set the arithmetic: autocast is off inside. On CUDA a call waits for the device
    once, to learn together how many rows count and whether any target is out of range.

    Args:
        hidden: (N, H), floating; need not be contiguous.
        weight: (V, H), dtype and device of `hidden`. Pass the Parameter itself, not a view of it.
        targets: (N,) int64, each in [0, V) or IGNORE_INDEX.
        bias: (V,), dtype and device of `weight`.
        implementation: "auto" or a name in IMPLEMENTATIONS.

    Returns:
        (N,) fp32 log-probabilities; fp64 when the inputs are fp64.

    Raises:
        ValueError: a wrong shape, dtype, device or target, or an unknown implementation; the message names the field.
    """
    logps_of_rows = IMPLEMENTATIONS[choose_implementation(implementation)]
    _check_arguments(hidden, weight, targets, bias)
    rows = _counted_rows(targets, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        if len(rows) == len(targets):
            return logps_of_rows(hidden, weight, targets, bias)
        logps = logps_of_rows(hidden.index_select(0, rows), weight, targets.index_select(0, rows), bias)
        return logps.new_zeros(targets.shape).index_copy(0, rows, logps)


def choose_implementation(implementation: str = "auto") -> str:
    """The name in IMPLEMENTATIONS that `linear_logps` will run for this request, so that a caller can log it once.

    "auto" is "torch", which runs on every device and in every floating dtype.
    """
    if implementation == "auto":
        return "torch"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {['auto', *IMPLEMENTATIONS]}")
    return implementation


def _check_arguments(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for a shape, dtype or device that does not fit; reads no tensor's values."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected (N, H); flatten batch and sequence first")
    if weight.ndim != 2:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (V, H); under ZeRO-3 call this inside lm_head.forward, "
            "where the weight is gathered"
        )
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: got hidden size {weight.shape[1]}, but hidden has {hidden.shape[1]}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected ({hidden.shape[0]},), one for each row")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: got {targets.dtype}, expected torch.int64")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: got {hidden.dtype}, expected a floating dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},), one for each weight row")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, but hidden is {hidden.dtype}; cast one of them")
    for name, tensor in {"weight": weight, "targets": targets, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, but hidden is on {hidden.device}")


def _counted_rows(targets: Tensor, num_vocab: int) -> Tensor:
    """(M,) int64, ascending: the rows whose target counts. Raises ValueError for a target outside [0, num_vocab)."""
    counted = targets != IGNORE_INDEX
    invalid = counted & ((targets < 0) | (targets >= num_vocab))
    num_counted, num_invalid = torch.stack((counted.sum(), invalid.sum())).tolist()  # the one wait for the device
    if num_invalid:
        row = invalid.nonzero()[0].item()
        raise ValueError(
            f"targets: row {row} is {targets[row].item()}, expected 0 to {num_vocab - 1} or {IGNORE_INDEX} to ignore "
            f"the row ({num_invalid} such rows)"
        )
    return torch.nonzero_static(counted, size=num_counted).squeeze(1)
