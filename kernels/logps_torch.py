"""Per-token log-probabilities by blocks in plain PyTorch: any device, no N x V tensor, no gradient atomics.

Legend: N token rows, H hidden size, V vocabulary, C vocabulary rows in a chunk; U = 2NVH operations.
Accumulation: logits, softmax statistics and the hidden gradient in fp32 (fp64 for fp64 inputs).

Three forms. By vocabulary chunk, the general one: 1 U forward; backward 1 U to recompute the logits, 1 U for the hidden
gradient, 1 U for the weight gradient (a frozen side skips its own). Every row of the weight and bias gradients is
summed in one product over all N and rounded once. Saved for backward: hidden (N, H), the weight and bias themselves,
targets (N,), the log-sum-exp (N,). Each pass reads the weight once and hidden once a chunk; the extra memory is
CHUNK_BYTES plus O(N H).

By row block, for rows in groups of one upstream gradient each, fp32 or wider: 3 U, all in the forward, which keeps the
gradients unscaled, the weight's once for each group; backward scales them in place, and so runs once. Saved for
backward: those, V H each.

By vocabulary chunk with the exponentials kept (N V fp32 or wider), where that is less than the groups' weight
gradients, as with short answers: 1 U forward, 2 U backward, which lets go of them one by one, and so runs once.

Under ZeRO-3 the gathered weight is freed after the forward and gathered anew for the backward; only the Parameter
follows that, a `.t()` or `.detach()` of it would be left without storage.
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
# multiply-adds), so a very large N goes over the budget instead, to 512 N logits; a row block likewise.
MIN_CHUNK = 512
MIN_ROWS = 64
GROUPED_BYTES = 256 * 2**20  # what the weight gradients of all groups may take
KEPT_CHUNK_BYTES = 8 * 2**20  # of exponentials: on a CPU a fifth faster than 32 MiB, as they stay in its cache


def torch_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax(softcap(hidden @ weight.T + bias))[targets], differentiable once in hidden, weight and bias.

    Args:
        hidden: (N, H), any floating dtype; need not be contiguous.
        weight: (V, H), dtype of `hidden`; its gradient comes back in its own dtype.
        targets: (N,) int64 in [0, V), not checked here.
        bias: (V,), dtype of `weight`.
        groups: (N,) int64; rows of one number get one upstream gradient, else backward raises a ValueError.
        softcap: c of c * tanh(logits / c).
        with_entropy: also return entropies.

    Returns:
        log-probabilities (N,) and entropies (N,), or None: fp32; fp64 when the inputs are fp64.
    """
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if groups is not None and trains and not with_entropy and hidden.dtype.itemsize >= 4 and len(targets):
        members = _members(groups)
        grouped_rows = len(members) * (weight.shape[1] + 1)  # of V values, in the weight and bias gradients
        keeps = softcap is None and len(targets) < grouped_rows
        held = (len(targets) if keeps else grouped_rows) * weight.shape[0] * weight.dtype.itemsize
        if held <= GROUPED_BYTES:
            if keeps:
                return _KeptLogps.apply(hidden, weight, targets, bias), None
            return _GroupedLogps.apply(hidden, weight, targets, bias, members, softcap), None
    return _ChunkedLogps.apply(hidden, weight, targets, bias, softcap, with_entropy)


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
    logits: Tensor  # (N, C) in fp32 or fp64, bias added, capped
    target_columns: Tensor  # (N, 1) int64, the target's column, meaningless outside the chunk but within [0, C)
    has_target: Tensor  # (N, 1) bool


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype
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
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield _Chunk(rows, weight_rows, product, logits, *_target_columns(targets, rows))


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, softcap, with_entropy) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # The least finite number, not -inf: a chunk of -inf logits (a masked vocabulary) must not make inf - inf.
        lowest = torch.finfo(dtype).min
        maximum = hidden.new_full((hidden.shape[0], 1), lowest, dtype=dtype)
        total = torch.zeros_like(maximum)  # sum of exp(x) over the chunks so far, x = logit - maximum
        moment = torch.zeros_like(maximum)  # sum of exp(x) x
        target_logit = torch.zeros_like(maximum)
        for chunk in _chunks(hidden.to(product_dtype(hidden)), weight, targets, bias, softcap, dtype):
            # Taken from the rounded logits that the sum sees: a sharper value could make a log-probability positive.
            target_logit = torch.where(chunk.has_target, chunk.logits.gather(1, chunk.target_columns), target_logit)
            new_maximum = torch.maximum(maximum, chunk.logits.amax(1, keepdim=True))
            fall = maximum - new_maximum
            shrink = fall.exp()
            chunk.logits.sub_(new_maximum)
            if with_entropy:
                x = chunk.logits.clamp(min=lowest)
                exponentials = chunk.logits.exp_()
                moment = shrink * (moment + fall * total) + x.mul_(exponentials).sum(1, keepdim=True)
            else:
                exponentials = chunk.logits.exp_()
            total = total * shrink + exponentials.sum(1, keepdim=True)
            maximum = new_maximum
        logsumexp = maximum + total.log()
        entropy = total.log() - moment / total if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp, entropy)
        ctx.softcap = softcap
        return (target_logit - logsumexp).squeeze(1), entropy.squeeze(1) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor, grad_entropy: Tensor | None):
        hidden, weight, targets, bias, logsumexp, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        dtype, softcap = logsumexp.dtype, ctx.softcap
        operand = hidden.to(product_dtype(hidden))
        upstream = grad_logps[:, None]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(operand, weight, targets, bias, softcap, dtype):
                slope = None if softcap is None else 1 - (chunk.logits / softcap).square_()
                logps = chunk.logits.sub_(logsumexp)
                if entropy is None:
                    # d logps / d logits = onehot(target) - softmax, times the gradient that came in
                    grad_logits = logps.exp_().mul_(-upstream)
                else:  # and d entropy / d logits = -softmax (log softmax + entropy)
                    factor = (logps.clamp(min=torch.finfo(dtype).min) + entropy).mul_(grad_entropy[:, None])
                    grad_logits = logps.exp_().mul_(factor.add_(upstream).neg_())
                grad_logits.scatter_add_(1, chunk.target_columns, upstream * chunk.has_target)
                if slope is not None:
                    grad_logits.mul_(slope)
                if needs_bias:
                    grad_bias[chunk.rows] = grad_logits.sum(0)
                grad_product = chunk.product.copy_(grad_logits)  # no work where the two are one buffer
                if needs_weight:
                    grad_weight[chunk.rows] = torch.mm(grad_product.t(), operand)
                if needs_hidden:
                    grad_hidden += torch.mm(grad_product, chunk.weight)
        return grad_hidden.to(hidden.dtype) if needs_hidden else None, grad_weight, None, grad_bias, None, None


