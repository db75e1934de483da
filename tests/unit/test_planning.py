"""The planner's figures by hand: states of ZeRO, what is saved and gathered, operations, times, verdicts."""

import dataclasses
from pathlib import Path

import pytest

from mede2.trainer.planning import memory
from mede2.trainer.planning.communication import collectives, shared_rows
from mede2.trainer.planning.gathering import play
from mede2.trainer.planning.hardware import PRESETS, read_cluster
from mede2.trainer.planning.lengths import Lengths, Row, patches_of_image, rows_of
from mede2.trainer.planning.plan import Data, Stage, changes, cheapest_change, make_plan, search
from mede2.trainer.planning.run import Run, Zero
from mede2.trainer.planning.saved import (
    Training,
    activations,
    attention_row,
    decoder_token,
    head,
    head_rows,
    layer_bytes,
    spared_token,
    tile_bytes,
)
from mede2.trainer.planning.shapes import Module, Parameter, read_shape
from mede2.trainer.planning.work import Sizes, forward_work
from mede2.trainer.settings import Settings

ROOT = Path(__file__).parents[2]
DS_CONFIGS = ROOT / "ds_configs"
SHAPE = read_shape("Qwen2.5-VL-7B-Instruct")
PAIR = Lengths(prompt=300, answers=(100, 80), num_patches=1024, num_images=1)


def run(zero: int, ranks: int, shape=SHAPE, **settings) -> Run:
    given = Settings(**{"global_batch_size": ranks, **settings})
    return Run(shape, given, 2, Zero(zero, reduce_bucket=0, persistence_threshold=0), ranks, PAIR)


@pytest.mark.parametrize(
    ("zero", "ranks", "of_all", "of_trained"),
    [
        (1, 1, 2, 18),
        (1, 4, 2, 9),
        (2, 4, 2, 4),
        (3, 4, 0.5, 4),
    ],
)
def test_states_in_bf16(zero, ranks, of_all, of_trained):
    """12 bytes of a share for Adam, 4 for its gradients; BF16_Optimizer (ZeRO-1) has 6 for all of them."""
    planned = run(zero, ranks)
    states = memory.plan_memory(planned).states
    total, trained = SHAPE.num_parameters, planned.num_trained
    assert trained == SHAPE.counts["language_model"] + SHAPE.counts["embedding"]
    assert sum(states.values()) == pytest.approx(of_all * total + of_trained * trained, rel=1e-5)


def test_optimizers_adapters_and_four_bits():
    share = run(2, 4).num_trained / 4
    assert sum(memory.optimizer(run(2, 4, optimizer="adamw_8bit")).values()) == pytest.approx(6.03125 * share, rel=1e-5)
    adapted = run(2, 1, lora_rank=8)
    linears = 2 * (3584 + 3584) + 2 * (3584 + 512) + 2 * (3584 + 18944) + (18944 + 3584)
    assert adapted.num_trained == 28 * 8 * linears
    quantized = run(2, 1, lora_rank=8, quantize="nf4")
    of_layers = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert quantized.num_quantized == of_layers
    kept = SHAPE.num_parameters - of_layers + adapted.num_trained
    assert memory.weights(quantized) == pytest.approx(2 * kept + of_layers * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-6)


def test_offload_moves_the_states_to_the_host():
    zero = Zero(3, "cpu", "cpu", reduce_bucket=0, persistence_threshold=0)
    planned = memory.plan_memory(run(3, 8, optimizer="cpu_adam").replaced(zero=zero))
    assert planned.states == {"weights": 0, "optimizer": 0, "gradients": 0}
    share = run(3, 8).num_trained / 8
    assert planned.host["optimizer and gradients"] == pytest.approx(20 * share, rel=1e-5)
    assert planned.host["weights"] == pytest.approx(2 * SHAPE.num_parameters / 8, rel=1e-5)


