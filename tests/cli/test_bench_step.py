"""The benchmark of a Stage II step beside TRL's, at its smallest; no figure is judged."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.planning import work
from mede2.trainer.planning.shapes import shape_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture(scope="module")
def smallest(run, tmp_path_factory):
    """The last line of the smallest run, and the rows of its csv: one timed update of one short pair."""
    pytest.importorskip("trl", reason="the other side of the benchmark")
    output = tmp_path_factory.mktemp("results")
    options = ("--prompt", "64", "--answer", "16", "--pairs", "1", "--rounds", "1", "--no-variants")
    command = (sys.executable, "benchmarks/bench_step.py", "--device", "cpu", "--model", "demo", "--dtype", "fp32")
    done = run(*command, *options, "--output", str(output), OMP_NUM_THREADS="1")
    with (output / "bench_step.csv").open(encoding="utf-8") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    return json.loads(done.stdout.splitlines()[-1]), rows


def test_the_last_line_holds_ours_over_trls(smallest):
    ratios, rows = smallest
    assert rows.keys() == {"TRL", "TRL compact", "TRL compact, ZeRO-3", "ours"}
    ours, compact = rows["ours"], rows["TRL compact"]
    for key, column in (("pairs_per_s_vs_trl_compact", "pairs_per_s"), ("peak_vs_trl_compact", "peak_mib")):
        assert ratios[key] == pytest.approx(float(ours[column]) / float(compact[column]), abs=1e-3)
    assert ratios["ablation"]["reference charged to 1 epoch"]["pairs_per_s"] < 1


def test_quick_leaves_out_a_contender_and_its_ratios(benchmarks):
    bench = benchmarks("bench_step")
    case = bench.Case("demo", "fp32", "cpu", 64, 16, 1, 1)
    assert list(bench.contenders(case, (), with_zero3=False)) == ["TRL", "TRL compact", "ours"]
    row = {"pairs_per_s": 2.0, "pairs_per_s_1_epoch": 1.0, "peak_mib": 3.0, "data_wait_share": 0.0}
    rows = [row | {"contender": name} for name in bench.contenders(case, (), with_zero3=False)]
    assert not [key for key in bench.headline(case, rows) if "zero3" in key]
    rows.append(row | {"contender": "TRL compact, ZeRO-3", "peak_mib": 6.0})
    assert bench.headline(case, rows)["peak_vs_trl_zero3"] == 0.5


def test_a_row_adds_up(smallest):
    row = {name: float(value) for name, value in smallest[1]["ours"].items() if _is_number(value)}
    pair_ms = row["step_ms"] / row["global_batch_size"] + row["once_ms_per_pair"] / row["epochs"]
    assert row["once_ms_per_pair"] > 0
    assert row["pairs_per_s"] == pytest.approx(1e3 / pair_ms)
    assert row["tokens_per_s"] == pytest.approx(row["pairs_per_s"] * 2 * (row["prompt_tokens"] + row["answer_tokens"]))
    assert row["mfu"] == pytest.approx(row["mfu_vision"] + row["mfu_language"] + row["mfu_reference"])
    assert row["image_tokens"] == 16
    assert row["prompt_tokens"] == pytest.approx(64, abs=4)
    assert row["answer_tokens"] == pytest.approx(16, abs=3)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def test_other_work_is_refused(benchmarks):
    bench = benchmarks("bench_step")
    report = {"loss": 0.69, "logps/chosen": -100.0, "logps/rejected": -110.0}
    same = {"TRL": [report, report], "ours": [report, report | {"loss": 0.6905}]}
    assert bench.check_same_work(same, "fp32") == pytest.approx(5e-4)
    other = {"TRL": [report, report], "ours": [report, report | {"logps/rejected": -110.2}]}  # of 1.8e-3
    with pytest.raises(bench.click.ClickException, match=r"update 2: logps/rejected is -110\.0 of TRL, -110\.2"):
        bench.check_same_work(other, "fp32")


def test_operations_are_those_that_torch_counts():
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    from mede2.trainer.data.processing import load_processor

    processor = load_processor(BASE_MODEL)
    inputs = processor(
        text=[processor.image_token + " left right" * 10], images=[Image.new("RGB", (448, 448))], return_tensors="pt"
    )
    model = AutoModelForImageTextToText.from_pretrained(BASE_MODEL, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    num_tokens, text = inputs["input_ids"].size(1), model.config.get_text_config()
    patches, image_tokens = len(inputs["pixel_values"]), int(inputs["mm_token_type_ids"].sum())
    sizes = work.Sizes(num_tokens, 0, patches, image_tokens)
    ours = work.forward_work(shape_of(model.config.to_dict(), "demo"), sizes, prompts=1, head_rows=num_tokens)
    hidden_half = text.num_hidden_layers * 2 * text.hidden_size * num_tokens**2  # eager attention sees the future too
    assert counter.get_total_flops() == ours.vision + ours.language + ours.head + hidden_half


def test_a_shared_prompt_and_answer_rows_spend_less():
    text = dict(vocab_size=10, hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1)  # fmt: skip
    vision = dict(depth=0, hidden_size=1, intermediate_size=1, num_heads=1, in_channels=1, patch_size=1, window_size=1,
                  spatial_merge_size=1, temporal_patch_size=1, out_hidden_size=1)  # fmt: skip
    shape = shape_of({"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision}, "ones")
    sizes = work.Sizes(prompt=4, answer=2, patches=3, image_tokens=1)
    image = 3 * 2 + 2 * 2  # patches embedded; one token merged by two products
    token, looks_apart, looks_shared = 2 * 7, 2 * 4 * 4 / 2 + 4 * 5, 4 * 4 / 2 + 4 * 5
    apart = work.step_work(shape, sizes, shared=False, all_rows=True, reference_passes=1)
    language = 12 * token + 4 * looks_apart + 12 * 2 * 10
    assert (apart.vision, apart.language, apart.reference) == (2 * image, 3 * language, 2 * image + language)
    shared = work.step_work(shape, sizes, shared=True, all_rows=False, reference_passes=0.5)
    language = 8 * token + 4 * looks_shared + 4 * 2 * 10
    assert (shared.vision, shared.language, shared.reference) == (image, 3 * language, (image + language) / 2)
