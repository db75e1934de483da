"""VQA-RAD, SLAKE, PathVQA and PMC-VQA in their published forms, the questions and images our own."""

import csv
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.answering.answers import is_right, parse_answer
from mede2.trainer.data.images import load_image

RAD = {
    # osf.io/89kps, "VQA_RAD Dataset Public.json": the 14 variables of its readme
    "qid": "7",
    "phrase_type": "test_freeform",
    "qid_linked_id": "03f451ca",
    "image_case_url": "https://example.org/case",
    "image_name": "synpic1.jpg",
    "image_organ": "CHEST",
    "evaluation": "evaluated",
    "question": "Is the heart large?",
    "question_rephrase": "NULL",
    "question_relation": "NULL",
    "question_frame": "NULL",
    "question_type": "SIZE",
    "answer": "Yes",
    "answer_type": "CLOSED ",
}


@pytest.fixture
def rad(tmp_path, write_json, picture):
    """`rad(*rows)`: the folder of the OSF release."""

    def write(*rows):
        write_json(tmp_path / "VQA_RAD Dataset Public.json", list(rows))
        (tmp_path / "VQA_RAD Image Folder").mkdir(exist_ok=True)
        (tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg").write_bytes(picture(1, "JPEG"))
        return tmp_path

    return write


def test_vqa_rad_reads_the_test_rows_and_says_what_it_left_out(rad, read, layout):
    count = RAD | {"qid": 8, "question": "How many masses?", "answer": 2, "answer_type": "OPEN", "image_organ": "HEAD"}
    training = RAD | {"qid": "9", "phrase_type": "freeform"}
    folder = rad(RAD, count, training)
    cases, said = read("vqa-rad", folder)
    assert list(cases) == ["7", "8"]
    assert layout(cases["7"]) == [None, "Is the heart large?\n\nAnswer yes or no."]
    assert layout(cases["8"]) == [None, "How many masses?\n\nAnswer briefly."]
    assert (cases["7"].options, cases["7"].answer) == (("yes", "no"), "yes")
    assert (cases["8"].options, cases["8"].answer) == ((), "2")
    assert cases["7"].images == (folder / "VQA_RAD Image Folder" / "synpic1.jpg",)
    assert cases["7"].meta == {
        "specialty": "CHEST", "task": "SIZE", "answer_type": "closed", "license": "CC0 1.0",
        "source": "VQA-RAD (vqa-rad)",
    }  # fmt: skip
    assert cases["8"].meta["answer_type"] == "open"
    assert said == [f"vqa-rad: 2 questions from {folder}; 1 rows left out: phrase_type not of the test split"]


def test_a_closed_question_of_another_kind_has_no_options(rad, read):
    plane = RAD | {"question": "Axial or sagittal?", "answer": "Axial"}
    case = read("vqa-rad", rad(plane))[0]["7"]
    assert (case.options, case.answer, case.meta["answer_type"]) == ((), "Axial", "closed")


@pytest.mark.parametrize(
    ("answer", "right"), [("Yes", True), ("yes.", True), ("no", False), ("There may be", False), ("", False)]
)
def test_yes_and_no_are_scored_as_options_that_the_prompt_names_without_letters(rad, read, layout, answer, right):
    case = read("vqa-rad", rad(RAD))[0]["7"]
    assert "A. " not in layout(case)[1]
    assert layout(case)[1].endswith("Answer yes or no.")
    parsed = parse_answer(f"<think>Broad.</think> <answer>{answer}</answer>", case.options)
    assert is_right(parsed, case.answer, case.options) is right


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer_type": "YES"}, "answer_type: CLOSED or OPEN, not 'YES'"),
        ({"image_name": ""}, "image_name: no image"),
        ({"image_name": "synpic2.jpg"}, "synpic2.jpg: no such file"),
        ({"image_name": "https://example.org/a.jpg"}, "is a URL; save the image and name its file"),
        ({"answer": True}, "answer: text, not True"),
        ({"answer": ""}, "answer: empty"),
        ({"kg_triples": []}, "kg_triples: unknown"),
        ({"phrase_type": "para"}, "no question of vqa-rad in it; 1 rows left out: phrase_type not of the test split"),
    ],
)
def test_a_bad_row_of_vqa_rad(rad, refused, change, told):
    folder = rad(RAD | change)
    message = refused("vqa-rad", folder)
    assert told in message
    assert "phrase_type" in change or f"{folder / 'VQA_RAD Dataset Public.json'} row 1: " in message