def test_what_a_token_leaves_in_a_decoder_layer():
    """bf16, all trains: inputs and outputs of two norms and 4 bytes for their scale, two inner tensors."""
    training = Training(2, True, 0, 0.0, False, False, True)
    assert decoder_token(SHAPE.text, training) == 2 * (4 * 3584 + 4) + 2 * 2 * 18944
    assert decoder_token(SHAPE.text, training) + spared_token(SHAPE.text, training) == (
        2 * (8 * 3584 + 4) + 4 * 2 * 18944  # in fp32 a norm's input, normalized values, output, four inner tensors
    )
    frozen = dataclasses.replace(training, trains_text=False, lora_rank=16)  # their product too, and what B reads
    assert decoder_token(SHAPE.text, frozen) == 2 * (4 * 3584 + 4) + 3 * 2 * 18944 + 7 * 2 * 16


def test_activations_of_checkpointed_layers_are_their_inputs():
    training = Training(2, True, 0, 0.0, False, False, False)
    options = dict(offload=False, in_blocks=False)
    rows = (Row(300, (100,)),)
    kept = activations(SHAPE, rows, 0, training, checkpointing=True, **options)
    ends = 400 * (2 * 3584 + 4 + 2 * 2 * 128)
    assert kept["language model"] == 28 * 400 * 2 * 3584 + ends
    assert activations(SHAPE, rows, 0, training, checkpointing=True, offload=True, in_blocks=False)[
        "language model"] == ends  # fmt: skip
    assert kept["log-probabilities"] == head(SHAPE, 100, 1, training, False) == 100 * (2 * 3584 + 24)


def test_rows_of_a_pair():
    assert rows_of(PAIR, shared_prefix=True) == (Row(300, (100, 80)),)
    assert rows_of(PAIR, shared_prefix=False) == (Row(300, (100,)), Row(300, (80,), padding=20))
    assert rows_of(PAIR, True, corrupted=True) == (Row(300, (100, 80)), Row(300, (100,), padding=80))
    assert patches_of_image(SHAPE, 448 * 448) == (1024, 256)
    assert patches_of_image(read_shape("InternVL3-8B-hf"), 10**6) == (1024, 256)


def chain(*sizes: int) -> tuple[Module, ...]:
    return tuple(Module(f"m{n}", "linear", (Parameter(f"p{n}", (size,), "language_model"),), n)
            for n, size in enumerate(sizes))  # fmt: skip


def test_gathering_by_hand():
    """Three layers of 10, far apart: each is gathered in forward and again in backward, but for the last, which comes
    right back."""
    modules = chain(10, 10, 10)
    options = dict(recomputed=False, backward=True, prefetch_bucket=0, persistence_threshold=0)
    far = play(modules, modules, frozenset(), max_reuse=1, **options)
    assert (far.in_layers, far.sent) == (10, 50)
    near = play(modules, modules, frozenset(), max_reuse=1000, **options)
    assert (near.in_layers, near.sent) == (30, 30)  # nothing is freed before its last use
    ahead = play(modules, modules, frozenset(), max_reuse=1, **(options | {"prefetch_bucket": 10}))
    assert ahead.in_layers == 30  # while the last runs backward, the other two are fetched already
    assert play(modules, modules, frozenset(), max_reuse=1, **(options | {"persistence_threshold": 10})).sent == 0
    assert play(modules, modules, frozenset(), max_reuse=1, **(options | {"backward": False})).sent == 30
    frozen = frozenset(parameter for module in modules for parameter in module.parameters)
    kept = play(modules, modules, frozenset(), max_reuse=1000, **(options | {"recomputed": True}))
    assert kept.sent == 30
    pair = tuple(dataclasses.replace(module, layer=0) for module in modules[:2])  # both of one layer, recomputed
    assert play(pair, pair, frozen, max_reuse=1000, **(options | {"recomputed": True})).sent == 20 + 10


def test_what_is_sent():
    trained = run(2, 4).num_trained
    sent = {each.operation: each for each in collectives(run(2, 4, global_batch_size=8))}
    assert sent["all_reduce"].logged == 2 * 2 * trained  # two micro-batches, 2 bytes
    assert sent["all_reduce"].wire == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert sent["all_gather_into_tensor"].logged == 2 * trained // 4
    sent = {each.operation: each for each in collectives(run(1, 4, global_batch_size=8))}
    assert sent["all_reduce"].logged == 2 * trained  # once an update


