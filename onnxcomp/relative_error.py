"""The relative error of an output, and how sure it is: of few samples, one can make most of the error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["Energies", "energies", "relative_error"]

Array = np.ndarray[Any, Any]

CONSTANT_BELOW = 1e-6
"""An output that varies by less, relative to its size, varies by float32 rounding alone: it is a constant."""

NORMAL_95 = 1.96
"""Within so many standard errors a mean lies with 95%."""


@dataclass(frozen=True)
class Energies:
    """Sums of squares of each sample: of the difference, and of what it is measured against.

    Attributes:
        noise: (samples,) float64, of the difference.
        whole: (samples,) of the reference.
        varying: (samples,) of the reference without its mean over the samples; the same as `whole` where samples differ
            in shape or the reference does not depend on the input.
        constant: Whether the reference does not depend on the input.
    """

    noise: Array
    whole: Array
    varying: Array
    constant: bool = False

    def error(self, *, centred: bool) -> float:
        """The root mean square of the difference over that of the reference, or of its varying part."""
        return float(_ratio(self.noise.sum(), (self.varying if centred else self.whole).sum()))

    def interval(self, *, centred: bool) -> tuple[float, float]:
        """The 95% interval of `error`, by the standard error of a ratio of sums (Cochran, Sampling Techniques, 6.4).

        A sample's difference counts with its reference, so that samples of other sizes but of the same error are sure.
        One sample tells nothing of others: then the interval is the error itself.

        Example:
            >>> alike, one = np.full(8, 0.01), np.array([0.08, 0, 0, 0, 0, 0, 0, 0])
            >>> made = [Energies(noise, np.ones(8), np.ones(8)) for noise in (alike, one)]
            >>> [round(each.error(centred=False), 2) for each in made]
            [0.1, 0.1]
            >>> [round(each.interval(centred=False)[1], 2) for each in made]
            [0.1, 0.17]
        """
        signal, count = self.varying if centred else self.whole, len(self.noise)
        error, total = self.error(centred=centred), float(signal.sum())
        if count < 2 or not 0 < error < math.inf:
            return error, error
        ratio = error**2
        spread = math.sqrt(count / (count - 1) * float(np.square(self.noise - ratio * signal).sum())) / total
        return math.sqrt(max(0.0, ratio - NORMAL_95 * spread)), math.sqrt(ratio + NORMAL_95 * spread)


def energies(pairs: Sequence[tuple[Array, Array]], counts: Sequence[int] | None = None) -> Energies:
    """Compare an output over several runs.

    Args:
        pairs: (reference, candidate) of each run, of equal shapes; the first axis is the samples.
        counts: The samples of each run; an output whose first axis has another size counts as one. None: each run is
            one sample.
    """
    mean: Any = 0.0
    if len({a.shape[1:] for a, _ in pairs}) == 1 and all(a.ndim for a, _ in pairs):
        total = sum(np.sum(np.where(np.isfinite(a), a, 0), axis=0, dtype=np.float64) for a, _ in pairs)
        mean = total / max(1, sum(len(a) for a, _ in pairs))
    noise, whole, varying = [], [], []
    for (a, b), count in zip(pairs, counts or [1] * len(pairs), strict=True):
        reference, candidate = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(reference) & np.isfinite(candidate)
        if not finite.all():
            if not np.array_equal(reference[~finite], candidate[~finite], equal_nan=True):
                return Energies(np.array([math.inf]), np.ones(1), np.ones(1))
            reference, candidate = np.where(finite, reference, 0), np.where(finite, candidate, 0)
        noise.append(_energy(reference - candidate, count))
        whole.append(_energy(reference, count))
        varying.append(_energy(np.where(finite, reference - mean, 0), count))
    found = Energies(np.concatenate(noise), np.concatenate(whole), np.concatenate(varying))
    is_constant = found.varying.sum() <= found.whole.sum() * CONSTANT_BELOW**2
    return replace(found, varying=found.whole, constant=True) if is_constant else found


def relative_error(pairs: Sequence[tuple[Array, Array]]) -> float:
    """The root mean square of the difference over that of the reference; see `energies`."""
    return energies(pairs).error(centred=False)


def _energy(values: Array, count: int) -> Array:
    """The sum of squares of each sample, or of all where the first axis is not the samples."""
    squares = np.square(values)
    if count > 1 and values.ndim and len(values) == count:
        return np.asarray(squares.reshape(count, -1).sum(axis=1))
    return np.array([squares.sum()])


def _ratio(noise: Any, signal: Any) -> Any:
    """The square root of noise over signal; no noise is no error, noise without a signal an infinite one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(noise) == 0, 0.0, np.sqrt(np.divide(noise, signal)))
