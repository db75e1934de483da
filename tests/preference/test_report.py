"""The report: figures worked out by hand, a page that runs and fetches nothing, redaction, the real steps in a row."""

import dataclasses
import json
from collections import Counter
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mede2.trainer.data.records import BadRow
from mede2.trainer.demo.cases import CRITERIA, chain, corrupt, make_case
from mede2.trainer.preference.judgements import Judgement, Score
from mede2.trainer.preference.page import page, sections
from mede2.trainer.preference.report import examples, make_report, order_bias, read_labels, read_pairs
from mede2.trainer.preference.scored import Inputs, Sample
from mede2.trainer.questions.cases import Case, read_cases
from mede2.trainer.tables import print_sections

SCRIPT = "<script>alert(1)</script>"
QUOTED = "\"><img src=http://evil.example/x onerror='alert(1)'>"
TEXTLESS = {"meta", "img"}  # tags without an end


class Page(HTMLParser):
    """Collects tags, attributes and texts, and checks that tags close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.open, self.texts = Counter(), [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in TEXTLESS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def judgement(judge, case, sample, values, *, order=0, position=None, correct=True, counted=None) -> Judgement:
    scores = {name: Score(value, "x", "") for name, value in zip(CRITERIA, values, strict=True)} if values else None
    return Judgement(
        case, sample, judge, "hash", correct, "a", bool(values), scores, None, "key", order, position, counted
    )


def case(name: str) -> Case:
    return Case("file:1", name, (), (), "a")


def sample(name: str, number: int, text: str = "text", finish: str = "stop") -> Sample:
    return Sample(name, number, text, finish, 10, "model", "key")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory, write_rows, write_image, user, assistant):
    """Three pairs: two of one case, one with hostile texts; an image that decodes and one that does not."""
    folder = tmp_path_factory.mktemp("pairs")
    write_image(folder / "good.png", 900, 300)
    (folder / "bad.png").write_bytes(b"not a picture")

    def row(name, chosen, rejected, criterion, image, **meta):
        scores = {"chosen": {"reflection": 5}, "rejected": {"reflection": 1.5}}
        return {
            "prompt": [user(f"What of {SCRIPT}?", 1)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)],
            "images": [image], "meta": {"case": name, "criterion": criterion, "scores": scores} | meta,
        }  # fmt: skip

    return write_rows(folder / "pairs.jsonl", [
        row("a", "x" * 30, "y" * 10, "reflection", "good.png", modality="CT"),
        row("a", "x" * 30, "z" * 20, "reflection", "good.png", modality="CT"),
        row(QUOTED, f"{SCRIPT} {QUOTED}", f"{SCRIPT} & {QUOTED}", "image_analysis", "bad.png", modality=SCRIPT),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    """Two cases with two answers each, judged by two judges and by both together; one of them in both orders."""
    judgements = []
    for name, first, second in (("a", (5, 4, 3, 2), (4, 4, 3, None)), ("b", (1, 2, 3, 4), (2, 2, 3, 4))):
        for number in (0, 1):
            judgements += [
                judgement("one", name, number, first, position=number),
                judgement("one", name, number, [5] * 4, order=1, position=1 - number),
                judgement("two", name, number, second if number == 0 else None, correct=None),
                judgement("mean(one,two)", name, number, (4.5,) * 4, counted={}),
            ]
    samples = [sample("a", 0), sample("a", 1, finish="length"), sample("b", 0), sample("b", 1)]
    return Inputs({name: case(name) for name in ("a", "b", "c")}, samples, judgements)


def test_the_steps_are_counted(inputs, pairs_file):
    left_out = [{"reason": "not judged"}, {"reason": "cut off"}, {"reason": "not judged"}]
    counts = make_report(inputs, read_pairs(pairs_file), left_out, {})["counts"]
    assert counts["cases"] == 3
    assert counts["cases with answers"] == 2
    assert (counts["answers"], counts["answers cut off"]) == (4, 1)
    assert (counts["pairs"], counts["cases with pairs"]) == (3, 1)
    assert counts["left out"] == {"not judged": 2, "cut off": 1}
    assert counts["by judge"]["one"] == {
        "answers": 4, "right": 4, "wrong": 0, "not well-formed": 0, "without scores": 0, "judged twice": 4,
    }  # fmt: skip
    assert counts["by judge"]["two"]["without scores"] == 2


def test_scores_are_those_of_the_first_order(inputs, pairs_file):
    scores = make_report(inputs, [], [], {})["scores"]
    assert scores["one"]["logical_consistency"] == {"counts": [2, 0, 0, 0, 2], "mean": 3.0, "not judged": 0}
    assert scores["two"]["reflection"] == {"counts": [0, 0, 0, 1, 0], "mean": 4.0, "not judged": 3}
    assert scores["mean(one,two)"]["reflection"]["counts"] == [0, 0, 0, 0, 4]


def test_pairs_are_tallied_and_their_lengths_compared(inputs, pairs_file):
    report = make_report(inputs, read_pairs(pairs_file)[:2], [], {})
    assert report["pairs"]["criterion"] == {"reflection": 2}
    assert report["pairs"]["modality"] == {"CT": 2}
    assert report["pairs"]["specialty"] == {"not stated": 2}
    bias = report["length bias"]
    assert (bias["chosen"], bias["rejected"]) == (30, 15)
    assert bias["chosen minus rejected"] == {"value": 15.0, "low": 15.0, "high": 15.0, "num": 2}  # one case
    assert bias["share with the chosen one longer"]["value"] == 1


def test_order_bias_is_the_gain_of_standing_earlier():
    both = []
    for i in range(30):  # 4 where it stands first and 3 where it stands later, but for a tenth
        for number, early in ((0, 4), (1, 3 if i % 10 else 4)):
            late = 3 if i % 10 else 4
            both.append(judgement("one", f"c{i}", number, [early if number == 0 else late] * 4, position=number))
            both.append(
                judgement("one", f"c{i}", number, [late if number == 0 else 4] * 4, order=1, position=1 - number)
            )
    found = order_bias(both)["one"]["reflection"]
    assert found["earlier minus later"]["value"] == pytest.approx(0.9)
    assert found["the same"]["value"] == pytest.approx(0.1)
    assert found["the same"]["num"] == 60
    assert order_bias([judgement("one", "a", 0, [4] * 4), judgement("one", "a", 0, [4] * 4, order=1)]) == {}


def test_judges_agree_with_each_other_and_with_people(inputs, tmp_path, write_rows):
    rows = [
        {"case": "a", "sample": 0, "rater": "Ada", "scores": {"logical_consistency": 5, "reflection": 3}},
        {"case": "b", "sample": 0, "rater": "Ada", "scores": {"logical_consistency": 1}},
        {"case": "b", "sample": 0, "rater": "Ben", "scores": {"logical_consistency": 1}},
    ]
    labels = read_labels(write_rows(tmp_path / "labels.jsonl", rows), {("a", 0), ("b", 0)})
    found = make_report(inputs, [], [], labels)["agreement"]
    logic = found["logical_consistency"]
    assert logic["Cohen's kappa, one and Ada"]["value"] == pytest.approx(1)
    assert logic["Cohen's kappa, one and two"]["value"] == pytest.approx(0.8)
    assert logic["Fleiss' kappa, judges"]["num"] == 2
    assert set(logic) >= {
        "Krippendorff's alpha, people", "Krippendorff's alpha, judges and people",
        "Krippendorff's alpha, mean(one,two) and Ada",
    }  # fmt: skip
    assert not any("mean(one,two)" in name for name in logic if not name.endswith(("and Ada", "and Ben")))
    assert "Cohen's kappa, one and Ben" not in found["reflection"]
    assert make_report(Inputs({}, [], []), [], [], {})["agreement"] == {name: {} for name in CRITERIA}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"case": "z"}, "there is no sample 0 of case 'z'"),
        ({"rater": ""}, "rater: a name, not ''"),
        ({"scores": {"style": 3}}, "scores: whole numbers for some of logical_consistency"),
        ({"scores": {"reflection": 2.5}}, "scores.reflection: a whole number from 1 to 5, not 2.5"),
        ({"scores": {"reflection": True}}, "not True"),
        ({}, "Ada scored reflection of sample 0 of case 'a' before"),
    ],
)
def test_labels_that_mean_nothing_are_refused(row, message, tmp_path, write_rows):
    good = {"case": "a", "sample": 0, "rater": "Ada", "scores": {"reflection": 3}}
    file = write_rows(tmp_path / "labels.jsonl", [good, good | row])
    with pytest.raises(BadRow, match=f"labels.jsonl:2: .*{message}"):
        read_labels(file, {("a", 0)})


def full_report(inputs, pairs_file, redact=False):
    pairs = read_pairs(pairs_file)
    report = make_report(inputs, pairs, [{"reason": f"[red]{SCRIPT}"}], {})
    return report | {"rules": [], "redacted": redact, "examples": examples(pairs, 10, 0, redact)}


def test_the_page_runs_nothing_and_fetches_nothing(inputs, pairs_file):
    html = page(full_report(inputs, pairs_file))
    parsed = Page(html)
    assert parsed.tags.keys().isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "a"})
    allowed = {"charset", "http-equiv", "content", "name", "lang", "scope", "class", "style", "src", "alt"}
    assert {name for _, name, _ in parsed.attributes} <= allowed
    sources = [value for _, name, value in parsed.attributes if name == "src"]
    assert len(sources) == 2
    assert all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert "url(" not in html
    assert "@import" not in html
    policy = next(value for _, name, value in parsed.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    text = "".join(parsed.texts)
    assert f"{SCRIPT} & {QUOTED}" in text  # it is there to read
    assert "bad.png: does not decode" in text


def test_a_redacted_report_holds_no_text_and_no_image(inputs, pairs_file):
    report = full_report(inputs, pairs_file, redact=True)
    html, as_json = page(report), json.dumps(report)
    assert "img" not in Page(html).tags
    for text in ("x" * 10, "y" * 10, "What of", "data:image", "good.png"):
        assert text not in html
        assert text not in as_json
    assert "30 characters" in html
    assert len(report["examples"]) == 3


def test_examples_are_drawn_by_the_seed(pairs_file):
    pairs = read_pairs(pairs_file)
    assert examples(pairs, 1, 3, True) == examples(pairs, 1, 3, True)
    assert len({json.dumps(examples(pairs, 1, seed, True)) for seed in range(20)}) == 3


def test_the_terminal_shows_the_same_tables(inputs, pairs_file, capsys):
    report = full_report(inputs, pairs_file)
    console = Console(width=200, record=True)
    print_sections(sections(report), console)
    shown = console.export_text()
    headings = [
        text for text in Page(page(report)).texts if text.startswith(("Steps", "Scores by", "Pairs by", "Length"))
    ]
    assert len(headings) >= 8
    for heading in headings:
        assert heading in shown
    assert f"[red]{SCRIPT}" in shown  # not taken for markup


def test_from_answers_to_a_report(pairs, demo_cases, tmp_path, write_rows):
    """The rule-based judge, selection and the report on the demo's cases, by their commands."""
    samples = []
    for one in read_cases(demo_cases):
        demo = make_case(one.meta["seed"])
        texts = [chain(demo), *(corrupt(demo, criterion) for criterion in ("reflection", "logical_consistency"))]
        samples += [
            dataclasses.asdict(Sample(one.id, n, text, "stop", 50, "m", f"{one.id}/{n}"))
            for n, text in enumerate(texts)
        ]
    given = ("--cases", str(demo_cases), "--samples", str(write_rows(tmp_path / "samples.jsonl", samples)))
    images_elsewhere = {"MEDE2_IMAGE_ROOT": str(demo_cases.parent)}
    judged, paired = tmp_path / "judgements.jsonl", tmp_path / "pairs.jsonl"
    for arguments in (
        ("judge", *given, "--output", str(judged)),
        ("select", *given, "--judgements", str(judged), "--output", str(paired)),
    ):
        done = pairs(*arguments, **images_elsewhere)
        assert done.returncode == 0, done.stdout
    labels = [
        {"case": one["case"], "sample": one["sample"], "rater": "Ada", "scores": {"reflection": 4}} for one in samples
    ]
    done = pairs(
        "report", *given, "--judgements", str(judged), "--pairs", str(paired),
        "--human", str(write_rows(tmp_path / "human.jsonl", labels)),
        "--output", str(tmp_path / "report.html"), "--json", str(tmp_path / "report.json"), **images_elsewhere,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Rule-based checks" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["counts"]["cases"] == 12
    assert report["counts"]["pairs"] == sum(report["pairs"]["criterion"].values()) > 12
    assert report["pairs"]["modality"] == {"phantom": report["counts"]["pairs"]}
    assert sum(report["counts"]["left out"].values()) + 12 + report["counts"]["pairs"] >= 36
    assert len(report["examples"]) == 10
    assert all(row["recall"] is not None for row in report["rules"])
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).tags["img"] == 10
