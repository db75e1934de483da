"""Models asked the questions of benchmarks, their answers read and told on one page."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.options import LOCAL_OPTIONS, SERVER_OPTIONS, asking_options, option
from mede2.trainer.data.images import Window, parse_window
from mede2.trainer.evaluation.answered import PROBES, Evaluation
from mede2.trainer.evaluation.asking import Model, Questions, ask, drawn_questions, greedy_questions, read_questions
from mede2.trainer.evaluation.store import write_evaluation
from mede2.trainer.questions.benchmarks import parse_benchmark
from mede2.trainer.questions.cases import read_system
from mede2.trainer.questions.rows import Row
from mede2.trainer.stopping import EXIT_CODES, watcher

SERVED = re.compile(r"(?P<model>.+)@(?P<url>https?://.+)")

HELP = f"""Ask models the questions of benchmarks; tell on one page how they did and whether they looked at the image.

Every question is answered once greedily; with --probe also with images that do not show the case ({", ".join(PROBES)};
`all` for all four); with --samples N also N times at --temperature, for the curve of accuracy against N. The first
--model is what the others are compared with.

OUTPUT holds answers.jsonl, questions.jsonl, evaluation.json, report.html and report.json. Answers lie in a journal
beside them under the hash of weights, question, images and seed: the same command again costs nothing, one that was
killed goes on, and one with a model or a benchmark more asks only for what is new. `torchrun --nproc_per_node 8
launch/evaluate.py run ...` shares the answers out over ranks. A model that does not fit on one device is asked through
a server, NAME=MODEL@URL."""


@click.command("run", help=HELP, short_help=__doc__, epilog=EXIT_CODES)
@option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="NAME=FOLDER|NAME=MODEL@URL",
    help="A model and what the report calls it: folder, hub name, or the name on a server. Several times.",
)
@option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    required=True,
    metavar="NAME=PATH",
    help="Questions: see `evaluate.py list`; one's own as cases=FILE.jsonl. Several times.",
)
@option("--output", required=True, metavar="FOLDER", help="Where everything goes.")
@option("--probe", "probes", multiple=True, type=click.Choice([*PROBES, "all"]), help="Several times, or `all`.")
@option("--samples", "num_samples", default=0, type=click.IntRange(0), help="Answers drawn to each question.")
@option("--limit", type=click.IntRange(1), help="So many questions of each benchmark, always the same ones. [all]")
@option("--training", multiple=True, metavar="FILE", help="What a model was trained on, searched for the questions.")
@option("--redact", is_flag=True, help="No texts and images in the report.")
@option("--num-shown", default=200, type=click.IntRange(0), help="Questions to look at in the report.")
@asking_options
@click.pass_context
def command(
    context: click.Context, models: Sequence[str], benchmarks: Sequence[str], output: str, probes: Sequence[str],
    num_samples: int, limit: int | None, training: Sequence[str], redact: bool, num_shown: int, seed: int,
    temperature: float, top_p: float, max_tokens: int, system: str | None, grey_window: str | None, **options: Any,
) -> None:  # fmt: skip
    named = parse_models(models)
    kinds = PROBES if "all" in probes else tuple(dict.fromkeys(probes))
    if num_samples and temperature == 0:
        raise ValueError(f"--samples {num_samples}: at temperature 0 all answers to a question are the same")
    served = [bool(SERVED.fullmatch(model)) for model in named.values()]
    for name in [*(() if any(served) else SERVER_OPTIONS), *(LOCAL_OPTIONS if all(served) else ())]:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            kind = "NAME=MODEL@URL" if name in SERVER_OPTIONS else "NAME=FOLDER"
            raise ValueError(f"--{name.replace('_', '-')}: only with a --model {kind}")
    files = parse_benchmarks(benchmarks)
    folder, window = Path(output), parse_window(grey_window)
    settings = {"max_tokens": max_tokens, "system": read_system(system), "grey_window": window}

    watcher.install()
    from mede2.trainer.answering.local import PATIENCE_MINUTES
    from mede2.trainer.evaluation.page import print_summary, write_report
    from mede2.trainer.world import join_world

    with join_world(PATIENCE_MINUTES) as world:
        questions, about = world.on_main(lambda: read_questions(files, folder / "images", limit))
        leaks = world.on_main(lambda: find_leaks(training, questions, window)) if training else None
        greedy = world.on_main(lambda: greedy_questions(questions, kinds, folder / "images", seed, settings))
        drawn = drawn_questions(questions, num_samples, seed, settings)
        answers, identities = [], {}
        with Journal(folder / "answers.jsonl", world.rank) as journal:
            for name, text in named.items():
                world.say(f"{name}: {text}")
                model = _model(text, options, world)
                identities[name] = {"model": text} | model.identity
                answers += ask(name, model, greedy, settings | {"temperature": 0.0, "top_p": 1.0}, journal)
                if drawn:
                    answers += ask(name, model, drawn, settings | {"temperature": temperature, "top_p": top_p}, journal)

        def tell() -> None:
            told = settings | {"models": identities, "benchmarks": about, "probes": list(kinds), "samples": num_samples}
            told |= {"temperature of samples": temperature, "top_p": top_p, "seed": seed} if num_samples else {}
            told |= {"versions": {name: version(name) for name in ("mede2", "torch", "transformers")}}
            evaluation = Evaluation(tuple(named), questions, answers, told)
            write_evaluation(evaluation, leaks, folder)
            summary = write_report(evaluation, folder, leaks, redact=redact, num_shown=num_shown, grey_window=window)
            print_summary(summary)
            click.echo(f"{folder / 'report.html'}")

        world.on_main(tell)


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """NAME=MODEL, each name once."""
    named = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name.strip() or not model.strip():
            raise ValueError(f"--model {text}: NAME=FOLDER or NAME=MODEL@URL, such as base=Qwen/Qwen2.5-VL-7B-Instruct")
        if name in named:
            raise ValueError(f"--model {text}: {name!r} is the name of {named[name]} already; give each its own")
        if served := SERVED.fullmatch(model):
            from mede2.trainer.answering.chat import check_address

            check_address(served["url"])
        named[name] = model
    return named


def parse_benchmarks(benchmarks: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """The format and the path of each benchmark, by its name in the report."""
    files = {}
    for text in benchmarks:
        name, adapter, path = parse_benchmark(text)
        if name in files:
            raise ValueError(f"--benchmark {text}: {name!r} twice; the other is {files[name][1]}")
        files[name] = adapter, path
    return files


def find_leaks(training: Sequence[str], questions: Questions, window: Window) -> list[Row]:
    """Where training files hold the questions, as the report has it."""
    from mede2.trainer.preference.leakage import leaks_of_files, to_row

    asked = {name: list(cases.values()) for name, cases in questions.items()}
    return [to_row(leak) for leak in leaks_of_files(list(map(Path, training)), asked, grey_window=window)]


def _model(text: str, options: dict[str, Any], world) -> Model:
    """The model that a --model names."""
    if served := SERVED.fullmatch(text):
        from mede2.trainer.answering.server import ServerModel

        return ServerModel(served["model"], served["url"], **{name: options[name] for name in SERVER_OPTIONS})
    from mede2.trainer.answering.local import LocalModel

    return LocalModel(text, **{name: options[name] for name in LOCAL_OPTIONS}, world=world)
