"""The table of layers: what a layer is, what was done to it and why not, what it takes, and how far off it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.ledger import PassEntry, Report

__all__ = ["COLUMNS", "layer_data"]

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("layer", "text", "Layer"),
    ("op", "text", "Operator"),
    ("weight", "text", "Weight"),
    ("output", "text", "Output"),
    ("macs", "count", "MACs"),
    ("before", "bytes", "Bytes before"),
    ("after", "bytes", "Bytes after"),
    ("zeros", "share", "Zeros"),
    ("kernel", "text", "Kernel"),
    ("error", "error", "Error"),
    ("done", "text", "What was done"),
    ("left", "text", "What was not, and why"),
)
"""Key, kind and title of each column."""

DIGITS = 4
"""Digits of a number that the page holds."""


def layer_data(report: Report) -> dict[str, Any]:
    """The table as the page holds it: columns that have something in them, and rows in which a text is its number.

    Texts repeat from layer to layer, so each is held once.
    """
    rows = _rows(report)
    used = [column for column in COLUMNS if any(row.get(column[0]) not in {None, ""} for row in rows)]
    texts: dict[str, int] = {}

    def cell(row: Mapping[str, Any], key: str, kind: str) -> int | float | None:
        value = row.get(key)
        if kind == "text":
            return texts.setdefault(printable(value or ""), len(texts))
        return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

    cells = [[cell(row, key, kind) for key, kind, _ in used] for row in rows]
    return {
        "columns": [{"key": key, "kind": kind, "title": title} for key, kind, title in used],
        "texts": list(texts),
        "rows": cells,
        "sort": next((key for key in ("error", "before") if any(key == column[0] for column in used)), ""),
    }


def _rows(report: Report) -> list[dict[str, Any]]:
    """A row for each layer, then one for each further place that a pass named."""
    done, left = _told(report)
    rows = []
    for layer in report.layers:
        names = dict.fromkeys(layer[key] for key in ("name", "weight_before", "weight_after") if layer[key])
        row = _layer_row(layer)
        row["done"], row["left"] = ("; ".join(_taken(told, names)) for told in (done, left))
        rows.append(row)
    others = dict.fromkeys([*done, *left])
    return rows + [
        {"layer": place, "done": "; ".join(done.get(place, ())), "left": "; ".join(left.get(place, ()))}
        for place in others
    ]


def _taken(told: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    """What was told of any of these names, which then needs no row of its own."""
    return list(dict.fromkeys(text for name in names for text in told.pop(name, ())))


def _layer_row(layer: Mapping[str, Any]) -> dict[str, Any]:
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
        "error": layer["error"],
    }  # fmt: skip


def _change(layer: Mapping[str, Any], before: str, after: str) -> str:
    old, new = layer[before] or "", layer[after] or ""
    if layer["where"] != "both" or old == new:
        return str(new or old)
    return f"{old or '-'} \N{RIGHTWARDS ARROW} {new or '-'}"


def _shape(sizes: Sequence[Any] | None) -> str:
    return "" if sizes is None else "\N{MULTIPLICATION SIGN}".join("?" if size is None else str(size) for size in sizes)


def _told(report: Report) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What passes did to each place, and why they left others: in the form of each stage that was tried last.

    What a stage did that was not kept is not told: it is not in the result.
    """
    done: dict[str, list[str]] = defaultdict(list)
    left: dict[str, list[str]] = defaultdict(list)
    for stage in report.stages:
        passes: list[PassEntry] = stage.attempts[-1].passes if stage.attempts else []
        for entry in passes:
            if stage.verdict in {"kept", "forced"}:
                for place in entry.changed:
                    done[place["where"]].append(f"{entry.name}: {place['what']}")
            for place in entry.left:
                left[place["where"]].append(f"{entry.name}: {place['why']}")
    return done, left
