"""The report as plain text: no colours, no lines but ASCII, no wrapping, for logs and pipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxcomp.report.rows import Row, figure_rows, ledger_lines, summary_lines, tables, title
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.ledger import Report

__all__ = ["plain_columns", "plain_table", "plain_text", "wants_plain", "write_plain"]


def wants_plain(console: Console) -> bool:
    """Whether colours, bars and lines are of no use: in a file or a pipe, or in a terminal that has but ASCII."""
    return not console.is_terminal or console.options.ascii_only


def write_plain(console: Console, text: str) -> None:
    """Write text as it is, in lines of any length; what the encoding lacks is escaped."""
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    console.file.write(text.encode(encoding, "backslashreplace").decode(encoding))


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
    for table in tables(report, verbose=verbose):
        lines += ["", table.title, *plain_columns([table.columns, *table.rows])]
        lines += [table.more] if table.more else []
    lines += [f"warning: {printable(text)}" for text in report.warnings]
    lines += [f"note: {printable(text)}" for text in report.notes]
    return "\n".join(lines) + "\n"


def plain_table(rows: Sequence[Row], head: tuple[str, str, str, str] = ("", "before", "after", "change")) -> list[str]:
    """Rows in columns that are as wide as what is in them; no spaces at the ends of lines."""
    return plain_columns([head, *((row.label, row.before, row.after, row.change) for row in rows)])


def plain_columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """The first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]
