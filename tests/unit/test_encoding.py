"""Which tokens are learnt: masks on the chat templates of real models, read back by decoding."""

import itertools

import pytest
from PIL import Image

from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.processing import load_processor
from mede2.trainer.data.records import BadRow, Record

SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
FAMILIES = {  # how a conversation without a system message opens, what stands around an image's tokens, that token
    "qwen2_5_vl": (SYSTEM.format("You are a helpful assistant."), "<|vision_start|>{}<|vision_end|>", "<|image_pad|>"),
    "qwen3_vl": ("", "<|vision_start|>{}<|vision_end|>", "<|image_pad|>"),
    "internvl3": ("", "<img>{}</img>\n", "<IMG_CONTEXT>"),
}
IMAGE_TOKENS = 4  # of 32 x 32 pixels, in all


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def encode(families, family):
    """`encode(*conversations, num_given=, images=, max_length=)` as one record of the family's model."""

    def encode_record(*conversations, num_given=0, images=(), max_length=1000):
        record = Record("rows.jsonl:7", tuple(map(tuple, conversations)), num_given, tuple(images))
        return Encoder(families[family], max_length)(record)

    return encode_record


@pytest.fixture
def image(tmp_path, write_image):
    return write_image(tmp_path / "image.png", 32, 32)


def runs(sequence, tokenizer) -> list[tuple[str, bool]]:
    """The sequence as text, cut where learnt tokens begin and end."""
    pairs = zip(sequence.input_ids.tolist(), sequence.answer_mask.tolist(), strict=True)
    return [
        (tokenizer.decode([token for token, _ in run]), learnt)
        for learnt, run in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]


def test_pair_learns_the_answers_and_their_end(families, family, encode, user, assistant, image):
    opening, image_text, image_token = FAMILIES[family]
    prompt, answers = [user("Which finding?", 1)], ("<think>look</think>a mass", "clear")
    example = encode(*([*prompt, assistant(answer)] for answer in answers), num_given=1, images=[image])
    expanded = image_text.format(image_token * IMAGE_TOKENS)
    given = f"{opening}<|im_start|>user\n{expanded}Which finding?<|im_end|>\n<|im_start|>assistant\n"
    for sequence, answer in zip(example.sequences, answers, strict=True):
        assert runs(sequence, families[family].tokenizer) == [(given, False), (f"{answer}<|im_end|>", True)]


def test_every_assistant_turn_of_a_demonstration_is_learnt(families, family, encode, user, assistant):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You read films."}]},
        user("Clear?"), assistant("<think>hm</think>no"), user("Sure?"), assistant("yes\n"),
    ]  # fmt: skip
    (sequence,) = encode(messages).sequences
    assert runs(sequence, families[family].tokenizer) == [
        (SYSTEM.format("You read films.") + "<|im_start|>user\nClear?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>hm</think>no<|im_end|>", True),
        ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes\n<|im_end|>", True),
    ]


