"""Scaling of Stage II: measured here on one and two ranks, and the planner's curve to 512 GPUs beside it.

Measured: `launch/stage2.py` itself under torchrun and ZeRO-3, one thread a rank, so two ranks have twice the cores of
one; the update's time is the median over its turns, which the configurations take one after the other. The reference
and image features, computed once, are left out. "strong": the same pairs an update; "weak": as many for each rank;
"sequence": ranks share each micro-batch (sequence_parallel_size), which pays in memory, not in time.

Planned: a recipe on its cluster, from the fewest GPUs that hold it. Nothing of it is measured: times rest on the
planner's shares of datasheet rates, on rings whose bandwidth does not fall with the number of nodes, and on ranks that
never wait for data or for each other. Measured and planned stand in files and panels of their own.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from bench_logps import REPOSITORY, append_csv, environment
from step_work import BUILT, make_model, make_records

from mede2.trainer.planning.command import read_stage
from mede2.trainer.planning.plan import Plan, Stage, make_plan
from mede2.trainer.planning.report import ASSUMED, POINTS

PER_RANK = 4  # pairs an update
PACKAGES = ("transformers", "deepspeed")
KINDS = {  # global batch and ranks that share a micro-batch, by the number of ranks and the most of them
    "strong": lambda ranks, most: (PER_RANK * most, 1),
    "weak": lambda ranks, most: (PER_RANK * ranks, 1),
    "sequence": lambda ranks, most: (PER_RANK, ranks),
}


@dataclass(frozen=True)
class Setup:
    """A way to run: ranks, pairs an update, ranks that share a micro-batch."""

    ranks: int
    pairs: int
    sharing: int


def run_once(setup: Setup, model: Path, records: Path, updates: int) -> list[dict[str, float]]:
    """The metrics of each update of a run in processes of its own; the first warms up."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        output = Path(folder) / "run"
        settings = {
            "global_batch_size": setup.pairs, "sequence_parallel_size": setup.sharing, "num_workers": 1,
            "max_steps": updates,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(setup.ranks), "--master_port",
            str(port), str(REPOSITORY / "launch" / "stage2.py"), "--ds", str(REPOSITORY / "ds_configs" / "z3.json"),
            "--model", str(model), "--train", str(records), "--output", str(output),
        ]  # fmt: skip
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise click.ClickException(f"{setup} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def measure(name: str, ranks: tuple[int, ...], updates: int, rounds: int, sizes: tuple[int, int]) -> list[dict]:
    """A row for each kind of scaling and number of ranks."""
    wanted = {(kind, n): Setup(n, *KINDS[kind](n, max(ranks))) for kind in KINDS for n in ranks}
    found: dict[Setup, list[dict[str, float]]] = {setup: [] for setup in wanted.values()}
    with tempfile.TemporaryDirectory() as folder:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        model = make_model(name, Path(folder) / "model", device, dtype)
        num_pairs = PER_RANK * max(ranks) * updates
        records = make_records(model, Path(folder) / "records", num_pairs, *sizes)
        for _ in range(rounds):
            for setup, rows in found.items():
                rows += run_once(setup, model, records, updates)[1:]
    rows = []
    for (kind, n), setup in wanted.items():
        step_s = statistics.median(row["step_ms"] for row in found[setup]) / 1e3
        alone = wanted[kind, min(ranks)]
        alone_s = statistics.median(row["step_ms"] for row in found[alone]) / 1e3
        rate, of_alone = setup.pairs / step_s, alone.pairs / alone_s
        rows.append({
            "model": name, "kind": kind, "ranks": n, "pairs_an_update": setup.pairs, "updates": len(found[setup]),
            "prompt_tokens": sizes[0], "answer_tokens": sizes[1], "step_ms": round(1e3 * step_s, 1),
            "pairs_per_s": round(rate, 4), "speed_up": round(rate / of_alone, 3),
            "efficiency": round(rate / of_alone * min(ranks) / n, 3),
            "peak_gib_of_rank_0": round(max(row["peak_gib"] for row in found[setup]), 3),
        })  # fmt: skip
    return rows


def planned(stage: Stage) -> list[dict]:
    """The planner's rows for growing numbers of GPUs: weak, as many pairs each as the recipe has; strong, the pairs
    that the most GPUs need for one micro-batch each."""
    each, micro = stage.settings.global_batch_size // stage.cluster.ranks, stage.settings.micro_batch_size
    rows = []
    for kind in ("strong", "weak"):
        least: tuple[int, float] | None = None
        for gpus in POINTS:
            per_node = min(gpus, stage.cluster.gpus_per_node)
            if gpus % per_node:
                continue  # no whole nodes
            pairs = max(micro, each) * gpus if kind == "weak" else micro * max(POINTS)
            cluster = replace(stage.cluster, nodes=gpus // per_node, gpus_per_node=per_node)
            try:
                plan = make_plan(replace(stage.with_settings(global_batch_size=pairs), cluster=cluster))
            except ValueError:  # of ranks that cannot share a micro-batch among so few
                continue
            if not plan.fits:
                continue
            rate = _pairs_per_s(plan)
            least = least or (gpus, rate)
            rows.append({
                "model": stage.shape.name, "cluster": str(cluster), "kind": kind, "gpus": gpus,
                "pairs_an_update": pairs, "step_s": round(plan.timing.step_s, 3), "pairs_per_s": round(rate, 3),
                "tokens_per_s": round(plan.timing.tokens_per_s), "mfu": round(plan.timing.mfu, 4),
                "efficiency": round(rate / gpus * least[0] / least[1], 4),
                "gpu_gib": round(plan.memory.total / 2**30, 2),
            })  # fmt: skip
    if not rows:
        raise click.ClickException(f"{stage.shape.name} fits on none of {', '.join(map(str, POINTS))} GPUs")
    return rows


def _pairs_per_s(plan: Plan) -> float:
    return plan.timing.examples / plan.timing.step_s


def draw(path: Path, measured: list[dict], curve: list[dict]) -> None:
    """Two panels: speed-ups measured, and pairs a second planned; dotted: in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for kind in KINDS:
        rows = [row for row in measured if row["kind"] == kind]
        left.plot([row["ranks"] for row in rows], [row["speed_up"] for row in rows], "o-", label=kind)
    most = max(row["ranks"] for row in measured)
    left.plot([1, most], [1, most], ":", color="grey")
    left.set(title=f"measured, {measured[0]['model']} model, one CPU thread a rank", xlabel="ranks", ylabel="speed-up")
    for kind in ("strong", "weak"):
        rows = [row for row in curve if row["kind"] == kind]
        gpus, rates = [row["gpus"] for row in rows], [row["pairs_per_s"] for row in rows]
        pairs = [row["pairs_an_update"] for row in rows]
        label = f"{kind}: {pairs[0]}{f' to {pairs[-1]}' if kind == 'weak' else ''} pairs an update"
        line = right.plot(gpus, rates, "o-", label=label)[0]
        right.plot(gpus, [rates[0] * n / gpus[0] for n in gpus], ":", color=line.get_color())
    what = f"{curve[0]['model'].rpartition('/')[2]} on {curve[0]['cluster'].partition(':')[0]}"
    right.set(title=f"planned, not measured: {what}",
              xlabel="GPUs", ylabel="pairs/s", xscale="log", yscale="log")  # fmt: skip
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.supxlabel(
        ASSUMED.replace("bandwidth, ", "bandwidth,\n", 1) + "\nNo stragglers, no waiting for data; a network as fast "
        "for many nodes as for two.", fontsize=7,
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@click.command(help=__doc__)
@click.option("--model", default="wide", show_default=True, type=click.Choice(["demo", *BUILT]), help="To measure.")
@click.option("--ranks", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True, help="Repeatable.")
@click.option("--recipe", default="launch/recipes/qwen2_5_vl_7b_stage2.yaml", show_default=True, help="To plan.")
@click.option("--updates", default=4, show_default=True, type=click.IntRange(2), help="Of a run; the first warms up.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Runs of each configuration.")
@click.option("--prompt", default=380, show_default=True, type=click.IntRange(1), help="Prompt tokens, about.")
@click.option("--answer", default=128, show_default=True, type=click.IntRange(8), help="Answer tokens, about.")
@click.option("--quick", is_flag=True, help="The demo's model, short rows, one run each: under two minutes.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=REPOSITORY / "benchmarks" / "results",
    help="Folder of scaling_measured.csv, which grows, scaling_planned.csv and scaling.png.",
)  # fmt: skip
def main(model, ranks, recipe, updates, rounds, prompt, answer, quick, output) -> None:
    if quick:
        model, updates, rounds, prompt, answer = "demo", 3, 1, 64, 16
    try:
        path = recipe if Path(recipe).exists() else str(REPOSITORY / recipe)
        curve = planned(read_stage(REPOSITORY, path, None, (), {}))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    place = environment(PACKAGES) | {"threads": 1}  # of each rank
    measured = measure(model, tuple(sorted(set(ranks))), updates, rounds, (prompt, answer))
    output.mkdir(parents=True, exist_ok=True)
    append_csv(output / "scaling_measured.csv", [place | row for row in measured])
    (output / "scaling_planned.csv").unlink(missing_ok=True)
    append_csv(output / "scaling_planned.csv", curve)
    for row in measured:
        print("  ".join(f"{name} {row[name]}" for name in ("kind", "ranks", "step_ms", "pairs_per_s", "efficiency")))
    print(ASSUMED)
    try:
        draw(output / "scaling.png", measured, curve)
    except ImportError as error:
        print(f"absent: {output / 'scaling.png'} ({error})")
    most = max(ranks)
    last = {f"{row['kind']}_efficiency_{most}": row["efficiency"] for row in measured if row["ranks"] == most}
    told = {
        f"{kind}_{row['gpus']}": {"pairs_per_s": row["pairs_per_s"], "efficiency": row["efficiency"]}
        for kind in ("strong", "weak") for row in curve if row["kind"] == kind and row["gpus"] in (8, 64, 512)
    }  # fmt: skip
    print(json.dumps(last | {"planned": told}))


if __name__ == "__main__":
    main()
