"""The scaling benchmark at its smallest; no time is judged."""

import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from mede2.trainer.planning.command import read_stage
from mede2.trainer.planning.hardware import read_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bench_scaling")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_is_measured_and_the_curve_stands_beside_it(run, tmp_path):
    sizes = ("--model", "demo", "--ranks", "1", "--updates", "2", "--rounds", "1", "--prompt", "64", "--answer", "16")
    done = run(sys.executable, "benchmarks/bench_scaling.py", *sizes, "--output", str(tmp_path))
    measured, curve = read(tmp_path / "scaling_measured.csv"), read(tmp_path / "scaling_planned.csv")
    assert [row["kind"] for row in measured] == ["strong", "weak", "sequence"]
    for row in measured:
        assert (row["ranks"], row["updates"], row["efficiency"]) == ("1", "1", "1.0")
        rate = float(row["pairs_an_update"]) / float(row["step_ms"]) * 1e3
        assert float(row["pairs_per_s"]) == pytest.approx(rate, rel=1e-2)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["strong_efficiency_1"] == 1
    of_512 = next(row for row in curve if row["kind"] == "weak" and row["gpus"] == "512")
    assert told["planned"]["weak_512"]["pairs_per_s"] == float(of_512["pairs_per_s"])
    assert "Assumed, not measured" in done.stdout


def test_kinds_keep_the_batch_let_it_grow_or_share_it(bench):
    assert {kind: [of(ranks, 8) for ranks in (1, 8)] for kind, of in bench.KINDS.items()} == {
        "strong": [(32, 1), (32, 1)], "weak": [(4, 1), (32, 1)], "sequence": [(4, 1), (4, 8)],
    }  # fmt: skip


def test_a_point_is_planned_on_as_many_gpus_as_it_says(bench):
    """Nodes of three hold no 4 or 8 GPUs between them."""
    stage = read_stage(ROOT, str(ROOT / "launch/recipes/qwen2_5_vl_7b_stage2.yaml"), None, (), {})
    cluster = dataclasses.replace(stage.cluster, gpus_per_node=3)
    odd = dataclasses.replace(stage.with_settings(global_batch_size=18), cluster=cluster)
    for of_nodes in (stage, odd):
        rows = bench.planned(of_nodes)
        assert rows
        assert all(read_cluster(row["cluster"]).ranks == row["gpus"] for row in rows)


def test_the_curve_begins_where_it_fits_and_loses_by_communication(bench):
    rows = bench.planned(read_stage(ROOT, str(ROOT / "launch/recipes/qwen2_5_vl_72b_stage2.yaml"), None, (), {}))
    for kind in ("strong", "weak"):
        of_kind = [row for row in rows if row["kind"] == kind]
        assert of_kind[0]["efficiency"] == 1
        assert of_kind[0]["gpus"] > 8, "72 B with Adam do not fit one node of 80 GB"
        assert of_kind[-1]["gpus"] == 512
        assert all(0 < row["efficiency"] <= 1.0001 for row in of_kind)
        assert len({row["pairs_an_update"] for row in of_kind}) == (1 if kind == "strong" else len(of_kind))
