"""Let weights take few different values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._encoding import wanted
from onnxcomp_passes._stored import lift_constants, output_channel_axis

__all__ = ["Cluster", "codebook"]

Array = np.ndarray[Any, Any]

ROUNDS = 100
"""Of Lloyd's algorithm; from its start it settles in some tens."""

START_RUNS = 512
"""Of sorted values, whose best clustering is the start: more than twice the largest codebook."""


@register
@dataclass(frozen=True, kw_only=True)
class Cluster(Pass):
    """Replace each weight by the nearest value of a codebook of its tensor, found by K-means.

    ::

        before   Y = MatMul(X, W)      W: float32
        after    Y = MatMul(X, W)      W: float32, at most 2**bits different values, zeros where there were zeros

    The weights stay float32, so the file is as large as before: it gets smaller when it is compressed, or once a later
    stage packs codes and codebook. No data are needed.

    Left alone: weights that are not float32, that have few elements or few values already, that hold NaN or infinity,
    that live in a subgraph or that are a graph output.
    """

    name: ClassVar[str] = "cluster"

    bits: int = option(4, "A codebook has 2**bits values.", minimum=1, maximum=8)
    per_channel: bool = option(False, "A codebook per output channel instead of one per weight.")
    keep_zeros: bool = option(True, "Zeros stay zeros: 0 is in the codebook of a weight that has any.")
    min_elements: int = option(128, "Weights with fewer elements stay as they are.", minimum=1)
    skip: tuple[str, ...] = option((), "Names of weights that stay as they are.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        candidate, spool = model.fork(), Spool()
        lift_constants(candidate.graph)
        for weight in wanted(candidate, context, changes, skip=self.skip, min_elements=self.min_elements):
            context.progress(f"clustering {weight.name}")
            value = value_of(weight.constant)
            if not np.isfinite([np.min(value, initial=0.0), np.max(value, initial=0.0)]).all():
                changes.leave(weight.name, "holds NaN or infinity")
                continue
            axis = output_channel_axis(weight.node, weight.index, value.ndim) if self.per_channel else None
            clustered = self._clustered(value, axis)
            if np.array_equal(clustered, value):
                changes.leave(weight.name, f"has no more than {1 << self.bits} values already")
                continue
            weight.constant.values = spooled(clustered.tobytes(), onnx.TensorProto.FLOAT, value.shape, spool)
            what = "x".join(map(str, value.shape))
            per = " a channel" if axis is not None else ""
            changes.add(weight.name, f"{what} float32 takes at most {1 << self.bits} values{per}")
        if changes.count:
            changes.notes.append("clustered weights are still float32: the file shrinks only where they are packed")
            model.become(candidate)
        return changes

    def _clustered(self, value: Array, axis: int | None) -> Array:
        """The weight with each element at its nearest codebook value."""
        if axis is None:
            return _nearest(value, codebook(value, 1 << self.bits, keep_zeros=self.keep_zeros))
        result = np.empty_like(value, order="C")
        for channel, out in zip(np.moveaxis(value, axis, 0), np.moveaxis(result, axis, 0), strict=True):
            out[...] = _nearest(channel, codebook(channel, 1 << self.bits, keep_zeros=self.keep_zeros))
        return result


def codebook(values: Array, size: int, *, keep_zeros: bool = True) -> Array:
    """The values that stand for all others with least squared error, by Lloyd's algorithm on sorted values.

    Lloyd 1982, "Least Squares Quantization in PCM", section V, method I. It starts from the best clustering of runs of
    values, so that neither outliers nor chance mislead it.

    Args:
        values: Finite float32 values of any shape.
        size: How many values the codebook may have.
        keep_zeros: Pin one value to 0 where there are zeros, and let zeros not weigh in otherwise.

    Returns:
        At most `size` float32 values, sorted. Values that are no more than that are their own codebook.

    Example:
        >>> codebook(np.array([0.0, 1.0, 1.1, 5.0, 5.2], np.float32), 3).tolist()
        [0.0, 1.0499999523162842, 5.099999904632568]
    """
    ordered = np.sort(values, axis=None)
    distinct = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if ordered.size else ordered
    if distinct.size <= size:
        return distinct
    pinned = keep_zeros and bool(np.any(distinct == 0))
    if pinned:
        ordered = ordered[ordered != 0]
    centres = np.sort(np.append(_start(ordered, size - 1), 0.0)) if pinned else _start(ordered, size)
    zero = int(np.argmin(np.abs(centres))) if pinned else None
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    for _ in range(ROUNDS):
        edges = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], edges, [ordered.size]])
        counts = np.diff(edges)
        fresh = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centres)
        if zero is not None:
            fresh[zero] = 0.0
        if np.array_equal(fresh, centres):
            break
        centres = np.sort(fresh)
    return np.unique(centres.astype(np.float32))


def _start(ordered: Array, size: int) -> Array:
    """The best codebook for runs of equally many sorted values, by dynamic programming.

    Wang & Song 2011, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming", the R
    Journal 3(2), here over the runs in the place of single values.
    """
    places = np.unique(np.linspace(0, ordered.size, START_RUNS + 1).astype(np.int64))
    middle = ordered[ordered.size // 2]
    values = ordered.astype(np.float64) - middle
    sums = np.concatenate([[0.0], np.cumsum(values)])[places]
    squares = np.concatenate([[0.0], np.cumsum(values * values)])[places]
    counts = (places[None, :] - places[:, None]).astype(np.float64)
    totals = sums[None, :] - sums[:, None]
    costs = squares[None, :] - squares[:, None] - totals**2 / np.maximum(counts, 1)
    costs[counts <= 0] = np.inf  # costs[i, j]: of one cluster of the runs from i to before j
    least = costs[0]
    cuts = []
    for _ in range(1, min(size, places.size - 1)):
        through = least[:, None] + costs
        cuts.append(np.argmin(through, axis=0))
        least = np.min(through, axis=0)
    ends = [places.size - 1]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    edges = np.array([0, *ends[::-1]])
    return np.asarray(np.diff(sums[edges]) / np.diff(places[edges]) + middle)


def _nearest(values: Array, centres: Array) -> Array:
    """Each value's nearest codebook value."""
    return np.asarray(centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)])
