"""How outputs differ, and when a difference is too large to be the same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcomp.quality import flatten, to_decibels
from onnxcomp.relative_error import relative_error
from onnxcomp.verification.results import Difference

__all__ = ["difference", "too_far"]

Array = np.ndarray[Any, Any]

FLOAT_ERROR = 1e-3
"""Other processors and builds add float32 up in other orders: networks differ by 1e-6 to 1e-4 then."""

ROUNDING_MARGIN = 2.0
"""Of the original's own rounding, which was seen on a few samples."""

WORST_ERROR = 0.1
"""20 dB: what differs by more is another answer, however far the model was from the original before."""


def difference(
    reference: Sequence[list[Any]], outputs: Sequence[list[Any]], *, samples: int | None = None
) -> Difference:
    """Compare runs on the same samples.

    Args:
        reference: For each run its outputs.
        outputs: The others, in the same order.
        samples: How many samples they were; one a run by default.

    Example:
        >>> one = [[np.array([[1.0, 3.0]], np.float32)]]
        >>> other = [[np.array([[1.0, 4.0]], np.float32)]]
        >>> difference(one, one).equal, difference(one, other).max_abs
        (True, 1.0)
    """
    pairs = [
        list(zip(flatten(one), flatten(other), strict=True)) for one, other in zip(reference, outputs, strict=True)
    ]
    by_output = [list(column) for column in zip(*pairs, strict=True)]
    equal = all(_same(a, b) for column in by_output for a, b in column)
    error = max((_error(column) for column in by_output), default=0.0)
    agreements = [found for column in by_output if (found := _agreement(column)) is not None]
    return Difference(
        samples=len(pairs) if samples is None else samples,
        equal=equal,
        error=error,
        sqnr_db=math.inf if equal else to_decibels(error),
        max_abs=0.0 if equal else max((_furthest(a, b) for column in by_output for a, b in column), default=0.0),
        agreement=min(agreements, default=None),
    )


def too_far(here: Difference, there: Difference, apart: Difference, rounding: float = 0.0) -> str | None:
    """Why outputs are too far from those of the same model on this host's CPU; None where they are not.

    Of a lossy model the loss may double, as where other kernels round in other places; a float model may differ by
    what float rounding makes, and one that is as quantized as its original by what its own kernels make. What differs
    from the CPU's by more than 10% is another answer, whatever the loss.

    Args:
        here: From the original to this host's CPU.
        there: From the original to the outputs.
        apart: From this host's CPU to the outputs.
        rounding: The original's own difference with ONNX Runtime's optimizations on and off.
    """
    lost = here.error if math.isfinite(here.error) else 0.0
    own = max(FLOAT_ERROR, ROUNDING_MARGIN * rounding)
    if apart.error > WORST_ERROR:
        return f"its outputs differ from this host's CPU provider by {apart.error:.2%}, of {WORST_ERROR:.0%} at most"
    if there.error > max(2 * lost, lost + own) and apart.error > own:
        return (
            f"its outputs differ from the original's by {there.error:.2%} (relative), on this host's CPU by {lost:.2%}"
        )
    return None


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


def _error(column: Sequence[tuple[Array, Array]]) -> float:
    if any(a.shape != b.shape for a, b in column):
        return math.inf
    if column[0][0].dtype.kind not in "fiub":
        return 0.0 if all(_same(a, b) for a, b in column) else math.inf
    return relative_error([(a.astype(np.float64), b.astype(np.float64)) for a, b in column])


def _furthest(a: Array, b: Array) -> float:
    if a.shape != b.shape or a.dtype.kind not in "fiub":
        return 0.0 if _same(a, b) else math.inf
    one, other = a.astype(np.float64), b.astype(np.float64)
    equal = (one == other) | (np.isnan(one) & np.isnan(other))  # so that infinity less infinity is no difference
    with np.errstate(invalid="ignore"):
        gaps = np.where(equal, 0.0, np.abs(one - other))
    return math.inf if np.isnan(gaps).any() else float(np.max(gaps, initial=0.0))


def _agreement(column: Sequence[tuple[Array, Array]]) -> float | None:
    """How often two outputs of class scores choose the same; None if they are no rows of scores."""
    if any(a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2 or a.dtype.kind != "f" for a, b in column):
        return None
    same = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in column])
    return float(same.mean())
