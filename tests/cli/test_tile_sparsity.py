"""The tile-sparse sketch: gradients where they must be exact, and the command as a reader runs it; no time judged."""

import csv
import importlib
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ERRORS = ("dh_error", "dw_error", "dw_worst_row_error", "dw_own_row_median", "dw_adam_error")


@pytest.fixture
def sparsity(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("tile_sparsity")


def test_the_command_measures_every_way_in_every_order(sparsity, tmp_path):
    torch.manual_seed(0)
    states = {"hidden": torch.randn(70, 32), "weight": torch.randn(18 * 128, 32) / 4, "targets": torch.arange(70) * 17}
    save_file(states, tmp_path / "states")
    options = ("--threshold", "60", "--threshold", "6", "--temperature", "0.5", "--rounds", "1")
    files = ("--hidden-states", str(tmp_path / "states"), "--output", str(tmp_path))
    result = CliRunner().invoke(sparsity.main, [*options, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with (tmp_path / "tile_sparsity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (2 + 2 * 2 * 2 + 1)  # targets, orders, and the exact ways, sparse ways, yardstick
    by_case = {}
    for row in rows:
        key = ("targets", "order", "way", "log2_threshold", "tail")
        by_case[tuple(row[name] for name in key)] = row
    for targets, order, tail in product(("given", "drawn"), ("natural", "mean logit"), ("False", "True")):
        for way in ("gathered", "dense"):  # nothing falls below 2^-60, so these are exact
            row = by_case[targets, order, way, "-60", tail]
            assert all(float(row[name]) < 1e-4 for name in ERRORS)
            assert float(row["kept"]) == 1
            assert float(row["kept_compacted"]) == pytest.approx(128 / 70)
        gathered, dense = (by_case[targets, order, way, "-6", tail] for way in ("gathered", "dense"))
        assert 0 < float(gathered["kept"]) < float(gathered["kept_blocks"]) <= 1
        assert all(float(gathered[name]) == pytest.approx(float(dense[name]), rel=1e-3) for name in ERRORS)
        assert float(gathered["dh_error"]) > 1e-3
        yardstick = by_case[targets, order, "bf16 grad", "", ""]
        assert all(1e-4 < float(yardstick[name]) < 0.1 for name in ERRORS)


@pytest.mark.parametrize("dense", [False, True])
def test_the_tail_is_exact_where_the_rows_of_a_tile_are_alike(sparsity, dense):
    torch.manual_seed(0)
    hidden = torch.randn(70, 32).requires_grad_()
    weight = (torch.randn(18, 32) / 4).repeat_interleave(128, 0).requires_grad_()
    pair = sparsity.Pair(hidden, weight, torch.arange(70) * 17, (torch.arange(70) > 30).long())
    exact = sparsity.exact_results(pair)
    found = {}
    for tail in (False, True):  # 2^0: of each row only the target's tile is kept
        sparsity.run_sparse(pair, sparsity.Sparse(0, dense, tail))
        found[tail] = sparsity.errors(exact, pair)
    assert all(found[True][name] < 1e-5 for name in ERRORS)
    assert all(found[False][name] > 1e-3 for name in ERRORS)


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--shape", "8x8x100"), "V: got 100"), (("--hidden-states", "{folder}/none"), "--hidden-states: {folder}/none")],
)
def test_a_bad_option_is_one_clear_error(sparsity, tmp_path, options, said):
    options = [option.format(folder=tmp_path) for option in (*options, "--output", "{folder}")]
    result = CliRunner().invoke(sparsity.main, options)
    assert result.exit_code == 2
    assert said.format(folder=tmp_path) in result.output
