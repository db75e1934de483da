"""MedQA, MedBullets, MedXpertQA and PubMedQA in their published forms, the questions our own."""

import csv
import json

import pytest

MEDQA = {
    # github.com/jind11/MedQA, 4_options/phrases_no_exclude_test.jsonl
    "question": "Which sign is seen first?",
    "answer": "Fever",
    "options": {"A": "Rash", "B": "Fever", "C": "Cough", "D": "Pallor"},
    "meta_info": "step1",
    "answer_idx": "B",
    "metamap_phrases": ["sign", "first"],
}
CHOOSE = "\n\nAnswer with one of the options."


def test_medqa_with_four_and_with_five_options(tmp_path, write_rows, read, layout):
    five = {name: value for name, value in MEDQA.items() if name != "metamap_phrases"}
    five |= {"options": MEDQA["options"] | {"E": "Thirst"}, "answer": "Thirst", "answer_idx": "E"}
    path = write_rows(tmp_path / "test.jsonl", [MEDQA, five])
    cases, said = read("medqa", path)
    assert layout(cases["1"]) == ["Which sign is seen first?\n\nA. Rash\nB. Fever\nC. Cough\nD. Pallor" + CHOOSE]
    assert (cases["1"].options, cases["1"].answer) == (("Rash", "Fever", "Cough", "Pallor"), "Fever")
    assert cases["1"].meta == {"task": "step1", "license": "MIT", "source": "MedQA (USMLE) (medqa)"}
    assert (len(cases["2"].options), cases["2"].answer) == (5, "Thirst")
    assert cases["2"].source == f"{path}:2"
    assert said == [f"medqa: 2 questions from {path}"]
    assert list(read("medqa", tmp_path)[0]) == ["1", "2"]  # the folder names the file, too


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer_idx": "E"}, "answer_idx: 'E' is the letter of none of the 4 options"),
        ({"answer_idx": "AB"}, "answer_idx: 'AB' is the letter of none"),
        ({"answer": "Cough"}, "answer: 'Cough' is not option B, which is 'Fever'"),
        ({"options": {"A": "Rash", "C": "Fever"}}, "options: letters from A on, not A, C"),
        ({"options": {"A": "Rash"}}, "options: 2 to 26 options, not 1"),
        ({"options": ["Rash", " "]}, "options: a list of texts or {letter: text}, none empty"),
        ({"question": " "}, "question: empty"),
        ({"options": None}, "options: null where options are due"),
        ({"options": []}, "options: 2 to 26 options, not 0"),
        ({"question": None}, "question: text, not None"),
        ({"question": "A\x07B"}, "control character U+0007"),
        ({"difficulty": 3}, "difficulty: unknown; the fields here are answer, answer_idx, meta_info, metamap_phrases"),
        ({"meta_info": ...}, "meta_info: missing; the row has question, answer, options, answer_idx"),
    ],
)
def test_a_bad_row_is_told_by_line_and_field(tmp_path, write_rows, refused, change, told):
    row = {name: value for name, value in (MEDQA | change).items() if value is not ...}
    path = write_rows(tmp_path / "test.jsonl", [MEDQA, row])
    message = refused("medqa", path)
    assert message.startswith(f"{path}: 1 of 2 questions cannot be used:\n  {path}:2: ")
    assert told in message


def test_the_right_options_text_twice_is_left_out_and_told_a_wrong_ones_is_not(tmp_path, write_rows, read):
    options = {"A": "Rash", "B": "Fever", "C": "Rash", "D": "Pallor"}
    wrong_twice = MEDQA | {"options": options}
    right_twice = MEDQA | {"options": options, "answer": "Rash", "answer_idx": "C"}
    cases, said = read("medqa", write_rows(tmp_path / "test.jsonl", [wrong_twice, right_twice]))
    assert [case.options for case in cases.values()] == [("Rash", "Fever", "Rash", "Pallor")]
    assert said[0].endswith("; 1 rows left out: the right option's text stands twice among the options")


def write_csv(path, header, rows, surplus=""):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([*row, *surplus])
    return path


# github.com/HanjieChen/ChallengeClinicalQA, medbullets/medbullets_op5.csv and medbullets_op4.csv
FIVE = ["link", "question", "opa", "opb", "opc", "opd", "ope", "answer_idx", "answer", "explanation"]
QUESTION = ["https://example.org/1", 'A man says "ow".\nWhat now?', "Rest", "Ice", "Heat", "Cast", "Wait", "D", "Cast"]
WHY = "Bones, broken."


