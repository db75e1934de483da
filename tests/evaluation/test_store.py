"""An evaluation on disk: read back as it was, joined with others, and refused where it is none."""

from dataclasses import replace

import pytest

from mede2.trainer.evaluation.answered import AS_IT_IS, Answered, Evaluation
from mede2.trainer.evaluation.store import join, read_evaluation, write_evaluation
from mede2.trainer.questions.cases import read_cases


@pytest.fixture
def evaluation(tmp_path, write_image, write_rows, user):
    write_image(tmp_path / "a.png")
    rows = [
        {"id": "1", "prompt": [user("Seen?", 1)], "images": ["a.png"], "answer": "yes", "options": ["yes", "no"]},
        {"id": "2", "prompt": [user("What is it? \u2264")], "answer": "a mass", "meta": {"modality": "CT"}},
    ]
    cases = {case.id: case for case in read_cases(write_rows(tmp_path / "cases.jsonl", rows))}
    answers = [
        Answered("base", "own", "1", AS_IT_IS, None, "yes\u2028", "stop", 2, "letter", "yes", True, None, 4.5),
        Answered("base", "own", "2", AS_IT_IS, 3, "\u2264 0", "length", 5, None, None, False, 0.0, None),
    ]
    return Evaluation(("base",), {"own": cases}, answers, {"max_tokens": 5})


@pytest.mark.parametrize("num_leaks", [None, 0, 1])
def test_what_is_written_is_read(num_leaks, evaluation, tmp_path):
    leak = {"benchmark": "own", "case": "1", "training_file": "a", "line": 1, "kind": "text", "detail": "x"}
    leaks = None if num_leaks is None else [leak] * num_leaks  # None: nobody looked
    write_evaluation(evaluation, leaks, tmp_path / "out")
    read, read_leaks = read_evaluation(tmp_path / "out")
    assert read_leaks == leaks
    assert read.models == evaluation.models
    assert read.answers == evaluation.answers
    assert read.settings == evaluation.settings
    for name, case in evaluation.benchmarks["own"].items():
        images = tuple(image.resolve() for image in case.images)
        assert replace(read.benchmarks["own"][name], source=case.source) == replace(case, images=images)


def test_a_wrong_option_that_stands_twice_is_read_back(evaluation, tmp_path):
    """Some published questions have one; `questions.adapter` keeps it."""
    cases = dict(evaluation.benchmarks["own"])
    cases["1"] = replace(cases["1"], options=("yes", "no", "no"))
    write_evaluation(replace(evaluation, benchmarks={"own": cases}), [], tmp_path / "out")
    assert read_evaluation(tmp_path / "out")[0].benchmarks["own"]["1"].options == ("yes", "no", "no")


def test_an_unfinished_folder_is_told(evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"out: no evaluation in it that was ended \(no evaluation.json\)"):
        read_evaluation(tmp_path / "out")
    write_evaluation(evaluation, [], tmp_path / "out")
    answers = tmp_path / "out" / "answers.jsonl"
    answers.write_text(answers.read_text(encoding="utf-8").replace('"rung"', '"rang"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"answers.jsonl:1: rung: missing"):
        read_evaluation(tmp_path / "out")


def test_models_of_two_runs_stand_side_by_side(evaluation):
    answers = [replace(answer, model="tuned") for answer in evaluation.answers]
    other = replace(evaluation, models=("tuned",), answers=answers, settings={"max_tokens": 5, "versions": {}})
    joined = join([evaluation, other])
    assert joined.models == ("base", "tuned")
    assert joined.answers == [*evaluation.answers, *answers]
    assert joined.settings == {"base": {"max_tokens": 5}, "tuned": {"max_tokens": 5, "versions": {}}}
    with pytest.raises(ValueError, match=r"model 'base': in two of the evaluations"):
        join([evaluation, evaluation])
    with pytest.raises(ValueError, match=r"max_tokens: 5 for base, but 6 for tuned"):
        join([evaluation, replace(other, settings={"max_tokens": 6})])
    less = {"own": {"1": evaluation.benchmarks["own"]["1"]}}
    with pytest.raises(ValueError, match=r"benchmark 'own': not the same questions in all of the evaluations"):
        join([evaluation, replace(other, benchmarks=less)])
