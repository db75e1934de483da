"""The summary: figures of a small invented evaluation worked out by hand, and what is refused."""

import dataclasses
import json

import pytest

from mede2.trainer.evaluation.answered import PROBES, Evaluation
from mede2.trainer.evaluation.statistics import Rate
from mede2.trainer.evaluation.summary import NO_DIFFERENCE, groups_of, share_images, summarize, verdict


@pytest.fixture(scope="module")
def small(tmp_path_factory, write_image, user_case, answered) -> Evaluation:
    """Two models, four questions with options and one open one; of the first three, two are about one picture."""
    folder = tmp_path_factory.mktemp("images")
    first = write_image(folder / "first.png", seed=1)
    copy = folder / "copy.png"
    copy.write_bytes(first.read_bytes())
    second = write_image(folder / "second.png", seed=2)
    cases = [
        user_case("q1", "b", ("a", "b"), (first,), modality="CT"),
        user_case("q2", "b", ("b", "c"), (copy,), modality="CT"),
        user_case("q3", "a", ("a", "c", "b", "d"), (second,), modality="MRI"),
        user_case("q4", "d", ("d", "e")),
        user_case("q5", "Left lung."),
    ]
    said = {"base": ("a", "b", None, "d", "heart"), "tuned": ("b", "b", "a", "d", "left lung")}
    answers = []
    for model, texts in said.items():
        for case, text in zip(cases, texts, strict=True):
            right = text is not None and text in (case.answer, "left lung")
            others = {"recall": float(right) if not case.options else None}
            if text is None:
                others |= {"finish": "length", "num_tokens": 60}
            answers.append(answered(model, "quiz", case.id, text, right, **others))
    answers += [
        answered("tuned", "quiz", "q1", "a", False, probe="blank"),
        answered("tuned", "quiz", "q2", "b", True, probe="blank"),
        answered("tuned", "quiz", "q3", None, False, probe="blank"),
    ]
    return Evaluation(("base", "tuned"), {"quiz": {case.id: case for case in cases}}, answers, {"seed": 5})


def replaced(evaluation: Evaluation, i: int, **fields) -> Evaluation:
    """The evaluation with another answer in the place of one."""
    answers = list(evaluation.answers)
    answers[i] = dataclasses.replace(answers[i], **fields)
    return dataclasses.replace(evaluation, answers=answers)


def test_questions_that_share_a_picture_belong_together(small):
    clusters = share_images(small.benchmarks["quiz"])
    assert clusters["q1"] == clusters["q2"]  # another file, the same bytes
    assert len(set(clusters.values())) == 4