def test_medbullets_with_five_and_with_four_options(tmp_path, read, layout):
    cases, _ = read("medbullets", write_csv(tmp_path / "medbullets_op5.csv", FIVE, [[*QUESTION, WHY]]))
    case = cases["1"]
    assert layout(case) == ['A man says "ow".\nWhat now?\n\nA. Rest\nB. Ice\nC. Heat\nD. Cast\nE. Wait' + CHOOSE]
    assert (case.answer, case.explanation) == ("Cast", WHY)
    assert case.meta["link"] == "https://example.org/1"
    assert case.meta["license"] == "none stated by its repository"
    four = [name for name in FIVE if name != "ope"]
    row = [cell for cell in QUESTION if cell != "Wait"]
    cases, _ = read("medbullets", write_csv(tmp_path / "medbullets_op4.csv", four, [[*row, ""]]))
    assert cases["1"].options == ("Rest", "Ice", "Heat", "Cast")
    assert cases["1"].explanation is None


def test_empty_cells_at_a_rows_end_pass_and_others_do_not(tmp_path, read, refused):
    path = write_csv(tmp_path / "medbullets_op5.csv", FIVE, [[*QUESTION, WHY]], surplus=["", "", " "])
    assert read("medbullets", path)[0]["1"].answer == "Cast"
    write_csv(path, FIVE, [[*QUESTION, WHY]], surplus=["", "cut"])
    assert f"{path} row 1: more cells than the first line has names: 'cut'" in refused("medbullets", path)
    write_csv(path, FIVE, [QUESTION[:-1]])
    assert "row 1: answer: missing" in refused("medbullets", path)
    path.write_text('link,question\nx,"open')
    assert f"{path}: after line 1 not a table (unexpected end of data)" in refused("medbullets", path)


# huggingface.co/datasets/TsinghuaC3I/MedXpertQA, card and viewer
EXPERT = {
    "id": "Text-7",
    "question": "Which bone?\nAnswer Choices: (A) The ulna (B) The radius (left) (C) None",
    "options": {"A": "The ulna", "B": "The  radius (left)", "C": "None"},
    "label": "B",
    "medical_task": "Diagnosis",
    "body_system": "Skeletal",
    "question_type": "Reasoning",
}


def test_medxpertqa_keeps_its_split_and_tells_the_options_once(tmp_path, write_rows, read, layout):
    (tmp_path / "Text").mkdir()
    write_rows(tmp_path / "Text" / "test.jsonl", [EXPERT])
    case = read("medxpertqa-text", tmp_path)[0]["Text-7"]
    assert layout(case) == ["Which bone?\n\nA. The ulna\nB. The  radius (left)\nC. None" + CHOOSE]
    assert case.answer == "The  radius (left)"
    assert case.meta == {
        "specialty": "Skeletal", "task": "Reasoning", "medical_task": "Diagnosis", "license": "MIT",
        "source": "MedXpertQA Text (medxpertqa-text)",
    }  # fmt: skip


def test_medxpertqas_question_stays_where_it_says_something_else_than_the_options(tmp_path, write_rows, read, layout):
    other = EXPERT | {"question": "Which?\nAnswer Choices: (A) The ulna (B) The radius (C) None"}
    case = read("medxpertqa-text", write_rows(tmp_path / "test.jsonl", [other]))[0]["Text-7"]
    assert layout(case)[0].startswith("Which?\nAnswer Choices: (A) The ulna (B) The radius (C) None\n\nA. The ulna\n")


