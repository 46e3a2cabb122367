"""The best weights of a given rank for what a layer is multiplied with.

A layer computes Y = X W. Of all M of rank r, the one that computes it best from the inputs X' that it really gets is
found by reduced-rank regression (Izenman 1975, "Reduced-rank regression for the multivariate linear model"): with

    G = X'^T X' + t I = L L^T,   R = X'^T X W + t W

the squared error |X W - X' M|^2 + t |W - M|^2 is |L^T M - L^-1 R|^2 and a constant, so M = L^-T (L^-1 R truncated to
rank r). With X' = X this is the whitened SVD of Wang et al. 2024, "SVD-LLM", arXiv 2403.07378, section 3.1, with a
ridge; without inputs (G = I) it is the plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from onnxcomp_passes._windows import Moments

__all__ = ["Goal", "partial_svd", "singular_energies"]

Array = np.ndarray[Any, Any]

RIDGE = 0.7
"""What ties factors to the weight, where there are as many rows of data as inputs, as a share of the mean energy of the
inputs: the fewer the rows, the less is known of how inputs vary, and new ones vary otherwise."""

LEAST_RIDGE = 1e-6
"""It also keeps G regular where inputs never vary."""

EXACT_SIDE = 2048
"""Of a matrix whose smaller side is no longer than this, all singular values are computed; of a larger one, where the
extra is there, the first by random projections (Halko et al. 2011, "Finding Structure with Randomness", section 4.5).
"""

POWER_STEPS = 4
OVERSAMPLES = 32

TINY = 1e-300


def partial_svd(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The first left singular vectors and values of a matrix.

    Args:
        matrix: Shape (rows, columns), finite.
        rank: How many, at most the smaller side.

    Returns:
        Vectors of shape (rows, rank) and values, largest first, in float64 where the matrix is small.

    Example:
        >>> vectors, values = partial_svd(np.diag([1.0, 3.0, 2.0]), 2)
        >>> np.abs(vectors).round(6).tolist(), values.round(6).tolist()
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [3.0, 2.0])
    """
    rows, columns = matrix.shape
    if min(rows, columns) > EXACT_SIDE and 2 * rank < min(rows, columns) and find_spec("tensorly"):
        return _random_svd(matrix, rank)
    wide = rows <= columns
    values, vectors = np.linalg.eigh(_gram(matrix if wide else matrix.T))
    values = np.sqrt(np.maximum(values[::-1][:rank], 0))
    vectors = vectors[:, ::-1][:, :rank]
    if not wide:  # those are right vectors: U = W V / s, made orthonormal where values vanish
        vectors = np.linalg.qr(matrix.astype(np.float64) @ vectors)[0]
    return vectors, values


def singular_energies(matrix: Array) -> Array:
    """The squared singular values of a matrix, largest first."""
    rows, columns = matrix.shape
    values = np.linalg.eigvalsh(_gram(matrix if rows <= columns else matrix.T))
    return np.asarray(np.maximum(values[::-1], 0))


def _gram(wide: Array) -> Array:
    if wide.shape[0] > EXACT_SIDE:  # in its own type: of float32, squares have to stay within the range
        size = float(np.abs(wide).max(initial=0.0)) or 1.0
        scaled = wide / size
        return np.asarray((scaled @ scaled.T).astype(np.float64) * size**2)
    wide = wide.astype(np.float64)
    return np.asarray(wide @ wide.T)


def _random_svd(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The first singular vectors: the range that powers of the matrix lead random vectors to."""
    from tensorly.tenalg.svd import randomized_svd  # an extra

    left, values, _ = randomized_svd(
        matrix, rank, n_oversamples=OVERSAMPLES, n_iter=POWER_STEPS, random_state=np.random.RandomState(0)
    )
    return left, values


@dataclass(frozen=True)
class Goal:
    """What factors of a layer's weight come close to, and how close any can come.

    Attributes:
        root: L above, shape (groups, inputs, inputs); None for I.
        goal: L^-1 R above, shape (groups, inputs, outputs).
        energy: Of what the layer computes: |L^T W|^2 over all groups.
    """

    root: Array | None
    goal: Array
    energy: float

    @staticmethod
    def of(matrices: Array, moments: Moments | None) -> Goal:
        """The goal of a weight.

        Args:
            matrices: Shape (groups, inputs, outputs).
            moments: Of what it is multiplied with, about the mean where a bias takes care of that; None: unknown.
        """
        if moments is None:
            return Goal(None, matrices, float(np.square(matrices, dtype=np.float64).sum()))
        weights = matrices.astype(np.float64)
        inputs = weights.shape[1]
        mean = np.maximum(np.trace(moments.products, axis1=1, axis2=2) / inputs, np.finfo(np.float32).tiny)
        tie = (mean * max(LEAST_RIDGE, RIDGE * inputs / moments.count))[:, None, None]
        root = np.linalg.cholesky(moments.products + tie * np.eye(inputs))
        goal = np.linalg.solve(root, moments.cross @ weights + tie * weights)
        return Goal(root, goal, float(np.square(root.swapaxes(1, 2) @ weights).sum()))

    def energies(self) -> Array:
        """The squared singular values of each group, largest first, shape (groups, ranks)."""
        return np.stack([singular_energies(matrix) for matrix in self.goal])

    def factors(self, rank: int) -> tuple[Array, Array]:
        """The factors of a rank, each component's scale spread evenly between the two.

        Returns:
            Shapes (groups, inputs, rank) and (groups, rank, outputs).
        """
        pairs = [self._factors(group, rank) for group in range(len(self.goal))]
        return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])

    def _factors(self, group: int, rank: int) -> tuple[Array, Array]:
        left, values = partial_svd(self.goal[group], rank)
        right = left.T @ self.goal[group]
        # Unit vectors make inner activations of one size, and the second factor's rows as unlike as the values are:
        # half of that to each side suits an int8 scale over all of them.
        spread = np.sqrt(np.maximum(values, values.max(initial=0.0) * 1e-12 + np.finfo(np.float32).tiny))
        if self.root is not None:
            left = np.linalg.solve(self.root[group].T, left)
        return left * spread, right / spread[:, None]

    def last(self, features: Array) -> Array:
        """The last of several factors that fits best behind the others.

        Args:
            features: What the others amount to, shape (groups, inputs, features).

        Returns:
            Shape (groups, features, outputs).
        """
        seen = features if self.root is None else self.root.swapaxes(1, 2) @ features
        pairs = zip(seen, self.goal, strict=True)
        return np.stack([np.linalg.lstsq(each, goal, rcond=None)[0] for each, goal in pairs])

    def missed(self, matrices: Array) -> float:
        """The share of the energy of the layer's output that other weights miss, shape (groups, inputs, outputs)."""
        seen = matrices if self.root is None else self.root.swapaxes(1, 2) @ matrices
        return float(np.square(self.goal - seen, dtype=np.float64).sum()) / max(self.energy, TINY)
