"""Micro-batches, and the policy on them: its log-probabilities are those of the model's own logits."""

import copy
import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import Batches, load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.sampler import Sampler, Slot
from mede2.trainer.policy import Policy
from mede2.trainer.settings import ELICIT, ENHANCE, BatchArithmetic

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl3"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model_and_policy(request, family):
    """The model by itself and a copy inside a Policy. Weights are scaled up, or all answers would look alike."""
    folder = request.getfixturevalue({"qwen2_5_vl": "model_folder", "internvl3": "internvl_folder"}[family])
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model, Policy(copy.deepcopy(model), "torch")


@pytest.fixture
def examples(family, families, stage2_file, world):
    encoder = Encoder(families[family], 1000)
    return load_dataset((str(stage2_file),), ENHANCE, encoder, "stop", world).examples


def slots(*indices, weight=1):
    return [Slot(index, weight) for index in indices]


@torch.no_grad()
def logps_of(policy, batch) -> torch.Tensor:
    return policy(batch.inputs, batch.rows, batch.targets, batch.sequence)


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
    logps = model(**batch).logits.log_softmax(-1)
    end, answers = processor.tokenizer.eos_token_id, []
    for number, (prompt, group) in enumerate(zip(prompts, images, strict=True)):
        start = len(processor(text=[prompt], images=group or None)["input_ids"][0])
        ids = batch["input_ids"][number]
        stop = start + (ids[start:] == end).nonzero()[0].item() + 1
        positions = torch.arange(start, stop)
        answers.append(logps[number, positions - 1, ids[positions]])
    return answers


@pytest.mark.parametrize(
    "indices", [(0, 1, 2, 6), (1, 0), (6,), (4, 1)], ids=["mixed", "text_first", "three_images", "text_only"]
)
def test_logps_are_those_of_the_models_own_logits(family, families, model_and_policy, examples, stage2_file, indices):
    model, policy = model_and_policy
    batch = Collator(families[family], with_images=True)(examples, slots(*indices))
    ours = logps_of(policy, batch)
    expected = logps_by_hand(model, families[family], stage2_file, indices)
    for number, logps in enumerate(expected):
        torch.testing.assert_close(ours[batch.sequence == number], logps, **TOLERANCE)
    spread = torch.cat(expected).std()
    assert spread > 0.1, "the model answers everything alike, so this comparison proves nothing"


@pytest.mark.parametrize("indices", [(1,), (4, 1)])
def test_filler_image_changes_no_log_probability(family, families, model_and_policy, examples, indices):
    """A micro-batch of text runs the vision tower on a masked image, so that all ranks call the same modules."""
    _, policy = model_and_policy
    with_filler, without = (
        Collator(families[family], with_images=with_images)(examples, slots(*indices)) for with_images in (True, False)
    )
    assert "pixel_values" in with_filler.inputs
    assert "pixel_values" not in without.inputs
    torch.testing.assert_close(logps_of(policy, with_filler), logps_of(policy, without), **TOLERANCE)


def test_neighbours_and_padding_change_no_log_probability(family, families, model_and_policy, examples):
    _, policy = model_and_policy
    collate = Collator(families[family], with_images=True)
    together = collate(examples, slots(2, 1, 5))
    logps = logps_of(policy, together)
    for place, index in enumerate((2, 1, 5)):
        alone = collate(examples, slots(index))
        for side in range(2):
            torch.testing.assert_close(
                logps[together.sequence == place + 3 * side],
                logps_of(policy, alone)[alone.sequence == side], **TOLERANCE,
            )  # fmt: skip


def test_rows_are_padded_at_the_right(family, families, examples):
    batch = Collator(families[family], with_images=True)(examples, slots(2, 1))
    sequences = [examples[index].sequences[side] for side in range(2) for index in (2, 1)]
    assert batch.inputs["input_ids"].shape == (4, max(map(len, sequences)))
    for ids, mask, sequence in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], sequences, strict=True):
        assert ids[: len(sequence)].tolist() == sequence.input_ids.tolist()
        assert mask.tolist() == [1] * len(sequence) + [0] * (len(mask) - len(sequence))


def test_rows_point_to_the_position_before_each_answer_token(family, families, examples):
    batch = Collator(families[family], with_images=True)(examples, slots(2, 1))
    following = batch.inputs["input_ids"].flatten()[batch.rows + 1]
    assert following.tolist() == batch.targets.tolist()
    width = batch.inputs["input_ids"].shape[1]
    assert (batch.rows // width).tolist() == batch.sequence.tolist()
    sequences = [examples[index].sequences[side] for side in range(2) for index in (2, 1)]
    learnt = [sequence.input_ids[sequence.answer_mask].tolist() for sequence in sequences]
    assert [batch.targets[batch.sequence == number].tolist() for number in range(4)] == learnt


def test_chosen_come_before_rejected_with_their_weights_and_names(families, examples):
    batch = Collator(families["qwen2_5_vl"], with_images=True)(examples, [Slot(5, 1), Slot(3, 0)])
    assert batch.weights.tolist() == [1, 0, 1, 0]
    assert batch.indices == (5, 3)
    assert [source.rpartition(":")[2] for source in batch.sources] == ["6", "4"]


def test_pixels_are_the_processors(family, families, examples, stage2_file):
    """Each image once for the chosen and once for the rejected answer, in the order of the placeholders."""
    batch = Collator(families[family], with_images=True)(examples, slots(6, 1, 2))
    rows = [json.loads(line) for line in stage2_file.read_text(encoding="utf-8").splitlines()]
    names = [name for index in (6, 1, 2) for name in rows[index].get("images", [])] * 2
    images = [Image.open(stage2_file.parent / name) for name in names]
    text = families[family].image_token * len(images)
    expected = families[family](text=[text], images=images, return_tensors="pt")
    for name in {"qwen2_5_vl": ("pixel_values", "image_grid_thw"), "internvl3": ("pixel_values",)}[family]:
        assert torch.equal(batch.inputs[name], expected[name])


def test_totals_count_what_is_learnt_over_the_global_batch(load, stage1_file, stage2_file, processor, world):
    """Seven rows in batches of four: the fourth slot of the second batch is filler and counts nowhere."""
    for file, stage in ((stage1_file, ELICIT), (stage2_file, ENHANCE)):
        dataset = load(file, stage)
        sampler = Sampler(7, BatchArithmetic(4, 2, 1), seed=0)
        batches = Batches(dataset, sampler, Collator(processor, dataset.has_images), world)
        totals = [batches.totals(step) for step in range(2)]
        for step, total in enumerate(totals):
            micro = list(batches.micro_batches(step))
            first = [m.sequence < len(m.indices) for m in micro]
            counted = sum((m.weights[m.sequence] * f).sum().item() for m, f in zip(micro, first, strict=True))
            assert total.num_answer_tokens == counted
        assert [total.num_examples for total in totals] == [4, 3]
        whole = batches.whole()
        assert (whole.num_examples, whole.num_tokens) == (7, sum(total.num_tokens for total in totals))


def test_moving_casts_the_images_only(families, examples):
    batch = Collator(families["qwen2_5_vl"], with_images=True)(examples, slots(0))
    batch = batch.to(torch.device("cpu"), torch.bfloat16)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert batch.inputs["input_ids"].dtype == batch.inputs["image_grid_thw"].dtype == torch.int64
    assert batch.weights.dtype == torch.float32
