"""The rule-based judge: hand-written answers with the scores that they deserve, and its quality on labelled cases."""

import pytest

from mede2.trainer.preference.judgements import Answer
from mede2.trainer.preference.rubric import CRITERIA, read_rubric
from mede2.trainer.preference.rules import judge
from mede2.trainer.preference.statements import ASSERTED, DENIED, POSSIBLE, ImageReader
from mede2.trainer.questions.cases import Case

RUBRIC = read_rubric()
OPTIONS = ("cyst", "lung abscess", "sarcoidosis", "carcinoma")
TWO = {"left upper": "nodule", "right lower zone": "mass"}
ONE = {"right middle": "cavity"}
BOTH_SEEN = "A nodule in the left upper zone and a mass in the right lower zone."


def scores_of(think, findings=TWO, answer="carcinoma", options=OPTIONS, key="carcinoma", meta=None):
    """Judge one answer; returns its judgement."""
    meta = (meta or {}) | ({} if findings is None else {"findings": findings})
    case = Case("cases.jsonl:1", "c", (), (), key, options, meta=meta)
    text = f"<think>{think}</think> <answer>{answer}</answer>"
    judgement = judge(Answer(case, 0, text, "k"), RUBRIC)
    for score in (judgement.scores or {}).values():
        assert (score.score is None) == (score.evidence is None)
        assert score.evidence is None or score.evidence in text
    return judgement


def score_of(criterion, think, **more):
    return scores_of(think, **more).scores[criterion].score


@pytest.mark.parametrize(
    ("think", "score"),
    [
        (BOTH_SEEN, 5),
        ("Left upper zone: nodule. Right lower zone: mass.", 5),
        ("In the right lower zone lies a mass; the left lung shows a nodule in its upper zone.", 5),
        ("There is a left upper nodule, and at the right base a mass.", 5),
        ("There is a nodule on the left and a mass in the right lower zone.", 4),  # the nodule's zone is not said
        ("A mass in the left upper zone and a mass in the right lower zone.", 4),  # one of another kind
        ("A nodule in the right upper zone and a mass in the left lower zone.", 3),  # both on the wrong side
        ("A nodule in the left upper zone.", 3),
        ("A nodule in the left upper zone. A mass is there too.", 3),  # a mass somewhere is not that mass
        ("A nodule in the left upper zone. The right lung is clear.", 2),  # denied
        ("A nodule in the left upper zone. The rest of the lungs is clear.", 3),  # of the mass this says nothing
        ("No nodule. A mass in the right lower zone.", 2),
        ("The lungs are clear.", 1),
        ("Fever and cough for two weeks.", 1),
        ("The rule for a mass and a nodule applies.", 1),
        ("A nodule might be present in the left upper zone. A mass in the right lower zone.", 3),
    ],
)
def test_image_analysis_asks_whether_every_finding_is_addressed(think, score):
    assert score_of("image_analysis", think) == score


@pytest.mark.parametrize(
    ("think", "score"),
    [
        ("The lungs are clear.", 5),
        ("No abnormality is seen.", 5),
        ("Look: nothing.", 5),
        ("There is no nodule and no mass.", 4),
        ("The picture is hard to read.", 1),
        ("It is clear that fever decides. Rule: clear with fever.", 1),  # of the image this says nothing
    ],
)
def test_a_normal_image_is_to_be_called_normal(think, score):
    assert score_of("image_analysis", think, findings={}) == score


@pytest.mark.parametrize(
    ("think", "score"),
    [
        (BOTH_SEEN, 5),
        ("A nodule in the left upper zone, no cavity, no effusion.", 5),
        ("There is no cavity, consolidation or effusion in the right lung.", 5),
        ("An effusion is not seen. A pneumothorax is absent.", 5),
        ("A nodule. The right answer follows from the history.", 5),  # "right" is no side here
        (BOTH_SEEN + " The right answer rests on the nodule.", 5),
        ("Fever and cough.", 5),
        (BOTH_SEEN + " A small effusion is possible.", 4),
        (BOTH_SEEN + " There could be a cavity in the left lower zone.", 4),
        ("A nodule in the left lower zone and a mass in the right lower zone.", 3),  # another zone of its side
        ("A cavity in the left upper zone and a mass in the right lower zone.", 3),  # another kind
        ("A nodule in the right upper zone and a mass in the right lower zone.", 2),  # the wrong side
        (BOTH_SEEN + " A cavity in the left lower zone.", 2),
        (BOTH_SEEN + " A cavity in the left lower zone. The cavity is small.", 2),  # one thing, said twice
        (BOTH_SEEN + " A cavity in the left upper zone.", 2),  # beside the nodule, not in its place
        (BOTH_SEEN + " And an effusion.", 2),
        (BOTH_SEEN + " Bilateral effusions.", 1),
        (BOTH_SEEN + " A second mass in the left middle zone, a cavity beside it.", 1),
    ],
)
def test_no_hallucination_asks_whether_what_is_asserted_is_shown(think, score):
    assert score_of("no_hallucination", think) == score


