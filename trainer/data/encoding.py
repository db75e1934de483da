"""From a record to tokens: the model's chat template and processor, and which tokens are learnt."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.records import BadRow, Message, Record
from mede2.trainer.files import hash_file

MOST_CHARACTERS = 256  # of a token; no vocabulary has longer ones


@dataclass(frozen=True)
class Sequence:
    """One conversation as tokens.

    Attributes:
        input_ids: (T,) int64, image tokens expanded.
        answer_mask: (T,) bool, true where the token is learnt: assistant text and the turn's end token.
        mm_token_type_ids: (T,) int64, 1 for image tokens, as the model's processor says.
    """

    input_ids: np.ndarray
    answer_mask: np.ndarray
    mm_token_type_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answer_mask.sum())


@dataclass(frozen=True)
class Example:
    """An encoded record: Stage I one sequence, Stage II the chosen and the rejected one.

    Attributes:
        source: file and line.
        sequences: same order as the record's conversations.
        images: (path, ...) in the order of their placeholders.
        digest: sha256 over tokens, masks and image bytes: what the log-probabilities depend on.
        image_hashes: sha256 of the bytes of each image.
    """

    source: str
    sequences: tuple[Sequence, ...]
    images: tuple[str, ...]
    digest: str
    image_hashes: tuple[str, ...] = ()

    @property
    def prefix(self) -> int:
        """Tokens before the first learnt one: what the answers of a pair share."""
        return int(self.sequences[0].answer_mask.argmax())


def read_images(record: Record, grey_window: Window = None) -> tuple[list[Image.Image], tuple[str, ...]]:
    """The images of a record, decoded, and the sha256 of each one's bytes; or the BadRow that one does not decode."""
    try:
        images = [load_image(path, grey_window) for path in record.images]
    except ValueError as error:
        raise BadRow(record.source, str(error), "image") from error
    return images, tuple(map(hash_file, record.images))


class Encoder:
    """Encodes records with one model's processor.

    Args:
        processor: of the model (`processing.load_processor`).
        max_length: longest sequence in tokens.
        grey_window: see `images.load_image`.
    """

    def __init__(self, processor, max_length: int, grey_window: Window = None):
        self.processor, self.max_length, self.grey_window = processor, max_length, grey_window
        self.special_tokens = [
            token.content
            for token in processor.tokenizer.added_tokens_decoder.values()
            if token.special or token.content.startswith("<|")
        ]  # control tokens, not words such as <think> that answers are made of
        self.end = processor.tokenizer.eos_token
        if processor.tokenizer.decode(processor.tokenizer("a", add_special_tokens=False)["input_ids"]) != "a":
            raise ValueError("model: its tokenizer puts a space before every text, so answers would start with one")

    def __call__(self, record: Record) -> Example:
        """Encode and check one record.

        Raises:
            BadRow: an image that does not decode or that the model does not take, control tokens inside a text, a
                template that does not fit, or a sequence longer than `max_length`.
        """
        for message in {id(m): m for conversation in record.conversations for m in conversation}.values():
            self._check_text(record.source, message)
        images, image_hashes = read_images(record, self.grey_window)
        encoded: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        sequences = []
        for conversation in record.conversations:
            segments = self._segments(record.source, conversation, record.num_prompt_messages)
            sequences.append(self._encode(record.source, segments, images, encoded))
        for sequence in sequences:
            if len(sequence) > self.max_length:
                of_images = int((sequence.input_ids == self.processor.image_token_id).sum())
                raise BadRow(
                    record.source,
                    f"{len(sequence)} tokens ({of_images} of images) exceed "
                    f"max_length {self.max_length}; the answer would be cut. Raise --max-length or lower --max-pixels",
                    "length",
                )
        digest = self._digest(sequences, image_hashes)
        return Example(record.source, tuple(sequences), tuple(map(str, record.images)), digest, image_hashes)

    def _check_text(self, source: str, message: Message) -> None:
        for part in message["content"]:
            if part["type"] == "text":
                for token in self.special_tokens:
                    if token in part["text"]:
                        raise BadRow(source, f"a text of the {message['role']} holds the control token {token}", "text")
                if len(part["text"]) > MOST_CHARACTERS * self.max_length:
                    raise BadRow(
                        source,
                        f"a text of the {message['role']} has {len(part['text'])} characters, far more than max_length "
                        f"{self.max_length} tokens",
                        "length",
                    )

    def _segments(self, source: str, conversation: tuple[Message, ...], num_given: int) -> list[tuple[str, bool]]:
        """The rendered conversation cut at the answers: (text, learnt), as the prompt and its continuation meet at
        inference. What the template writes after the last answer is left off."""
        segments: list[tuple[str, bool]] = []
        done = ""
        for position, message in enumerate(conversation):
            if message["role"] == "assistant" and position >= num_given:
                head = self._render(source, conversation[:position], add_generation_prompt=True)
                full = self._render(source, conversation[: position + 1], add_generation_prompt=False)
                if not (head.startswith(done) and full.startswith(head)):
                    raise BadRow(
                        source,
                        "the model's chat template rewrites earlier turns, or opens the answer itself, so that answers "
                        "cannot be told apart",
                    )
                answer, end, _ = full[len(head) :].partition(self.end)
                if not end:
                    raise BadRow(source, f"the model's chat template ends the assistant's turn without {self.end}")
                segments += [(head[len(done) :], False), (answer + end, True)]
                done = head + answer + end
        return segments

    def _render(self, source: str, messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise BadRow(source, f"the model's chat template refuses these messages ({error})") from error

    def _encode(self, source: str, segments, images: list, encoded: dict) -> Sequence:
        """Tokenize segment by segment; `encoded` keeps those that both answers share, by text and first image."""
        ids, mask, types, used = [], [], [], 0
        for text, learnt in segments:
            count = text.count(self.processor.image_token)
            key = (text, used)
            if key not in encoded:
                try:
                    encoded[key] = self._tokenize(text, images[used : used + count])
                except ValueError as error:  # of the image processor, such as one side 200 times the other
                    raise BadRow(source, f"the model does not take the images: {error}", "image") from error
            used += count
            tokens, kinds = encoded[key]
            ids.append(tokens)
            types.append(kinds)
            mask.append(np.full(len(tokens), learnt))
        if used != len(images):
            raise BadRow(source, f"the model's chat template shows {used} of {len(images)} images")
        return Sequence(np.concatenate(ids), np.concatenate(mask), np.concatenate(types))

    def _tokenize(self, text: str, images: list) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and types of a segment; only one with images needs the processor, which is slow."""
        if not images:
            tokens = np.asarray(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
            return tokens, np.zeros_like(tokens)
        output = self.processor(text=[text], images=images, return_tensors="np", add_special_tokens=False)
        tokens = np.asarray(output["input_ids"][0], dtype=np.int64)
        kinds = output.get("mm_token_type_ids")
        return tokens, np.zeros_like(tokens) if kinds is None else np.asarray(kinds[0], dtype=np.int64)

    def _digest(self, sequences: list[Sequence], image_hashes: tuple[str, ...]) -> str:
        digest = hashlib.sha256()
        for sequence in sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.input_ids.tobytes() + sequence.answer_mask.tobytes())
        for image_hash in image_hashes:
            digest.update(bytes.fromhex(image_hash))
        digest.update(repr(self.grey_window).encode())
        return digest.hexdigest()
