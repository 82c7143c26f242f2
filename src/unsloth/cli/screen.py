"""What the commands print: tables that stay readable when they go into a file or a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WIDTH_WITHOUT_TERMINAL = 120


def console(stderr: bool = False) -> Console:
    """A console for this process; where there is no terminal, wide enough that lines need not be folded."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), value if isinstance(value, Text) else escape(str(value)))
    return table


def grid(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table with headings."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="cyan", padding=(0, 2))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else escape(str(value)) for value in row))
    return table


def shows_colors(on: Console) -> bool:
    """Whether what is printed on ``on`` can be told apart by color."""
    return on.is_terminal and not on.no_color and on.color_system is not None


def visible(text: str) -> str:
    """Text with its white space and control characters shown; a line break still breaks the line."""
    shown = text.replace(" ", "\u00b7").replace("\t", "\u2192").replace("\r", "\u240d").replace("\n", "\u21b5\n")
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in shown)
