"""The benchmark of linear_logps and the dump of real hidden states, as a reader would run them; no figure is judged."""

import csv
import importlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mede2.kernels.logps import IGNORE_INDEX, linear_logps
from mede2.trainer.demo.defaults import BASE_MODEL

ROOT = Path(__file__).parents[2]
BENCH = (sys.executable, "benchmarks/bench_logps.py")
DUMP = (sys.executable, "benchmarks/dump_hidden_states.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two of them wait for each other where other tests run beside
RATIOS = {
    "bf16_time_vs_naive", "bf16_peak_vs_naive", "bf16_masked75_time_vs_naive", "fp32_time_vs_naive",
    "fp32_masked75_time_vs_naive",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick(run, tmp_path_factory):
    """What a quick run prints, and its folder."""
    output = tmp_path_factory.mktemp("results")
    (output / "bench_logps.csv").write_text("device,dtype\n")
    done = run(
        *BENCH, "--device", "cpu", "--quick", "--no-peers", "--rounds", "1", "--output", str(output), **ONE_THREAD
    )
    return done.stdout, output


@pytest.fixture(scope="module")
def states(run, records, tmp_path_factory):
    """A dump of 150 answer tokens."""
    path = tmp_path_factory.mktemp("states") / "states.safetensors"
    options = ("--model", str(BASE_MODEL), "--data", records["stage2"], "--stage", "2", "--max-rows", "150")
    run(*DUMP, *options, "--output", str(path), **ONE_THREAD)
    return path


def test_the_last_line_holds_the_headline_ratios(quick):
    ratios = json.loads(quick[0].splitlines()[-1])
    assert ratios.keys() == RATIOS
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_csv_has_a_row_for_each_contender_and_case(quick):
    with (quick[1] / "bench_logps.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["contender"], row["dtype"], float(row["masked"])) for row in rows]
    assert sorted(found) == sorted(product(("naive", "mede2 torch"), ("bf16", "fp32"), (0.0, 0.75)))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert all(row["commit"] == (head[:12] or "none") for row in rows)
    for row in rows:
        assert int(row["num_counted"]) == (64 if row["masked"] == "0.75" else 256)
        limit = 1e-5 if row["dtype"] == "fp32" else 1e-2  # far above rounding, far below a wrong gradient
        assert all(float(row[name]) < limit for name in ("logps_error", "dh_error", "dw_error", "dw_worst_row_error"))


def test_a_csv_of_other_columns_is_moved_aside(quick):
    (aside,) = quick[1].glob("bench_logps.until-*.csv")
    assert aside.read_text() == "device,dtype\n"
    assert f"is now {aside}" in quick[0]


def test_a_dump_gives_what_the_models_own_logits_say(states, records):
    from transformers import AutoModelForImageTextToText

    from mede2.trainer.data.collate import Collator
    from mede2.trainer.data.encoding import Encoder
    from mede2.trainer.data.layout import Layout
    from mede2.trainer.data.positions import Positions
    from mede2.trainer.data.processing import load_processor
    from mede2.trainer.data.records import read_records
    from mede2.trainer.data.sampler import Slot

    tensors = load_file(states)
    assert tensors["hidden"].shape == (150, tensors["weight"].shape[1])
    logps = linear_logps(tensors["hidden"], tensors["weight"], tensors["targets"], implementation="reference")

    processor = load_processor(BASE_MODEL)
    model = AutoModelForImageTextToText.from_pretrained(BASE_MODEL).eval()
    encoder, collator = Encoder(processor, 1024), Collator(processor, Positions(BASE_MODEL), True, Layout(False))
    expected = []
    for record in list(read_records((records["stage2"],), 2))[:3]:
        batch = collator([encoder(record)], [Slot(0, 1)])
        with torch.no_grad():
            logits = model(**batch.inputs).logits.flatten(0, 1)[batch.rows]
        expected.append(logits.log_softmax(1).gather(1, batch.targets[:, None]).squeeze(1))
    expected = torch.cat(expected)[:150]
    assert len(expected) > 20
    torch.testing.assert_close(logps[: len(expected)], expected, rtol=0, atol=1e-4)


def test_a_dump_replaces_the_random_inputs(states, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("bench_logps")
    assert bench.shape_of_file(str(states)) == (150, 96, 512)
    pair = bench.make_pair(bench.Case((150, 96, 512), "bf16", 0.2, "cpu", str(states)))
    tensors = load_file(states)
    assert torch.equal(pair.hidden.detach(), tensors["hidden"].bfloat16())
    assert torch.equal(pair.weight.detach(), tensors["weight"].bfloat16())
    counted = torch.arange(150) % 75 >= 15  # the first fifth of each half is masked
    assert torch.equal(pair.targets, torch.where(counted, tensors["targets"], IGNORE_INDEX))


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("bench_logps", ("--shapes", "64x32"), "got '64x32', expected NxHxV"),
        ("bench_logps", ("--hidden-states", "{folder}/wrong"), "--hidden-states: {folder}/wrong"),
        ("bench_logps", ("--masked", "0.99", "--quick", "--shapes", "8x8x8"), "--masked: 0.99 of 4 rows leaves none"),
        ("dump_hidden_states", ("--model", "{folder}"), "model: {folder} holds no config.json"),
    ],
)
def test_a_bad_option_is_one_clear_error(monkeypatch, tmp_path, script, options, said):
    (tmp_path / "wrong").write_text("no tensors")
    if script == "dump_hidden_states":
        options += ("--data", "{folder}/wrong", "--stage", "2", "--output", "{folder}/states.safetensors")
    else:
        options += ("--output", "{folder}/results")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # in this process: no import of torch for each case
    command = importlib.import_module(script).main
    result = CliRunner().invoke(command, [option.format(folder=tmp_path) for option in options])
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)  # click's own end, not an error that escaped
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert said.format(folder=tmp_path) in errors[0]
