"""kill -9 of one or all ranks of a Stage II run on two ranks, again and again: does every run end as if undisturbed?

A run is killed up to PER_RUN times; after each kill the same command is started again, and at last it runs to its end.
Its rows of metrics must then be those of an undisturbed run, each update once and every value but times equal to the
last digit, its exported weights must have the same sha256, each start must have gone on from the newest complete
checkpoint, and every checkpoint that is left must be whole by its manifest.

Where a rank is killed is drawn from the seed: first a phase (see PHASES), then one of the moments that an undisturbed
run was seen to go through in it, on either rank (campaign_rank.py wraps the functions of a phase); "any" is a time by
the clock. A drawn moment that a run does not come to ends the campaign with an error. The recipe has whatever must be
restored: dropout (random number generators), an objective with a state, epochs that end between checkpoints.

Ranks are forked from a server that has the imports done, unless --launcher names a real launcher. --sabotage takes a
part of the restoring out, and the campaign must then fail.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

import click
from bench_logps import REPOSITORY, append_csv, environment
from campaign_rank import OF_UPDATES, Job, Moment, write_model
from campaign_start import LAUNCHERS, RANKS, Start, start_ranks
from rich.console import Console
from rich.table import Table

from mede2.trainer.demo.records import write_stage2

PHASES = {  # what is killed in each, in the order in which a run comes to them
    "start": "the files that a start writes before it trains",
    "reference": "the pass of the reference model, and its cache",
    "resume": "the loading of a checkpoint",
    "step": "forward, backward, update, row of metrics",
    "epoch": "between two epochs",
    "evaluation": "of the held-out records",
    "save": "the files of a checkpoint and their hashes",
    "rename": "of the manifest, of the checkpoint, of the old ones that are deleted",
    "export": "of the model, and the summary",
    "any": "a time by the clock",
}
PER_RUN = 4  # kills, at most
QUICK_KILLS = 10
NUM_PAIRS, NUM_HELD_OUT = 12, 4
SAVE_EVERY = 2
RECIPE = (
    "--epochs", "3", "--global-batch-size", "4", "--micro-batch-size", "1", "--learning-rate", "1e-3",
    "--save-every", str(SAVE_EVERY), "--eval-every", "3", "--max-length", "512", "--set", "dtype=fp32",
    "--set", "lora_rank=4", "--set", "lora_dropout=0.2", "--set", "num_workers=1", "--set", "keep_checkpoints=2",
    "--set", "objective={sigmoid: 1, bco_pair_shifted: 0.2, nll: 1}",
)  # fmt: skip
OF_TIME = re.compile("_(ms|s|gib)$")  # metrics that measure this very run
RESUMING = ("load_checkpoint begins", "load_checkpoint ends")  # an undisturbed run never comes to it
PRELOADED = ["peft", "torch.utils.tensorboard", "mede2.trainer.run"]  # imports of the fork server
VICTIMS = ((0, 1), (0, 1), (0,), (1,))  # drawn from


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its rows of metrics without times, the sha256 of its weights, and what is wrong in itself."""

    rows: list[dict]
    weights: dict[str, str]
    faults: list[str]


