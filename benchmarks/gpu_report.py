"""One call on a GPU machine: log-probabilities against fp64, their benchmark, layers that keep less beside
transformers', a Stage II step beside TRL's, and both stages for real in bf16.

    python benchmarks/gpu_report.py --output benchmarks/results

It needs torch, transformers and DeepSpeed (and TRL, or that step is left out), and of MedE2 only this checkout (the
packages are linked where it is not installed). Without a GPU the same script runs on the CPU in fp32, in small sizes,
to try it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import chain, product
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent


def link_packages() -> None:
    """Make `mede2` importable here and in subprocesses where it is not installed."""
    if importlib.util.find_spec("mede2") is None:
        folder = Path(tempfile.mkdtemp()) / "mede2"
        folder.mkdir()
        for name in ("trainer", "kernels"):
            (folder / name).symlink_to(ROOT / name)
        sys.path.insert(0, str(folder.parent))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])


def numerics(device: str) -> list[dict]:
    """Errors of logps, entropy, dh and dW against fp64, relative to its norm: ours beside eager's in the same dtype.

    Ragged sizes and, for the 16-bit dtypes, one whose rows tensor descriptors can load.
    """
    import torch

    from mede2.kernels.logps import linear_logps

    rows = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32,)
    implementations = ("reference", "torch", "triton") if device == "cuda" else ("reference", "torch")
    for dtype, hidden_size, extras in product(dtypes, (252, 256), ({}, {"with_entropy": True}, {"softcap": 5.0})):
        torch.manual_seed(0)
        hidden = torch.randn(507, hidden_size, device=device).to(dtype)
        weight = (2 * torch.randn(4099, hidden_size, device=device) * hidden_size**-0.5).to(dtype)
        targets = torch.randint(4099, (507,), device=device)
        targets[::7] = -100
        upstream = torch.randn(507, device=device)

        def passes(implementation: str, kind: torch.dtype, inputs=(hidden, weight, targets, upstream), extras=extras):
            h, w = (tensor.detach().to(kind).requires_grad_() for tensor in inputs[:2])
            results = linear_logps(h, w, inputs[2], implementation=implementation, **extras)
            values = results if isinstance(results, tuple) else (results,)
            sum((value * inputs[3].to(value.dtype)).sum() for value in values).backward()
            return [tensor.detach().double() for tensor in (h.grad, w.grad, *values)]

        exact = passes("reference", torch.float64)
        for implementation in implementations:
            ours, again = passes(implementation, dtype), passes(implementation, dtype)
            errors = [float((got - want).norm() / want.norm()) for got, want in zip(ours, exact, strict=True)]
            rows.append({
                "dtype": str(dtype), "hidden_size": hidden_size, **extras, "implementation": implementation,
                **dict(zip(("dh", "dW", "logps", "entropy"), errors, strict=False)),
                "same_bits_twice": all(torch.equal(x, y) for x, y in zip(ours, again, strict=True)),
            })  # fmt: skip
    return rows


def forward_rate(device: str) -> list[dict]:
    """TFLOP/s of the forward alone beside the matrix product alone, of the same bf16 operands (a CPU: fp32, small)."""
    import torch

    from mede2.kernels.logps import linear_logps

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(8192, 3584, 152064), (2048, 2048, 151936)] if device == "cuda" else [(128, 64, 4096)]
    rows = []
    for num_rows, hidden_size, num_vocab in shapes:
        hidden = torch.randn(num_rows, hidden_size, device=device, dtype=dtype)
        weight = torch.randn(num_vocab, hidden_size, device=device, dtype=dtype) * hidden_size**-0.5
        targets = torch.randint(num_vocab, (num_rows,), device=device)
        block = weight[: num_vocab // 8]  # so that the product's own output fits

        def logps(hidden=hidden, weight=weight, targets=targets) -> None:
            with torch.no_grad():
                linear_logps(hidden, weight, targets)

        def matrix_product(hidden=hidden, block=block) -> None:
            torch.mm(hidden, block.t())

        unit = 2 * num_rows * hidden_size * num_vocab
        ours = unit / median_seconds(logps, device) / 1e12
        peak = unit / 8 / median_seconds(matrix_product, device) / 1e12
        shape = {"num_rows": num_rows, "hidden_size": hidden_size, "num_vocab": num_vocab}
        rows.append({**shape, "forward_tflops": ours, "matrix_tflops": peak, "ratio": ours / peak})
    return rows


def layers(device: str) -> list[dict]:
    """`trainer/lean_layers.py` beside transformers' own: whether forwards have the same bits, how far gradients are
    apart, relative to their norm, what is kept for the backward, and the time of both."""
    import copy

    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2MLP, Qwen2RMSNorm

    from mede2.trainer.lean_layers import keep_less

    on_cuda = device == "cuda"
    dtype, num_tokens = (torch.bfloat16, 4096) if on_cuda else (torch.float32, 64)
    hidden_size, inner = (3584, 18944) if on_cuda else (64, 128)
    config = Qwen2Config(hidden_size=hidden_size, intermediate_size=inner)
    rows = []
    for theirs in (Qwen2MLP(config), Qwen2RMSNorm(hidden_size)):
        theirs = theirs.to(device, dtype)
        ours = copy.deepcopy(theirs)
        keep_less(torch.nn.ModuleList([ours]))
        values = torch.randn(1, num_tokens, hidden_size, device=device, dtype=dtype)
        upstream = torch.randn_like(values)
        found = []
        for module in (ours, theirs):
            kept: dict[int, int] = {}

            def pack(tensor, kept=kept):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            hidden = values.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = module(hidden)
            output.backward(upstream)
            gradients = torch.cat([hidden.grad.flatten(), *(p.grad.flatten() for p in module.parameters())]).double()

            def again(module=module, hidden=hidden, upstream=upstream) -> None:
                module(hidden).backward(upstream)

            found.append((output.detach(), gradients, sum(kept.values()), median_seconds(again, device)))
        (mine, gradients, kept_bytes, seconds), (wanted, exact, all_bytes, their_seconds) = found
        rows.append({
            "layer": type(theirs).__name__, "dtype": str(dtype), "same_forward": torch.equal(mine, wanted),
            "gradients_apart": float((gradients - exact).norm() / exact.norm()),
            "kept_mib": kept_bytes / 2**20, "kept_by_transformers_mib": all_bytes / 2**20,
            "ms": 1e3 * seconds, "ms_of_transformers": 1e3 * their_seconds,
        })  # fmt: skip
    return rows


def median_seconds(function, device: str, rounds: int = 10) -> float:
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    times = []
    for _ in range(rounds + 3):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[3:])[rounds // 2]


def benchmark(device: str, folder: Path) -> dict:
    """benchmarks/bench_logps.py with peers, at the heads of a 7B and a 3B model (a CPU: --quick). Its headline.

    All eight shapes are a command of their own: `python benchmarks/bench_logps.py --device cuda`.
    """
    sizes = ["--quick"]
    if device == "cuda":
        sizes = ["--shapes", "2048x2048x151936", "--shapes", "8192x3584x152064", "--rounds", "5"]
    command = [sys.executable, str(ROOT / "benchmarks/bench_logps.py"), "--device", device, "--output", str(folder)]
    return json.loads(run_logged([*command, *sizes]).splitlines()[-1])


def step(device: str, folder: Path) -> dict | None:
    """benchmarks/bench_step.py, without its variants: Stage II beside TRL's DPOTrainer on a model of Qwen2.5-VL-3B's
    shape (a CPU: the smallest). Its headline, or what went wrong; None where there is no TRL."""
    if importlib.util.find_spec("trl") is None:
        return None
    small = {"--model": "demo", "--dtype": "fp32", "--prompt": "64", "--answer": "16", "--pairs": "1", "--rounds": "1"}
    sizes = ["--no-variants", *(chain(*small.items()) if device == "cpu" else ())]
    command = [sys.executable, str(ROOT / "benchmarks/bench_step.py"), "--device", device, "--output", str(folder)]
    try:
        return json.loads(run_logged([*command, *sizes]).splitlines()[-1])
    except subprocess.CalledProcessError as error:  # the other figures are worth their report
        return {"error": str(error)}


def stages(folder: Path, max_steps: int) -> list[dict]:
    """Both stages on the embedded default, one process, ZeRO-3: first and last losses, speed, memory."""
    results = []
    for stage in (1, 2):
        output = folder / f"stage{stage}"
        started = time.perf_counter()
        run_logged([
            sys.executable, str(ROOT / f"launch/stage{stage}.py"), "--ds", str(ROOT / "ds_configs/z3.json"),
            "--output", str(output), "--max-steps", str(max_steps),
        ])  # fmt: skip
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steady = sorted(row["step_ms"] for row in rows[1:])
        results.append({
            "stage": stage, "updates": len(rows), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
            "median_step_ms": steady[len(steady) // 2], "peak_gib": rows[-1]["peak_gib"],
            "seconds": time.perf_counter() - started,
        })  # fmt: skip
    return results


def run_logged(command: list[str]) -> str:
    """Run a command, show its standard output as it comes, and return it."""
    print("$", " ".join(command), flush=True)
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the report.")
@click.option("--max-steps", default=20, show_default=True, type=click.IntRange(min=3), help="Updates of each stage.")
def main(output: Path, max_steps: int) -> None:
    link_packages()
    import torch
    from bench_logps import environment

    output = output.resolve()  # the commands below run in the repository's root
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = environment()
    with tempfile.TemporaryDirectory() as scratch:
        report = {
            **place,
            "numerics": numerics(device),
            "forward_rate": forward_rate(device),
            "layers": layers(device),
            "benchmark": benchmark(device, output),
            "step": step(device, output),
            "stages": stages(Path(scratch), max_steps),
        }
    card = place["gpu"].replace(" ", "-").lower() if device == "cuda" else "cpu"
    path = output / f"gpu_report-{card}-{place['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shown = ("forward_rate", "layers", "benchmark", "step", "stages")
    print(json.dumps({"report": str(path), **{name: report[name] for name in shown}}))


if __name__ == "__main__":
    main()
