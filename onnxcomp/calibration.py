"""Streaming statistics of activations, in constant memory: they run where the activations are, in the worker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

__all__ = ["Calibrator", "MinMax", "Percentile", "make_calibrator"]

Array = np.ndarray[Any, Any]

BINS = 4096
"""Of the percentile histogram. The range is found to about 1/2000 of its width, finer than an 8-bit step."""


class Calibrator(ABC):
    """Watches one tensor over many runs, and gives the range that quantization should cover.

    Attributes:
        nonfinite: How many values were NaN or infinite; they never become part of a range.
        count: How many finite values were seen.
    """

    def __init__(self) -> None:
        self.nonfinite = 0
        self.count = 0
        self.low = 0.0
        self.high = 0.0

    def update(self, array: Array) -> None:
        """Take in one more run's values, of any shape and any numeric dtype."""
        values = np.asarray(array).reshape(-1)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            finite = np.isfinite(values)
            self.nonfinite += int(values.size - np.count_nonzero(finite))
            values = values[finite]
        if values.size:
            low, high = float(values.min()), float(values.max())
            self.low = low if not self.count else min(self.low, low)
            self.high = high if not self.count else max(self.high, high)
            self.count += values.size
            self._take(values, low, high)

    def _take(self, values: Array, low: float, high: float) -> None:
        """Use the finite values, whose extremes are given; nothing more for min-max."""
        del values, low, high

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The range to cover: (low, high)."""


class MinMax(Calibrator):
    """All values that were seen.

    Example:
        >>> watch = MinMax()
        >>> watch.update(np.array([1.0, -3.0])); watch.update(np.array([2.0]))
        >>> watch.range()
        (-3.0, 2.0)
    """

    def range(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return self.low, self.high


class Percentile(Calibrator):
    """All values but a small share at the two ends.

    A histogram whose bins are 2**k wide and start at multiples of that: when a value falls outside, neighbouring bins
    are merged (k grows), so one pass over the data is enough and memory is constant.

    Args:
        percentile: The percentage of values to cover; half of the rest is cut at each end.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile
        self.exponent: int | None = None
        self.first = 0
        self.counts = np.zeros(BINS, np.int64)

    def _take(self, values: Array, low: float, high: float) -> None:
        self._cover(low, high)
        assert self.exponent is not None
        index = np.floor(np.ldexp(values.astype(np.float64), -self.exponent)).astype(np.int64) - self.first
        self.counts += np.bincount(index, minlength=BINS)

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until the histogram reaches from the lowest to the highest value seen so far."""
        if self.exponent is None:
            widest = max(high - low, abs(low), abs(high), float(np.finfo(np.float32).tiny))
            self.exponent = int(np.frexp(widest)[1]) - int(np.log2(BINS)) + 1
            self.first = self._middle(self.exponent)
        last = self.first + BINS - 1
        if self.first <= _bin(low, self.exponent) and _bin(high, self.exponent) <= last:
            return
        exponent = self.exponent
        while _bin(self.high, exponent) - _bin(self.low, exponent) >= BINS:
            exponent += 1
        first = self._middle(exponent)
        used = np.flatnonzero(self.counts)
        merged = np.zeros(BINS, np.int64)
        np.add.at(merged, ((used + self.first) >> (exponent - self.exponent)) - first, self.counts[used])
        self.exponent, self.first, self.counts = exponent, first, merged

    def _middle(self, exponent: int) -> int:
        """The first bin of a histogram with as much room below all values seen so far as above them."""
        lowest, highest = _bin(self.low, exponent), _bin(self.high, exponent)
        return lowest - (BINS - 1 - (highest - lowest)) // 2

    def bins(self) -> tuple[Array, Array]:
        """The middles of the bins that hold values, and how many each holds."""
        if self.exponent is None:
            return np.zeros(0), np.zeros(0, np.int64)
        used = np.flatnonzero(self.counts)
        return np.ldexp(used + self.first + 0.5, self.exponent), self.counts[used]

    def range(self) -> tuple[float, float]:
        """The edges of the bins that hold the wanted share, never beyond the extremes that were seen."""
        if self.exponent is None:
            return 0.0, 0.0
        cut = self.count * (100.0 - self.percentile) / 200.0
        total = np.cumsum(self.counts)
        first = int(np.searchsorted(total, cut, side="right"))
        last = int(np.searchsorted(total, self.count - cut, side="left"))
        low = float(np.ldexp(float(self.first + first), self.exponent))
        high = float(np.ldexp(float(self.first + last + 1), self.exponent))
        return max(low, self.low), min(high, self.high)


def _bin(value: float, exponent: int) -> int:
    """The bin that holds a value, where bins are 2**exponent wide and bin 0 starts at 0."""
    return int(np.floor(np.ldexp(value, -exponent)))


def make_calibrator(method: str, percentile: float = 99.99) -> Calibrator:
    """A fresh calibrator: "minmax" or "percentile"."""
    return Percentile(percentile) if method == "percentile" else MinMax()
