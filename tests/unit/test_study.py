"""The study on the embedded default: what its arms train on and with, and what its tables make of the verdicts."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import mede2.trainer.demo.study as study
from mede2.trainer.demo.cases import CRITERIA, chain, corrupt, heldout_cases
from mede2.trainer.demo.comparison import ERRORS, RATES, compare, tables, verdicts
from mede2.trainer.demo.errors import errors
from mede2.trainer.demo.records import criteria_of_negatives
from mede2.trainer.demo.study import ARMS, Arm, answer, flags, with_starts, write_records
from mede2.trainer.resolution import parse_assignments, read_recipe, resolve


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"), seed=3, num=40)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_pairs_without_a_criterion_differ_in_its_negatives_alone(criterion, records):
    every, without = rows(records["pairs"]), rows(records[f"pairs without {criterion}"])
    assert len(every) == len(without) == 40
    left = [row["meta"]["criterion"] for row in without]
    assert set(left) == set(CRITERIA) - {criterion}
    for full, other in zip(every, without, strict=True):
        for name in ("prompt", "chosen", "images"):
            assert other[name] == full[name]
        if full["meta"]["criterion"] == criterion:
            assert other["rejected"] != full["rejected"]
        else:
            assert other == full


def test_what_is_left_out_is_replaced_by_the_shares_of_the_others():
    """70 of 100 are logical; without them 3 others share alike, and without a rare one 7 of its 9 become logical."""
    logical, reflection = CRITERIA[0], CRITERIA[-1]
    given = criteria_of_negatives(90)
    assert [given.count(criterion) for criterion in CRITERIA] == [63, 9, 9, 9]
    without = criteria_of_negatives(90, logical)
    assert [without.count(criterion) for criterion in CRITERIA] == [0, 30, 30, 30]
    without = criteria_of_negatives(90, reflection)
    assert [without.count(criterion) for criterion in CRITERIA] == [63 + 7, 9 + 1, 9 + 1, 0]
    assert [old for old, new in zip(given, without, strict=True) if old != new] == [reflection] * 9


def test_the_control_imitates_the_chosen_answers_of_the_same_pairs(records):
    for pair, demonstration in zip(rows(records["pairs"]), rows(records["chosen"]), strict=True):
        assert demonstration["messages"] == pair["prompt"] + pair["chosen"]
        assert demonstration["images"] == pair["images"]
    assert all((records["chosen"].parent / row["images"][0]).is_file() for row in rows(records["chosen"]))


def test_another_seed_has_other_cases_and_seed_0_those_of_the_demo(tmp_path):
    from mede2.trainer.demo.defaults import NUM_TRAIN
    from mede2.trainer.demo.records import write_stage1

    drawn = [write_records(tmp_path / str(seed), seed, num=10) for seed in (0, 1)]
    cases = [{row["meta"]["case"] for name in ("demonstrations", "pairs") for row in rows(of[name])} for of in drawn]
    assert len(cases[0]) == len(cases[1]) == 20
    assert not cases[0] & cases[1]
    demo = rows(write_stage1(tmp_path / "demo", NUM_TRAIN[1], seed=0))
    assert rows(drawn[0]["demonstrations"]) == demo[:10]


def resolved(arm, folder, records):
    """What the stage's command makes of an arm's flags, read as the command reads them."""
    given = flags(arm, folder, records, seed=3)
    pairs = list(zip(given[::2], given[1::2], strict=True))
    values = {name[2:]: value for name, value in pairs if name not in ("--set", "--recipe")}
    overrides = parse_assignments(value for name, value in pairs if name == "--set")
    (recipe,) = (value for name, value in pairs if name == "--recipe")
    values["train"], values["seed"] = (values["train"],), int(values["seed"])
    return resolve(arm.stage, [("recipe", read_recipe(recipe)), ("flag", values), ("--set", overrides)]).settings


def test_the_arms_say_what_differs_from_the_recipe(tmp_path, records):
    settings = {arm.name: resolved(arm, tmp_path, records) for arm in ARMS}
    assert settings["stage1"].model is None
    assert {settings[arm.name].model for arm in ARMS[1:]} == {str(tmp_path / "stage1")}
    assert all(given.seed == 3 for given in settings.values())
    full, dpo, sft = (settings[name] for name in ("full", "dpo", "sft"))
    assert (full.objective, full.beta, full.learning_rate) == ({"sigmoid": 1, "nll": 2}, 0.1, 5e-4)
    assert (dpo.objective, dpo.beta, dpo.learning_rate) == ({"sigmoid": 1}, 1, 5e-5)
    assert sft.learning_rate == full.learning_rate
    assert sft.train == (str(records["chosen"]),)
    for criterion in CRITERIA:
        without = settings[f"without_{criterion}"]
        assert without.train == (str(records[f"pairs without {criterion}"]),)
        assert {
            name
            for name, value in without.as_dict().items()
            if name not in ("train", "output") and value != full.as_dict()[name]
        } == set()


def test_arms_bring_what_they_start_from_and_are_compared_with():
    assert [arm.name for arm in with_starts(["sft"])] == ["stage1", "full", "sft"]
    assert with_starts([]) == list(ARMS)
    with pytest.raises(ValueError, match=r"arm: 'SFT' is not one of stage1, full, dpo, sft, without_logical"):
        with_starts(["SFT"])


def test_answers_are_generated_once_for_the_same_weights_and_cases(tmp_path, monkeypatch):
    asked = []

    def count(model, cases):
        asked.append(len(cases))
        return [chain(case) for case in cases]

    monkeypatch.setattr(study, "generate", count)  # what a model says is not the question here
    cases, kept = heldout_cases(3), tmp_path / "kept" / "answers.json"
    weights = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(2)}, weights)
    first = answer(tmp_path, cases, kept)
    assert answer(tmp_path, cases, kept) == first
    assert asked == [3]
    answer(tmp_path, cases[:2], kept)
    assert asked == [3, 2]
    save_file({"w": np.ones(2)}, weights)
    answer(tmp_path, cases[:2], kept)
    assert asked == [3, 2, 2]


def test_errors_are_named_by_the_criterion_that_was_spoiled():
    for case in heldout_cases(100):
        assert errors(case, chain(case)) == set()
        assert errors(case, corrupt(case, "logical_consistency")) == {"logical_consistency"}
        assert errors(case, corrupt(case, "reflection")) == {"reflection"}
        blind, imagined = (errors(case, corrupt(case, name)) for name in ("image_analysis", "no_hallucination"))
        assert blind == ({"image_analysis"} if case.findings else {"unreadable"})
        assert "no_hallucination" in imagined
        assert imagined <= {"no_hallucination", "image_analysis"}  # what is moved is missing where it was
    assert errors(case, "I see nothing.") == {"unreadable"}


def test_verdicts_are_those_of_each_answer():
    cases = heldout_cases(2)
    found = verdicts(cases, [chain(cases[0]), corrupt(cases[1], "reflection")])
    assert found["accuracy"] == [True, True]
    assert found["soundness"] == [True, False]
    assert found["reflection"] == [False, True]
    assert set(found) == {*RATES, *ERRORS}


def invented(**hits):
    """Verdicts on 10 cases: so many of the first right in a rate, or failed in a criterion."""
    return {name: [place < hits.get(name, 0) for place in range(10)] for name in (*RATES, *ERRORS)}


ARM, OTHER = (
    Arm("without", "without reflection", 2, "pairs", left_out="reflection"),
    Arm("full", "full", 2, "pairs", against=()),
)
INVENTED = {
    "base": [invented()],
    "full": [invented(accuracy=10, grounding=9), invented(accuracy=10, grounding=8)],
    "without": [invented(accuracy=1, grounding=9, reflection=2), invented(accuracy=8, grounding=9)],
}  # fmt: skip


def test_differences_are_paired_by_case_within_a_seed():
    """McNemar: 9 lost and none gained is 2 / 2^9 = 0.0039, the least of 10 p-values: by Holm 10 times as much."""
    found = {difference.measure: difference for difference in compare([OTHER, ARM], INVENTED)}
    assert list(found) == ["accuracy", "format", "grounding", "soundness", "reflection"]
    accuracy = found["accuracy"]
    assert (accuracy.arm, accuracy.other) == ("without", "full")
    assert accuracy.by_seed == pytest.approx((-0.9, -0.2))
    assert accuracy.estimate.value == pytest.approx(-0.55)
    assert accuracy.estimate.low < -0.55 < accuracy.estimate.high < 0
    assert accuracy.p_values == pytest.approx((10 * 2 / 2**9, 1))
    assert found["grounding"].by_seed == pytest.approx((0, 0.1))
    assert found["reflection"].by_seed == pytest.approx((0.2, 0))


def test_the_tables_show_every_seed_and_no_interval_over_them():
    titles = {"base": "base", "full": "full", "without": "without reflection"}
    lines = tables(titles, INVENTED, compare([OTHER, ARM], INVENTED)).splitlines()
    assert lines[0].startswith("10 unseen cases")
    assert lines[2:7] == [
        "|  | accuracy | format | grounding | soundness |",
        "| --- | --- | --- | --- | --- |",
        "| base | 0.0 | 0.0 | 0.0 | 0.0 |",
        "| full | 100.0 (100.0, 100.0) | 0.0 (0.0, 0.0) | 85.0 (90.0, 80.0) | 0.0 (0.0, 0.0) |",
        "| without reflection | 45.0 (10.0, 80.0) | 0.0 (0.0, 0.0) | 90.0 (90.0, 90.0) | 0.0 (0.0, 0.0) |",
    ]
    assert "| without reflection | 0.0 (0.0, 0.0) | 0.0 (0.0, 0.0) | 0.0 (0.0, 0.0) | 10.0 (20.0, 0.0) |" in "\n".join(
        line.rsplit(" | ", 1)[0] + " |" for line in lines
    )
    assert lines[-1].startswith("| without reflection | -55.0 [")
    assert "(-90.0*, -20.0) |" in lines[-1]
    assert lines[-1].endswith("(+20.0, +0.0) |")
