"""Time, memory and error of linear_logps and of everything else that does its work: one DPO step on a language head.

A step is a forward without gradients (the reference pass), a forward and a backward with gradients for hidden and
weight; rows of the first half are the chosen answer, the others the rejected one (bench_peers.py). Times are of rounds
that run one contender after the other, so that a busy machine slows all alike. TFLOP/s counts useful work only, 4 U
over the counted rows (2 U forward, 2 U backward); who computes more, or ignored rows, has a lower rate. Memory is the
peak above the inputs, gradients included: of the allocator on CUDA, of the resident set of a fresh process on the CPU.
Errors are norms of the difference to fp64 over the norm of fp64; "worst row" is the largest error of a vocabulary row
of dW over the norm of its largest row.

Legend: N token rows, M of them counted, H hidden size, V vocabulary; U = 2MHV operations.
"""

import csv
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import prod
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

import click
import torch
from bench_peers import (
    COMPACTED,
    CONTENDERS,
    OURS,
    PACKAGES,
    PEERS,
    Pair,
    Step,
    Unavailable,
    exact_results,
    load_step,
)
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mede2.kernels.logps import IGNORE_INDEX, choose_implementation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {
    "cpu": ((1024, 512, 32768),),
    "cuda": tuple(product((2048, 8192), (2048, 3584), (151936, 152064))),  # heads of Qwen2.5-VL, 3B and 7B
}
QUICK_SHAPE = (256, 128, 8192)
COMPILERS = ("torch._inductor.compile_fx", "liger_kernel.chunked_loss")
REPOSITORY = Path(__file__).resolve().parent.parent
RATIOS = {  # of the last line: dtype, masked fraction, column
    "bf16_time_vs_naive": ("bf16", 0.0, "median_ms"),
    "bf16_peak_vs_naive": ("bf16", 0.0, "peak_mib"),
    "bf16_masked75_time_vs_naive": ("bf16", 0.75, "median_ms"),
    "fp32_time_vs_naive": ("fp32", 0.0, "median_ms"),
    "fp32_masked75_time_vs_naive": ("fp32", 0.75, "median_ms"),
}


@dataclass(frozen=True)
class Case:
    """What is measured at once. `hidden_states` is "random" or a file of dump_hidden_states.py."""

    shape: tuple[int, int, int]  # N, H, V
    dtype: str
    masked: float
    device: str
    hidden_states: str

    def __str__(self) -> str:
        sizes = "N={} H={} V={}".format(*self.shape)
        return f"{self.device} {self.dtype}, {sizes}, {self.masked:.0%} masked, {self.hidden_states} hidden states"


