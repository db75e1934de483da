"""The ladder by which answers are found: over 400 written answers, and what holds for any text."""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mede2.trainer.answering.extraction import RUNGS, Extracted, extract

GROUPS = yaml.safe_load((Path(__file__).parent / "written_answers.yaml").read_text())
WRITTEN = [
    (text, tuple(group["options"]), *(expected or (None, None)))
    for group in GROUPS
    for text, *expected in group["answers"]
]
PIECES = [
    *(
        "A",
        "B",
        "C",
        "I",
        "(C)",
        "option",
        "The answer is",
        "Answer:",
        "not",
        "or",
        "no",
        "yes",
        "most",
        "likely",
        "either",
    ),
    *(
        "is correct",
        "lung abscess",
        "cyst",
        "1.",
        ", ",
        ". ",
        "\n",
        "**",
        "_",
        "`",
        "$",
        "[",
        "{",
        "}",
        "\\boxed{",
        "\ue000",
    ),
    *("<answer>", "</answer>", "<think>", "</think>", "\uff23"),
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join))
OPTIONS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(PIECES)), max_size=11)
NAMES = (
    "cyst",
    "lung abscess",
    "viral pneumonia",
    "pneumonia",
    "B cell lymphoma",
    "hepatitis B",
    "3.5 cm",
    "no effusion",
)


@pytest.mark.parametrize(("text", "options", "answer", "rung"), WRITTEN)
def test_a_written_answer_is_read_as_a_careful_reader_reads_it(text, options, answer, rung):
    extracted = extract(text, options)
    if options and answer:
        option = ord(answer) - ord("A")
        assert extracted == Extracted(options[option], option, rung)
    else:
        assert extracted == Extracted(answer, None, rung)


def test_every_rung_and_no_answer_are_among_the_written_ones():
    counts = Counter(rung for *_, rung in WRITTEN)
    assert set(counts) == {*RUNGS, None}
    assert min(counts.values()) >= 9
    assert len(set(WRITTEN)) == len(WRITTEN) >= 400


@settings(max_examples=300, deadline=None)
@given(TEXTS, OPTIONS)
def test_any_text_gives_one_option_or_none_and_space_behind_it_changes_nothing(text, options):
    extracted = extract(text, options)
    assert extract(text + " \n\t", options) == extracted
    assert (extracted.rung is None) == (extracted.answer is None)
    if options:
        assert extracted.answer == (None if extracted.option is None else options[extracted.option])
    else:
        assert extracted.option is None


@settings(max_examples=100, deadline=None)
@given(st.text(), st.permutations(NAMES), st.integers(0, len(NAMES) - 1), st.booleans())
def test_the_strict_format_is_always_the_first_rung(reasoning, options, index, by_letter):
    reasoning = reasoning.replace("<", "")
    answer = "ABCDEFGH"[index] if by_letter else options[index]
    text = f"<think>{reasoning}</think> <answer>{answer}</answer>"
    assert extract(text, options) == Extracted(options[index], index, "format")
    assert extract(text) == Extracted(answer, None, "format")


@settings(max_examples=100, deadline=None)
@given(st.permutations(NAMES), st.integers(0, len(NAMES) - 1), st.sampled_from(("{}", "{}.", " {}\n", "*{}*", "“{}”")))
def test_an_option_text_alone_is_always_found(options, index, written):
    assert extract(written.format(options[index]), options) == Extracted(options[index], index, "option text")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "unit", ["A, ", "cyst and ", "The answer is A. ", "The answer is not ", "\n", "\\boxed{", "most "]
)
def test_a_model_that_repeats_itself_is_read_in_the_end(unit):
    assert extract(unit * (6000 // len(unit)), ("cyst", "lung abscess")).option in (0, None)
