"""Selection by a policy: hand-made judgements with the pairs and reasons that follow; rows that Stage II reads."""

import dataclasses
import json
import random
from collections import Counter

import pytest

from mede2.trainer.data.records import Record, read_records
from mede2.trainer.demo.cases import chain, corrupt, make_case
from mede2.trainer.preference.corrupt import corrupt as corrupted_pairs
from mede2.trainer.preference.edits import EDITS
from mede2.trainer.preference.judgements import Judgement, Score
from mede2.trainer.preference.rubric import CRITERIA
from mede2.trainer.preference.scored import Sample, Scored, join, read_inputs
from mede2.trainer.preference.select import Policy, read_policy, select, similarity
from mede2.trainer.questions.cases import read_cases
from mede2.trainer.settings import ENHANCE

FORMAT = "unjudged: not <think>...</think> <answer>...</answer>"


def scored(sample, correct, scores, *, case="a", num_tokens=100, text=None, finish="stop", well_formed=True) -> Scored:
    """An answer of words of its own, judged with four scores (None: could not be told; no scores: no verdict)."""
    words = random.Random(f"{case} {sample}").choices("abcdefghijklmnopqrstuvwxyz", k=30)
    answer = Sample(case, sample, text or " ".join(words), finish, num_tokens, "m", f"key {case} {sample}")
    given = scores and {name: Score(score, "x", "") for name, score in zip(CRITERIA, scores, strict=True)}
    judgement = Judgement(
        case, sample, "rules", "hash", correct, None, well_formed, given, None if given else "none", f"judged {sample}"
    )
    return Scored(answer, judgement)


def chosen_and_rejected(pairs):
    return [(pair.chosen.answer.sample, pair.rejected.answer.sample, pair.criterion, pair.kind) for pair in pairs]


def outcome(answers, **settings):
    pairs, left_out = select({"a": answers}, Policy(**settings))
    return chosen_and_rejected(pairs), {row.sample: row.reason for row in left_out}


def test_the_rejected_answer_differs_most_on_a_named_criterion():
    answers = [
        scored(0, True, (5, 5, 4, 4)),
        scored(1, False, (1, 5, 5, 5)),  # worse by 4 in logic
        scored(2, False, (5, 2, 1, 5)),  # worse by 3 in hallucination, and in image analysis
        scored(3, True, (5, 5, 5, 2)),  # right, and does not reflect
    ]
    pairs, left_out = outcome(answers, pairs_per_case=3)
    assert pairs == [
        (0, 1, "logical_consistency", "wrong"), (0, 2, "image_analysis", "wrong"), (0, 3, "reflection", "hard"),
    ]  # fmt: skip
    assert left_out == {}

    pairs, left_out = outcome(answers, criteria=("reflection", "no_hallucination"))
    assert pairs == [(0, 2, "no_hallucination", "wrong"), (0, 3, "reflection", "hard")]
    assert left_out == {1: "rejected: a tie with every good answer on the criteria"}


def test_every_answer_that_is_left_out_has_its_reason():
    good = scored(0, True, (5, 5, 5, 5), text="the film shows a mass in the left lung " * 2)
    answers = [
        good,
        scored(1, True, (5, 5, 5, 4)),  # as good, but the other has the wider gap
        scored(2, False, (4, 4, 4, 4)),  # wrong, and nearly as well argued
        scored(3, False, (1, 1, 1, 1), num_tokens=151),
        scored(4, False, (1, 1, 1, 1), text="The film shows a mass in the left lung; " * 2),
        scored(5, False, (1, 2, 2, 2)),
        scored(6, False, (2, 2, 2, 2)),
        scored(7, False, (2, 2, 2, 2), finish="length"),
        scored(8, False, None),
        scored(9, False, None, well_formed=False),
        scored(10, None, (1, 1, 1, 1)),
        Scored(scored(11, None, None).answer, None),
    ]
    answers.append(scored(12, False, (2, 2, 2, 2), text=answers[5].answer.text + "!"))
    pairs, left_out = outcome(answers[:1] + answers[2:], pairs_per_case=1)
    assert pairs == [(0, 5, "logical_consistency", "wrong")]
    assert left_out == {
        2: "rejected: a tie with every good answer on the criteria",
        3: "rejected: no good answer of like length",
        4: "rejected: a near-duplicate of the good answer",
        6: "rejected: more pairs than pairs_per_case",
        7: "cut off at the length limit",
        8: "unjudged",
        9: FORMAT,
        10: "unjudged: right or wrong cannot be told",
        11: "not judged",
        12: "rejected: a near-duplicate of another rejected answer",
    }
    _, left_out = outcome(answers[:3])
    assert left_out[0] == left_out[1] == "good: no worse answer to set it against"
    _, left_out = outcome([answers[5]])
    assert left_out == {5: "rejected: no good answer of its case"}
    assert outcome([]) == ([], {None: "a case without samples"})


