"""K-means in one dimension: the few values that stand for many with least squared error.

Clusters of sorted values are runs, so the best clustering is a shortest path: Wang & Song 2011, "Ckmeans.1d.dp: Optimal
k-means Clustering in One Dimension by Dynamic Programming", the R Journal 3(2). The best last cluster begins no earlier
for a longer run than for a shorter one (also where centres are whole numbers, or one is fixed at 0), so that divide
and conquer finds it in O(k n log n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["code_book", "codebook", "nearest_of"]

Array = np.ndarray[Any, Any]

RUNS = 4096
"""Of sorted floats. Values in one run, of that share of all values and of that share of the whole range, stay together:
the error is that of the best codebook to within 0.1 % (up to 64 values; without the ranges a long tail would have few
runs)."""


def codebook(values: Array, size: int, *, weights: Array | None = None, keep_zeros: bool = True) -> Array:
    """The values that stand for all others with least weighted squared error.

    Args:
        values: Finite float32 values of any shape.
        size: How many values the codebook may have.
        weights: What the squared error of each value counts, positive, broadcastable over the values; None: 1.
        keep_zeros: Pin one value to 0 where there are zeros, and let zeros not weigh in otherwise.

    Returns:
        At most `size` float32 values, sorted. Values that are no more than that are their own codebook.

    Example:
        >>> codebook(np.array([0.0, 1.0, 1.1, 5.0, 5.2], np.float32), 3).tolist()
        [0.0, 1.0499999523162842, 5.099999904632568]
    """
    masses = None
    if weights is None:
        ordered = np.sort(values, axis=None)
    else:
        order = np.argsort(values, axis=None)
        ordered = values.reshape(-1)[order]
        masses = np.broadcast_to(weights, values.shape).reshape(-1)[order].astype(np.float64)
    edges = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [ordered.size]])
    if len(edges) - 1 <= size:
        return ordered[edges[:-1]] if ordered.size else ordered
    zeros = keep_zeros and bool(np.any(ordered == 0))
    if zeros:
        masses = None if masses is None else masses[ordered != 0]
        ordered = ordered[ordered != 0]
    edges = _runs(ordered)
    middle = 0.0 if zeros else float(ordered[ordered.size // 2])  # the sums lose least there
    moved = ordered.astype(np.float64) - middle
    weighted = moved if masses is None else masses * moved
    mass = np.arange(ordered.size + 1.0) if masses is None else _prefix(masses)
    sums, squares = _prefix(weighted), _prefix(weighted * moved)
    pinned = None
    if zeros:  # an atom of no weight, which no run lies across
        place = int(np.searchsorted(ordered, 0))
        edges = np.union1d(edges, [place])
        pinned = int(np.searchsorted(edges, place))
        edges = np.insert(edges, pinned, place)
    atoms = _Atoms(mass[edges], sums[edges], squares[edges], pinned)
    return np.unique((atoms.centres(size) + middle).astype(np.float32))


def code_book(codes: Array, weights: Array, size: int, *, zero: int | None = None) -> Array:
    """The integer codes that stand for all others with least weighted squared error.

    Args:
        codes: int8 or uint8, any shape.
        weights: What the squared error of each code counts, positive, broadcastable over the codes.
        size: How many codes the codebook may have.
        zero: A code that is in the codebook, and whose own occurrences do not weigh in otherwise.

    Returns:
        At most `size` codes, sorted, of the type of `codes`.

    Example:
        >>> codes = np.array([[-9, -8, 0, 3], [-7, 0, 0, 3]], np.int8)
        >>> code_book(codes, np.ones(1), 3, zero=0).tolist()
        [-8, 0, 3]
    """
    lowest = int(np.iinfo(codes.dtype).min)
    places = (codes.astype(np.int16) - lowest).reshape(-1)
    present = np.flatnonzero(np.bincount(places, minlength=256))
    if present.size <= size:
        return (present + lowest).astype(codes.dtype)
    mass = np.bincount(places, np.broadcast_to(weights, codes.shape).reshape(-1).astype(np.float64), minlength=256)
    origin = lowest if zero is None else zero
    values = np.arange(256, dtype=np.float64) + lowest - origin
    pinned = None if zero is None else zero - lowest
    if pinned is not None:
        mass[pinned] = 0.0
    masses, sums, squares = (_prefix(terms) for terms in (mass, mass * values, mass * values**2))
    centres = _Atoms(masses, sums, squares, pinned, whole=True).centres(size)
    return np.unique(centres + origin).astype(codes.dtype)


def nearest_of(values: Array, centres: Array) -> Array:
    """Each value's nearest codebook value, in the type of the codebook."""
    wide = centres.astype(np.float64)
    return np.asarray(centres[np.searchsorted((wide[1:] + wide[:-1]) / 2, values)])


