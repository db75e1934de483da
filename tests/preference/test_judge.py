"""Models as judges, against a real server on loopback; several judges together; the command and the rubric file."""

import json
import re
import time

import pytest
import yaml
from click.testing import CliRunner

from mede2.trainer.preference.combine import combine
from mede2.trainer.preference.judge_by_chat import Question, plan, quotation, read_reply
from mede2.trainer.preference.judgements import Answer, Judgement, Score, read_judgements
from mede2.trainer.preference.rubric import CRITERIA, DEFAULT, read_rubric
from mede2.trainer.questions.cases import read_cases

ANSWER = re.compile(r"\[(\w{12})\] answer_(\d+)\n(.*?)\n\n(?=\[\1\])", re.DOTALL)


def answers_in(body):
    """The texts that a request shows, by number."""
    text = body["messages"][1]["content"]
    text = text if isinstance(text, str) else "".join(part.get("text", "") for part in text)
    return {int(number): said for _, number, said in ANSWER.findall(text)}


def good(body, score=None):
    """A judgement in order: each answer's last words as evidence, as many points as `score(text)` gives."""
    wanted = body["response_format"]["json_schema"]["schema"]["$defs"]["answer"]["required"]
    reply = {}
    for number, text in answers_in(body).items():
        item = {"note": "so it is", "evidence": text[-20:], "score": score(text) if score else 4}
        reply[f"answer_{number}"] = dict.fromkeys(wanted, item)
    return json.dumps(reply)


MADE = {"finish": "stop", "num_tokens": 9, "model": "m"}


@pytest.fixture
def samples(tmp_path, demo_cases, write_rows):
    """Three answers to each of the 12 cases, the third the same text as the first."""
    rows = []
    for case in read_cases(demo_cases):
        texts = (
            f"<think>{case.explanation}</think>\n<answer> {case.answer}</answer>",
            f"<think>A nodule in the left upper zone, so {case.options[0]}.</think> <answer>{case.options[0]}</answer>",
        )
        rows += [
            {"case": case.id, "sample": i, "text": texts[i % 2], "key": f"{case.id} {i % 2}"} | MADE for i in range(3)
        ]
    return write_rows(tmp_path / "samples.jsonl", rows)


@pytest.fixture
def judge(demo_cases, samples, tmp_path):
    """`judge(*arguments)` runs the command in this process; returns what it told and its judgements."""
    from mede2.trainer.preference.judge import command

    def run(*arguments, cases=demo_cases):
        output = tmp_path / "judgements.jsonl"
        files = ["--cases", str(cases), "--samples", str(samples), "--output", str(output)]
        done = CliRunner().invoke(command, [*files, *arguments])
        if done.exception:
            raise done.exception
        return done.output, list(read_judgements(output))

    return run


def test_rules_judge_every_answer_and_the_reference_answers_well(judge):
    said, judgements = judge()
    assert len(judgements) == 36
    assert "36 judgements of 36 answers" in said
    reference = [judgement for judgement in judgements if judgement.sample != 1]
    assert all(judgement.correct for judgement in reference)
    assert {score.score for judgement in reference for score in judgement.scores.values()} == {5}
    assert {judgement.rubric for judgement in judgements} == {read_rubric().hash}
    assert all(judgement.scores["reflection"].score == 1 for judgement in judgements if judgement.sample == 1)


def test_a_model_judges_shuffled_answers_and_a_share_of_them_in_both_orders(judge, chat_server):
    server = chat_server(lambda body: good(body, lambda text: 5 if "Check:" in text else 2))
    name = f"grader@{server.url}"
    _, judgements = judge("--judge", name, "--twice", "0.5")
    first = [judgement for judgement in judgements if judgement.order == 0]
    second = [judgement for judgement in judgements if judgement.order == 1]
    assert len(first) == 36
    assert 6 <= len(second) < 36
    assert len(server.completed) == 12 + len(second) // 3
    for judgement in judgements:
        assert judgement.judge == name
        assert judgement.scores["reflection"].score == (2 if judgement.sample == 1 else 5)
    assert {judgement.position for judgement in first if judgement.sample == 0} == {0, 1}  # shuffled
    place = {(judgement.case, judgement.sample): judgement.position for judgement in first}
    assert all(judgement.position == 1 - place[judgement.case, judgement.sample] for judgement in second)

    body = server.completed[0]
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["temperature"] == 0
    assert sum(part["type"] == "image_url" for part in body["messages"][1]["content"]) == 1
    assert read_rubric().criteria["reflection"].scores[2] in body["messages"][0]["content"]


