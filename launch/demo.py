"""Score the embedded default on unseen cases: the base model, Stage I and Stage II side by side."""

from pathlib import Path

import click

from mede2.trainer.commandline import close_to_others


@click.command(help=__doc__)
@click.option("--runs", default="runs", show_default=True, help="Folder that holds stage1 and stage2.")
@click.option(
    "--num-cases", default=400, show_default=True, type=click.IntRange(min=1), help="Unseen cases with images."
)
@click.option("--model", "models", multiple=True, metavar="NAME=FOLDER", help="Further models to score.")
def main(runs: str, num_cases: int, models: tuple[str, ...]) -> None:
    close_to_others()
    folders = {"Stage I": Path(runs) / "stage1", "Stage II": Path(runs) / "stage2"}
    for model in models:
        name, equals, folder = model.partition("=")
        if not equals:
            raise click.UsageError(f"--model {model}: write NAME=FOLDER")
        folders[name] = Path(folder)
    for name, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise click.UsageError(f"{name}: no model in {folder}; `make demo` trains it")

    from mede2.trainer.demo.cases import heldout_cases
    from mede2.trainer.demo.defaults import BASE_MODEL
    from mede2.trainer.demo.score import print_scores, score
    from mede2.trainer.policy import quiet_transformers

    quiet_transformers()
    cases = heldout_cases(num_cases)
    print_scores({name: score(folder, cases) for name, folder in {"base": BASE_MODEL, **folders}.items()})


if __name__ == "__main__":
    main()
