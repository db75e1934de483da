"""The report's files: what a page holds, what it leaves out and says so, redaction, JSON, the terminal's tables."""

import dataclasses
import json

import pytest
from rich.console import Console

from mede2.trainer.evaluation.answered import AS_IT_IS
from mede2.trainer.evaluation.page import print_summary, write_report
from mede2.trainer.evaluation.shown import choose, collect
from mede2.trainer.evaluation.summary import summarize


def test_a_redacted_report_holds_no_text_and_no_image(example, tmp_path):
    evaluation = example(2)
    leak = {"benchmark": "vignettes", "case": "v1", "training_file": "t.jsonl", "line": 4, "kind": "text"}
    write_report(evaluation, tmp_path, [leak | {"detail": "fever and a cough for 2 days"}], redact=True)
    for name in ("report.html", "report.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for word in ("data:image/", "Which diagnosis", "the shadow is dense", "embolism", "left upper", "fever"):
            assert word not in text, (name, word)
        assert "t.jsonl" in text
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "Left out, as was asked" in html


def test_errors_are_shown_before_the_others_and_what_is_left_out_is_said(example, tmp_path):
    evaluation = example(1, samples=0)
    wrong = {(a.benchmark, a.case) for a in evaluation.answers if a.probe == AS_IT_IS and not a.right}
    places, counts = choose(evaluation, 20)
    assert len(places) == 20
    assert set(places) <= wrong
    assert {name: row["shown"] for name, row in counts.items()} == {"phantoms": 7, "slides": 7, "vignettes": 6}
    assert choose(evaluation, 20) == choose(evaluation, 20)
    assert choose(evaluation, 20, seed=1)[0] != places
    most, counts = choose(evaluation, len(wrong) + 5)
    assert wrong <= set(most) or any(row["errors_shown"] < row["with_errors"] for row in counts.values())
    every = [(benchmark, name) for benchmark, cases in evaluation.benchmarks.items() for name in cases]
    assert choose(evaluation, 1000)[0] == every
    assert choose(evaluation, 0)[0] == []
    write_report(evaluation, tmp_path, num_shown=20)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    row = counts["phantoms"]
    assert f"7 of 40 questions of phantoms (7 of the {row['with_errors']} that some model gets wrong)" in html
    write_report(evaluation, tmp_path, num_shown=0)
    assert "None are held by this page." in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="num_shown: 0 questions or more, not -1"):
        write_report(evaluation, tmp_path, num_shown=-1)


def test_an_image_is_held_once(example):
    shown = collect(example(1, samples=0), 130)
    assert len(shown["images"]) == 40
    used = [place for question in shown["questions"] for place in question["images"]]
    assert len(used) == 70
    assert set(used) == set(range(40))


def test_the_files_hold_the_same_figures_and_are_written_whole_or_not(example, tmp_path):
    evaluation = example(2, images=False)
    summary = write_report(evaluation, tmp_path, seed=3)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == summary
    assert {name: summary[name] for name in summary if name != "redacted"} == summarize(evaluation, seed=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="no greedy answer"):
        write_report(dataclasses.replace(evaluation, answers=evaluation.answers[1:]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_that_nobody_looked_for_leaks_is_told_from_that_none_was_found(example, tmp_path):
    told = {None: "Nobody looked whether the questions stand", (): "No question shares 13 words in a row"}
    for leaks, text in told.items():
        write_report(example(1, images=False, samples=0), tmp_path, leaks, num_shown=0)
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert [other in html for other in told.values()] == [other == text for other in told.values()]


def test_the_terminal_shows_the_tables(example):
    summary = summarize(example(3))
    console = Console(width=160, record=True)
    print_summary(summary, console)
    shown = console.export_text()
    for title in ("Accuracy", "Comparisons", "Inference-time scaling", "Grounding: phantoms", "The answers", "Rungs"):
        assert title in shown
    for row in summary["scores"]:
        assert f"{100 * row['accuracy']['value']:.1f} [{100 * row['accuracy']['low']:.1f}, " in shown
    assert "no difference shown" in shown
