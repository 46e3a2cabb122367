"""What all calibration methods share, and those that need no more than the extremes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

__all__ = ["Calibrator", "MinMax", "MovingAverage"]

Array = np.ndarray[Any, Any]

CHUNK = 1 << 16
"""Values that are looked at together: few enough to stay in the processor's cache over all steps."""


class Calibrator(ABC):
    """Watches one tensor over many runs, and gives the range that quantization should cover.

    Attributes:
        nonfinite: How many values were NaN or infinite; they never become part of a range.
        count: How many finite values were seen.
        low: The smallest finite value; 0 while there is none.
        high: The largest finite value; 0 while there is none.
    """

    def __init__(self) -> None:
        self.nonfinite = 0
        self.count = 0
        self.low = 0.0
        self.high = 0.0

    def update(self, array: Array) -> None:
        """Take in one more run's values, of any shape and any numeric dtype."""
        values = np.asarray(array).reshape(-1)
        if values.dtype.kind not in "fiub":  # bfloat16 and the like
            values = values.astype(np.float32)
        lowest, highest = math.inf, -math.inf
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            low, high = float(chunk.min()), float(chunk.max())
            # NaN spreads to both extremes, so these tell about all values without a look at each.
            if not (math.isfinite(low) and math.isfinite(high)):
                finite = chunk[np.isfinite(chunk)]
                self.nonfinite += chunk.size - finite.size
                if not finite.size:
                    continue
                chunk, low, high = finite, float(finite.min()), float(finite.max())
            self.low = min(self.low, low) if self.count else low
            self.high = max(self.high, high) if self.count else high
            self.count += chunk.size
            lowest, highest = min(lowest, low), max(highest, high)
            self._take(chunk, low, high)
        if lowest <= highest:
            self._end_run(lowest, highest)

    def _take(self, values: Array, low: float, high: float) -> None:
        """Use some finite values of a run, whose extremes are given; nothing where the extremes are enough."""
        del values, low, high

    def _end_run(self, low: float, high: float) -> None:
        """Use the extremes of a whole run; nothing where runs do not matter."""
        del low, high

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


class MovingAverage(Calibrator):
    """The extremes of a run, averaged over the runs.

    The plain mean of the first `1 / rate` runs, an exponential moving average from there on: an average that starts
    with its final rate would know little but the first run.

    Args:
        rate: The least weight of a new run; 0.01 is what PyTorch and ONNX Runtime take.

    Example:
        >>> watch = MovingAverage()
        >>> watch.update(np.array([-1.0, 1.0])); watch.update(np.array([-3.0, 2.0]))
        >>> watch.range()
        (-2.0, 1.5)
    """

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.runs = 0
        self.mean_low = 0.0
        self.mean_high = 0.0

    def _end_run(self, low: float, high: float) -> None:
        self.runs += 1
        weight = max(1.0 / self.runs, self.rate)
        self.mean_low += weight * (low - self.mean_low)
        self.mean_high += weight * (high - self.mean_high)

    def range(self) -> tuple[float, float]:
        """The mean extremes."""
        return self.mean_low, self.mean_high
