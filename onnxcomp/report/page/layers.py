"""The table of layers: what a layer is, what was done to it and why not, what it takes, and how far off it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.report.page.panels import details
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["COLUMNS", "layer_data", "layer_row", "table_data"]

Told = list[tuple[int, str]]
"""Texts of passes, each with the number of its pass."""

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("layer", "text", "Layer"),
    ("model", "text", "Model"),
    ("error", "error", "Error"),
    ("sqnr", "decibels", "SQNR"),
    ("before", "bytes", "Bytes before"),
    ("after", "bytes", "Bytes after"),
    ("time_before", "time", "Time before"),
    ("time_after", "time", "Time after"),
    ("cause", "text", "Cause of the error"),
    ("macs", "count", "MACs"),
    ("zeros", "share", "Zeros"),
    ("bits", "bits", "Bits"),
    ("rank", "whole", "Rank"),
    ("kernel", "text", "Kernel"),
    ("done", "text", "What was done"),
    ("left", "text", "What was not, and why"),
    ("weight", "text", "Weight"),
    ("output", "text", "Output"),
    ("op", "text", "Operator"),
)
"""Key, kind and title of each column: what tells the worst and the heaviest first, also on a narrow screen."""

TOLD = ("done", "left")
"""The columns that say what passes did."""

SEVERAL = "\n"
"""Divides what several passes say of one layer: no text that was made printable holds it."""

INFINITE = 1e305
"""Stands for an infinite error, which JSON has no number for; what is read from a report is never as large."""

DIGITS = 4
"""Digits of a number that the page holds."""


def layer_data(report: Report) -> dict[str, Any]:
    """The table as the page holds it: columns that have something in them, and rows in which a text is its number.

    Texts repeat from layer to layer, so each is held once.
    """
    return {**table_data(_rows(report)), "details": details(report.layers)}


def table_data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows as the page holds them, without panels."""
    used = [column for column in COLUMNS if any(row.get(column[0]) not in {None, ""} for row in rows)]
    texts: dict[str, int] = {}

    def cell(row: Mapping[str, Any], key: str, kind: str) -> int | float | None:
        value = row.get(key)
        if kind == "text":
            text = value or ""
            return texts.setdefault(text if key in TOLD else printable(text), len(texts))
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

    cells = [[cell(row, key, kind) for key, kind, _ in used] for row in rows]
    return {
        "columns": [{"key": key, "kind": kind, "title": title} for key, kind, title in used],
        "texts": list(texts),
        "rows": cells,
        "details": [],
        "sort": next((key for key in ("error", "before") if any(key == column[0] for column in used)), ""),
    }


def _rows(report: Report) -> list[dict[str, Any]]:
    """A row for each layer, then one for each further place that a pass named."""
    done, left = _told(report)
    rows = []
    for layer in report.layers:
        names = dict.fromkeys(layer[key] for key in ("name", "weight_before", "weight_after") if layer[key])
        row = layer_row(layer)
        row["done"], row["left"] = _taken(done, names), _taken(left, names)
        rows.append(row)
    others = dict.fromkeys([*done, *left])
    return rows + [{"layer": place, "done": _taken(done, [place]), "left": _taken(left, [place])} for place in others]


def _taken(told: dict[str, Told], names: Iterable[str]) -> str:
    """What was told of any of these names, in the order in which it was; they need no row of their own then."""
    texts = sorted(item for name in names for item in told.pop(name, ()))
    return SEVERAL.join(dict.fromkeys(text for _, text in texts))


def layer_row(layer: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says of a layer itself, by the key of the column."""
    only = "" if layer["where"] == "both" else f" (in the {'result' if layer['where'] == 'new' else 'original'} only)"
    reason = f" ({layer['reason']})" if layer["reason"] else ""
    return {
        "layer": f"{layer['name']}{only}",
        "op": layer["op"],
        "weight": " ".join(
            part for part in (_shape(layer["weight_shape"]), _change(layer, "weight_type_before", "weight_type_after"))
            if part
        ),
        "output": _shape(layer["output_shape"]),
        "macs": layer["macs"],
        "before": layer["weight_bytes_before"],
        "after": layer["weight_bytes_after"],
        "zeros": layer["weight_zeros_after"],
        "kernel": f"{_change(layer, 'kernel_before', 'kernel_after')}{reason}",
        "error": INFINITE if layer["error"] is None and layer["tensor"] is not None else layer["error"],
        "sqnr": layer["sqnr_db"],
        "cause": layer.get("cause"),
        "time_before": layer.get("time_ms_before"),
        "time_after": layer.get("time_ms_after"),
        "bits": _last(layer, "bits_after", "bits_before"),
        "rank": min(layer.get("rank") or (), default=None),
    }  # fmt: skip


def _last(layer: Mapping[str, Any], after: str, before: str) -> float | None:
    """A figure of the result, or of the original where only that has the layer."""
    value: float | None = layer.get(before if layer["where"] == "original" else after)
    return value


def _change(layer: Mapping[str, Any], before: str, after: str) -> str:
    old, new = layer[before] or "", layer[after] or ""
    if layer["where"] != "both" or old == new:
        return str(new or old)
    return f"{old or '-'} \N{RIGHTWARDS ARROW} {new or '-'}"


def _shape(sizes: Sequence[Any] | None) -> str:
    return "" if sizes is None else "\N{MULTIPLICATION SIGN}".join("?" if size is None else str(size) for size in sizes)


def _told(report: Report) -> tuple[dict[str, Told], dict[str, Told]]:
    """What passes did to each place, and why they left others: in the form of each stage that was tried last.

    What a stage did that was not kept is not told: it is not in the result.
    """
    done: dict[str, Told] = defaultdict(list)
    left: dict[str, Told] = defaultdict(list)
    passes = [(stage, entry) for stage in report.stages if stage.attempts for entry in stage.attempts[-1].passes]
    for number, (stage, entry) in enumerate(passes):
        if stage.verdict in {"kept", "forced"}:
            for place in entry.changed:
                done[place["where"]].append((number, printable(f"{entry.name}: {place['what']}")))
        for place in entry.left:
            left[place["where"]].append((number, printable(f"{entry.name}: {place['why']}")))
    return done, left