def test_questions_are_joined_by_way_of_others(user_case, tmp_path, write_image):
    pictures = [write_image(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    cases = {
        name: user_case(name, "a", images=images)
        for name, images in {
            "a": pictures[:1], "b": pictures[1:2], "c": pictures[:2], "d": pictures[2:3], "e": pictures[2:], "f": (),
        }.items()
    }  # fmt: skip
    clusters = share_images(cases)
    assert clusters["a"] == clusters["b"] == clusters["c"]
    assert clusters["d"] == clusters["e"]
    assert len({clusters[name] for name in "adf"}) == 3


def test_the_questions_and_what_nothing_would_score(small):
    described = summarize(small)["benchmarks"]["quiz"]
    assert described == {
        "questions": 5, "with_images": 3, "with_options": 4, "images": 2, "share_images": True,
        # letters of the keys: B A A A; texts: b b a d; the one open key
        "majority": {"answers": ["A", "left lung"], "accuracy": 0.8},
        "chance": (0.5 + 0.5 + 0.25 + 0.5) / 4,
    }  # fmt: skip


def test_scores_of_each_model(small):
    base, tuned = summarize(small)["scores"]
    assert (base["benchmark"], base["model"], tuned["model"]) == ("quiz", "base", "tuned")
    assert base["accuracy"]["value"] == pytest.approx(2 / 5)
    assert base["format"]["value"] == pytest.approx(4 / 5)
    assert base["unparsed"]["value"] == base["cut_off"]["value"] == pytest.approx(1 / 5)
    assert base["tokens"] == pytest.approx((4 * 10 + 60) / 5)
    assert base["rungs"] == {"format": 4}
    assert base["recall"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(Rate(0, 1).interval[1]), "num": 1}
    assert base["mmrp"] is None
    assert tuned["accuracy"]["value"] == 1
    assert tuned["accuracy"]["low"] == pytest.approx(Rate(4, 4).interval[0])  # four pictures, not five questions


def test_intervals_are_wilsons_where_no_picture_is_shared(small):
    cases = {name: case for name, case in small.benchmarks["quiz"].items() if name != "q2"}
    answers = [answer for answer in small.answers if answer.case != "q2"]
    base = summarize(dataclasses.replace(small, benchmarks={"quiz": cases}, answers=answers))["scores"][0]
    low, high = Rate(1, 4).interval
    assert base["accuracy"] == {"value": 0.25, "low": pytest.approx(low), "high": pytest.approx(high), "num": 4}


def test_three_more_right_answers_of_five_are_no_proof(small):
    (row,) = summarize(small)["comparisons"]
    assert (row["model"], row["against"]) == ("tuned", "base")
    assert row["difference"]["value"] == pytest.approx(3 / 5)
    assert (row["gained"], row["lost"]) == (3, 0)
    assert row["p"] == row["p_adjusted"] == pytest.approx(2 / 2**3)
    assert row["verdict"] == NO_DIFFERENCE


def test_comparisons_are_with_the_first_and_the_one_before_and_adjusted_together(small, user_case, answered):
    cases = {f"q{i}": user_case(f"q{i}", "a", ("a", "b")) for i in range(12)}
    right = {"one": 2, "two": 12, "three": 2}  # of 12: ten gained of ten, ten lost of ten
    answers = [
        answered(model, "quiz", f"q{i}", "a" if i < num else "b", i < num)
        for model, num in right.items() for i in range(12)
    ]  # fmt: skip
    rows = summarize(Evaluation(tuple(right), {"quiz": cases}, answers, {}))["comparisons"]
    assert [(row["model"], row["against"]) for row in rows] == [("two", "one"), ("three", "one"), ("three", "two")]
    assert [row["verdict"] for row in rows] == ["better", NO_DIFFERENCE, "worse"]
    p = 2 / 2**10
    assert [row["p"] for row in rows] == pytest.approx([p, 1, p])
    assert [row["p_adjusted"] for row in rows] == pytest.approx([3 * p, 1, 3 * p])  # Holm: 3 p, then max(3 p, 2 p)


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.1, 0.3, 0.01, "better"), (-0.3, -0.1, 0.01, "worse"), (0.1, 0.3, 0.05, NO_DIFFERENCE),
        (-0.1, 0.3, 0.01, NO_DIFFERENCE), (-0.3, 0.0, 0.01, NO_DIFFERENCE),
    ],
)  # fmt: skip
def test_the_verdict_wants_both_the_test_and_the_interval(low, high, p, word):
    assert verdict({"value": (low + high) / 2, "low": low, "high": high}, p) == word


def test_what_the_answers_owe_the_image(small):
    rows = summarize(small)["grounding"]
    assert {row["model"] for row in rows} == {"tuned"}
    assert {row["probe"] for row in rows} == {"blank"}
    whole, ct, mri = rows
    assert (whole["group"], ct["group"], ct["value"], mri["value"]) == (None, "modality", "CT", "MRI")
    assert whole["right_image"]["value"] == 1
    assert whole["probed"]["value"] == pytest.approx(1 / 3)
    assert whole["drop"]["value"] == pytest.approx(2 / 3)
    assert (whole["to_wrong"], whole["to_right"], whole["changed"], whole["drop"]["num"]) == (2, 0, 2, 3)
    assert (ct["drop"]["value"], ct["drop"]["num"]) == (0.5, 2)
    assert (mri["drop"]["value"], mri["drop"]["num"], mri["changed"]) == (1.0, 1, 1)


def test_groups_keep_their_small_values(small):
    rows = summarize(small)["groups"]
    figures = {(row["value"], row["model"]): row["accuracy"] for row in rows if row["group"] == "modality"}
    assert {key: (row["value"], row["num"]) for key, row in figures.items()} == {
        ("CT", "base"): (0.5, 2), ("CT", "tuned"): (1.0, 2), ("MRI", "base"): (0.0, 1), ("MRI", "tuned"): (1.0, 1),
        ("not stated", "base"): (0.5, 2), ("not stated", "tuned"): (1.0, 2),
    }  # fmt: skip
    assert figures["MRI", "base"]["high"] == pytest.approx(Rate(0, 1).interval[1])
    assert {row["group"] for row in rows} == {"modality"}


