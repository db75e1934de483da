"""Micro-batches, and the policy on them: its log-probabilities are those of the model's own logits."""

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mede2.trainer.attention import branch_mask
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.corruption import corrupt
from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.images import load_image
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.sampler import Sampler, Slot
from mede2.trainer.policy import Policy
from mede2.trainer.settings import ELICIT, ENHANCE, BatchArithmetic

TOLERANCE = {"rtol": 0, "atol": 1e-8}  # in fp64, so that only a wrong mask, position or row can exceed it


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model_and_policy(request, family):
    """The model by itself and a copy inside a Policy, fp64. Weights are scaled up, or all answers would look alike."""
    folder = request.getfixturevalue({"qwen2_5_vl": "model_folder", "internvl3": "internvl_folder"}[family])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model, Policy(copy.deepcopy(model), "torch")


@pytest.fixture
def examples(family, families, stage2_file, world):
    encoder = Encoder(families[family], 1000)
    return load_dataset((str(stage2_file),), ENHANCE, encoder, "stop", world).examples


@pytest.fixture(scope="module")
def positions(family, request):
    return Positions(request.getfixturevalue({"qwen2_5_vl": "model_folder", "internvl3": "internvl_folder"}[family]))


@pytest.fixture
def collate(family, families, positions, examples):
    """`collate(*indices, ...)`: the micro-batch of these examples in one of the layouts."""

    def make(*indices, shared_prefix=True, packed=False, with_images=True):
        collator = Collator(families[family], positions, with_images, Layout(shared_prefix), packed=packed)
        return collator(examples, slots(*indices))

    return make


LAYOUTS = {
    "shared": {}, "apart": {"shared_prefix": False}, "shared_packed": {"packed": True},
    "apart_packed": {"shared_prefix": False, "packed": True},
}  # fmt: skip


def slots(*indices, weight=1):
    return [Slot(index, weight) for index in indices]


@torch.no_grad()
def logps_of(policy, batch) -> torch.Tensor:
    batch = batch.to(torch.device("cpu"), policy.model.dtype)
    return policy(batch.inputs, batch.branches, batch.rows, batch.targets, batch.sequence)