class _KeptLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias) -> Tensor:
        maximum = hidden.new_full((hidden.shape[0], 1), torch.finfo(hidden.dtype).min)
        total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)
        kept, maxima = [], []
        for rows in _kept_chunks(hidden, weight):
            logits = torch.mm(hidden, weight[rows].t())
            if bias is not None:
                logits += bias[rows]
            columns, has_target = _target_columns(targets, rows)
            target_logit = torch.where(has_target, logits.gather(1, columns), target_logit)
            new_maximum = torch.maximum(maximum, logits.amax(1, keepdim=True))
            kept.append(logits.sub_(new_maximum).exp_())
            maxima.append(new_maximum)
            total = total * (maximum - new_maximum).exp() + kept[-1].sum(1, keepdim=True)
            maximum = new_maximum
        logsumexp = maximum + total.log()
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp, torch.cat(maxima, 1))
        ctx.kept = kept
        return (target_logit - logsumexp).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        if ctx.kept is None:
            raise RuntimeError("linear_logps with groups: backward runs once; to run it again, pass no groups")
        hidden, weight, targets, bias, logsumexp, maxima = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
        upstream = grad_logps[:, None]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for number, rows in enumerate(_kept_chunks(hidden, weight)):
                # d logps / d logits = onehot(target) - softmax, times the gradient that came in
                grad_logits = ctx.kept[number].mul_((maxima[:, number, None] - logsumexp).exp() * -upstream)
                ctx.kept[number] = None  # let go, while the weight's gradient grows
                columns, has_target = _target_columns(targets, rows)
                grad_logits.scatter_add_(1, columns, upstream * has_target)
                if needs_bias:
                    grad_bias[rows] = grad_logits.sum(0)
                if needs_weight:
                    torch.mm(grad_logits.t(), hidden, out=grad_weight[rows])
                if needs_hidden:
                    grad_hidden += torch.mm(grad_logits, weight[rows])
        ctx.kept = None
        return grad_hidden, grad_weight, None, grad_bias


