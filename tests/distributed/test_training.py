"""What updates, checkpoints, exports and the reference cache do to the weights, on two ranks under ZeRO."""

import pytest
import torch
from safetensors.torch import load_file

TWO_RANKS = (
    "frozen_elicit", "loss_nan_z3", "gradient_inf_z3", "gradient_nan_z3_bf16",
    "gradient_nan_z2", "gradient_nan_z2_bf16", "bf16", "resume", "saved", "export_tied_z3", "export_untied_z3",
    "export_tied_z2", "reference_cache", "reference_elsewhere", "unrehearsed", "rehearsed", "closed",
)  # fmt: skip
EXPORTS = [("tied", "z3"), ("untied", "z3"), ("tied", "z2")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("training")
    return {name: str(folder / name) for name in ("checkpoints", "exports", "cache")}


@pytest.fixture(scope="session")
def two(launch, models, records, reference_logps, folders) -> list[dict]:
    job = {"models": models, "records": records, "reference": reference_logps, **folders}
    return launch("training", 2, scenarios=TWO_RANKS, **job)


@pytest.fixture(scope="session")
def one(two, launch, models, records, reference_logps, folders) -> dict:
    job = {"models": models, "records": records, "reference": reference_logps, **folders}
    return launch("training", 1, scenarios=["reference_cache", "out_of_memory"], **job)[0]


@pytest.fixture(scope="session")
def start(models, plain) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the models before training, under transformers' names."""
    return {name: plain(models[name]).model.state_dict() for name in ("tied", "untied")}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are no longer the same, to the bit."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def is_merger(name: str) -> bool:
    return ".merger." in name


def is_tower(name: str) -> bool:
    return ".visual." in name and not is_merger(name)


def test_weight_decay_does_not_touch_the_frozen_vision_tower(two, start):
    """Under ZeRO-3 an unused parameter has zero gradients, not none, and AdamW would shrink it."""
    moved = changed(start["tied"], two[0]["frozen_elicit"])
    assert moved == {name for name in start["tied"] if ".visual." not in name}


@pytest.mark.parametrize(("model", "zero"), EXPORTS)
def test_the_merger_trains_while_the_tower_does_not(two, start, plain, folders, model, zero):
    moved = changed(start[model], plain(f"{folders['exports']}/{model}-{zero}").model.state_dict())
    assert moved == {name for name in start[model] if not is_tower(name)}
    assert [name for name in moved if is_merger(name)]


@pytest.mark.parametrize("case", ["loss_nan_z3"])
def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_row(two, records, case):
    for results in two:
        assert results[case]["message"].startswith("step 2: the loss is ")
        assert results[case]["message"].endswith(f"rows: {records['pairs']}:6")
    assert two[0][case]["num_weights"] > 50
    assert two[0][case]["weights_kept"]


@pytest.mark.parametrize("case", ["gradient_inf_z3", "gradient_nan_z3_bf16", "gradient_nan_z2", "gradient_nan_z2_bf16"])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_every_rank_and_updates_nothing(two, records, case):
    rows = ", ".join(f"{records['pairs']}:{line}" for line in (5, 6, 7))  # of the whole global batch
    for results in two:
        assert results[case]["message"] == f"step 2: the gradient norm is not finite; rows: {rows}"
    assert two[0][case]["num_weights"] > 50
    assert two[0][case]["weights_kept"]


def test_bf16_learns_a_repeated_batch(two):
    for results in two:
        losses = results["bf16"]["losses"]
        assert results["bf16"]["dtypes"] == ["torch.bfloat16"]
        assert losses[-1] < 0.7 * losses[0]
        assert losses == two[0]["bf16"]["losses"]


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(two):
    for results in two:
        result = results["resume"]
        assert len(result["losses"]) == 5
        assert result["losses_resumed"] == result["losses"][3:]
        assert torch.equal(result["drawn"]["after saving"], result["drawn"]["after loading"])
    uninterrupted, resumed = two[0]["resume"]["uninterrupted"], two[0]["resume"]["resumed"]
    assert len(uninterrupted) > 50
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_the_random_numbers_of_the_ranks_are_kept_apart(two):
    assert not torch.equal(*(results["resume"]["drawn"]["after loading"] for results in two))


def test_a_half_written_checkpoint_does_not_count(two):
    for results in two:
        result = results["resume"]
        assert {".step-000004.partial", "step-000003", "step-000004"} <= set(result["left"])
        assert (result["step"], result["world_size"], result["identity"]) == (3, 2, {"settings": {"seed": 0}})


def test_the_newest_checkpoints_and_the_milestones_stay(two):
    for results in two:
        numbers = [[int(name.removeprefix("step-")) for name in names] for names in results["saved"]["left"]]
        assert numbers == [[1], [2, 1], [3, 2], [4, 3], [5, 4, 3], [6, 5, 3]]


def test_a_disk_that_refuses_leaves_the_last_checkpoint_whole(two):
    for results in two:
        saved = results["saved"]
        assert "checkpoint of update 7: " in saved["refused"]
        assert "cannot be written" in saved["refused"]
        assert "the earlier ones in" in saved["refused"]
        assert saved["whole"] == 6
        assert saved["at_last"] == ["step-000003", "step-000006", "step-000007"]


def test_a_checkpoint_that_has_no_room_is_not_begun(two):
    for results in two:
        assert "GiB free and a checkpoint takes" in results["saved"]["full"]
        assert 0 < results["saved"]["least"] < results["saved"]["num_bytes"]


@pytest.mark.parametrize(("model", "zero"), EXPORTS)
def test_the_exported_model_answers_as_the_engine_did(two, plain, records, folders, model, zero):
    folder, of_engine = f"{folders['exports']}/{model}-{zero}", two[0][f"export_{model}_{zero}"]
    with torch.no_grad():
        rows = plain(folder).conversations(records["pairs"])  # the processor loads from the export, too
    assert of_engine.keys() == set(range(len(rows)))
    for number, (sides, _) in enumerate(rows):
        for expected, answered in zip(of_engine[number], sides, strict=True):
            torch.testing.assert_close(answered, expected, rtol=0, atol=1e-5)


def test_the_file_of_a_tied_model_holds_the_head_once(two, models, folders):
    def names(folder: str) -> set[str]:
        return set(load_file(f"{folder}/model.safetensors"))

    assert "lm_head.weight" not in names(models["tied"])
    for zero in ("z3", "z2"):
        assert names(f"{folders['exports']}/tied-{zero}") == names(models["tied"])
    assert names(f"{folders['exports']}/untied-z3") == names(models["tied"]) | {"lm_head.weight"}


def test_two_ranks_cache_the_reference_of_one(two, one, plain, models, records):
    with torch.no_grad():
        rows = plain(models["tied"]).conversations(records["pairs"])
    true = torch.tensor([[float(side.double().sum()) for side in sides] for sides, _ in rows], dtype=torch.float64)
    for result in (two[0]["reference_cache"], two[1]["reference_cache"], one["reference_cache"]):
        assert result["absent"]
        assert result["computed"].dtype == torch.float64
        assert torch.equal(result["computed"], result["read"])
        torch.testing.assert_close(result["computed"], true, rtol=1e-6, atol=0)
        assert result["files"] == 2  # one per reference, and nothing half-written


def test_margins_are_zero_before_the_first_update_and_not_against_another_reference(two, one):
    for result in (two[0]["reference_cache"], two[1]["reference_cache"], one["reference_cache"]):
        assert result["gap"] <= 1e-5
        assert result["gap_other"] > 1e-2


def test_rounding_is_told_from_another_reference(two):
    """A cache that another layout filled serves in bf16, whose noise beta multiplies, and another model's does not."""
    for results in two:
        found = results["reference_elsewhere"]
        assert found["tied"]["gap"] > 1  # a reward; more than the nats that are allowed
        assert found["tied"]["raised"] == ""
        assert found["other"]["raised"].startswith("reference_cache: before the first update policy and reference")


def test_a_rehearsal_leaves_no_trace(two):
    """Neither in the weights nor, to the last digit, in the first update."""
    assert all(results["rehearsed"]["kept"] for results in two)
    for name in ("loss", "grad_norm"):
        assert two[0]["rehearsed"][name] == two[0]["unrehearsed"][name]


def test_what_does_not_fit_into_memory_is_named_before_the_first_update(one):
    message = one["out_of_memory"]
    assert message.startswith("out of memory in the longest micro-batch, 1 x ")
    assert "long.jsonl:2: lower micro_batch_size" in message


@pytest.mark.parametrize("zero", ["z2", "z3"])
def test_a_closed_engine_holds_no_weights(two, zero):
    """The reference model's, say, while the policy trains."""
    for results in two:
        before, after = results["closed"][zero]
        assert before > 500_000
        assert after == 0
