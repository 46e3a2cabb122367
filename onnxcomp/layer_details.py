"""What a report tells of each layer besides its row: times, bits, ranks, causes, histograms and ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.activation_ranges import ActivationRanges
from onnxcomp.deviation import TensorError
from onnxcomp.errors import OnnxcompError
from onnxcomp.layer_causes import error_cause, is_worth_a_cause, outlier_channel
from onnxcomp.layer_table import LayerComparison, LayerRow, ModelLayers
from onnxcomp.model import Model
from onnxcomp.runtime import Feed, Runtime, Timing
from onnxcomp.weight_profiles import factors, histogram, ranks, singular_values
from onnxcomp.weight_values import WeightValues, weight_values

__all__ = ["described_layers", "kernel_times"]

MOST_DETAILED = 200
"""Layers with a histogram: half of them the heaviest, the others the worst. It bounds the report and the time."""

PRUNED = 0.25
"""The share of a weight whose loss is more than that of codes that round to zero."""

PROFILED_MS = 1000.0
"""What profiling a model may take, besides loading it and the runs that are always made."""

PROFILED_RUNS = (3, 20)


def described_layers(
    table: LayerComparison,
    models: tuple[Model, Model],
    macs: Mapping[str, int],
    times: tuple[Mapping[str, float], Mapping[str, float]],
    *,
    among: int = 1,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each layer of two models, as the report has it.

    Args:
        table: The layers.
        models: The original and the result.
        macs: Multiply-accumulates of the original's layers.
        times: Milliseconds of each kernel of either, as `kernel_times` gives them.
        among: How many models share what may be told in detail.

    Returns:
        The rows, the least signal-to-noise ratio first, and what is to be said of them.
    """
    original, new = models
    weights = weight_values(original), weight_values(new)
    details = _Details(table, weights, ActivationRanges(new))
    chosen = _detailed(table.rows, MOST_DETAILED // among)
    rows = [
        {
            **dataclasses.asdict(row),
            "macs": macs.get(row.name) if row.where != "new" else None,
            **details.figures(row),
            "time_ms_before": _time(table.original, row.name if row.where != "new" else None, times[0]),
            "time_ms_after": _time(table.new, table.name_in_new(row), times[1]),
            "detail": details.detail(row) if row.name in chosen else None,
        }
        for row in table.rows
    ]
    weighing = sum(_has_weight(row) for row in table.rows)
    told = f"histograms and ranges are told of {len(chosen)} of {weighing} layers, the heaviest and the worst"
    return rows, [told] if weighing > len(chosen) else []


def kernel_times(
    runtime: Runtime, paths: tuple[Path, Path], feed: Feed, timings: Sequence[Timing | None]
) -> tuple[tuple[dict[str, float], dict[str, float]], list[str]]:
    """Milliseconds of each kernel of two models under ONNX Runtime's profiler.

    Args:
        runtime: Runs them.
        paths: Their files.
        feed: The inputs of every run.
        timings: What a run of each takes; None where nothing is timed, and then no kernel is.

    Returns:
        The times of each, and what went wrong: times are an extra, which rows do not depend on.
    """
    try:
        before, after = (_profiled(runtime, path, feed, timing) for path, timing in zip(paths, timings, strict=True))
    except OnnxcompError as error:
        return ({}, {}), [f"the layers have no times: {error}"]
    return (before, after), []


def _profiled(runtime: Runtime, path: Path, feed: Feed, timing: Timing | None) -> dict[str, float]:
    if timing is None:
        return {}
    least, most = PROFILED_RUNS
    runs = min(most, max(least, int(PROFILED_MS / max(timing.median_ms, 1e-3))))
    return runtime.profile(path, feed, runs=runs, median=True)


def _time(layers: ModelLayers, name: str | None, times: Mapping[str, float]) -> float | None:
    layer = layers.by_name.get(name or "")
    return None if layer is None or layer.kernel_node is None else times.get(layer.kernel_node)


def _has_weight(row: LayerRow) -> bool:
    return row.weight_before is not None or row.weight_after is not None


def _detailed(rows: Sequence[LayerRow], most: int) -> set[str]:
    """The names of the layers that are told of in detail: the worst come first in `rows`."""
    weighing = [row for row in rows if _has_weight(row)]
    if len(weighing) <= most:
        return {row.name for row in weighing}
    heaviest = sorted(weighing, key=lambda row: -max(row.weight_bytes_before or 0, row.weight_bytes_after or 0))
    half = most // 2
    return {row.name for part in (heaviest, weighing) for row in part[:half]}


class _Details:
    """Looks into the weights and scales of two models.

    Args:
        table: Their layers.
        weights: The weights of each, by name.
        ranges: The scales of the new model.
    """

    def __init__(
        self,
        table: LayerComparison,
        weights: tuple[Mapping[str, WeightValues], Mapping[str, WeightValues]],
        ranges: ActivationRanges,
    ) -> None:
        self._table = table
        self._before, self._after = weights
        self._ranges = ranges
        self._by_node = {id(weight.node): weight for weight in self._after.values()}
        self._only_new = {row.name for row in table.rows if row.where == "new"}
        self._inputs = table.original.inputs(table.errors)

    def figures(self, row: LayerRow) -> dict[str, Any]:
        """Bits, rank and cause."""
        parts = self._parts(row) if row.where == "both" else []
        name = self._table.name_in_new(row)
        return {
            "bits_before": _bits(self._table.original, row.name) if row.where != "new" else None,
            "bits_after": _bits(self._table.new, name),
            "rank": ranks(parts) if len(parts) > 1 else None,
            "cause": self._cause(row, len(parts)),
        }

    def detail(self, row: LayerRow) -> dict[str, Any]:
        """Histograms, ranges, factors and singular values."""
        before, parts = self._before.get(row.weight_before or ""), self._parts(row)
        split = row.where == "both" and len(parts) > 1
        return {
            "weights": histogram(before, parts if row.where != "new" else parts[-1:]),
            "activations": self._activations(row, parts[0] if split else None),
            "factors": [list(part.shape) for part in parts] if split else None,
            "singular_values": singular_values(before, parts) if split else None,
        }

    def _activations(self, row: LayerRow, first: WeightValues | None) -> list[dict[str, Any]]:
        """The ranges at a layer's input and output; `first` is the first factor of one that was split."""
        name, errors = self._table.name_in_new(row), self._table.errors
        layer = self._table.new.by_name.get(name or "")
        if name is None or layer is None:
            return []
        data = next(iter(self._inputs.get(row.name, ())), "")
        seen = {"input": errors.get(data), "output": errors.get(row.tensor or "")}
        reads = None if first is None else first.node.name or first.node.outputs[0].name
        return self._ranges.of_layer(name, layer.tensors, seen, reads=reads)

    def _parts(self, row: LayerRow) -> list[WeightValues]:
        after = self._after.get(row.weight_after or "")
        return [] if after is None else factors(after, self._by_node, self._only_new)

    def _cause(self, row: LayerRow, parts: int) -> str | None:
        """What was measured, else what was done to the weight."""
        if row.tensor is None or not is_worth_a_cause(self._table.errors[row.tensor]):
            return None
        errors, made_by = self._table.errors, self._table.original.by_tensor
        inputs = {made_by.get(tensor, tensor): errors[tensor] for tensor in self._inputs[row.name]}
        return error_cause(errors[row.tensor], inputs) or self._done(row, parts, errors[row.tensor])

    def _done(self, row: LayerRow, parts: int, result: TensorError) -> str | None:
        """What was done to a layer's weight, the coarsest first."""
        if parts > 1:
            return f"low rank: its weight became {parts} factors"
        gone = (row.weight_zeros_after or 0.0) - (row.weight_zeros_before or 0.0)
        if gone >= PRUNED:
            return f"pruned: {gone:.0%} of its weight became zero"
        before, after = _bits(self._table.original, row.name), _bits(self._table.new, self._table.name_in_new(row))
        if before is None or after is None or after >= before:
            return None
        return outlier_channel(result) or f"rounding: its weight takes {after:g} bits"


def _bits(layers: ModelLayers, name: str | None) -> float | None:
    """The bits that each number of a layer's weight takes in the file, its scales left out."""
    layer = layers.by_name.get(name or "")
    weight = None if layer is None else layer.weight
    return None if weight is None or not weight.elements else round(8 * weight.bytes / weight.elements, 2)
