"""The report as one HTML page to send to others: it opens from disk, needs no network, and holds its own charts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.report.document import from_json, to_json, write_text
from onnxcomp.report.page.render import page_html

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["page_html", "write_page"]


def write_page(report: Report, path: str | Path) -> int:
    """Write a report as a page, whole or not at all. The page is made of the report's JSON and nothing else.

    Args:
        report: The report, of this run or as `onnxcomp.report.read_json` gives it.
        path: Where to.

    Returns:
        The page's size in bytes.

    Raises:
        OutputError: It cannot be written.
    """
    text = page_html(from_json(to_json(report)))
    write_text(text, path)
    return len(text.encode())
