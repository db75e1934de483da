"""Per-token log-probabilities written as anyone would: the definition that every other implementation is held to.

Legend: N token rows, H hidden size, V vocabulary; U = 2NVH operations.
Work: 1 U forward, 2 U backward. Saved for backward: hidden, weight and the N x V log-softmax.
Accumulation: the products in the inputs' dtype, as eager PyTorch runs them; the softmax in fp32 (fp64 for fp64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax(softcap(hidden @ weight.T + bias))[targets], with every N x V tensor of the eager way.

    Args:
        hidden: (N, H), any floating dtype.
        weight: (V, H), dtype of `hidden`.
        targets: (N,) int64 in [0, V), or -100 (PyTorch's own ignore index) for a row that returns 0.
        bias: (V,), dtype of `weight`.
        groups: of no use here.
        softcap: c of c * tanh(logits / c).
        with_entropy: also return the entropy of each row's distribution.

    Returns:
        log-probabilities (N,) and entropies (N,), or None: fp32; fp64 when the inputs are fp64.
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    entropy = None
    if with_entropy:
        log_softmax = logits.log_softmax(1)
        entropy = torch.special.entr(log_softmax.exp()).sum(1)
    return -F.cross_entropy(logits, targets, reduction="none"), entropy