def test_earlier_answers_in_the_prompt_of_a_pair_are_given(families, family, encode, user, assistant):
    prompt = [user("Clear?"), assistant("no"), user("Sure?")]
    example = encode([*prompt, assistant("yes")], [*prompt, assistant("well")], num_given=3)
    for sequence, answer in zip(example.sequences, ("yes", "well"), strict=True):
        (given, learnt), end = runs(sequence, families[family].tokenizer)
        assert not learnt
        assert "<|im_start|>assistant\nno<|im_end|>" in given
        assert end == (f"{answer}<|im_end|>", True)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_prompt_is_what_the_model_gets_at_inference(
    families, family, encode, user, assistant, tmp_path, write_image, num_images
):
    """The tokens before the answer are those of the processor's own chat template with a generation prompt."""
    sizes = [(32, 32), (96, 64)][:num_images]
    paths = [write_image(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    sequence, _ = encode(
        [user("Which finding?", num_images), assistant("mass")],
        [user("Which finding?", num_images), assistant("none")],
        num_given=1, images=paths,
    ).sequences  # fmt: skip
    parts = [{"type": "image", "image": Image.open(path)} for path in paths]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "Which finding?"}]}
    inference = families[family].apply_chat_template(
        [message], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    assert sequence.input_ids[~sequence.answer_mask].tolist() == inference["input_ids"][0]
    if num_images and family != "internvl3":
        assert sequence.mm_token_type_ids[~sequence.answer_mask].tolist() == inference["mm_token_type_ids"][0]


def test_equal_questions_about_images_of_several_sizes(
    families, family, encode, user, assistant, tmp_path, write_image
):
    """Three equal turns, three images: each expands to its own number of tokens."""
    sizes = [(32, 32), (32, 32), (96, 64)]
    paths = [write_image(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    messages = [message for _ in sizes for message in (user("And this?", 1), assistant("clear"))]
    (sequence,) = encode(messages, images=paths).sequences
    processor = families[family]
    output = processor(
        text=[processor.image_token * 3], images=[Image.open(path) for path in paths], return_tensors="np"
    )
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (sequence.input_ids == image_id).sum() == (output["input_ids"] == image_id).sum() > 3 * IMAGE_TOKENS


def test_max_length_refuses_what_would_be_cut(encode, user, assistant, image):
    messages = [user("Which finding?", 1), assistant("mass")]
    length = len(encode(messages, images=[image]).sequences[0])
    encode(messages, images=[image], max_length=length)
    with pytest.raises(BadRow, match=rf"rows\.jsonl:7: {length} tokens .* exceed max_length {length - 1}"):
        encode(messages, images=[image], max_length=length - 1)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    ("family", "token"),
    [("qwen2_5_vl", "<|im_end|>"), ("qwen2_5_vl", "<|im_start|>"), ("qwen2_5_vl", "<|image_pad|>"),
     ("internvl3", "<|im_end|>"), ("internvl3", "<IMG_CONTEXT>"), ("internvl3", "<img>")],
)  # fmt: skip
def test_control_tokens_in_a_text_are_refused(encode, user, assistant, role, token):
    """They would end the turn, or stand for an image, inside a text."""
    texts = {"user": "Which?", "assistant": "mass"} | {role: f"one {token} two"}
    with pytest.raises(BadRow) as raised:
        encode([user(texts["user"]), assistant(texts["assistant"])])
    assert raised.value.source == "rows.jsonl:7"
    assert token in raised.value.problem
    assert role in raised.value.problem


KEEPS_LAST_THINK = (  # as reasoning models' templates do: what was thought before an earlier answer is dropped
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set text = m.content[0].text %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content[0].text }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[-1].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def encode_with(model_folder):
    """`encode_with(template, messages, images)`."""
    processor = load_processor(model_folder)

    def encode_record(template, messages, images=()):
        processor.chat_template = processor.tokenizer.chat_template = template
        return Encoder(processor, 1000)(Record("rows.jsonl:7", (tuple(messages),), 0, tuple(images)))

    return encode_record


def test_template_that_rewrites_earlier_turns_is_refused(encode_with, user, assistant):
    one_turn = [user("Clear?"), assistant("<think>hm</think>no")]
    assert encode_with(KEEPS_LAST_THINK, one_turn).sequences[0].num_answer_tokens
    with pytest.raises(BadRow, match=r"rows\.jsonl:7: the model's chat template rewrites earlier turns"):
        encode_with(KEEPS_LAST_THINK, [*one_turn, user("Sure?"), assistant("<think>hm</think>yes")])


def test_template_without_an_end_of_turn_is_refused(encode_with, user, assistant):
    with pytest.raises(BadRow, match=r"ends the assistant's turn without <\|im_end\|>"):
        encode_with(NO_END, [user("Clear?"), assistant("no")])


def test_template_that_shows_no_images_is_refused(encode_with, user, assistant, image):
    with pytest.raises(BadRow, match="shows 0 of 1 images"):
        encode_with(NO_IMAGES, [user("Clear?", 1), assistant("no")], [image])


def test_digest_follows_tokens_masks_and_image_bytes(encode, user, assistant, tmp_path, write_image):
    """And not the names of files: a data set may move."""
    one, same, other = (write_image(tmp_path / f"{n}.png", 32, 32, seed) for n, seed in enumerate((1, 1, 2)))
    digests = [
        encode([user("Clear?", 1), assistant(answer)], images=[path]).digest
        for answer, path in (("no", one), ("no", same), ("no", other), ("yes", one))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    turns = [user("Clear?"), assistant("no"), user("Sure?"), assistant("yes")]
    assert encode(turns).digest != encode(turns, num_given=3).digest
