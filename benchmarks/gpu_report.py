"""One call on a GPU machine: log-probabilities against fp64, their benchmark, and both stages for real in bf16.

    python benchmarks/gpu_report.py --output benchmarks/results

It needs torch, transformers and DeepSpeed, and of MedE2 only this checkout (the packages are linked where it is not
installed). Without a GPU the same script runs on the CPU in fp32, in small sizes, to try it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
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
    """Errors of logps, dh and dW against fp64, relative to its norm: ours beside eager's in the same dtype."""
    import torch

    from mede2.kernels.logps import linear_logps

    rows = []
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        torch.manual_seed(0)
        hidden = torch.randn(507, 252, device=device).to(dtype)
        weight = (torch.randn(4099, 252, device=device) * 252**-0.5).to(dtype)
        targets = torch.randint(4099, (507,), device=device)
        targets[::7] = -100
        upstream = torch.randn(507, device=device)

        def passes(
            implementation: str, kind: torch.dtype, inputs=(hidden, weight, targets, upstream)
        ) -> list[torch.Tensor]:
            h, w = (tensor.detach().to(kind).requires_grad_() for tensor in inputs[:2])
            logps = linear_logps(h, w, inputs[2], implementation=implementation)
            logps.backward(inputs[3].to(logps.dtype))
            return [tensor.detach().double() for tensor in (logps, h.grad, w.grad)]

        exact = passes("reference", torch.float64)
        for implementation in ("reference", "torch"):
            errors = [
                float((got - want).norm() / want.norm())
                for got, want in zip(passes(implementation, dtype), exact, strict=True)
            ]
            rows.append(
                {
                    "dtype": str(dtype),
                    "implementation": implementation,
                    **dict(zip(("logps", "dh", "dW"), errors, strict=True)),
                }
            )
    return rows


def benchmark(device: str, folder: Path) -> dict:
    """benchmarks/bench_logps.py at the size of a 7B head (GPU), or small."""
    sizes = (
        ["-n", "4096", "-h", "3584", "-v", "152064"]
        if device == "cuda"
        else ["-n", "128", "-h", "64", "-v", "4096", "--dtype", "fp32"]
    )
    path = folder / "bench_logps.json"
    run_logged([sys.executable, str(ROOT / "benchmarks/bench_logps.py"), *sizes, "--rounds", "3", "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


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


def run_logged(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


@click.command(help=__doc__)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the report.")
@click.option("--max-steps", default=20, show_default=True, type=click.IntRange(min=3), help="Updates of each stage.")
def main(output: Path, max_steps: int) -> None:
    link_packages()
    import torch
    from bench_logps import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = environment()
    with tempfile.TemporaryDirectory() as scratch:
        report = {
            **place,
            "numerics": numerics(device),
            "benchmark": benchmark(device, Path(scratch)),
            "stages": stages(Path(scratch), max_steps),
        }
    output.mkdir(parents=True, exist_ok=True)
    card = place["gpu"].replace(" ", "-").lower() if device == "cuda" else "cpu"
    path = output / f"gpu_report-{card}-{place['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"report": str(path), "numerics": report["numerics"], "stages": report["stages"]}))


if __name__ == "__main__":
    main()
