"""The report as one HTML page to send to others: it opens from disk, needs no network, and holds its own charts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.report.comparison_document import comparison_from_json, comparison_to_json
from onnxcomp.report.document import from_json, to_json, write_text
from onnxcomp.report.page.compared import comparison_page_html
from onnxcomp.report.page.render import page_html

if TYPE_CHECKING:
    from onnxcomp.compared import Comparisons
    from onnxcomp.ledger import Report

__all__ = ["comparison_page_html", "page_html", "write_page"]


def write_page(report: Report | Comparisons, path: str | Path) -> int:
    """Write a report or a comparison as a page, whole or not at all. It is made of its JSON and nothing else.

    Args:
        report: A run's report, or what `compare_all` gives; of this run or as `onnxcomp.report.read_any_json` gives it.
        path: Where to.

    Returns:
        The page's size in bytes.

    Raises:
        OutputError: It cannot be written.
    """
    from onnxcomp.compared import Comparisons

    if isinstance(report, Comparisons):
        text = comparison_page_html(comparison_from_json(comparison_to_json(report)))
    else:
        text = page_html(from_json(to_json(report)))
    write_text(text, path)
    return len(text.encode())
