"""A histogram that grows with the data, and the percentiles that it gives."""

from __future__ import annotations

import math
from abc import ABC
from typing import Any

import numpy as np

from onnxcomp.calibration.calibrator import Calibrator

__all__ = ["BINS", "Histogram", "Percentile"]

Array = np.ndarray[Any, Any]

BINS = 4096
"""Of a histogram. A range is found to about 1/2000 of its width, finer than an 8-bit step."""

FLOAT32_EXPONENTS = 120
"""Bin widths of 2**-k to 2**k have reciprocals in float32."""


class Histogram(Calibrator, ABC):
    """Counts values in bins that are 2**exponent wide and start at multiples of that.

    When a value falls outside, neighbouring bins are merged (the exponent grows): one pass over the data is enough,
    memory is constant, and no count is spread by guess.

    Attributes:
        exponent: The binary logarithm of the bins' width; None while there are no values.
        first: The first bin's number; bin 0 starts at 0.
        counts: Values in each bin, int64, (BINS,).
    """

    def __init__(self) -> None:
        super().__init__()
        self.exponent: int | None = None
        self.first = 0
        self.counts = np.zeros(BINS, np.int64)

    def _take(self, values: Array, low: float, high: float) -> None:
        self._cover(low, high)
        assert self.exponent is not None
        narrow = values.dtype in (np.float32, np.float16) and abs(self.exponent) <= FLOAT32_EXPONENTS
        # A power of two, and bins below 2**24: float32 is exact (but for values next to zero that underflow to it).
        scaled = np.multiply(values, 2.0**-self.exponent, dtype=np.float32 if narrow else np.float64)
        np.floor(scaled, out=scaled)
        scaled -= self.first
        self.counts += np.bincount(scaled.astype(np.intp), minlength=BINS)

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until the histogram reaches from the lowest to the highest value seen so far."""
        if self.exponent is None:
            widest = max(high - low, abs(low), abs(high), float(np.finfo(np.float32).tiny))
            widest = min(widest, float(np.finfo(np.float64).max))
            self.exponent = math.frexp(widest)[1] - int(math.log2(BINS)) + 1
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

    def span(self) -> tuple[Array, Array]:
        """The edges of all bins from the first to the last that holds values, and how many each holds.

        The outer edges are the extremes that were seen.

        Returns:
            (edges, counts): float64 (n + 1,), int64 (n,); n is 0 while there are no values.
        """
        if self.exponent is None:
            return np.zeros(1), np.zeros(0, np.int64)
        used = np.flatnonzero(self.counts)
        first, last = int(used[0]), int(used[-1])
        edges = np.ldexp(np.arange(first, last + 2, dtype=np.float64) + self.first, self.exponent)
        edges[0], edges[-1] = self.low, self.high
        return edges, self.counts[first : last + 1]


class Percentile(Histogram):
    """All values but a small share at the two ends.

    Args:
        percentile: The percentage of values to cover; half of the rest is cut at each end.

    Example:
        >>> watch = Percentile(98.0)
        >>> watch.update(np.append(np.zeros(999, np.float32), 1000.0)); watch.range()
        (0.0, 0.5)
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        """The edges of the bins that hold the wanted share, never beyond the extremes that were seen."""
        edges, counts = self.span()
        if not counts.size:
            return 0.0, 0.0
        cut = self.count * (100.0 - self.percentile) / 200.0
        total = np.cumsum(counts)
        first = int(np.searchsorted(total, cut, side="right"))
        last = int(np.searchsorted(total, self.count - cut, side="left"))
        return float(edges[first]), float(edges[last + 1])


def _bin(value: float, exponent: int) -> int:
    """The bin that holds a value, where bins are 2**exponent wide and bin 0 starts at 0."""
    return math.floor(math.ldexp(value, -exponent))
