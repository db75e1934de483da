"""Per-token log-probabilities in Triton: no N x V tensor, no locks, the same bits every run.

Legend: N token rows, H hidden size, V vocabulary, C vocabulary rows in a chunk of the backward, S splits of the
vocabulary in the forward; U = 2NVH operations.
Work: 1 U forward; backward 1 U to recompute the logits, 2 U for the two gradients (a frozen side skips its own).
Accumulation: every product in fp32 (fp32 inputs multiply in fp32, not TF32), the softmax in fp32. The gradient of the
logits is rounded to the inputs' dtype once, as eager PyTorch's is; the hidden gradient is summed over chunks in fp32
and rounded once; every row of the weight gradient is one product over all N, written once.
Saved for backward: hidden (N, H), the weight and bias themselves, targets (N,), log-sum-exp and entropy (N,).
Memory moved: the forward reads a tile of the weight once for every BLOCK_N rows and hidden once for every split, rows
innermost so that the programs that run together share a weight tile in L2; it writes 4 S N floats. The extra memory of
the backward is N C of the inputs' dtype plus N H fp32, C by CHUNK_BYTES.

The blocks are a table, not the outcome of a tuning run: ranks and runs that choose differently would round differently.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 * 2**20  # of the logits' gradient
MIN_CHUNK = 1024  # vocabulary rows below which the products run out of parallel work
NUM_PROGRAMS = 512  # of the forward at least, by splitting the vocabulary: some for each processor of any card
MAX_SPLITS = 64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself looks once, at import


class Blocks(NamedTuple):
    """A launch: tile of rows, of the vocabulary and of the hidden size, warps, pipeline stages, tensor descriptors."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By compute capability (the newest that is not above the card's), kernel, and whether the kernel does more than plain
# log-probabilities: entropy or a soft cap need registers beside the accumulator, so their tiles are smaller.
# `make kernels-aot` compiles every entry and fails on a spilled register.
BLOCKS = {
    80: {
        ("forward", False): Blocks(128, 128, 32, 8, 3),
        ("forward", True): Blocks(64, 128, 32, 8, 3),
        ("backward", False): Blocks(128, 128, 32, 8, 3),
        ("backward", True): Blocks(64, 128, 32, 8, 3),
    },
    90: {
        ("forward", False): Blocks(128, 256, 64, 8, 3, True),
        ("forward", True): Blocks(128, 128, 64, 8, 4, True),
        ("backward", False): Blocks(128, 128, 64, 8, 4, True),  # 128 x 256 spills 956 bytes
        ("backward", True): Blocks(128, 128, 64, 8, 4, True),
    },
    100: {
        ("forward", False): Blocks(128, 128, 64, 8, 4, True),  # 128 x 256 spills 244 bytes
        ("forward", True): Blocks(128, 128, 64, 8, 4, True),
        ("backward", False): Blocks(128, 128, 64, 8, 4, True),
        ("backward", True): Blocks(64, 128, 64, 8, 4, True),  # 128 x 128 spills 24 bytes
    },
}
FP32_BLOCKS = Blocks(64, 64, 32, 4, 2)  # full fp32 products run on the plain cores
INTERPRETER_BLOCKS = Blocks(64, 256, 64, 1, 1)  # few large tiles: the interpreter pays by the operation


def runs_on(device: str) -> bool:
    """Whether the kernels run on this kind of device in this process."""
    return device == "cuda" or INTERPRETED


def choose_blocks(
    kernel: str, extras: bool, dtype: torch.dtype, capability: tuple[int, int] | None, aligned: bool
) -> Blocks:
    """The blocks of a launch.

    Args:
        kernel: "forward" or "backward".
        extras: whether it handles entropy or a soft cap.
        dtype: of the inputs.
        capability: of the card; None in the interpreter.
        aligned: whether rows start at multiples of 16 bytes, as tensor descriptors need.
    """
    if capability is None:
        return INTERPRETER_BLOCKS
    if dtype == torch.float32:
        return FP32_BLOCKS
    newest = max(arch for arch in BLOCKS if arch <= max(80, 10 * capability[0] + capability[1]))
    blocks = BLOCKS[newest][kernel, extras]
    return blocks if aligned or not blocks.descriptors else BLOCKS[80][kernel, extras]


