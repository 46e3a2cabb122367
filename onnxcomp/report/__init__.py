"""A run's report: in the terminal, as plain text, as HTML for notebooks, and as JSON with a shipped schema.

Importing this package imports neither rich nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.report.comparison_document import (
    comparison_from_json,
    comparison_schema,
    comparison_to_json,
    read_any_json,
)
from onnxcomp.report.document import from_json, read_json, schema, to_json, write_json
from onnxcomp.report.html import html_summary
from onnxcomp.report.plain import plain_text, wants_plain, write_plain

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.ledger import Report

__all__ = [
    "comparison_from_json",
    "comparison_schema",
    "comparison_to_json",
    "from_json",
    "html_summary",
    "plain_text",
    "print_report",
    "read_any_json",
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
    if wants_plain(console):
        write_plain(console, plain_text(report, verbose=verbose))
    else:
        from onnxcomp.report.terminal import render

        console.print(render(report, verbose=verbose, width=console.width))