@pytest.mark.parametrize(
    ("think", "answer", "score"),
    [
        ("So this is carcinoma.", "carcinoma", 5),
        ("So this is carcinoma.", "D", 5),
        ("Therefore the answer is (D).", "carcinoma", 5),
        ("A mass, a smoker. Carcinoma.", "carcinoma", 5),  # the last sentence names one option
        ("Not a cyst, so carcinoma.", "carcinoma", 5),
        ("Carcinoma is the most likely diagnosis.", "carcinoma", 5),
        ("A cyst is unlikely, so carcinoma.", "carcinoma", 5),
        ("A cyst is therefore unlikely.", "carcinoma", None),
        ("So a cyst. Wait, a mass is no cyst, so carcinoma.", "carcinoma", 5),
        ("So a lung abscess. The most likely diagnosis is carcinoma.", "carcinoma", 3),
        ("So this is carcinoma.", "cyst", 1),
        ("The most likely diagnosis is a lung abscess rather than carcinoma.", "carcinoma", 1),
        ("So this is carcinoma.", "melanoma", 1),  # no option at all
        ("A mass in a smoker.", "carcinoma", None),
        ("So cyst or carcinoma.", "carcinoma", None),  # two named: nothing is concluded
    ],
)
def test_logical_consistency_compares_the_conclusion_with_the_answer(think, answer, score):
    assert score_of("logical_consistency", think, answer=answer) == score


@pytest.mark.parametrize(
    ("think", "answer", "score"),
    [
        ("Rule: upper cavity with fever.", "carcinoma", 5),
        ("Rule: upper cavity with fever.", "sarcoidosis", 1),
        ("Rule: cavity with fever.", "sarcoidosis", 5),  # the longer phrase is another
        ("Rule: cavity with fever. So the diagnosis is carcinoma.", "carcinoma", 2),  # not what the rule gives
    ],
)
def test_the_cases_own_table_says_what_follows(think, answer, score):
    table = {"upper cavity with fever": "carcinoma", "cavity with fever": "sarcoidosis"}
    assert score_of("logical_consistency", think, answer=answer, meta={"conclusions": table}) == score


@pytest.mark.parametrize(
    ("think", "score"),
    [
        ("Two nodules, fever, so sarcoidosis. Check: two nodules, fever, so sarcoidosis.", 5),
        ("A cavity. So a cyst. Wait, the cavity has a thick wall, so carcinoma.", 5),
        ("A mass on the left. Actually I was wrong: the mass is on the right.", 5),
        ("A mass, fever, so carcinoma. Checking: a mass and fever.", 4),
        ("A mass, fever, so carcinoma. Let me double-check the mass.", 3),
        ("A mass, fever, so carcinoma. Let me double-check. A mass and fever.", 4),
        ("A mass, so carcinoma. Let me double-check. Yes, that is right.", 2),
        ("The mass and the fever are here. Let me check all of this and what there is for the answer.", 2),
        ("I will check everything. A mass, so carcinoma.", 2),
        ("Wait. Check. Verify.", 2),
        ("A mass, so carcinoma.", 1),
        ("A checkered pattern and waiting rooms.", 1),  # parts of words
    ],
)
def test_reflection_is_what_follows_the_word_of_checking(think, score):
    assert score_of("reflection", think) == score


def test_a_row_of_the_table_is_no_statement_about_the_image():
    think, table = BOTH_SEEN + " Rule: cavity with fever.", {"cavity with fever": "carcinoma"}
    assert score_of("no_hallucination", think) == 2
    assert score_of("no_hallucination", think, meta={"conclusions": table}) == 5


def test_fewer_than_half_of_the_findings_addressed():
    findings = {"left upper": "nodule", "left middle": "cavity", "right lower": "mass"}
    assert score_of("image_analysis", "A nodule in the left upper zone.", findings=findings) == 2


def test_the_longer_of_two_options_names_is_meant():
    options = ("abscess", "lung abscess")
    assert score_of("logical_consistency", "So a lung abscess.", answer="lung abscess", options=options) == 5
    assert score_of("logical_consistency", "So a lung abscess.", answer="abscess", options=options) == 1


def test_without_structured_findings_the_image_is_not_judged():
    scores = scores_of("A mass on the left, so carcinoma.", findings=None).scores
    for criterion in ("image_analysis", "no_hallucination"):
        assert scores[criterion].score is None
        assert "meta.findings" in scores[criterion].note
    assert scores["logical_consistency"].score == 5


@pytest.mark.parametrize("answer", ["carcinoma", "D", "(d)", "D. carcinoma", " CARCINOMA."])
def test_a_right_answer_by_text_or_letter(answer):
    assert scores_of("A mass.", answer=answer).correct is True


@pytest.mark.parametrize("answer", ["cyst", "A", "D. cyst", "carcinoma or cyst", "", "melanoma"])
def test_a_wrong_answer(answer):
    assert scores_of("A mass.", answer=answer).correct is False


