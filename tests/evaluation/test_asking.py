"""What is read from an answer, and what is not looked at while it is."""

import shutil
from dataclasses import replace

import pytest

from mede2.trainer.answering.jobs import plan
from mede2.trainer.demo.defaults import BASE_MODEL
from mede2.trainer.evaluation.answered import AS_IT_IS
from mede2.trainer.evaluation.asking import Asked, read, read_questions
from mede2.trainer.preference.rubric import read_rubric
from mede2.trainer.questions.cases import read_cases


@pytest.fixture
def answered(demo_cases):
    """`answered(text, **changes)`: an answer to the demo's first case, changed, and read."""
    case = read_cases(demo_cases)[0]

    def say(text: str, **changes):
        asked = replace(case, **changes)
        (job,) = plan([asked], 1, 0, None)
        answer = {"text": text, "finish": "stop", "num_tokens": 9, "key": "k"}
        return read("m", Asked("demo", AS_IT_IS, asked, job), answer, False, read_rubric())

    return say


def test_the_vote_is_not_told_what_the_image_shows(answered):
    """Or a vote weighted by the rules' scores would be cast by the key."""
    text = "<think>A mass in the right lower zone. So it is fibrosis. Checked.</think> <answer>fibrosis</answer>"
    blind = answered(text, meta={}).mmrp
    assert blind is not None
    shown = {"findings": {"right lower": "mass"}, "conclusions": {"mass": "fibrosis"}}
    hidden = {"findings": {"left upper": "nodule"}, "conclusions": {"nodule": "tuberculosis"}}
    assert answered(text, meta=shown).mmrp == answered(text, meta=hidden).mmrp == blind
    assert answered(text, meta={"findings": ["of another form"]}).mmrp == blind


def test_any_of_several_accepted_answers_is_right(answered):
    open_question = {"options": (), "answer": "left lung", "meta": {"accepted_answers": ["left lung", "the left side"]}}
    assert answered("<think>x</think> <answer>left side</answer>", **open_question).right
    said = answered("<think>x</think> <answer>the right side</answer>", **open_question)
    assert (said.right, said.recall) == (False, 0.5)


def test_a_limit_takes_the_same_questions_whatever_their_order(demo_cases, tmp_path, write_rows):
    lines = demo_cases.read_text(encoding="utf-8").splitlines()
    shutil.copytree(demo_cases.parent / "images", tmp_path / "images")
    turned = write_rows(tmp_path / "turned.jsonl", lines[::-1])
    some, about = read_questions({"a": ("cases", demo_cases)}, tmp_path, 5)
    others, _ = read_questions({"a": ("cases", turned)}, tmp_path, 5)
    assert len(some["a"]) == 5
    assert list(others["a"]) == list(some["a"])[::-1]
    assert about["a"]["questions"] == len(lines) > about["a"]["asked"] == 5


def test_another_end_token_is_another_model(tmp_path, world):
    """The file is no weight, but answers depend on it: a journal must not mistake one for the other."""
    from mede2.trainer.answering.local import LocalModel

    def identity(folder) -> dict:
        return LocalModel(str(folder), batch_size=1, max_pixels=None, world=world).identity

    for path in BASE_MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert identity(tmp_path) == identity(BASE_MODEL)
    config = tmp_path / "generation_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"eos_token_id":', '"eos_token_id": 5, "was":'))
    assert identity(tmp_path) != identity(BASE_MODEL)
