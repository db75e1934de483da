"""One update on 1 and on 2 ranks, under every ZeRO file, against a plain torch run without DeepSpeed."""

import pytest
import torch

TOLERANCE = 3e-6  # of the norm of all gradients; fp32 sums in another order
OF_A_TENSOR = 2e-4  # of a tensor's own norm, where that is no dust
DUST = 1e-4  # share of the global norm below which a tensor's own direction is rounding
TRUTH = {  # which hand-written run each configuration must equal
    "elicit": "elicit", "elicit_mixed": "elicit_mixed", "enhance": "enhance", "enhance_micro_2": "enhance",
    "enhance_micro_4": "enhance", "enhance_every_part": "enhance", "enhance_recomputed": "enhance",
    "enhance_offloaded": "enhance", "enhance_untied": "enhance_untied", "enhance_z1": "enhance",
    "enhance_z2": "enhance", "enhance_z2_untied": "enhance_untied", "enhance_z3_offload": "enhance",
    "enhance_triton": "enhance", "enhance_triton_untied": "enhance_untied", "enhance_apart": "enhance",
    "enhance_packed": "enhance", "enhance_packed_apart": "enhance", "enhance_packed_triton": "enhance",
    "elicit_packed": "elicit_mixed", "mdpo": "mdpo", "mdpo_packed": "mdpo",
    "elicit_shared": "elicit_mixed", "enhance_shared": "enhance", "enhance_shared_apart": "enhance",
    "enhance_shared_packed": "enhance_untied", "enhance_shared_recomputed": "enhance", "mdpo_shared": "mdpo",
    "enhance_tiled": "enhance", "enhance_one_key": "enhance_one_key",
}  # fmt: skip
ONE_RANK = (
    "elicit", "elicit_mixed", "enhance", "enhance_micro_4", "enhance_every_part", "enhance_untied", "enhance_z2",
    "enhance_packed", "elicit_packed", "mdpo_packed",
)  # fmt: skip
TWO_RANKS = (
    *TRUTH, "enhance_clipped", "enhance_bf16", "enhance_triton_bf16", "elicit_local_totals", "enhance_local_totals",
)  # fmt: skip
FOUR_RANKS = ("enhance_shared_recomputed",)  # two groups of two
LOCAL_TOTALS = {"elicit_local_totals": "elicit", "enhance_local_totals": "enhance"}