def make_pair(case: Case) -> Pair:
    """Inputs of a case, hidden and weight to be trained; the first `masked` part of each answer does not count."""
    num_rows, hidden_size, num_vocab = case.shape
    if case.hidden_states == "random":
        torch.manual_seed(0)
        hidden = torch.randn(num_rows, hidden_size, device=case.device)
        weight = torch.randn(num_vocab, hidden_size, device=case.device) * hidden_size**-0.5
        targets = torch.randint(num_vocab, (num_rows,), device=case.device)
    else:
        tensors = load_file(case.hidden_states, device=case.device)
        hidden, weight, targets = (tensors[name] for name in ("hidden", "weight", "targets"))
    groups = (torch.arange(num_rows, device=case.device) >= num_rows // 2).long()
    for first, last in ((0, num_rows // 2), (num_rows // 2, num_rows)):
        targets[first : first + round(case.masked * (last - first))] = IGNORE_INDEX
    dtype = DTYPES[case.dtype]
    return Pair(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, groups)


def run_once(step: Step, pair: Pair) -> tuple[float, torch.Tensor]:
    """Milliseconds of a step, and its log-probabilities; the gradients stay in the leaves."""
    pair.hidden.grad = pair.weight.grad = None
    synchronize = torch.cuda.synchronize if pair.hidden.is_cuda else torch.cpu.synchronize
    synchronize()
    start = time.perf_counter()
    logps = step(pair)
    synchronize()
    return 1e3 * (time.perf_counter() - start), logps


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def cpu_peak_mib(name: str, threads: int, case: Case) -> float:
    """Peak memory of one step beyond what the inputs hold; for a fresh process."""
    torch.set_num_threads(threads)
    step, pair = load_step(name, case.device), make_pair(case)
    compiles = CONTENDERS[name.removesuffix(COMPACTED)].compiles
    # Libraries, thread pools and a compiler are not counted: a compiler needs the size itself, others any.
    warm_up = pair if compiles else make_pair(Case((16, 8, 64), case.dtype, 0.0, case.device, "random"))
    run_once(step, warm_up)
    pair.hidden.grad = pair.weight.grad = None
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run_once(step, pair)
    return resident_mib("VmHWM") - before


def peak_mib(name: str, step: Step, pair: Pair, case: Case) -> float:
    """Peak memory of one step beyond what the inputs hold."""
    if case.device == "cpu":
        with ProcessPoolExecutor(1, get_context("forkserver")) as process:
            return process.submit(cpu_peak_mib, name, torch.get_num_threads(), case).result()
    pair.hidden.grad = pair.weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(step, pair)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, steps: dict[str, Step], rounds: int, console: Console) -> list[dict]:
    """One row for each contender that runs: milliseconds, rate, peak and errors. `steps` by name, naive first."""
    torch.compiler.reset()  # or shapes of earlier cases count against its limit of recompilations
    pair = make_pair(case)
    num_counted = int((pair.targets != IGNORE_INDEX).sum())
    exact, errors = exact_results(pair), {}
    for name, step in steps.items():  # the warm-up as well
        try:
            _, logps = run_once(step, pair)
        except (Unavailable, torch.OutOfMemoryError) as error:
            console.print(f"absent: {name} ({error})", soft_wrap=True, markup=False)
            continue
        errors[name] = exact.errors(logps, pair, CONTENDERS[name.removesuffix(COMPACTED)].by_answer)
    del exact
    times = {name: [] for name in errors}
    for _ in range(rounds):
        for name in times:
            times[name].append(run_once(steps[name], pair)[0])
    num_rows, hidden_size, num_vocab = case.shape
    useful_work = 4 * 2 * num_counted * hidden_size * num_vocab
    chosen = choose_implementation("auto", case.device, DTYPES[case.dtype])
    rows = []
    for name, milliseconds in times.items():
        median_ms = statistics.median(milliseconds)
        low, high = torch.tensor(milliseconds).quantile(torch.tensor([0.2, 0.8])).tolist()
        rows.append({
            "hidden_states": case.hidden_states, "num_rows": num_rows, "hidden_size": hidden_size,
            "num_vocab": num_vocab, "dtype": case.dtype, "masked": case.masked, "num_counted": num_counted,
            "contender": name, "auto": name == f"mede2 {chosen}", "rounds": rounds, "median_ms": median_ms,
            "p20_ms": low, "p80_ms": high, "useful_tflops": useful_work / median_ms / 1e9,
            "peak_mib": peak_mib(name, steps[name], pair, case), **errors[name],
        })  # fmt: skip
    return rows


def environment(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | int | bool]:
    """What a reader needs to place the figures: commit, machine, versions (of `packages` too), date."""

    def git(*arguments: str) -> str:
        if not shutil.which("git"):
            return ""
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text()
    processor = cpuinfo.split("model name")[1].split("\n")[0].strip("\t: ") if "model name" in cpuinfo else "unknown"
    versions = {name: _version(name) for name in packages}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short=12", "HEAD") or "none",
        "dirty": bool(git("status", "--porcelain")),
        "cpu": f"{processor}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": ", ".join(f"{name} {number}" for name, number in versions.items() if number != "none") or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def as_table(rows: list[dict], case: Case) -> Table:
    """The rows of one case; naive comes first."""
    table = Table(title=f"{case}\nerrors against {rows[0]['exact']}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for heading in (
        "median ms", "p20 - p80", "to naive", "TFLOP/s", "peak MiB", "logps error", "dh", "dW", "worst row",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    naive_ms = next((row["median_ms"] for row in rows if row["contender"] == "naive"), None)
    for row in rows:
        table.add_row(
            row["contender"] + (" (auto)" if row["auto"] else ""), f"{row['median_ms']:.1f}",
            f"{row['p20_ms']:.1f} - {row['p80_ms']:.1f}",
            f"{row['median_ms'] / naive_ms:.2f}" if naive_ms else "-", f"{row['useful_tflops']:.3g}",
            f"{row['peak_mib']:.0f}",
            f"{row['logps_error']:.1e}" + (" *" if row["logps_error_of"] == "answers" else ""),
            f"{row['dh_error']:.1e}", f"{row['dw_error']:.1e}", f"{row['dw_worst_row_error']:.1e}",
        )  # fmt: skip
    if any(row["logps_error_of"] == "answers" for row in rows):
        table.caption = "* of the two answers' sums: it returns no token's"
    return table


def append_csv(path: Path, rows: list[dict]) -> None:
    """Add rows to a file, or begin one; a file of other columns, from another version, is moved aside."""
    header = ",".join(rows[0])
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0] != header:
        aside = path.rename(path.with_stem(f"{path.stem}.until-{datetime.now(UTC):%Y%m%d-%H%M%S}"))
        print(f"{path} had other columns and is now {aside}")
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, cases: dict[Case, list[dict]]) -> None:
    """Time against memory, a panel for each case, a marker for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    names = list(dict.fromkeys(row["contender"] for rows in cases.values() for row in rows))
    markers = "os^vD<>ph*XPd8H1234+x"
    figure, panels = pyplot.subplots(
        1,
        len(cases),
        figsize=(3.5 + 3.5 * len(cases), 4.8),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    found = {}
    for panel, (case, rows) in zip(panels[0], cases.items(), strict=True):
        for row in rows:
            number = names.index(row["contender"])
            (found[row["contender"]],) = panel.loglog(
                row["median_ms"], max(row["peak_mib"], 0.1), markers[number % len(markers)], color=f"C{number % 10}",
                markersize=9,
            )  # fmt: skip
        panel.set(title=f"{case.dtype}, {case.masked:.0%} masked", xlabel="ms per DPO step")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), minor_formatter=ticker.NullFormatter())
            axis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("peak MiB above the inputs")
    figure.legend(found.values(), found.keys(), loc="outside center right", fontsize=8)
    sizes = "N={} H={} V={}".format(*case.shape)
    figure.suptitle(f"{case.device}, {sizes}, {Path(case.hidden_states).name} hidden states")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def headline(cases: dict[Case, list[dict]]) -> dict[str, float | None]:
    """Ours over naive, for what "auto" picks; None where not measured."""
    ratios = dict.fromkeys(RATIOS)
    for key, (dtype, masked, column) in RATIOS.items():
        for case, rows in cases.items():
            if (case.dtype, case.masked) == (dtype, masked):
                ours = next((row[column] for row in rows if row["auto"]), None)
                naive = next((row[column] for row in rows if row["contender"] == "naive"), None)
                ratios[key] = round(ours / naive, 4) if ours and naive else None
    return ratios


def read_shape(context, parameter, texts: tuple[str, ...]) -> list[tuple[int, int, int]]:
    for text in texts:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text) or int(text.split("x")[0]) < 2:
            raise click.BadParameter(f"got {text!r}, expected NxHxV with N of at least 2, as 1024x512x32768")
    return [tuple(map(int, text.split("x"))) for text in texts]


def shape_of_file(path: str) -> tuple[int, int, int]:
    """N, H, V of a file of dump_hidden_states.py."""
    try:
        with safe_open(path, "pt") as file:
            sizes = [tuple(file.get_slice(name).get_shape()) for name in ("hidden", "weight", "targets")]
    except (OSError, SafetensorError) as error:
        raise click.UsageError(f"--hidden-states: {path}: {error}") from error
    hidden, weight, targets = sizes
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1] or targets != hidden[:1] or hidden[0] < 2:
        raise click.UsageError(f"--hidden-states: {path} has hidden {hidden}, weight {weight}, targets {targets}")
    return hidden[0], hidden[1], weight[0]


def load_contenders(device: str, with_peers: bool, console: Console) -> dict[str, Step]:
    """Steps by name, naive first; says who is absent."""
    steps = {}
    ours = OURS if device == "cuda" else ("mede2 torch",)  # on a CPU Triton only interprets
    for name in ("naive", *ours, *(PEERS if with_peers else ())):
        try:
            steps[name] = load_step(name, device)
        except (Unavailable, ImportError) as error:
            console.print(f"absent: {name} ({error})", soft_wrap=True, markup=False)
    return steps


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option(
    "--peers/--no-peers", default=None, help="Others beside naive and ours; default: yes, but not if --quick."
)
@click.option("--shapes", multiple=True, callback=read_shape, metavar="NxHxV", help="Repeatable; default by device.")
@click.option(
    "--masked", multiple=True, type=click.FloatRange(0, 1, max_open=True), help="Fraction of the rows that do not "
    "count. Repeatable; default 0, 0.75 on the CPU, 0, 0.5, 0.9 on CUDA.",
)  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: both; CUDA: bf16.")
@click.option(
    "--hidden-states", default="random", show_default=True, metavar="random|FILE", help="Inputs, or a file of "
    "dump_hidden_states.py, whose shape replaces --shapes.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), help="Timed steps of each; default 5, 10 on CUDA, 3 if --quick.")
@click.option("--quick", is_flag=True, help="One small shape, few rounds: under a minute on two cores.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=REPOSITORY / "benchmarks" / "results",
    help="Folder of bench_logps.csv, which grows, and bench_logps.png.  [default: benchmarks/results]",
)  # fmt: skip
def main(device, peers, shapes, masked, dtypes, hidden_states, rounds, quick, output) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device: got cuda, but torch sees no GPU here")
    peers = not quick if peers is None else peers
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if hidden_states != "random" and shapes:
        raise click.UsageError("--shapes: a file of --hidden-states has a shape of its own; leave one of them out")
    if hidden_states != "random":
        shapes = [shape_of_file(hidden_states)]
    shapes = sorted(shapes or ([QUICK_SHAPE] if quick else SHAPES[device]), key=prod)
    masked = masked or ((0.0, 0.75) if device == "cpu" else (0.0, 0.5, 0.9))
    dtypes = dtypes or (("bf16", "fp32") if device == "cpu" else ("bf16",))
    rounds = rounds or (3 if quick else 5 if device == "cpu" else 10)
    for shape, fraction in product(shapes, masked):
        if round(fraction * (half := shape[0] // 2)) == half:
            raise click.UsageError(f"--masked: {fraction} of {half} rows leaves none that counts")
    output.mkdir(parents=True, exist_ok=True)
    table = output / "bench_logps.csv"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # a measured process gives back at once what it frees
    set_forkserver_preload(["mede2.kernels.logps", "rich.table", *(COMPILERS if peers else ())])  # or each imports them

    console = Console() if Console().is_terminal else Console(width=175)
    place = environment()
    console.print(", ".join(f"{key}: {value}" for key, value in place.items()), soft_wrap=True, markup=False)
    steps = load_contenders(device, peers, console)
    machine = {"machine": place["gpu" if device == "cuda" else "cpu"], "device": device}
    measured = {}
    for shape, dtype, fraction in product(shapes, dtypes, masked):
        case = Case(shape, dtype, fraction, device, hidden_states)
        again = [name + COMPACTED for name in steps if name not in OURS] if fraction and peers else []
        rows = measure(case, steps | {name: load_step(name, device) for name in again}, rounds, console)
        append_csv(table, [{"date": place["date"], **machine, **place, **row} for row in rows])
        console.print(as_table(rows, case))
        measured[case] = rows
    largest = {case: rows for case, rows in measured.items() if case.shape == shapes[-1]}
    try:
        draw(output / "bench_logps.png", largest)
    except ImportError as error:
        console.print(f"absent: {output / 'bench_logps.png'} ({error})", soft_wrap=True, markup=False)
    print(json.dumps(headline(largest)))


if __name__ == "__main__":
    main()
