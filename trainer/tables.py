"""Tables of figures as text, with heading and note, for a page and for a terminal alike."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Section:
    """A table with its heading; the first `heads` columns name the rows, the others hold figures as text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    bars: tuple[float, ...] | None = None  # length of a bar behind each row's last figure, 0 to 1
    heads: int = 1


def print_sections(sections: Iterable[Section], console: Console | None = None) -> None:
    """Print the tables, texts as they are."""
    console = console or Console()
    for section in sections:
        table = Table(title=escape(section.title), caption=escape(section.note) or None)
        table.title_justify = table.caption_justify = "left"
        for i, column in enumerate(section.columns):
            table.add_column(escape(column), justify="right" if i >= section.heads else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