@pytest.fixture(scope="session")
def runs(launch, models, records, reference_logps, with_blank) -> dict[int, list[dict]]:
    """Results of every configuration: by the number of ranks, then by rank."""
    job = {"models": models, "records": records, "reference": with_blank(reference_logps)}
    return {
        1: launch("gradients", 1, scenarios=ONE_RANK, **job),
        2: launch("gradients", 2, scenarios=TWO_RANKS, **job),
        4: launch("gradients", 4, scenarios=FOUR_RANKS, **job),
    }


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def distance(gradients: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """Norm of the difference as a share of the norm, over all the tensors of `gradients`."""
    of_same = {name: true[name] for name in gradients}
    return norm({name: gradient - of_same[name] for name, gradient in gradients.items()}) / norm(of_same)


def worst_tensor(gradients: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> tuple[float, str]:
    whole = norm({name: true[name] for name in gradients})
    return max(
        (float((gradient - true[name]).norm() / true[name].norm()), name)
        for name, gradient in gradients.items() if true[name].norm() > DUST * whole
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "case"),
    [*((1, case) for case in ONE_RANK), *((2, case) for case in TRUTH), *((4, case) for case in FOUR_RANKS)],
)
def test_loss_and_gradients_equal_a_run_without_deepspeed(runs, truth, world_size, case):
    true = truth[TRUTH[case]]
    for rank, results in enumerate(runs[world_size]):
        result = results[case]
        assert result["metrics"]["loss"] == pytest.approx(true["loss"], rel=1e-6), f"rank {rank}"
        assert distance(result["gradients"], true["gradients"]) < TOLERANCE, f"rank {rank}"
        error, name = worst_tensor(result["gradients"], true["gradients"])
        assert error < OF_A_TENSOR, f"rank {rank}, {name}"


@pytest.mark.parametrize("case", ONE_RANK)
def test_two_ranks_make_the_update_of_one(runs, case):
    one, two = runs[1][0][case], runs[2][0][case]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-6)
    assert two["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=1e-5)
    assert two["gradients"].keys() == one["gradients"].keys()
    assert distance(two["gradients"], one["gradients"]) < TOLERANCE


@pytest.mark.parametrize("case", TRUTH)
def test_the_reported_gradient_norm_is_that_of_the_gradients(runs, case):
    for results in (*(runs[1] if case in ONE_RANK else ()), *runs[2]):
        assert results[case]["metrics"]["grad_norm"] == pytest.approx(norm(results[case]["gradients"]), rel=1e-5)


@pytest.mark.parametrize("case", LOCAL_TOTALS)
def test_a_local_denominator_is_caught(runs, truth, case):
    """The tolerance above would not let the classic bug pass: averages over this rank's own rows."""
    error = distance(runs[2][0][case]["gradients"], truth[LOCAL_TOTALS[case]]["gradients"])
    assert error > 1e4 * TOLERANCE


def test_accumulation_changes_nothing(runs):
    """The same 8 slots as micro-batches of 1, 2 and 4 rows: on two ranks 4, 2 and 1 accumulation steps."""
    results = runs[2][0]
    cases = ("enhance", "enhance_micro_2", "enhance_micro_4")
    assert [len(results[case]["micro_batches_with_image"]) for case in cases] == [4, 2, 1]
    for case in cases[1:]:
        assert distance(results[case]["gradients"], results["enhance"]["gradients"]) < TOLERANCE
        assert results[case]["metrics"]["loss"] == pytest.approx(results["enhance"]["metrics"]["loss"], rel=1e-6)


def test_packing_changes_nothing_but_the_number_of_forwards(runs):
    results = runs[2][0]
    counts = [len(results[case]["micro_batches_with_image"]) for case in ("enhance", "enhance_packed")]
    assert counts[1] < counts[0] == 4
    assert len(runs[1][0]["enhance_packed"]["micro_batches_with_image"]) > 1, "nothing was accumulated"


def test_a_rank_without_images_beside_one_with_them(runs):
    """What the cases above rest on: in some forward one rank has an image and the other has none."""
    first, second = (results["enhance_every_part"]["micro_batches_with_image"] for results in runs[2])
    assert any(ours != theirs for ours, theirs in zip(first, second, strict=True))


def test_the_vision_tower_has_gradients_where_it_trains_and_none_where_it_is_frozen(runs):
    trained, frozen = (runs[2][0][case]["gradients"] for case in ("enhance_every_part", "enhance"))
    visual = [name for name in trained if ".visual." in name]
    assert visual
    assert norm({name: trained[name] for name in visual}) > 1e-3 * norm(trained)
    assert not [name for name in frozen if ".visual." in name]


def test_activation_checkpointing_changes_nothing(runs):
    results = runs[2][0]
    assert distance(results["enhance_recomputed"]["gradients"], results["enhance_every_part"]["gradients"]) < TOLERANCE


def test_activations_in_host_memory_change_no_bit(runs):
    results = runs[2][0]
    offloaded, recomputed = results["enhance_offloaded"], results["enhance_recomputed"]
    assert offloaded["bytes_offloaded"] > 0 == recomputed["bytes_offloaded"]
    assert offloaded["gradients"].keys() == recomputed["gradients"].keys()
    assert all(
        torch.equal(gradient, offloaded["gradients"][name]) for name, gradient in recomputed["gradients"].items()
    )


def test_ranks_that_share_a_micro_batch_run_half_of_its_tokens_each(runs):
    """In as many forwards as one rank alone makes; rows are padded to an even length."""
    whole = runs[1][0]["enhance_every_part"]["decoder_tokens"]
    for results in runs[2]:
        assert [2 * tokens for tokens in results["enhance_shared"]["decoder_tokens"]] == [n + n % 2 for n in whole]


def test_tiles_cut_the_tokens_of_an_mlp(runs):
    for results in runs[2]:
        tiled, whole = (results[case]["mlp_tokens"] for case in ("enhance_tiled", "enhance_every_part"))
        forward = len(whole) * 3
        assert len(tiled) == 2 * forward, "each tile once more in backward"
        assert sum(tiled) == 2 * sum(whole)
        assert max(tiled) <= -(-max(whole) // 3)


def test_clipping_scales_by_the_global_norm(runs):
    whole, clipped = runs[2][0]["enhance"], runs[2][0]["enhance_clipped"]
    assert clipped["metrics"]["grad_norm"] == pytest.approx(whole["metrics"]["grad_norm"], rel=1e-6)
    assert norm(clipped["gradients"]) == pytest.approx(1e-2, rel=1e-4)
    scaled = {name: gradient * (1e-2 / norm(whole["gradients"])) for name, gradient in whole["gradients"].items()}
    assert distance(clipped["gradients"], scaled) < 1e-4


def test_only_16_bit_weights_have_masters_beside_them(runs):
    """DeepSpeed copies fp32 weights too; the engine undoes that."""
    results = runs[2][0]
    assert set(results["enhance"]["own_masters"]) == {True}
    assert set(results["enhance_bf16"]["own_masters"]) == {False}


@pytest.mark.parametrize("case", ["enhance_bf16", "enhance_triton_bf16"])
def test_bf16_gradients_are_near_those_of_fp32(runs, truth, case):
    for results in runs[2]:
        gradients, true = results[case]["gradients"], truth["enhance"]["gradients"]
        assert distance(gradients, true) < 0.05
        assert results[case]["metrics"]["loss"] == pytest.approx(truth["enhance"]["loss"], rel=0.02)
