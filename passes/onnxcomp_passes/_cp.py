"""Canonical polyadic (CP) decomposition of the weights of Convs, which have two long axes and some short ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["cp_factors"]

Array = np.ndarray[Any, Any]

ROUNDS = 100
"""Rounds at most: the slow end of the descent gains little."""

TOLERANCE = 1e-6
"""The change of the relative error that ends the descent."""

RIDGE = 1e-5
"""What the squared norm of a component costs, in squared norms of the tensor. Without it pairs of components may grow
without bound, each undoing the other: de Silva & Lim 2008, "Tensor Rank and the Ill-Posedness of the Best Low-Rank
Approximation Problem", arXiv math/0607647. Errors hardly differ up to ten times as much, norms do."""

NOISE = 0.1
"""The norm of what is added to each vector of the start. Singular vectors of one axis that do not fit those of the
others at all would become zeros, and zeros stay."""


def cp_factors(tensor: Array, rank: int) -> list[Array]:
    """A sum of `rank` outer products near to a tensor: a local minimum of the squared error, always the same.

    Alternating least squares from the leading singular vectors of the unfoldings, as in Kolda & Bader 2009, "Tensor
    Decompositions and Applications", SIAM Review 51 (3), figure 3.3. All axes share the products with the vectors of
    the first. `parafac` of TensorLy multiplies the unfolding of each axis anew: for a short axis that takes the product
    of all other sizes and the rank in memory, gigabytes for a large Conv, and twenty times as long.

    Args:
        tensor: At least two axes, float64, finite.
        rank: 1 or more.

    Returns:
        For each axis the vectors, shape (size, rank); all but the last axis' have the norm 1, or 0.

    Example:
        >>> one, other, third = cp_factors(np.full((2, 3, 4), 5.0), 1)
        >>> np.einsum("ir,jr,kr->ijk", one, other, third)[1, 2, 3].round(3).item()
        5.0
    """
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        return [np.zeros((size, rank)) for size in tensor.shape]
    scaled, factors = tensor / norm, _start(tensor, rank)
    error = np.inf
    for _ in range(ROUNDS):
        before, error = error, _round(scaled, factors)
        if before - error < TOLERANCE:
            break
    return [*factors[:-1], factors[-1] * norm]


def _start(tensor: Array, rank: int) -> list[Array]:
    """The leading singular vectors of each unfolding, with noise; where there are too few, random ones."""
    rng, factors = np.random.default_rng(0), []
    for axis, size in enumerate(tensor.shape):
        unfolded = np.moveaxis(tensor, axis, 0).reshape(size, -1)
        vectors = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1][:, :rank]
        noise = rng.normal(size=(size, rank)) / np.sqrt(size)
        noise[:, : vectors.shape[1]] = NOISE * noise[:, : vectors.shape[1]] + vectors
        factors.append(noise)
    return factors


def _round(tensor: Array, factors: list[Array]) -> float:
    """Fit the vectors of each axis to those of the others, in place.

    Returns:
        The error, relative to the tensor of norm 1.
    """
    factors[:] = [_normalized(each) for each in factors]
    last, rest = len(factors) - 1, _outer(factors[1:])
    projected = tensor.reshape(len(tensor), -1) @ rest.reshape(-1, rest.shape[-1])
    remaining = tensor
    for axis in range(len(factors)):
        if axis:
            projected = remaining
            for other in factors[:axis:-1]:
                projected = (projected * other).sum(axis=-2)
        gram = np.prod([each.T @ each for index, each in enumerate(factors) if index != axis], axis=0)
        found = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), projected.T).T
        factors[axis] = found if axis == last else _normalized(found)
        if axis == 0:
            remaining = (tensor.reshape(len(tensor), -1).T @ factors[0]).reshape(*tensor.shape[1:], -1)
        elif axis != last:
            remaining = (remaining * factors[axis].reshape(len(found), *[1] * (last - axis), -1)).sum(axis=0)
    squares = 1 - 2 * np.sum(projected * found) + np.sum(gram * (found.T @ found))
    return float(np.sqrt(max(squares, 0.0)))


def _normalized(vectors: Array) -> Array:
    norms = np.linalg.norm(vectors, axis=0)
    return np.asarray(np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0))


def _outer(factors: Sequence[Array]) -> Array:
    """The outer product of the axes' vectors for each component, shape (*sizes, rank)."""
    made = factors[0]
    for each in factors[1:]:
        made = np.asarray(made[..., None, :] * each)
    return made