def test_ids_are_unique(rad, refused):
    assert "row 2: id: '7' again, after" in refused("vqa-rad", rad(RAD, RAD))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [("vqa-rad", "JPEG", ".jpg"), ("path-vqa", "PNG", ".png")],
)
def test_triples_of_the_hub_keep_their_images_byte_for_byte(
    name, kind, suffix, tmp_path, write_parquet, read, layout, picture
):
    """huggingface.co/datasets/flaviagiammarino/vqa-rad and .../path-vqa: image, question, answer."""
    one, two = picture(1, kind), picture(2, kind)
    rows = [
        {"image": {"bytes": one, "path": None}, "question": "is it benign?", "answer": "no"},
        {"image": {"bytes": two, "path": "x.jpg"}, "question": "what is it?", "answer": "a mass"},
        {"image": {"bytes": one, "path": None}, "question": "where is it?", "answer": "left"},
    ]
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00001.parquet", [rows[0] | {"answer": "yes"}], ("image",))
    write_parquet(data / "test-00000-of-00002.parquet", rows[:2], ("image",))
    write_parquet(data / "test-00001-of-00002.parquet", rows[2:], ("image",))
    cases, said = read(name, tmp_path)
    assert list(cases) == ["1", "2", "3"]
    assert [case.answer for case in cases.values()] == ["no", "a mass", "left"]
    assert [case.options for case in cases.values()] == [("yes", "no"), (), ()]
    assert [case.meta["answer_type"] for case in cases.values()] == ["closed", "open", "open"]
    assert layout(cases["1"]) == [None, "is it benign?\n\nAnswer yes or no."]
    assert layout(cases["2"]) == [None, "what is it?\n\nAnswer briefly."]
    (path,) = cases["1"].images
    assert path.read_bytes() == one
    assert path.suffix == suffix
    assert cases["1"].images == cases["3"].images
    assert len(list((tmp_path / "store").iterdir())) == 2
    assert np.array_equal(np.asarray(load_image(cases["2"].images[0])), pixels(two))
    assert cases["1"].image_hashes == (path.stem,)
    written = path.stat().st_mtime_ns
    assert read(name, tmp_path)[0] == cases
    assert path.stat().st_mtime_ns == written
    assert said == [f"{name}: 3 questions from {tmp_path}"]


