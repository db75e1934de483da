"""Our Stage II step beside TRL's DPOTrainer: pairs and tokens a second, peak memory, and what each feature gives.

Contenders (step_contenders.py): TRL as shipped; TRL compact, which scores answer positions only, as it does by itself
where Triton runs; the same under our DeepSpeed file (not if --quick); ours; and ours with one thing changed. Each
trains in a process of its own on the same model, pairs, dtype and device. They take turns, one update each, and wait
halted (SIGSTOP, data workers too) while others run; times are medians over the turns. On CUDA, where they do not fit
beside each other, each has all its turns at once. An update is timed whole: data, forward, backward, optimizer,
logging. Losses and log-probabilities of the first updates must be those of TRL, or there are no figures: the same work.

Our image features and reference log-probabilities are computed once: a pair is charged their cost over EPOCHS epochs,
or, in the column "1 epoch", all of it; TRL computes them in every step. Tokens are those of both sequences of a pair,
prompt twice, however often they are computed. Memory is the peak above the state after imports, model and optimizer
included: of the allocator on CUDA, of the training process's resident set on the CPU (data workers do not count).

Operations are counted from the configuration (trainer/planning/work.py). "Spent" is what a contender's algorithm
takes; MFU is of the least that a pair needs (prompt once, answer rows only, image and reference over EPOCHS epochs), by
part, over the rate of a matrix product measured here.
"""

import importlib.util
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

import click
import torch
import transformers
from bench_logps import DTYPES, REPOSITORY, append_csv, environment
from rich.console import Console
from rich.table import Table
from step_contenders import Contender, Job, contend
from step_work import BUILT, make_model, make_records, measure_sizes
from transformers import AutoConfig

from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.processing import load_processor
from mede2.trainer.data.records import read_records
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.planning.shapes import shape_of
from mede2.trainer.planning.work import Sizes, step_work
from mede2.trainer.settings import ENHANCE, BatchArithmetic, Settings

EPOCHS = 3  # that serve themselves of what we compute once
LEAVE_S = 20  # for a contender to end in order
SPARE_UPDATES = 2  # data behind the last timed update, so that data workers have as much to do as before it
PACKAGES = ("trl", "transformers", "deepspeed", "accelerate")
SAME = {"fp32": (2, 1e-3), "bf16": (1, 2e-2)}  # updates that must agree with TRL's, and how closely: rounding to bf16
# differs so much that after one update of Adam losses do too
OURS, TRL, COMPACT, ZERO3 = "ours", "TRL", "TRL compact", "TRL compact, ZeRO-3"
VARIANTS = {  # ours, with one thing changed by settings
    "no shared prefix": {"shared_prefix": False},
    "no image features": {"cache_image_features": False},
    "no data workers": {"num_workers": 0},
    "no fused log-probabilities": {"logps": "reference"},
    "packed rows": {"pack_length": 2048, "micro_batch_size": 1},
}

QUICK_VARIANTS = ("no shared prefix", "no image features")


@dataclass(frozen=True)
class Case:
    """What is measured at once. Batches count pairs."""

    model: str
    dtype: str
    device: str
    num_prompt: int
    num_answer: int
    global_batch_size: int
    micro_batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.model} model, {self.dtype} on {self.device}, prompts of about {self.num_prompt} tokens, answers of "
            f"about {self.num_answer}, {self.global_batch_size} pairs an update, {self.micro_batch_size} a forward"
        )


def contenders(case: Case, variants: Collection[str], with_zero3: bool) -> dict[str, Contender]:
    """By name, TRL first, then ours and those of `VARIANTS` that are named; on a CPU, TRL under ZeRO-3 if wanted."""
    found = {TRL: Contender("trl", deepspeed=case.device == "cuda")}  # on CUDA, it is compact by itself
    if case.device == "cpu":
        found[COMPACT] = Contender("trl", compact=True)
        if with_zero3:
            found[ZERO3] = Contender("trl", compact=True, deepspeed=True)
    found[OURS] = Contender("ours")
    found |= {name: Contender("ours", settings=VARIANTS[name]) for name in variants}
    if case.global_batch_size == 1:
        found.pop("packed rows", None)  # of one pair are what they are without
    return found


