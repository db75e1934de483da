"""What a stage runs with when nothing is asked of it: the small model that ships here, its records and its recipe."""

from pathlib import Path
from typing import Any

from mede2.trainer.demo.records import write_stage1, write_stage2
from mede2.trainer.resolution import read_recipe
from mede2.trainer.settings import ELICIT

FOLDER = Path(__file__).parent
BASE_MODEL = FOLDER / "base"
NUM_TRAIN = {1: 1280, 2: 800}
NUM_EVAL = 64
EVAL_SEED = 1  # training records have seed 0; `cases.case_seed` keeps the two apart


def recipe(stage: int) -> dict[str, Any]:
    """The settings of the embedded default."""
    return read_recipe(FOLDER / f"stage{stage}.yaml")


def write_records(stage: int, folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out records of a stage; returns their jsonl files. The same files every time."""
    write = write_stage1 if stage == ELICIT else write_stage2
    return write(folder / "train", NUM_TRAIN[stage], seed=0), write(folder / "eval", NUM_EVAL, seed=EVAL_SEED)
