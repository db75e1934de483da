"""Qwen2.5-VL, Qwen3-VL and InternVL3: tokens, pixels and log-probabilities are those of each model by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model, save_processor
from mede2.trainer.data.sampler import Slot
from mede2.trainer.policy import load_policy
from mede2.trainer.settings import ELICIT, ENHANCE

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl3")
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def policy(family, family_folders):
    return load_policy(family_folders[family], dtype=torch.float32, attention="sdpa", implementation="torch")


@pytest.fixture(scope="module")
def alone(family, family_folders):
    """The model as transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(family_folders[family], dtype=torch.float32)


@pytest.fixture
def encode(families, family, world):
    """`encode(file, stage)`: the examples of a file."""

    def encode_file(file: Path, stage: int):
        return load_dataset((str(file),), stage, Encoder(families[family], 1000), "stop", world).examples

    return encode_file


@torch.no_grad()
def our_logps(policy, processor, examples, indices) -> dict[tuple[int, int], torch.Tensor]:
    """Log-probabilities of the answer tokens out of one micro-batch, by side and index of the example."""
    collate = Collator(processor, Positions(Path(policy.model.name_or_path)), True, Layout(), packed=True)
    batch = collate(examples, [Slot(index, 1) for index in indices])
    logps = policy(batch.inputs, batch.branches, batch.rows, batch.targets, batch.sequence)
    return {
        (side, index): logps[batch.sequence == side * len(indices) + place]
        for side in range(len(examples[0].sequences))
        for place, index in enumerate(indices)
    }


class Conversation:
    """One conversation as the model's own processor and template make it: whole, unpadded, by itself."""

    def __init__(self, processor, messages: list[dict], num_given: int, images: list[Path]):
        shown = iter(images)
        self.messages = [
            message | {"content": [
                part | {"image": Image.open(next(shown))} if part["type"] == "image" else part
                for part in message["content"]
            ]}
            for message in messages
        ]  # fmt: skip
        self.processor = processor
        self.inputs = self._apply(self.messages)
        self.ids = self.inputs["input_ids"][0]
        self.answers = []  # (first, last + 1), by the length of what the model is given before it answers
        for position, message in enumerate(messages):
            if message["role"] == "assistant" and position >= num_given:
                start = self._apply(self.messages[:position], add_generation_prompt=True)["input_ids"].shape[1]
                end = (self.ids[start:] == processor.tokenizer.eos_token_id).nonzero()[0].item() + 1
                self.answers.append((start, start + end))

    def _apply(self, messages, **how):
        return self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **how)

    @torch.no_grad()
    def logps(self, model) -> torch.Tensor:
        """Log-probabilities (N,) of the answers' tokens from the model's own logits."""
        logits = model(**self.inputs).logits[0]
        of_next = logits[:-1].log_softmax(-1).gather(1, self.ids[1:, None])[:, 0]
        return torch.cat([of_next[start - 1 : end - 1] for start, end in self.answers])


def conversations(processor, file: Path) -> dict[tuple[int, int], Conversation]:
    """Every conversation of a file, by side and row."""
    found = {}
    for index, row in enumerate(map(json.loads, file.read_text(encoding="utf-8").splitlines())):
        images = [file.parent / name for name in row.get("images", [])]
        pair = [row["prompt"] + row[side] for side in ("chosen", "rejected")] if "prompt" in row else [row["messages"]]
        for side, messages in enumerate(pair):
            found[side, index] = Conversation(processor, messages, len(row.get("prompt", [])), images)
    return found


@pytest.mark.parametrize("stage", [ELICIT, ENHANCE])
def test_tokens_are_those_of_the_template_over_the_whole_conversation(families, family, encode, family_files, stage):
    processor = families[family]
    examples = encode(family_files[stage], stage)
    for (side, index), conversation in conversations(processor, family_files[stage]).items():
        sequence = examples[index].sequences[side]
        length = len(sequence)
        assert sequence.input_ids.tolist() == conversation.ids[:length].tolist()
        assert processor.tokenizer.decode(conversation.ids[length:]) == "\n"  # the template's, after the last answer
        learnt = [position for start, end in conversation.answers for position in range(start, end)]
        assert sequence.answer_mask.nonzero()[0].tolist() == learnt
        if "mm_token_type_ids" in conversation.inputs:
            assert sequence.mm_token_type_ids.tolist() == conversation.inputs["mm_token_type_ids"][0, :length].tolist()


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (3, 1), (1,), (2,)], ids=lambda indices: "-".join(map(str, indices)))
@pytest.mark.parametrize("stage", [ELICIT, ENHANCE])
def test_logps_are_those_of_the_models_own_logits(
    families, family, policy, alone, encode, family_files, stage, indices
):  # fmt: skip
    """Of micro-batches of 0 to 3 images a row, against one unpadded conversation at a time."""
    true = conversations(families[family], family_files[stage])
    ours = our_logps(policy, families[family], encode(family_files[stage], stage), indices)
    for (side, index), logps in ours.items():
        torch.testing.assert_close(logps, true[side, index].logps(alone), **TOLERANCE)
    assert torch.cat(list(ours.values())).std() > 0.3, "all tokens are alike to the model, so this proves nothing"


