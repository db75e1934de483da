"""Batch scripts of SLURM as text: a script that runs as it is, with other values in its lines."""

import re
import shlex
from collections.abc import Mapping, Sequence

TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-([01]?\d|2[0-3])(:[0-5]?\d){0,2}", re.ASCII)  # those of sbatch
DIRECTIVE = re.compile(r"(?P<name>[a-z][a-z-]*)(=(?P<value>[^\s\"'\\#]+))?")
COMMENT = re.compile(r"  # .*$")


def fill(script: str, directives: Mapping[str, str | None], settings: Mapping[str, str | Sequence[str]]) -> str:
    """A script with other values.

    Args:
        script: of bash, with `#SBATCH --name=value` lines, and settings as lines `NAME=value` or `NAME=(value ...)`,
            whose comments stay.
        directives: values by names: in place of the one there, or a line more; "" for a flag; None takes a line away.
        settings: values by names: text, or a list of texts. Quoted so that bash reads just them.

    Raises:
        ValueError: a directive that sbatch would read as something else.
        KeyError: a setting that the script has not.
    """
    lines = script.splitlines()
    for name, value in directives.items():
        found = [number for number, line in enumerate(lines) if re.match(rf"#SBATCH --{name}(=|$)", line)]
        line = None if value is None else directive(name, value)
        if found:
            lines[found[0] : found[0] + 1] = [line] if line else []
        elif line:
            last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
            lines.insert(last + 1, line)
    for name, value in settings.items():
        found = [number for number, line in enumerate(lines) if line.startswith(f"{name}=")]
        if not found:
            raise KeyError(name)
        comment = COMMENT.search(lines[found[0]])
        text = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        lines[found[0]] = f"{name}={text}{comment[0] if comment else ''}"
    return "\n".join(lines) + "\n"


def directive(name: str, value: str) -> str:
    """The line of a directive; raises ValueError where sbatch would read another value."""
    text = f"{name}={value}" if value else name
    if not DIRECTIVE.fullmatch(text):
        raise ValueError(f"{name}: {value!r} has blanks, quotes, # or \\, which #SBATCH lines do not take")
    return f"#SBATCH --{text}"


def parse_directive(text: str) -> tuple[str, str]:
    """Name and value of an option of sbatch, such as mem=200G or exclusive."""
    parts = DIRECTIVE.fullmatch(text.removeprefix("--"))
    if parts is None:
        raise ValueError(f"{text!r} is no option of sbatch: NAME=VALUE or NAME, without blanks, quotes, # and \\")
    return parts["name"], parts["value"] or ""


def check_time(text: str) -> str:
    """The time, if sbatch takes it; else ValueError."""
    if not TIME.fullmatch(text) or not re.search("[1-9]", text):
        raise ValueError(f"{text!r} is no time: minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    return text
