"""How far a tensor of one model is from the same tensor of another, streaming, for observers in the worker."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["ChannelErrors", "TensorError"]

Array = np.ndarray[Any, Any]
Axes = tuple[int, ...]

BLOCK = 1 << 20
"""Values that are looked at together in float64: the memory an update needs beside the tensor itself."""


class ChannelErrors:
    """The error of each channel of a tensor, as sums over all runs; arrays are float64 of shape (channels,).

    Attributes:
        noise: Sum of squared differences.
        signal: Sum of squared reference values.
        shift: Sum of differences, candidate minus reference.
        low: The smallest finite reference value; infinite before the first.
        high: The largest; minus infinite before the first.
    """

    def __init__(self, channels: int) -> None:
        self.noise = np.zeros(channels)
        self.signal = np.zeros(channels)
        self.shift = np.zeros(channels)
        self.low = np.full(channels, math.inf)
        self.high = np.full(channels, -math.inf)

    def add(self, other: ChannelErrors) -> None:
        """Take in the sums of another run, with as many channels."""
        self.noise += other.noise
        self.signal += other.signal
        self.shift += other.shift
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)

    @property
    def peak(self) -> Array:
        """The largest magnitude of the reference; 0 where no finite value was seen."""
        seen = self.low <= self.high
        return np.where(seen, np.maximum(np.abs(self.low), np.abs(self.high)), 0.0)

    @property
    def sqnr_db(self) -> Array:
        """Signal-to-noise ratio; infinite where nothing differs, minus infinite where noise meets no signal."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 10 * np.log10(self.signal / self.noise)
        return np.where(self.noise == 0, math.inf, ratio)


