"""The command `launch/plan.py`: whether a recipe fits a cluster, how long it takes, what to change; and its check."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mede2.trainer.commandline import fail
from mede2.trainer.planning import report
from mede2.trainer.planning.hardware import read_cluster
from mede2.trainer.planning.plan import Data, Stage, cheapest_change, make_plan, search
from mede2.trainer.planning.shapes import read_shape
from mede2.trainer.resolution import parse_assignments, read_recipe, resolve
from mede2.trainer.settings import STAGE_NAMES
from mede2.trainer.tables import Section, print_sections

SHOWN = 5  # lines of a search
OF_HEADER = "# plan:"  # a recipe's line with what the planner is told


def plan_command(root: Path) -> click.Group:
    """The group of `plan` itself and `plan check`.

    Args:
        root: of the repository: paths of DeepSpeed files in a recipe's header are relative to it.
    """

    def callback(**given):
        context = click.get_current_context()
        if context.invoked_subcommand is None:
            try:
                _plan(root, **given)
            except ValueError as error:
                fail(str(error))

    group = click.Group(
        "plan", callback=callback, invoke_without_command=True, params=_options(),
        help="Memory of each GPU, time and GPU-hours of a recipe on a cluster, from config.json alone: no GPU, no "
        "weights, no network. What is not given stands in the recipe's line `# plan:`, or is the default.",
    )  # fmt: skip
    group.add_command(_check_command(root))
    group.add_command(_header_command(root))
    return group


def _options() -> list[click.Option]:
    return [
        click.Option(["--recipe", "recipes"], metavar="FILE.yaml", multiple=True,
                     help="Settings as YAML; twice for both stages. Named ...stage1 or ...stage2, or see --stage."),
        click.Option(["--stage", "number"], type=click.IntRange(1, 2), help="Stage of the recipe."),
        click.Option(["--model"], metavar="NAME_OR_CONFIG", help="Built-in name, config.json or folder; else the "
                     "recipe's."),
        click.Option(["--ds"], metavar="FILE", help="DeepSpeed file.  [default: ds_configs/z3.json]"),
        click.Option(["--cluster"], metavar="NAME:NODESxGPUS", help="Such as h100:4x8 (a100, h100, h200, b200, "
                     "rtx4090, rtx6000ada), or a YAML file of its figures."),
        click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help="Any setting."),
        click.Option(["--examples"], type=click.IntRange(1), help="Training records.  [default: 10000]"),
        click.Option(["--held-out"], type=click.IntRange(0), help="Held-out records.  [default: 0]"),
        click.Option(["--prompt-tokens"], type=click.IntRange(1), help="Of an average prompt, images aside.  "
                     "[default: 256]"),
        click.Option(["--answer-tokens"], type=click.IntRange(1), help="Of an average answer.  [default: 512]"),
        click.Option(["--images"], type=click.IntRange(0), help="Of a prompt; InternVL: tiles.  [default: 1]"),
        click.Option(["--image-pixels"], type=click.IntRange(1), help="Of an image.  [default: max_pixels, or "
                     "448 x 448]"),
        click.Option(["--search"], is_flag=True, help="Find the fastest settings of memory that fit."),
        click.Option(["--json", "as_json"], is_flag=True, help="One JSON object in place of tables."),
        click.Option(["--plot", "plot_file"], metavar="FILE.png", help="Throughput against the number of GPUs."),
    ]  # fmt: skip


def _plan(root: Path, recipes, number, assignments, search: bool, as_json: bool, plot_file, **given) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    if not recipes and "model" not in given:
        raise ValueError("--recipe or --model: name what to plan")
    stages = [read_stage(root, recipe, number, assignments, given) for recipe in recipes or (None,)]
    if plot_file:
        report.plot(stages, Path(plot_file))
    found = []
    for stage in stages:
        plan = make_plan(stage)
        change = None if plan.fits else cheapest_change(stage)
        found.append((plan, report.verdict_of(plan, change)))
    searched = {stage.stage: _searched(stage) for stage in stages} if search else {}
    if as_json:
        plans = [report.as_json(*each) for each in found]
        together = {"plans": plans, "gpu_hours": sum(plan["gpu_hours"] for plan in plans)}
        click.echo(json.dumps(together | ({"search": searched} if searched else {})))
        return
    for each in found:
        print_sections(report.sections(*each))
    if len(found) > 1:
        hours, gpu_hours = (
            sum(values) for values in zip(*((p.total_hours, p.gpu_hours) for p, _ in found), strict=True)
        )
        click.echo(f"all stages: {hours:.2f} hours, {gpu_hours:.0f} GPU-hours")
    for stage, rows in searched.items():
        lines = [(row["change"], f"{row['memory_gib']:.1f}", f"{row['step_s']:.2f}", f"{row['tokens_per_s']:,.0f}",
                  f"{row['gpu_hours']:.0f}") for row in rows]  # fmt: skip
        columns = ("settings", "GiB", "s an update", "tokens/s", "GPU-hours")
        note = "" if rows else "Nothing fits."
        print_sections([Section(f"{STAGE_NAMES[stage]}: fastest settings that fit", columns, lines, note=note)])
    if plot_file:
        click.echo(f"plot: {plot_file}")


def _searched(stage: Stage) -> list[dict[str, Any]]:
    return [
        {"change": words, "memory_gib": plan.memory.total / 2**30, "step_s": plan.timing.step_s,
         "tokens_per_s": plan.timing.tokens_per_s, "gpu_hours": plan.gpu_hours}
        for words, plan in search(stage)[:SHOWN]
    ]  # fmt: skip


def read_stage(root: Path, recipe: str | None, number: int | None, assignments, given: Mapping[str, Any]) -> Stage:
    """The stage that a recipe and the command line describe; the line `# plan:` of the recipe is weaker than `given`.

    Raises:
        ValueError: names what is unknown or does not go together.
    """
    values = read_recipe(recipe) if recipe else {}
    told = (read_header(recipe) if recipe else {}) | dict(given)
    if number is None:
        match = re.search(r"stage([12])$", Path(recipe).stem) if recipe else None
        if recipe and match is None:
            raise ValueError(f"--stage: {recipe} does not end in stage1 or stage2; say which stage it is of")
        number = int(match[1]) if match else 2
    layers = [(f"recipe {recipe}", values), ("--set", parse_assignments(assignments))]
    settings = resolve(number, layers).settings
    model = told.get("model") or settings.model or settings.reference
    if model is None:
        raise ValueError("model: neither the recipe nor --model names one")
    if "cluster" not in told:
        raise ValueError("--cluster: not given, such as h100:4x8, and the recipe names none")
    file = Path(told.get("ds", "ds_configs/z3.json"))
    file = file if file.is_absolute() or file.exists() else root / file
    data = {name: told[name] for name in Data.__dataclass_fields__ if name in told}
    return Stage(read_shape(model), settings, number, file, read_cluster(told["cluster"]), Data(**data))


def read_header(recipe: str) -> dict[str, Any]:
    """What the line `# plan: --ds FILE --cluster h100:4x8 --examples 20000 ...` of a recipe tells the planner."""
    lines = [line for line in Path(recipe).read_text(encoding="utf-8").splitlines() if line.startswith(OF_HEADER)]
    words = shlex.split(" ".join(line.removeprefix(OF_HEADER) for line in lines))
    known = {name: option for option in _options() for name in option.opts if option.name not in ("recipes", "number")}
    found = {}
    for name, value in zip(words[::2], words[1::2], strict=len(words) % 2 == 0):
        if name not in known:
            raise ValueError(f"recipe: {recipe}: {OF_HEADER} {name}: unknown; known: {', '.join(known)}")
        try:
            found[known[name].name] = known[name].type.convert(value, known[name], None)
        except click.UsageError as error:
            raise ValueError(f"recipe: {recipe}: {OF_HEADER} {name} {value}: {error.message}") from error
    if len(words) % 2:
        raise ValueError(f"recipe: {recipe}: {OF_HEADER} {words[-1]} has no value")
    return found


def with_header(root: Path, recipe: Path) -> str:
    """A recipe's text with what the planner says now in place of what its header says.

    The header is its first lines that begin with `#`: words, the line `# plan:`, then figures and how to submit it.
    """
    lines = recipe.read_text(encoding="utf-8").splitlines()
    last = max((number for number, line in enumerate(lines) if line.startswith(OF_HEADER)), default=None)
    if last is None:
        raise ValueError(f"recipe: {recipe} has no line {OF_HEADER}")
    rest = next((n for n in range(last + 1, len(lines)) if not lines[n].startswith("#")), len(lines))
    stage = read_stage(root, str(recipe), None, (), {})
    figures = [f"# {line}" for line in report.header(make_plan(stage))]
    submit = report.submit_line(stage, recipe.resolve().relative_to(root) if recipe.resolve().is_relative_to(root)
                                else recipe)  # fmt: skip
    return "\n".join([*lines[: last + 1], *figures, f"# Submit: {submit}", *lines[rest:]]) + "\n"


def _header_command(root: Path) -> click.Command:
    def callback(recipes):
        for recipe in map(Path, recipes):
            try:
                recipe.write_text(with_header(root, recipe), encoding="utf-8")
            except (ValueError, OSError) as error:
                fail(str(error))

    return click.Command(
        "header", callback=callback, help="Write the planner's figures anew into the headers of recipes.",
        params=[click.Argument(["recipes"], nargs=-1, required=True, metavar="FILE.yaml...")],
    )  # fmt: skip


def _check_command(root: Path) -> click.Command:
    def callback(quick: bool, output):
        from mede2.trainer.planning import check

        try:
            found = check.check(check.selected(quick), root)
        except ValueError as error:
            fail(str(error))
        tables = check.sections(found)
        print_sections(tables)
        if output:
            Path(output).write_text(check.as_markdown(tables, root), encoding="utf-8")
        click.echo(json.dumps(check.summary(found)))

    return click.Command(
        "check", callback=callback, help="Measure small runs on this machine's CPU beside what the planner says of "
        "them: live tensors by category, bytes sent. Ends with one JSON object.",
        params=[
            click.Option(["--quick"], is_flag=True, help="Some of them, in under two minutes."),
            click.Option(["--output"], metavar="FILE.md", help="Write the tables with commit, machine and date too."),
        ],
    )  # fmt: skip
