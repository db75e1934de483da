"""The committed table of a 32k-token pair is what the planner says now."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_what_the_planner_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("plan_long_rows").as_csv()
    assert (ROOT / "benchmarks/results/long_rows.csv").read_text(encoding="utf-8") == table
    assert {row.split(",")[8] for row in table.splitlines()[1:]} == {"yes", "no"}
