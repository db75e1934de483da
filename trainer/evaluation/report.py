"""One report of one or several evaluations that were run before, such as one for each model of a cluster's jobs."""

from collections.abc import Sequence
from pathlib import Path

import click

from mede2.trainer.data.images import parse_window
from mede2.trainer.evaluation.store import join, read_evaluation


@click.command("report", help=__doc__)
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--output", required=True, metavar="FOLDER", help="Where report.html and report.json go.")
@click.option("--redact", is_flag=True, help="Without texts and images.")
@click.option("--grey-window", metavar="LOW,HIGH", help="Black and white in images of over 8 bits.")
@click.option("--num-shown", default=200, show_default=True, type=click.IntRange(0), help="Questions to look at.")
def command(folders: Sequence[str], output: str, redact: bool, grey_window: str | None, num_shown: int) -> None:
    from mede2.trainer.evaluation.page import print_summary, write_report

    read = [read_evaluation(Path(folder)) for folder in dict.fromkeys(folders)]
    evaluation = read[0][0] if len(read) == 1 else join([evaluation for evaluation, _ in read])
    looked = [leaks for _, leaks in read if leaks is not None]
    leaks = list({tuple(leak.items()): leak for leaks in looked for leak in leaks}.values()) if looked else None
    summary = write_report(
        evaluation, Path(output), leaks, redact=redact, num_shown=num_shown, grey_window=parse_window(grey_window)
    )
    print_summary(summary)
    click.echo(f"{Path(output) / 'report.html'}")
