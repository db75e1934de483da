"""Updates that are not finite, on two ranks: the run stops and names the rows, or goes on as if they had never been."""

import json

import pytest

CASES = (
    "z1_fp32_gradient", "z1_bf16_loss", "z2_fp32_loss", "z2_bf16_gradient", "z3_fp32_loss", "z3_fp32_gradient",
    "z2_offload_bf16_gradient", "z3_offload_fp32_gradient",
)  # fmt: skip


@pytest.fixture(scope="module")
def two(launch, models, records, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("non_finite")
    config = {
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2, "overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
    }
    (folder / "z2_offload.json").write_text(json.dumps(config))
    return launch(
        "non_finite", 2, scenarios=[*CASES, "counted", "whole"], models=models, records=records, runs=str(folder),
        configs={"z2_offload": str(folder / "z2_offload")},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_is_left_out_changes_nothing(two, case):
    for results in two:
        assert results[case]["size"] > 50
        assert results[case]["moved by the first"] > 20
        assert results[case]["moved by the second"] == []


@pytest.mark.parametrize("case", CASES)
def test_the_next_update_is_that_of_a_run_in_which_the_batch_never_was(two, case):
    """Weights, moments and Adam's step to the bit, and the random numbers that follow."""
    for results in two:
        assert results[case]["other at the end"] == []
        assert results[case]["metrics"][0] == results[case]["metrics"][1]
        assert results[case]["drawn alike"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_counted_and_its_metrics_are_the_finite_ones(two, case):
    for results in two:
        assert results[case]["num_skipped"] == [0, 1, 1]
        assert results[case]["counted"] == (1, 3)  # DeepSpeed's own counts
        assert "grad_norm" not in results[case]["row"]
        assert ("loss" in results[case]["row"]) == case.endswith("gradient")


def test_the_count_survives_a_checkpoint_and_ends_the_run(two, records):
    """A gradient alone does not tell its row: those of the global batch are named, the last three of seven."""
    rows = ", ".join(f"{records['mixed']}:{line}" for line in (5, 6, 7))
    for results in two:
        assert results["counted"]["before"] == [0, 1]
        assert results["counted"]["message"] == (
            f"step 4: the gradient norm is not finite; rows: {rows}; 2 updates would be left out, more than "
            "max_skipped: 1"
        )


def test_a_whole_run_goes_on(two):
    """Its longest micro-batch, which is rehearsed, is not finite, either."""
    rows = two[0]["whole"]["rows"]
    assert [row["num_skipped"] for row in rows] == [1, 1, 1, 2]
    assert ["grad_norm" in row for row in rows] == ["loss" in row for row in rows] == [False, True, True, False]
    assert all(row["tokens_per_s"] > 0 and row["learning_rate"] > 0 for row in rows)
    assert "eval/loss" in rows[-1]
