"""Streaming statistics of a tensor's channels, in constant memory, for observers in the worker."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ChannelMoments"]

Array = np.ndarray[Any, Any]


class ChannelMoments:
    """Extremes, mean and mean square of each channel of one tensor over many runs.

    Args:
        axis: The channel axis, counted from the front (1 for images) or from the back (-1 for rows of features).

    Attributes:
        count: Values seen in each channel.
        low: The smallest value of each channel, float64 of shape (channels,); None before the first run.
        high: The largest value of each channel.
        nonfinite: How many values were NaN or infinite; runs that hold any are left out.

    Example:
        >>> moments = ChannelMoments(axis=-1)
        >>> moments.update(np.array([[1.0, -4.0], [3.0, 0.0]]))
        >>> moments.peak().tolist(), moments.mean().tolist(), moments.square().tolist()
        ([3.0, 4.0], [2.0, -2.0], [5.0, 8.0])
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.nonfinite = 0
        self.low: Array | None = None
        self.high: Array | None = None
        self._sum: Array | None = None
        self._square: Array | None = None

    def update(self, array: Array) -> None:
        """Take in one more run's values; tensors without the axis, or with another number of channels, are ignored."""
        values = np.asarray(array)
        if not -values.ndim <= self.axis < values.ndim or not values.size:
            return
        axis = self.axis % values.ndim
        others = tuple(i for i in range(values.ndim) if i != axis)
        low = values.min(axis=others).astype(np.float64)
        high = values.max(axis=others).astype(np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            self.nonfinite += int(values.size - np.count_nonzero(np.isfinite(values)))
            return
        if self.low is not None and self.low.shape != low.shape:
            return
        total = values.sum(axis=others, dtype=np.float64)
        square = np.einsum(values, list(range(values.ndim)), values, list(range(values.ndim)), [axis], dtype=np.float64)
        if self.low is None or self.high is None or self._sum is None or self._square is None:
            self.low, self.high, self._sum, self._square = low, high, total, square
        else:
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            self._sum, self._square = self._sum + total, self._square + square
        self.count += values.size // values.shape[axis]

    def peak(self) -> Array:
        """The largest magnitude of each channel; empty where nothing was seen."""
        if self.low is None or self.high is None:
            return np.zeros(0)
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def mean(self) -> Array:
        """The mean of each channel; empty where nothing was seen."""
        return np.zeros(0) if self._sum is None else self._sum / self.count

    def square(self) -> Array:
        """The mean square of each channel; empty where nothing was seen."""
        return np.zeros(0) if self._square is None else self._square / self.count