class Runner:
    """A contender in a process of its own, which runs only while the parent waits for its next report."""

    def __init__(self, name: str, contender: Contender, job: Job):
        self.log = job.scratch / "log"
        self.reports: list[dict[str, float]] = []
        # A forked process has the libraries already; CUDA wants a new one.
        context = get_context("forkserver" if job.device == "cpu" else "spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=contend, args=(contender, job, theirs, self.log), name=name)
        self.process.start()
        theirs.close()

    def turn(self) -> None:
        """One update more."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.connection.send(True)
        self.wait()

    def wait(self) -> None:
        """For the report of an update, the first one after its start; then the process halts."""
        try:
            self.reports.append(self.connection.recv())
        except EOFError:
            self.process.join()
            last = self.log.read_text(encoding="utf-8").strip().splitlines()[-1:] if self.log.exists() else []
            raise click.ClickException(f"{self.process.name} ended: {''.join(last) or 'it left no message'}") from None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        """Let the process leave; it is killed if it stays, as one that is not at its gate does."""
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGCONT)
            self.connection.send(False)
            self.process.join(LEAVE_S)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def run_all(found: dict[str, Contender], case: Case, job: Job, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Reports by contender; the first is of the warm-up."""
    reports = {}
    groups = [list(found)] if case.device == "cpu" else [[name] for name in found]
    for group in groups:
        runners: dict[str, Runner] = {}
        try:
            for name in group:
                scratch = job.scratch / name.replace(" ", "-")
                scratch.mkdir()
                runners[name] = Runner(name, found[name], replace(job, scratch=scratch))
                runners[name].wait()
            for _ in range(rounds):
                for runner in runners.values():
                    runner.turn()
            reports |= {name: runner.reports for name, runner in runners.items()}
        finally:
            for runner in runners.values():
                runner.end()
    return reports


def check_same_work(reports: dict[str, list[dict[str, float]]], dtype: str) -> float:
    """The largest difference of losses and log-probabilities from TRL's, relative where they are above 1.

    Raises:
        click.ClickException: it is above the tolerance, so that times could not be compared.
    """
    num_updates, tolerance = SAME[dtype]
    worst = 0.0
    for name, ours in reports.items():
        for update, (want, got) in enumerate(zip(reports[TRL][:num_updates], ours[:num_updates], strict=True), start=1):
            for key in ("loss", "logps/chosen", "logps/rejected"):
                gap = abs(got[key] - want[key]) / max(1.0, abs(want[key]))
                worst = max(worst, gap)
                if not gap <= tolerance:
                    raise click.ClickException(f"update {update}: {key} is {want[key]} of TRL, {got[key]} of {name}")
    return worst


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, the best of ten."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    seconds = []
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def measure(case: Case, rounds: int, variants: Collection[str], with_zero3: bool, console: Console) -> list[dict]:
    """One row for each contender, TRL first."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_model(case.model, scratch / "model", case.device, DTYPES[case.dtype])
        num_pairs = case.global_batch_size * (1 + rounds + SPARE_UPDATES)
        records = make_records(model, scratch / "records", num_pairs, case.num_prompt, case.num_answer)
        batch = BatchArithmetic(case.global_batch_size, case.micro_batch_size, 1)
        processor = load_processor(model)
        examples = list(map(Encoder(processor, 4096), read_records((str(records),), ENHANCE)))
        order = Sampler((0,) * num_pairs, batch, Settings().seed).epoch_order(0)
        job = Job(
            model, records, tuple(order), case.global_batch_size, case.micro_batch_size, case.dtype, case.device,
            REPOSITORY / "ds_configs" / "z3.json", scratch,
        )  # fmt: skip
        found = contenders(case, variants, with_zero3)
        reports = run_all(found, case, job, rounds)
        gap = check_same_work(reports, case.dtype)
        console.print(f"losses and log-probabilities of the first updates are TRL's within {gap:.1e}")
        flops = matmul_flops(case.device, DTYPES[case.dtype])
        config, sizes = AutoConfig.from_pretrained(model), measure_sizes(examples, processor)
    return [row_of(case, name, found[name], reports[name], config, sizes, flops) for name in reports]


def row_of(
    case: Case, name: str, contender: Contender, reports: list[dict], config, sizes: Sizes, flops: float
) -> dict[str, str | float]:
    """The figures of a contender, from its reports, the sizes of a pair and the rate of a matrix product."""
    is_trl, settings = contender.trainer == "trl", Settings(**contender.settings)
    timed = torch.tensor([report["ms"] for report in reports[1:]], dtype=torch.float64)
    low, step_ms, high = timed.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    waits = [report["data_wait_ms"] / report["ms"] for report in reports[1:] if "data_wait_ms" in report]
    once_ms = reports[0].get("once_ms_per_pair", 0.0)
    pairs_per_s, pairs_per_s_one_epoch = (
        1e3 / (step_ms / case.global_batch_size + once_ms / epochs) for epochs in (EPOCHS, 1)
    )
    shape = shape_of(config.to_dict(), case.model)
    spent = step_work(
        shape, sizes, shared=not is_trl and settings.shared_prefix,
        all_rows=is_trl and case.device == "cpu" and not contender.compact,
        reference_passes=1 if is_trl else 1 / EPOCHS,
        vision_passes=1 / EPOCHS if not is_trl and settings.cache_image_features else None,
    )  # fmt: skip
    least = step_work(shape, sizes, shared=True, all_rows=False, reference_passes=1 / EPOCHS, vision_passes=1 / EPOCHS)
    return {
        "model": case.model, "dtype": case.dtype, "prompt_tokens": sizes.prompt, "answer_tokens": sizes.answer,
        "image_tokens": sizes.image_tokens, "global_batch_size": case.global_batch_size,
        "micro_batch_size": case.micro_batch_size, "contender": name, "settings": json.dumps(contender.settings),
        "rounds": len(timed), "step_ms": step_ms, "p20_ms": low, "p80_ms": high, "once_ms_per_pair": once_ms,
        "epochs": EPOCHS, "pairs_per_s": pairs_per_s, "pairs_per_s_1_epoch": pairs_per_s_one_epoch,
        "tokens_per_s": pairs_per_s * 2 * (sizes.prompt + sizes.answer),
        "data_wait_share": statistics.median(waits) if waits else "", "peak_mib": reports[-1]["peak_mib"],
        "spent_gflop_vision": spent.vision / 1e9, "spent_gflop_language": spent.language / 1e9,
        "spent_gflop_reference": spent.reference / 1e9, "gflop_per_s": spent.total * pairs_per_s / 1e9,
        "matmul_gflop_per_s": flops / 1e9, "matmul_share": spent.total * pairs_per_s / flops,
        "mfu_vision": least.vision * pairs_per_s / flops, "mfu_language": least.language * pairs_per_s / flops,
        "mfu_reference": least.reference * pairs_per_s / flops, "mfu": least.total * pairs_per_s / flops,
    }  # fmt: skip


def as_table(rows: list[dict], case: Case) -> Table:
    """The rows of one case."""
    table = Table(title=f"{case}\nmatrix product: {rows[0]['matmul_gflop_per_s']:.0f} GFLOP/s", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for heading in (
        "update ms", "p20 - p80", "pairs/s", "1 epoch", "tokens/s", "peak MiB", "data wait",
        "GFLOP/pair =\nvision + language + reference", "GFLOP/s\n(of matmul)",
        "MFU =\nvision + language + reference",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    parts = ("vision", "language", "reference")
    for row in rows:
        wait, spent = row["data_wait_share"], [row[f"spent_gflop_{part}"] for part in parts]
        used = [row[f"mfu_{part}"] for part in parts]
        table.add_row(
            row["contender"], f"{row['step_ms']:.0f}", f"{row['p20_ms']:.0f} - {row['p80_ms']:.0f}",
            f"{row['pairs_per_s']:.3g}", f"{row['pairs_per_s_1_epoch']:.3g}", f"{row['tokens_per_s']:.0f}",
            f"{row['peak_mib']:.0f}", "-" if wait == "" else f"{wait:.1%}",
            f"{sum(spent):.3g} = {' + '.join(f'{part:.3g}' for part in spent)}",
            f"{row['gflop_per_s']:.4g} ({row['matmul_share']:.0%})",
            f"{sum(used):.1%} = {' + '.join(f'{part:.1%}' for part in used)}",
        )  # fmt: skip
    return table


def draw(path: Path, cases: dict[Case, list[dict]]) -> None:
    """Pairs a second and peak memory, a row of panels for each case, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(map(len, cases.values()))
    size = (11, (0.9 + 0.35 * longest) * len(cases))
    figure, panels = pyplot.subplots(len(cases), 2, figsize=size, squeeze=False, layout="constrained")
    for (case, rows), pair in zip(cases.items(), panels, strict=True):
        names = [row["contender"] for row in rows]
        colours = ["C0" if name.startswith(TRL) else "C1" if name == OURS else "C7" for name in names]
        for panel, column, label in zip(pair, ("pairs_per_s", "peak_mib"), ("pairs/s", "peak MiB"), strict=True):
            bars = panel.barh(names, [row[column] for row in rows], color=colours)
            panel.bar_label(bars, fmt="%.3g" if column == "pairs_per_s" else "%.0f", padding=3, fontsize=8)
            panel.set(title=f"{case.model}, {case.dtype}, {case.device}", xlabel=label)
            panel.invert_yaxis()
            panel.margins(x=0.12)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def headline(case: Case, rows: list[dict]) -> dict:
    """Ours over TRL's, and each variant's over ours."""
    by_name = {row["contender"]: row for row in rows}
    ours, trl = by_name[OURS], by_name[TRL]
    others = {"trl": trl, "trl_compact": by_name.get(COMPACT, trl), "trl_zero3": by_name.get(ZERO3)}
    others = {name: row for name, row in others.items() if row}

    def ratio(row: dict, other: dict, column: str) -> float:
        return round(row[column] / other[column], 3)

    without = {
        name: {"pairs_per_s": ratio(row, ours, "pairs_per_s"), "peak": ratio(row, ours, "peak_mib")}
        for name, row in by_name.items() if name in VARIANTS
    }  # fmt: skip
    without["reference charged to 1 epoch"] = {
        "pairs_per_s": round(ours["pairs_per_s_1_epoch"] / ours["pairs_per_s"], 3), "peak": 1.0,
    }  # fmt: skip
    return {
        "case": f"{case.model} {case.dtype} {case.device}",
        **{f"pairs_per_s_vs_{name}": ratio(ours, row, "pairs_per_s") for name, row in others.items()},
        **{f"peak_vs_{name}": ratio(ours, row, "peak_mib") for name, row in others.items()},
        "data_wait_share": round(ours["data_wait_share"], 4),
        "ablation": without,
    }


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@click.option(
    "--model", "models", multiple=True, type=click.Choice(["demo", *BUILT]), help="Repeatable; default demo and wide, "
    "wide if --quick, 3b on CUDA.",
)  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable; default fp32 and "
    "bf16, fp32 if --quick, bf16 on CUDA.",
)  # fmt: skip
@click.option("--prompt", default=380, show_default=True, type=click.IntRange(min=1), help="Prompt tokens, about.")
@click.option("--answer", default=128, show_default=True, type=click.IntRange(min=8), help="Answer tokens, about.")
@click.option("--pairs", type=click.IntRange(min=1), help="Pairs an update; default 4, 1 if --quick, 8 on CUDA.")
@click.option("--micro-batch-size", default=1, show_default=True, type=click.IntRange(min=1), help="Pairs a forward.")
@click.option("--rounds", type=click.IntRange(min=1), help="Timed updates of each; default 5, 2 if --quick.")
@click.option("--variants/--no-variants", default=True, show_default=True, help="Ours without each feature as well.")
@click.option("--quick", is_flag=True, help="One case, few rounds and variants: under two minutes on two cores.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=REPOSITORY / "benchmarks" / "results",
    help="Folder of bench_step.csv, which grows, and bench_step.png.  [default: benchmarks/results]",
)  # fmt: skip
def main(
    device, models, dtypes, prompt, answer, pairs, micro_batch_size, rounds, variants, quick, output
) -> None:  # fmt: skip
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device: got cuda, but torch sees no GPU here")
    if importlib.util.find_spec("trl") is None:
        raise click.UsageError("trl is not installed; `pip install -e '.[bench]'` brings it")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device == "cuda"
    models = models or (("3b",) if on_cuda else ("wide",) if quick else ("demo", "wide"))
    dtypes = dtypes or (("bf16",) if on_cuda else ("fp32",) if quick else ("fp32", "bf16"))
    pairs = pairs or (8 if on_cuda else 1 if quick else 4)
    if pairs % micro_batch_size:
        raise click.UsageError(f"--pairs: {pairs} is no multiple of --micro-batch-size {micro_batch_size}")
    rounds = rounds or (2 if quick else 5)
    named = () if not variants else QUICK_VARIANTS if quick else tuple(VARIANTS)
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # the same for all contenders
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # of the contenders; next, of this process
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_forkserver_preload(["trl.trainer.dpo_trainer", "mede2.trainer.run"])  # or each imports them

    console = Console() if Console().is_terminal else Console(width=200)
    place = environment(PACKAGES)
    console.print(", ".join(f"{key}: {value}" for key, value in place.items()), soft_wrap=True, markup=False)
    machine = {"machine": place["gpu" if on_cuda else "cpu"], "device": device}
    measured = {}
    for model in models:
        for dtype in dtypes:
            case = Case(model, dtype, device, prompt, answer, pairs, micro_batch_size)
            rows = measure(case, rounds, named, not quick, console)
            append_csv(output / "bench_step.csv", [{"date": place["date"], **machine, **place, **row} for row in rows])
            console.print(as_table(rows, case))
            measured[case] = rows
    try:
        draw(output / "bench_step.png", measured)
    except ImportError as error:
        console.print(f"absent: {output / 'bench_step.png'} ({error})", soft_wrap=True, markup=False)
    chosen = next(case for case in measured if (case.model, case.dtype) == (models[-1], dtypes[0]))
    print(json.dumps(headline(chosen, measured[chosen])))


if __name__ == "__main__":
    main()
