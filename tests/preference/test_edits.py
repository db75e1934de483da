"""Controlled corruption: what each edit makes of a sentence, which sentences it must not touch, one edit at a time."""

import pytest

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.demo.cases import CRITERIA, chain, heldout_cases
from mede2.trainer.preference.edits import EDITS, spoil

SWAPPED = {
    "The CT shows a nodule in the left lower lobe.": "The CT shows a nodule in the right lower lobe.",
    "Right-sided effusion, larger on the right.": "Left-sided effusion, larger on the left.",
    "RIGHT hip: a fracture.": "LEFT hip: a fracture.",
    "A right-handed man with left arm weakness.": "A right-handed man with right arm weakness.",
    "He was left with a paresis on the left.": "He was left with a paresis on the right.",
    "All right, the right lung is clear.": "All right, the left lung is clear.",
    "He left hospital with right knee pain.": "He left hospital with left knee pain.",
    "The trachea is deviated to the left.": "The trachea is deviated to the right.",
    "Right now the left kidney is obstructed.": "Right now the right kidney is obstructed.",
    "The left upper lobe is clear, the right one too: right lung normal.": (
        "The right upper lobe is clear, the left one too: left lung normal."
    ),
    "The right kidney is small, the left one not; R-sided stent.": (
        "The left kidney is small, the right one not; L-sided stent."
    ),
    "It lies left of midline, pain in the left hip more than in the right.": (
        "It lies right of midline, pain in the right hip more than in the left."
    ),
    "Opacity in the RLL and the left base.": "Opacity in the LLL and the right base.",
    "The right middle lobe has collapsed.": "The lingula has collapsed.",
    "Bilateral pleural effusions.": "Unilateral pleural effusions.",
    "A cavity in a lower zone, a clear upper lobe.": "A cavity in an upper zone, a clear lower lobe.",
    "Look: nodule left upper; mass right middle.": "Look: nodule right upper; mass left middle.",
}
UNSWAPPED = [
    "If left untreated, the effusion grows.",
    "Right now there is no need for a chest tube.",
    "That is the right answer for this lung.",
    "The surgeon left the drain in the chest.",
    "Both the left and the right kidney are normal.",
    "A left-to-right shunt.",
    "Not the left option; that one is the right one.",
    "Neutrophilia with a left shift.",
    "He had the right to refuse; leftover contrast was discarded.",
    "Lower lung volumes and an upper respiratory infection at the upper limit of normal.",
    "The upper and lower lobes are clear.",
]


@pytest.mark.parametrize("text", SWAPPED)
def test_sides_are_swapped(text):
    assert spoil(text, "swap_laterality", 0).text == SWAPPED[text]


@pytest.mark.parametrize("text", UNSWAPPED)
def test_words_that_are_no_places_stay(text):
    assert spoil(text, "swap_laterality", 0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man of 60. The CT shows a mass. So carcinoma.", "A man of 60. So carcinoma."),
        ("The film shows no effusion but a nodule. He smokes.", "He smokes."),
        ("1. Look: nodule left upper.\n2. History: fever.", "2. History: fever."),
        ("He coughs. The chest x-ray reveals approx. 3 nodules.", "He coughs."),
        ("The image shows no mass. Normal.", None),  # denied
        ("The film is without a fracture. An effusion is absent on the scan. Fine.", None),
        ("He has a mass in mind. Fine.", None),  # nothing of an image
        ("The CT shows a mass.", None),  # there is nothing else
    ],
)
def test_a_finding_is_dropped(text, expected):
    made = spoil(text, "drop_finding", 0)
    assert (made and made.text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is no evidence of a fracture here.", {"There is evidence of a fracture here."}),
        ("No nodules are visible to us.", {"Nodules are visible to us."}),
        ("There is no enlarged cyst.", {"There is an enlarged cyst."}),
        ("Clear, without edema.", {"Clear, with edema."}),
        ("Soft, without any mass.", {"Soft, with a mass."}),
        (
            "The fundus is seen well.",
            {
                f"The fundus is seen well. There {what}."
                for what in (
                    "are drusen in the macula", "are flame-shaped hemorrhages", "is swelling of the optic disc",
                )
            },
        ),
        ("The retina shows drusen and hemorrhages.", {
            "The retina shows drusen and hemorrhages. There is swelling of the optic disc."
        }),
        ("MRI shows a mass in the temporal lobe, edema and hemorrhage.", {
            "MRI shows a mass in the temporal lobe, edema and hemorrhage. There is a midline shift.",
            "MRI shows a mass in the temporal lobe, edema and hemorrhage. There is a thin left subdural hematoma.",
            "MRI shows a mass in the temporal lobe, edema and hemorrhage. There is a thin right subdural hematoma.",
        }),
        ("No effusion or mass.", None),
        ("No history of fracture.", None),
        ("No. 3 has a mass.", None),
        ("There is no longer an effusion.", None),
        ("No doubt the plan is right.", None),
    ],
)  # fmt: skip
def test_a_finding_is_invented(text, expected):
    made = {made and made.text for made in (spoil(text, "invent_finding", seed) for seed in range(20))}
    assert made == (expected or {None})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A mass. This is consistent with carcinoma.", "A mass. This is not consistent with carcinoma."),
        ("Fever suggests abscess. He smokes.", "Fever argues against abscess. He smokes."),
        ("It is most likely a cyst.", "It is least likely a cyst."),
        ("This does not suggest carcinoma.", None),
        ("He smokes.", None),
    ],
)
def test_an_open_conclusion_is_turned_round(text, expected):
    made = spoil(text, "contradict_conclusion", 0)
    assert (made and made.text) == expected


