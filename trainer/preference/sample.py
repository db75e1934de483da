"""K answers of a model to each case."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mede2.trainer.answering.jobs import ANSWER, Job, plan
from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.options import LOCAL_OPTIONS, SERVER_OPTIONS, asking_options, option
from mede2.trainer.data.images import parse_window
from mede2.trainer.questions.cases import read_cases, read_system
from mede2.trainer.questions.rows import Row, write_rows
from mede2.trainer.stopping import EXIT_CODES, watcher


def write_samples(output: Path, jobs: Sequence[Job], answers: Sequence[Row], model: str, settings: Row) -> None:
    """Write samples.jsonl: every answer, in the order of the jobs."""
    write_rows(
        output,
        (
            {"case": job.case.id, "sample": job.sample, "seed": job.seed}
            | {name: answer[name] for name in ANSWER}
            | {"model": model, "settings": settings, "key": answer["key"]}
            for job, answer in zip(jobs, answers, strict=True)
        ),
    )


HELP = """K answers of a model to each case.

Without --base-url the model runs here, in transformers; `torchrun --nproc_per_node 8 -- launch/pairs.py sample ...`
shares the answers out over ranks. With it an OpenAI-compatible server (vLLM, SGLang) is asked.

Finished answers lie in .OUTPUT.journal/ beside the output, under the hash of all that they depend on, so the same
command again continues where it was stopped, and costs nothing when all are there. Only an answer whose reply was still
on its way from the server when the command was killed, or the connection cut, is asked for again. OUTPUT is written
whole at the end, in the order of the cases."""


@click.command("sample", help=HELP, short_help=__doc__, epilog=EXIT_CODES)
@option("--cases", "cases_file", required=True, metavar="FILE", help="cases.jsonl")
@option("--output", required=True, metavar="FILE", help="samples.jsonl")
@option("--model", required=True, metavar="NAME", help="Model folder or hub name, or the server's name for its model.")
@option("--num", default=4, type=click.IntRange(1), help="Answers to each case.")
@option("--base-url", metavar="URL", help="A server, such as http://127.0.0.1:8000/v1")
@asking_options
@click.pass_context
def command(
    context: click.Context, cases_file: str, output: str, model: str, num: int, seed: int, base_url: str | None,
    system: str | None, grey_window: str | None, temperature: float, top_p: float, max_tokens: int, **options: Any,
) -> None:  # fmt: skip
    for name in LOCAL_OPTIONS if base_url else SERVER_OPTIONS:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise ValueError(f"--{name.replace('_', '-')}: only {'without' if base_url else 'with'} --base-url")
    if temperature == 0 and num > 1:
        raise ValueError(f"--num {num}: at temperature 0 all answers to a case are the same; say --num 1")
    watcher.install()
    text = read_system(system)
    jobs = plan(read_cases(Path(cases_file)), num, seed, text)
    settings = {
        "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "system": text,
        "grey_window": parse_window(grey_window),
    }  # fmt: skip
    chosen = {name: options[name] for name in (SERVER_OPTIONS if base_url else LOCAL_OPTIONS)}
    if base_url:
        from mede2.trainer.answering.server import ServerModel

        asked = ServerModel(model, base_url, **chosen)
        with Journal(Path(output)) as journal:
            write_samples(Path(output), jobs, asked.answer(jobs, settings, journal), model, settings | asked.identity)
    else:
        sample_here(jobs, Path(output), model, settings, **chosen)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"{len(jobs)} answers to {len(jobs) // num} cases in {output}")


def sample_here(
    jobs: Sequence[Job], output: Path, model: str, settings: Row, *, batch_size: int, max_pixels: int | None
) -> None:
    """Every answer from a model in this process and its ranks."""
    from mede2.trainer.answering.local import PATIENCE_MINUTES, LocalModel
    from mede2.trainer.world import join_world

    with join_world(PATIENCE_MINUTES) as world:
        asked = LocalModel(model, batch_size=batch_size, max_pixels=max_pixels, world=world)
        with Journal(output, world.rank) as journal:
            answers = asked.answer(jobs, settings, journal)
            world.on_main(lambda: write_samples(output, jobs, answers, model, settings | asked.identity))
