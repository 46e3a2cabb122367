"""Reports as rows for data frames: `pandas.DataFrame(rows)` and `polars.DataFrame(rows)` take them as they are.

Every row of a kind has the same columns, and a column one type in every report: text, number or truth value. What was
not measured is NaN, and text that is not there is empty. Thus frames of several reports can be put below each other,
and no type hangs on which rows come first. A column of counts that may be unknown holds floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from onnxcomp.errors import OptionError
from onnxcomp.report.rows import attempt_setting

if TYPE_CHECKING:
    from onnxcomp.compared import Comparison, Comparisons
    from onnxcomp.ledger import Figures, Report

__all__ = ["Rows", "comparison_frame", "pair_frame", "report_frame"]

Rows: TypeAlias = list[dict[str, "str | float | bool"]]

_ATTEMPT = (
    *("stage", "setting", "verdict", "reason", "evidence"),
    *("form", "seconds", "speed", "size", "drop", "drop_low", "drop_high"),
    *("error", "error_low", "error_high"),
    *("kept", "resumed"),
)
_STAGE = ("name", "verdict", "reason", "seconds", "attempts", "resumed")
_MODEL = ("model", "verdict", "reason")
_TEXTS = frozenset({
    *("stage", "setting", "verdict", "reason", "evidence", "name", "op", "where", "tensor", "model"),
    *("output_shape", "weight_shape", "weight_before", "weight_after", "weight_type_before", "weight_type_after"),
    *("kernel_before", "kernel_after", "latency_evidence", "rank", "cause"),
})  # fmt: skip
_TRUTHS = frozenset({"kept", "resumed"})
_LAYER = (
    *("name", "op", "where", "tensor", "output_shape", "weight_shape", "weight_before", "weight_after"),
    *("weight_bytes_before", "weight_bytes_after", "weight_type_before", "weight_type_after"),
    *("weight_zeros_before", "weight_zeros_after", "kernel_before", "kernel_after", "reason", "sqnr_db", "error"),
    *("macs", "bits_before", "bits_after", "rank", "cause", "time_ms_before", "time_ms_after"),
)


def report_frame(report: Report, rows: str) -> Rows:
    """The rows of a run's report.

    Args:
        report: The report.
        rows: "attempts" (each form of each stage, and each stage that has none), "stages", "figures" (the original and
            the result) or "layers".

    Raises:
        OptionError: There are no such rows.
    """
    kinds: dict[str, Callable[[], Rows]] = {
        "attempts": lambda: [_row(_ATTEMPT, values) for values in _attempts(report)],
        "stages": lambda: [
            _row(_STAGE, {**dataclasses.asdict(stage), "attempts": len(stage.attempts)}) for stage in report.stages
        ],
        "figures": lambda: [
            _figures({"model": "original"}, report.before, 1.0, 1.0),
            _figures({"model": "result"}, report.after, report.speed, report.size),
        ],
        "layers": lambda: [_row(_LAYER, layer) for layer in report.layers],
    }
    return _chosen(kinds, rows)


def comparison_frame(found: Comparisons, rows: str) -> Rows:
    """The rows of a comparison: "models", the original first, or "layers", each with its model."""
    kinds: dict[str, Callable[[], Rows]] = {
        "models": lambda: list(_models(found)),
        "layers": lambda: [
            _row(("model", *_LAYER), {"model": name, **layer})
            for name, candidate in found.named
            for layer in candidate.layers
        ],
    }
    return _chosen(kinds, rows)


def pair_frame(pair: Comparison) -> Rows:
    """The original's figures and the new model's."""
    return [
        _figures({"model": pair.original}, pair.before, 1.0, 1.0),
        _figures({"model": pair.new}, pair.after, pair.speed, pair.size),
    ]


def _chosen(kinds: Mapping[str, Callable[[], Rows]], rows: str) -> Rows:
    if rows not in kinds:
        message = f"to_frame: expected rows to be one of {', '.join(kinds)}, got {rows!r}"
        raise OptionError(message)
    return kinds[rows]()


def _attempts(report: Report) -> Iterator[dict[str, Any]]:
    for stage in report.stages:
        if not stage.attempts:
            yield {**dataclasses.asdict(stage), "stage": stage.name, "kept": False}
        for number, attempt in enumerate(stage.attempts, start=1):
            yield {
                **dataclasses.asdict(attempt),
                **_ends("drop", attempt.drop_interval),
                **_ends("error", attempt.error_interval),
                "stage": stage.name,
                "form": number,
                "setting": attempt_setting(number, stage.attempts),
                "kept": {stage.verdict, attempt.verdict} <= {"kept", "forced"},
                "resumed": stage.resumed,
            }


def _models(found: Comparisons) -> Iterator[dict[str, str | float | bool]]:
    from onnxcomp.ledger import Figures

    first = {"model": found.name, "verdict": "original", "reason": ""}
    yield _figures(first, found.before, 1.0, 1.0, _MODEL)
    for name, one in found.named:
        names = {"model": name, "verdict": one.verdict, "reason": one.reason}
        after = one.after or Figures(size_bytes=None)  # type: ignore[arg-type]  # of a model that failed nothing is known
        yield _figures(names, after, one.speed, one.size, _MODEL)


def _figures(
    names: Mapping[str, str],
    figures: Figures,
    speed: float | None,
    size: float | None,
    first: Sequence[str] = ("model",),
) -> dict[str, str | float | bool]:
    """A row of a model's figures, without the kernels, which are no number."""
    values = dataclasses.asdict(figures)
    del values["kernels"]
    ends = {**_ends("drop", values.pop("drop_interval")), **_ends("error", values.pop("error_interval"))}
    columns = (*first, "speed", "size", *values, *ends)
    return _row(columns, {**values, **ends, **names, "speed": speed, "size": size})


def _ends(name: str, interval: Sequence[float | None] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _row(columns: Sequence[str], values: Mapping[str, Any]) -> dict[str, str | float | bool]:
    return {name: _cell(name, values.get(name)) for name in columns}


def _cell(name: str, value: Any) -> str | float | bool:
    """A value of its column's type, whatever is missing."""
    if name in _TRUTHS:
        return bool(value)
    if name in _TEXTS:
        if isinstance(value, list | tuple):
            return "x".join("?" if size is None else str(size) for size in value)
        return "" if value is None else str(value)
    return math.nan if value is None else float(value)
