"""A run's report: in the terminal, as plain text, as HTML for notebooks, and as JSON with a shipped schema.

Importing this package imports neither rich nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.report.document import from_json, read_json, schema, to_json, write_json
from onnxcomp.report.html import html_summary
from onnxcomp.report.plain import plain_text

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.ledger import Report

__all__ = [
    "from_json",
    "html_summary",
    "plain_text",
    "print_report",
    "read_json",
    "schema",
    "to_json",
    "write_json",
]


def print_report(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Show a report: in colour on a terminal, as plain text anywhere else.

    Args:
        report: The report.
        console: Where to.
        verbose: List each change, and each place left alone and why.
    """
    if console.is_terminal:
        from onnxcomp.report.terminal import render

        console.print(render(report, verbose=verbose))
    else:
        encoding = getattr(console.file, "encoding", None) or "utf-8"
        text = plain_text(report, verbose=verbose)
        console.file.write(text.encode(encoding, "backslashreplace").decode(encoding))
