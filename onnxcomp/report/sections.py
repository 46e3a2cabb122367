"""Titled tables in the terminal: with rich on a terminal and as plain text anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from onnxcomp.report.plain import plain_table, wants_plain, write_plain
from onnxcomp.report.rows import Row
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["ROWS_SHOWN", "Section", "cut", "show"]

ROWS_SHOWN = 20
"""Lines of a table that are shown without -v."""

NAME_LENGTHS = (44, 26)
"""Letters of a name that are shown in one line, at the cost of other columns; or else at that of lines."""

GAP = 2
"""Spaces between columns."""

SHORTEST_BAR, LONGEST_BAR = 3, 12
"""Letters of a bar."""


@dataclass(frozen=True)
class Section:
    """A table, or lines below a title.

    Attributes:
        title: What stands above.
        head: The titles of the columns.
        rows: The cells.
        left: So many columns are names; those behind are numbers, aligned to the right.
        more: What stands below.
        bars: Title of a column -> a number for each row, which a terminal shows as a bar behind it; None has none.
        optional: Titles of columns that a narrow terminal goes without, the first of them first.
    """

    title: str
    head: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    left: int = 1
    more: str = ""
    bars: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def cut(section: Section, *, verbose: bool, rows: int = ROWS_SHOWN) -> Section:
    """A section with as many rows as are shown without -v."""
    hidden = 0 if verbose else max(0, len(section.rows) - rows)
    if not hidden:
        return section
    more = f"and {hidden} more (-v shows them)"
    return replace(section, rows=section.rows[:rows], more=more)


def show(
    console: Console,
    head: Sequence[str],
    sections: Sequence[Section],
    *,
    figures: Sequence[Row] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Show what is there: a head, figures before and after, sections and warnings."""
    sections = [section for section in sections if section.rows or section.more]
    if not wants_plain(console):
        _show_rich(console, head, sections, figures, warnings)
        return
    lines = [*head, ""]
    if figures:
        lines += [*plain_table(figures), ""]
    for section in sections:
        lines += [section.title, *_plain(section), *([f"  {section.more}"] if section.more else []), ""]
    lines += [f"warning: {printable(text)}" for text in warnings]
    write_plain(console, "\n".join(lines).rstrip("\n") + "\n")


def _plain(section: Section) -> Iterator[str]:
    table = [section.head, *section.rows] if section.head and section.rows else section.rows
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))] if table else []
    for line in table:
        cells = [f"{cell:<{width}}" if index < section.left else f"{cell:>{width}}"
                 for index, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        yield f"  {'  '.join(cells)}".rstrip()


def _show_rich(
    console: Console,
    head: Sequence[str],
    sections: Sequence[Section],
    figures: Sequence[Row],
    warnings: Sequence[str],
) -> None:
    from rich.text import Text

    from onnxcomp.report.terminal import figures_table

    console.print(Text(head[0].replace(" -> ", " → "), "bold"))
    console.print(Text("\n".join(head[1:]), "dim"))
    if figures:
        console.print(figures_table(figures, width=console.width))
    else:
        console.print()
    for section in sections:
        console.print(Text(section.title, "cyan"))
        if section.rows:
            section, room = _fitted(section, console.width)
            console.print(_table(section, room))
        if section.more:
            console.print(Text(section.more, "dim"))
        console.print()
    for text in warnings:
        console.print(Text(f"⚠ {printable(text)}", "yellow"))


def _fitted(section: Section, width: int) -> tuple[Section, int]:
    """What of a section a terminal of this width has room for, and how long its bars may be."""
    wanted = SHORTEST_BAR if section.bars else 0
    for name_length in NAME_LENGTHS:
        kept, hidden = list(range(len(section.rows[0]))), []
        for title in section.optional:
            if _room(section, kept, width, name_length) < wanted and title in section.head:
                kept.remove(section.head.index(title))
                hidden.append(title)
        room = _room(section, kept, width, name_length)
        if room >= wanted:
            break
    more = [section.more] if section.more else []
    more += [f"there is no room for {'; '.join(hidden)} (--plain shows all)"] if hidden else []
    fitted = replace(
        section,
        head=tuple(section.head[index] for index in kept) if section.head else (),
        rows=[tuple(row[index] for index in kept) for row in section.rows],
        left=sum(index < section.left for index in kept),
        more="\n".join(more),
    )
    return fitted, min(room, LONGEST_BAR) if section.bars and room >= SHORTEST_BAR else 0


def _room(section: Section, kept: Sequence[int], width: int, name_length: int) -> int:
    """How long each bar may be beside these columns; below 0 where even they have no room."""
    table = [section.head, *section.rows] if section.head else section.rows
    first, *rest = (max(len(row[index]) for row in table) for index in kept)
    left = width - min(first, name_length) - sum(rest) - GAP * len(kept)
    bars = sum(section.head[index] in section.bars for index in kept) if section.head else 0
    return left // bars - GAP if bars else left


def _table(section: Section, room: int) -> Table:
    """The rows in columns, with bars of a length."""
    from rich.table import Table
    from rich.text import Text

    from onnxcomp.report.terminal import bar

    largest = {
        section.head.index(title): max(
            (value for value in values if value is not None and math.isfinite(value)), default=0.0
        )
        for title, values in section.bars.items()
        if room and title in section.head
    }
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim", show_header=bool(section.head))
    for index in range(len(section.rows[0])):
        title = section.head[index] if section.head else ""
        table.add_column(title, justify="left" if index < section.left else "right", overflow="fold")
        if index in largest:
            table.add_column("", min_width=room)
    for number, row in enumerate(section.rows):
        cells: list[RenderableType] = []
        for index, cell in enumerate(row):
            cells.append(Text(cell, "bold" if index == 0 and section.left > 1 else ""))
            if index in largest:
                cells.append(bar(section.bars[section.head[index]][number], largest[index], room))
        table.add_row(*cells)
    return table
