"""MMMU and MMMU-Pro in their published form, the questions and images our own."""

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.data.images import load_image

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
SUBJECTS = [
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
]
CHOOSE = "Answer with one of the options."


@pytest.fixture
def row(picture):
    """`row(of_subject, images=, **changes)`: huggingface.co/datasets/MMMU/MMMU, dataset_info."""

    def of(of_subject="Pharmacy", images=1, **changes):
        embedded = dict.fromkeys(IMAGES)
        embedded |= {name: {"bytes": picture(seed), "path": None} for seed, name in enumerate(IMAGES[:images], 1)}
        return {
            "id": f"validation_{of_subject}_1",
            "question": "Which drug is <image 1>?",
            "options": "['Aspirin', \"Wood's salt\"]",
            "explanation": "",
            **embedded,
            "img_type": "['Chemical Structures', 'Diagrams']",
            "answer": "B",
            "topic_difficulty": "Hard",
            "question_type": "multiple-choice",
            "subfield": "Pharmacology",
        } | changes

    return of


@pytest.fixture
def mmmu(tmp_path, write_parquet):
    """`mmmu(*rows)`: one file."""
    return lambda *rows: write_parquet(tmp_path / "validation-00000-of-00001.parquet", list(rows), IMAGES)


def test_the_five_subjects_of_a_download(tmp_path, row, write_parquet, read, refused):
    for subject in SUBJECTS[:-1]:
        write_parquet(tmp_path / subject / "validation-00000-of-00001.parquet", [row(subject)], IMAGES)
    write_parquet(tmp_path / "Art" / "validation-00000-of-00001.parquet", [row("Art")], IMAGES)
    write_parquet(tmp_path / "Pharmacy" / "dev-00000-of-00001.parquet", [row("Pharmacy")], IMAGES)
    assert "no Public_Health/validation-*.parquet in this folder" in refused("mmmu", tmp_path)
    write_parquet(tmp_path / "Public_Health" / "validation-00000-of-00001.parquet", [row("Public_Health")], IMAGES)
    cases, _ = read("mmmu", tmp_path)
    assert list(cases) == [f"validation_{subject}_1" for subject in SUBJECTS]
    assert cases["validation_Diagnostics_and_Laboratory_Medicine_1"].meta == {
        "specialty": "Diagnostics and Laboratory Medicine", "modality": "Chemical Structures, Diagrams",
        "task": "Pharmacology", "answer_type": "multiple-choice", "topic_difficulty": "Hard", "license": "Apache-2.0",
        "source": "MMMU (mmmu)",
    }  # fmt: skip


def test_images_stand_where_their_marks_are(row, mmmu, read, layout, picture):
    question = "<image 2> shows what <image 1> lacks.\nSee <image 2>. Which?"
    options = "['<image 3>', 'None, see <image 4>', 'Both']"
    case = next(iter(read("mmmu", mmmu(row(question=question, options=options, images=5)))[0].values()))
    assert layout(case) == [
        None,  # image 5, which no text shows
        None,
        "shows what",
        None,
        "lacks.\nSee",
        None,
        ". Which?\n\nA.",
        None,
        "\nB. None, see",
        None,
        "\nC. Both\n\nAnswer with the letter of one of the options.",
    ]
    assert [path.read_bytes() for path in case.images] == [picture(seed) for seed in (5, 2, 1, 2, 3, 4)]
    assert case.options == ("<image 3>", "None, see <image 4>", "Both")
    assert case.answer == "None, see <image 4>"
    shown = np.asarray(load_image(case.images[1]))
    store = case.images[1].parent
    assert np.array_equal(shown, np.asarray(Image.open(case.images[3])))
    assert len(list(store.iterdir())) == 5


def test_options_are_read_from_the_text_of_a_python_list(row, mmmu, read, layout):
    case = next(iter(read("mmmu", mmmu(row()))[0].values()))
    assert layout(case) == ["Which drug is", None, f"?\n\nA. Aspirin\nB. Wood's salt\n\n{CHOOSE}"]
    assert (case.options, case.answer, case.explanation) == (("Aspirin", "Wood's salt"), "Wood's salt", None)