def outcome_of(output: Path) -> Outcome:
    """Of a run that has ended."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, faults = [row["step"] for row in rows], []
    if steps != list(range(1, len(rows) + 1)):
        faults.append(f"rows of updates {steps}")
    for marker in sorted(output.glob("checkpoints/step-*/complete.json")):
        for name, file in json.loads(marker.read_text(encoding="utf-8"))["files"].items():
            if not (marker.parent / name).exists() or sha256(marker.parent / name) != file["sha256"]:
                faults.append(f"{marker.parent / name} is damaged")
    rows = [{name: value for name, value in row.items() if not OF_TIME.search(name)} for row in rows]
    return Outcome(rows, {path.name: sha256(path) for path in sorted(output.glob("*.safetensors"))}, faults)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Run:
    """One run: its kills, as rows of the table, and what is wrong with it."""

    folder: Path
    kills: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    identical_losses: bool = False
    identical_weights: bool = False

    @property
    def output(self) -> Path:
        return self.folder / "stage2"

    @property
    def done(self) -> bool:
        return (self.output / "summary.json").exists()

    def newest(self) -> int:
        """The update of the newest complete checkpoint; 0: there is none."""
        markers = self.output.glob("checkpoints/step-*/complete.json")
        return max((int(marker.parent.name.removeprefix("step-")) for marker in markers), default=0)

    def is_ahead(self, moment: Moment) -> bool:
        """Whether the next start will come to a moment."""
        if self.done:
            return False
        if moment.phase in OF_UPDATES:
            return moment.update > self.newest()
        if moment.phase == "reference":
            return not any(self.folder.glob("reference_cache/*.safetensors"))
        return moment.phase != "resume" or self.newest() > 0


class Campaign:
    """Runs of one command on two ranks.

    Args:
        folder: for records and runs.
        seed: of what is drawn.
        launcher: of the ranks, see `start_ranks`.
        say: told what happens.
    """

    def __init__(self, folder: Path, seed: int = 0, launcher: str = "fork", say: Callable[[str], None] = print):
        self.folder, self.launcher, self.say = folder, launcher, say
        self.rng = random.Random(seed)
        self.train = write_stage2(folder / "train", NUM_PAIRS, seed=0)
        self.held_out = write_stage2(folder / "held_out", NUM_HELD_OUT, seed=1)
        self.model = folder / "model"
        set_forkserver_preload(PRELOADED)
        writer = get_context("forkserver").Process(target=write_model, args=(self.model,))
        writer.start()
        writer.join()
        self.undisturbed: Outcome | None = None
        self.moments: list[tuple[int, Moment]] = []  # of the undisturbed run, with their ranks
        self.seconds = 0.0  # that it took

    def command(self, output: Path) -> list[str]:
        """Arguments of launch/stage2.py."""
        files = {
            "--ds": REPOSITORY / "ds_configs" / "z3.json", "--model": self.model, "--train": self.train,
            "--eval": self.held_out, "--output": output,
        }  # fmt: skip
        return [*(str(part) for pair in files.items() for part in pair), *RECIPE]

    def start(self, run: Run, launcher: str = "", after_s: float | None = None, **job) -> Start:
        """Start a run, or start it again, and wait for its end."""
        run.folder.mkdir(exist_ok=True)
        reports = tempfile.mkdtemp(prefix="start-", dir=run.folder)
        return start_ranks(self.command(run.output), Job(reports, **job), launcher or self.launcher, after_s)

    def see(self) -> None:
        """Let a run go undisturbed: what it leaves is what all must leave, and its moments are those to draw from."""
        run = Run(self.folder / "undisturbed")
        start = self.start(run, "fork", records=True)
        if any(start.codes):
            raise click.ClickException(f"the undisturbed run ended with {start.codes}:\n{start.log[-3000:]}")
        self.undisturbed, self.seconds = outcome_of(run.output), start.seconds
        if not (self.undisturbed.rows and self.undisturbed.weights) or self.undisturbed.faults:
            raise click.ClickException(f"the undisturbed run is not whole: {self.undisturbed}")
        for path in sorted(run.folder.glob("start-*/moments-*")):
            lines = path.read_text().splitlines()
            self.moments += [(int(path.name.removeprefix("moments-")), Moment(**json.loads(line))) for line in lines]
        seen = {moment.phase for _, moment in self.moments}
        if missing := [phase for phase in PHASES if phase not in (*seen, "resume", "any")]:
            raise click.ClickException(f"no moment of {', '.join(missing)} was seen: a run calls something else now")
        num_updates, num_moments = len(self.undisturbed.rows), len(self.moments)
        self.say(f"undisturbed: {num_updates} updates, {self.seconds:.1f} s, {num_moments} moments")

    def kill(self, number: int, sabotage: str | None = None) -> Iterator[Run]:
        """So many kills, spread over the phases; every run goes to its end, is judged, and then yielded."""
        if self.undisturbed is None:
            self.see()
        phases: list[str] = []
        while len(phases) < number:
            some = ["step", "evaluation", "save"] if sabotage else list(PHASES)
            phases += self.rng.sample(some, len(some))
        first = SAVE_EVERY + 1 if sabotage else 0  # what is not restored shows only where something is
        waiting = phases[:number]
        while waiting:
            run = Run(Path(tempfile.mkdtemp(prefix="run-", dir=self.folder)))
            drawn = [self._draw(phase, lambda moment: moment.update >= first) for phase in waiting[:PER_RUN]]
            del waiting[:PER_RUN]
            for rank, moment in sorted(drawn, key=self._place):
                if run.faults:
                    break
                if run.done:
                    waiting.append(moment.phase)
                    continue
                if not run.is_ahead(moment):
                    rank, moment = self._draw_ahead(moment.phase, run)
                if not self._kill_at(run, rank, moment, sabotage) and not run.faults:
                    waiting.append(moment.phase)
            self._finish(run, sabotage)
            if run.kills or run.faults:
                yield run

    def _draw(self, phase: str, fits: Callable[[Moment], bool]) -> tuple[int, Moment] | None:
        """A moment of a phase and the rank that comes to it; None: none fits."""
        if phase == "any":
            return 0, Moment(phase, "", "", 0, 1)
        if phase == "resume":
            return self.rng.choice(RANKS), Moment(phase, self.rng.choice(RESUMING), "", 0, 1)
        found = [(rank, moment) for rank, moment in self.moments if moment.phase == phase and fits(moment)]
        if not found:
            return None
        name = self.rng.choice(sorted({moment.name for _, moment in found}))
        return self.rng.choice([pair for pair in found if pair[1].name == name])

    def _place(self, drawn: tuple[int, Moment]) -> tuple[int, int, int]:
        """Where in a run a moment comes: kills of one run are made in this order."""
        _, moment = drawn
        if moment.phase in ("any", "start", "reference", "export"):
            order = {"any": 0, "start": 1, "reference": 2, "export": 4}[moment.phase]
            return order, 0, 0 if moment.phase == "any" else self.moments.index(drawn)
        if moment.phase == "resume":
            return 3, self.rng.randint(SAVE_EVERY + 1, len(self.undisturbed.rows)), 0
        return 3, moment.update, self.moments.index(drawn)

    def _draw_ahead(self, phase: str, run: Run) -> tuple[int, Moment]:
        """A moment that a run, which is past the one first drawn, will come to, of the same phase if it can be."""
        for other in (phase, "step", "export"):
            drawn = self._draw(other, run.is_ahead)
            if drawn is not None and run.is_ahead(drawn[1]):
                return drawn
        raise AssertionError(f"nothing is ahead of {run}")

    def _kill_at(self, run: Run, rank: int, moment: Moment, sabotage: str | None) -> bool:
        """Start a run and kill it; False: it ended before."""
        victims, newest = self.rng.choice(VICTIMS), run.newest()
        if moment.phase == "any":
            start = self.start(run, "", self.rng.uniform(0.0, self.seconds), victims=victims, sabotage=sabotage)
        else:
            start = self.start(run, moment=moment, trigger=rank, victims=victims, sabotage=sabotage)
        if start.moment is None:
            if any(start.codes):
                run.faults.append(f"ended with {start.codes} before it was killed:\n{start.log[-2000:]}")
            elif moment.phase != "any":
                raise click.ClickException(f"rank {rank} never came to {moment}")
            self.seconds /= 2  # it was slower when it was measured
            return False
        if start.came_from not in (None, newest):
            run.faults.append(f"continued from update {start.came_from}, though {newest} is complete")
        row = {
            "launcher": self.launcher, "sabotage": sabotage or "", **asdict(start.moment), "trigger": rank,
            "killed": "all" if len(victims) > 1 else str(victims[0]), "resumed_from": run.newest(),
            "survivors": start.survivors, "seconds": round(start.seconds, 2),
        }  # fmt: skip
        run.kills.append(row)
        self.say(
            f"  {moment.phase}: {start.moment.name} {start.moment.target}, update {start.moment.update or '-'}; killed "
            f"{row['killed']}, survivors {row['survivors']}; goes on from {row['resumed_from']}"
        )
        return True

    def _finish(self, run: Run, sabotage: str | None) -> None:
        """Let a run go to its end and compare what it leaves."""
        newest, done = run.newest(), run.done
        if not run.faults:
            start = self.start(run, sabotage=sabotage)
            if any(start.codes):
                run.faults.append(f"at last ended with {start.codes}:\n{start.log[-2000:]}")
            elif (start.came_from or 0) != newest and not done:
                run.faults.append(f"continued from update {start.came_from or 0}, though {newest} is complete")
        if not run.faults:
            outcome = outcome_of(run.output)
            run.faults += outcome.faults
            run.identical_losses = outcome.rows == self.undisturbed.rows
            run.identical_weights = outcome.weights == self.undisturbed.weights
        self.say(
            f"{run.folder.name}: {len(run.kills)} kills, losses {told(run.identical_losses)}, weights "
            f"{told(run.identical_weights)}{''.join(f'; {fault}' for fault in run.faults)}"
        )


def told(identical: bool) -> str:
    return "identical" if identical else "DIFFER"


def headline(runs: list[Run]) -> dict[str, int]:
    """Of the last line."""
    return {
        "kills": sum(len(run.kills) for run in runs), "runs": len(runs),
        "identical": sum(run.identical_losses and run.identical_weights for run in runs),
        "lost": sum(bool(run.faults) for run in runs),
    }  # fmt: skip


def as_rows(run: Run) -> list[dict]:
    """A row for each kill of a run that is judged."""
    judged = {
        "identical_losses": run.identical_losses, "identical_weights": run.identical_weights,
        "lost": "; ".join(run.faults).partition("\n")[0],
        "left_over": " ".join(sorted(path.name for path in run.folder.rglob("*.partial"))),
    }  # fmt: skip
    return [{"kill": number, **row, **judged} for number, row in enumerate(run.kills, start=1)]


def as_table(rows: list[dict], title: str) -> Table:
    """Kills by phase."""
    table = Table(title=title, title_justify="left")
    for heading in ("phase", "kills", "of all ranks", "of one", "run ended identical", "differs", "lost"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase in PHASES:
        of_phase = [row for row in rows if row["phase"] == phase]
        identical = sum(row["identical_losses"] and row["identical_weights"] and not row["lost"] for row in of_phase)
        lost, both = sum(bool(row["lost"]) for row in of_phase), sum(row["killed"] == "all" for row in of_phase)
        counts = (len(of_phase), both, len(of_phase) - both, identical, len(of_phase) - identical - lost, lost)
        table.add_row(phase, *map(str, counts))
    return table


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), help=f"Default: 30, {QUICK_KILLS} if --quick.")
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
@click.option("--quick", is_flag=True, help="Under three minutes on two cores.")
@click.option(
    "--launcher", type=click.Choice(["fork", *LAUNCHERS]), default="fork", show_default=True, help="Of the ranks."
)
@click.option(
    "--sabotage", type=click.Choice(["rng", "data"]), help="Take out the restoring of random number generators, or of "
    "the position in the data: the campaign must fail.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=REPOSITORY / "benchmarks" / "results",
    help="Folder of campaign_faults.csv, which grows; not by a sabotaged campaign.  [default: benchmarks/results]",
)  # fmt: skip
def main(kills, seed, quick, launcher, sabotage, output) -> None:
    kills = kills or (QUICK_KILLS if quick else 30)
    output.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    os.environ["PYTHONSAFEPATH"] = "1"  # of the fork server, which would take our folder kernels/ for a package
    console = Console() if Console().is_terminal else Console(width=175)
    place = environment(("deepspeed", "transformers"))
    console.print(", ".join(f"{key}: {value}" for key, value in place.items()), soft_wrap=True, markup=False)
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    campaign = Campaign(folder, seed, launcher, lambda text: console.print(text, markup=False, soft_wrap=True))
    runs, rows = [], []
    for run in campaign.kill(kills, sabotage):
        runs.append(run)
        of_run = [{**place, "seed": seed, "run": len(runs), **row} for row in as_rows(run)]
        rows += of_run
        if of_run and not sabotage:
            append_csv(output / "campaign_faults.csv", of_run)
    found = headline(runs)
    whole = found["identical"] == found["runs"] and not found["lost"]
    if whole:
        shutil.rmtree(folder)
    else:
        console.print(f"what is left of the runs: {folder}", markup=False)
    console.print(as_table(rows, f"seed {seed}, launcher {launcher}{f', without {sabotage}' if sabotage else ''}"))
    print(json.dumps(found))
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
