"""The benchmarks that an evaluation can read: what to download, where it goes, and what to say."""

import json
import textwrap

import click

from mede2.trainer.questions.benchmarks import BENCHMARKS, OWN, Benchmark

COLUMNS = 100
LABEL = 14  # columns before a value


def say(benchmark: Benchmark) -> str:
    """What the command line is told to read it."""
    return f"--benchmark {benchmark.name}={'FILE.jsonl' if benchmark.name == OWN else 'PATH'}"


def describe(benchmark: Benchmark) -> str:
    """A paragraph of lines of at most COLUMNS characters."""
    lines = {
        "download": benchmark.download,
        "PATH is": benchmark.path,
        "licence": benchmark.licence,
        "by": ", ".join(benchmark.groups).replace("_", " ") or "nothing",
    }
    wrapped = [
        textwrap.fill(
            value, COLUMNS, initial_indent=f"    {label:<{LABEL - 4}}", subsequent_indent=" " * LABEL,
            break_long_words=False, break_on_hyphens=False,
        )
        for label, value in lines.items()
    ]  # fmt: skip
    heading = textwrap.fill(f"{benchmark.name}  {benchmark.title}", COLUMNS, subsequent_indent=" " * LABEL)
    return "\n".join([heading, *wrapped, f"    {'say':<{LABEL - 4}}{say(benchmark)}"])


@click.command("list", help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": benchmark.name,
                "title": benchmark.title,
                "download": benchmark.download,
                "path": benchmark.path,
                "licence": benchmark.licence,
                "groups": benchmark.groups,
                "say": say(benchmark),
            }
            for benchmark in BENCHMARKS.values()
        ]
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo("\n\n".join(map(describe, BENCHMARKS.values())))
