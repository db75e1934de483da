"""Cases: what is wrong with one is told by file, line and field."""

import pytest

from mede2.trainer.questions.cases import FORMAT, read_cases, with_system

GOOD = {"id": "a", "prompt": [{"role": "user", "content": "Which?"}], "answer": "mass"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"id": None}, "id: text, not None"),
        ({"id": " "}, "id: empty"),
        ({"answer": 3}, "answer: text, not 3"),
        ({"options": ["clear", "nodule"]}, "answer: 'mass' is none of the options"),
        ({"options": ["mass", "mass"]}, "options: different texts"),
        ({"options": "mass"}, "options: a list, not 'mass'"),
        ({"meta": []}, "meta: a JSON object"),
        ({"note": 1}, "note: unknown; put what is not part of the question under `meta`"),
        ({"images": ["x.png"]}, "images: 1 paths for 0 image placeholders"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "role 'assistant' where 'user' is due"),
        ({"prompt": [*GOOD["prompt"], {"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
    ],
)
def test_a_bad_case_is_told_by_line_and_field(tmp_path, write_rows, change, told):
    path = write_rows(tmp_path / "cases.jsonl", [GOOD, GOOD | {"id": "b"} | change])
    with pytest.raises(ValueError, match="1 of 2 cases cannot be used") as error:
        read_cases(path)
    assert f"{path}:2: " in str(error.value)
    assert told in str(error.value)


def test_ids_are_unique_and_images_there(tmp_path, write_rows):
    picture = GOOD | {"id": "b", "prompt": [{"role": "user", "content": [{"type": "image"}]}], "images": ["none.png"]}
    path = write_rows(tmp_path / "cases.jsonl", [GOOD, GOOD, picture, '{"id": 1'])
    with pytest.raises(ValueError, match="3 of 4 cases") as error:
        read_cases(path)
    for told in (f":2: id: 'a' again, after {path}:1", "none.png: no such file", ":4: not JSON"):
        assert told in str(error.value)


def test_the_demos_cases_are_cases(demo_cases):
    cases = read_cases(demo_cases)
    assert len({case.digest for case in cases}) == len(cases) == 12
    assert all(case.answer in case.options and case.images[0].is_file() for case in cases)
    places = {place for case in cases for place in case.meta["findings"]}
    assert places <= {f"{side} {level}" for side in ("left", "right") for level in ("upper", "middle", "lower")}
    assert all(f"{kind} {place}" in case.explanation for case in cases for place, kind in case.meta["findings"].items())


def test_a_system_message_goes_first_and_never_over_another(tmp_path, write_rows):
    own = {"role": "system", "content": "You read films."}
    rows = [GOOD, GOOD | {"id": "b", "prompt": [own, *GOOD["prompt"]]}]
    plain, with_own = read_cases(write_rows(tmp_path / "cases.jsonl", rows))
    told = with_system(plain, FORMAT)
    assert told == ({"role": "system", "content": [{"type": "text", "text": FORMAT}]}, *plain.prompt)
    with pytest.raises(ValueError, match=r"cases.jsonl:2: prompt: has a system message of its own"):
        with_system(with_own, FORMAT)
