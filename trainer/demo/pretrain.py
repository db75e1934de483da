"""Makes the base model that ships in this folder from random weights, with the loop of Stage I.

python -m mede2.trainer.demo.pretrain --ds ds_configs/z3.json
"""

import json
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path

import click

from mede2.trainer.demo.defaults import BASE_MODEL, FOLDER
from mede2.trainer.resolution import read_recipe, resolve
from mede2.trainer.settings import ELICIT

MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@click.command(help=__doc__)
@click.option("--ds", required=True, metavar="FILE", help="DeepSpeed file.")
@click.option("--runs", default="runs/base", show_default=True, help="Folder of the two runs and their records.")
@click.option("--num-rows", default=16_000, show_default=True, help="Pretraining rows.")
@click.option("--seed", default=0, show_default=True, help="Of the weights, the rows and their order.")
@click.option("--ship/--no-ship", default=True, show_default=True, help="Put the model in the package.")
@click.option("--local_rank", type=int, hidden=True)
def main(ds: str, runs: str, num_rows: int, seed: int, ship: bool, local_rank: int | None) -> None:
    from mede2.trainer.demo.model import build_base
    from mede2.trainer.demo.records import write_pretraining
    from mede2.trainer.policy import quiet_transformers
    from mede2.trainer.prepare import SUMMARY
    from mede2.trainer.run import run_stage
    from mede2.trainer.world import join_world

    quiet_transformers()
    world, folder = join_world(), Path(runs)
    if world.is_main:
        build_base(folder / "random", seed)
        every = write_pretraining(folder / "records", num_rows, seed)
        rows = every.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "records" / "words.jsonl").write_text("".join(row for row in rows if '"images"' not in row), "utf-8")
        every.rename(folder / "records" / "pictures.jsonl")
    world.barrier()

    recipe, model, seconds = read_recipe(FOLDER / "pretraining.yaml"), folder / "random", 0.0
    for part in ("words", "pictures"):
        inputs = {"model": str(model), "train": [str(folder / "records" / f"{part}.jsonl")], "seed": seed}
        inputs["output"] = str(folder / part)
        layers = [("pretraining.yaml", recipe["both"] | recipe[part]), ("pretraining", inputs)]
        model = run_stage(resolve(ELICIT, layers), ds, world)
        seconds += json.loads((model / SUMMARY).read_text(encoding="utf-8"))["seconds"]
    if ship and world.is_main:
        BASE_MODEL.mkdir(exist_ok=True)
        for name in MODEL_FILES:
            shutil.copyfile(model / name, BASE_MODEL / name)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False)
        made = {
            "command": f"python -m mede2.trainer.demo.pretrain --ds {ds} --num-rows {num_rows} --seed {seed}",
            "minutes": round(seconds / 60, 1), "machine": f"{platform.machine()}, {world.size} process",
            "date": date.today().isoformat(), "commit": commit.stdout.strip(), "settings": recipe,
        }  # fmt: skip
        (BASE_MODEL / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
