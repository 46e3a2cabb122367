"""Titled tables in the terminal: with rich on a terminal and as plain text anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.report.plain import plain_table
from onnxcomp.report.rows import Row
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ROWS_SHOWN", "Section", "cut", "show"]

ROWS_SHOWN = 20
"""Lines of a table that are shown without -v."""


@dataclass(frozen=True)
class Section:
    """A table, or lines below a title. Columns after the first `left` are numbers, aligned to the right."""

    title: str
    head: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    left: int = 1
    more: str = ""


def cut(section: Section, *, verbose: bool) -> Section:
    """A section with as many rows as are shown without -v."""
    hidden = 0 if verbose else max(0, len(section.rows) - ROWS_SHOWN)
    if not hidden:
        return section
    more = f"and {hidden} more (-v shows them)"
    return Section(section.title, section.head, section.rows[:ROWS_SHOWN], section.left, more)


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
    if console.is_terminal:
        _show_rich(console, head, sections, figures, warnings)
        return
    lines = [*head, ""]
    if figures:
        lines += [*plain_table(figures), ""]
    for section in sections:
        lines += [section.title, *_plain(section), *([f"  {section.more}"] if section.more else []), ""]
    lines += [f"warning: {printable(text)}" for text in warnings]
    text = "\n".join(lines).rstrip("\n") + "\n"
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    console.file.write(text.encode(encoding, "backslashreplace").decode(encoding))


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
    from rich.table import Table
    from rich.text import Text

    from onnxcomp.report.terminal import figures_table

    console.print(Text(head[0].replace(" -> ", " → "), "bold"))
    console.print(Text("\n".join(head[1:]), "dim"))
    if figures:
        console.print(figures_table(figures))
    else:
        console.print()
    for section in sections:
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=bool(section.head)
        )
        for index in range(len(section.rows[0]) if section.rows else 0):
            title = section.head[index] if section.head else ""
            table.add_column(title, justify="left" if index < section.left else "right", overflow="fold")
        for row in section.rows:
            table.add_row(
                *(Text(cell, "bold" if index == 0 and section.left > 1 else "") for index, cell in enumerate(row))
            )
        console.print(Text(section.title, "cyan"))
        if section.rows:
            console.print(table)
        if section.more:
            console.print(Text(section.more, "dim"))
        console.print()
    for text in warnings:
        console.print(Text(f"⚠ {printable(text)}", "yellow"))
