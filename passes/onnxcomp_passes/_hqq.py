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
    return _objective(weight.reshape(grouping.shape), made.codes, made.scale, made.zero, grouping)


def _improve(view: Array, grouping: Grouping, width: Width, best: Codes) -> None:
    """Put better scales, zero points and codes into `best`, which holds views of the whole."""
    over = grouping.over
    scale = best.scale.copy()
    zero = np.zeros_like(scale) if best.zero is None else best.zero.astype(np.float32)
    least = _objective(view, best.codes, best.scale, best.zero, grouping)
    penalty = PENALTY
    codes = best.codes.astype(np.float32)
    for _ in range(ROUNDS):
        steps = view / scale  # the weight in units of the scale
        error = steps - (codes - zero)
        steps -= np.sign(error) * np.maximum(np.abs(error) - _shrinkage(error, penalty), 0.0)
        if best.zero is not None:
            zero = np.clip(np.rint(np.mean(codes - steps, axis=over, keepdims=True)), width.low, width.high)
        moved = codes - zero
        norm = np.sum(moved * moved, axis=over, keepdims=True)
        ratio = np.sum(moved * steps, axis=over, keepdims=True) / np.where(norm > 0, norm, 1.0)
        fresh = scale * ratio
        scale = np.where(fresh > np.finfo(np.float32).tiny, fresh, scale).astype(np.float32)
        codes = np.clip(np.rint(view / scale) + zero, width.low, width.high)
        found = _objective(view, codes, scale, zero, grouping)
        better = found < least
        least = np.where(better, found, least)
        best.scale[...] = np.where(better, scale, best.scale)
        np.copyto(best.codes, codes.astype(best.codes.dtype), where=better)
        if best.zero is not None:
            best.zero[...] = np.where(better, zero, best.zero)
        penalty *= PENALTY_GROWTH


def _shrinkage(error: Array, penalty: float) -> Array:
    """How far the shrinkage of an lp norm moves each error towards zero."""
    return np.asarray(np.power(np.maximum(np.abs(error), 1e-8), NORM - 1.0) / np.float32(penalty))


def _objective(view: Array, codes: Array, scale: Array, zero: Array | None, grouping: Grouping) -> Array:
    values = codes.astype(np.float32)
    if zero is not None:
        values -= zero.astype(np.float32)
    values *= scale
    return np.asarray(np.sum(np.abs(view - values) ** np.float32(NORM), axis=grouping.over, keepdims=True))
