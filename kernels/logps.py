"""Per-token log-probabilities of a linear head: the entry point, its checks and the choice of implementation.

Legend: N token rows, M of them counted (target not IGNORE_INDEX), H hidden size, V vocabulary.
Run it inside `lm_head.forward` under ZeRO-3, where the gathered weight is whole.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from mede2.kernels.logps_reference import reference_logps
from mede2.kernels.logps_torch import torch_logps

IGNORE_INDEX = -100
IMPLEMENTATIONS = ("reference", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    with_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(hidden @ weight.T + bias)[targets] for each row, differentiable in hidden, weight and bias.

    Rows whose target is IGNORE_INDEX are dropped before any product; they return 0.0 and their gradient is zero.
    The dtypes of the arguments alone set the arithmetic: autocast is off inside. On CUDA a call waits for the device
    once, to learn together how many rows count and whether any target is out of range.

    Args:
        hidden: (N, H), floating; need not be contiguous.
        weight: (V, H), dtype and device of `hidden`. Pass the Parameter itself, not a view of it.
        targets: (N,) int64, each in [0, V) or IGNORE_INDEX.
        groups: (N,) int64: rows of one number will get one and the same upstream gradient, as the tokens of an answer
            do in DPO. The torch implementation then need not compute the logits again in backward (fp32, and as long
            as one weight gradient for each group, or the rows' N x V exponentials, whichever is less, fits its
            budget). Where weight gradients are what is less, backward runs once, and raises a ValueError where the
            upstream gradients of a group differ.
        bias: (V,), dtype and device of `weight`.
        softcap: c, for logits bounded by c * tanh(logits / c) (Gemma 2, arXiv 2408.00118).
        with_entropy: also return the entropy of each row's distribution in nats, differentiable as well.
        implementation: "auto" or a name in IMPLEMENTATIONS.

    Returns:
        (N,) log-probabilities, and (N,) entropies where asked for (0.0 in ignored rows): fp32; fp64 for fp64 inputs.

    Raises:
        ValueError: a wrong shape, dtype, device or target, or an implementation that is unknown or cannot run here;
            the message names the field.
    """
    _check_arguments(hidden, weight, targets, groups, bias, softcap)
    function = _load(choose_implementation(implementation, hidden.device.type, hidden.dtype))
    rows = _counted_rows(targets, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        if len(rows) == len(targets):
            logps, entropy = function(hidden, weight, targets, bias, groups, softcap, with_entropy)
        else:
            counted = groups.index_select(0, rows) if groups is not None else None
            results = function(
                hidden.index_select(0, rows), weight, targets.index_select(0, rows), bias, counted, softcap,
                with_entropy,
            )  # fmt: skip
            logps, entropy = (
                values if values is None else values.new_zeros(targets.shape).index_copy(0, rows, values)
                for values in results
            )
    return (logps, entropy) if with_entropy else logps


def choose_implementation(implementation: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The name in IMPLEMENTATIONS that `linear_logps` will run for this request, so that a caller can log it once.

    "auto" is "triton" for 16-bit tensors on CUDA where Triton is installed, else "torch", which runs on every device
    and in every floating dtype (in fp32 cuBLAS is faster than what Triton compiles).

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"implementation: got {implementation!r}, expected one of {['auto', *IMPLEMENTATIONS]}")
    has_triton = find_spec("triton") is not None
    if implementation == "auto":
        return "triton" if has_triton and device == "cuda" and dtype.itemsize == 2 else "torch"
    if implementation == "triton" and not (has_triton and _load_triton().runs_on(device) and dtype in TRITON_DTYPES):
        raise ValueError(
            f"implementation: got 'triton' for {dtype} on {device}, where it does not run "
            "(it needs Triton, and CUDA or TRITON_INTERPRET=1 on a CPU, and fp32, bf16 or fp16); use 'auto'"
        )
    return implementation


def _load(implementation: str):
    """The function of an implementation. It takes hidden (M, H), weight (V, H), targets (M,) int64 within [0, V), bias
    (V,) or None, groups (M,) or None, softcap and with_entropy, all checked, and returns (M,) log-probabilities and
    (M,) entropies or None. M may be 0: the gradients are then zeros."""
    if implementation == "triton":
        return _load_triton().triton_logps
    return {"reference": reference_logps, "torch": torch_logps}[implementation]


def _load_triton():
    from mede2.kernels import logps_triton  # importing Triton takes a second, and not every machine has it

    return logps_triton


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
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
    if groups is not None and (groups.shape != targets.shape or groups.dtype != torch.int64):
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} {groups.dtype}, expected ({hidden.shape[0]},) torch.int64"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, expected a positive number or None")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, but hidden is {hidden.dtype}; cast one of them")
    for name, tensor in {"weight": weight, "targets": targets, "groups": groups, "bias": bias}.items():
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
