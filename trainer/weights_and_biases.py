"""The metrics in Weights & Biases too, for those who have it installed. Imports wandb."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mede2.trainer.files import write_text
from mede2.trainer.settings import Settings

RUN_ID = "wandb_run_id"  # of an output folder: the run that a continued training goes on writing


def check_wandb() -> None:
    """Raises ValueError where a run could not start: no package (a folder `wandb` can be imported, too), no key or a
    malformed one."""
    try:
        version("wandb")
    except PackageNotFoundError as error:
        raise ValueError(
            "wandb: the package is not installed; pip install 'mede2[watch]', or leave the setting out"
        ) from error
    import wandb

    try:
        ready = wandb.setup().settings.mode in ("offline", "disabled") or wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ValueError(f"wandb: {error}") from error
    if not ready:
        raise ValueError("wandb: no API key; `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")


def start_wandb(settings: Settings, output: Path, title: str) -> None:
    """Start `wandb.run`, or go on with the one that `output` holds. On rank 0 alone.

    The x axis is our step, not wandb's own count, which refuses the updates that a resumed run does again.

    Raises:
        ValueError: it does not start, as without a network.
    """
    import wandb

    file = output / RUN_ID
    run_id = file.read_text(encoding="utf-8") if file.exists() else None
    try:
        run = wandb.init(
            project=settings.wandb, id=run_id, resume="allow", dir=output, name=f"{title}: {output}",
            config=settings.as_dict(),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise ValueError(f"wandb: {error}; with WANDB_MODE=offline the run is kept for `wandb sync`") from error
    run.define_metric("*", step_metric="step")
    write_text(file, run.id)


def started_run():
    """What `start_wandb` started."""
    import wandb

    return wandb.run