def _prefix(terms: Array) -> Array:
    """Sums of the first n terms, from n = 0 on."""
    return np.concatenate([[0.0], np.cumsum(terms)])


def _runs(ordered: Array) -> Array:
    """Where runs of sorted values begin and end that may stay together: all, if there are few values."""
    if ordered.size <= 2 * RUNS:
        return np.arange(ordered.size + 1)
    counted = np.linspace(0, ordered.size, RUNS + 1).astype(np.int64)
    low, high = float(ordered[0]), float(ordered[-1])
    return np.union1d(counted, np.searchsorted(ordered, np.linspace(low, high, RUNS + 1)[1:-1]))


@dataclass(frozen=True)
class _Atoms:
    """Sorted values, or runs of them, by prefix sums of length atoms + 1.

    Attributes:
        mass: Of weights.
        total: Of weighted values.
        square: Of weighted squared values.
        pinned: The atom whose cluster has the centre 0, which it is itself.
        whole: Whether centres are whole numbers: of a parabola, the one nearest to its least point is the best.
    """

    mass: Array
    total: Array
    square: Array
    pinned: int | None = None
    whole: bool = False

    def _clusters(self, start: Array, end: Array) -> tuple[Array, Array]:
        """The centres of clusters of the atoms from `start` to before `end`, and what they cost."""
        mass, total = self.mass[end] - self.mass[start], self.total[end] - self.total[start]
        centres = np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)
        if self.whole:
            np.rint(centres, out=centres)
        if self.pinned is not None:
            centres[(start <= self.pinned) & (self.pinned < end)] = 0.0
        costs = self.square[end] - self.square[start] - centres * (2 * total - centres * mass)
        return centres, costs

    def centres(self, size: int) -> Array:
        """The centres of the cheapest clustering into `size` clusters."""
        atoms = len(self.mass) - 1
        ends = np.arange(atoms + 1)
        least = self._clusters(np.zeros_like(ends), ends)[1]
        begins = []
        for count in range(2, min(size, atoms) + 1):
            least, begin = self._one_more(least, count)
            begins.append(begin)
        cuts = [atoms]
        for begin in reversed(begins):
            cuts.append(int(begin[cuts[-1]]))
        edges = np.array([0, *cuts[::-1]])
        return self._clusters(edges[:-1], edges[1:])[0]

    def _one_more(self, least: Array, count: int) -> tuple[Array, Array]:
        """What the first n atoms cost in `count` clusters, for each n, and where the last one begins.

        Args:
            least: The same for one cluster less.
            count: At least 2.
        """
        atoms = len(least) - 1
        found, begin = np.full(atoms + 1, np.inf), np.zeros(atoms + 1, np.int64)
        # For n from `low` to `high`, the last cluster begins from `first` to `last`; all halves of a level at once.
        low, high, first, last = (np.array([edge]) for edge in (count, atoms, count - 1, atoms - 1))
        while low.size:
            middle = (low + high) // 2
            lengths = np.minimum(last, middle - 1) - first + 1
            offsets = np.cumsum(lengths) - lengths
            starts = np.arange(lengths.sum()) + np.repeat(first - offsets, lengths)
            costs = least[starts] + self._clusters(starts, np.repeat(middle, lengths))[1]
            found[middle] = np.minimum.reduceat(costs, offsets)
            hits = np.flatnonzero(costs == np.repeat(found[middle], lengths))
            best = starts[hits[np.searchsorted(hits, offsets)]]
            begin[middle] = best
            low, high = np.append(low, middle + 1), np.append(middle - 1, high)
            first, last = np.append(first, best), np.append(best, last)
            some = low <= high
            low, high, first, last = low[some], high[some], first[some], last[some]
        return found, begin