def test_groups_may_be_lists_and_numbers(user_case):
    cases = {"a": user_case("a", "x", specialty=["ENT", "eye"]), "b": user_case("b", "x", specialty=3)}
    assert groups_of(cases) == {"specialty": {"3": ["b"], "ENT, eye": ["a"]}}


def test_scaling_is_of_the_drawn_answers(small, answered):
    drawn = [
        answered("tuned", "quiz", case, "a", right, sample=sample)
        for case, verdicts in {"q1": (True, False), "q2": (False, False), "q3": (True, True)}.items()
        for sample, right in enumerate(verdicts)
    ]
    rows = summarize(dataclasses.replace(small, answers=[*small.answers, *drawn]))["scaling"]
    points = {(row["method"], row["n"]): row["accuracy"]["value"] for row in rows}
    assert points["pass@n", 1] == pytest.approx(0.5)
    assert points["pass@n", 2] == pytest.approx(2 / 3)
    assert {row["num_tokens"] for row in rows if row["n"] == 2} == {20}
    assert {(row["benchmark"], row["model"]) for row in rows} == {("quiz", "tuned")}
    assert summarize(small)["scaling"] == []


def test_accuracy_without_the_questions_that_leaked(small):
    leak = {"benchmark": "quiz", "training_file": "train.jsonl", "detail": "of the left lower lobe of the"}
    leaks = [
        leak | {"case": "q1", "line": 3, "kind": "text"}, leak | {"case": "q1", "line": 9, "kind": "image"},
        leak | {"case": "q5", "line": 4, "kind": "text"},
    ]  # fmt: skip
    leakage = summarize(small, leaks)["leakage"]
    assert leakage["questions"] == {"quiz": {"text": 2, "image": 1, "any": 2}}
    assert leakage["found"] == leaks
    base = leakage["scores"][0]
    assert (base["all"]["value"], base["all"]["num"]) == (pytest.approx(2 / 5), 5)
    assert (base["without"]["value"], base["without"]["num"]) == (pytest.approx(2 / 3), 3)
    assert summarize(small)["leakage"] is None
    assert summarize(small, [])["leakage"]["questions"] == {"quiz": {"text": 0, "image": 0, "any": 0}}
    everything = [leak | {"case": f"q{i}", "line": i, "kind": "text"} for i in range(1, 6)]
    assert summarize(small, everything)["leakage"]["scores"][0]["without"] is None


def test_the_summary_is_json(example):
    summary = summarize(example(3))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {row["probe"] for row in summary["grounding"]} == set(PROBES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: dataclasses.replace(e, models=("base", "base")), "models: base, base; give one or more, each by"),
        (lambda e: dataclasses.replace(e, benchmarks={}), "benchmarks: one or more"),
        (lambda e: dataclasses.replace(e, benchmarks={"quiz": {}}), "benchmarks: one or more, each with a question"),
        (lambda e: dataclasses.replace(e, answers=e.answers[1:]), "base has no greedy answer to 1 of 5 .* such as q1"),
        (lambda e: dataclasses.replace(e, answers=[*e.answers, e.answers[0]]), "quiz, q1, base, image, None is there"),
        (lambda e: replaced(e, 0, model="other"), "model 'other' is none of base, tuned"),
        (lambda e: replaced(e, 0, case="q9"), "there is no question 'q9' in benchmark 'quiz'"),
        (lambda e: replaced(e, 0, benchmark="exam"), "there is no question 'q1' in benchmark 'exam'"),
        (lambda e: replaced(e, 0, probe="blurred"), "probe 'blurred' is none of image, blank"),
        (lambda e: replaced(e, -1, sample=0), "sample 0 under probe 'blank'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        summarize(change(small))


@pytest.mark.parametrize("change", [{"case": "q9"}, {"benchmark": "exam"}, {"kind": "smell"}])
def test_leaks_of_no_question_are_refused(small, change):
    leak = {"benchmark": "quiz", "case": "q1", "training_file": "t", "line": 1, "kind": "text", "detail": "x"}
    with pytest.raises(ValueError, match=r"leaks: .*give text or image, and a question of the evaluation"):
        summarize(small, [leak | change])