def chunk_size(num_rows: int, logit_bytes: int) -> int:
    """C, the vocabulary rows that CHUNK_BYTES holds for N rows: a multiple of MIN_CHUNK, and so of every tile.

    A word then lies at the same place of its tile in forward and backward, and its recomputed logit has the same bits.
    """
    return max(1, CHUNK_BYTES // max(1, num_rows * logit_bytes) // MIN_CHUNK) * MIN_CHUNK


@triton.jit
def _logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, num_vocab, hidden_stride, weight_stride,
    softcap, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) fp32 logits. `rows` and `columns` are consecutive; what lies outside is zero before the bias.

    Row offsets are 64-bit: N, V or a chunk times H passes 2^31 at sizes that people train.
    """
    accumulator = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if DESCRIPTORS:
        hidden = tl.make_tensor_descriptor(hidden_ptr, [num_rows, H], [hidden_stride, 1], [BLOCK_N, BLOCK_H])
        weight = tl.make_tensor_descriptor(weight_ptr, [num_vocab, H], [weight_stride, 1], [BLOCK_V, BLOCK_H])
        first_row, first_column = tl.min(rows, 0), tl.min(columns, 0)
        for k in range(0, H, BLOCK_H):
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
            accumulator = tl.dot(a, b.T, accumulator, input_precision=PRECISION)
    else:
        row_mask, column_mask = (rows < num_rows)[:, None], (columns < num_vocab)[:, None]
        hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
        weight_rows = weight_ptr + columns.to(tl.int64)[:, None] * weight_stride
        for k in range(0, H, BLOCK_H):
            at = k + tl.arange(0, BLOCK_H)[None, :]
            a = tl.load(hidden_rows + at, mask=row_mask & (at < H), other=0.0)
            b = tl.load(weight_rows + at, mask=column_mask & (at < H), other=0.0)
            if WIDEN:  # the interpreter multiplies bf16 wrongly
                a, b = a.to(tl.float32), b.to(tl.float32)
            accumulator = tl.dot(a, b.T, accumulator, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < num_vocab, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    if HAS_SOFTCAP:  # c tanh(x / c) by way of exp; the sigmoid saturates where tanh does
        accumulator = softcap * (2 * tl.sigmoid(2 * accumulator / softcap) - 1)
    return accumulator


@triton.jit
def _forward_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    targets_ptr,  # (N,) int64
    maximum_ptr,  # (S, N) fp32: of the logits of a split
    total_ptr,  # (S, N) fp32: sum of exp(x), x = logit - maximum
    moment_ptr,  # (S, N) fp32: sum of exp(x) x
    target_logit_ptr,  # (S, N) fp32: 0 where the target lies in another split
    num_rows, num_vocab, hidden_stride, weight_stride, tiles_per_split, softcap,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows against one split of the vocabulary, by an online log-sum-exp (arXiv 1805.02867)."""
    LOWEST: tl.constexpr = -3.4028234663852886e38  # not -inf, which would make inf - inf
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    targets = tl.load(targets_ptr + rows, mask=row_mask, other=-1)
    maximum = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(num_vocab, BLOCK_V))):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = _logits_tile(
            hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, num_vocab, hidden_stride, weight_stride,
            softcap, H, BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip
        target_logit += tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), 1)
        logits = tl.where(columns[None, :] < num_vocab, logits, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp(maximum - new_maximum)
        x = logits - new_maximum[:, None]
        exponentials = tl.exp(x)
        if WITH_ENTROPY:
            products = tl.sum(exponentials * tl.maximum(x, LOWEST), 1)
            moment = shrink * (moment + (maximum - new_maximum) * total) + products
        total = total * shrink + tl.sum(exponentials, 1)
        maximum = new_maximum
    at = split * num_rows + rows  # below 2^31 for 33 million rows
    tl.store(maximum_ptr + at, maximum, mask=row_mask)
    tl.store(total_ptr + at, total, mask=row_mask)
    tl.store(target_logit_ptr + at, target_logit, mask=row_mask)
    if WITH_ENTROPY:
        tl.store(moment_ptr + at, moment, mask=row_mask)


@triton.jit
def _merge_kernel(
    maximum_ptr, total_ptr, moment_ptr, target_logit_ptr,  # (S, N) fp32
    logps_ptr, logsumexp_ptr, entropy_ptr,  # (N,) fp32
    num_rows, num_splits, BLOCK: tl.constexpr, WITH_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of BLOCK rows, always in the same order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    maximum = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        at = split * num_rows + rows  # below 2^31 for 33 million rows
        of_split = tl.load(maximum_ptr + at, mask=mask, other=0.0)
        total_of_split = tl.load(total_ptr + at, mask=mask, other=1.0)
        new_maximum = tl.maximum(maximum, of_split)
        ours, theirs = tl.exp(maximum - new_maximum), tl.exp(of_split - new_maximum)
        if WITH_ENTROPY:
            moment_of_split = tl.load(moment_ptr + at, mask=mask, other=0.0)
            moment = ours * (moment + (maximum - new_maximum) * total)
            moment += theirs * (moment_of_split + (of_split - new_maximum) * total_of_split)
        total = ours * total + theirs * total_of_split
        target_logit += tl.load(target_logit_ptr + at, mask=mask, other=0.0)
        maximum = new_maximum
    logsumexp = maximum + tl.log(total)
    tl.store(logsumexp_ptr + rows, logsumexp, mask=mask)
    tl.store(logps_ptr + rows, target_logit - logsumexp, mask=mask)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + rows, tl.log(total) - moment / total, mask=mask)


@triton.jit
def _grad_logits_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (C, H), the chunk
    bias_ptr,  # (C,)
    columns_of_targets_ptr,  # (N,) int64, counted from the start of the chunk
    logsumexp_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32
    grad_logps_ptr,  # (N,) fp32
    grad_entropy_ptr,  # (N,) fp32
    grad_logits_ptr,  # (N, C), the inputs' dtype
    num_rows, num_vocab, hidden_stride, weight_stride, softcap,
    H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the gradient of the logits, recomputed; rows innermost, to share the weight's tile."""
    num_row_blocks = tl.cdiv(num_rows, BLOCK_N)
    program = tl.program_id(0)
    rows = (program % num_row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (program // num_row_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = rows < num_rows
    logits = _logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, rows, columns, num_rows, num_vocab, hidden_stride, weight_stride,
        softcap, H, BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
    )  # fmt: skip
    logsumexp = tl.load(logsumexp_ptr + rows, mask=row_mask, other=0.0)
    upstream = tl.load(grad_logps_ptr + rows, mask=row_mask, other=0.0)
    target_columns = tl.load(columns_of_targets_ptr + rows, mask=row_mask, other=-1)
    logps = logits - logsumexp[:, None]
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + rows, mask=row_mask, other=0.0)
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=row_mask, other=0.0)
        log_softmax = tl.maximum(logps, -3.4028234663852886e38)
        factor = upstream[:, None] + grad_entropy[:, None] * (log_softmax + entropy[:, None])
    else:
        factor = upstream[:, None]
    grad_logits = -tl.exp(logps) * factor
    grad_logits += tl.where(columns[None, :] == target_columns[:, None], upstream[:, None], 0.0)
    if HAS_SOFTCAP:
        bounded = logits / softcap
        grad_logits *= 1 - bounded * bounded
    at = rows.to(tl.int64)[:, None] * num_vocab + columns[None, :]
    mask = row_mask[:, None] & (columns < num_vocab)[None, :]
    tl.store(grad_logits_ptr + at, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def triton_logps(
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
        hidden: (N, H) fp32, bf16 or fp16, on CUDA (or anywhere with TRITON_INTERPRET=1).
        weight: (V, H), dtype of `hidden`; its gradient comes back in its own dtype.
        targets: (N,) int64 in [0, V), not checked here.
        bias: (V,), dtype of `weight`.
        groups: of no use here: the logits are always computed again in backward.
        softcap: c of c * tanh(logits / c).
        with_entropy: also return entropies.

    Returns:
        log-probabilities (N,) and entropies (N,), or None: fp32.
    """
    return _TritonLogps.apply(hidden, weight, targets, bias, softcap, with_entropy)


class _TritonLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, softcap, with_entropy) -> tuple[Tensor, Tensor | None]:
        hidden, targets = _rows_contiguous(hidden), targets.contiguous()
        num_rows, num_vocab = hidden.shape[0], weight.shape[0]
        logps, logsumexp, entropy = hidden.new_empty((3, num_rows), dtype=torch.float32)
        if num_rows:
            launch = _Launch("forward", hidden, weight, bias, softcap, with_entropy)
            num_row_blocks, num_tiles = _cdiv(num_rows, launch.blocks.block_n), _cdiv(num_vocab, launch.blocks.block_v)
            splits = min(num_tiles, MAX_SPLITS, _cdiv(NUM_PROGRAMS, num_row_blocks))
            tiles_per_split = _cdiv(num_tiles, splits)
            splits = _cdiv(num_tiles, tiles_per_split)  # none is empty
            partial = hidden.new_empty((4, splits, num_rows), dtype=torch.float32)
            launch(_forward_kernel, (num_row_blocks, splits), targets, *partial, scalars=(tiles_per_split,))
            with _on(hidden):
                _merge_kernel[(_cdiv(num_rows, 128),)](
                    *partial, logps, logsumexp, entropy, num_rows, splits, BLOCK=128, WITH_ENTROPY=with_entropy
                )
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp, entropy if with_entropy else None)
        ctx.softcap = softcap
        return logps, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor, grad_entropy: Tensor | None):
        hidden, weight, targets, bias, logsumexp, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        num_rows, num_vocab = hidden.shape[0], weight.shape[0]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        size = min(num_vocab, chunk_size(num_rows, hidden.dtype.itemsize))
        buffer = hidden.new_empty(num_rows * size)
        for start in range(0, num_vocab if num_rows else 0, size):
            chunk = slice(start, min(start + size, num_vocab))
            width = chunk.stop - start
            grad_logits = buffer[: num_rows * width].view(num_rows, width)
            of_bias = bias[chunk] if bias is not None else None
            launch = _Launch("backward", hidden, weight[chunk], of_bias, ctx.softcap, entropy is not None)
            grid = (_cdiv(num_rows, launch.blocks.block_n) * _cdiv(width, launch.blocks.block_v),)
            upstream = grad_logps.contiguous(), grad_logps if entropy is None else grad_entropy.contiguous()
            launch(_grad_logits_kernel, grid, targets - start, logsumexp, entropy, *upstream, grad_logits)
            if needs_bias:
                grad_bias[chunk] = grad_logits.sum(0, dtype=torch.float32)
            if needs_weight:
                _product(grad_logits.t(), hidden, grad_weight[chunk])
            if needs_hidden:
                _add_product(grad_hidden, grad_logits, weight[chunk])
        return grad_hidden.to(hidden.dtype) if needs_hidden else None, grad_weight, None, grad_bias, None, None


class _Launch:
    """What the forward and the backward kernel take alike."""

    def __init__(self, kernel: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap, with_entropy: bool):
        self.hidden, self.weight, self.bias = hidden, _rows_contiguous(weight), bias
        capability = None if INTERPRETED else torch.cuda.get_device_capability(hidden.device)
        aligned = all(
            tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
            for tensor in (hidden, self.weight)
        )
        extras = with_entropy or softcap is not None
        self.blocks = choose_blocks(kernel, extras, hidden.dtype, capability, aligned)
        self.softcap = softcap
        self.constants = constants(
            hidden.shape[1], hidden.dtype, self.blocks, bias is not None, softcap is not None, with_entropy
        )

    def __call__(self, kernel, grid: tuple[int, ...], *tensors: Tensor | None, scalars: tuple[int, ...] = ()) -> None:
        num_rows, num_vocab = self.hidden.shape[0], self.weight.shape[0]
        placeholder = self.hidden  # for a pointer that no code reads
        tensors = [placeholder if tensor is None else tensor for tensor in tensors]
        with _on(self.hidden):
            kernel[grid](
                self.hidden, self.weight, placeholder if self.bias is None else self.bias.contiguous(), *tensors,
                num_rows, num_vocab, self.hidden.stride(0), self.weight.stride(0), *scalars,
                1.0 if self.softcap is None else float(self.softcap), **self.constants,
                num_warps=self.blocks.num_warps, num_stages=self.blocks.num_stages,
            )  # fmt: skip


def constants(
    hidden_size: int, dtype: torch.dtype, blocks: Blocks, has_bias: bool, has_softcap: bool, with_entropy: bool
) -> dict[str, int | bool | str]:
    """The compile-time arguments that both kernels share, by name."""
    return {
        "H": hidden_size, "BLOCK_N": blocks.block_n, "BLOCK_V": blocks.block_v, "BLOCK_H": blocks.block_h,
        "HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap, "WITH_ENTROPY": with_entropy,
        "DESCRIPTORS": blocks.descriptors, "WIDEN": INTERPRETED,
        "PRECISION": "ieee" if dtype == torch.float32 or INTERPRETED else "tf32",
    }  # fmt: skip


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, accumulated in fp32 and rounded once."""
    if INTERPRETED:  # a CPU may sum 16-bit products in 16 bits
        out.copy_(torch.mm(a.float(), b.float()))
    else:
        torch.mm(a, b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32."""
    if INTERPRETED or a.dtype == torch.float32:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(tensor: Tensor):
    """Triton launches on the current device, and takes scratch memory for descriptors from this allocator."""
    if tensor.device.type == "cuda":
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=tensor.device))
    return torch.cuda.device_of(tensor)
