"""Probes: what is shown in place of a case's image, and what stays as it was."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.evaluation.answered import AS_IT_IS, PROBES
from mede2.trainer.evaluation.probes import probe
from mede2.trainer.questions.cases import read_cases


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def cases(tmp_path, write_image, write_rows, user):
    """Two questions on one image, one on another image twice as large, one on both, one without any."""
    small, large = write_image(tmp_path / "a.png", 24, 16, seed=1), write_image(tmp_path / "b.png", 48, 32, seed=2)
    rows = [
        {"id": name, "prompt": [user(f"Question {name}?", len(images))], "images": [image.name for image in images],
         "answer": "yes", "options": ["yes", "no"], "meta": {"modality": "noise"}}
        for name, images in {"1": [small], "2": [small], "3": [large], "4": [small, large], "5": []}.items()
    ]  # fmt: skip
    return {case.id: case for case in read_cases(write_rows(tmp_path / "cases.jsonl", rows))}


def test_as_it_is_leaves_every_question_alone(cases, tmp_path):
    assert probe(list(cases.values()), AS_IT_IS, tmp_path / "images") == list(cases.values())
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_changes_the_images_alone(cases, tmp_path, kind):
    with_images = [case for case in cases.values() if case.images and not (kind == "shuffle" and case.id == "4")]
    asked = probe(with_images, kind, tmp_path / "images")
    assert [case.id for case in asked] == [case.id for case in with_images]
    for before, after in zip(with_images, asked, strict=True):
        assert replace(after, prompt=before.prompt, images=before.images) == before
        if kind == "text_only":
            assert after.images == ()
            assert [part for message in after.prompt for part in message["content"]] == [
                {"type": "text", "text": f"Question {before.id}?"}
            ]
            continue
        assert after.prompt == before.prompt
        for old, new in zip(before.images, after.images, strict=True):
            assert pixels(new).shape == pixels(old).shape
            assert not np.array_equal(pixels(new), pixels(old))


def test_questions_without_images_are_under_no_probe(cases, tmp_path):
    assert [case.id for case in probe(list(cases.values()), "text_only", tmp_path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("kind", ["blank", "noise"])
def test_blank_and_noise_tell_nothing_of_an_image_but_its_size(cases, tmp_path, write_image, kind):
    asked = {case.id: case for case in probe(list(cases.values()), kind, tmp_path / "images")}
    assert asked["1"].images == asked["2"].images == asked["4"].images[:1]
    assert len(list((tmp_path / "images").iterdir())) == 2  # of two sizes
    write_image(tmp_path / "a.png", 24, 16, seed=9)  # another picture of that size
    shown = pixels(asked["1"].images[0])
    (again,) = probe([replace(cases["1"])], kind, tmp_path / "anew")
    assert np.array_equal(pixels(again.images[0]), shown)
    assert (kind == "blank") == (shown == 128).all()


def test_shuffle_shows_an_image_of_another_question(cases, tmp_path):
    three = [cases[name] for name in "123"]
    asked = {case.id: case for case in probe(three, "shuffle", tmp_path / "images")}
    expected = Image.open(cases["3"].images[0]).convert("RGB").resize((24, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(asked["1"].images[0]), np.asarray(expected))
    assert asked["1"].images == asked["2"].images
    with pytest.raises(ValueError, match=r"cases.jsonl:1: the probe shuffle needs a question with another image"):
        probe(three[:2], "shuffle", tmp_path / "images")


def test_the_same_probe_writes_nothing_anew_and_another_seed_shows_other_noise(cases, tmp_path):
    every = list(cases.values())
    first = probe(every, "noise", tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        os.utime(path, (1, 1))
    again = probe(every, "noise", tmp_path / "images")
    assert again == first
    assert all(path.stat().st_mtime == 1 for path in (tmp_path / "images").iterdir())
    other = probe(every, "noise", tmp_path / "images", seed=1)
    assert not np.array_equal(pixels(other[0].images[0]), pixels(first[0].images[0]))
    assert json.dumps([str(path) for path in other[0].images]) != json.dumps([str(path) for path in first[0].images])