def test_work_of_three_families():
    """Per token about twice the weights of the layers; the head apart."""
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "InternVL3-8B-hf"):
        shape = read_shape(name)
        work = forward_work(shape, Sizes(1, 0, 0, 0, 0), prompts=1, head_rows=1)
        assert work.language == pytest.approx(2 * shape.counts["language_model"], rel=1e-3)
        assert work.head == 2 * shape.text.vocabulary * shape.text.hidden
        assert work.vision == 0


def stage(name: str, cluster: str, file: str, **settings) -> Stage:
    given = Settings(**{"global_batch_size": 32, **settings})
    return Stage(read_shape(name), given, 2, DS_CONFIGS / file, read_cluster(cluster), Data())


def test_a_plan_that_fits_and_its_hours():
    plan = make_plan(stage("Qwen2.5-VL-7B-Instruct", "h100:8", "z3.json", activation_checkpointing=True, epochs=2.0))
    assert plan.fits
    assert plan.updates == 2 * 313  # ceil(10000 / 32)
    assert plan.hours["training"] == pytest.approx(plan.updates * plan.timing.step_s / 3600)
    assert plan.gpu_hours == pytest.approx(8 * sum(plan.hours.values()))
    assert 0 < plan.timing.mfu < 0.6


def test_the_items_are_the_peak_with_slack_and_context():
    for file, more in (("z1.json", {}), ("z2.json", {"activation_checkpointing": True}), ("z3.json", {"lora_rank": 8})):
        found = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", file, **more)).memory
        assert found.total - found.items["allocator slack"] - memory.CONTEXT_BYTES == found.peak


def test_a_corrupted_image_costs_a_third_answer():
    plain = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json"))
    objective = {"sigmoid": 1.0, "image_conditional": 1.0}
    more = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json", objective=objective, corruption="crop"))
    assert more.timing.products_s > 1.5 * plain.timing.products_s
    assert more.memory.activations > 1.5 * plain.memory.activations


def test_a_frozen_tower_runs_once_for_all_steps():
    kept = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json"))
    each = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json", cache_image_features=False))
    assert kept.hours["image features"] > 0 == each.hours["image features"]
    assert kept.timing.products_s < each.timing.products_s
    trained = make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json", train_merger=True))
    assert trained.hours["image features"] == 0


