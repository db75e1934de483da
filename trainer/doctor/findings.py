"""What a check of a node found: one line, ok, warn or FAIL, with what to do about it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text

OK, WARN, FAIL = "ok", "warn", "FAIL"
STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        level: OK, WARN or FAIL; a run does not succeed where anything FAILs.
        found: the figures.
        remedy: what to do where it is not OK.
    """

    check: str
    level: str
    found: str
    remedy: str = ""


def of_all_nodes(found: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The findings of several nodes in the order of the checks: what is the same on all of them once, what differs
    under the names of the hosts.

    Args:
        found: (host, its findings), for every node the same checks in the same order.
    """
    lines = []
    for alike in zip(*(findings for _, findings in found), strict=True):
        hosts: dict[Finding, list[str]] = {}
        for (host, _), finding in zip(found, alike, strict=True):
            hosts.setdefault(finding, []).append(host)
        if len(hosts) == 1:
            lines.append(alike[0])
        else:
            lines += [replace(one, found=f"{', '.join(names)}: {one.found}") for one, names in hosts.items()]
    return lines


class Report:
    """Prints findings as they come, where it is `shown`, and remembers whether any FAILs."""

    def __init__(self, shown: bool):
        self.console = Console(quiet=not shown, highlight=False)
        self.failed: list[str] = []

    def __call__(self, findings: Iterable[Finding]) -> None:
        for one in findings:
            line = Text.assemble((f"{one.level:<4}", STYLES[one.level]), f"  {one.check:<9}  {one.found}")
            if one.remedy:
                line.append(f"; {one.remedy}", STYLES[one.level])
            self.console.print(line, soft_wrap=True)
            if one.level == FAIL:
                self.failed.append(one.check)


def worst(levels: Mapping[str, bool]) -> str:
    """The gravest level that holds; OK where none does."""
    return next((level for level in (FAIL, WARN) if levels.get(level)), OK)
