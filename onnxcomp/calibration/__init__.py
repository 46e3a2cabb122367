"""Streaming statistics of activations, in constant memory: they run where the activations are, in the worker.

Every method sees the data once. Those that look for the best range keep a histogram that grows its range.
"""

from __future__ import annotations

from onnxcomp.calibration.calibrator import Calibrator, MinMax, MovingAverage
from onnxcomp.calibration.histogram import BINS, Histogram, Percentile
from onnxcomp.calibration.search import MSE, Entropy
from onnxcomp.errors import OptionError

__all__ = [
    "BINS",
    "METHODS",
    "MSE",
    "Calibrator",
    "Entropy",
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "make_calibrator",
]

METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")
"""The names of the methods."""


def make_calibrator(
    method: str, percentile: float = 99.99, *, levels: int = 256, symmetric: bool = False
) -> Calibrator:
    """A fresh calibrator.

    Args:
        method: One of `METHODS`.
        percentile: The percentage of values that "percentile" covers.
        levels: How many values the quantized type has (256 for 8 bits); used by "entropy" and "mse".
        symmetric: Whether the zero point is fixed in the middle; used by "entropy" and "mse".

    Raises:
        OptionError: No method is called so, or there are fewer than three levels.

    Example:
        >>> type(make_calibrator("mse", levels=65536)).__name__
        'MSE'
    """
    match method:
        case "minmax":
            return MinMax()
        case "moving-average":
            return MovingAverage()
        case "percentile":
            return Percentile(percentile)
        case "entropy":
            return Entropy(levels, symmetric=symmetric)
        case "mse":
            return MSE(levels, symmetric=symmetric)
    message = f"no calibration method is called {method!r}; there are {', '.join(METHODS)}"
    raise OptionError(message)