def test_the_same_command_again_asks_nothing_and_a_judge_more_asks_that_one(judge, chat_server):
    server, other = chat_server(good), chat_server(good)
    _, first = judge("--judge", f"a@{server.url}")
    asked = len(server.completed)
    _, again = judge("--judge", f"a@{server.url}")
    assert again == first
    assert len(server.completed) == asked
    _, both = judge("--judge", f"a@{server.url}", "--judge", f"b@{other.url}", "--combine", "worst")
    assert len(server.completed) == asked
    assert len(other.completed) == asked
    assert len([one for one in both if one.judge.startswith("worst(")]) == 36


def test_killed_in_the_middle_it_continues_and_asks_nothing_twice(pairs, chat_server, demo_cases, samples, tmp_path):
    """The command itself, by kill -9."""
    server, output = chat_server(good, delay_s=0.15), tmp_path / "judgements.jsonl"
    files = ("--cases", str(demo_cases), "--samples", str(samples), "--output", str(output))
    arguments = ("judge", *files, "--judge", f"a@{server.url}", "--concurrency", "2", "--twice", "0")
    process = pairs(*arguments, wait=False)
    deadline = time.monotonic() + 60
    while len(server.completed) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=30)
    journal = output.with_name(f".{output.name}.journal") / "0.jsonl"
    before, kept = len(server.requests), journal.read_bytes().count(b"\n")
    assert before < 12
    assert kept >= 2
    assert not output.exists()
    server.delay_s = 0.0
    done = pairs(*arguments)
    assert done.returncode == 0, done.stdout
    judgements = list(read_judgements(output))
    assert len(judgements) == 36
    assert len(server.requests) - before == 12 - kept
    assert len({judgement.key for judgement in judgements}) == 24  # of the texts; two answers of a case share one


BAD = {
    "no JSON": lambda reply: "Here you are: " + json.dumps(reply),
    "out of range": lambda reply: json.dumps(_with(reply, "score", 6)),
    "no whole number": lambda reply: json.dumps(_with(reply, "score", 4.5)),
    "invented evidence": lambda reply: json.dumps(_with(reply, "evidence", "a spiculated lesion")),
    "no evidence": lambda reply: json.dumps(_with(reply, "evidence", " ")),
    "an answer too few": lambda reply: json.dumps({"answer_1": reply["answer_1"]}),
}


def _with(reply, name, value):
    reply["answer_2"]["reflection"] = reply["answer_2"]["reflection"] | {name: value}
    return reply


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_used_is_asked_again_with_the_problem_told(judge, chat_server, fault):
    def answer(body):
        reply = json.loads(good(body))
        return json.dumps(reply) if len(body["messages"]) > 2 else BAD[fault](reply)

    server = chat_server(answer)
    _, judgements = judge("--judge", f"a@{server.url}", "--twice", "0")
    assert all(judgement.scores for judgement in judgements)
    assert len(server.completed) == 24
    retry = next(body for body in server.completed if len(body["messages"]) > 2)
    assert [message["role"] for message in retry["messages"]] == ["system", "user", "assistant", "user"]
    assert "cannot be used" in retry["messages"][3]["content"]
    told = {"out of range": "not 6", "no whole number": "not 4.5", "invented evidence": "a spiculated lesion"}
    assert told.get(fault, "") in retry["messages"][3]["content"]


def test_what_stays_unusable_is_recorded_as_unjudged_and_not_guessed(judge, chat_server):
    server = chat_server(lambda body: json.dumps(_with(json.loads(good(body)), "score", 0)))
    arguments = ("--judge", f"a@{server.url}", "--twice", "0", "--attempts", "2")
    said, judgements = judge(*arguments)
    assert len(server.completed) == 24
    unjudged = [judgement for judgement in judgements if judgement.scores is None]
    assert {judgement.position for judgement in unjudged} == {1}
    assert all(judgement.position == 0 for judgement in judgements if judgement.scores)  # the other one was usable
    assert all("not usable in 2 attempts" in one.problem and "not 0" in one.problem for one in unjudged)
    assert f"{len(unjudged)} unjudged" in said
    judge(*arguments)
    assert len(server.completed) == 24  # nor is it paid for again


