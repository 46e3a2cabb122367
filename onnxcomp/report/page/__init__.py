"""The report as one HTML page to send to others: it opens from disk, needs no network, and holds its own charts."""

from __future__ import annotations

from onnxcomp.report.page.render import page_html

__all__ = ["page_html"]
