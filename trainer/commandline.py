"""The command line: flags to settings for both stages, groups of commands, errors as one clear message."""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import click

from mede2.trainer.ownership import OutputLost
from mede2.trainer.redaction import without_secrets
from mede2.trainer.resolution import parse_assignments, read_recipe, resolve
from mede2.trainer.settings import FIELDS, STAGE_NAMES
from mede2.trainer.stopping import EXIT_CODES, FAILED, REQUEUE, USER_ERROR, StopRequested, ask_to_requeue, watcher

FLAGS = (
    "model", "eval", "output", "epochs", "max_steps", "learning_rate", "beta", "global_batch_size", "micro_batch_size",
    "max_pixels", "max_length", "seed", "save_every", "eval_every", "resume",
)  # fmt: skip
METAVARS = {"model": "PATH_OR_HUB_NAME", "eval": "FILE", "output": "DIR", "resume": "auto|never|PATH"}
PATIENCE_S = 5.0
NOT_FOR_OTHERS = 0o027  # what files and folders are made without: all for others, writing for the group


def close_to_others() -> None:
    """Let no file that a command makes be read by every user of the machine: rows, answers and pictures may be of
    patients. The group, whom a site puts together for a project, may read; a stricter umask stays as it is."""
    os.umask(os.umask(NOT_FOR_OTHERS) | NOT_FOR_OTHERS)


def stage_command(stage: int) -> click.Command:
    """The click command of a stage."""

    def callback(ds, recipe, assignments, train, more_train, dry_run, local_rank, **flags):
        close_to_others()
        try:
            if more_train and not train:
                raise ValueError(f"{more_train[0]}: unexpected; training files follow --train")
            _run(stage, ds, recipe, assignments, train + more_train, dry_run, flags)
        except ValueError as error:
            fail(str(error))
        except OutputLost as lost:
            fail(str(lost), FAILED)
        except StopRequested as stop:
            requeue(stop)

    def flag(name: str) -> click.Option:
        metavar = METAVARS.get(name, "NUMBER")
        return click.Option([f"--{name.replace('_', '-')}"], metavar=metavar, help=FIELDS[name].metadata["help"])

    return click.Command(
        f"stage{stage}",
        callback=callback,
        help=f"{STAGE_NAMES[stage]}. Flags over recipe over defaults; with --ds alone the embedded default runs.",
        epilog=f"{EXIT_CODES}\n\n\b\nSettings for --set and recipes, with their defaults:\n"
        + "\n".join(_other_settings(stage)),
        params=[
            click.Option(["--ds"], required=True, metavar="FILE",
                         help='DeepSpeed file, such as ds_configs/z3.json; its "auto"s are filled from the settings.'),
            click.Option(["--recipe"], metavar="FILE.yaml", help="Settings as YAML."),
            click.Option(["--train"], multiple=True, metavar="FILE...", help=FIELDS["train"].metadata["help"]),
            click.Argument(["more_train"], nargs=-1, metavar=""),
            *map(flag, FLAGS),
            click.Option(["--dry-run"], is_flag=True, default=None, help=FIELDS["dry_run"].metadata["help"]),
            click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help="Any setting; see below."),
            click.Option(["--local_rank", "--local-rank"], type=int, hidden=True, help="What launchers pass."),
        ],
    )  # fmt: skip


def _other_settings(stage: int) -> list[str]:
    """A line for each setting that has no flag."""
    defaults = resolve(stage, []).settings.as_dict()
    names = [name for name in FIELDS if name not in (*FLAGS, "train", "dry_run")]
    return [
        f"  {name}={json.dumps(defaults[name])}  {FIELDS[name].metadata['help']}"
        for name in names if FIELDS[name].metadata["stage"] in (None, stage)
    ]  # fmt: skip


def _run(stage: int, ds: str, recipe: str | None, assignments, train, dry_run, flags: dict) -> None:
    given = {name: _number_or_text(name, value) for name, value in flags.items() if value is not None}
    given |= {"train": list(train)} if train else {}
    given |= {"dry_run": True} if dry_run else {}
    overrides = parse_assignments(assignments)
    if twice := sorted(given.keys() & overrides.keys()):
        raise ValueError(f"{twice[0]}: given as a flag and by --set")
    from_recipe = read_recipe(recipe) if recipe else {}

    layers = [(f"recipe {recipe}", from_recipe), ("flag", given), ("--set", overrides)]
    own_records = any("train" in layer for _, layer in layers)
    settings = resolve(stage, layers).settings  # what the user wrote is checked before anything slow is imported
    watcher.install(settings.stop_margin_s)

    from mede2.trainer import watchdog
    from mede2.trainer.demo import defaults
    from mede2.trainer.policy import quiet_transformers
    from mede2.trainer.run import run_stage
    from mede2.trainer.world import join_world

    if not own_records and not from_recipe:
        layers.insert(0, ("embedded default", defaults.recipe(stage)))
    quiet_transformers()
    watchdog.start(int(os.environ.get("RANK", "0")), settings.hang_minutes)
    try:
        watchdog.beat("joining the other ranks")
        with join_world(watchdog.collective_minutes(settings.hang_minutes)) as world:
            run_stage(resolve(stage, layers), ds, world)
    finally:
        watchdog.stop()


def _number_or_text(name: str, text: str) -> int | float | str:
    """Flags arrive as text; those of numeric settings are numbers, or `resolve` says what they are not."""
    kind = str(FIELDS[name].type)
    if "int" in kind or "float" in kind:
        for parse in (int, float):
            try:
                return parse(text)
            except ValueError:
                continue
    return text


class Commands(click.Group):
    """Commands, each imported when it is named; what a user can mend becomes one line.

    Args:
        name: of the group.
        help: for all of them.
        modules: by command: where its click command is, under the name `command`.
        extra: of setup.py, with all that the commands import beyond what is always installed.
    """

    def __init__(self, name: str, help: str, modules: Mapping[str, str], extra: str):
        launchers = click.Option(["--local_rank", "--local-rank"], type=int, hidden=True, expose_value=False)
        super().__init__(name, help=help, epilog=EXIT_CODES, params=[launchers])
        self.modules, self.extra = modules, extra

    def list_commands(self, _) -> list[str]:
        return list(self.modules)

    def get_command(self, _, name: str) -> click.Command | None:
        return importlib.import_module(self.modules[name]).command if name in self.modules else None

    def invoke(self, context: click.Context):
        close_to_others()
        try:
            return super().invoke(context)
        except ValueError as error:
            fail(str(error))
        except StopRequested as stop:
            requeue(stop)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("mede2"):
                raise
            fail(f"{error.name} is not installed; pip install 'mede2[{self.extra}]' installs all that these steps need")


def fail(message: str, code: int = USER_ERROR) -> NoReturn:
    """Print one error, without what is secret in it, and exit with `code`. Rank 0 has the first word; when another
    rank is still there after a while, the fault is its own and it speaks itself."""
    if _rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which launchers end the others; nothing is left to stop
        time.sleep(PATIENCE_S)
    click.echo(f"Error: {without_secrets(message)}", err=True)
    sys.exit(code)


def requeue(stop: StopRequested) -> NoReturn:
    """Exit with REQUEUE on every rank; rank 0 says why, and asks the batch shell for another start."""
    if not _rank():
        click.echo(f"{stop}; the same command continues")
        ask_to_requeue()
    sys.exit(REQUEUE)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