def test_a_reply_that_was_cut_off_is_told_so(judge, chat_server):
    server = chat_server(lambda body: good(body)[:50], finish="length")
    _, judgements = judge("--judge", f"a@{server.url}", "--twice", "0", "--attempts", "2")
    assert all("cut off for its length" in judgement.problem for judgement in judgements)


def test_a_question_that_the_server_refuses_is_unjudged_and_asked_again_next_time(judge, chat_server, demo_cases):
    refused = read_cases(demo_cases)[0].prompt[0]["content"][1]["text"]
    server = chat_server(good)

    def withhold(body):
        return {"content": good(body)} | ({"refusal": "not this one"} if refused in str(body) else {})

    server.answer = withhold
    said, judgements = judge("--judge", f"a@{server.url}", "--twice", "0", "--concurrency", "1")
    unjudged = [judgement for judgement in judgements if judgement.scores is None]
    assert "1 questions refused" in said
    assert len(unjudged) == 3
    assert all("not this one" in judgement.problem for judgement in unjudged)
    server.answer = good
    _, judgements = judge("--judge", f"a@{server.url}", "--twice", "0")
    assert all(judgement.scores for judgement in judgements)
    assert len(server.completed) == 13  # the eleven others were not asked again


def test_when_the_server_fails_nothing_is_written_and_what_was_judged_is_kept(judge, chat_server, tmp_path, fault):
    server = chat_server(good)
    server.faults.extend([None, None, fault(500), fault(cut=30), None, None, fault(401)])
    arguments = ("--judge", f"a@{server.url}", "--twice", "0", "--concurrency", "1")
    with pytest.raises(ValueError, match="401"):
        judge(*arguments)
    assert not (tmp_path / "judgements.jsonl").exists()
    assert len(server.completed) == 4  # the 500 and the cut connection were tried again
    _, judgements = judge(*arguments)
    assert all(judgement.scores for judgement in judgements)
    assert len(server.completed) == 12


def test_images_do_not_leave_the_machine_unless_that_is_allowed(judge):
    with pytest.raises(ValueError, match="--allow-remote-images"):
        judge("--judge", "a@https://judge.example/v1")


def test_without_images_and_findings_the_image_is_not_judged(judge, chat_server, demo_cases, tmp_path):
    server = chat_server(good)
    _, judgements = judge("--judge", f"a@{server.url}", "--no-images", "--twice", "0")
    assert all(judgement.scores["image_analysis"].score == 4 for judgement in judgements)  # by the findings in words
    assert "image_url" not in str(server.completed)
    rows = [json.loads(line) for line in demo_cases.read_text().splitlines()]
    bare = demo_cases.with_name("bare.jsonl")
    bare.write_text("".join(json.dumps(row | {"meta": {}}) + "\n" for row in rows))
    _, judgements = judge("--judge", f"a@{server.url}", "--no-images", cases=bare)
    for judgement in judgements:
        assert judgement.scores["image_analysis"].score is None
        assert "neither the images nor" in judgement.scores["image_analysis"].note
        assert judgement.scores["reflection"].score == 4


def question(*texts, criteria=CRITERIA):
    return Question(None, texts, 0, criteria, images=False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"score": 0}, "answer_1.reflection.score must be one of"),
        ({"score": True}, "answer_1.reflection.score must be one of"),
        ({"score": "4"}, "answer_1.reflection.score must be one of"),
        ({"score": None}, "answer_1.reflection.score must be one of"),
        ({"evidence": "the second answer"}, "does not stand in it"),
        ({"evidence": 3}, "does not stand in it"),
        ({"note": ""}, "answer_1.reflection.note"),
        ({"more": 1}, "must have exactly note, evidence and score"),
    ],
)
def test_a_reply_is_checked_whatever_the_server_promised(change, problem):
    item = {"note": "so", "evidence": "the first", "score": 3}
    first = {criterion: dict(item) for criterion in CRITERIA}
    first["reflection"] |= change
    second = {criterion: item | {"evidence": "the second"} for criterion in CRITERIA}
    reply = json.dumps({"answer_1": first, "answer_2": second})
    verdicts, problems = read_reply(reply, question("the first answer", "the second answer"))
    assert verdicts[1]["reflection"] == Score(3, "the second", "so")
    if problem is None:
        assert not problems
        assert verdicts[0]["reflection"].evidence == "the first"
    else:
        assert verdicts[0] is None
        assert len(problems) == 1
        assert problem in problems[0]