def test_attention_that_is_not_planned_for_is_refused():
    with pytest.raises(ValueError, match="attention: eager keeps the scores"):
        make_plan(stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json", attention="eager"))


def test_the_cheapest_change_fits_and_says_how():
    wanting = stage("Qwen2.5-VL-7B-Instruct", "h100:1", "z3.json", activation_checkpointing=True)
    assert not make_plan(wanting).fits
    change, plan = cheapest_change(wanting)
    assert plan.fits
    assert change.cost == 0
    assert "z3_offload.json" in change.words
    assert "optimizer=cpu_adam" in change.words


def test_changes_leave_what_is_learnt_first():
    asked = stage("Qwen2.5-VL-3B-Instruct", "rtx4090", "z2.json")
    costs = [change.cost for change in changes(asked)]
    assert costs == sorted(costs)
    assert set(costs) == {0, 1, 2, 3}


def test_search_keeps_what_is_learnt():
    asked = stage("Qwen2.5-VL-3B-Instruct", "h100:8", "z3.json")
    found = search(asked)
    assert found
    assert all(plan.fits for _, plan in found)
    hours = [plan.total_hours for _, plan in found]
    assert hours == sorted(hours)
    assert {plan.stage.settings.global_batch_size for _, plan in found} == {32}


def test_clusters(tmp_path):
    assert (read_cluster("h100:4x8").nodes, read_cluster("h100:4x8").ranks) == (4, 32)
    assert read_cluster("a100:2").ranks == 2
    assert read_cluster("rtx4090").ranks == 1
    for text in ("h100:4x", "x100:8", "h100:0x8"):
        with pytest.raises(ValueError, match="cluster: "):
            read_cluster(text)
    path = tmp_path / "ours.yaml"
    path.write_text("name: h100\nnodes: 3\nnetwork_gb_s: 25\n")
    assert read_cluster(str(path)) == dataclasses.replace(PRESETS["h100"], nodes=3, network_gb_s=25)
    path.write_text("name: ours\nmemory_gb: 80\n")
    with pytest.raises(ValueError, match="lacks matrix_tflops"):
        read_cluster(str(path))
    path.write_text("name: h100\nmemory_gb: -1\n")
    with pytest.raises(ValueError, match="memory_gb: -1 is not above 0"):
        read_cluster(str(path))


def test_rows_that_ranks_share_by_hand():
    """Half the tokens of a layer, and all tokens of half the heads; masks whole."""
    alone = Training(2, True, 0, 0.0, False, False, True)
    rows, text = (Row(300, (100, 80)),), SHAPE.text
    shared = dataclasses.replace(alone, sequence_parallel=2)
    whole, half = (layer_bytes(SHAPE, rows, training) for training in (alone, shared))
    assert half == whole / 2
    tiled = dataclasses.replace(shared, mlp_tiles=4)
    assert half - layer_bytes(SHAPE, rows, tiled) == 240 * 2 * 2 * 18944
    assert tile_bytes(text, 480, tiled) == 60 * 2 * 2 * 18944
    many = dataclasses.replace(alone, sequence_parallel=28)  # 4 key-value heads: each goes to 7 ranks
    one_each = attention_row(text, rows[0], many, branched=False)
    assert one_each == 480 * (2 * (1 + 2) * 128 + 2 * 128 + 4 + 2 * 128)
    assert head_rows(rows, shared) == 180
    assert head_rows(rows, many) == 18, "a rank of nothing but answers"


def test_ranks_that_share_rows_send_queries_keys_values_and_back():
    planned = run(3, 4, sequence_parallel_size=2, global_batch_size=2)
    own = 240 * 2 * (28 + 2 * 4 + 28) * 128
    assert shared_rows(planned).wire == 28 * own * 2 / 2  # forward and backward; half stays
    assert shared_rows(run(3, 4)) is None
    recomputed = run(3, 4, sequence_parallel_size=2, global_batch_size=4, activation_checkpointing=True)
    assert shared_rows(recomputed).wire == 2 * 28 * own * 3 / 2, "two micro-batches, and once more in backward"


def long_pair(**settings) -> Stage:
    data = Data(prompt_tokens=1024, answer_tokens=15744)
    given = {"global_batch_size": 64, "max_length": 17024, "activation_checkpointing": True, **settings}
    return Stage(SHAPE, Settings(**given), 2, DS_CONFIGS / "z3.json", read_cluster("h100:1x8"), data)


def test_long_rows_take_less_memory_shared_and_in_tiles_and_no_less_time():
    whole, tiled, shared = (
        make_plan(long_pair(**settings))
        for settings in ({}, {"mlp_tiles": 8}, {"mlp_tiles": 8, "sequence_parallel_size": 4})
    )
    assert sum(row.tokens for row in whole.stage.longest.rows) == pytest.approx(32768, abs=2)
    assert shared.memory.total < tiled.memory.total < whole.memory.total
    assert whole.timing.step_s < tiled.timing.step_s < shared.timing.step_s
    assert whole.timing.tokens == shared.timing.tokens
    assert shared.stage.longest.turns == 4 * whole.stage.longest.turns


def test_a_long_pair_that_does_not_fit_is_told_to_share_its_rows():
    small = dataclasses.replace(
        long_pair(), cluster=dataclasses.replace(read_cluster("h100:1x8"), memory_gb=30, host_memory_gb=100)
    )
    change, plan = cheapest_change(small)
    assert not make_plan(small).fits
    assert plan.fits
    assert "sequence_parallel_size" in change.words
    assert change.cost == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sequence_parallel_size": 8}, "8 ranks cannot share this model's 28 heads with 4 .* possible: 1, 2, 4, 28"),
        ({"sequence_parallel_size": 3}, "sequence_parallel_size: 8 ranks are not groups of 3"),
        ({"sequence_parallel_size": 2, "attention": "flash_attention_2", "shared_prefix": False}, "attention: sdpa"),
    ],
)
def test_what_ranks_cannot_share_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_plan(long_pair(**settings))
