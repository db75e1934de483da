"""The command line of both stages: flags to settings, errors to one clear message."""

import os
import sys
import time
import warnings

import click

from mede2.trainer.settings import FIELDS, STAGE_NAMES, parse_assignments, read_recipe, resolve

FLAGS = (
    "model", "eval", "output", "epochs", "max_steps", "learning_rate", "beta", "global_batch_size", "micro_batch_size",
    "max_pixels", "max_length", "seed", "save_every", "eval_every", "resume",
)  # fmt: skip
PATIENCE_S = 5.0


def stage_command(stage: int) -> click.Command:
    """The click command of a stage."""

    def callback(ds, recipe, assignments, train, dry_run, local_rank, **flags):
        try:
            _run(stage, ds, recipe, assignments, train, dry_run, flags)
        except ValueError as error:
            _fail(str(error))

    flags = [
        click.Option([f"--{name.replace('_', '-')}"], type=str, default=None, help=FIELDS[name].metadata["help"])
        for name in FLAGS
    ]
    return click.Command(
        f"stage{stage}",
        callback=callback,
        help=f"{STAGE_NAMES[stage]}. Flags over recipe over defaults; with --ds alone the embedded default runs.",
        params=[
            click.Option(["--ds"], required=True, metavar="FILE", help='DeepSpeed file, such as ds_configs/z3.json; its "auto"s are filled from the settings.'),
            click.Option(["--recipe"], metavar="FILE.yaml", help="Settings as YAML."),
            click.Option(["--train"], multiple=True, metavar="FILE", help=f"{FIELDS['train'].metadata['help']} Give it once per file."),
            *flags,
            click.Option(["--dry-run"], is_flag=True, default=None, help=FIELDS["dry_run"].metadata["help"]),
            click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help=f"Any other setting: {', '.join(n for n in FIELDS if n not in FLAGS)}."),
            click.Option(["--local_rank", "--local-rank"], type=int, hidden=True, help="What launchers pass."),
        ],
    )  # fmt: skip


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
    resolve(stage, layers)  # what the user wrote is checked before anything slow is imported

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's own calls
    from mede2.trainer.demo import defaults
    from mede2.trainer.policy import quiet_transformers
    from mede2.trainer.run import run_stage
    from mede2.trainer.world import join_world

    if not own_records and not from_recipe:
        layers.insert(0, ("embedded default", defaults.recipe(stage)))
    quiet_transformers()
    run_stage(resolve(stage, layers), ds, join_world())


def _number_or_text(name: str, text: str):
    """Flags arrive as text; those of numeric settings are numbers, or an error of `resolve` says what they are not."""
    kind = str(FIELDS[name].type)
    if "int" in kind or "float" in kind:
        for parse in (int, float):
            try:
                return parse(text)
            except ValueError:
                continue
    return text


def _fail(message: str) -> None:
    """Print one error and exit with 1. Rank 0 has the first word; when it is still there after a while, the fault is
    this rank's own and it speaks itself."""
    if int(os.environ.get("RANK", "0")):
        time.sleep(PATIENCE_S)
    click.echo(f"Error: {message}", err=True)
    sys.exit(1)