@torch.no_grad()
def logps_by_hand(model, processor, file, indices) -> list[torch.Tensor]:
    """Answer log-probabilities of each conversation from the model's own logits on the processor's own batch.

    The rendered conversation is tokenized whole; its answer is found by the length of the prompt that the processor
    gives for generation, and ends with the turn's end token.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts, prompts, images = [], [], []
    for side in ("chosen", "rejected"):
        for row in (rows[index] for index in indices):
            texts.append(processor.apply_chat_template(row["prompt"] + row[side]))
            prompts.append(processor.apply_chat_template(row["prompt"], add_generation_prompt=True))
            images.append([Image.open(file.parent / name) for name in row.get("images", [])])
    flat = [image for group in images for image in group] or None
    batch = processor(text=texts, images=flat, padding=True, padding_side="right", return_tensors="pt")
    batch = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in batch.items()}
    logps = model(**batch).logits.log_softmax(-1)
    end, answers = processor.tokenizer.eos_token_id, []
    for number, (prompt, group) in enumerate(zip(prompts, images, strict=True)):
        start = len(processor(text=[prompt], images=group or None)["input_ids"][0])
        ids = batch["input_ids"][number]
        stop = start + (ids[start:] == end).nonzero()[0].item() + 1
        positions = torch.arange(start, stop)
        answers.append(logps[number, positions - 1, ids[positions]])
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "indices", [(0, 1, 2, 6), (1, 0), (6,), (4, 1)], ids=["mixed", "text_first", "three_images", "text_only"]
)
def test_logps_are_those_of_the_models_own_logits(
    family, families, model_and_policy, collate, stage2_file, indices, layout
):
    """Whether a pair runs as one row or two, alone or packed with others."""
    model, policy = model_and_policy
    batch = collate(*indices, **LAYOUTS[layout])
    ours = logps_of(policy, batch)
    expected = logps_by_hand(model, families[family], stage2_file, indices)
    for number, logps in enumerate(expected):
        torch.testing.assert_close(ours[batch.sequence == number], logps, **TOLERANCE)
    spread = torch.cat(expected).std()
    assert spread > 0.1, "the model answers everything alike, so this comparison proves nothing"


@pytest.mark.parametrize("kind", ["blank", "shuffle"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_third_side_is_the_chosen_answer_under_a_corrupted_image(
    families, family, positions, model_and_policy, examples, packed, kind
):
    """Pairs 6 (three images), 1 (none) and 0: the first two sides as ever, the third what a record with those images
    gives; a pair without an image has no tokens there."""
    _, policy = model_and_policy
    make = partial(Collator, families[family], positions, True, packed=packed)
    batch = make(Layout(corrupted=True), corruption=(kind, 3))(examples, slots(6, 1, 0))
    plain = make(Layout())(examples, slots(6, 1, 0))
    logps, usual = logps_of(policy, batch), logps_of(policy, plain)
    assert len(batch.weights) == 9
    torch.testing.assert_close(logps[batch.sequence < 6], usual, **TOLERANCE)
    assert sorted(set(batch.sequence.tolist())) == [0, 1, 2, 3, 4, 5, 6, 8]
    again = make(Layout(corrupted=True), corruption=(kind, 3))(examples, slots(0))
    expected = logps_of(policy, again)[again.sequence == 2]
    torch.testing.assert_close(logps[batch.sequence == 8], expected, **TOLERANCE)
    assert (logps[batch.sequence == 8] - logps[batch.sequence == 2]).abs().max() > 1e-3
    assert batch.targets[batch.sequence == 8].tolist() == batch.targets[batch.sequence == 2].tolist()


def test_corrupted_pixels_come_where_their_piece_does(families, family, positions, examples):
    """Right images, then their corruptions, example by example; another seed draws others."""
    processor, example = families[family], examples[6]
    make = partial(Collator, processor, positions, True, Layout(corrupted=True))
    batch = make(corruption=("crop", 3))(examples, slots(6))
    right = [load_image(Path(path)) for path in example.images]
    wrong = [corrupt(image, "crop", f"{example.digest}-3-{number}") for number, image in enumerate(right)]
    expected = processor(text=[processor.image_token * 6], images=right + wrong, return_tensors="pt")
    assert torch.equal(batch.inputs["pixel_values"], expected["pixel_values"])
    other = make(corruption=("crop", 4))(examples, slots(6))
    assert not torch.equal(batch.inputs["pixel_values"], other.inputs["pixel_values"])


def test_eager_attention_takes_the_mask_too(family, families, model_and_policy, collate, stage2_file):
    model, _ = model_and_policy
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    batch = collate(0, 1, packed=True)
    ours = logps_of(Policy(eager, "torch"), batch)
    expected = logps_by_hand(eager, families[family], stage2_file, (0, 1))
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=1e-5)  # eager takes its softmax in fp32


def test_in_fp32_a_shared_prompt_costs_no_digits(family, families, model_and_policy, collate, stage2_file):
    model, policy = (copy.deepcopy(module).float() for module in model_and_policy)
    expected = logps_by_hand(model, families[family], stage2_file, (0, 6))
    ours = logps_of(policy, collate(0, 6, packed=True))
    torch.testing.assert_close(ours, torch.cat(expected), rtol=2e-6, atol=1e-5)


def with_branches(batch, keep_pieces: int, keep_branches: int):
    return dataclasses.replace(
        batch, branches=batch.branches * torch.tensor([keep_pieces, keep_branches])[:, None, None]
    )


def with_positions(batch, change):
    inputs = dict(batch.inputs)
    places = change(inputs.pop("position_ids"))
    return dataclasses.replace(batch, inputs=inputs if places is None else inputs | {"position_ids": places})


BREAKS = {
    "answers_see_each_other": lambda batch: with_branches(batch, 1, 0),
    "examples_see_each_other": lambda batch: with_branches(batch, 0, 1),  # of apart ones, which have no branches
    "the_second_answer_goes_on_after_the_first": lambda batch: with_positions(
        batch, lambda places: torch.arange(places.shape[-1]).expand(places.shape)
    ),
    "no_positions": lambda batch: with_positions(batch, lambda places: None),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_mask_or_broken_positions_show(model_and_policy, collate, fault):
    """The comparison above would catch each of these."""
    _, policy = model_and_policy
    batch = collate(0, 2, packed=True, shared_prefix=fault != "examples_see_each_other")
    off = (logps_of(policy, BREAKS[fault](batch)) - logps_of(policy, batch)).abs().max()
    assert off > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("indices", [(1,), (4, 1)])
def test_filler_image_changes_no_log_probability(model_and_policy, collate, indices, layout):
    """A micro-batch of text runs the vision tower on an image that nothing sees, so that all ranks call the same
    modules."""
    _, policy = model_and_policy
    with_filler, without = (collate(*indices, with_images=flag, **LAYOUTS[layout]) for flag in (True, False))
    assert "pixel_values" in with_filler.inputs
    assert "pixel_values" not in without.inputs
    torch.testing.assert_close(logps_of(policy, with_filler), logps_of(policy, without), **TOLERANCE)


@pytest.mark.parametrize("indices", [(1,), (2, 1), (0, 2, 4)])
def test_one_conversation_a_row_needs_no_mask(collate, indices):
    """Whatever lies behind it: padding, or the filler image. Its places in the text go on, so that transformers takes
    the row for one sequence."""
    batch = collate(*indices, shared_prefix=False)
    assert batch.branches is None
    positions = batch.inputs["position_ids"]
    places = positions[0] if positions.ndim == 3 else positions
    assert places.tolist() == [list(range(places.shape[1]))] * len(places)


@pytest.mark.parametrize("length", [5, 8, 13])
def test_rows_of_the_mask_are_aligned(length):
    mask = branch_mask(torch.ones(2, length).long(), torch.zeros(2, length).long(), torch.bfloat16)
    assert mask.shape == (2, 1, length, length)
    assert mask.stride(2) % 8 == 0
    assert (mask == 0).sum() == 2 * length * (length + 1) // 2


def test_pieces_have_rows_of_their_own_padded_at_the_right(collate, examples):
    batch = collate(2, 1)
    pieces = [piece for index in (2, 1) for piece in Layout().pieces(examples[index])]
    ids, numbers = batch.inputs["input_ids"], batch.branches[0]
    assert ids.shape == (2, max(map(len, pieces)))
    for row, piece in enumerate(pieces):
        assert ids[row, : len(piece)].tolist() == piece.input_ids().tolist()
        assert numbers[row].tolist() == [1] * len(piece) + [0] * (ids.shape[1] - len(piece))


def test_a_packed_row_has_no_padding(collate, examples):
    batch = collate(2, 1, 5, packed=True)
    assert batch.inputs["input_ids"].shape == (1, sum(sum(Layout().lengths(examples[index])) for index in (2, 1, 5)))
    assert batch.branches[0].unique_consecutive().tolist() == [1, 2, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_the_answers_in_the_order_of_the_sequences(collate, examples, layout):
    batch = collate(2, 1, **LAYOUTS[layout])
    sequences = [examples[index].sequences[side] for side in range(2) for index in (2, 1)]
    learnt = [sequence.input_ids[sequence.answer_mask].tolist() for sequence in sequences]
    assert [batch.targets[batch.sequence == number].tolist() for number in range(4)] == learnt
    assert batch.sequence.tolist() == sorted(batch.sequence.tolist())


def test_chosen_come_before_rejected_with_their_weights_and_names(families, family, positions, examples):
    batch = Collator(families[family], positions, True, Layout())(examples, [Slot(5, 1), Slot(3, 0)])
    assert batch.weights.tolist() == [1, 0, 1, 0]
    assert batch.indices == (5, 3)
    assert [source.rpartition(":")[2] for source in batch.sources] == ["6", "4"]
    assert batch.has_image.tolist() == [bool(examples[index].images) for index in (5, 3)]


@pytest.mark.parametrize(("layout", "times"), [("shared", 1), ("apart", 2), ("shared_packed", 1)])
def test_pixels_are_the_processors(family, families, collate, stage2_file, layout, times):
    """Each image once for a pair that shares its prompt, else for each answer, in the order of the placeholders."""
    batch = collate(6, 1, 2, **LAYOUTS[layout])
    rows = [json.loads(line) for line in stage2_file.read_text(encoding="utf-8").splitlines()]
    names = [name for index in (6, 1, 2) for name in rows[index].get("images", []) * times]
    images = [Image.open(stage2_file.parent / name) for name in names]
    text = families[family].image_token * len(images)
    expected = families[family](text=[text], images=images, return_tensors="pt")
    for name in {"qwen2_5_vl": ("pixel_values", "image_grid_thw"), "internvl3": ("pixel_values",)}[family]:
        assert torch.equal(batch.inputs[name], expected[name])


def test_totals_count_what_is_learnt_over_the_global_batch(
    load, stage1_file, stage2_file, processor, model_folder, world
):
    """Seven rows in batches of four: the fourth slot of the second batch is filler and counts nowhere."""
    for file, stage in ((stage1_file, ELICIT), (stage2_file, ENHANCE)):
        dataset = load(file, stage)
        sampler = Sampler(tuple(map(Layout().lengths, dataset.examples)), BatchArithmetic(4, 2, 1), seed=0)
        collator = Collator(processor, Positions(model_folder), dataset.has_images, Layout())
        batches = Batches(dataset, sampler, collator, world)
        totals = [batches.totals(step) for step in range(2)]
        for step, total in enumerate(totals):
            micro = list(batches.micro_batches(step))
            first = [m.sequence < len(m.indices) for m in micro]
            counted = sum((m.weights[m.sequence] * f).sum().item() for m, f in zip(micro, first, strict=True))
            assert total.num_answer_tokens == counted
            assert total.num_with_image == sum((m.weights[: len(m.indices)] * m.has_image).sum().item() for m in micro)
        assert [total.num_examples for total in totals] == [4, 3]
        whole = batches.whole()
        assert (whole.num_examples, whole.num_tokens) == (7, sum(total.num_tokens for total in totals))


def test_moving_casts_the_images_only(collate):
    batch = collate(0).to(torch.device("cpu"), torch.bfloat16)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert batch.inputs["input_ids"].dtype == batch.inputs["position_ids"].dtype == torch.int64
    assert batch.weights.dtype == torch.float32
