"""Time and memory of linear_logps against the eager reference: forward and backward, interleaved, on CPU and CUDA.

The eager reference is called as people write it, over every row; linear_logps drops the ignored ones first. Times are
medians of rounds that run one implementation after the other, so that a busy machine slows both alike. Memory is the
peak above the inputs during one forward and backward, gradients included: of a process of its own on the CPU (resident
set), of the allocator on CUDA.

Legend: N token rows, H hidden size, V vocabulary.
"""

import json
import platform
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from mede2.kernels.logps import IGNORE_INDEX, choose_implementation, linear_logps
from mede2.kernels.logps_reference import reference_logps

CONTENDERS = {"eager": reference_logps, "torch": partial(linear_logps, implementation="torch")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPOSITORY = Path(__file__).resolve().parent.parent


def make_inputs(shape: tuple[int, int, int], dtype: str, ignored: float, device: str) -> tuple[torch.Tensor, ...]:
    """hidden (N, H) and weight (V, H), both to be trained, and targets (N,) with the first `ignored` part masked."""
    num_rows, hidden_size, num_vocab = shape
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, device=device).to(DTYPES[dtype])
    weight = (torch.randn(num_vocab, hidden_size, device=device) * hidden_size**-0.5).to(DTYPES[dtype])
    targets = torch.randint(num_vocab, (num_rows,), device=device)
    targets[: round(ignored * num_rows)] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def run_once(contender: str, inputs: tuple[torch.Tensor, ...]) -> float:
    """Milliseconds of one forward and backward."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    synchronize = torch.cuda.synchronize if hidden.is_cuda else torch.cpu.synchronize
    synchronize()
    start = time.perf_counter()
    CONTENDERS[contender](*inputs).sum().backward()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_above_inputs_mib(contender: str, threads: int, shape, dtype: str, ignored: float, device: str) -> float:
    """Peak memory of one forward and backward beyond what the inputs hold; on the CPU call it in a fresh process."""
    torch.set_num_threads(threads)
    run_once(contender, make_inputs((8, 8, 64), dtype, 0.0, device))  # libraries and thread pools are not counted
    inputs = make_inputs(shape, dtype, ignored, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(contender, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run_once(contender, inputs)
    return resident_mib("VmHWM") - before


def measure(shape, dtype: str, ignored: float, device: str, rounds: int) -> list[dict]:
    """One row for each contender: median milliseconds, their ratio to eager, and peak MiB above the inputs."""
    inputs = make_inputs(shape, dtype, ignored, device)
    times = {contender: [] for contender in CONTENDERS}
    for contender in CONTENDERS:  # warm up
        run_once(contender, inputs)
    for _ in range(rounds):
        for contender in CONTENDERS:
            times[contender].append(run_once(contender, inputs))
    del inputs
    rows = []
    for contender in CONTENDERS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            arguments = (contender, torch.get_num_threads(), shape, dtype, ignored, device)
            peak_mib = process.submit(peak_above_inputs_mib, *arguments).result()
        median_ms = statistics.median(times[contender])
        rows.append(
            {
                "device": device,
                "dtype": dtype,
                "ignored": ignored,
                "run": contender,
                "median_ms": median_ms,
                "time_ratio_to_eager": median_ms / statistics.median(times["eager"]),
                "peak_mib": peak_mib,
            }
        )
    return rows


def environment() -> dict[str, str | int]:
    """What a reader needs to place the figures: commit, machine, versions, date."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    processor = cpuinfo.split("model name")[1].split("\n")[0].strip("\t: ") if "model name" in cpuinfo else "unknown"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "none",
        "cpu": f"{processor}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def as_table(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    for heading in ("device", "dtype", "ignored", "run"):
        table.add_column(heading)
    for heading in ("median ms", "ratio to eager", "peak MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["device"],
            row["dtype"],
            f"{row['ignored']:.0%}",
            row["run"],
            f"{row['median_ms']:.1f}",
            f"{row['time_ratio_to_eager']:.2f}",
            f"{row['peak_mib']:.0f}",
            end_section=row["run"] == list(CONTENDERS)[-1],
        )
    return table


@click.command(help=__doc__)
@click.option("--num-rows", "-n", type=click.IntRange(min=1), default=1024, show_default=True, help="N, token rows.")
@click.option("--hidden-size", "-h", type=click.IntRange(min=1), default=512, show_default=True, help="H.")
@click.option("--num-vocab", "-v", type=click.IntRange(min=1), default=32768, show_default=True, help="V.")
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=list(DTYPES), show_default=True
)
@click.option("--ignored", type=click.FloatRange(0, 1), multiple=True, default=[0.0, 0.75], show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timed runs of each.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(num_rows, hidden_size, num_vocab, dtypes, ignored, rounds, json_path) -> None:
    console, shape, place = Console(), (num_rows, hidden_size, num_vocab), environment()
    console.print(f"auto: {choose_implementation()}", *(f"{key}: {value}" for key, value in place.items()), sep=", ")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device, dtype, fraction in product(devices, dtypes, ignored):
        with console.status(f"{device} {dtype} {fraction:.0%} ignored"):
            rows += measure(shape, dtype, fraction, device, rounds)
    console.print(as_table(rows, f"linear_logps, forward + backward, N={num_rows} H={hidden_size} V={num_vocab}"))
    if json_path:
        sizes = {"num_rows": num_rows, "hidden_size": hidden_size, "num_vocab": num_vocab, "rounds": rounds}
        json_path.write_text(json.dumps({**place, **sizes, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
