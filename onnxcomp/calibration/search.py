"""Ranges that are searched for over a histogram: the least divergence, and the least squared error.

A candidate is the grid that the quantizer would make of a range: evenly spaced levels, zero among them. Both ends of
the range are tried, first together and then one by one, down to a thousandth of what was seen.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np

from onnxcomp.calibration.histogram import BINS, Histogram
from onnxcomp.errors import OptionError

__all__ = ["MSE", "Entropy"]

Array = np.ndarray[Any, Any]

SHARES = np.exp2(-np.append(np.arange(16) / 16.0, np.arange(4, 41) / 4.0))
"""Shares of what was seen that an end of the range is tried at."""

REFINED = np.exp2(np.linspace(0.25, -0.25, 17))
"""Factors of the best share that are tried next."""

MOST_BINS = BINS // 2
"""Bins that squared errors are computed of; of more, pairs are merged. Eight for each 8-bit step of the range."""


class _Searched(Histogram):
    """Finds the range of least cost."""

    def __init__(self, levels: int = 256, *, symmetric: bool = False) -> None:
        super().__init__()
        if levels < 3:
            message = f"calibration: levels must be at least 3, got {levels}"
            raise OptionError(message)
        self.levels = levels
        self.zeros = 0
        self.symmetric = symmetric

    def _take(self, values: Array, low: float, high: float) -> None:
        super()._take(values, low, high)
        self.zeros += values.size - int(np.count_nonzero(values))

    def range(self) -> tuple[float, float]:
        """The range of least cost, zero included; never beyond what was seen."""
        edges, counts = self._bins()
        if not counts.any() or self.low == self.high:
            return self.low, self.high
        # Scaled to at most 1, so that squares neither overflow nor vanish; by a power of two, which is exact.
        unit = 2.0 ** min(math.frexp(max(abs(self.low), abs(self.high)))[1], 1023)
        low, high = self._search(edges / unit, counts.astype(np.float64))
        return low * unit, high * unit

    def _bins(self) -> tuple[Array, Array]:
        """The histogram without exact zeros, which every grid holds."""
        edges, counts = self.span()
        if self.zeros:
            counts = counts.copy()
            counts[np.searchsorted(edges[1:-1], 0.0, side="right")] -= self.zeros
        return edges, counts

    def _search(self, edges: Array, counts: Array) -> tuple[float, float]:
        """The best low and high for a histogram whose values are at most 1."""
        full = self._whole(edges)

        def best(ends: Array, start: Array, moved: Array, factors: Array) -> Array:
            tried = np.append(np.clip(np.where(moved, start * factors[:, None], ends), *full), [ends], axis=0)
            # Of equals the first, which is the widest: clipping for nothing is no gain.
            return np.asarray(tried[np.argmin(self._cost(edges, counts, tried))])

        one_by_one = [] if self.symmetric or not full.all() else [np.array([False, True]), np.array([True, False])]
        ends = full
        for moved in (np.array([True, True]), *one_by_one):
            ends = best(ends, full, moved, SHARES)
            ends = best(ends, ends, moved, REFINED)
        for moved in one_by_one:
            ends = best(ends, ends, moved, REFINED)
        return float(ends[0]), float(ends[1])

    def _whole(self, edges: Array) -> Array:
        """The range that clips nothing: (low, high)."""
        full = np.array([min(edges[0], 0.0), max(edges[-1], 0.0)])
        return np.array([-1.0, 1.0]) * np.max(np.abs(full)) if self.symmetric else full

    def _grids(self, ends: Array) -> tuple[Array, Array, Array]:
        """The step and the numbers of the lowest and the highest level, where zero is level 0; each (n, 1)."""
        above = (self.levels - 1) // 2 if self.symmetric else self.levels - 1
        reach = ends[:, 1:] if self.symmetric else ends[:, 1:] - ends[:, :1]
        step = np.maximum(reach / above, np.finfo(np.float64).tiny)
        lowest = np.full_like(step, -above) if self.symmetric else np.rint(ends[:, :1] / step)
        return step, lowest, lowest + above * (2 if self.symmetric else 1)

    @abstractmethod
    def _cost(self, edges: Array, counts: Array, ends: Array) -> Array:
        """The cost of each candidate.

        Args:
            edges: Of the histogram's bins, (m + 1,).
            counts: Of the histogram, (m,).
            ends: The candidates, (n, 2): low at most 0, high at least 0.

        Returns:
            (n,).
        """


class MSE(_Searched):
    """The range that makes the smallest expected squared error, of rounding and of clipping.

    Values are taken to be spread evenly over their bin, so it also holds for steps that are finer than the bins (16
    bits): rounding x to multiples of s costs, integrated from 0 to x = k s + f with abs(f) <= s / 2,
    k s^3 / 12 + f^3 / 3.

    Args:
        levels: How many values the quantized type has.
        symmetric: Whether the zero point is fixed in the middle.

    Example:
        >>> watch = MSE()
        >>> watch.update(np.linspace(-1.0, 1.0, 10_001)); watch.range()
        (-1.0, 1.0)
    """

    def _bins(self) -> tuple[Array, Array]:
        edges, counts = super()._bins()
        if counts.size > MOST_BINS:
            odd = counts.size % 2
            counts = np.append(counts, [0] * odd).reshape(-1, 2).sum(axis=1)
            edges = np.append(edges[:-1:2], edges[-1])
        return edges, counts

    def _cost(self, edges: Array, counts: Array, ends: Array) -> Array:
        step, lowest, highest = self._grids(ends)
        widths = np.diff(edges)
        bottom, top = lowest * step, highest * step
        level = np.clip(np.rint(edges / step), lowest, highest)
        # Beyond the last level f is what is clipped, and the same formula holds.
        rest = edges - level * step
        rest *= rest * rest / 3.0
        level *= step**3 / 12.0
        rest += level
        mean = np.diff(rest, axis=1)
        flat = widths <= 0.0
        np.divide(mean, widths, out=mean, where=~flat)
        if flat.any():  # an outer bin with one value, at an extreme
            at = edges[1:][flat]
            mean[:, flat] = (np.clip(np.rint(at / step) * step, bottom, top) - at) ** 2
        return np.asarray(mean @ counts)


class Entropy(_Searched):
    """The range that keeps most information: the least Kullback-Leibler divergence of quantized from original values.

    Migacz 2017, "8-bit Inference with TensorRT" (GTC S7310): P is the histogram inside the range, what is clipped
    added to its end bins; Q the histogram inside, each level's sum spread evenly over the level's bins that hold
    values. Here for any number of levels, zero point and position of the range, with levels where the quantizer has
    them. As Q is constant over a level, KL(P, Q) follows from sums over levels, taken as differences of running sums.

    As in the talk, steps are never finer than the bins: at 8 bits the range is cut to a sixteenth at most.

    Args:
        levels: How many values the quantized type has.
        symmetric: Whether the zero point is fixed in the middle.

    Example:
        >>> watch = Entropy()
        >>> watch.update(np.linspace(-1.0, 1.0, 40_000)); watch.range()
        (-1.0, 1.0)
    """

    def _search(self, edges: Array, counts: Array) -> tuple[float, float]:
        if self.levels > counts.size:  # every bin has a level of its own: the whole range loses nothing
            low, high = self._whole(edges)
            return float(low), float(high)
        return super()._search(edges, counts)

    def _cost(self, edges: Array, counts: Array, ends: Array) -> Array:
        step, lowest, highest = self._grids(ends)
        middles = (edges[1:] + edges[:-1]) / 2.0
        sums, filled, logs = (_running(part) for part in (counts, counts > 0, _xlogx(counts)))
        total = sums[-1]
        bounds = (lowest + np.arange(int(highest[0, 0] - lowest[0, 0]) + 2) - 0.5) * step
        index = np.searchsorted(middles, bounds)  # level j holds the bins index[:, j] to index[:, j + 1]
        inside, bins = np.diff(sums[index], axis=1), np.diff(filled[index], axis=1)
        first, last = index[:, 0], index[:, -1]
        kept, below, above = sums[last] - sums[first], sums[first], total - sums[last]
        spread = np.log(np.where(inside > 0, inside, 1.0) / np.maximum(bins, 1))
        cost = logs[last] - logs[first] - np.sum(inside * spread, axis=1)
        # What is clipped joins the end bins; half a value stands for Q where such a bin is empty.
        mass = kept
        for end, clipped, level in ((first, below, 0), (last - 1, above, -1)):
            present = counts[np.clip(end, 0, counts.size - 1)]
            q = np.where(present > 0, spread[:, level], np.log(0.5))
            cost += _xlogx(present + clipped) - _xlogx(present) - clipped * q
            mass = mass + np.where((present > 0) | (clipped <= 0), 0.0, 0.5)
        # Steps finer than the bins say nothing: P and Q agree on what is clipped, however much that is.
        width = (edges[-1] - edges[0]) / counts.size
        cost = cost / total + np.log(np.maximum(mass, 0.5) / total)
        return np.where((kept > 0) & (step[:, 0] >= width), cost, np.inf)


def _running(values: Array) -> Array:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _xlogx(values: Array) -> Array:
    """Compute x log x, 0 at 0."""
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)))
