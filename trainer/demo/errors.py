"""Which of the errors that Stage II's negatives show an answer makes itself, by criterion."""

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.demo.cases import CONCLUSIONS, Case, read_chain


def errors(case: Case, text: str) -> frozenset[str]:
    """The criteria that an answer fails, each as `cases.corrupt` spoils it.

    - `logical_consistency`: the answer is not that of the rule that the chain names.
    - `image_analysis`: nothing is named in a zone that has a finding.
    - `no_hallucination`: a finding is named that is not there, or not of that kind.
    - `reflection`: the re-check is missing, or says something else than the chain.

    An answer whose chain cannot be read fails `unreadable` alone: nothing is known of the others.
    """
    parsed = parse_answer(text, case.options)
    stated = read_chain(parsed.think) if parsed.well_formed else None
    if stated is None:
        return frozenset({"unreadable"})
    named = {(finding.side, finding.level) for finding in stated.findings}
    failed = {
        "logical_consistency": CONCLUSIONS.get(f"{stated.pattern} with {stated.history}") != parsed.answer,
        "image_analysis": any((finding.side, finding.level) not in named for finding in case.findings),
        "no_hallucination": not set(stated.findings) <= set(case.findings),
        "reflection": not stated.checked,
    }
    return frozenset(name for name, fails in failed.items() if fails)