def test_parquet_that_cannot_be_read(tmp_path, write_parquet, refused, picture):
    row = {"image": {"bytes": picture(1), "path": None}, "question": "what?", "answer": "a mass"}
    folder = tmp_path / "data"
    path = folder / "test-00000-of-00002.parquet"
    write_parquet(path, [row], ("image",))
    assert f"{folder}: 1 of the 00002 parts test-*-of-00002.parquet; download all" in refused("path-vqa", tmp_path)
    write_parquet(path, [row | {"image": {"bytes": b"<html>", "path": None}}, row | {"image": None}], ("image",))
    message = refused("path-vqa", path)
    assert f"{path} row 1: image: 6 bytes that are no image that Pillow reads" in message
    assert f"{path} row 2: image: no image" in message
    write_parquet(path, [row | {"split": "test"}], ("image",))
    assert "split: unknown; the fields here are answer, image, question" in refused("path-vqa", path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "a pointer of Git LFS, not the file itself" in refused("path-vqa", path)
    path.write_text("nothing")
    assert f"{path}: not parquet (" in refused("path-vqa", path)
    path.unlink()
    write_parquet(folder / "validation-00000-of-00001.parquet", [row], ("image",))
    assert "no data/test-*.parquet and no test-*.parquet in this folder, which holds data" in refused(
        "path-vqa", tmp_path
    )
    assert "no such file or folder" in refused("path-vqa", tmp_path / "none")


def test_an_image_of_too_many_pixels_is_told_before_it_is_decoded(tmp_path, write_parquet, refused):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    row = {"image": {"bytes": bomb, "path": None}, "question": "what?", "answer": "a mass"}
    path = write_parquet(tmp_path / "test-00000-of-00001.parquet", [row], ("image",))
    assert f"{path} row 1: image: 33 bytes that are no image that Pillow reads" in refused("path-vqa", tmp_path)


def test_parquet_as_the_hubs_own_library_writes_it(tmp_path, read, picture):
    import datasets

    image = {"bytes": picture(1), "path": "a.png"}
    table = datasets.Dataset.from_dict({"image": [image], "question": ["what?"], "answer": ["a mass"]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    case = read("path-vqa", tmp_path)[0]["1"]
    assert case.images[0].read_bytes() == picture(1)


def test_the_pickle_of_path_vqa_is_refused(tmp_path, refused):
    path = tmp_path / "test_qa.pkl"
    path.write_bytes(b"\x80\x04]\x94.")
    assert "pickle is not read, for loading it can run anything" in refused("path-vqa", path)


SLAKE = {
    # test.json of huggingface.co/datasets/BoKelvin/SLAKE
    "img_id": 3,
    "img_name": "xmlab3/source.png",
    "question": "Does the picture contain a rib?",
    "answer": "Yes",
    "q_lang": "en",
    "location": "Lung",
    "modality": "X-Ray",
    "answer_type": "CLOSED",
    "base_type": "vqa",
    "triple": ["vhead", "_", "_"],
    "qid": 41,
    "content_type": "Organ",
}


def test_slake_in_english_unless_chinese_is_named(tmp_path, write_json, read, refused, layout, picture):
    organ = SLAKE | {"qid": 42, "question": "Which is larger, heart or lung?", "answer": "Lung"}
    chinese = SLAKE | {"qid": 43, "question": "图中有肋骨吗?", "answer": "有", "q_lang": "zh"}
    path = write_json(tmp_path / "test.json", [SLAKE, organ, chinese])
    assert f"none of {tmp_path / 'imgs'}; unpack the archive there" in refused("slake", tmp_path)
    image = tmp_path / "imgs" / "xmlab3" / "source.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(picture(3))

    cases, said = read("slake", tmp_path)
    assert list(cases) == ["41", "42"]
    assert layout(cases["41"]) == [None, "Does the picture contain a rib?\n\nAnswer yes or no."]
    assert layout(cases["42"]) == [None, "Which is larger, heart or lung?\n\nAnswer briefly."]
    assert (cases["41"].options, cases["41"].answer) == (("yes", "no"), "yes")
    assert (cases["42"].options, cases["42"].answer) == ((), "Lung")
    assert cases["41"].images == (image,)
    assert np.array_equal(np.asarray(load_image(image)), pixels(picture(3)))
    assert cases["42"].meta == {
        "specialty": "Lung", "modality": "X-Ray", "task": "Organ", "answer_type": "closed", "base_type": "vqa",
        "license": "CC BY 4.0", "source": "SLAKE, English questions (slake)",
    }  # fmt: skip
    assert said[0].endswith("; 1 rows left out: q_lang is zh")

    cases, said = read("slake-zh", path)
    assert list(cases) == ["43"]
    assert cases["43"].options == ()
    assert said[0].endswith("; 2 rows left out: q_lang is en")
    write_json(path, [SLAKE | {"question_id": 1}])
    assert f"{path} row 1: question_id: unknown" in refused("slake", tmp_path)
    write_json(path, {"rows": []})
    assert f"{path}: a list of objects, not dict" in refused("slake", tmp_path)
    write_json(path, [])
    assert refused("slake", tmp_path) == f"{tmp_path}: no question of slake in it"


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


FIRST = {
    # huggingface.co/datasets/RadGenome/PMC-VQA, card: train.csv, test.csv, test_clean.csv
    "Figure_path": "PMC1_F1.png",
    "Question": "What is pointed at?",
    "Answer": "A cyst",
    "Choice A": "A:A nerve",
    "Choice B": " B: A cyst",
    "Choice C": "C:A vein ",
    "Choice D": "D:B: none",
    "Answer_label": "B",
}
SECOND = {
    # the same, test_2.csv, by its public readers
    "index": "12",
    "Figure_path": "PMC1_F1.png",
    "Caption": "A cyst of the arm.",
    "Question": "What is pointed at?",
    "Choice A": " A nerve",
    "Choice B": "A cyst",
    "Choice C": "A vein",
    "Choice D": "Both",
    "Answer": "B",
    "split": "test",
}


@pytest.mark.parametrize(
    ("file", "row", "last"), [("test_clean.csv", FIRST, "B: none"), ("test_2.csv", SECOND, "Both")]
)
def test_pmc_vqa_of_both_versions(file, row, last, tmp_path, read, layout, picture):
    for folder, seed in (("images", 1), ("images_2", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "PMC1_F1.png").write_bytes(picture(seed))
    case = read("pmc-vqa", write_csv(tmp_path / file, [row]))[0]["1"]
    choices = f"A. A nerve\nB. A cyst\nC. A vein\nD. {last}"
    assert layout(case) == [None, f"What is pointed at?\n\n{choices}\n\nAnswer with one of the options."]
    assert (case.options, case.answer) == (("A nerve", "A cyst", "A vein", last), "A cyst")
    folder = "images" if row is FIRST else "images_2"
    assert case.images == (tmp_path / folder / "PMC1_F1.png",)
    assert case.meta == {
        "license": "CC BY-SA", "source": "PMC-VQA (pmc-vqa)",
    }  # fmt: skip


def test_pmc_vqa_as_it_was_once_spelt_and_with_pandas_index(tmp_path, read, picture):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "PMC1_F1.png").write_bytes(picture(1))
    row = {"": "0"} | {name.replace("Answer", "Anwser", name == "Answer"): cell for name, cell in FIRST.items()}
    assert "Anwser" in row
    assert "Answer_label" in row
    assert read("pmc-vqa", write_csv(tmp_path / "test.csv", [row]))[0]["1"].answer == "A cyst"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"Choice A": "B:A nerve"}, "Choice A: 'B:A nerve' begins with another letter"),
        ({"Choice C": "C: "}, "none empty"),
        ({"Answer": "A vein"}, "Answer: 'A vein' is not option B, which is 'A cyst'"),
        ({"Answer_label": "E"}, "Answer_label: 'E' is the letter of none of the 4 options"),
        ({"Figure_path": "PMC2_F1.png"}, "PMC2_F1.png: no such file"),
    ],
)
def test_a_bad_row_of_pmc_vqa(tmp_path, refused, picture, change, told):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "PMC1_F1.png").write_bytes(picture(1))
    path = write_csv(tmp_path / "test_clean.csv", [FIRST, FIRST | change])
    message = refused("pmc-vqa", path)
    assert f"1 of 2 questions cannot be used:\n  {path} row 2: " in message
    assert told in message
