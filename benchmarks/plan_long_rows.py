"""What the planner says of a pair of 32,768 tokens: memory and time, rows whole, in tiles, shared by ranks.

    python benchmarks/plan_long_rows.py                  # writes benchmarks/results/long_rows.csv

Nothing is measured here: trainer/planning/ computes, and `launch/plan.py check` compares it with runs. A test keeps the
file true.
"""

import csv
import io
from pathlib import Path

from mede2.trainer.planning.hardware import read_cluster
from mede2.trainer.planning.plan import Data, Stage, make_plan
from mede2.trainer.planning.shapes import read_shape
from mede2.trainer.settings import ENHANCE, Settings

REPOSITORY = Path(__file__).resolve().parent.parent
PAIR = Data(prompt_tokens=1024, answer_tokens=15744)  # and 256 of the image: 1280 + 2 x 15744 tokens in a row
CASES = [("Qwen2.5-VL-7B-Instruct", "h100:1x8"), ("Qwen2.5-VL-32B-Instruct", "h100:2x8"),
         ("Qwen2.5-VL-72B-Instruct", "h100:4x8")]  # fmt: skip
LAYOUTS = [(1, 1, False), (1, 1, True), (1, 8, True), (2, 8, True), (4, 1, True), (4, 8, True), (8, 1, True),
           (8, 8, True)]  # fmt: skip


def rows() -> list[dict[str, str | int]]:
    """One for each model and each layout of its rows that its heads allow."""
    found = []
    for name, cluster in CASES:
        shape = read_shape(name)
        for sharing, tiles, recompute in LAYOUTS:
            settings = Settings(
                global_batch_size=64, max_length=17024, sequence_parallel_size=sharing, mlp_tiles=tiles,
                activation_checkpointing=recompute,
            )  # fmt: skip
            stage = Stage(shape, settings, ENHANCE, REPOSITORY / "ds_configs" / "z3.json", read_cluster(cluster), PAIR)
            try:
                plan = make_plan(stage)
            except ValueError:  # of heads that so many ranks cannot share
                continue
            found.append({
                "model": name, "cluster": cluster, "row_tokens": sum(row.tokens for row in stage.longest.rows),
                "activation_checkpointing": str(recompute).lower(), "sequence_parallel_size": sharing,
                "mlp_tiles": tiles, "tokens_of_a_gpu": stage.longest.own_tokens,
                "gpu_gib": f"{plan.memory.total / 2**30:.1f}", "fits": "yes" if plan.fits else "no",
                "update_s": f"{plan.timing.step_s:.1f}", "tokens_per_s": f"{plan.timing.tokens_per_s:.0f}",
            })  # fmt: skip
    return found


def as_csv() -> str:
    text = io.StringIO()
    found = rows()
    writer = csv.DictWriter(text, found[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


if __name__ == "__main__":
    path = REPOSITORY / "benchmarks" / "results" / "long_rows.csv"
    path.write_text(as_csv(), encoding="utf-8")
    print(path.read_text(encoding="utf-8"), end="")
