"""The report on a terminal, with rich. Names are shown as they are: never read as markup, never as control codes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxcomp.report.rows import Line, Row, figure_rows, ledger_lines, outcome, summary_lines, tables, title
from onnxcomp.report.rows import Table as PassTable
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnxcomp.ledger import Report

__all__ = ["bar", "bar_width", "figures_table", "render"]

_SIGNS = {
    "kept": ("✓", "green"),
    "forced": ("!", "yellow"),
    "dropped": ("✗", "red"),
    "unchanged": ("=", "dim"),
    "skipped": ("-", "dim"),
}
_OUTCOMES = {"better": ("✓", "bold green"), "over": ("!", "bold yellow"), "same": ("=", "bold")}


BAR_WIDTHS = ((110, 10), (80, 6))
"""Columns that a terminal must have for bars of this many; none in a narrower one."""


def bar_width(width: int) -> int:
    """How long bars may be in a terminal of this width; 0: there is no room for any."""
    return next((length for least, length in BAR_WIDTHS if width >= least), 0)


def bar(value: float | None, largest: float, width: int, color: str = "cyan") -> RenderableType:
    """A bar for a value that may be as large as `largest`; a value that is not finite has a whole one."""
    if value is None or math.isnan(value):
        return Text()
    part = 1.0 if math.isinf(value) else min(max(value / largest, 0.0), 1.0) if largest > 0 else 0.0
    return Bar(1.0, 0.0, part, width=width, color=color)


def render(report: Report, *, verbose: bool = False, width: int = 0) -> RenderableType:
    """Lay out a report, with bars where a terminal of this width has room for them."""
    sign, style = _OUTCOMES[outcome(report)]
    verdict = printable(report.verdict)
    head = Text.assemble((f"{sign} ", style), (verdict[:1].upper() + verdict[1:], style))
    about = Text("\n".join([title(report).replace(" -> ", " → "), *summary_lines(report)]), style="dim")
    parts: list[RenderableType] = [Text(), head, Padding(about, (0, 0, 0, 2))]
    parts += [figures_table(figure_rows(report), width=width), _ledger(ledger_lines(report, verbose=verbose))]
    for table in tables(report, verbose=verbose):
        parts += [Text(), Text(table.title, "cyan"), _table(table)]
        parts += [Text(table.more, "dim")] if table.more else []
    messages = [Text(f"⚠ {printable(text)}", style="yellow") for text in report.warnings]
    messages += [Text(f"  {printable(text)}", style="dim") for text in report.notes]
    if messages:
        parts += [Text(), *messages]
    return Group(*parts)


def figures_table(
    rows: Sequence[Row], head: tuple[str, str, str] = ("before", "after", "change"), *, width: int = 0
) -> Table:
    """The figures in columns, what became better in green, what became worse in yellow; bars show what is left."""
    room = bar_width(width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in head:
        table.add_column(name, justify="right")
    if room:
        table.add_column("left", min_width=room)
    for row in rows:
        style = {True: "green", False: "yellow", None: ""}[row.good]
        after = style if not row.change or not row.before else ""
        table.add_row(
            Text(row.label),
            Text(_typeset(row.before), "dim"),
            Text(_typeset(row.after), after),
            Text(row.change, style),
            *([bar(row.left, 1.0, room, "yellow" if row.good is False else "cyan")] if room else []),
        )
    return table


def _table(shown: PassTable) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(shown.columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in shown.rows:
        table.add_row(*map(Text, row))
    return table


def _ledger(lines: Iterable[Line]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=False, max_width=34, overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    table.add_column(justify="right", style="dim", no_wrap=True)
    for line in lines:
        sign, style = _SIGNS.get(line.verdict, ("", "dim"))
        label = Text("  " * line.depth)
        if sign:
            label.append(f"{sign} ", style)
        label.append(line.label, "bold" if line.depth == 0 else "dim" if not sign else "")
        text = Text()
        if line.verdict:
            text.append(f"{line.verdict}: ", style)
        text.append(line.text, "" if line.depth == 0 else "dim")
        table.add_row(label, text, line.seconds)
    return table


def _typeset(text: str) -> str:
    return text.replace("+-", "±")