def test_medxpertqas_images_come_first_and_missing_ones_are_listed(
    tmp_path, write_rows, read, refused, layout, picture
):
    (tmp_path / "MM").mkdir()
    rows = [
        EXPERT | {"id": "MM-1", "images": ["MM-1-a.png", "MM-1-b.png"], "question": "What?"},
        EXPERT | {"id": "MM-2", "images": ["MM-1-b.png"], "question": "What?"},
    ]
    path = write_rows(tmp_path / "MM" / "test.jsonl", rows)
    assert "no folder of images: none of" in refused("medxpertqa-mm", tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    (images / "MM-1-a.png").write_bytes(picture(1))
    message = refused("medxpertqa-mm", path)
    assert message.count(f"image {images / 'MM-1-b.png'}: no such file") == 2
    assert message.startswith(f"{path}: 2 of 2 questions")
    (images / "MM-1-b.png").write_bytes(picture(2))
    case = read("medxpertqa-mm", path)[0]["MM-1"]
    assert layout(case)[:2] == [None, None]
    assert len(layout(case)) == 3
    assert case.images == (images / "MM-1-a.png", images / "MM-1-b.png")
    write_rows(path, [rows[0] | {"images": []}])
    assert ":1: images: no image" in refused("medxpertqa-mm", path)


def test_medxpertqa_from_parquet_has_no_options_but_its_own(tmp_path, write_parquet, read):
    three = EXPERT | {"options": EXPERT["options"] | {"D": None}, "question": "Which?"}
    four = EXPERT | {"id": "Text-8", "options": EXPERT["options"] | {"D": "All"}, "question": "Which?", "label": "D"}
    write_parquet(tmp_path / "Text" / "test" / "0000.parquet", [three, four])
    cases, _ = read("medxpertqa-text", tmp_path)
    assert [len(case.options) for case in cases.values()] == [3, 4]
    assert cases["Text-8"].answer == "All"


# github.com/pubmedqa/pubmedqa, data/ori_pqal.json and data/test_ground_truth.json
ABSTRACT = {
    "QUESTION": "Does tea help?",
    "CONTEXTS": ["Tea is drunk.", "It did in 7 of 9."],
    "LABELS": ["BACKGROUND", "RESULTS"],
    "MESHES": ["Tea", "Humans"],
    "YEAR": "2011",
    "reasoning_required_pred": "no",
    "reasoning_free_pred": "yes",
    "final_decision": "maybe",
    "LONG_ANSWER": "Tea may help.",
}
ASKED = "BACKGROUND: Tea is drunk.\nRESULTS: It did in 7 of 9.\n\nDoes tea help?\n\nA. yes\nB. no\nC. maybe" + CHOOSE


def test_pubmedqa_as_a_dictionary_whole_or_the_official_half(tmp_path, write_json, read, refused, layout):
    without_year = {name: value for name, value in ABSTRACT.items() if name != "YEAR"} | {"final_decision": "no"}
    path = write_json(tmp_path / "ori_pqal.json", {"101": ABSTRACT, "102": without_year})
    cases, said = read("pubmedqa", tmp_path)
    assert list(cases) == ["101", "102"]
    assert layout(cases["101"]) == [ASKED]
    assert (cases["101"].options, cases["101"].answer) == (("yes", "no", "maybe"), "maybe")
    assert cases["101"].explanation == "Tea may help."
    assert cases["101"].meta["year"] == "2011"
    assert "year" not in cases["102"].meta
    assert said == [f"pubmedqa: 2 questions from {tmp_path}"]

    write_json(tmp_path / "test_ground_truth.json", {"102": "no"})
    cases, said = read("pubmedqa", path)
    assert list(cases) == ["102"]
    assert said[0].endswith("; 1 rows left out: not in the official test half, test_ground_truth.json")
    write_json(tmp_path / "test_ground_truth.json", {"102": "yes"})
    assert "entry 102: final_decision: 'no', but 'yes' in test_ground_truth.json" in refused("pubmedqa", path)


# huggingface.co/datasets/qiaojin/PubMedQA, dataset_info of pqa_labeled
HUB_ABSTRACT = {
    "pubid": 101,
    "question": "Does tea help?",
    "context": {
        "contexts": ["Tea is drunk.", "It did in 7 of 9."],
        "labels": ["BACKGROUND", "RESULTS"],
        "meshes": ["Tea"],
        "reasoning_required_pred": ["n", "o"],
        "reasoning_free_pred": ["y", "e", "s"],
    },
    "long_answer": "Tea may help.",
    "final_decision": "maybe",
}


def test_pubmedqa_of_the_hub(tmp_path, write_parquet, read, refused, layout):
    path = write_parquet(tmp_path / "pqa_labeled" / "train-00000-of-00001.parquet", [HUB_ABSTRACT])
    case = read("pubmedqa", tmp_path)[0]["101"]
    assert layout(case) == [ASKED]
    assert case.answer == "maybe"
    unlabelled = {name: value for name, value in HUB_ABSTRACT.items() if name != "final_decision"}
    write_parquet(path, [unlabelled])
    assert "row 1: final_decision: missing" in refused("pubmedqa", path)
    write_parquet(path, [HUB_ABSTRACT | {"context": HUB_ABSTRACT["context"] | {"labels": ["RESULTS"]}}])
    assert "row 1: 1 labels for 2 paragraphs of the context" in refused("pubmedqa", path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"final_decision": "perhaps"}, "final_decision: 'perhaps' is none of the options ['yes', 'no', 'maybe']"),
        ({"CONTEXTS": "Tea."}, "contexts: a list of texts, not 'Tea.'"),
        ({"options": ["yes"]}, "options: unknown"),
    ],
)
def test_a_bad_entry_of_pubmedqa(tmp_path, write_json, refused, change, told):
    path = write_json(tmp_path / "ori_pqal.json", {"101": ABSTRACT | change})
    assert f"{path} entry 101: {told}" in refused("pubmedqa", path)


def test_a_pubmed_id_twice_is_not_the_last_of_both(tmp_path, refused):
    path = tmp_path / "ori_pqal.json"
    entry = json.dumps(ABSTRACT)
    path.write_text(f'{{"101": {entry}, "101": {entry}}}')
    assert f"{path}: 101: stands twice in one object" in refused("pubmedqa", path)