def test_a_near_duplicate_of_one_good_answer_can_stand_against_another():
    text = "the film shows a mass in the left lung and nothing more is seen"
    answers = [
        scored(0, True, (5,) * 4, text=text),
        scored(1, True, (5, 5, 5, 4)),
        scored(2, False, (1,) * 4, text=text),
    ]
    pairs, left_out = outcome(answers)
    assert pairs == [(1, 2, "logical_consistency", "wrong")]
    assert left_out == {0: "good: another good answer was taken"}


def test_a_chosen_answer_is_right_well_formed_and_above_the_floor_where_it_was_judged():
    bad = scored(9, False, (1, 1, 1, 1))
    assert outcome([scored(0, True, (5, 4, 5, None)), bad])[0] == [(0, 9, "logical_consistency", "wrong")]
    for other in (
        scored(0, True, (5, 3, 5, None)),
        scored(0, False, (5, 5, 5, 5)),
        scored(0, True, (5, 5, 5, 5), well_formed=False),
    ):
        assert outcome([other, bad])[0] == []
    assert outcome([scored(0, True, (5, 3, 5, None)), bad], floor=3)[0] == [(0, 9, "logical_consistency", "wrong")]
    assert outcome([scored(0, True, (None,) * 4), bad])[1][0] == "unjudged"
    assert outcome([scored(0, True, (5, None, None, None)), scored(1, False, (None, 1, 1, 1))])[1] == {
        0: "good: no worse answer to set it against",
        1: "rejected: no criterion was judged in it and in a good answer",
    }


def test_of_equal_partners_the_nearest_in_length_is_chosen():
    answers = [scored(i, True, (5, 5, 5, 5), num_tokens=n) for i, n in enumerate((60, 95, 140))]
    rejected = scored(3, False, (1, 1, 1, 1), num_tokens=100)
    assert outcome([*answers, rejected])[0] == [(1, 3, "logical_consistency", "wrong")]
    short, long = (scored(n, True, (5, 5, 5, 5), text="x" * size) for n, size in ((0, 40), (1, 85)))
    rejected = scored(3, False, (1, 1, 1, 1), num_tokens=900, text="y" * 60)
    assert outcome([short, long, rejected], length_unit="characters")[0] == [(1, 3, "logical_consistency", "wrong")]
    assert outcome([short, long, rejected])[1][3] == "rejected: no good answer of like length"


def many_cases(num_wrong: int, num_hard: int, num_both: int) -> dict[str, list[Scored]]:
    """Cases that offer two wrong answers, two hard negatives, or two of each."""
    cases = {}
    for i in range(num_wrong + num_hard + num_both):
        rejected = [(False, (1, 5, 5, 5)), (False, (2, 5, 5, 5))] if not num_wrong <= i < num_wrong + num_hard else []
        rejected += [(True, (5, 5, 5, 1)), (True, (5, 5, 5, 2))] if i >= num_wrong else []
        answers = [(True, (5, 5, 5, 5)), *rejected]
        cases[f"c{i}"] = [scored(n, *answer, case=f"c{i}") for n, answer in enumerate(answers)]
    return cases


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_hard_negatives_have_their_share(share, most):
    cases = many_cases(20, 20, 20)
    pairs, left_out = select(cases, Policy(hard_share=share, pairs_per_case=most))
    hard = sum(pair.kind == "hard" for pair in pairs)
    assert abs(hard - share * len(pairs)) <= 1
    assert max(Counter(pair.case for pair in pairs).values()) <= most
    assert len(pairs) >= 20 * min(most, 2)
    used = {(s.answer.place) for pair in pairs for s in (pair.chosen, pair.rejected)}
    everything = {scored.answer.place for answers in cases.values() for scored in answers}
    assert used.isdisjoint((row.case, row.sample) for row in left_out)
    assert used | {(row.case, row.sample) for row in left_out} == everything


