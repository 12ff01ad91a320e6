"""Print lists as aligned tables."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from services.standalone.terminal import Terminal, printable

__all__ = ["columns_of", "moment", "print_table"]

PIPED_WIDTH: Final = 10_000


def moment(seconds: object) -> str:
    """Return a time (seconds since 1970) as local date and time."""
    if not isinstance(seconds, int | float):
        return ""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the column names of all rows in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def print_table(terminal: Terminal, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with right-aligned numbers. In a pipe nothing is cut or wrapped."""
    rows = [list(row) for row in rows]
    console = Console(
        file=terminal.out,
        highlight=False,
        markup=False,
        width=None if terminal.is_interactive else PIPED_WIDTH,
        force_terminal=terminal.is_interactive,
        no_color=not terminal.is_coloured,
    )
    table = Table(box=None, pad_edge=False, header_style="bold" if terminal.is_coloured else "", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(printable(_text(value)) for value in row))
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        terminal.show(line.rstrip())


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
