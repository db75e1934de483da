"""A case of the embedded task: findings and a history, a table of rules that decides it, a chain, and ways to spoil it.

The table is a toy with exact answers, written so that every error has a name. It is not medicine.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mede2.trainer.demo.phantoms import KINDS, ZONES, Finding, draw, zone_order

HISTORIES = ("fever", "smoking", "none")
RULES = {  # pattern -> diagnosis for each of HISTORIES; the first pattern that applies counts (see `pattern`)
    "clear": ("bronchitis", "emphysema", "normal"),
    "upper cavity": ("tuberculosis", "carcinoma", "aspergilloma"),
    "cavity": ("abscess", "carcinoma", "cyst"),
    "mass": ("pneumonia", "carcinoma", "lymphoma"),
    "nodules": ("emboli", "metastases", "sarcoidosis"),
    "nodule": ("granuloma", "adenocarcinoma", "hamartoma"),
}
CONCLUSIONS = {  # what a reasoning can arrive at, with the diagnosis that it then must give
    f"{name} with {history}": diagnosis
    for name, row in RULES.items()
    for history, diagnosis in zip(HISTORIES, row, strict=True)
}
DIAGNOSES = tuple(sorted({diagnosis for row in RULES.values() for diagnosis in row}))
CRITERIA = ("logical_consistency", "image_analysis", "no_hallucination", "reflection")
SPLITS = ("pretraining", "stage1", "stage2", "heldout")
NUM_FINDINGS = (0.15, 0.30, 0.30, 0.25)  # probabilities of 0, 1, 2 and 3 findings
KIND_WEIGHTS = (0.50, 0.25, 0.25)  # of KINDS; a single cavity or mass decides a case, so nodules are drawn more often


@dataclass(frozen=True)
class Case:
    """One patient. `findings` stand in reading order; `options` are the four diagnoses offered, in their order."""

    seed: int
    findings: tuple[Finding, ...]
    history: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Statement:
    """What a chain says, read back from its text: nothing here has been compared with the truth."""

    findings: tuple[Finding, ...]
    count: int
    history: str
    pattern: str
    checked: bool

    def supports(self, diagnosis: str) -> bool:
        """Whether this diagnosis follows, by the table, from the findings and the history that the chain states."""
        return (
            self.checked
            and self.count == len(self.findings)
            and self.pattern == pattern(self.findings)
            and self.history in HISTORIES
            and diagnosis == diagnose(self.findings, self.history)
        )


def pattern(findings: Sequence[Finding]) -> str:
    """The row of `RULES` for these findings: a cavity outweighs a mass, a mass outweighs nodules."""
    kinds = [finding.kind for finding in findings]
    if "cavity" in kinds:
        upper = any(finding.kind == "cavity" and finding.level == "upper" for finding in findings)
        return "upper cavity" if upper else "cavity"
    if "mass" in kinds:
        return "mass"
    return ("clear", "nodule", "nodules")[min(len(kinds), 2)]


def diagnose(findings: Sequence[Finding], history: str) -> str:
    """The diagnosis that the table gives."""
    return RULES[pattern(findings)][HISTORIES.index(history)]


def case_seed(split: str, seed: int, index: int) -> int:
    """The seed of one case. Its remainder by 4 is its split, so no two splits ever share a case or a picture."""
    if not 0 <= index < 1_000_000:
        raise ValueError(f"index {index}: a run has at most 1,000,000 cases of a split; use another seed")
    return (seed * 1_000_000 + index) * len(SPLITS) + SPLITS.index(split)


def make_case(seed: int) -> Case:
    """Draw a case. Two wrong options share the true answer's history, so the history alone does not decide."""
    rng = np.random.default_rng([seed, 0])
    zones = rng.permutation(len(ZONES))[: rng.choice(len(NUM_FINDINGS), p=NUM_FINDINGS)]
    findings = tuple(Finding(KINDS[rng.choice(len(KINDS), p=KIND_WEIGHTS)], *ZONES[zone]) for zone in sorted(zones))
    history = HISTORIES[rng.integers(len(HISTORIES))]
    answer = diagnose(findings, history)
    same_history = sorted({row[HISTORIES.index(history)] for row in RULES.values()} - {answer})
    wrong = [str(name) for name in rng.permutation(same_history)[:2]]
    others = sorted(set(DIAGNOSES) - {answer, *wrong})
    options = tuple(str(name) for name in rng.permutation([answer, *wrong, others[rng.integers(len(others))]]))
    return Case(seed, findings, history, options, answer)


def heldout_cases(num: int, seed: int = 0) -> list[Case]:
    """Cases that no training set of the demo contains (see `case_seed`)."""
    return [make_case(case_seed("heldout", seed, index)) for index in range(num)]