def test_cases_with_one_kind_give_it_so_that_the_others_can_give_the_other():
    pairs, _ = select(many_cases(10, 0, 10), Policy(hard_share=0.5, pairs_per_case=1))
    assert Counter(pair.kind for pair in pairs) == {"wrong": 10, "hard": 10}


def test_without_a_share_every_case_gives_its_widest_gaps():
    pairs, _ = select(many_cases(2, 2, 2), Policy())
    assert len(pairs) == 12
    assert [pair.gap for pair in pairs] == [4, 3, 4, 3, 4, 3, 4, 3, 4, 4, 4, 4]


def test_the_same_seed_gives_the_same_pairs_and_another_decides_between_equals():
    cases = {f"c{i}": [scored(n, n < 4, (5 - n // 4 * 4,) * 4, case=f"c{i}") for n in range(8)] for i in range(20)}
    first, again, other = (chosen_and_rejected(select(cases, Policy(seed=seed))[0]) for seed in (0, 0, 1))
    assert first == again != other
    turned = {case: answers[::-1] for case, answers in cases.items()}
    assert chosen_and_rejected(select(turned, Policy())[0]) == first  # the order in the file does not count


def test_similarity_counts_shared_shingles():
    assert similarity("a b c d e", "A, b c. d e!") == 1
    assert similarity("a b c d", "a b c e") == pytest.approx(1 / 3)
    assert similarity("a", "b") == 0
    assert similarity("", "") == 1


def test_several_judges_must_be_named_and_the_first_order_counts():
    first, second = scored(0, True, (5, 5, 5, 5)), scored(0, True, (1, 1, 1, 1))
    judgements = [dataclasses.replace(second.judgement, order=1), first.judgement]
    assert join([first.answer], judgements, None)["a"][0].judgement is first.judgement
    other = dataclasses.replace(first.judgement, judge="human")
    with pytest.raises(ValueError, match="judge: state which counts; there are human, rules"):
        join([first.answer], [*judgements, other], None)
    with pytest.raises(ValueError, match="judge: 'nobody' judged nothing"):
        join([first.answer], judgements, "nobody")
    with pytest.raises(ValueError, match="two judgements of sample 0 of case 'a'"):
        join([first.answer], [*judgements, dataclasses.replace(first.judgement, key="another")], None)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("floor=6", "floor: a number from 1 to 5, not 6"),
        ("pairs_per_case=1.5", "pairs_per_case: a whole number from 1 to"),
        ("criteria=[style]", "criteria: a list of some of logical_consistency"),
        ("length_unit=words", "length_unit: tokens or characters, not 'words'"),
        ("hard_share=any", "hard_share: a number from 0 to 1, not 'any'"),
        ("gap=1", "gap: unknown; there are judge, floor"),
        ("judge=[a]", "judge: the name of a judge"),
        ("min_gap=true", "min_gap: a number"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        read_policy(None, [assignment])


@pytest.fixture
def judged_files(demo_cases, tmp_path, write_rows):
    """Files of the demo's cases with four answers each: two sound ones and two that an edit of the demo spoiled."""
    samples, judgements = [], []
    for case in read_cases(demo_cases):
        demo = make_case(case.meta["seed"])
        for sample, spoiled in enumerate((None, "reflection", "logical_consistency", None)):
            text = corrupt(demo, spoiled) if spoiled else chain(demo)
            scores = [1 if name == spoiled else 5 for name in CRITERIA]
            right = spoiled != "logical_consistency"
            answer = scored(sample, right, scores, case=case.id, text=text, num_tokens=50 + sample)
            samples.append(dataclasses.asdict(answer.answer) | {"seed": 1, "settings": {}})
            judgements.append(answer.judgement.row())
    return write_rows(tmp_path / "samples.jsonl", samples), write_rows(tmp_path / "judgements.jsonl", judgements)


@pytest.fixture
def images_elsewhere(demo_cases, monkeypatch):
    """Rows may name the images of the cases, which lie in another folder than what is written; as environment."""
    monkeypatch.setenv("MEDE2_IMAGE_ROOT", str(demo_cases.parent))
    return {"MEDE2_IMAGE_ROOT": str(demo_cases.parent)}


def test_the_command_writes_what_stage_two_reads(pairs, demo_cases, judged_files, images_elsewhere, tmp_path):
    samples, judgements = judged_files
    output = tmp_path / "out" / "pairs.jsonl"
    policy = tmp_path / "policy.yaml"
    policy.write_text("hard_share: 0.5\nseed: 3\n", encoding="utf-8")
    arguments = ("select", "--cases", demo_cases, "--samples", samples, "--judgements", judgements, "--output", output)
    refused = pairs(*map(str, arguments))
    assert refused.returncode != 0
    assert "leads out of" in refused.stdout
    done = pairs(*map(str, arguments), "--policy", str(policy), "--set", "length_ratio=2", **images_elsewhere)
    assert done.returncode == 0, done.stdout
    assert "24 pairs (12 hard, 12 wrong)" in done.stdout

    records = list(read_records((str(output),), ENHANCE))
    assert all(isinstance(record, Record) for record in records)
    assert len(records) == 24
    cases = {case.id: case for case in read_cases(demo_cases)}
    for record in records:
        case = cases[record.meta["case"]]
        assert [image.read_bytes() for image in record.images] == [image.read_bytes() for image in case.images]
        assert record.conversations[0][:-1] == case.prompt
        assert record.meta["criterion"] in ("reflection", "logical_consistency")
        assert record.meta["scores"]["rejected"][record.meta["criterion"]] == 1
        assert record.meta["policy"]["hard_share"] == 0.5
        assert record.meta["policy"]["length_ratio"] == 2
        assert record.meta["license"] == "Apache-2.0"
        assert record.meta["provenance"]["chosen"]["sample"] == f"key {case.id} {record.meta['chosen_sample']}"
    assert (tmp_path / "out" / "pairs.left_out.jsonl").read_text() == ""

    first = output.read_bytes()
    pairs(*map(str, arguments), "--policy", str(policy), "--set", "length_ratio=2", **images_elsewhere)
    assert output.read_bytes() == first


def test_the_command_corrupts_along_named_criteria(pairs, demo_cases, judged_files, images_elsewhere, tmp_path):
    samples, judgements = judged_files
    output = tmp_path / "corrupted.jsonl"
    done = pairs(
        "corrupt", "--cases", str(demo_cases), "--samples", str(samples), "--judgements", str(judgements),
        "--output", str(output), "--set", "pairs_per_case=5", **images_elsewhere,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    records = list(read_records((str(output),), ENHANCE))
    assert all(isinstance(record, Record) for record in records)
    left_out = [json.loads(line) for line in (tmp_path / "corrupted.left_out.jsonl").read_text().splitlines()]
    assert len(records) + len(left_out) == 12 * len(EDITS)
    assert {row["reason"].partition(": ")[2] for row in left_out} == {"nothing to corrupt this way"}
    for record in records:
        assert record.meta["criterion"] == EDITS[record.meta["kind"]].criterion
        assert record.meta["scores"]["rejected"] is None


def test_corruptions_keep_to_pairs_per_case_and_say_what_was_left(demo_cases, images_elsewhere, tmp_path):
    cases = {case.id: case for case in read_cases(demo_cases)}
    answers = {
        name: [scored(0, True, (5, 5, 5, 5), case=name, text=chain(make_case(case.meta["seed"])))]
        for name, case in cases.items()
    }
    name = next(iter(answers))
    answers[name] = [scored(0, False, (5, 5, 5, 5), case=name)]
    made, left_out = corrupted_pairs(cases, answers, list(EDITS), Policy(pairs_per_case=1), tmp_path)
    assert Counter(row["meta"]["case"] for row in made) == dict.fromkeys(list(answers)[1:], 1)
    assert left_out[0] == {"case": name, "sample": None, "edit": None, "reason": "a case without a good answer"}
    assert len(left_out) == 1 + 11 * (len(EDITS) - 1)


def test_rows_of_unknown_answers_are_refused(pairs, demo_cases, judged_files, tmp_path, write_rows):
    samples, judgements = judged_files
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for bad, message in (
        ([*rows, rows[0]], "again, after"),
        ([rows[0] | {"case": "nobody"}], ":1: case: 'nobody' is not among the cases"),
        (rows[1:], "is not in"),
        ([rows[0] | {"num_tokens": "many"}], "num_tokens: a whole number, not 'many'"),
    ):
        file = write_rows(tmp_path / "bad.jsonl", bad)
        with pytest.raises(ValueError, match=message):
            read_inputs(str(demo_cases), str(file), str(judgements))
    done = pairs(
        "select", "--cases", str(demo_cases), "--samples", str(file), "--judgements", str(judgements),
        "--output", str(tmp_path / "never.jsonl"),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout.startswith("Error: ")
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "never.jsonl").exists()
