"""Scales and zero points that make the typical error of rounding small, without data."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp_passes._codes import CHUNK_ELEMENTS, Codes, Grouping, Width, nearest

__all__ = ["half_quadratic", "sparse_error"]

Array = np.ndarray[Any, Any]

NORM = 0.7
"""p of the lp norm of the error: below 1, so that a few outliers may be far off where it helps all others."""

PENALTY = 10.0
PENALTY_GROWTH = 1.01
ROUNDS = 20
"""As in the authors' code; PENALTY is for errors in units of the scale here, so that no weight is too small for it."""


GAIN = 1 - 1e-5
"""What counts as better: more than float32 rounding."""

SMALLEST = 1e-8
"""Of a scale: errors below count as this, since their negative power would overflow."""


def half_quadratic(weight: Array, grouping: Grouping, width: Width) -> Codes:
    """Round with scales and zero points that minimise the lp norm of the error of each group.

    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the error is split into a sparse
    part (a shrinkage with a closed form) and a rest whose least squares give the zero point, in turn. Here they give
    the scale too, since a symmetric code has no zero point, and zero points are whole numbers. A group in which this
    does not help stays rounded to nearest.

    Args:
        weight: Finite float32 values.
        grouping: Which of them share a scale.
        width: The integers.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> weight, groups = rng.normal(size=(4, 64)).astype(np.float32), Grouping((4, 64), (1,))
        >>> plain, made = (method(weight, groups, Width(3)) for method in (nearest, half_quadratic))
        >>> bool(np.all(sparse_error(weight, groups, made) <= sparse_error(weight, groups, plain)))
        True
    """
    best = nearest(weight, grouping, width)
    view = weight.reshape(grouping.shape)
    free = next((axis for axis in range(view.ndim) if axis not in grouping.over), None)
    if free is None:
        _improve(view, grouping, width, best)
        return best
    step = max(1, CHUNK_ELEMENTS * view.shape[free] // max(1, view.size))
    for start in range(0, view.shape[free], step):
        part = (*[slice(None)] * free, slice(start, start + step))
        zero = None if best.zero is None else best.zero[part]
        _improve(view[part], grouping, width, Codes(best.codes[part], best.scale[part], zero))
    return best


def sparse_error(weight: Array, grouping: Grouping, made: Codes) -> Array:
    """What `half_quadratic` minimises: the sum of |error| to the power of 0.7, for each group."""
    error = np.abs(weight.reshape(grouping.shape) - made.decode())
    return np.asarray(np.sum(error ** np.float32(NORM), axis=grouping.over, keepdims=True))


def _improve(view: Array, grouping: Grouping, width: Width, best: Codes) -> None:
    """Put better scales, zero points and codes into `best`, which holds views of the whole."""
    over = grouping.over
    scale = best.scale.copy()
    zero = np.zeros_like(scale) if best.zero is None else best.zero.astype(np.float32)
    codes = best.codes.astype(np.float32)
    steps = view / scale  # the weight in units of the scale, as are the errors
    least = np.full(scale.shape, np.inf, np.float32)
    penalty = PENALTY
    for turn in range(ROUNDS):
        error = steps - (codes - zero)
        size = np.abs(error)
        power = np.power(np.maximum(size, SMALLEST), NORM - 1.0)
        found = scale**NORM * np.sum(size * power, axis=over, keepdims=True)
        better = found < least * GAIN
        if not better.any():
            break
        least = np.where(better, found, least)
        if turn:
            best.scale[...] = np.where(better, scale, best.scale)
            np.copyto(best.codes, codes.astype(best.codes.dtype), where=better)
            if best.zero is not None:
                best.zero[...] = np.where(better, zero, best.zero)
        power /= np.float32(penalty)
        steps -= np.copysign(np.maximum(size - power, 0.0, out=size), error)  # without the sparse part
        if best.zero is not None:
            zero = np.clip(np.rint(np.mean(codes - steps, axis=over, keepdims=True)), width.low, width.high)
        moved = codes - zero
        norm = np.sum(moved * moved, axis=over, keepdims=True)
        fresh = scale * (np.sum(moved * steps, axis=over, keepdims=True) / np.where(norm > 0, norm, 1.0))
        scale = np.where(fresh > np.finfo(np.float32).tiny, fresh, scale).astype(np.float32)
        steps = view / scale
        codes = np.clip(np.rint(steps) + zero, width.low, width.high)
        penalty *= PENALTY_GROWTH
