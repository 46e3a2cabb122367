"""The report as plain text: no colours, no lines but ASCII, no wrapping, for logs and pipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxcomp.report.rows import Row, figure_rows, ledger_lines, summary_lines, title
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["plain_table", "plain_text"]


def plain_text(report: Report, *, verbose: bool = False) -> str:
    """Write a report as plain text, one line a fact, ending in a line feed."""
    lines = [f"{title(report)}: {printable(report.verdict)}", *summary_lines(report), ""]
    lines += plain_table(figure_rows(report))
    lines += ["", "ledger"]
    for line in ledger_lines(report, verbose=verbose):
        head = f"{line.verdict} {line.label}".strip()
        took = f" [{line.seconds}]" if line.seconds else ""
        lines.append(f"{'  ' * (line.depth + 1)}{head}: {line.text}{took}")
    if not report.stages:
        lines.append("  no stage was run")
    lines += [f"warning: {printable(text)}" for text in report.warnings]
    lines += [f"note: {printable(text)}" for text in report.notes]
    return "\n".join(lines) + "\n"


def plain_table(rows: Sequence[Row], head: tuple[str, str, str, str] = ("", "before", "after", "change")) -> list[str]:
    """Rows in columns that are as wide as what is in them; no spaces at the ends of lines."""
    cells = [head, *((row.label, row.before, row.after, row.change) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}".rstrip()
        for line in cells
    ]