@pytest.mark.parametrize(
    "reply", ["", "[]", "null", "{}", '{"answer_1": 3}', "[" * 100_000, '{"answer_1": {}, "answer_9": {}}']
)
def test_a_reply_of_another_form_gives_nothing(reply):
    verdicts, problems = read_reply(reply, question("the first answer"))
    assert verdicts == [None]
    assert len(problems) == 1


def test_evidence_is_a_quotation_up_to_white_space():
    assert quotation("a  nodule\nin the", "There is a nodule in\nthe left") == "a nodule in\nthe"
    assert quotation("A nodule", "There is a nodule") is None
    assert quotation("", "There is") is None
    assert quotation(".*", "There is") is None


def test_orders_follow_from_seed_and_case_alone(demo_cases):
    cases = read_cases(demo_cases)
    answers = [Answer(case, i, f"text {i}", str(i)) for case in cases for i in range(6)]
    every = plan(answers, seed=1, twice=0.5, images=True)
    few = plan(answers[:30], seed=1, twice=0.5, images=True)
    assert every[: len(few)] == few
    assert len({one.texts for one in every if one.order == 0}) > 6  # cases differ in their order
    assert plan(answers, seed=2, twice=0.5, images=True) != every
    assert len(plan(answers, 1, 0.0, True)) == 12
    assert len(plan(answers, 1, 1.0, True)) == 24
    assert len(plan(answers[:1], 1, 1.0, True)) == 1  # one answer has one order


def judgement(judge, score, order=0, criterion="reflection", evidence="quoted"):
    """A judgement with one score on every criterion; of None, unjudged."""
    scores = None if score is None else dict.fromkeys(CRITERIA, Score(score, evidence + judge, "why"))
    return Judgement(
        "c", 0, judge, "r", True, "x", True, scores, "lost" if score is None else None, f"{judge}{order}", order=order
    )


@pytest.mark.parametrize(
    ("how", "weights", "scores", "combined", "counted"),
    [
        ("mean", (1, 1, 1), (5, 4, 1), 10 / 3, 3),
        ("mean", (2, 1, 1), (5, 4, 1), 15 / 4, 3),
        ("mean", (1, 1, 1), (5, None, 1), 3, 2),
        ("mean", (1, 0, 0), (5, 4, 1), 5, 1),
        ("median", (1, 1, 1), (5, 4, 1), 4, 3),
        ("median", (1, 1, 1), (5, None, 2), 3.5, 2),
        ("median", (1, 1, 2), (5, 4, 1), 2.5, 3),
        ("median", (1, 1, 3), (5, 4, 1), 1, 3),
        ("worst", (1, 1, 1), (5, 4, 2), 2, 3),
        ("worst", (1, 1, 0), (5, 4, 2), 4, 2),
        ("worst", (1, 1, 1), (None, None, 2), 2, 1),
    ],
)
def test_several_judges_together_by_hand(how, weights, scores, combined, counted):
    judges = dict(zip("abc", weights, strict=True))
    together = combine(how, [judgement(name, score) for name, score in zip("abc", scores, strict=True)], judges)
    for criterion in CRITERIA:
        assert together.scores[criterion].score == pytest.approx(combined)
        assert together.counted[criterion] == counted
    named = ",".join(name if weight == 1 else f"{weight}*{name}" for name, weight in judges.items())
    assert together.judge == f"{how}({named})"


def test_a_judges_two_orders_are_one_vote_and_the_evidence_is_the_nearest_judges():
    together = combine("mean", [judgement("a", 1), judgement("a", 3, order=1), judgement("b", 5)], {"a": 1.0, "b": 1.0})
    assert together.scores["reflection"].score == 3.5  # (2 + 5) / 2; not 3
    assert together.counted["reflection"] == 2
    assert together.scores["reflection"] == Score(3.5, "quoteda", "a: why")  # both are 1.5 away: the lower one
    nearer = combine("worst", [judgement("a", 4), judgement("b", 2)], {"a": 1.0, "b": 1.0})
    assert nearer.scores["reflection"].evidence == "quotedb"


def test_when_nobody_has_a_score_the_combination_has_none():
    together = combine("mean", [judgement("a", None), judgement("b", None)], {"a": 1.0, "b": 1.0})
    assert together.scores is None
    assert together.problem == "no judge has a score"
    assert set(together.counted.values()) == {0}


