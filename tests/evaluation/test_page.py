"""The page in a real browser: an empty console, no network, filters that filter, texts that stay texts."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from base64 import b64encode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mede2.trainer.evaluation.answered import AS_IT_IS, Evaluation
from mede2.trainer.evaluation.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=5000",
    "--enable-logging=stderr", "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
CONSOLE = re.compile(r"^\[[^\]]*:CONSOLE[:(]\d+\)?\] (.*)$", re.MULTILINE)
VOID = {"meta", "img", "input", "br"}


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """`browse(page, *flags, fragment="")` opens a file as a page; returns what is in it once its script has run, and
    the console's messages."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        missing = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("MEDE2_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)

    def run(page: Path, *flags: str, fragment: str = "") -> tuple[str, list[str]]:
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        command = [browser, *FLAGS, profile, *(flags or ("--dump-dom",)), page.as_uri() + fragment]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout, CONSOLE.findall(done.stderr)

    return run


@pytest.fixture(scope="session")
def report(tmp_path_factory, example):
    """`report(num_models, ...)` writes the report of an example, once for the same arguments; returns the page."""

    @functools.cache
    def write(num_models: int = 3, images: bool = True, samples: int = 8, redact: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("report") / "new"
        write_report(example(num_models, images, samples), folder, redact=redact)
        return folder / "report.html"

    return write


class References(HTMLParser):
    """What a page refers to, and the tags in it; checks that they close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.tags, self.policy, self.open, self.inside = [], [], "", [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        assert not any(name.startswith("on") or name == "style" for name in given), given
        self.found += [
            given[name] for name in ("src", "href", "action", "data", "srcset", "xlink:href") if name in given
        ]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            self.inside.setdefault(self.open[-1], []).append(data)


KINDS = {
    "one model, no drawn answers": {"num_models": 1, "samples": 0},
    "four models": {"num_models": 4},
    "no images": {"num_models": 2, "images": False},
    "redacted": {"redact": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_renders_and_the_console_stays_empty(kind, browse, report, example):
    path = report(**KINDS[kind])
    dom, console = browse(path)
    assert console == []
    summary = json.loads(path.with_name("report.json").read_text(encoding="utf-8"))
    shown = " ".join(unescape(re.sub(r"<[^>]+>", " ", dom.split("<main>")[1].split("<script")[0])).split())
    for row in summary["scores"]:
        value, low, high = (100 * row["accuracy"][name] for name in ("value", "low", "high"))
        assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in shown
    parts = {name: f'<section id="{name}">' in dom for name in ("comparisons", "scaling", "grounding", "groups")}
    assert parts == {
        "comparisons": len(summary["models"]) > 1, "scaling": KINDS[kind].get("samples", 8) > 0,
        "grounding": KINDS[kind].get("images", True), "groups": True,
    }  # fmt: skip
    assert dom.count("<article") == (0 if kind == "redacted" else 10)
    for row in summary["comparisons"]:
        assert row["verdict"] in shown


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ('id="data">', 'id="other">', "Cannot read properties of null"),
        ('"use strict";', '"use  strict";', "Content Security Policy"),  # another script than the policy's hash
        ("<main>", '<main><img src="http://localhost/x.png" alt="">', "Content Security Policy"),
    ],
)
def test_what_is_broken_is_seen_on_the_console(part, broken, message, browse, report, tmp_path):
    html = report().read_text(encoding="utf-8")
    assert html.count(part) == 1
    (tmp_path / "broken.html").write_text(html.replace(part, broken), encoding="utf-8")
    _, console = browse(tmp_path / "broken.html")
    assert any(message in line for line in console)


def test_it_refers_to_nothing_but_itself(report):
    html = report().read_text(encoding="utf-8")
    seen = References(html)
    assert set(seen.tags).isdisjoint({"link", "iframe", "object", "embed", "base"})
    assert seen.found
    assert all(value.startswith("#") for value in seen.found)
    style, (data, script) = "".join(seen.inside["style"]), seen.inside["script"]
    for word in ("url(", "@import", "http:", "https:"):
        assert word not in style + script
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "import(", "eval(", "innerHTML", "document.write"):
        assert word not in script
    digests = [f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)]
    assert seen.policy == (
        f"default-src 'none'; img-src data:; style-src {digests[0]}; script-src {digests[1]}; base-uri 'none'; "
        "form-action 'none'"
    )
    urls = [image["url"] for image in json.loads(data)["images"]]
    assert len(urls) == 40  # one for each picture, though slides are about the same as phantoms
    assert all(re.match(r"data:image/(png|jpeg);base64,", url) for url in urls)
    assert all(html.count(url) == 1 for url in urls)


HARNESS = """<!DOCTYPE html><title>harness</title><iframe src="report.html" width="1200" height="800"></iframe>
<pre id="result"></pre><script>
const frame = document.querySelector("iframe"), steps = STEPS, results = [];
const moved = (window) => new Promise((done) => window.addEventListener("hashchange", done, { once: true }));
frame.addEventListener("load", async () => {
  const page = frame.contentWindow, doc = page.document, form = doc.getElementById("filters");
  for (const step of steps) {
    if (step.hash !== undefined) { const change = moved(page); page.location.hash = step.hash; await change; }
    if (step.set) {
      const change = moved(page);
      for (const [name, value] of Object.entries(step.set)) form.elements[name].value = value;
      form.dispatchEvent(new Event("input"));
      await change;
    }
    if (step.click) {
      const target = doc.querySelector(step.click), change = target.href && moved(page);
      target.click();
      await change;
    }
    results.push({
      ids: [...doc.querySelectorAll("article")].map((article) => article.dataset.question),
      count: doc.getElementById("count").textContent, hash: page.location.hash,
      controls: Object.fromEntries([...form.elements].map((control) => [control.name, control.value])),
      badges: [...doc.querySelectorAll("article")].map(
        (article) => [...article.querySelectorAll(".badge")].map((badge) => badge.textContent)),
      images: [...doc.querySelectorAll("article img")].map((image) => [image.complete && image.naturalWidth > 0]),
      keys: [...doc.querySelectorAll("article")].map((a) => a.querySelector(".key").firstChild.textContent),
      next: !doc.getElementById("after").disabled, previous: !doc.getElementById("before").disabled,
    });
  }
  document.getElementById("result").textContent = JSON.stringify(results);
}, { once: true });
</script>"""


def ids(evaluation: Evaluation, fits) -> list[tuple[str, str]]:
    """(benchmark, id) of the questions that `fits(answers)`, answers by model and probe."""
    given: dict = {}
    for answer in evaluation.answers:
        if answer.sample is None:
            given.setdefault((answer.benchmark, answer.case), {})[answer.model, answer.probe] = answer
    return [
        (benchmark, name) for benchmark, cases in evaluation.benchmarks.items() for name in cases
        if fits(benchmark, given[benchmark, name])
    ]  # fmt: skip


def test_filters_choose_what_they_say_and_the_address_keeps_them(browse, report, example):
    evaluation = example()
    is_, one, two, base = AS_IT_IS, "Stage I", "Stage II", "base"
    steps = [
        ({"hash": "#leakage"}, lambda b, a: any(not a[m, is_].right for m in evaluation.models)),
        (
            {"hash": "#benchmark=phantoms&model=Stage+I&verdict=right"},
            lambda b, a: b == "phantoms" and a[one, is_].right,
        ),
        (
            {"hash": "#model=Stage%20II&verdict=unparsed&benchmark=vignettes"},
            lambda b, a: b == "vignettes" and a[two, is_].answer is None,
        ),
        ({"set": {"verdict": "wrong"}}, lambda b, a: b == "vignettes" and not a[two, is_].right),
        (
            {"set": {"benchmark": "", "verdict": "flipped"}},
            lambda b, a: a[two, is_].right != a[base, is_].right,
        ),
        (
            {"hash": "#benchmark=slides&model=Stage+II&probe=blank&verdict=changed"},
            lambda b, a: b == "slides" and a[two, "blank"].right != a[two, is_].right,
        ),
        ({"hash": "#words=v7"}, lambda b, a: a[base, is_].case == "v7"),
        ({"hash": "#words=35-YEAR-OLD"}, lambda b, a: a[base, is_].case == "v5"),
        ({"hash": "#words=nowhere+to+be+found"}, lambda b, a: False),
        ({"hash": "#benchmark=none&verdict=&probe=smell"}, lambda b, a: True),
        ({"click": "#comparisons tbody a"}, lambda b, a: b == "phantoms" and a[one, is_].right != a[base, is_].right),
        (
            {"click": "#grounding tbody a"},
            lambda b, a: b == "phantoms" and a[base, "blank"].right != a[base, is_].right,
        ),
    ]
    path = report()
    moves = [*(step for step, _ in steps), {"hash": "#verdict="}, {"click": "#after"}, {"click": "#before"}]
    harness = path.with_name("harness.html")
    harness.write_text(HARNESS.replace("STEPS", json.dumps(moves)), encoding="utf-8")
    dom, console = browse(harness)
    assert console == []
    results = json.loads(unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert len(results) == len(moves)
    for (step, fits), seen in zip(steps, results, strict=False):
        expected = ids(evaluation, fits)
        assert seen["ids"] == [name for _, name in expected[:10]], step
        assert seen["count"].startswith(f"{len(expected)} of the 130 questions on this page"), step
        assert all(all(image) for image in seen["images"])
        keys = [evaluation.benchmarks[benchmark][name].answer for benchmark, name in expected[:10]]
        assert seen["keys"] == keys
    assert results[1]["controls"] == {
        "benchmark": "phantoms", "model": "Stage I", "probe": "image", "verdict": "right", "words": "",
    }  # fmt: skip
    assert results[1]["images"]
    assert {badges[1] for badges in results[1]["badges"]} == {"✓ right"}
    assert {badges[2] for badges in results[2]["badges"]} == {"? unparsed"}
    assert results[3]["hash"] == "#benchmark=vignettes&model=Stage+II&probe=image&verdict=wrong&words="
    start, turned, back = results[-3:]
    assert (start["next"], start["previous"], turned["previous"]) == (True, False, True)
    assert not set(start["ids"]) & set(turned["ids"])
    assert start["ids"] == back["ids"]


@pytest.fixture
def server():
    """A web server on this machine and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_hostile_texts_stay_text_and_nothing_is_asked_for(browse, server, user_case, answered, tmp_path, write_image):
    address, asked = server
    evil = (
        f"</script /><script>document.title='taken'</script><img src={address}/x onerror=\"document.title='taken'\">"
        "<!--<script >--><style>body{display:none}</style>{{ 7 * 7 }} [0.1, 0.2] 'quoted' \"twice\" &lt;b&gt; "
        "\u2028 \u202e"
    )
    unprinted = "\x00\x07\x1b[31m\ud800"
    options = (f"{evil} one", "two")
    image = write_image(tmp_path / "good.png")
    broken = tmp_path / "not<b>an image.png"
    broken.write_bytes(b"not a picture")
    case = user_case(f"q {evil}", options[0], options, (image, broken), evil, specialty=evil, task=[evil])
    open_case = user_case("open", evil)
    models = (f"base {evil}", "tuned")
    benchmark = f"quiz {evil}"
    answers = []
    for model in models:
        said = answered(model, benchmark, case.id, options[0], True, mmrp=3.0)
        answers.append(dataclasses.replace(said, text=f"<think>{evil}{unprinted}</think> <answer>{evil}</answer>"))
        answers.append(dataclasses.replace(said, text=f"{evil}{unprinted}", rung=evil, probe="blank"))
        answers += [dataclasses.replace(said, sample=n) for n in range(2)]
        answers.append(answered(model, benchmark, "open", evil, False, recall=0.5))
    leaks = [{"benchmark": benchmark, "case": "open", "training_file": evil, "line": 3, "kind": "text", "detail": evil}]
    evaluation = Evaluation(models, {benchmark: {case.id: case, "open": open_case}}, answers, {evil: {"a": evil}})
    write_report(evaluation, tmp_path / "out", leaks)
    page = tmp_path / "out/report.html"
    References(page.read_text(encoding="utf-8"))
    dom, console = browse(page, fragment="#verdict=")
    assert console == []
    assert asked == []
    seen = References(dom)
    assert seen.tags.count("script") == 2
    assert seen.tags.count("style") == 1
    assert seen.tags.count("title") == 1 + seen.tags.count("desc")  # the page's, and one for each chart of curves
    articles = dom[dom.index("<article") : dom.rindex("</article>")]
    assert seen.tags.count("img") == 1
    assert "<title>Evaluation: base &lt;/script /&gt;" in dom
    assert "does not decode" in articles
    assert "␀␇␛[31m\ufffd" in articles
    assert "{{ 7 * 7 }}" in articles
    parts = ("main", "footer", "header")
    assert all(evil.split("\u2028")[0] in unescape(dom.split(f"<{part}")[1].split(f"</{part}>")[0]) for part in parts)
    (tmp_path / "control.html").write_text(f"<p>{evil}</p>", encoding="utf-8")
    browse(tmp_path / "control.html")
    assert asked  # without the policy and the escapes it does


def test_it_follows_the_readers_colours(browse, report, tmp_path):
    picture, dark = tmp_path / "page.png", "--blink-settings=preferredColorScheme=0"
    _, console = browse(report(), dark, "--window-size=1200,900", f"--screenshot={picture}")
    assert console == []
    with Image.open(picture) as image:
        shown = image.convert("RGB")
        assert shown.size == (1200, 900)
        assert shown.getpixel((2, 2)) == (20, 23, 27)
        assert len(shown.getcolors(maxcolors=1_000_000)) > 50
