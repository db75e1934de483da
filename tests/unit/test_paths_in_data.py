"""Paths in rows lead to nothing outside the folder of their file, unless the environment names where; nor do bombs."""

import json
import struct
import zlib
from pathlib import Path

import pytest

from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import read_images
from mede2.trainer.data.records import IMAGE_ROOT, BadRow, read_records
from mede2.trainer.data.thumbnails import thumbnail
from mede2.trainer.evaluation.answered import Evaluation
from mede2.trainer.evaluation.store import read_evaluation, write_evaluation
from mede2.trainer.preference.demonstrations import LeftOut, Limits, read_demonstration
from mede2.trainer.preference.select import preference_row
from mede2.trainer.questions.adapter import save_image
from mede2.trainer.questions.benchmarks import read_benchmark
from mede2.trainer.questions.cases import read_cases
from mede2.trainer.settings import ENHANCE


@pytest.fixture
def places(tmp_path, write_image) -> dict[str, str]:
    """By name, what a row of `data/rows.jsonl` may say: the first four stay in data/, the others lead out of it."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "images").mkdir(parents=True)
    elsewhere.mkdir()
    (tmp_path / "data2").mkdir()
    for folder in (data, data / "images", elsewhere, tmp_path / "data2"):
        write_image(folder / "film.png")
    (data / "link.png").symlink_to("images/film.png")
    (data / "way_out.png").symlink_to(elsewhere / "film.png")
    (data / "door").symlink_to(elsewhere)
    (data / "loop.png").symlink_to("loop.png")
    return {
        "beside": "film.png", "below": "images/../images/film.png", "absolute": str(data / "film.png"),
        "a link within": "link.png",
        "absolute, elsewhere": str(elsewhere / "film.png"), "dots": "../elsewhere/film.png",
        "a link that leads out": "way_out.png", "through a folder's link": "door/film.png",
        "a folder whose name begins alike": "../data2/film.png",
        "dots through a link": "door/../data/../elsewhere/x.png",
    }  # fmt: skip


@pytest.fixture
def row(user, assistant):
    """`row(path)`: a row of Stage II with this image, or with `answer=` a case."""

    def make(path: str, **case) -> dict:
        answers = {} if case else {"chosen": [assistant("mass")], "rejected": [assistant("clear")]}
        return {"prompt": [user("Which finding?", 1)], "images": [path]} | answers | case

    return make


def read(file: Path) -> list:
    return list(read_records((str(file),), ENHANCE))


def test_what_leads_out_is_a_bad_row(places, row, write_rows, tmp_path):
    file = write_rows(tmp_path / "data" / "rows.jsonl", [row(path) for path in places.values()])
    stay, out = read(file)[:4], read(file)[4:]
    assert [record.images for record in stay] == [(tmp_path / "data" / path,) for path in list(places.values())[:4]]
    assert all(read_images(record) for record in stay)
    for line, (problem, path) in enumerate(zip(out, list(places.values())[4:], strict=True), start=5):
        assert isinstance(problem, BadRow), path
        assert str(problem).startswith(f"{file}:{line}: images: {path!r} leads out of {tmp_path / 'data'}")
    broken = write_rows(tmp_path / "data" / "loop.jsonl", [row("loop.png")])
    assert not isinstance(read(broken)[0], BadRow)  # it leads nowhere, which is told when it is opened


def test_a_relative_file_of_records(places, row, write_rows, tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "rows.jsonl", [row("film.png"), row("../elsewhere/film.png")])
    monkeypatch.chdir(tmp_path / "data")
    inside, outside = read(Path("rows.jsonl"))
    assert inside.images == (Path("film.png"),)
    assert "leads out of ., the folder of its file" in str(outside)


def test_the_environment_opens_further_folders(places, row, write_rows, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "data" / "rows.jsonl", [row(path) for path in places.values()])
    monkeypatch.setenv(IMAGE_ROOT, f"{tmp_path / 'nowhere'}:{tmp_path / 'elsewhere'}")
    refused = [place for place, found in zip(places, read(file), strict=True) if isinstance(found, BadRow)]
    assert refused == ["a folder whose name begins alike"]
    monkeypatch.setenv(IMAGE_ROOT, "")  # no folder, not the working one
    monkeypatch.chdir(tmp_path)
    assert sum(isinstance(found, BadRow) for found in read(file)) == 6


def test_stages_cases_and_questions_refuse_it(places, row, write_rows, load, tmp_path):
    out = places["dots"]
    told = f"leads out of {tmp_path / 'data'}"
    with pytest.raises(ValueError, match="leads out of"):
        load(write_rows(tmp_path / "data" / "pairs.jsonl", [row(out)]), ENHANCE)
    cases = write_rows(tmp_path / "data" / "cases.jsonl", [row(out, id="1", answer="mass")])
    with pytest.raises(ValueError, match=told):
        read_cases(cases)
    question = {"question": "Which?", "answer": "mass", "images": [out]}
    for name, rows in {"cases": [row(out, id="1", answer="mass")], "questions": [question]}.items():
        file = write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
        with pytest.raises(ValueError, match=told):
            read_benchmark("cases", file, tmp_path / "store")


def test_rows_that_no_stage_could_read_are_not_written(places, row, write_rows, user, assistant, tmp_path):
    """Pairs and demonstrations whose file would lie elsewhere than the images."""
    data, output = tmp_path / "data", tmp_path / "elsewhere"
    (case,) = read_cases(write_rows(data / "cases.jsonl", [row("film.png", id="1", answer="mass")]))
    assert preference_row(case, data, "mass", "clear", {})["images"] == ["film.png"]
    with pytest.raises(BadRow, match="leads out of"):
        preference_row(case, output, "mass", "clear", {})
    text = "<think>A dense shadow.</think> <answer>mass</answer>"
    line = json.dumps(
        {"messages": [user("Which?", 1), assistant(text)], "images": ["film.png"], "meta": {"answer": "mass"}}
    )
    limits = Limits(with_images=True)
    assert read_demonstration("rows.jsonl:1", line, data, data, limits).row["images"] == ["film.png"]
    with pytest.raises(LeftOut, match="leads out of"):
        read_demonstration("rows.jsonl:1", line, data, output, limits)


def test_an_evaluation_shows_no_file_that_it_was_not_asked_about(places, row, write_rows, write_image, tmp_path):
    """Its questions name images by absolute paths, and it may be somebody else's."""
    (case,) = read_cases(write_rows(tmp_path / "data" / "cases.jsonl", [row("film.png", id="1", answer="mass")]))
    write_evaluation(Evaluation(("base",), {"own": {"1": case}}, [], {}), None, tmp_path / "out")
    assert read_evaluation(tmp_path / "out")[0].benchmarks["own"]["1"].images == (tmp_path / "data" / "film.png",)
    write_image(tmp_path / "secret.png", seed=5)
    file = tmp_path / "out" / "questions.jsonl"
    file.write_text(file.read_text().replace(str(tmp_path / "data" / "film.png"), str(tmp_path / "secret.png")))
    with pytest.raises(ValueError, match=r"questions\.jsonl:1: image .*secret\.png is not the one that was asked"):
        read_evaluation(tmp_path / "out")


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that declares so many pixels, all of them black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(100)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks.items())


@pytest.mark.parametrize("size", [(12000, 12000), (60000, 60000)], ids=["Pillow warns", "Pillow refuses"])
def test_an_image_of_far_too_many_pixels_is_never_decoded(size, row, write_rows, processor, world, tmp_path):
    from mede2.trainer.data.encoding import Encoder

    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    told = "more than 89478485 pixels"
    pairs = write_rows(tmp_path / "pairs.jsonl", [row("bomb.png")])
    with pytest.raises(ValueError, match=f"{pairs}:1: image {tmp_path / 'bomb.png'}: {told}"):
        load_dataset((str(pairs),), ENHANCE, Encoder(processor, 512), "stop", world)
    assert told in thumbnail(tmp_path / "bomb.png")["problem"]
    with pytest.raises(BadRow, match=told):
        save_image(tmp_path / "store", "questions.parquet row 1", bomb(*size))
    assert not (tmp_path / "store").exists()
