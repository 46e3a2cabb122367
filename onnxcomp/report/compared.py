"""What `compare` prints of several models: one table, and what there is to say of each."""

from __future__ import annotations

import dataclasses
import html
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcomp.report.document import known
from onnxcomp.report.rows import interval_text, latency_text
from onnxcomp.report.sections import Section, show
from onnxcomp.report.text import (
    bytes_text,
    duration_text,
    error_range,
    error_text,
    percent,
    printable,
    shortened,
    signed,
    times,
)
from onnxcomp.report.views import comparison_sections, print_comparison

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.compared import Candidate, Comparison, Comparisons
    from onnxcomp.ledger import Figures

__all__ = [
    "Entry",
    "columns",
    "comparison_table",
    "comparisons_html",
    "comparisons_text",
    "int8_text",
    "loss",
    "models",
    "print_comparisons",
    "summary_text",
    "warnings_of",
]

NAME_LENGTH = 36
"""Letters of a path that a table shows, the last ones."""

LATENCY = "latency, measured"

TITLES = frozenset({
    *("model", "verdict", "size", "smaller", "deflated", LATENCY, "faster", "drop", "95% interval", "error", "int8"),
    "same class",
})  # fmt: skip

LAYERS_SHOWN = 8
"""Layers of each model that are shown without -v, the worst ones."""

OPTIONAL = ("deflated", "same class", LATENCY, "95% interval", "int8")
"""What a narrow terminal goes without first."""


def print_comparisons(found: Comparisons, console: Console, *, verbose: bool = False) -> None:
    """Show how models differ from an original: one as a table before and after, several as a table of a row each.

    Args:
        found: What `compare_all` found.
        console: Where to.
        verbose: Show all kernels and outputs, and all layers where they were measured.
    """
    if len(found.candidates) == 1 and found.measured:
        [one] = found.candidates
        verdict = f"{one.verdict}, {one.reason}"
        print_comparison(_with_layers(found, one), console, verbose=verbose, verdict=verdict)
        return
    sections = [comparison_table(found)]
    names = [(printable(name), one) for name, one in found.named]
    failed = [(name, printable(one.reason)) for name, one in names if one.after is None]
    sections.append(Section("could not be compared", rows=failed, left=2))
    for name, one in names:
        if one.after is not None and (verbose or one.layers):
            sections += [
                dataclasses.replace(section, title=f"{name}: {section.title}")
                for section in comparison_sections(_with_layers(found, one), verbose=verbose, rows=LAYERS_SHOWN)
                if verbose or "layer" in section.title
            ]
    head = [f"{printable(found.name)} and {len(names)} candidates", summary_text(found)]
    show(console, head, sections, warnings=warnings_of(found))


def summary_text(found: Comparisons) -> str:
    """On what the figures rest: target, data, threads."""
    threads = int(found.environment.get("threads", 1))
    parts = [
        f"target {printable(found.target)}",
        printable(found.data["description"]),
        f"{threads} thread{'s' * (threads != 1)}",
        duration_text(found.seconds),
    ]
    return ", ".join(parts)


@dataclass(frozen=True)
class Entry:
    """One row: the original, or a candidate. `figures` is None where nothing could be measured."""

    name: str
    verdict: str
    figures: Figures | None
    size: float | None = None
    speed: float | None = None

    @property
    def first(self) -> bool:
        """Whether it is the original, to which the losses are relative."""
        return self.verdict == "original"


def models(found: Comparisons) -> list[Entry]:
    """The original, and the candidates in the order in which they were given."""
    rest = [Entry(name, one.verdict, one.after, one.size, one.speed) for name, one in found.named]
    return [Entry(found.name, "original", found.before), *rest]


def comparison_table(found: Comparisons) -> Section:
    """One row a model, the original first; what was measured of none of them has no column."""
    relative = found.quality == "relative-error"
    rows = models(found)
    cells = {title: [tell(row) for row in rows] for title, tell in columns(found).items()}
    shown = {title: texts for title, texts in cells.items() if any(text not in {"", "-"} for text in texts)}
    bars: dict[str, list[float | None]] = {
        "size": [row.figures.size_bytes if row.figures else None for row in rows],
        "error" if relative else "drop": [loss(row, relative=relative) for row in rows],
    }
    return Section(
        "against the original",
        tuple(shown),
        list(zip(*shown.values(), strict=True)),
        2,
        bars=bars,
        optional=(*OPTIONAL, metric_title(found)),
    )


