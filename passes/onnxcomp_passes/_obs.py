"""Pruning that makes up for what it removes in the weights that stay, by the statistics of a layer's input."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp_passes._pruning import Pattern, lowest

__all__ = ["compensated"]

Array = np.ndarray[Any, Any]

DAMPING = 0.1
"""Added to the products, as a share of each input's own: the setting of the authors of the search. Least squares on few
samples would follow them further than others do."""

ROUNDS, GROWING = 20, 15
"""Rounds of the search for the mask, and those in which it grows: the authors' settings."""

REFIT_STEPS, REFIT_ERROR = 60, 1e-4
"""Steps of the refit at most, and the residual that ends it: float32 products are not known better."""

DEAD = 0.01
"""An input counts as having at least this much of the usual norm: what float32 sums leave of one that is constant, once
its mean is taken out, is no signal, and nothing is divided by zero."""


def compensated(matrices: Array, products: Array, cross: Array, amount: float | Pattern) -> Array | None:
    """Choose the weights that go, and the values of those that stay, for the least error of the layer's outputs.

    Both come from the quadratic form of optimal brain surgeons (Frantar & Alistarh 2022, "Optimal Brain Compression",
    arXiv 2208.11580, section 3). The mask is found as in Boza 2024, "Fast and Effective Weight Update for Pruned Large
    Language Models", arXiv 2401.02938, section 3: by alternating directions (ADMM) on weights scaled by the norms of
    their inputs, more going in each round. The weights that stay are then refitted to it by least squares, all outputs
    at once by conjugate gradients. This costs a few dozen products of (inputs, inputs) with (inputs, outputs). On
    held-out data it lost less than the single sweep of SparseGPT (arXiv 2301.00774), and about as much as surgery with
    an exact inverse for each output.

    Args:
        matrices: Weights, shape (groups, inputs, outputs).
        products: X'^T X' of the inputs that the layer gets now, shape (groups, inputs, inputs), float64.
        cross: X'^T X with the inputs X that it had when its outputs were right; the same as `products` if they are.
        amount: The share of zeros over all groups; or N:M along the inputs.

    Returns:
        The pruned matrices, float32, zeros still zero; None where the data say nothing.

    Example:
        Both inputs are always the same, so that the weight that stays takes over nearly all of the other's part.

        >>> alike = np.ones((1, 2, 2))
        >>> compensated(np.array([[[1.0], [3.0]]]), alike, alike, 0.5).astype(float).round(2).tolist()
        [[[0.0], [3.91]]]
    """
    norms = np.sqrt(np.maximum(np.diagonal(products, axis1=1, axis2=2), 0))[:, :, None]
    if not np.isfinite(products).all() or not np.isfinite(cross).all() or not norms.any():
        return None
    norms = np.maximum(norms, DEAD * np.sqrt(np.mean(np.square(norms))))
    both = norms * norms.transpose(0, 2, 1)
    unit = np.eye(matrices.shape[1])
    hessian = products / both + DAMPING * unit
    scaled = matrices * norms
    target = (cross @ matrices / norms + DAMPING * scaled).astype(np.float32)
    try:
        np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:  # nothing but rounding errors is left of inputs that do not vary
        return None
    inverse = np.linalg.inv(hessian + unit).astype(np.float32)
    hessian, scaled = hessian.astype(np.float32), scaled.astype(np.float32)
    goes, found = _search(scaled, target, inverse, amount, matrices == 0)
    found = _refit(hessian, target, np.where(goes, np.float32(0), found), goes)
    plain = np.where(goes, np.float32(0), scaled)
    better = _loss(hessian, target, found) < _loss(hessian, target, plain)
    return np.asarray(np.where(better, found, plain) / norms, np.float32)


def _search(scaled: Array, target: Array, inverse: Array, amount: float | Pattern, zeros: Array) -> tuple[Array, Array]:
    """The mask of what goes, `zeros` first, and weights near to those that suit it; the step size of ADMM is 1."""
    dual, found = np.zeros_like(scaled), scaled
    kept = goes = np.zeros(scaled.shape, bool)
    for step in range(ROUNDS):
        wanted = found + dual
        if step < GROWING:
            scores = np.where(zeros, np.float32(-1), np.abs(wanted))
            goes = _mask(scores, amount, 1 - (1 - (step + 1) / GROWING) ** 3) | zeros
        kept = np.where(goes, np.float32(0), wanted)
        dual = wanted - kept
        found = inverse @ (target + kept - dual)
    return goes, kept


def _mask(scores: Array, amount: float | Pattern, part: float) -> Array:
    if isinstance(amount, Pattern):
        return amount.mask(scores.swapaxes(0, 1)).swapaxes(0, 1)
    return lowest(scores, round(amount * part * scores.size))


def _refit(hessian: Array, target: Array, start: Array, goes: Array) -> Array:
    """Least squares over the weights that stay, by conjugate gradients; the scaling has the diagonal equal already."""

    def staying(values: Array) -> Array:
        return np.where(goes, np.float32(0), values)

    found, residual = start.copy(), staying(target - hessian @ start)
    direction, square = residual, _sums(residual, residual)
    enough = REFIT_ERROR**2 * _sums(staying(target), staying(target))
    for _ in range(REFIT_STEPS):
        unfinished = square > enough  # what is finished stays: a quotient of two rounding errors may be anything
        if not unfinished.any():
            break
        moved = staying(hessian @ direction)
        length = _ratio(square, _sums(direction, moved)) * unfinished
        found += length * direction
        residual = residual - length * moved
        before, square = square, _sums(residual, residual)
        direction = residual + _ratio(square, before) * direction
    return found


def _loss(hessian: Array, target: Array, values: Array) -> Array:
    """The squared error of each output, but for a constant."""
    return _sums(values, hessian @ values - 2 * target)


def _sums(one: Array, other: Array) -> Array:
    return np.asarray(np.sum(one * other, axis=1, keepdims=True))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
