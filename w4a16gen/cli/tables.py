"""Plain tables that fit a terminal: identifying columns are never cut, and unimportant ones are left out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click

from w4a16gen.cli.output import is_terminal, note, terminal_width, uses_color

_GAP = 2


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    right: bool = False
    """Whether its cells are numbers, which align at the right."""
    keep: bool = False
    """Whether it identifies the row or is its main value, so that it is always shown."""
    own_line: bool = False
    """Whether its cells move to a line of their own, below the row, where the kept columns do not fit side by side."""


@dataclass(frozen=True)
class Layout:
    """A table as text."""

    lines: Sequence[str]
    hidden: Sequence[str]
    """Headings of the columns that were left out, because they do not fit."""


def lay_out(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None) -> Layout:
    """Lay out a table.

    Columns without any content are left out. If the table is wider than `width`, columns that need not be kept are left
    out from the right.

    Args:
        columns: the columns, the most important ones first.
        rows: the cells of each row.
        width: characters in a line; None sets no limit.
    """
    table = [list(map(str, row)) for row in rows]
    widths = [
        max(len(column.heading), *(len(row[index]) for row in table)) if table else len(column.heading)
        for index, column in enumerate(columns)
    ]
    shown = [index for index in range(len(columns)) if not table or any(row[index] for row in table)]
    below = None
    if width is not None and _total(widths, [index for index in shown if columns[index].keep]) > width:
        below = next((index for index in shown if columns[index].own_line), None)
    beside = [index for index in shown if index != below]
    hidden: list[str] = []
    for index in reversed(beside):
        if width is None or _total(widths, beside) <= width:
            break
        if not columns[index].keep:
            beside.remove(index)
            hidden.insert(0, columns[index].heading)
    lines = [_line(columns, widths, beside, [column.heading for column in columns])]
    lines.append(" ".ljust(_GAP).join("-" * widths[index] for index in beside))
    for row in table:
        lines.append(_line(columns, widths, beside, row))
        if below is not None:
            lines.append(f"  {row[below]}")
    return Layout(lines, hidden)


def _total(widths: Sequence[int], indices: Sequence[int]) -> int:
    return sum(widths[index] for index in indices) + _GAP * max(len(indices) - 1, 0)


def _line(columns: Sequence[Column], widths: Sequence[int], indices: Sequence[int], cells: Sequence[str]) -> str:
    aligned = (
        cells[index].rjust(widths[index]) if columns[index].right else cells[index].ljust(widths[index])
        for index in indices
    )
    return (" " * _GAP).join(aligned).rstrip()


def print_table(title: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, wide: bool = False) -> None:
    """Print a table on standard output, as wide as the terminal; as wide as needed in a pipe or with `wide`."""
    width = terminal_width() if is_terminal(sys.stdout) and not wide else None
    layout = lay_out(columns, rows, width)
    heading, rule, *lines = layout.lines
    bold = uses_color(sys.stdout)
    click.echo(click.style(title, bold=True) if bold else title)
    for line in (click.style(heading, bold=True) if bold else heading, rule, *lines):
        click.echo(line)
    if layout.hidden:
        note(f"Not shown: {', '.join(layout.hidden)}. --wide shows all columns.")
