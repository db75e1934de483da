"""Whether an extracted answer counts as right, and the recall of open answers."""

import pytest

from mede2.trainer.answering.extraction import Extracted
from mede2.trainer.answering.matching import is_match, word_recall, words

OPTIONS = ("cyst", "lung abscess")


def test_among_options_the_one_that_is_meant_must_be_the_keys():
    right = Extracted("lung abscess", 1, "stated")
    assert is_match(right, "lung abscess", OPTIONS)
    assert not is_match(right, "cyst", OPTIONS)
    assert not is_match(Extracted(), "cyst", OPTIONS)


@pytest.mark.parametrize(
    ("answer", "key", "right"),
    [
        ("The right lower lobe.", "right lower lobe", True),
        ("right-sided", "Right sided", True),
        ("3.50 cm", "3.5cm", True),
        ("1,000", "1000", True),
        ("35", "3.5", False),
        ("-2", "2", False),
        ("3-4", "3 - 4", True),
        ("L5", "5", False),
        ("the lobe on the right", "right lobe", False),  # the order counts
        ("in the right lower lobe", "right lower lobe", False),  # a lower bound
        ("tumour", "neoplasm", False),
        ("右肺下叶", "右肺下叶", True),
        ("+", "+", True),
        ("-", "+", False),
    ],
)
def test_an_open_answer_must_have_the_keys_words(answer, key, right):
    assert is_match(Extracted(answer, None, "stated"), key) is right


def test_an_open_question_without_answer_is_wrong():
    assert not is_match(Extracted(), "liver")


@pytest.mark.parametrize(
    ("answer", "key", "recall"),
    [
        ("It lies in the right lower lobe", "right lower lobe", 1.0),
        ("right lung", "The right lower lobe", 1 / 3),
        ("left", "right", 0.0),
        ("right", "right, right and left", 1 / 3),  # each word once
        ("about 3.50 cm", "3.5 cm", 1.0),
    ],
)
def test_recall_is_the_share_of_the_keys_words(answer, key, recall):
    assert word_recall(answer, key) == pytest.approx(recall)


def test_a_key_without_words_is_refused():
    with pytest.raises(ValueError, match="key: '  ' has no words"):
        word_recall("liver", "  ")


def test_a_text_of_articles_alone_is_one_word():
    assert words("A.") == ("a",)