def test_images_go_to_their_own_placeholders(
    families, family, policy, alone, encode, tmp_path, write_image, write_rows, user, assistant
):
    """Images of one size in two orders: each order has the model's own log-probabilities, and they differ."""
    first, second, third = (write_image(tmp_path / f"{seed}.png", 64, 64, seed).name for seed in range(3))
    pair = {"prompt": [user("Which one?", 3)], "chosen": [assistant("the first")], "rejected": [assistant("none")]}
    orders = [[first, second, third], [first, third, second]]
    file = write_rows(tmp_path / "rows.jsonl", [pair | {"images": order} for order in orders])
    ours = our_logps(policy, families[family], encode(file, ENHANCE), (0, 1))
    for of_sequence, conversation in conversations(families[family], file).items():
        torch.testing.assert_close(ours[of_sequence], conversation.logps(alone), **TOLERANCE)
    for side in range(2):
        assert (ours[side, 0] - ours[side, 1]).abs().max() > 1e-2


def older_names(folder: Path) -> None:
    """The limits as the published Qwen2.5-VL states them, in its preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    size = config.pop("size")
    config |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change"), [*((name, None) for name in FAMILIES), ("qwen2_5_vl", older_names)],
    ids=[*FAMILIES, "qwen2_5_vl_as_published"],
)  # fmt: skip
def test_max_pixels_limits_the_images_and_goes_along_with_the_export(tmp_path, family_folders, name, change):
    """2048 pixels are 6 tokens of Qwen's (32 x 48), or 12 of InternVL's (two tiles and a thumbnail)."""
    source, exported = tmp_path / "source", tmp_path / "exported"
    shutil.copytree(family_folders[name], source)
    if change:
        change(source)

    def num_tokens(processor) -> int:
        inputs = processor(text=[processor.image_token], images=[Image.new("RGB", (64, 96))])
        return inputs["input_ids"][0].count(processor.image_token_id)

    limited = load_processor(source, max_pixels=2048)
    assert num_tokens(load_processor(source)) >= 24
    assert num_tokens(limited) == {"internvl3": 12}.get(name, 6)
    exported.mkdir()
    shutil.copyfile(source / "config.json", exported / "config.json")
    save_processor(source, exported, max_pixels=2048)
    assert describe_processor(load_processor(exported)) == describe_processor(limited)


INTERNVL_CHAT = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"]}
INTERNVL_CHAT |= {"auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        (INTERNVL_CHAT, ["InternVL in its original form", "-hf", "OpenGVLab/InternVL3-8B-hf"]),
        (
            {"model_type": "minicpmv", "auto_map": {}},
            ["the family minicpmv", "code that comes with a model is not run"],
        ),
        ({"model_type": "gemma3"}, ["is a gemma3", "known: qwen2_vl, qwen2_5_vl, qwen3_vl, internvl"]),
        ({"model_type": "qwen2"}, ["is a qwen2, which has no processor for images and text"]),
        (
            {"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}},
            ["is quantized (awq)", "16-bit weights"],
        ),
        (["qwen2_5_vl"], ["the family None"]),
    ],
    ids=["internvl_chat", "remote_code", "other_family", "text_model", "awq", "no_object"],
)
def test_models_of_another_kind_are_refused_by_their_config(tmp_path, config, pieces):
    """Before weights are asked for: the folder holds none."""
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for refuse in (lambda: locate_model(str(tmp_path)), lambda: load_processor(tmp_path)):
        with pytest.raises(ValueError, match=r"^model: ") as raised:
            refuse()
        assert not [piece for piece in (str(tmp_path), *pieces) if piece not in str(raised.value)]


def test_a_hub_name_of_the_original_internvl_is_told_its_twin(tmp_path, monkeypatch):
    """In the hub's cache there is the config.json alone: nothing else is asked for."""
    repository = tmp_path / "models--OpenGVLab--InternVL3-2B"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "snapshots" / "0" / "config.json").write_text(json.dumps(INTERNVL_CHAT), encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"in -hf, such as OpenGVLab/InternVL3-2B-hf$"):
        locate_model("OpenGVLab/InternVL3-2B")


def test_gguf_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}), encoding="utf-8")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds no safetensors weights \(GGUF and .bin files are not read\)"):
        locate_model(str(tmp_path))
