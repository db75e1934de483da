"""The study on the embedded default: Stage II beside plain DPO, SFT and pairs without a criterion, for several seeds.

What is done is not done again, and after a stop the same command continues.
"""

import dataclasses
import subprocess
import time
from pathlib import Path

import click

from mede2.trainer.commandline import close_to_others

LAUNCH = Path(__file__).parent


@click.command(help=__doc__)
@click.option("--runs", default="runs/study", show_default=True, help="Folder of the study.")
@click.option("--ds", default="ds_configs/z3.json", show_default=True, help="DeepSpeed file of every run.")
@click.option("--seed", "seeds", multiple=True, default=(0, 1, 2), show_default=True, type=click.IntRange(min=0))
@click.option("--arm", "names", multiple=True, metavar="NAME", help="Only these arms, and those that they need.")
@click.option(
    "--num-cases", default=400, show_default=True, type=click.IntRange(min=1), help="Unseen cases with images."
)
@click.option("--num-rows", type=click.IntRange(min=1), help="Training records of every run; unset: as the demo has.")
def main(runs: str, ds: str, seeds: tuple[int, ...], names: tuple[str, ...], num_cases: int, num_rows: int | None):
    close_to_others()
    from mede2.trainer.demo import comparison, study
    from mede2.trainer.demo.cases import heldout_cases
    from mede2.trainer.demo.defaults import BASE_MODEL
    from mede2.trainer.files import write_json, write_text
    from mede2.trainer.policy import quiet_transformers

    quiet_transformers()
    try:
        arms = study.with_starts(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    folder, cases = Path(runs), heldout_cases(num_cases)
    of = {"base": [comparison.verdicts(cases, study.answer(BASE_MODEL, cases, folder / "base" / study.ANSWERS))]}
    for seed in dict.fromkeys(seeds):
        records = study.write_records(folder / "records" / str(seed), seed, num_rows)
        for arm in arms:
            model = folder / str(seed) / arm.name
            train(arm.stage, ds, study.flags(arm, model.parent, records, seed), model.with_suffix(".log"))
            answers = study.answer(model, cases, model / study.ANSWERS)
            of.setdefault(arm.name, []).append(comparison.verdicts(cases, answers))
    differences = comparison.compare(arms, of)
    text = comparison.tables({"base": "base"} | {arm.name: arm.title for arm in arms}, of, differences)
    write_text(folder / "study.md", text)
    write_json(folder / "study.json", [dataclasses.asdict(difference) for difference in differences])
    click.echo(f"\n{text}\nalso in {folder / 'study.md'}; the comparisons in {folder / 'study.json'}")


def train(stage: int, ds: str, flags: list[str], log: Path) -> None:
    """Run the stage's command, which finds out itself what is left to do; its output goes to the file `log`."""
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["deepspeed", str(LAUNCH / f"stage{stage}.py"), "--ds", ds, *flags]
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: exit code {done.returncode}; its output is in {log}")
    click.echo(f"{log.with_suffix('')}: done, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
