"""What a least-squares fit of a layer needs, gathered from two models in the worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxcomp.runtime.results import PairObserver
from onnxcomp_passes._windows import Window

__all__ = ["Fit", "Sums", "Together", "with_ones"]

Array = np.ndarray[Any, Any]


class Fit:
    """Sums what a least-squares fit of one layer needs: its inputs in one model, its results in another.

    Samples go to two halves in turn, so that what is fitted on the one can be judged on the other. Runs in the worker.

    Args:
        window: How the layer reads its input; without groups.

    Attributes:
        halves: The sums of each half.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.halves = (Sums(), Sums())
        self._samples = 0

    def update(self, reference: Array, candidate: Array) -> None:
        """Take in what the layer gives in the one model and reads in the other; samples lie along the first axis."""
        for half in range(2):
            part = slice((half + self._samples) % 2, None, 2)
            if len(candidate[part]):
                rows, results = self.window.rows(candidate[part])[0], self.window.results(reference[part])
                if len(rows) == len(results):  # a model may round to other lengths
                    self.halves[half].add(with_ones(rows), results)
        self._samples += len(candidate)


class Sums:
    """What least squares needs of rows x and results y.

    Attributes:
        inputs: Sum of x x^T, float64 of shape (inputs, inputs).
        results: Sum of x y^T, shape (inputs, outputs).
        energy: Sum of y^2 of each output.
        count: Rows seen.

    Example:
        >>> sums = Sums()
        >>> sums.add(np.array([[2.0], [4.0]]), np.array([[1.0], [2.0]]))
        >>> (sums.results / sums.inputs).tolist(), sums.error(np.array([[0.5]]))
        ([[0.5]], 0.0)
    """

    def __init__(self) -> None:
        self.inputs = np.zeros((0, 0))
        self.results = np.zeros((0, 0))
        self.energy = np.zeros(0)
        self.count = 0

    def add(self, rows: Array, results: Array) -> None:
        """Take in more rows; those with NaN or infinity are left out."""
        finite = np.isfinite(rows).all(axis=1) & np.isfinite(results).all(axis=1)
        rows, results = rows[finite].astype(np.float64), results[finite].astype(np.float64)
        found = rows.T @ rows, rows.T @ results, np.square(results).sum(axis=0)
        if self.inputs.size:
            found = self.inputs + found[0], self.results + found[1], self.energy + found[2]
        self.inputs, self.results, self.energy = found
        self.count += len(rows)

    def joined(self, other: Sums) -> Sums:
        """These and others, of which each has seen something."""
        both = Sums()
        both.inputs, both.results = self.inputs + other.inputs, self.results + other.results
        both.energy, both.count = self.energy + other.energy, self.count + other.count
        return both

    def error(self, weights: Array) -> float:
        """The sum of squared errors of y = x @ weights."""
        both = np.sum(weights * (self.inputs @ weights - 2 * self.results))
        return float(both + self.energy.sum())


class Together:
    """Several observers of the same pair of tensors."""

    def __init__(self, observers: Sequence[PairObserver]) -> None:
        self.observers = tuple(observers)

    def update(self, reference: Array, candidate: Array) -> None:
        """Show all of them the values."""
        for observer in self.observers:
            observer.update(reference, candidate)


def with_ones(rows: Array) -> Array:
    """Rows with a 1 behind each, for what a bias does."""
    return np.concatenate([rows, np.ones((*rows.shape[:-1], 1), rows.dtype)], axis=-1)
