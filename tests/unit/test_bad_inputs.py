"""What users get wrong, and the one clear message that each mistake gets: where it is, what was given, what to do.

Every table row is a mistake and the pieces that its message must hold.
"""

import gzip
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from mede2.trainer.commandline import stage_command
from mede2.trainer.data.processing import load_processor, locate_model
from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.files import write_json
from mede2.trainer.policy import load_policy
from mede2.trainer.resolution import parse_assignments, read_recipe, resolve
from mede2.trainer.run import find_checkpoint, prepare
from mede2.trainer.settings import ELICIT, ENHANCE, BatchArithmetic, Settings

Z3 = str(Path(__file__).parents[2] / "ds_configs" / "z3.json")


def table(*rows):
    """Cases named by their first column."""
    return [pytest.param(*rest, id=name.replace(" ", "_")) for name, *rest in rows]


def refused(function, *arguments, **options) -> str:
    """The message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - every caller checks the message
        function(*arguments, **options)
    return str(raised.value)


def assert_holds(message: str, *pieces: str) -> None:
    assert [piece for piece in pieces if piece not in message] == [], message


# Rows. Each bad one stands at line 2 of a file, after a good one.

USER = {"role": "user", "content": "Which finding?"}
ASSISTANT = {"role": "assistant", "content": "mass"}
IMAGE = {"type": "image"}
DEMONSTRATION = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "clear"}]}


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def messages(*given) -> dict:
    return {"messages": list(given)}


def pair(**changes) -> dict:
    return PAIR | changes


def pair_with_image(name: str) -> dict:
    return pair(prompt=[said("user", [IMAGE, {"type": "text", "text": "Which?"}])], images=[name])


def spliced(member: str) -> str:
    """A good row with one more member, written as it stands."""
    return f"{json.dumps(DEMONSTRATION)[:-1]}, {member}}}"


def nested(levels: int) -> dict:
    return {"deeper": nested(levels - 1)} if levels else {}


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG, which says how large it is."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    bodies = (header, b"IDAT")
    chunks = (struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in bodies)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


STAGE1_ROWS = table(
    ("not JSON", '{"messages": [', "not JSON", "column"),
    ("a bare word", "mass", "not JSON: Expecting value at column 1"),
    ("a list", "[1, 2]", "a row is a JSON object, not list"),
    ("a number", "7", "a row is a JSON object, not int"),
    ("no messages", {}, "messages: missing"),
    ("a row for Stage II", PAIR, "messages: missing", "this is a row for Stage II"),
    ("an unknown key", DEMONSTRATION | {"answer": "mass"}, "answer: unknown", "under `meta`"),
    ("meta is a list", DEMONSTRATION | {"meta": [1]}, "meta: a JSON object, not list"),
    ("messages are text", {"messages": "Which?"}, "messages: a list of messages, not 'Which?'"),
    ("no message", {"messages": []}, "messages: a list of messages, not []"),
    ("a message is text", messages("Which?"), "messages[0]: a message is", "'Which?'"),
    ("a message with a name", messages(USER | {"name": "me"}, ASSISTANT), "messages[0]: a message is", "name"),
    ("an unknown role", messages(said("human", "Which?"), ASSISTANT), "messages[0]: role 'human' where 'user' is due"),
    ("two questions", messages(USER, USER, ASSISTANT), "messages[1]: role 'user' where 'assistant' is due"),
    ("the answer comes first", messages(ASSISTANT, USER), "messages[0]: role 'assistant' where 'user' is due"),
    ("a late system message", messages(USER, said("system", "Read.")), "messages[1]: role 'system' where 'assistant'"),
    ("only a system message", messages(said("system", "Read.")), "messages: only a system message"),
    ("no answer", messages(USER), "messages: the last one must be the assistant's"),
    ("an empty answer", messages(USER, said("assistant", " \n")), "messages[1]: empty"),
    ("content is null", messages(USER, said("assistant", None)), "messages[1]: content is text or a list", "None"),
    ("content has no parts", messages(USER, said("assistant", [])), "messages[1]: content is text or a list", "[]"),
    ("an unknown part", messages(said("user", [{"type": "video"}]), ASSISTANT), "messages[0]: a part is", "'video'"),
    ("a path inside a part", messages(said("user", [IMAGE | {"image": "a.png"}]), ASSISTANT),
     "messages[0]: a part is", "paths go to `images`", "a.png"),
    ("a text part with a number", messages(said("user", [{"type": "text", "text": 5}]), ASSISTANT), "[0]: a part is"),
    ("an image in the answer", messages(USER, said("assistant", [IMAGE])) | {"images": ["good.png"]},
     "messages[1]: an image in a message of the assistant", "images belong to the user's"),
    ("a placeholder without an image", messages(said("user", [IMAGE]), ASSISTANT), "images: 0 paths for 1 image"),
    ("an image without a placeholder", DEMONSTRATION | {"images": ["good.png"]}, "images: 1 paths for 0 image"),
    ("images is one path", DEMONSTRATION | {"images": "good.png"}, "images: a list of paths"),
    ("images is false", DEMONSTRATION | {"images": False}, "images: a list of paths, not False"),
    ("images is an object", DEMONSTRATION | {"images": {"path": "a.png"}}, "images: a list of paths, not {'path'"),
    ("an image is null", DEMONSTRATION | {"images": [None]}, "images: a list of paths, not [None]"),
    ("an image without a path", DEMONSTRATION | {"images": [""]}, "images: a list of paths, not ['']"),
    ("the image as a word in the text", messages(said("user", "<image> Which?"), ASSISTANT) | {"images": ["good.png"]},
     "images: 1 paths for 0 image placeholders", '{"type": "image"} stands'),
    ("a control token", messages(USER, said("assistant", "mass<|im_end|>")),
     "a text of the assistant holds the control token <|im_end|>"),
    ("half of a surrogate pair", '{"messages": [{"role": "user", "content": "a\\ud800"}]}',
     "messages[0]", "not valid Unicode"),
    ("half of a surrogate pair in meta", spliced('"meta": {"note": ["\\udc00"]}'), "meta.note[0]: not valid Unicode"),
    ("half of a surrogate pair in a key", spliced('"meta": {"\\udc00": 1}'), "a key of meta: not valid Unicode"),
    ("nothing but spaces and a comma", "  ,", "not JSON: Expecting value at column 3"),
    ("a NUL byte", "\0" + json.dumps(DEMONSTRATION), "not JSON: Expecting value at column 1"),
    ("NUL in a text", messages(USER, said("assistant", "ma\0ss")), 
     "messages[1]: a text with the control character U+0000"),
    ("an escape sequence", messages(said("user", "\x1b[2J"), ASSISTANT), 
     "messages[0]: a text with the control character U+001B"),
    ("a raw control character", json.dumps(DEMONSTRATION).replace("mass", "ma\x01ss"), "not JSON: Invalid control"),
    ("a raw tab", json.dumps(DEMONSTRATION).replace("mass", "ma\tss"), "not JSON: Invalid control character"),
    ("the mark of UTF-8 in the middle", "\ufeff" + json.dumps(DEMONSTRATION), "not JSON: Unexpected UTF-8 BOM"),
    ("cut off", json.dumps(DEMONSTRATION)[:-9], "not JSON: Expecting value at column 95"),
    ("a comma at the end", json.dumps(DEMONSTRATION) + ",", "not JSON: Extra data at column"),
    ("two rows on a line", json.dumps(DEMONSTRATION) * 2, "not JSON: Extra data at column"),
    ("a Python dict", str(DEMONSTRATION), "not JSON: Expecting property name enclosed in double quotes at column 2"),
    ("a row over several lines", "{", "not JSON", "a row is one whole line: jq -c turns other JSON into such lines"),
    ("an array over several lines", "[", "not JSON", "a row is one whole line"),
    ("a whole file as an array", [DEMONSTRATION], "a row is a JSON object, not list"),
    ("null", "null", "a row is a JSON object, not NoneType"),
    ("a key twice", spliced('"messages": []'), "messages: stands twice in one object; only one of the two would count"),
    ("a role twice", json.dumps(DEMONSTRATION).replace('"role": "user"', '"role": "user", "role": "user"'),
     "role: stands twice in one object"),
    ("NaN", spliced('"meta": {"score": NaN}'), "not JSON: NaN, which JSON does not have; write null"),
    ("minus infinity", spliced('"meta": {"score": -Infinity}'), "not JSON: -Infinity, which JSON does not have"),
    ("a number of 5000 digits", spliced(f'"id": {"9" * 5000}'), "a whole number of too many digits"),
    ("deep nesting", "[" * 100_000, "nested more than 100 levels deep"),
    ("deep nesting in meta", DEMONSTRATION | {"meta": nested(150)}, "nested more than 100 levels deep"),
    ("a key with a line break", DEMONSTRATION | {"a\nb\x1b[2J": 1}, "a\\u000ab\\u001b[2J: unknown"),
    ("the keys of others", {"conversations": [{"from": "human", "value": "Which?"}]},
     "messages: missing; the row has conversations"),
    ("no key at all", {}, "messages: missing; the row has no key"),
    ("id is a list", DEMONSTRATION | {"id": [7]}, "id: text or a whole number, not [7]"),
    ("id is true", DEMONSTRATION | {"id": True}, "id: text or a whole number, not True"),
    ("id is a fraction", DEMONSTRATION | {"id": 7.5}, "id: text or a whole number, not 7.5"),
    ("id is empty", DEMONSTRATION | {"id": ""}, "id: text or a whole number, not ''"),
    ("meta is text", DEMONSTRATION | {"meta": ""}, "meta: a JSON object, not str"),
    ("meta is zero", DEMONSTRATION | {"meta": 0}, "meta: a JSON object, not int"),
    ("role is a list", messages(said(["user"], "Which?"), ASSISTANT), "messages[0]: role ['user'] where 'user' is due"),
    ("role is null", messages(said(None, "Which?"), ASSISTANT), "messages[0]: role None where 'user' is due"),
    ("role in capitals", messages(said("User", "Which?"), ASSISTANT), "messages[0]: role 'User' where 'user' is due"),
    ("a tool speaks", messages(USER, said("tool", "4"), ASSISTANT), "messages[1]: role 'tool' where"),
    ("two system messages", messages(said("system", "A"), said("system", "B")), "messages[1]: role 'system' where"),
    ("a null message", messages(None, ASSISTANT), "messages[0]: a message is", "not None"),
    ("a message without content", messages({"role": "user"}, ASSISTANT), "messages[0]: a message is"),
    ("messages are an object", {"messages": USER}, "messages: a list of messages, not {'role'"),
    ("messages are null", {"messages": None}, "messages: a list of messages, not None"),
    ("content is a number", messages(USER, said("assistant", 7)), "messages[1]: content is text or a list", "not 7"),
    ("content is one part", messages(USER, said("assistant", {"type": "text", "text": "a"})), 
     "messages[1]: content is text or a list", "{'type'"),
    ("a part is text", messages(said("user", ["Which?"]), ASSISTANT), "messages[0]: a part is", "'Which?'"),
    ("a part is null", messages(said("user", [None]), ASSISTANT), "messages[0]: a part is", "not None"),
    ("an image_url", messages(said("user", [{"type": "image_url", "image_url": {"url": "a"}}]), ASSISTANT),
     "messages[0]: a part is", "image_url"),
    ("an answer without a shape", messages(USER, said("assistant", "\u200b\u00a0\u2060")), "messages[1]: empty"),
    ("an empty question", messages(said("user", ""), ASSISTANT), "messages[0]: empty"),
    ("an empty system message", messages(said("system", " "), USER, ASSISTANT), "messages[0]: empty"),
    ("an image token in a text", messages(said("user", "<|image_pad|> Which?"), ASSISTANT),
     "a text of the user holds the control token <|image_pad|>"),
    ("a text far too long", messages(USER, said("assistant", "mass " * 20_000)),
     "a text of the assistant has 100000 characters, far more than max_length 256 tokens"),
    ("too long", messages(USER, said("assistant", "mass " * 300)),
     "tokens (0 of images) exceed max_length 256", "--max-length"),
)  # fmt: skip

STAGE2_ROWS = table(
    ("a row for Stage I", DEMONSTRATION, "chosen, prompt, rejected: missing", "this is a row for Stage I)"),
    ("no rejected answer", {k: PAIR[k] for k in ("prompt", "chosen")}, "rejected: missing"),
    ("equal answers", pair(rejected=[ASSISTANT]), "chosen and rejected are the same text", "no preference"),
    ("equal answers in two forms", pair(rejected=[said("assistant", [{"type": "text", "text": "mass"}])]), "same text"),
    ("the answer is text", pair(chosen="mass"), "chosen: a list of messages, not 'mass'"),
    ("two answers", pair(chosen=[ASSISTANT, USER]), "chosen: one assistant message, not 2"),
    ("the user answers", pair(rejected=[USER]), "rejected[0]: role 'user' where 'assistant' is due"),
    ("the prompt is answered", pair(prompt=[USER, ASSISTANT]), "prompt: the last message must be the user's"),
    ("an image in an answer", pair(chosen=[said("assistant", [IMAGE])]) | {"images": ["good.png"]},
     "chosen[0]: an image in a message of the assistant"),
    ("no such image", pair_with_image("none.png"), "none.png: no such file"),
    ("a URL", pair_with_image("https://example.org/a.png"), "images: 'https://example.org/a.png' is a URL; save the"),
    ("a data URL", pair_with_image("data:image/png;base64,iVBOR"), "images: 'data:image/png;base64,iVBOR' is a URL"),
    ("a path with NUL", pair_with_image("a\0b.png"), "images: the path 'a\\x00b.png' holds a control character"),
    ("a path with a line break", pair_with_image("good.png\n"), "images: the path 'good.png\\n' holds a control"),
    ("a path with half of a surrogate pair", json.dumps(pair_with_image("\ud800.png")), "images[0]: not valid Unicode"),
    ("a name that is too long", pair_with_image("a" * 300), "images: the path 'aaaa", "is longer than a path can be"),
    ("a path that is too long", pair_with_image("a/" * 2100), "images: the path 'a/a/", "is longer than a path can be"),
    ("a path out of the folder", pair_with_image("../../none.png"), "images: '../../none.png' leads out of"),
    ("a path through a file", pair_with_image("good.png/a.png"), "good.png/a.png: does not decode (Not a directory)"),
    ("a folder", pair_with_image("."), "does not decode (a folder or a device, no file)"),
    ("a device", pair_with_image("/dev/zero"), "images: '/dev/zero' leads out of", "the folder of its file"),
    ("a pipe", pair_with_image("pipe"), "pipe: does not decode (a folder or a device, no file)"),
    ("a link to itself", pair_with_image("loop.png"), "loop.png: does not decode (Too many levels of symbolic links)"),
    ("a path with a tilde", pair_with_image("~/none.png"), "~/none.png: no such file"),
    ("a path of Windows", pair_with_image("images\\good.png"), "images\\good.png: no such file"),
    ("a name in other case", pair_with_image("GOOD.PNG"), "GOOD.PNG: no such file"),
    ("an empty image", pair_with_image("empty.png"), "empty.png: does not decode (in no format that Pillow reads)"),
    ("a text as image", pair_with_image("rows.jsonl"), "rows.jsonl: does not decode (in no format that Pillow reads)"),
    ("DICOM", pair_with_image("scan.dcm"), "scan.dcm: does not decode (in no format that Pillow reads)"),
    ("a decompression bomb", pair_with_image("bomb.png"), "bomb.png: more than 89478485 pixels; scale it down"),
    ("a larger one", pair_with_image("larger.png"), "larger.png: more than 89478485 pixels; scale it down"),
    ("a bomb in a comment", pair_with_image("comment.png"), "comment.png: does not decode (Decompressed data too"),
    ("a thread", pair_with_image("thread.png"), "the model does not take the images: absolute aspect ratio must be"),
    ("an image used twice but given once", pair_with_image("good.png") | {"prompt": [said("user", [IMAGE, IMAGE])]},
     "images: 1 paths for 2 image placeholders"),
    ("equal answers cut otherwise",
     pair(rejected=[said("assistant", [{"type": "text", "text": text} for text in ("ma", "ss")])]),
     "chosen and rejected are the same text"),
    ("an empty chosen answer", pair(chosen=[said("assistant", "")]), "chosen[0]: empty"),
    ("no rejected message", pair(rejected=[]), "rejected: a list of messages, not []"),
    ("chosen is null", pair(chosen=None), "chosen: a list of messages, not None"),
    ("the prompt is text", pair(prompt="Which?"), "prompt: a list of messages, not 'Which?'"),
    ("a damaged image", pair_with_image("damaged.png"), "damaged.png: does not decode"),
    ("a transparent image", pair_with_image("transparent.png"), "transparent.png: transparent pixels; flatten"),
    ("16 bits without a window", pair_with_image("sixteen.png"), "sixteen.png: grey of more than 8 bits", "10..4000",
     "--set grey_window=[10,4000]"),
    ("two frames", pair_with_image("frames.gif"), "frames.gif: 2 frames; save the one"),
    ("too long with its image", pair_with_image("good.png") | {"chosen": [said("assistant", "mass " * 300)]},
     "(4 of images) exceed max_length 256", "--max-pixels"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, write_image):
    """A folder with one good image and one of each bad kind."""
    write_image(tmp_path / "good.png", 32, 32)
    (tmp_path / "empty.png").touch()
    (tmp_path / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2" * 64)
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe")
    for name, side in (("bomb", 10_000), ("larger", 20_000)):
        (tmp_path / f"{name}.png").write_bytes(png_header(side, side))
    comment = PngImagePlugin.PngInfo()
    comment.add_text("note", "x" * 2_000_000, zip=True)
    Image.new("L", (32, 32)).save(tmp_path / "comment.png", pnginfo=comment)
    Image.new("L", (1, 300)).save(tmp_path / "thread.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:-1500])
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.array([[10, 4000]], dtype=np.uint16)).save(tmp_path / "sixteen.png")
    first, second = (Image.new("L", (4, 4), grey) for grey in (10, 90))
    first.save(tmp_path / "frames.gif", save_all=True, append_images=[second])
    return tmp_path


def test_bad_row(request, folder, write_rows, load, stage, good, bad, pieces):
    file = write_rows(folder / "rows.jsonl", [good, bad])
    message = refused(load, file, stage, max_length=256)
    assert_holds(message, f"{file}:2: ", *pieces)
    assert len(message.splitlines()) == 2, message


def pytest_generate_tests(metafunc):
    """The two tables of rows as cases of `test_bad_row`."""
    if metafunc.function is test_bad_row:
        cases = [
            pytest.param(stage, good, case.values[0], case.values[1:], id=f"stage{stage}-{case.id}")
            for stage, good, cases in ((ELICIT, DEMONSTRATION, STAGE1_ROWS), (ENHANCE, PAIR, STAGE2_ROWS))
            for case in cases
        ]
        metafunc.parametrize(("stage", "good", "bad", "pieces"), cases)


BAD_LINES = ["nonsense", DEMONSTRATION, messages(USER), "", DEMONSTRATION, {"messages": 5}]


def test_bad_rows_are_listed_together(tmp_path, write_rows, load):
    message = refused(load, write_rows(tmp_path / "rows.jsonl", BAD_LINES), ELICIT)
    assert_holds(message, "3 of 5 rows cannot be used", "--set on_bad_row=skip leaves them out")
    assert re.findall(r"rows\.jsonl:(\d+): (\w+)", message) == [("1", "not"), ("3", "messages"), ("6", "messages")]


def test_skip_keeps_the_good_rows(tmp_path, write_rows, load):
    file = write_rows(tmp_path / "rows.jsonl", BAD_LINES)
    dataset = load(file, ELICIT, on_bad_row="skip")
    assert [example.source for example in dataset.examples] == [f"{file}:2", f"{file}:5"]
    assert [row["source"] for row in dataset.bad_rows] == [f"{file}:{line}" for line in (1, 3, 6)]
    assert_holds(dataset.bad_rows[1]["problem"], "the last one must be the assistant's")


def test_a_long_list_is_cut(tmp_path, write_rows, load):
    message = refused(load, write_rows(tmp_path / "rows.jsonl", ["x"] * 50), ELICIT, on_bad_row="skip")
    assert_holds(message, "50 of 50 rows cannot be used", "... and 30 more")
    assert len(message.splitlines()) == 22


FILES = table(
    ("missing", None, "no such file", "rows.jsonl"),
    ("empty", b"", "no rows in", "rows.jsonl"),
    ("blank lines", b"\n  \n\n", "no rows in", "rows.jsonl"),
    ("not UTF-8", "Röntgen\n".encode("latin-1"), "rows.jsonl: not UTF-8 text"),
    ("binary", bytes(range(128, 256)), "rows.jsonl: not UTF-8 text"),
    ("UTF-16", "{}\n".encode("utf-16"), "rows.jsonl: not UTF-8 text"),
    ("a table of columns", b"PAR1\x15\x04\x15\xf8PAR1", "rows.jsonl: not UTF-8 text"),
    ("compressed, named otherwise", gzip.compress(b"{}\n"), "rows.jsonl: not UTF-8 text"),
    ("half surrogate pairs as bytes", b'{"a": "\xed\xa0\x80"}\n', "rows.jsonl: not UTF-8 text"),
    ("NUL bytes", b"\0" * 64, "rows.jsonl:1: not JSON: Expecting value at column 1"),
    ("line ends of old Macs", b"{}\r{}\r", "rows.jsonl:2: messages: missing"),
    ("CSV", b"question,answer\nWhich?,mass\n", "rows.jsonl:1: not JSON: Expecting value at column 1"),
)


@pytest.mark.parametrize(("content", "pieces"), [pytest.param(c.values[0], c.values[1:], id=c.id) for c in FILES])
def test_bad_file(tmp_path, load, content, pieces):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert_holds(refused(load, path, ELICIT), *pieces)


# Settings.

SETTINGS = table(
    ("unknown", ELICIT, {"learning_rat": 1}, ["learning_rat: unknown setting (from flag)", "mean learning_rate?"]),
    ("unlike any", ELICIT, {"zzz": 1}, ["zzz: unknown setting", "known: model, train"]),
    ("beta in Stage I", ELICIT, {"beta": 0.1}, ["beta: has a meaning only in Stage II", "(from flag)"]),
    ("objective in Stage I", ELICIT, {"objective": {"nll": 1}}, ["objective: has a meaning only in Stage II"]),
    ("a word for a number", ELICIT, {"epochs": "three"}, ["epochs: 'three' (from flag) is not a number"]),
    ("true for a number", ELICIT, {"epochs": True}, ["epochs: True (from flag) is not a number"]),
    ("half a step", ELICIT, {"max_steps": 1.5}, ["max_steps: 1.5 (from flag) is not a whole number"]),
    ("endless steps", ELICIT, {"max_steps": "inf"}, ["max_steps: 'inf' (from flag) is not a whole number"]),
    ("null for a number", ELICIT, {"seed": None}, ["seed: None (from flag) is not a whole number"]),
    ("yes for true", ELICIT, {"dry_run": "yes"}, ["dry_run: 'yes' (from flag) is not true or false"]),
    ("a number for a name", ELICIT, {"model": 7}, ["model: 7 (from flag) is not text"]),
    ("a list for a name", ELICIT, {"eval": ["a", "b"]}, ["eval: ['a', 'b'] (from flag) is not text"]),
    ("files that are numbers", ELICIT, {"train": [1]}, ["train: [1] (from flag) is not a list of texts"]),
    ("half a window", ELICIT, {"grey_window": [5]}, ["grey_window: [5] (from flag) is not a list of numbers of"]),
    ("a window upside down", ELICIT, {"grey_window": [9, 3]}, ["grey_window: the low end 9.0 must be below the high"]),
    ("a window without an end", ELICIT, {"grey_window": [0, "inf"]}, ["grey_window: inf is not a finite number"]),
    ("no learning rate", ELICIT, {"learning_rate": 0}, ["learning_rate: 0.0 must be above 0"]),
    ("learning rate nan", ELICIT, {"learning_rate": "nan"}, ["learning_rate: nan is not a finite number"]),
    ("negative epochs", ELICIT, {"epochs": -1}, ["epochs: -1.0 must be above 0"]),
    ("no beta", ENHANCE, {"beta": 0}, ["beta: 0.0 must be above 0"]),
    ("a name for a mix", ENHANCE, {"objective": "nll"}, ["objective: 'nll' (from flag) is not a mapping from"]),
    ("a word for a weight", ENHANCE, {"objective": {"nll": "much"}}, ["objective: {'nll': 'much'} (from flag) is not"]),
    ("no losses", ENHANCE, {"objective": {}}, ["objective: {} is empty; name at least one loss"]),
    ("unknown losses", ENHANCE, {"objective": {"dpo": 1, "nll": 1, "sft": 1}},
     ["objective: 'dpo', 'sft' is not one of sigmoid, robust, sigmoid_norm", "orpo, image_conditional, anchor, nll"]),
    ("a loss without weight", ENHANCE, {"objective": {"nll": 0}}, ["objective.nll: 0.0 must be above 0"]),
    ("an endless weight", ENHANCE, {"objective": {"nll": "inf"}}, ["objective.nll: inf is not a finite number"]),
    ("a margin without SimPO", ENHANCE, {"simpo_gamma": 1},
     ["simpo_gamma: 1.0 has no meaning with objective sigmoid, nll; it belongs to simpo"]),
    ("smoothing that IPO ignores", ENHANCE, {"objective": {"ipo": 1}, "label_smoothing": 0.1},
     ["label_smoothing: 0.1 has no meaning with objective ipo; it belongs to sigmoid, robust"]),
    ("beta that nothing reads", ENHANCE, {"objective": {"nll": 1}, "beta": 1},
     ["beta: 1.0 has no meaning with objective nll"]),
    ("a reference that nothing reads", ENHANCE, {"objective": {"simpo": 1}, "reference": "base"},
     ["reference: 'base' has no meaning with objective simpo; it belongs to sigmoid, "]),
    ("robust to nothing", ENHANCE, {"objective": {"robust": 1}}, ["label_smoothing: objective robust needs one above"]),
    ("no corruption", ENHANCE, {"objective": {"image_conditional": 1}},
     ["corruption: objective image_conditional needs one of crop, blank, noise, shuffle"]),
    ("an unknown corruption", ENHANCE, {"corruption": "blur"}, ["corruption: 'blur' is not one of crop, blank, noise"]),
    ("all labels flipped", ENHANCE, {"label_smoothing": 0.5}, ["label_smoothing: 0.5 must be below 0.5"]),
    ("an empty micro-batch", ELICIT, {"micro_batch_size": 0}, ["micro_batch_size: 0 must be at least 1"]),
    ("too much warm-up", ELICIT, {"warmup_ratio": 1.5}, ["warmup_ratio: 1.5 must be at most 1"]),
    ("a seed beyond 64 bits", ELICIT, {"seed": 2**64}, ["seed: 18446744073709551616 must be at most"]),
    ("no such scheduler", ELICIT, {"scheduler": "step"}, ["scheduler: 'step' is not one of cosine, linear, constant"]),
    ("fp16", ELICIT, {"dtype": "fp16"}, ["dtype: 'fp16' is not one of auto, fp32, bf16"]),
    ("nothing trains", ELICIT, {"train_language_model": False}, ["train_language_model, ", "nothing would train"]),
)  # fmt: skip


@pytest.mark.parametrize(("stage", "given", "pieces"), SETTINGS)
def test_bad_setting(stage, given, pieces):
    assert_holds(refused(resolve, stage, [("recipe good.yaml", {"seed": 1}), ("flag", given)]), *pieces)


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    table(
        ("ranks do not divide", (16, 1, 3),
         ["global_batch_size: 16 is not micro_batch_size 1 x accumulation x 3 ranks", "choose a multiple of 3"]),
        ("micro-batch too large", (4, 8, 1), ["global_batch_size: 4 is not micro_batch_size 8", "a multiple of 8"]),
        ("both", (20, 3, 2), ["choose a multiple of 6"]),
    ),
)  # fmt: skip
def test_bad_batch_arithmetic(sizes, pieces):
    assert_holds(refused(BatchArithmetic, *sizes), *pieces)


@pytest.mark.parametrize(
    ("content", "pieces"),
    table(
        ("missing", None, ["recipe: cannot read", "r.yaml", "No such file"]),
        ("not YAML", b"epochs: [1", ["recipe:", "r.yaml is not YAML"]),
        ("not UTF-8", b"model: \xff\xfe", ["recipe:", "r.yaml is not YAML"]),
        ("a list", b"- epochs", ["recipe:", "r.yaml must hold `setting: value` lines, not list"]),
        ("empty", b"", ["recipe:", "r.yaml must hold `setting: value` lines"]),
    ),
)
def test_bad_recipe(tmp_path, content, pieces):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    assert_holds(refused(read_recipe, path), *pieces)


def test_a_recipe_names_itself(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("epochs: many\n", encoding="utf-8")
    message = refused(resolve, ELICIT, [(f"recipe {path}", read_recipe(path))])
    assert_holds(message, "epochs: 'many'", f"from recipe {path}")


@pytest.mark.parametrize(
    ("given", "pieces"),
    table(
        ("no value", ["seed"], ["--set seed: write key=value"]),
        ("twice", ["seed=1", "seed=2"], ["seed: set twice by --set"]),
        ("not YAML", ["grey_window=[1"], ["--set grey_window=[1: the value is not YAML"]),
    ),
)
def test_bad_assignment(given, pieces):
    assert_holds(refused(parse_assignments, given), *pieces)


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    table(
        ("a flag and --set", ["--seed", "1", "--set", "seed=2"], ["Error: seed: given as a flag and by --set"]),
        ("a flag that is no number", ["--epochs", "ten"], ["Error: epochs: 'ten' (from flag) is not a number"]),
        ("half a step", ["--max-steps", "1.5"], ["Error: max_steps: 1.5 (from flag) is not a whole number"]),
        ("an unknown flag", ["--learning-rat", "1"], ["No such option", "--learning-rate"]),
        ("an unknown key", ["--set", "epoch=1"], ["Error: epoch: unknown setting (from --set)", "you mean epochs?"]),
        ("beta in Stage I", ["--beta", "0.1"], ["Error: beta: has a meaning only in Stage II", "(from flag)"]),
        ("no such recipe", ["--recipe", "none.yaml"], ["Error: recipe: cannot read none.yaml"]),
        ("a file without --train", ["rows.jsonl"], ["Error: rows.jsonl: unexpected; training files follow --train"]),
    ),
)  # fmt: skip
def test_bad_command_line(arguments, pieces, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(stage_command(ELICIT), ["--ds", Z3, *arguments])
    assert result.exit_code
    assert_holds(result.output, *pieces)
    assert "Traceback" not in result.output


# DeepSpeed files.


def zero(**more) -> dict:
    return {"zero_optimization": {"stage": 3} | more}


DEEPSPEED = table(
    ("missing", None, ["cannot be read", "No such file"]),
    ("not JSON", "{,", ["not JSON"]),
    ("a list", "[]", ["a DeepSpeed file holds a JSON object, not list"]),
    ("no ZeRO", {}, ["zero_optimization.stage: None is not 1, 2 or 3"]),
    ("ZeRO-4", {"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: 4 is not 1, 2 or 3"]),
    ("ZeRO by number", {"zero_optimization": 3}, ["zero_optimization: 3 is not a JSON object"]),
    ("bf16 by word", zero() | {"bf16": True}, ["bf16: True is not a JSON object"]),
    ("its own optimizer", zero() | {"optimizer": {"type": "AdamW"}}, ["optimizer: remove it", "learning_rate"]),
    ("its own scheduler", zero() | {"scheduler": {}}, ["scheduler: remove it", "warmup_ratio"]),
    ("fp16", zero() | {"fp16": {"enabled": True}}, ["fp16: remove it", "not supported; use bf16"]),
    ("checkpointing", zero() | {"activation_checkpointing": {}}, ["activation_checkpointing: remove it"]),
    ("a writer of checkpoints", zero() | {"checkpoint": {"writer": {"type": "python"}}},
     ["checkpoint.writer, datastates_ckpt: remove it", "async_checkpoints"]),
    ("another writer", zero() | {"datastates_ckpt": {}}, ["datastates_ckpt: remove it"]),
    ("another batch", zero() | {"train_batch_size": 32},
     ["train_batch_size is 32, but must be 16 by global_batch_size"]),
    ("another micro-batch", zero() | {"train_micro_batch_size_per_gpu": 4},
     ["train_micro_batch_size_per_gpu is 4, but must be 1 by micro_batch_size"]),
    ("another accumulation", zero() | {"gradient_accumulation_steps": 1},
     ["gradient_accumulation_steps is 1, but must be 16 by global_batch_size"]),
    ("another clipping", zero() | {"gradient_clipping": 0.1},
     ["gradient_clipping is 0.1, but must be 1.0 by max_grad_norm"]),
    ("another dtype", zero() | {"bf16": {"enabled": True}}, ["bf16.enabled is True, but must be False by dtype"]),
    ("an auto of its own", zero(stage3_max_live_parameters="auto"),
     ["zero_optimization.stage3_max_live_parameters", 'no setting fills this "auto"; write a value']),
    ("cpu_adam without offload", zero() | {"cpu_adam": True}, ["cpu_adam needs", "offload_optimizer.device cpu"]),
)  # fmt: skip


@pytest.mark.parametrize(("content", "pieces"), DEEPSPEED)
def test_bad_deepspeed_file(tmp_path, content, pieces):
    path, settings = tmp_path / "ds.json", Settings()
    if isinstance(content, dict) and content.pop("cpu_adam", False):
        settings = Settings(optimizer="cpu_adam")
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    def read_and_fill():
        fill_deepspeed_config(read_deepspeed_file(path), settings, BatchArithmetic(16, 1, 1), torch.float32, 32, 999)

    assert_holds(refused(read_and_fill), "optimizer: cpu_adam" if settings.optimizer == "cpu_adam" else "--ds", *pieces)


# Models. Each mistake is made to a copy of a good folder.


def without(name):
    return lambda folder: (folder / name).unlink()


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


def with_weight(change):
    """A spoiler that replaces the weight of one layer by `change(weight)`, or drops it where that is None."""

    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
        weights[name] = change(weights[name])
        kept = {name: weight for name, weight in weights.items() if weight is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


MODELS = table(
    ("no config", without("config.json"), ["holds no config.json"]),
    ("no weights", without("model.safetensors"), ["holds no safetensors weights"]),
    ("a config that is no JSON", with_text("config.json", "{,"), ["the config.json of", "does not load"]),
    ("an unknown family", with_config(model_type="nonesuch"), ["the config.json of", "nonesuch"]),
    ("a text model", with_config(model_type="qwen2"), ["is a qwen2, which has no processor for images and text"]),
    ("no chat template", without("chat_template.jinja"), ["has no chat template"]),
    ("no tokenizer", without("tokenizer.json"), ["the processor of", "does not load"]),
    ("no image processor", without("preprocessor_config.json"), ["the processor of", "does not load"]),
    ("a weight is missing", with_weight(lambda weight: None), ["lacks weights: ", "layers.0.mlp.up_proj.weight"]),
    (
        "a weight of another shape",
        with_weight(lambda weight: weight[:-1].clone()),
        ["other shapes than its config.json", "layers.0.mlp.up_proj.weight is (287, 96), not (288, 96)"],
    ),
    ("weights cut short", with_text("model.safetensors", "abc"), ["does not load"]),
)


def load_all(model: Path):
    load_processor(locate_model(str(model)))
    load_policy(model, dtype=torch.float32, attention="sdpa", implementation="torch")


@pytest.mark.parametrize(("spoil", "pieces"), MODELS)
def test_bad_model_folder(tmp_path, model_folder, spoil, pieces):
    model = tmp_path / "model"
    model.mkdir()
    for path in model_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    load_all(model)
    spoil(model)
    assert_holds(refused(load_all, model), "model: ", str(model), *pieces)


def test_no_model_folder(tmp_path):
    message = refused(locate_model, str(tmp_path / "none"))
    assert_holds(message, "model: ", f"{tmp_path}/none", "is no folder and no hub name that can be reached")


@pytest.mark.parametrize("folder", ["model_folder", "internvl_folder"])
def test_too_few_pixels(request, folder):
    """1024 are Qwen's lower limit, or one of InternVL's tiles."""
    message = refused(load_processor, request.getfixturevalue(folder), 100)
    assert_holds(message, "max_pixels: 100 is below the least", "1024")


def test_pixel_limit_where_there_is_none(tmp_path, internvl_folder):
    for path in internvl_folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    without_tiles = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(without_tiles), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("-", encoding="utf-8")
    assert_holds(refused(load_processor, tmp_path, 4096), "max_pixels: ", "has no pixel limit")


# Runs: everything that is checked before the weights are loaded, and where a run may continue.


@pytest.fixture
def prepared(tmp_path, model_folder, stage1_file, world):
    """`prepared(**settings)`: a Stage I run, ready to start, its output under tmp_path."""

    def prepare_run(**changes):
        output = tmp_path / "out"
        given = {"model": str(model_folder), "train": [str(stage1_file)], "global_batch_size": 4, "output": str(output)}
        return prepare(resolve(ELICIT, [("flag", given | changes)]), Z3, output, world)

    return prepare_run


@pytest.mark.parametrize("part", ["vision_tower", "merger"])
def test_training_vision_without_images(prepared, part):
    assert_holds(refused(prepared, **{f"train_{part}": True}), f"train_{part}: no training record has an image")


def test_bad_held_out_file(prepared, tmp_path, write_rows):
    file = write_rows(tmp_path / "held_out.jsonl", [PAIR])
    assert_holds(refused(prepared, eval=str(file)), f"{file}:1", "this is a row for Stage II")


def test_resume_from_what_is_no_checkpoint(prepared, tmp_path):
    run = prepared(resume=str(tmp_path / "step-000005"))
    assert_holds(refused(find_checkpoint, run), "resume: ", "step-000005 is no complete checkpoint (complete.json")


def test_output_that_holds_something_else(prepared, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    message = refused(find_checkpoint, prepared())
    assert_holds(message, "output: ", "holds files of something else; name another --output")


RESUME = table(
    ("another learning rate", {"learning_rate": 3e-4}, ["learning_rate: 1e-05 there, 0.0003 now"]),
    ("two others", {"global_batch_size": 2, "seed": 9}, ["global_batch_size: 4 there, 2 now", "seed: 0 there, 9 now"]),
    ("other data", {"train": "other"}, ["train: another one"]),
    ("other held-out data", {"eval": "other"}, ["eval: another one"]),
    ("another model", {"model": "other"}, ["model: another one"]),
)


@pytest.mark.parametrize("where", ["output", "checkpoint"])
@pytest.mark.parametrize(("changes", "pieces"), RESUME)
def test_resume_of_another_run(prepared, tmp_path, model_folder, write_rows, where, changes, pieces):
    run = prepared()
    others = {"train": write_rows(tmp_path / "other.jsonl", [DEMONSTRATION] * 4), "model": tmp_path / "model"}
    others["eval"] = others["train"]
    others["model"].mkdir()
    for path in model_folder.iterdir():
        (others["model"] / path.name).write_bytes(path.read_bytes())
    with_config(note="another")(others["model"])
    changes = {name: str(others[name]) if value == "other" else value for name, value in changes.items()}
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    marker = {"step": 2, "world_size": 1, "identity": run.identity, "objective": {}, "files": {}}
    write_json(checkpoint / "complete.json", marker)
    write_json(tmp_path / "out" / "identity.json", run.identity)
    assert find_checkpoint(prepared()).step == 2
    if where == "checkpoint":
        changes["resume"] = str(checkpoint)
        assert find_checkpoint(prepared(resume=str(checkpoint))).step == 2
    message = refused(find_checkpoint, prepared(**changes))
    assert_holds(message, "resume: ", "holds another run", *pieces, "--resume never")


def test_what_may_change_between_a_run_and_its_resumption(prepared, tmp_path):
    """How much is done at once and how often something is saved changes no update."""
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "identity.json", prepared().identity)
    again = prepared(micro_batch_size=2, save_every=1, eval_every=1, activation_checkpointing=True)
    assert find_checkpoint(again) is None


def test_resume_never_moves_the_older_run_aside(prepared, tmp_path):
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "identity.json", prepared().identity)
    assert find_checkpoint(prepared(resume="never", seed=5)) is None
    (aside,) = tmp_path.glob("out.until-*")
    assert (aside / "identity.json").exists()
    assert not (tmp_path / "out").exists()
