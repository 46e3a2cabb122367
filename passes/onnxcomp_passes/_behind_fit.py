"""Least squares behind an activation: rows that are kept for it, and the fit."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcomp_passes._fits import with_ones
from onnxcomp_passes._windows import Window

__all__ = ["Kept", "Rows", "fit_behind", "read_rows", "rows_to_keep"]

Array = np.ndarray[Any, Any]

MAX_BYTES = 48 << 20
"""Of the inputs that are kept of one layer."""

PENALTIES = (0.01,) * 5 + (1.0,) * 5
"""How much an auxiliary result may differ from the layer's, round by round: Zhang et al. begin and end with these.

More rounds are no better on samples that the fit has not seen."""


@dataclass(frozen=True)
class Rows:
    """Rows of a layer, all float32.

    Attributes:
        inputs: What it reads, and a one, shape (rows, inputs + 1).
        targets: What should come out behind the activation, shape (rows, outputs).
        added: What is added to its results, the same shape.
        low: Where the activation ends below.
        high: Where it ends above.
    """

    inputs: Array
    targets: Array
    added: Array
    low: float
    high: float

    def error(self, weights: Array) -> float:
        """The sum of squared errors behind the activation."""
        made = np.clip(self.before(weights), self.low, self.high)
        return float(np.sum(np.square(made - self.targets), dtype=np.float64))

    def before(self, weights: Array) -> Array:
        """What goes into the activation."""
        return np.asarray(self.inputs @ weights.astype(np.float32) + self.added)

    def auxiliary(self, now: Array, penalty: float) -> Array:
        """The z that has the least (clip(z) - target)^2 + penalty * (z - now)^2, number by number."""
        pull = np.float32(penalty)
        best = np.clip((self.targets + pull * now) / (1 + pull), self.low, self.high)
        least = np.square(best - self.targets) + pull * np.square(best - now)
        for end, z in ((self.low, np.minimum(now, self.low)), (self.high, np.maximum(now, self.high))):
            if np.isfinite(end):
                cost = np.square(self.targets - np.float32(end)) + pull * np.square(z - now)
                best, least = np.where(cost < least, z, best), np.minimum(cost, least)
        return np.asarray(best)

    def joined(self, other: Rows) -> Rows:
        """These and others."""
        return replace(
            self,
            inputs=np.concatenate([self.inputs, other.inputs]),
            targets=np.concatenate([self.targets, other.targets]),
            added=np.concatenate([self.added, other.added]),
        )


class Kept:
    """Keeps rows of two tensors, drawn evenly from all; others that see as many draw the same. Runs in the worker.

    Samples go to two halves in turn, as those of `Fit`.

    Args:
        window: How the layer reads its input.
        most: Rows to keep of each half.
        shortcut: The candidate's tensor is one that is added to the layer's results, not its input.

    Attributes:
        halves: For each half what is kept of the reference and of the candidate; None: nothing yet.
    """

    def __init__(self, window: Window, most: int, *, shortcut: bool = False) -> None:
        self.window = window
        self.most = most
        self.shortcut = shortcut
        self.halves: list[tuple[Array, Array] | None] = [None, None]
        self._keys = [np.zeros(0), np.zeros(0)]
        self._random = [np.random.default_rng(half) for half in range(2)]
        self._samples = 0

    def update(self, reference: Array, candidate: Array) -> None:
        """Take in what the one model gives and the other reads; samples lie along the first axis."""
        if self.shortcut:
            with contextlib.suppress(ValueError):  # a model may round to other lengths
                candidate = np.broadcast_to(candidate, reference.shape)
        fits = not self.shortcut or candidate.shape == reference.shape
        for half in range(2):
            part = slice((half + self._samples) % 2, None, 2)
            if fits and len(reference[part]):
                results, now = self.window.results(reference[part]), candidate[part]
                rows = self.window.results(now) if self.shortcut else self.window.rows(now)[0]
                if len(rows) == len(results):
                    self._keep(half, results, rows)
        self._samples += len(reference)

    def _keep(self, half: int, *new: Array) -> None:
        """Each row has a random key, and those with the least are kept."""
        keys = np.append(self._keys[half], self._random[half].random(len(new[0])))
        chosen = np.sort(np.argsort(keys, kind="stable")[: self.most])
        known = self.halves[half]
        old = len(self._keys[half])
        kept = [
            np.concatenate([array[chosen[chosen < old]], fresh[chosen[chosen >= old] - old]])
            for array, fresh in zip(known or [each[:0] for each in new], new, strict=True)
        ]
        self.halves[half] = kept[0], kept[1]
        self._keys[half] = keys[chosen]


def rows_to_keep(shape: tuple[int, ...]) -> int:
    """Of each half, for a layer with so many inputs and outputs."""
    return max(1, MAX_BYTES // (8 * (shape[0] + 2 * shape[1])))


def read_rows(kept: Kept, shortcut: Kept | None, offset: Array | float, bounds: tuple[float, float]) -> list[Rows]:
    """The rows of both halves without those that are not finite; empty where there are none."""
    found = []
    for half in range(2):
        pair = kept.halves[half]
        if pair is None:
            return []
        targets, inputs = pair
        added = np.zeros_like(targets)
        if shortcut is not None:
            other = shortcut.halves[half]
            if other is None or not np.array_equal(other[0], targets, equal_nan=True):
                return []  # they have not seen the same runs
            added = other[1]
        added = np.asarray(added + np.asarray(offset), np.float32)
        finite = np.logical_and.reduce([np.isfinite(each).all(axis=1) for each in (inputs, targets, added)])
        if not finite.any():
            return []
        found.append(Rows(with_ones(inputs[finite]), targets[finite], added[finite], *bounds))
    return found


def fit_behind(now: Array, alive: Array, rows: Rows, ridge: float, start: Array) -> Array:
    """Weights with little error behind the activation, tied to those of now.

    Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks for Classification and Detection", arXiv
    1505.06798, section 3.2: auxiliary results and weights in turn.

    Args:
        now: Weights with the bias as last row, shape (inputs + 1, outputs).
        alive: The rows that may change.
        rows: What to fit.
        ridge: How strong the tie is, as a share of the mean energy of the inputs.
        start: Weights to start from.
    """
    inputs = rows.inputs[:, alive]
    products = (inputs.T @ inputs).astype(np.float64)
    tied = np.full(len(products), ridge * max(float(np.mean(np.diag(products)[:-1])), 1e-300))
    tied[-1] = 1e-6 * len(inputs)
    inverse = np.linalg.inv(products + np.diag(tied))
    weights = start.copy()
    for penalty in PENALTIES:
        before = rows.before(weights)
        left = inputs.T @ (rows.auxiliary(before, penalty) - before)
        weights[alive] += inverse @ (left - tied[:, None] * (weights - now)[alive])
    return weights
