"""The embedded case set: cases are unambiguous, corruptions spoil what they say, and verdicts see it."""

import json

import numpy as np
import pytest

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.demo.cases import (
    CRITERIA,
    DIAGNOSES,
    SPLITS,
    case_seed,
    chain,
    corrupt,
    heldout_cases,
    make_case,
    pattern,
    read_chain,
    render,
)
from mede2.trainer.demo.phantoms import HEIGHT, WIDTH, Finding
from mede2.trainer.demo.records import text_question, write_pretraining, write_stage2
from mede2.trainer.demo.score import judge

CASES = [make_case(case_seed("stage2", 0, index)) for index in range(200)]
NODULE, MASS = Finding("nodule", "left", "upper"), Finding("mass", "right", "lower")


def test_every_case_has_one_right_option_among_four():
    for case in CASES:
        assert case.answer in case.options
        assert len(set(case.options)) == 4
    assert {case.answer for case in CASES} == set(DIAGNOSES)


@pytest.mark.parametrize(
    ("findings", "name"),
    [
        ((), "clear"),
        ((NODULE,), "nodule"),
        ((NODULE, Finding("nodule", "left", "lower")), "nodules"),
        ((NODULE, MASS), "mass"),
        ((MASS, Finding("cavity", "left", "lower")), "cavity"),
        ((Finding("cavity", "right", "upper"), MASS), "upper cavity"),
    ],
)
def test_the_gravest_finding_decides(findings, name):
    assert pattern(findings) == name


def test_the_reference_answer_is_right_on_all_four_counts():
    for case in CASES:
        verdict = judge(case, chain(case))
        assert verdict.accuracy
        assert verdict.format
        assert verdict.grounding
        assert verdict.soundness


def test_each_corruption_is_seen_where_it_was_made():
    for case in CASES:
        verdicts = {criterion: judge(case, corrupt(case, criterion)) for criterion in CRITERIA}
        illogical, blind, imagined, unchecked = (verdicts[criterion] for criterion in CRITERIA)
        assert all(verdict.format for verdict in verdicts.values())
        assert illogical.grounding
        assert not illogical.soundness
        assert not blind.grounding
        assert not imagined.grounding
        assert not unchecked.soundness
        assert not read_chain(parse_answer(unchecked.text).think).checked


def test_a_logical_error_differs_from_the_reference_in_the_answer_alone():
    for case in CASES:
        right, wrong = (parse_answer(text) for text in (chain(case), corrupt(case, "logical_consistency")))
        assert right.think == wrong.think
        assert wrong.answer in set(DIAGNOSES) - {case.answer}


def test_a_case_is_a_function_of_its_seed_and_no_two_splits_share_one():
    assert make_case(7) == make_case(7)
    assert np.array_equal(render(CASES[0]), render(CASES[0]))
    assert render(CASES[0]).size == (WIDTH, HEIGHT)
    seeds = [case_seed(split, seed, index) for split in SPLITS for seed in range(3) for index in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert heldout_cases(3) == [make_case(case_seed("heldout", 0, index)) for index in range(3)]
    with pytest.raises(ValueError, match="1,000,000"):
        case_seed("heldout", 0, 1_000_000)


def test_findings_show_in_the_picture_on_the_side_they_are_said_to_be():
    """Radiological: the patient's right is on the left of the picture."""
    cases = [make_case(case_seed("heldout", 1, index)) for index in range(300)]
    masses = [case for case in cases if len(case.findings) == 1 and case.findings[0].kind == "mass"]
    clear = np.mean([render(case) for case in cases if not case.findings], axis=0)
    assert len(masses) > 10
    for case in masses:
        (finding,) = case.findings
        row = ("upper", "middle", "lower").index(finding.level) * HEIGHT // 3
        column = ("right", "left").index(finding.side) * WIDTH // 2
        brighter = (np.asarray(render(case)) - clear)[row : row + HEIGHT // 3, column : column + WIDTH // 2]
        elsewhere = (np.asarray(render(case)) - clear)[row : row + HEIGHT // 3, WIDTH // 2 - column :][:, : WIDTH // 2]
        assert brighter.mean() > elsewhere.mean() + 2


def test_the_question_in_words_tells_every_finding():
    for case in CASES:
        for finding in case.findings:
            assert finding.kind in text_question(case)


def test_pretraining_never_derives_a_diagnosis(tmp_path):
    """A diagnosis stands in an answer only where the question lists it: as an option, or as a word to copy."""
    rows = [json.loads(line) for line in write_pretraining(tmp_path, 400, seed=0).read_text().splitlines()]
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        if not isinstance(question, str):
            question = question[1]["text"]
        words = set(answer.replace(".", " ").replace(",", " ").replace(":", " ").split())
        assert all(name in question for name in words & set(DIAGNOSES))
        assert "<think>" not in answer or question == answer  # a tag comes only as a word to copy
        assert answer.startswith("Copy:") or not words & {"Rule", "Check", "means"}


def test_pairs_cover_every_criterion(tmp_path):
    rows = [json.loads(line) for line in write_stage2(tmp_path, 20, seed=0).read_text().splitlines()]
    assert {row["meta"]["criterion"] for row in rows} == set(CRITERIA)
    assert all((tmp_path / image).is_file() for row in rows for image in row["images"])


@pytest.mark.parametrize(
    "text",
    [
        "Look: mass of lower. Count: 1. History: none. Rule: mass with none.",
        "Look: nothing. Count: 0. History: none.",
        "I see nothing.",
    ],
)
def test_what_is_no_chain_is_not_read(text):
    assert read_chain(text) is None