def _kept_chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Which vocabulary rows a kept chunk holds."""
    size = max(MIN_CHUNK, KEPT_CHUNK_BYTES // (hidden.shape[0] * hidden.dtype.itemsize))
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _target_columns(targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(N, 1): each target's column among the vocabulary rows of a chunk, clamped, and whether it is in it."""
    columns = (targets - rows.start)[:, None]
    width = rows.stop - rows.start
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


def _members(groups: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group, (n,) int64 each."""
    order = torch.argsort(groups, stable=True)
    sizes = torch.unique_consecutive(groups[order], return_counts=True)[1]
    return order.split(sizes.tolist())


class _GroupedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, members, softcap) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        logps = hidden.new_empty(hidden.shape[0])
        ctx.members = members
        ctx.grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        ctx.grad_weights, ctx.grad_biases = [], []
        block = max(MIN_ROWS, CHUNK_BYTES // (weight.shape[0] * weight.dtype.itemsize))
        buffer = hidden.new_empty(min(block, max(map(len, members))) * weight.shape[0])
        for every in members:
            for number, rows in enumerate(every.split(block)):
                operand, columns = hidden.index_select(0, rows), targets.index_select(0, rows)[:, None]
                logits = torch.mm(operand, weight.t(), out=buffer[: len(rows) * len(weight)].view(len(rows), -1))
                if bias is not None:
                    logits += bias
                if softcap is not None:
                    logits.div_(softcap).tanh_().mul_(softcap)
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                target_logit, maximum = logits.gather(1, columns), logits.amax(1, keepdim=True)
                exponentials = logits.sub_(maximum).exp_()
                total = exponentials.sum(1, keepdim=True)
                logps[rows] = (target_logit - (maximum + total.log())).squeeze(1)
                # d logps / d logits = onehot(target) - softmax
                grad_logits = exponentials.mul_(-1 / total)
                grad_logits.scatter_add_(1, columns, torch.ones_like(total))
                if slope is not None:
                    grad_logits.mul_(slope)
                if needs_hidden:
                    ctx.grad_hidden[rows] = torch.mm(grad_logits, weight)
                if needs_weight and number == 0:
                    ctx.grad_weights.append(torch.mm(grad_logits.t(), operand))
                elif needs_weight:
                    torch.addmm(ctx.grad_weights[-1], grad_logits.t(), operand, out=ctx.grad_weights[-1])
                if needs_bias and number == 0:
                    ctx.grad_biases.append(grad_logits.sum(0))
                elif needs_bias:
                    ctx.grad_biases[-1] += grad_logits.sum(0)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        if ctx.members is None:
            raise RuntimeError("linear_logps with groups: backward runs once; to run it again, pass no groups")
        scales = [float(grad_logps[rows[0]]) for rows in ctx.members]
        for rows, scale in zip(ctx.members, scales, strict=True):
            inside = grad_logps.index_select(0, rows)
            if not torch.allclose(inside, torch.full_like(inside, scale), rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"groups: the upstream gradients of one group differ ({inside.min().item()} to "
                    f"{inside.max().item()}); group only rows that share theirs, or pass no groups"
                )
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden.mul_(grad_logps[:, None])
        grad_weight, grad_bias = _weighted(ctx.grad_weights, scales), _weighted(ctx.grad_biases, scales)
        ctx.members = ctx.grad_hidden = ctx.grad_weights = ctx.grad_biases = None
        return grad_hidden, grad_weight, None, grad_bias, None, None


def _weighted(gradients: list[Tensor], scales: list[float]) -> Tensor | None:
    """The sum of the groups' gradients, each times its scale, in the place of the first."""
    total = gradients[0].mul_(scales[0]) if gradients else None
    for gradient, scale in zip(gradients[1:], scales[1:], strict=False):
        total.add_(gradient, alpha=scale)
    return total
