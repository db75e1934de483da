"""Plans as tables for a terminal, as JSON, as the lines of a recipe's header, as a plot."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mede2.trainer.planning import timing
from mede2.trainer.planning.communication import Collective, collectives, shared_rows
from mede2.trainer.planning.memory import CONTEXT_BYTES, SLACK
from mede2.trainer.planning.plan import HOST_SHARE, Change, Plan, Stage, make_plan
from mede2.trainer.settings import ENHANCE, STAGE_NAMES
from mede2.trainer.tables import Section

ASSUMED = (
    f"Assumed, not measured: {timing.MATRIX_SHARE:.0%} of the datasheet's matrix rate, {timing.MEMORY_SHARE:.0%} of "
    f"memory bandwidth, {timing.LINK_SHARE:.0%} of links, {timing.LATENCY_S * 1e6:.0f} us a gathering, a layer's "
    f"activations moved {timing.TIMES_MOVED} times, {SLACK:.0%} slack of what comes and goes, "
    f"{CONTEXT_BYTES / 2**30:.1f} GiB for CUDA and NCCL."
)
POINTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # GPUs of the plot


def sections(plan: Plan, verdict: str) -> list[Section]:
    """The plan of one stage as one table."""
    stage, memory, times = plan.stage, plan.memory, plan.timing
    run, cluster = stage.longest, stage.cluster
    rows = [
        ("model", stage.shape.name, f"{stage.shape.num_parameters / 1e9:.2f} B parameters, " + ", ".join(
            f"{part.replace('_', ' ')} {count / 1e9:.2f}" for part, count in stage.shape.counts.items()
        )),
        ("", "trained", f"{run.num_trained / 1e9:.3f} B"),
        ("memory of a GPU", "", f"longest micro-batch: {len(run.rows)} x {run.rows[0].tokens} tokens"
         + (f", {run.own_tokens} of them on each of {run.settings.sequence_parallel_size} GPUs"
            if run.settings.sequence_parallel_size > 1 else "")),
        *(("", name, _gib(size)) for name, size in memory.items.items()),
        ("", "together", f"{_gib(memory.total)} of {_gib(cluster.memory_gb * 1e9)}"),
        *(("host memory of a GPU", name, _gib(size)) for name, size in memory.host.items()),
    ]  # fmt: skip
    if memory.host:
        rows.append(("", "of a node", f"{_gib(memory.host_total * cluster.gpus_per_node)} of "
                     f"{_gib(cluster.host_memory_gb * 1e9)}, of which {HOST_SHARE:.0%} may go"))  # fmt: skip
    if memory.nvme:
        rows.append(("NVMe of a GPU", "", _gib(memory.nvme)))
    rows += [("sent in an update", each.operation, _gib(each.wire)) for each in _sent(stage)]
    parts = {
        "matrix products": times.products_s, "operations on elements": times.elements_s,
        "reading weights": times.weights_s, "Adam": times.adam_s,
        f"communication, {'overlapped' if times.overlapped else 'not overlapped'}": times.communication_s,
        "to the host and back": times.transfers_s,
    }  # fmt: skip
    rows += [("time of an update", name, f"{seconds:.2f} s") for name, seconds in parts.items() if seconds]
    rows += [
        ("", "together", f"{times.step_s:.2f} s"),
        ("throughput", "tokens", f"{times.tokens_per_s:,.0f} a second"),
        ("", "MFU", f"{times.mfu:.1%}"),
        *(("hours", name, f"{hours:.2f}") for name, hours in plan.hours.items() if hours),
        ("", "together", f"{plan.total_hours:.2f}, {plan.gpu_hours:.0f} GPU-hours, {plan.updates} updates"),
        ("verdict", "", verdict),
    ]
    title = f"{STAGE_NAMES[stage.stage]} on {cluster}, {stage.deepspeed_file.name}"
    return [Section(title, ("", "", "figure"), _without_repeats(rows), note=ASSUMED, heads=3)]


def _sent(stage: Stage) -> list[Collective]:
    exchange = shared_rows(stage.average)
    return [*collectives(stage.average), *([exchange] if exchange else [])]


def _without_repeats(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found, last = [], ""
    for head, *rest in rows:
        found.append(("" if head == last else head, *rest))
        last = head or last
    return found


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def verdict_of(plan: Plan, change: tuple[Change, Plan] | None) -> str:
    """Whether it fits, by how much, and what to change if it does not."""
    device, limit = plan.memory.total, plan.stage.cluster.memory_gb * 1e9
    if plan.fits:
        return f"fits: {_gib(limit - device)} of a GPU stay free"
    where = f"a GPU lacks {_gib(device - limit)}" if not plan.fits_device else "a node's host memory does not suffice"
    if change is None:
        return f"does not fit: {where}; nothing that the planner knows makes it fit"
    kinds = ("the same updates", "the same updates, more GPUs", "another optimizer", "an adapter is trained instead")
    words, other = change[0], change[1]
    return (
        f"does not fit: {where}; cheapest change ({kinds[words.cost]}): {words.words} "
        f"({_gib(other.memory.total)}, {other.gpu_hours:.0f} GPU-hours)"
    )


def as_json(plan: Plan, verdict: str) -> dict[str, Any]:
    """The plan for a machine: bytes, seconds, hours."""
    stage, times = plan.stage, plan.timing
    return {
        "stage": stage.stage, "model": stage.shape.name, "cluster": str(stage.cluster), "gpus": stage.cluster.ranks,
        "deepspeed_file": stage.deepspeed_file.name, "parameters": stage.shape.counts,
        "trained": stage.longest.num_trained, "fits": plan.fits, "verdict": verdict,
        "memory": plan.memory.items, "memory_total": plan.memory.total, "moments": plan.memory.moments,
        "gpu_memory": int(stage.cluster.memory_gb * 1e9), "host": plan.memory.host, "nvme": plan.memory.nvme,
        "sent": {each.operation: each.wire for each in _sent(stage)},
        "step_s": times.step_s,
        "step_parts_s": {
            "products": times.products_s, "elements": times.elements_s, "weights": times.weights_s,
            "adam": times.adam_s, "communication": times.communication_s, "transfers": times.transfers_s,
        },
        "tokens_per_s": times.tokens_per_s, "mfu": times.mfu, "updates": plan.updates, "hours": plan.hours,
        "gpu_hours": plan.gpu_hours, "assumed": ASSUMED,
    }  # fmt: skip


def header(plan: Plan) -> list[str]:
    """The planner's figures in a recipe's header, without `# `."""
    times, cluster = plan.timing, plan.stage.cluster
    lines = [
        f"Planned for {cluster}: {_gib(plan.memory.total)} of a GPU's {_gib(cluster.memory_gb * 1e9)}; "
        f"{times.step_s:.1f} s an update,",
        f"{times.tokens_per_s:,.0f} tokens/s, MFU {times.mfu:.0%}; {plan.updates} updates, {plan.total_hours:.1f} h, "
        f"{plan.gpu_hours:.0f} GPU-hours.",
    ]
    if plan.memory.host:
        lines.append(f"Host memory: {_gib(plan.memory.host_total * cluster.gpus_per_node)} of a node.")
    return lines


def submit_line(stage: Stage, recipe: Path) -> str:
    """How to submit a recipe to SLURM, with the records to be named."""
    cluster, file = stage.cluster, stage.deepspeed_file
    records = "--train pairs.jsonl --eval held_out.jsonl" if stage.stage == ENHANCE else "--train demos.jsonl"
    output = f"runs/{recipe.stem.removesuffix(f'_stage{stage.stage}')}/stage{stage.stage}"
    return (
        f"python launch/submit.py stage{stage.stage} --nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node} "
        f"--ds ds_configs/{file.name} --recipe {recipe} --output {output} {records}"
    )


def scaling(stage: Stage) -> list[tuple[int, Plan]]:
    """Plans for growing numbers of GPUs, each with as many examples an update as it has now; nodes as full as now."""
    found, each = [], stage.settings.global_batch_size / stage.cluster.ranks
    for gpus in POINTS:
        per_node = min(gpus, stage.cluster.gpus_per_node)
        batch = round(each * gpus)
        if gpus % per_node or batch < 1 or batch % (gpus * stage.settings.micro_batch_size):
            continue
        cluster = replace(stage.cluster, nodes=gpus // per_node, gpus_per_node=per_node)
        found.append((gpus, make_plan(replace(stage.with_settings(global_batch_size=batch), cluster=cluster))))
    return found


def plot(stages: Sequence[Stage], path: Path) -> None:
    """Draw tokens a second against the number of GPUs; hollow where memory does not suffice.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("--plot: matplotlib is not installed; pip install 'mede2[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for stage in stages:
        points = scaling(stage)
        gpus, rates = [number for number, _ in points], [plan.timing.tokens_per_s for _, plan in points]
        line = axes.plot(gpus, rates, label=f"{STAGE_NAMES[stage.stage]}, {stage.deepspeed_file.name}")[0]
        for number, plan in points:
            face = line.get_color() if plan.fits else "white"
            axes.plot(number, plan.timing.tokens_per_s, "o", color=line.get_color(), markerfacecolor=face)
        axes.plot(gpus, [rates[0] * number / gpus[0] for number in gpus], ":", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens a second, planned")
    axes.set_title(
        f"{stages[0].shape.name} on {stages[0].cluster.name}, as many examples a GPU for each number\n"
        "(dotted: in proportion; hollow: does not fit)", fontsize=10,
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
