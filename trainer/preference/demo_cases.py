"""The demo's cases with their findings, as the steps read them."""

from pathlib import Path

import click


@click.command("demo-cases", help=__doc__)
@click.option("--output", required=True, metavar="FILE", help="Where cases.jsonl goes; pictures in images/ beside it.")
@click.option("--num", default=200, show_default=True, type=click.IntRange(min=1), help="Number of cases.")
@click.option(
    "--split", default="stage2", show_default=True, type=click.Choice(["stage1", "stage2", "heldout"]),
    help="Which of the demo's cases: no two splits share one.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Other cases of the split.")
def command(output: str, num: int, split: str, seed: int) -> None:
    from mede2.trainer.demo.records import write_cases

    write_cases(Path(output), num, seed, split)
    click.echo(f"{num} cases in {output}")
