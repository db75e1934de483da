"""Per-token log-probabilities by vocabulary chunks in plain PyTorch: any device, no N x V tensor, no gradient atomics.

Legend: N token rows, H hidden size, V vocabulary, C vocabulary rows in a chunk; U = 2NVH operations.
Work: 1 U forward; backward 1 U to recompute the logits, 1 U for the hidden gradient, 1 U for the weight gradient (a
frozen side skips its own).
Accumulation: logits, softmax statistics and the hidden gradient in fp32 (fp64 for fp64 inputs). Every row of the
weight and bias gradients is summed in one product over all N and rounded once.
Saved for backward: hidden (N, H), the weight and bias themselves, targets (N,) and the log-sum-exp (N,). Under ZeRO-3
the gathered weight is freed after the forward and gathered anew for the backward; only the Parameter follows that, a
`.t()` or `.detach()` of it would be left without storage.
Memory moved: each pass reads the weight once and hidden once a chunk; the extra memory is CHUNK_BYTES plus O(N H).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# What the buffers of one chunk may take. A vocabulary row in a chunk costs N logits, held in the products' dtype and,
# where that is narrower, once more in fp32, and two vectors of H in at most the statistics' dtype: the weight row as
# the products take it, and its gradient. C is the budget over that cost: fp32 with N = 1024, H = 512 costs
# 1024 * 4 + 2 * 512 * 4 bytes a row, so C = 4096. On a CPU 4 to 128 MiB took the same time, within noise.
CHUNK_BYTES = 32 * 2**20
# Below some hundred columns the products are bound by memory, not arithmetic (each element of hidden read serves C
# multiply-adds), so a very large N goes over the budget instead, to 512 N logits.
MIN_CHUNK = 512


def torch_logps(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """log_softmax(hidden @ weight.T + bias)[targets], differentiable once in hidden, weight and bias.

    Args:
        hidden: (N, H), any floating dtype; need not be contiguous.
        weight: (V, H), dtype of `hidden`; its gradient comes back in its own dtype.
        targets: (N,) int64 in [0, V), not checked here.
        bias: (V,), dtype of `weight`.

    Returns:
        (N,) fp32; fp64 when the inputs are fp64.
    """
    return _ChunkedLogps.apply(hidden, weight, targets, bias)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype the matrix products run in: that of `hidden`, unless this CPU cannot multiply it, then fp32.

    A CPU multiplies bf16 from AVX-512 on. Without it oneDNN leaves bf16 to a plain loop, 8 to 170 times slower than
    the fp32 product (measured on AVX2, 1024 x 512 x 2048), and the widened chunk fits in the budget anyway.
    """
    if hidden.device.type != "cpu" or hidden.dtype.itemsize >= 4:
        return hidden.dtype
    multiplies_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return hidden.dtype if hidden.dtype == torch.bfloat16 and multiplies_bf16 else torch.float32


def chunk_size(num_rows: int, hidden_size: int, logit_bytes: int, statistic_bytes: int) -> int:
    """C, the vocabulary rows that CHUNK_BYTES holds for N rows, never below MIN_CHUNK."""
    vocabulary_row_bytes = num_rows * logit_bytes + 2 * hidden_size * statistic_bytes
    return max(MIN_CHUNK, CHUNK_BYTES // max(vocabulary_row_bytes, 1))


class _Chunk(NamedTuple):
    """C consecutive vocabulary rows. The two logits buffers are one when the dtypes agree, and the next chunk's too."""

    rows: slice  # of the vocabulary
    weight: Tensor  # (C, H) in the products' dtype
    product: Tensor  # (N, C) in the products' dtype
    logits: Tensor  # (N, C) in fp32 or fp64, bias added
    target_columns: Tensor  # (N, 1) int64, the target's column, meaningless outside the chunk but within [0, C)
    has_target: Tensor  # (N, 1) bool


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[_Chunk]:
    """Walk the vocabulary in ascending chunks; `hidden` is (N, H) in the products' dtype, `dtype` the statistics'.

    Forward and backward walk it alike, so that the recomputed logits have the same bits.
    """
    (num_rows, hidden_size), num_vocab = hidden.shape, weight.shape[0]
    logit_bytes = hidden.dtype.itemsize + (dtype.itemsize if dtype != hidden.dtype else 0)
    size = min(num_vocab, chunk_size(num_rows, hidden_size, logit_bytes, dtype.itemsize))
    products = hidden.new_empty(num_rows * size)
    wide = products if dtype == hidden.dtype else hidden.new_empty(num_rows * size, dtype=dtype)
    for start in range(0, num_vocab, max(size, 1)):
        rows = slice(start, min(start + size, num_vocab))
        width = rows.stop - start
        weight_rows = weight[rows].to(hidden.dtype)
        product = torch.mm(hidden, weight_rows.t(), out=products[: num_rows * width].view(num_rows, width))
        logits = wide[: num_rows * width].view(num_rows, width)
        if wide is not products:
            logits.copy_(product)
        if bias is not None:
            logits += bias[rows]
        columns = (targets - start)[:, None]
        has_target = (columns >= 0) & (columns < width)
        yield _Chunk(rows, weight_rows, product, logits, columns.clamp(0, width - 1), has_target)


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # The least finite number, not -inf: a chunk of -inf logits (a masked vocabulary) must not make inf - inf.
        maximum = hidden.new_full((hidden.shape[0], 1), torch.finfo(dtype).min, dtype=dtype)
        total = torch.zeros_like(maximum)  # sum of exp(logit - maximum) over the chunks so far
        target_logit = torch.zeros_like(maximum)
        for chunk in _chunks(hidden.to(product_dtype(hidden)), weight, targets, bias, dtype):
            # Taken from the rounded logits that the sum sees: a sharper value could make a log-probability positive.
            target_logit = torch.where(chunk.has_target, chunk.logits.gather(1, chunk.target_columns), target_logit)
            new_maximum = torch.maximum(maximum, chunk.logits.amax(1, keepdim=True))
            chunk_total = chunk.logits.sub_(new_maximum).exp_().sum(1, keepdim=True)
            total = total * (maximum - new_maximum).exp() + chunk_total
            maximum = new_maximum
        logsumexp = maximum + total.log()
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp)
        return (target_logit - logsumexp).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        hidden, weight, targets, bias, logsumexp = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
        dtype = logsumexp.dtype
        operand = hidden.to(product_dtype(hidden))
        upstream = grad_logps[:, None]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(operand, weight, targets, bias, dtype):
                # d logps / d logits = onehot(target) - softmax, times the gradient that came in
                grad_logits = chunk.logits.sub_(logsumexp).exp_().mul_(-upstream)
                grad_logits.scatter_add_(1, chunk.target_columns, upstream * chunk.has_target)
                if needs_bias:
                    grad_bias[chunk.rows] = grad_logits.sum(0)
                grad_product = chunk.product.copy_(grad_logits)  # no work where the two are one buffer
                if needs_weight:
                    grad_weight[chunk.rows] = torch.mm(grad_product.t(), operand)
                if needs_hidden:
                    grad_hidden += torch.mm(grad_product, chunk.weight)
        return grad_hidden.to(hidden.dtype) if needs_hidden else None, grad_weight, None, grad_bias
