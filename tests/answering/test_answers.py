"""The strict format, and the option that an answer in it means."""

import pytest

from mede2.trainer.answering.answers import match_option, parse_answer

OPTIONS = ("cyst", "Sarcoidosis", "lung abscess", "B cell lymphoma")


def test_both_parts_are_read():
    parsed = parse_answer("<think>Look twice.\nThen</think>\n<answer> lung abscess</answer>\n", OPTIONS)
    assert parsed.well_formed
    assert (parsed.think, parsed.answer, parsed.option) == ("Look twice.\nThen", "lung abscess", 2)


@pytest.mark.parametrize(
    "text",
    [
        "cyst",
        "<answer>cyst</answer>",
        "<think>a</think> so <answer>cyst</answer>",
        "<think>a</think><answer>cyst</answer> indeed",
        "Well: <think>a</think><answer>cyst</answer>",
        "<think>a</think><answer>cyst",
        "<think>a</think><think>b</think><answer>cyst</answer>",
        "<think>a</think><answer>cyst</answer><answer>cyst</answer>",
        "<think>a<answer>cyst</answer></think><answer>cyst</answer>",
        "<answer>cyst</answer><think>a</think>",
    ],
)
def test_any_other_form_is_not_well_formed_and_gives_no_option(text):
    parsed = parse_answer(text, OPTIONS)
    assert not parsed.well_formed
    assert parsed.option is None


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("cyst", 0),
        ("sarcoidosis.", 1),
        ("  Lung   ABSCESS ", 2),
        ("A", 0),
        ("(d)", 3),
        ("C.", 2),
        ("C) lung abscess", 2),
        ("(B): sarcoidosis", 1),
        ("B cell lymphoma", 3),  # not the letter B
        ("E", None),
        ("A. lung abscess", None),  # letter and text disagree
        ("cyst or sarcoidosis", None),
        ("", None),
        ("1", None),
    ],
)
def test_an_option_is_named_by_its_text_or_its_letter(answer, option):
    assert match_option(answer, OPTIONS) == option


def test_an_option_that_is_offered_twice_is_not_guessed():
    assert match_option("cyst", ("cyst", "Cyst.")) is None
    assert parse_answer("<think>a</think><answer>cyst</answer>").option is None
