"""The report as a short piece of HTML: what a notebook shows."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from onnxcomp.report.rows import Figured, figure_rows, ledger_lines, summary_lines, title
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.compared import Comparison
    from onnxcomp.ledger import Report

__all__ = ["figures_html", "html_summary", "pair_html"]

_RIGHT = ' style="text-align:right"'


def html_summary(report: Report) -> str:
    """Write the verdict, the table of figures and the stages as HTML without scripts, styles or links of its own."""
    stages = "".join(
        f"<tr><th>{_safe(line.label)}</th><td>{_safe(line.verdict)}</td><td>{_safe(line.text)}</td></tr>"
        for line in ledger_lines(report, verbose=False)
        if line.depth == 0
    )
    warnings = "".join(f"<p><b>Warning:</b> {_safe(text)}</p>" for text in report.warnings)
    notes = "".join(f"<p><small>{_safe(text)}</small></p>" for text in report.notes)
    return (
        f"<div><p><b>{_safe(title(report))}</b>: {_safe(report.verdict)}<br>"
        f"<small>{_safe('; '.join(summary_lines(report)))}</small></p>"
        f"{figures_html(report)}<table>{stages}</table>{warnings}{notes}</div>"
    )


def pair_html(pair: Comparison) -> str:
    """Write two models' figures and the warnings, as `html_summary` does."""
    warnings = "".join(f"<p><b>Warning:</b> {_safe(text)}</p>" for text in pair.warnings)
    return f"<div><p><b>{_safe(f'{pair.original} -> {pair.new}')}</b></p>{figures_html(pair)}{warnings}</div>"


def figures_html(figured: Figured) -> str:
    """The table of figures before and after, of a report or of a comparison."""
    figures = "".join(
        f"<tr><th>{_safe(row.label)}</th>"
        + "".join(f"<td{_RIGHT}>{_safe(cell)}</td>" for cell in (row.before, row.after, row.change))
        + "</tr>"
        for row in figure_rows(figured)
    )
    return f"<table><tr><th></th><th>before</th><th>after</th><th>change</th></tr>{figures}</table>"


def _safe(text: str) -> str:
    return html.escape(printable(text))