def test_rules_and_a_model_together(judge, chat_server):
    server = chat_server(lambda body: good(body, lambda text: 1))
    name = f"a@{server.url}"
    arguments = ("--judge", "rules", "--judge", name, "--weight", "3", "--weight", "1", "--combine", "mean")
    _, judgements = judge(*arguments, "--twice", "0")
    combined = [one for one in judgements if one.judge == f"mean(3*rules,{name})"]
    assert len(combined) == 36
    assert combined[0].scores["reflection"].score == (3 * 5 + 1) / 4
    assert combined[0].counted["reflection"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--judge", "me"), "MODEL@URL"),
        (("--judge", "rules", "--judge", "rules"), "each once"),
        (("--weight", "1"), "--combine"),
        (("--combine", "mean", "--weight", "0"), "not all 0"),
        (("--rubric", "missing.yaml"), "cannot read missing.yaml"),
    ],
)
def test_what_a_user_gets_wrong_is_named(judge, arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        judge(*arguments)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"case": "unknown", "sample": 0, "text": "", "key": ""},
            "rows.jsonl:1: case: 'unknown' is not among the cases",
        ),
        ({"case": "unknown", "sample": "0", "text": "", "key": ""}, "rows.jsonl:1: sample: a whole number, not '0'"),
        ({"case": "unknown", "sample": 0, "key": ""}, "rows.jsonl:1: text: missing"),
    ],
)
def test_a_bad_row_of_samples_is_named(demo_cases, write_rows, tmp_path, row, words):
    from mede2.trainer.preference.scored import read_samples

    path = write_rows(tmp_path / "rows.jsonl", [row | MADE])
    with pytest.raises(ValueError, match=re.escape(words)):
        read_samples(path, {case.id: case for case in read_cases(demo_cases)})


def test_an_answer_twice_is_named(demo_cases, samples):
    from mede2.trainer.preference.scored import read_samples

    samples.write_text(samples.read_text() + samples.read_text().splitlines()[4] + "\n")
    with pytest.raises(ValueError, match=r"samples.jsonl:37: sample 1 of case .* again, after .*samples.jsonl:5"):
        read_samples(samples, {case.id: case for case in read_cases(demo_cases)})


def test_the_shipped_rubric_is_whole():
    rubric = read_rubric()
    assert tuple(rubric.criteria) == CRITERIA
    for criterion in rubric.criteria.values():
        scores = [example.score for example in criterion.examples]
        assert max(scores) == 5
        assert min(scores) <= 2
        assert all(len(criterion.scores[score]) > 20 for score in range(1, 6))
    assert all(criterion.definition in rubric.text() for criterion in rubric.criteria.values())


def spoil(path, change):
    content = yaml.safe_load(DEFAULT.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rubric: rubric.pop("words"), "the file: must have exactly criteria, words; it has criteria"),
        (lambda rubric: rubric["criteria"].pop("reflection"), "criteria: must have exactly"),
        (lambda rubric: rubric["criteria"]["reflection"]["scores"].pop(3), "criteria.reflection.scores: must have"),
        (
            lambda rubric: rubric["criteria"]["reflection"].update(definition=""),
            "criteria.reflection.definition: a text",
        ),
        (lambda rubric: rubric["criteria"]["reflection"].update(examples=[]), "examples: at least one"),
        (lambda rubric: rubric["criteria"]["reflection"]["examples"][0].update(score=6), "score: 1 to 5, not 6"),
        (lambda rubric: rubric["words"].update(hedges=[False]), "words.hedges[0]: a text, not False"),
        (lambda rubric: rubric["words"].update(places={"level": {"up": ["up"]}}), "words.places: axes of places"),
        (lambda rubric: rubric["words"].update(findings=[]), "words.findings: a mapping"),
    ],
)
def test_a_rubric_with_a_fault_is_refused_by_file_and_field(tmp_path, change, words):
    path = spoil(tmp_path / "mine.yaml", change)
    with pytest.raises(ValueError, match=r"rubric .*mine.yaml: .*" + re.escape(words)):
        read_rubric(path)


def test_another_rubric_has_another_hash_and_serves(judge, tmp_path):
    path = spoil(tmp_path / "mine.yaml", lambda rubric: rubric["words"].update(reflection=["upon reflection"]))
    _, judgements = judge("--rubric", str(path))
    assert {judgement.rubric for judgement in judgements} == {read_rubric(path).hash}
    assert read_rubric(path).hash != read_rubric().hash
    assert {judgement.scores["reflection"].score for judgement in judgements} == {1}
