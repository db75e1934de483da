"""The study on the embedded default: its arms, what each is trained on and how, and the answers of what it trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mede2.trainer.demo.cases import CRITERIA, Case
from mede2.trainer.demo.defaults import FOLDER, NUM_TRAIN
from mede2.trainer.demo.records import write_chosen, write_stage1, write_stage2
from mede2.trainer.demo.score import generate
from mede2.trainer.files import hash_file, hash_json, write_json
from mede2.trainer.settings import ELICIT, ENHANCE

ANSWERS = "answers.json"  # in a model's folder


@dataclass(frozen=True)
class Arm:
    """One way to train, run once for every seed.

    Attributes:
        name: of its folder.
        title: in the table.
        stage: whose command and whose recipe of the demo it is.
        records: a key of `write_records`.
        start: the arm that it starts from; None is the base model.
        settings: what differs from the recipe.
        against: the arms that it is compared with.
        left_out: the criterion that its pairs have no negative of.
    """

    name: str
    title: str
    stage: int
    records: str
    start: str | None = "stage1"
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: tuple[str, ...] = ("full",)
    left_out: str | None = None


PREFERENCES_ALONE = {"objective": {"sigmoid": 1}, "beta": 1, "learning_rate": 5e-5}
ARMS = (
    Arm("stage1", "Stage I", ELICIT, "demonstrations", start=None, against=()),
    Arm("full", "Stage II (DPO and NLL)", ENHANCE, "pairs", against=("stage1",)),
    Arm("dpo", "Stage II by plain DPO", ENHANCE, "pairs", settings=PREFERENCES_ALONE, against=("stage1", "full")),
    Arm("sft", "control: SFT on the chosen", ELICIT, "chosen", settings={"learning_rate": 5e-4}),
    *(
        Arm(
            f"without_{criterion}", f"Stage II without {criterion}", ENHANCE, f"pairs without {criterion}",
            left_out=criterion,
        )
        for criterion in CRITERIA
    ),
)  # fmt: skip


def write_records(folder: Path, seed: int, num: int | None = None) -> dict[str, Path]:
    """Write what the arms train on: other cases for each seed, the same for every arm of a seed; seed 0 has the demo's.

    Args:
        folder: of the files.
        seed: of the cases, and so of their negatives.
        num: rows of each file; None: as many as the demo has.

    Returns:
        The jsonl files by the names that `Arm.records` has.
    """
    demonstrations, pairs = (num or NUM_TRAIN[stage] for stage in (ELICIT, ENHANCE))
    every_pair = write_stage2(folder, pairs, seed)
    return {
        "demonstrations": write_stage1(folder, demonstrations, seed),
        "pairs": every_pair,
        "chosen": write_chosen(every_pair),
        **{f"pairs without {criterion}": write_stage2(folder, pairs, seed, criterion) for criterion in CRITERIA},
    }


def with_starts(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, those that they start from or are compared with, in the order of `ARMS`; none: all.

    Raises:
        ValueError: an unknown name.
    """
    known = {arm.name: arm for arm in ARMS}
    wanted: set[str] = set()
    waiting = list(names or known)
    while waiting:
        name = waiting.pop()
        if name not in known:
            raise ValueError(f"arm: {name!r} is not one of {', '.join(known)}")
        if name not in wanted:
            wanted.add(name)
            waiting += [other for other in (known[name].start, *known[name].against) if other]
    return [arm for arm in ARMS if arm.name in wanted]


def flags(arm: Arm, folder: Path, records: Mapping[str, Path], seed: int) -> list[str]:
    """The flags of the stage's command that train an arm into `folder`/its name, beside the one that it starts from."""
    start = ["--model", str(folder / arm.start)] if arm.start else []
    settings = [part for name, value in arm.settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return [
        "--output", str(folder / arm.name), "--recipe", str(FOLDER / f"stage{arm.stage}.yaml"),
        "--train", str(records[arm.records]), "--seed", str(seed), *start, *settings,
    ]  # fmt: skip


def answer(model: Path, cases: Sequence[Case], kept: Path) -> list[str]:
    """The model's greedy answers to the cases, kept in the file `kept`, and read from there if it has just these."""
    key = {
        "weights": hash_json([hash_file(path) for path in sorted(model.glob("*.safetensors"))]),
        "cases": [case.seed for case in cases],
    }
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if key == {name: found[name] for name in key}:
            return found["answers"]
    answers = generate(model, cases)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, key | {"answers": answers})
    return answers