@pytest.mark.parametrize(
    ("answer", "key", "correct"),
    [
        ("Pneumonia.", "pneumonia", True),
        ("lung infection", "pneumonia", None),  # perhaps the same in other words
        ("No", "yes", False),
        ("yes", "Yes", True),
        ("3.0", "3", True),
        ("4", "3", False),
        ("three", "3", None),
    ],
)
def test_an_open_question_is_only_decided_where_words_decide(answer, key, correct):
    assert scores_of("A shadow.", answer=answer, key=key, options=()).correct is correct


@pytest.mark.parametrize(
    "text",
    [
        "carcinoma", "<think>A mass.</think> carcinoma", "<think>A mass.<answer>carcinoma</answer>",
        "<think> </think><answer>D</answer>",
    ],
)  # fmt: skip
def test_an_answer_without_its_form_is_not_scored(text):
    for options in (OPTIONS, ()):
        case = Case("cases.jsonl:1", "c", (), (), "carcinoma", options, meta={"findings": TWO})
        judgement = judge(Answer(case, 0, text, "k"), RUBRIC)
        assert judgement.scores is None
        assert judgement.problem
        assert judgement.well_formed == ("<think> </think>" in text)
        assert judgement.well_formed or judgement.correct is False


def test_findings_of_a_case_teach_the_judge_their_own_words():
    """A kind and a place that the rubric's words do not have."""
    findings = {"liver segment iv": "hydatid disease", "left femoral neck": ["fracture", "bone bruise"]}
    think = "Hydatid disease in segment IV of the liver. A fracture and a bone bruise of the left femoral neck."
    scores = scores_of(think, findings=findings).scores
    assert scores["no_hallucination"].score == 5
    assert score_of("image_analysis", think, findings={"liver segment iv": "hydatid disease"}) == 5
    assert score_of("image_analysis", "Nothing is seen.", findings=findings) == 1


def test_a_word_that_names_an_option_is_no_finding():
    options = ("pleural effusion", "cyst", "carcinoma")
    think = (
        "A nodule in the left upper zone and a mass in the right lower zone. An effusion does not fit. So carcinoma."
    )
    assert score_of("no_hallucination", think + " Effusion is option A.", options=options) == 5
    assert score_of("no_hallucination", think + " Effusion beside it.") == 2


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("No nodule, mass or cavity in the left lung, but an effusion on the right.",
         [("nodule", "left", DENIED), ("mass", "left", DENIED), ("cavity", "left", DENIED),
          ("effusion", "right", ASSERTED)]),
        ("Nodules in the left upper and the right lower zone.",
         [("nodule", "left upper", ASSERTED), ("nodule", "lower right", ASSERTED)]),
        ("Bilateral nodules are possible.", [("nodule", "left", POSSIBLE), ("nodule", "right", POSSIBLE)]),
        ("No other mass.", []),
        ("Unlike a mass, this nodule on the left isn't a cavity.",
         [("mass", "", DENIED), ("nodule", "left", ASSERTED), ("cavity", "left", DENIED)]),
        ("I don\u2019t see a mass, and the left lung shows a nodule.",
         [("mass", "", DENIED), ("nodule", "left", ASSERTED)]),
        ("A cavity is unlikely.", [("cavity", "", DENIED)]),
        ("A nodule, left upper zone.", [("nodule", "left upper", ASSERTED)]),
        ("A left-sided nodule with a cavity", [("nodule", "left", ASSERTED), ("cavity", "left", ASSERTED)]),
        ("In the left upper zone, a 2.5 cm mass is seen.", [("mass", "left upper", ASSERTED)]),
    ],
)  # fmt: skip
def test_statements_are_read_with_place_and_mode(text, statements):
    read = ImageReader(RUBRIC.words, TWO).statements(text)
    assert [(one.kind, " ".join(sorted(one.place)), one.mode) for one in read] == statements


@pytest.mark.parametrize("findings", [["nodule"], {"left": 3}, {"left": ""}])
def test_findings_of_another_form_are_refused_by_name(findings):
    with pytest.raises(ValueError, match=r"^cases.jsonl:1: meta.findings: "):
        scores_of("A mass.", findings=findings)


def test_a_table_of_another_form_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^cases.jsonl:1: meta.conclusions: "):
        scores_of("A mass.", meta={"conclusions": ["so"]})


def test_the_key_of_a_judgement_follows_the_findings_and_the_text():
    keys = {
        scores_of(think, findings=findings).key for think in ("A mass.", "A cyst.") for findings in (TWO, ONE, None)
    }
    assert len(keys) == 6


def test_on_labelled_cases_precision_and_recall_hold_their_floors():
    """240 cases, each clean and spoiled in five ways, in two forms. A check that always or never speaks fails."""
    from mede2.trainer.preference.rule_quality import CHECKS, FORMS, rule_quality

    every = rule_quality(RUBRIC)
    assert [(one.form, one.check) for one in every] == [(form, check) for form in FORMS for check in CHECKS]
    for one in every:
        assert one.found + one.missed >= 240
        assert one.false_alarms + one.passed >= 960
        assert one.recall >= 0.98, one
        assert one.precision >= 0.98, one


def test_every_criterion_has_a_rule():
    assert tuple(scores_of("A mass.").scores) == CRITERIA
