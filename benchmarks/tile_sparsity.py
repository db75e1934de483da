"""Would a backward that skips what hardly counts pay? Shares kept, errors, work and time of a tile-sparse linear_logps.

A sketch in plain PyTorch, to decide and not to ship. The forward notes each row's largest probability and mass in each
tile of 128 vocabulary rows; the backward computes only the pairs of row and tile that reach a threshold or hold the
target. A tile's rows are compacted, so the rest is not even recomputed (Cut Cross-Entropy, arXiv 2411.09009, drops
128 x 128 blocks after recomputing them). A tail gives a dropped pair's mass back, spread inside the tile by the softmax
of the mean logits: two thin products. The hidden gradient is "gathered", kept products added row by row (on a GPU fp32
atomics, other bits every run), or "dense", whole chunks with zeros for what was dropped (1 U, always the same bits).

The incoming gradient is DPO's, as in bench_logps.py. The yardstick is "bf16 grad": exact, but the gradient of the
logits rounded to bf16 once. Adam scales every element's step alike, however small its gradient, so own-row errors are
of a row of dW over that row's own norm, and the Adam error is that of its first step on W, epsilon 1e-8. The GPU column
is an ESTIMATE, not run: 8192 rows on the head of Qwen2.5-VL-7B, products at a dense one's rate, atomics at memory's.

Legend: N rows, H hidden size, V vocabulary, T = V / 128 tiles; U = 2NVH operations (of forward and backward together).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import torch
from bench_logps import DTYPES, REPOSITORY, SHAPES, Case, append_csv, environment, make_pair, read_shape, shape_of_file
from bench_peers import Exact, Pair, exact_results, upstream
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mede2.kernels.logps import linear_logps
from mede2.kernels.logps_torch import GROUPED_BYTES

TILE = 128  # vocabulary rows
PADDING, BLOCK = 64, 128  # rows: a tile's fill up blocks of so many; of a block of Cut Cross-Entropy
CHUNK = 16  # tiles of a dense product, and of a product of the forward
GPU_SHAPE = (8192, 3584, 152064)  # of the estimate
GPU_FLOPS, GPU_BYTES = 790e12, 4.3e12  # per second: the best dense bf16 product and memory rate published for an H200
COLUMNS = (
    "way", "log2_threshold", "tail", "kept", "kept_compacted", "kept_blocks", "dropped_mass", "dh_error", "dw_error",
    "dw_worst_row_error", "dw_own_row_median", "dw_adam_error", "work_u", "atomic_mib", "backward_ms", "step_ms",
    "gpu_estimate_ms",
)  # fmt: skip


class Sparse(NamedTuple):
    threshold: int  # a pair is kept from a probability of 2^-threshold on
    dense: bool  # how the hidden gradient is formed
    tail: bool  # whether dropped mass is given back


def forward(pair: Pair, threshold: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp (N, 1), the mass of each pair of row and tile, and whether it is kept (N, T); fp32 and bool."""
    peaks, sums = [], []
    for weight in pair.weight.split(CHUNK * TILE):
        logits = (pair.hidden @ weight.T).float().view(len(pair.hidden), -1, TILE)
        peaks.append(logits.amax(2))
        sums.append(logits.sub_(peaks[-1][:, :, None]).exp_().sum(2))
    peak = torch.cat(peaks, 1)
    log_sum = torch.cat(sums, 1).log_().add_(peak)
    logsumexp = log_sum.logsumexp(1, keepdim=True)
    kept = (peak - logsumexp >= -threshold * math.log(2)).scatter_(1, pair.targets[:, None] // TILE, True)
    return logsumexp, (log_sum - logsumexp).exp_(), kept


def backward(pair: Pair, logsumexp: Tensor, mass: Tensor, kept: Tensor, way: Sparse) -> None:
    """Leave the gradients in the leaves, as autograd does."""
    (hidden, weight, targets, groups), num_tiles = pair, kept.shape[1]
    gradients = upstream(groups)[:, None]
    grad_hidden, grad_weight = torch.zeros(hidden.shape), torch.empty_like(weight)
    if way.tail:
        tiles = weight.view(num_tiles, TILE, -1)
        spread = (tiles @ hidden.mean(0)).float().softmax(1)
        dropped = mass.masked_fill(kept, 0.0).mul_(-gradients).to(hidden.dtype)
        pull = (dropped.T @ hidden).float()
        grad_hidden += dropped @ torch.bmm(spread.to(weight.dtype)[:, None], tiles).squeeze(1)
    for tile, rows in enumerate(kept.T.nonzero()[:, 1].split(kept.sum(0).tolist())):
        columns = slice(tile * TILE, (tile + 1) * TILE)
        operand, incoming, target = hidden[rows], gradients[rows], targets[rows, None] - columns.start
        logps = (operand @ weight[columns].T).float().sub_(logsumexp[rows])
        inside = incoming * ((target >= 0) & (target < TILE))
        grad_logits = logps.exp_().mul_(-incoming).scatter_add_(1, target.clamp(0, TILE - 1), inside).to(hidden.dtype)
        grad_tile = grad_logits.T @ operand
        grad_weight[columns] = grad_tile.float().addr_(spread[tile], pull[tile]) if way.tail else grad_tile
        if not way.dense:
            grad_hidden.index_add_(0, rows, (grad_logits @ weight[columns]).float())
            continue
        if tile % CHUNK == 0:
            chunk = weight[columns.start :][: CHUNK * TILE]
            zeroed = hidden.new_zeros(len(hidden), len(chunk))
        start = tile % CHUNK * TILE
        zeroed[rows, start : start + TILE] = grad_logits
        if start + TILE == len(chunk):
            grad_hidden += zeroed @ chunk
    pair.hidden.grad, pair.weight.grad = grad_hidden.to(hidden.dtype), grad_weight


@torch.no_grad()
def run_sparse(pair: Pair, way: Sparse) -> tuple[float, float]:
    """Milliseconds of the backward, and of forward and backward; the gradients are in the leaves then."""
    start = time.perf_counter()
    state = forward(pair, way.threshold)
    middle = time.perf_counter()
    backward(pair, *state, way)
    end = time.perf_counter()
    return 1e3 * (end - middle), 1e3 * (end - start)


def run_exact(pair: Pair, grouped: bool) -> tuple[float, float]:
    """The same of linear_logps."""
    pair.hidden.grad = pair.weight.grad = None
    start = time.perf_counter()
    logps = linear_logps(*pair[:3], groups=pair.groups if grouped else None, implementation="torch")
    middle = time.perf_counter()
    (logps * upstream(pair.groups)).sum().backward()
    end = time.perf_counter()
    return 1e3 * (end - middle), 1e3 * (end - start)


@torch.no_grad()
def rounded_once(pair: Pair) -> Pair:
    """The inputs in fp32, with the gradients that remain exact but for the yardstick's rounding."""
    hidden, weight = pair.hidden.float(), pair.weight.float()
    grad_logits = (hidden @ weight.T).softmax(1).neg_()
    grad_logits.scatter_add_(1, pair.targets[:, None], torch.ones(len(hidden), 1))
    grad_logits = grad_logits.mul_(upstream(pair.groups)[:, None]).bfloat16().float()
    hidden.grad, weight.grad = grad_logits @ weight, grad_logits.T @ hidden
    return pair._replace(hidden=hidden, weight=weight)


def errors(exact: Exact, pair: Pair) -> dict[str, float]:
    """Of the gradients in the leaves against fp64."""
    found = exact.errors(exact.logps, pair, by_answer=False)
    own = (pair.weight.grad.double() - exact.grad_weight).norm(dim=1) / exact.grad_weight.norm(dim=1)
    adam, exact_adam = (grad / (grad.abs() + 1e-8) for grad in (pair.weight.grad.double(), exact.grad_weight))
    found["dw_own_row_median"] = float(own.median())
    found["dw_adam_error"] = float((adam - exact_adam).norm() / exact_adam.norm())
    return {name: found[name] for name in found if name in COLUMNS}


@torch.no_grad()
def costs(pair: Pair, way: Sparse) -> dict[str, float]:
    """The first columns: what a way keeps, and what it costs."""
    _, mass, kept = forward(pair, way.threshold)
    share = float(kept.float().mean())
    compacted = float(((kept.sum(0) + PADDING - 1) // PADDING * PADDING).sum() / kept.numel())
    blocks = torch.stack([rows.any(0) for rows in kept.split(BLOCK)])
    work = 1 + (2 * compacted + 1 if way.dense else 3 * compacted) + way.tail * 2 / TILE
    return {
        "way": "dense" if way.dense else "gathered", "log2_threshold": -way.threshold, "tail": way.tail, "kept": share,
        "kept_compacted": compacted, "kept_blocks": float(blocks.float().mean()),
        "dropped_mass": float(mass.masked_fill(kept, 0.0).sum(1).mean()),
        "atomic_mib": 0.0 if way.dense else 4 * float(kept.sum()) * pair.hidden.shape[1] / 2**20,
    } | work_of(work, 0.0 if way.dense else share)  # fmt: skip


def work_of(work: float, atomics: float = 0.0) -> dict[str, float]:
    """`work` in U; `atomics` is the share of pairs added to the hidden gradient by them."""
    seconds = math.prod(GPU_SHAPE) * (2 * work / GPU_FLOPS + 4 * atomics / TILE / GPU_BYTES)
    return {"work_u": work, "gpu_estimate_ms": 1e3 * seconds}


def measure(pair: Pair, exact: Exact, ways: list[Sparse], rounds: int) -> list[dict]:
    """A row for each way to run the backward, the yardstick last; times are medians of interleaved rounds."""
    fits = 2 * 4 * (pair.weight.numel() + len(pair.weight)) <= GROUPED_BYTES and pair.weight.dtype == torch.float32
    exact_work = {"exact": 4.0, "grouped": 3.0} if fits else {"exact": 4.0}
    rows = [{"way": name} | work_of(work) for name, work in exact_work.items()] + [costs(pair, way) for way in ways]
    runs = [partial(run_exact, pair, name == "grouped") for name in exact_work]
    runs += [partial(run_sparse, pair, way) for way in ways]
    for row, run in zip(rows, runs, strict=True):  # the warm-up as well
        run()
        row |= errors(exact, pair)
    times = torch.tensor([[run() for run in runs] for _ in range(rounds)]).quantile(0.5, 0).tolist()
    for row, (backward_ms, step_ms) in zip(rows, times, strict=True):
        row |= {"backward_ms": backward_ms, "step_ms": step_ms}
    rows.append({"way": "bf16 grad"} | errors(exact, rounded_once(pair)))
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


@torch.no_grad()
def vocabulary_orders(pair: Pair, exact: Exact) -> Iterator[tuple[str, Pair, Exact]]:
    """The same with the vocabulary in its own order, and by falling mean logit."""
    yield "natural", pair, exact
    order = (pair.weight @ pair.hidden.mean(0)).argsort(descending=True)
    moved = pair._replace(weight=pair.weight[order].requires_grad_(), targets=order.argsort()[pair.targets])
    yield "mean logit", moved, replace(exact, grad_weight=exact.grad_weight[order])


def as_table(rows: list[dict], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name.replace("_", "\n"), justify="right")
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS))
    return table


@click.command(help=__doc__)
@click.option("--hidden-states", default="random", metavar="FILE", help="Of dump_hidden_states.py, not random inputs.")
@click.option("--shape", "shapes", multiple=True, callback=read_shape, metavar="NxHxV", help="Of random inputs.")
@click.option(
    "--temperature", "temperatures", multiple=True, type=click.FloatRange(0, min_open=True), help="Also simulate a "
    "surer model: logits over this, targets drawn from them. Repeatable; 1 draws only.",
)  # fmt: skip
@click.option(
    "--threshold", "thresholds", multiple=True, type=click.IntRange(0), default=(8, 10, 12, 14), show_default=True,
    help="Keep from a probability of 2^-threshold on. Repeatable.",
)  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("fp32",), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs of each.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=REPOSITORY / "benchmarks" / "results",
    help="Folder of tile_sparsity.csv, which grows.  [default: benchmarks/results]",
)  # fmt: skip
def main(hidden_states, shapes, temperatures, thresholds, dtypes, rounds, output) -> None:
    if hidden_states != "random" and shapes:
        raise click.UsageError("--shape: a file of --hidden-states has a shape of its own; leave one of them out")
    shapes = [shape_of_file(hidden_states)] if hidden_states != "random" else shapes or SHAPES["cpu"]
    if bad := [shape[2] for shape in shapes if shape[2] % TILE]:
        raise click.UsageError(f"V: got {bad[0]}, expected a multiple of {TILE}, as heads of Qwen2.5-VL have")
    output.mkdir(parents=True, exist_ok=True)
    console = Console() if Console().is_terminal else Console(width=210)
    place, ways = environment(), [Sparse(*way) for way in product(thresholds, (False, True), (False, True))]
    for shape, dtype, temperature in product(shapes, dtypes, (None, *temperatures)):
        pair = make_pair(Case(shape, dtype, 0.0, "cpu", hidden_states))
        if temperature:  # a SIMULATION of a surer model that meets its own answers
            sharper = (pair.hidden / temperature).detach()
            torch.manual_seed(0)
            drawn = (sharper @ pair.weight.T).float().softmax(1).multinomial(1)
            pair = pair._replace(hidden=sharper.requires_grad_(), targets=drawn.squeeze(1))
        logps, entropy = linear_logps(*pair[:3], with_entropy=True, implementation="torch")
        case = dict(zip(("num_rows", "hidden_size", "num_vocab"), shape, strict=True)) | {
            "hidden_states": Path(hidden_states).name, "dtype": dtype, "rounds": rounds,
            "targets": "drawn" if temperature else "given", "temperature": temperature or 1.0,
            "nll": -logps.mean().item(), "entropy": entropy.mean().item(),
        }  # fmt: skip
        for order, *inputs in vocabulary_orders(pair, exact_results(pair)):
            case["order"] = order
            rows = measure(*inputs, ways, rounds)
            console.print(as_table(rows, ", ".join(f"{name} {value}" for name, value in case.items())))
            append_csv(output / "tile_sparsity.csv", [place | case | row for row in rows])


if __name__ == "__main__":
    main()