def loss(row: Entry, *, relative: bool) -> float | None:
    """The relative error, or the drop."""
    if row.figures is None or row.first:
        return None
    return row.figures.error if relative else row.figures.drop


def columns(found: Comparisons) -> dict[str, Callable[[Entry], str]]:
    """Title -> what a column says of a model; "-" where it was not measured, nothing where it makes no sense."""

    def told(tell: Callable[[Figures], str | None], *, lost: bool = False) -> Callable[[Entry], str]:
        """`lost`: what is relative to the original says nothing of the original itself."""
        return lambda row: "" if lost and row.first else "-" if row.figures is None else tell(row.figures) or "-"

    relative = found.quality == "relative-error"
    losses = {
        "drop": told(lambda figures: _loss_text(figures.drop, signed), lost=True),
        "95% interval": told(interval_text, lost=True),
    }
    errors = {
        "error": told(lambda figures: _loss_text(figures.error, error_text), lost=True),
        "95% interval": told(lambda figures: error_range(figures.error_interval), lost=True),
    }
    return {
        "model": lambda row: shortened(printable(row.name), NAME_LENGTH),
        "verdict": lambda row: row.verdict,
        "size": told(lambda figures: bytes_text(figures.size_bytes)),
        "smaller": lambda row: "" if row.first else _or_none(row.size, times) or "-",
        "deflated": told(lambda figures: _or_none(figures.deflated_bytes, bytes_text)),
        LATENCY: told(latency_text),
        "faster": lambda row: "" if row.first else _or_none(row.speed, times) or "-",
        metric_title(found): told(lambda figures: _or_none(figures.metric, "{:.4f}".format)),
        **(errors if relative else losses),
        "int8": told(int8_text),
        "same class": told(lambda figures: _or_none(figures.agreement, percent), lost=True),
    }


def metric_title(found: Comparisons) -> str:
    """What the metric's column is called, whatever the user calls the metric."""
    name = printable((found.metric or {}).get("name", "metric"))
    return f"{name} (metric)" if name in TITLES else name


def int8_text(figures: Figures) -> str | None:
    """Which share of the multiply-accumulates runs in int8 kernels."""
    return percent(figures.int8_macs / figures.macs) if figures.macs and figures.int8_macs is not None else None


def _or_none(value: float | None, text: Callable[[float], str]) -> str | None:
    return None if value is None else text(value)


def _loss_text(value: float | None, text: Callable[[float], str]) -> str:
    """A loss of a model that was measured: JSON has no infinity, and what is read back from it is None."""
    return "infinite" if value is None or math.isinf(value) else text(value)


def _with_layers(found: Comparisons, candidate: Candidate) -> Comparison:
    """The original and a candidate as `compare` gives them."""
    from onnxcomp.layer_table import LayerRow

    rows = [known(LayerRow, row) for row in candidate.layers]
    return dataclasses.replace(found.pair(candidate), layers=rows if candidate.layers else None)


# --- other forms ------------------------------------------------------------------------------------------------------


def comparisons_text(found: Comparisons) -> str:
    """The same as plain text."""
    from rich.console import Console

    written = io.StringIO()
    print_comparisons(found, Console(file=written, force_terminal=False))
    return written.getvalue()


def comparisons_html(found: Comparisons) -> str:
    """The table as HTML without scripts, styles or links of its own: what a notebook shows."""
    table = comparison_table(found)
    head = "".join(f"<th>{_safe(title)}</th>" for title in table.head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    notes = [f"{name} could not be compared: {one.reason}" for name, one in found.named if one.after is None]
    notes += [f"Warning: {text}" for text in warnings_of(found)]
    told = "".join(f"<p>{_safe(note)}</p>" for note in notes)
    return f"<div><p><small>{_safe(summary_text(found))}</small></p><table><tr>{head}</tr>{body}</table>{told}</div>"


def warnings_of(found: Comparisons) -> list[str]:
    """The warnings of the run, and those of each candidate with its name."""
    own = [f"{name}: {text}" for name, one in found.named for text in one.warnings]
    return [*found.warnings, *own]


def _safe(text: str) -> str:
    return html.escape(printable(text))