class TensorError:
    """The error of one tensor over many runs, in constant memory: an observer of pairs of values.

    Signal is the sum of squares of the reference, noise that of the differences; both in float64. A value that is NaN
    or infinite alike in both models counts in neither; one that is so in one model only makes the error infinite, and
    so does a run in which the two shapes differ. What holds no floats is ignored (`count` stays 0).

    Args:
        axis: The channel axis, counted from the front (1 for images) or from the back (-1 for rows of features).

    Attributes:
        axis: The same.
        count: Values compared.
        nonfinite: Values that are NaN or infinite in the reference, the candidate or both.
        mismatched: Of these, those that are not the same in both.
        misshapen: Runs in which the shapes differ; nothing else of them counts.
        noise: Sum of squared differences.
        signal: Sum of squared reference values.
        shift: Sum of differences, candidate minus reference.
        max_abs_error: The largest difference.
        low: The smallest finite reference value; infinite before the first.
        high: The largest; minus infinite before the first.
        candidate_low: The same of the candidate.
        candidate_high: The same of the candidate.
        clip_noise: The noise in reference values beyond the candidate's extremes in the same run: what a range cuts.
        shape: Of the reference in the last run.
        channels: The error by channel; None without a channel axis, or where runs have different numbers of channels.

    Example:
        >>> error = TensorError(axis=-1)
        >>> error.update(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 4.5]], np.float32))
        >>> error.relative_error, round(error.sqnr_db, 3), error.mean_shift, error.channels.noise.tolist()
        (0.1, 20.0, 0.25, [0.0, 0.25])
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.count = 0
        self.nonfinite = 0
        self.mismatched = 0
        self.misshapen = 0
        self.noise = 0.0
        self.signal = 0.0
        self.shift = 0.0
        self.max_abs_error = 0.0
        self.low, self.high = math.inf, -math.inf
        self.candidate_low, self.candidate_high = math.inf, -math.inf
        self.clip_noise = 0.0
        self.shape: tuple[int, ...] | None = None
        self.channels: ChannelErrors | None = None
        self._uneven = False

    def update(self, reference: Any, candidate: Any) -> None:
        """Take in the values of one more run."""
        if not (_is_float(reference) and _is_float(candidate)):
            return
        self.shape = reference.shape
        if reference.shape != candidate.shape:
            self.misshapen += 1
            return
        if not reference.size:
            return
        low, high = _extremes(candidate)
        self.candidate_low, self.candidate_high = min(self.candidate_low, low), max(self.candidate_high, high)
        view = _by_channel(reference.shape, self.axis)
        run = ChannelErrors(view[1])
        ours, theirs = reference.reshape(view), candidate.reshape(view)
        for block in _blocks(view):
            channels = block[1]
            self._take(ours[block], theirs[block], (low, high), run, channels)
        self.noise += float(run.noise.sum())
        self.signal += float(run.signal.sum())
        self.shift += float(run.shift.sum())
        self.low, self.high = min(self.low, float(run.low.min())), max(self.high, float(run.high.max()))
        self._keep(run if reference.ndim > 1 else None)

    def _take(
        self, ours: Array, theirs: Array, extremes: tuple[float, float], run: ChannelErrors, channels: slice
    ) -> None:
        """Add a block of shape (outer, channels, inner) to the sums of a run."""
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        finite: Any = np.isfinite(a) & np.isfinite(b)
        self.count += int(np.count_nonzero(finite))
        if finite.all():
            finite = True
        else:
            odd = ~finite
            self.nonfinite += int(np.count_nonzero(odd))
            self.mismatched += int(np.count_nonzero(odd & ~((a == b) | (np.isnan(a) & np.isnan(b)))))
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        difference = b - a
        squared = np.square(difference)
        run.noise[channels] += squared.sum(axis=(0, 2))
        run.signal[channels] += np.square(a).sum(axis=(0, 2))
        run.shift[channels] += difference.sum(axis=(0, 2))
        low = a.min(axis=(0, 2), initial=math.inf, where=finite)
        high = a.max(axis=(0, 2), initial=-math.inf, where=finite)
        run.low[channels] = np.minimum(run.low[channels], low)
        run.high[channels] = np.maximum(run.high[channels], high)
        self.max_abs_error = max(self.max_abs_error, float(np.abs(difference).max()))
        if low.min() < extremes[0] or high.max() > extremes[1]:
            self.clip_noise += float(squared.sum(where=finite & ((a < extremes[0]) | (a > extremes[1]))))

    def _keep(self, run: ChannelErrors | None) -> None:
        """Add a run's channels to those of the others, if there are as many."""
        if self._uneven or run is None:
            return
        if self.channels is None:
            self.channels = run
        elif self.channels.noise.shape == run.noise.shape:
            self.channels.add(run)
        else:
            self.channels, self._uneven = None, True

    @property
    def relative_error(self) -> float:
        """Root mean square of the difference over that of the reference; infinite where values do not fit at all."""
        if self.misshapen or self.mismatched:
            return math.inf
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal > 0 else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal-to-noise ratio in dB: infinite where all is equal, minus infinite where the error is infinite."""
        error = self.relative_error
        if error == 0:
            return math.inf
        return -20 * math.log10(error) if math.isfinite(error) else -math.inf

    @property
    def mean_shift(self) -> float:
        """The mean of candidate minus reference."""
        return self.shift / self.count if self.count else 0.0

    @property
    def clip_share(self) -> float:
        """The share of the noise that is in values beyond what the candidate can say: a clipped tail, if large."""
        return self.clip_noise / self.noise if self.noise else 0.0

    @property
    def shift_share(self) -> float:
        """The share of the noise that a constant shift of each channel makes: what a bias correction could remove."""
        if self.channels is None or not self.noise or not self.count:
            return 0.0
        per_channel = self.count / self.channels.shift.size
        return float(np.square(self.channels.shift).sum() / per_channel / self.noise)


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _extremes(values: Array) -> tuple[float, float]:
    """The smallest and the largest finite value."""
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    finite = np.isfinite(values)
    return float(values.min(initial=math.inf, where=finite)), float(values.max(initial=-math.inf, where=finite))


def _by_channel(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """The shape (outer, channels, inner) that a tensor is looked at in; without channels all values are one's."""
    if len(shape) < 2 or not -len(shape) <= axis < len(shape):
        return 1, 1, math.prod(shape)
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _blocks(view: tuple[int, int, int]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a view into blocks of about `BLOCK` values.

    >>> [tuple((s.start, s.stop) for s in block) for block in _blocks((3, 2, BLOCK // 4))]
    [((0, 2), (0, 2), (0, 262144)), ((2, 3), (0, 2), (0, 262144))]
    """
    outer, channels, inner = view
    steps = [1, 1, 1]
    room = BLOCK
    for axis, size in ((2, inner), (1, channels), (0, outer)):
        steps[axis] = max(1, min(size, room))
        room //= max(1, size)
    for i in range(0, outer, steps[0]):
        for j in range(0, channels, steps[1]):
            for k in range(0, inner, steps[2]):
                yield (
                    slice(i, min(i + steps[0], outer)),
                    slice(j, min(j + steps[1], channels)),
                    slice(k, min(k + steps[2], inner)),
                )