def test_open_questions_with_one_and_with_several_right_answers(row, mmmu, read, layout):
    given = dict(question_type="open", options="[]", explanation="Weighed.")
    one = row(**given, answer="[3H] water")
    several = row(**given, answer="['4 mg', '4']") | {"id": "validation_Pharmacy_2"}
    cases, _ = read("mmmu", mmmu(one, several))
    assert layout(cases["validation_Pharmacy_1"]) == ["Which drug is", None, "?\n\nAnswer briefly."]
    assert cases["validation_Pharmacy_1"].options == ()
    assert cases["validation_Pharmacy_1"].answer == "[3H] water"
    assert cases["validation_Pharmacy_1"].explanation == "Weighed."
    assert cases["validation_Pharmacy_2"].answer == "4 mg"
    assert cases["validation_Pharmacy_2"].meta["accepted_answers"] == ["4 mg", "4"]
    assert cases["validation_Pharmacy_2"].meta["answer_type"] == "open"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "?"}, "answer: withheld (?), as in the test split; read the validation split"),
        ({"answer": "C"}, "answer: 'C' is the letter of none of the 2 options"),
        ({"options": "Aspirin, salt"}, "options: the text of a Python list, not 'Aspirin, salt'"),
        ({"options": "[1, 2]"}, "options: a list of texts, not [1, 2]"),
        ({"options": "['Aspirin']"}, "options: 2 to 26 options, not 1"),
        ({"question": "What of <image 2>?"}, "<image 2> stands in the text, and the row has no such image"),
        ({"id": "validation_Art_1"}, "id: 'validation_Art_1' names none of the subjects Basic_Medical_Science"),
        ({"question_type": "short"}, "question_type: multiple-choice or open, not 'short'"),
        ({"image_1": None, "question": "Which?"}, "no image"),
        ({"subject": "Pharmacy"}, "subject: unknown"),
    ],
)
def test_a_bad_row_of_mmmu(row, mmmu, refused, change, told):
    path = mmmu(row(**change))
    message = refused("mmmu", path)
    assert f"{path} row 1: " in message
    assert told in message


@pytest.fixture
def pro(row):
    """`pro(number, subject, **changes)`: huggingface.co/datasets/MMMU/MMMU_Pro, dataset_info of the standard ones."""

    def of(number, subject="Clinical_Medicine", **changes):
        mmmu_row = {name: value for name, value in row().items() if name not in ("question_type", "subfield")}
        return mmmu_row | {"id": f"validation_{subject}_{number}", "subject": subject} | changes

    return of


def test_mmmu_pro_keeps_the_five_subjects_and_says_how_many_others_there_were(
    tmp_path, pro, write_parquet, read, refused, layout
):
    ten = "['a1', 'b1', 'c1', 'd1', 'e1', 'f1', 'g1', 'h1', 'i1', 'j1']"
    rows = [pro(1, options=ten, answer="J"), pro(2, "Music"), pro(3, "Music"), pro(4, "Public_Health")]
    folder = tmp_path / "standard (10 options)"
    path = write_parquet(folder / "test-00000-of-00001.parquet", rows, IMAGES)
    four = [pro(1, options="['a', 'b', 'c', 'j']", answer="D")]
    write_parquet(tmp_path / "standard (4 options)" / "test-00000-of-00001.parquet", four, IMAGES)
    cases, said = read("mmmu-pro", tmp_path)
    assert list(cases) == ["validation_Clinical_Medicine_1", "validation_Public_Health_4"]
    assert len(cases["validation_Clinical_Medicine_1"].options) == 10
    assert cases["validation_Clinical_Medicine_1"].answer == "j1"
    assert layout(cases["validation_Clinical_Medicine_1"])[2].startswith("?\n\nA. a1\nB. b1\n")
    assert "task" not in cases["validation_Clinical_Medicine_1"].meta
    assert said[0].endswith("; 2 rows left out: a subject outside Health & Medicine")
    cases, _ = read("mmmu-pro-4", tmp_path)
    assert cases["validation_Clinical_Medicine_1"].options == ("a", "b", "c", "j")
    assert cases["validation_Clinical_Medicine_1"].answer == "j"
    assert "name the folder that holds `standard (10 options)`" in refused("mmmu-pro", path)
    assert "no standard (10 options)/test-*.parquet in this folder" in refused("mmmu-pro", folder)


def test_mmmu_pro_vision_has_question_and_options_in_the_image(tmp_path, write_parquet, read, refused, layout, picture):
    row = {
        "id": "validation_Pharmacy_5",
        "image": {"bytes": picture(5), "path": "5.png"},
        "options": "['x', 'y', 'z']",
        "answer": "C",
        "subject": "Pharmacy",
    }
    path = write_parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", [row], ("image",))
    case = read("mmmu-pro-vision", tmp_path)[0]["validation_Pharmacy_5"]
    assert layout(case) == [None, f"Answer the question in the image.\n\n{CHOOSE}"]
    assert (case.options, case.answer, case.meta["specialty"]) == (("x", "y", "z"), "z", "Pharmacy")
    assert case.images[0].read_bytes() == picture(5)
    write_parquet(path, [{name: value for name, value in row.items() if name != "options"}], ("image",))
    assert "row 1: options: missing" in refused("mmmu-pro-vision", tmp_path)