def test_the_conclusion_names_another_option_and_the_answer_stays():
    text = "<think>Not a cyst, I say. So it is an Abscess. Fine.</think>\n<answer>abscess</answer>"
    for seed in range(5):
        made = spoil(text, "contradict_conclusion", seed, ("cyst", "abscess", "cyst wall"))
        assert made.text in (text.replace("Abscess", "Cyst"), text.replace("Abscess", "Cyst wall"))


def test_where_the_reasoning_names_no_option_the_answer_is_another():
    text = "<think>abscesses everywhere</think><answer> abscess</answer>"
    made = spoil(text, "contradict_conclusion", 0, ("cyst", "abscess"))
    assert made.text == "<think>abscesses everywhere</think><answer> cyst</answer>"
    assert spoil(text, "contradict_conclusion", 0) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A mass. Wait, let me look again at the film. So a cyst.", "A mass. So a cyst."),
        ("A mass. On second thought, it is a cyst.", "A mass."),
        ("A mass. I need to double check the side. It is left.", "A mass. It is left."),
        ("A mass. Re-examining the film, the mass is left. Fine.", "A mass. Fine."),
        ("Wait-and-see is best. Watchful waiting, then. Recheck potassium in two days.", None),
        ("Checkpoint inhibitors help. The doctor should check the potassium.", None),
        ("Wait, let me think again.", None),  # there is nothing else
    ],
)
def test_reflection_is_deleted(text, expected):
    made = spoil(text, "delete_reflection", 0)
    assert (made and made.text) == expected


def test_only_the_reasoning_is_edited():
    text = "<think>The film shows a nodule in the left lung. No mass is seen. Wait, is it left? So it is.</think>\n"
    text += "<answer>nodule of the left lung</answer>"
    for edit in ("swap_laterality", "drop_finding", "invent_finding", "delete_reflection"):
        made = spoil(text, edit, 0)
        assert parse_answer(made.text).answer == "nodule of the left lung"
        assert made.text != text
        assert made.before in text
        assert made.after in made.text


def test_tags_that_are_not_in_order_are_left_alone():
    assert spoil("<think>The left lung has a mass.<answer>mass</answer>", "swap_laterality", 0) is None


def test_the_demos_chains_are_spoilt_or_left_and_always_the_same():
    for case in heldout_cases(50):
        for edit in EDITS:
            made = spoil(chain(case), edit, 1, case.options)
            assert made == spoil(chain(case), edit, 1, case.options)
            if edit in ("contradict_conclusion", "delete_reflection"):
                assert made is not None
            if edit in ("swap_laterality", "drop_finding"):
                assert (made is not None) == bool(case.findings)
            if made is not None:
                assert parse_answer(made.text).well_formed
                assert made.text != chain(case)


def test_every_criterion_has_its_edit():
    assert {edit.criterion for edit in EDITS.values()} == set(CRITERIA)