def render(case: Case) -> Image.Image:
    """The picture of a case, mode L, always the same."""
    return draw(case.findings, case.seed)


def look(findings: Sequence[Finding]) -> str:
    """Findings as the chain lists them: `nodule left upper; cavity right lower`, or `nothing`."""
    return "; ".join(map(str, findings)) or "nothing"


def chain(case: Case) -> str:
    """The reference answer: look, count, weigh the history, find the rule, re-check; then the option that it gives."""
    return _write(_sentences(case.findings, case.history), case.answer)


def corrupt(case: Case, criterion: str) -> str:
    """The reference answer, spoiled in one place along one MMRP criterion; the rest stays, and so contradicts it.

    An error in one place is what a preference between two answers can teach: were all that follows recomputed, DPO
    would also push down the sound steps that follow from a wrong one.

    - `logical_consistency`: the answer is that of a rule for another pattern or another history.
    - `image_analysis`: one finding is overlooked; a clear film is not looked at.
    - `no_hallucination`: a finding is invented, moved or retyped.
    - `reflection`: there is no re-check.

    Deterministic in the case.
    """
    rng = np.random.default_rng([case.seed, 2, CRITERIA.index(criterion)])
    sentences, answer = _sentences(case.findings, case.history), case.answer
    if criterion == "reflection":
        sentences.pop("check")
    elif criterion == "logical_consistency":
        column = HISTORIES.index(case.history)
        misread = {*RULES[pattern(case.findings)], *(row[column] for row in RULES.values())} - {case.answer}
        answer = sorted(misread)[rng.integers(len(misread))]
    else:
        edits = _overlooked(case.findings) if criterion == "image_analysis" else _imagined(case.findings)
        if edits:
            sentences["look"] = f"Look: {look(edits[rng.integers(len(edits))])}."
        else:
            sentences.pop("look")
    return _write(sentences, answer)


CHAIN = re.compile(
    r"Look: (?P<look>[^.]*)\. Count: (?P<count>\d+)\. History: (?P<history>\w+)\. "
    r"Rule: (?P<rule>[a-z ]+ with \w+)\."
    r"(?: Check: (?P<check_count>\d+) found, history (?P<check_history>\w+), so (?P<check_rule>[a-z ]+)\.)?"
)
FINDING = re.compile(r"(\w+) (\w+) (\w+)")


def read_chain(think: str) -> Statement | None:
    """Read the text between the think tags back; None if it is not a chain of this form."""
    match = CHAIN.fullmatch(think.strip())
    if match is None:
        return None
    findings = []
    for words in () if match["look"] == "nothing" else match["look"].split("; "):
        finding = FINDING.fullmatch(words)
        if finding is None or finding[1] not in KINDS or (finding[2], finding[3]) not in ZONES:
            return None
        findings.append(Finding(*finding.groups()))
    count, history, rule = match["count"], match["history"], match["rule"]
    name, _, rule_history = rule.rpartition(" with ")
    rechecked = (match["check_count"], match["check_history"], match["check_rule"]) == (count, history, rule)
    return Statement(tuple(findings), int(count), history, name, checked=rechecked and rule_history == history)


def _sentences(findings: Sequence[Finding], history: str) -> dict[str, str]:
    """The steps of a chain."""
    rule = f"{pattern(findings)} with {history}"
    return {
        "look": f"Look: {look(findings)}.",
        "count": f"Count: {len(findings)}.",
        "history": f"History: {history}.",
        "rule": f"Rule: {rule}.",
        "check": f"Check: {len(findings)} found, history {history}, so {rule}.",
    }


def _write(sentences: dict[str, str], answer: str) -> str:
    return f"<think>{' '.join(sentences.values())}</think>\n<answer> {answer}</answer>"


def _overlooked(findings: Sequence[Finding]) -> list[tuple[Finding, ...]]:
    """Every way to miss one finding."""
    return [tuple(other for other in findings if other != finding) for finding in findings]


def _imagined(findings: Sequence[Finding]) -> list[tuple[Finding, ...]]:
    """Every way to see one finding too many (up to three), in a wrong zone, or of a wrong kind."""
    taken = {(finding.side, finding.level) for finding in findings}
    anywhere = [Finding(kind, *zone) for kind in KINDS for zone in ZONES if zone not in taken]
    edits = [(*findings, extra) for extra in anywhere] if len(findings) < 3 else []
    for finding in findings:
        rest = [other for other in findings if other != finding]
        moved = [other for other in anywhere if other.kind == finding.kind]
        retyped = [Finding(kind, finding.side, finding.level) for kind in KINDS if kind != finding.kind]
        edits += [(*rest, other) for other in moved + retyped]
    return [tuple(sorted(edit, key=zone_order)) for edit in edits]
