"""What a layer's panel shows: its weight before and after, the ranges of its activations, its singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcomp.report.text import printable

__all__ = ["details"]

DIGITS = 5
"""Digits of a number in a panel."""

ROUNDED = ("low", "high", "least", "most", "seen_low", "seen_high", "scale")


def details(layers: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The panels that have something to show, each with the number of its layer's row."""
    panels = ((number, _panel(layer)) for number, layer in enumerate(layers) if layer.get("detail"))
    return [(number, panel) for number, panel in panels if panel]


def _panel(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The charts of one layer and what to say of it; a chart without marks is left out."""
    detail = layer["detail"]
    panel: dict[str, Any] = {}
    weights = detail["weights"]
    if weights and None not in {weights[edge] for edge in ("low", "high", "least", "most")} and _sides(weights):
        counts = {side: weights[side] or None for side in ("before", "after")}
        panel["histogram"] = {**_rounded(weights), **counts, "drawn": _is_drawn(weights, layer["weight_shape"])}
    ranges = [_range(activation) for activation in detail["activations"] if _has_range(activation)]
    if ranges:
        panel["ranges"] = ranges
    singular = detail["singular_values"]
    if singular and (known := [[number, value] for number, value in singular["values"] if None not in (number, value)]):
        panel["singular"] = {**singular, "values": [[int(number), _digits(value)] for number, value in known]}
    if detail["factors"]:
        panel["factors"] = ", ".join(_shape(shape) for shape in detail["factors"])
    if panel and layer.get("cause"):
        panel["cause"] = printable(layer["cause"])
    return panel


def _is_drawn(weights: Mapping[str, Any], shape: Sequence[Any] | None) -> bool:
    """Whether fewer values were looked at than the original's weight has."""
    sizes = [size for size in shape or () if isinstance(size, int)]
    return len(sizes) == len(shape or ()) and 0 < weights["before_values"] < math.prod(sizes)


def _sides(weights: Mapping[str, Any]) -> bool:
    """Whether there are counts, as many on either side where both have some."""
    counts = [len(weights[side]) for side in ("before", "after") if weights[side]]
    return len(set(counts)) == 1


def _has_range(activation: Mapping[str, Any]) -> bool:
    return any(None not in (activation[low], activation[high]) for low, high in
               (("low", "high"), ("seen_low", "seen_high")))  # fmt: skip


def _range(activation: Mapping[str, Any]) -> dict[str, Any]:
    kind = activation["type"]
    return {**_rounded(activation), "type": None if kind is None else printable(kind)}


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _digits(value) if name in ROUNDED else value for name, value in values.items()}


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _shape(sizes: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes))
