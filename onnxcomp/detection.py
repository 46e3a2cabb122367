"""Outputs that mix class scores with other numbers, as detectors' do: what a candidate loses there, without labels.

Boxes count in pixels, scores from 0 to 1, so one relative error over both only sees the boxes. Here the scores are
judged by how well they rank, in points of average precision, and the other numbers where the scores are high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MixedOutput", "find_mixed"]

Array = np.ndarray[Any, Any]

OTHER_FROM = 1.5
"""A channel that goes beyond this holds no scores."""

PIXELS = 8.0
"""Coordinates are offsets of both signs, or pixels, which go beyond this; features behind a Relu are neither."""

MOST_CHANNELS = 2048

FAINT = 0.01
"""Scores below this in both models are no detections: evaluations leave them out too."""

RESAMPLES = 200
MOST_WEIGHTS = 10_000_000
"""Detections times resamples that are held at once."""


@dataclass(frozen=True)
class MixedOutput:
    """An output of three axes whose channels are in part scores.

    Attributes:
        axis: The channel axis: 1 or 2.
        scores: For each channel, whether it holds scores.
    """

    axis: int
    scores: Array

    def split(self, output: Array) -> tuple[Array, Array]:
        """The scores and the other numbers: (samples, places, channels) each."""
        rows = output if self.axis == 2 else output.transpose(0, 2, 1)
        return rows[..., self.scores], rows[..., ~self.scores]

    def drop(self, reference: Array, candidate: Array, seed: int) -> tuple[float, tuple[float, float]]:
        """What the candidate's ranking is expected to lose, in points of average precision, and its 95% interval.

        The reference's own score of a place is taken for the probability that it is right: its expected average
        precision is what it would reach then, and the candidate ranks the same places by its scores. Classes count by
        the sum of their scores. Near ties that change places cost next to nothing, as they should.

        Args:
            reference: The original's output, (samples, ...) as the model gives it.
            candidate: The candidate's.
            seed: Of the bootstrap over samples.
        """
        ours, theirs = self.split(reference)[0], self.split(candidate)[0]
        rows = []
        for channel in range(ours.shape[2]):
            own, other = ours[..., channel].astype(np.float64), np.nan_to_num(theirs[..., channel].astype(np.float64))
            sample, place = np.nonzero((own >= FAINT) | (other >= FAINT))
            rows.append((own[sample, place], other[sample, place], sample))
        generator = np.random.default_rng(seed)
        count = len(reference)
        resamples = int(np.clip(MOST_WEIGHTS // max(1, *(len(own) for own, _, _ in rows)), 20, RESAMPLES))
        drawn = generator.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
        lost = _lost_precision(rows, np.concatenate([np.ones((1, count)), drawn]))
        low, high = np.quantile(lost[1:], (0.025, 0.975))
        return float(lost[0]), (float(low), float(high))

    def score_error(self, reference: Array, candidate: Array) -> float:
        """The relative error of the scores, all together."""
        ours, theirs = (self.split(output)[0].astype(np.float64) for output in (reference, candidate))
        signal = np.sum(np.square(ours))
        return float(np.sqrt(np.sum(np.square(ours - theirs)) / signal)) if signal > 0 else 0.0

    def error(self, reference: Array, candidate: Array) -> float:
        """The relative error of what is not scores, each place counted by its best score in the reference.

        The root mean square of the difference over that of the part that varies from sample to sample.
        """
        scores, ours = (part.astype(np.float64) for part in self.split(reference))
        theirs = self.split(candidate)[1].astype(np.float64)
        if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
            return float("inf")
        weight = np.max(scores, axis=2, keepdims=True)
        noise = np.sum(weight * np.square(np.where(np.isfinite(ours), ours - theirs, 0)))
        signal = np.sum(weight * np.square(np.where(np.isfinite(ours), ours - np.mean(ours, axis=0), 0)))
        return float(np.sqrt(noise / signal)) if signal > 0 else 0.0


def find_mixed(output: Array) -> MixedOutput | None:
    """Tell whether an output mixes scores with other numbers, by its values.

    Args:
        output: (samples, ...) of the original.

    Example:
        >>> rows = np.array([[[120.0, 80.0, 0.9], [4.0, 9.0, 0.1]], [[33.0, 60.0, 0.2], [12.0, 55.0, 0.7]]])
        >>> find_mixed(rows).scores.tolist()
        [False, False, True]
    """
    if output.ndim != 3 or output.dtype.kind != "f":
        return None
    for axis in (2, 1):
        others = (0, 3 - axis)
        if not 2 < output.shape[axis] <= MOST_CHANNELS or output.shape[3 - axis] < 2:
            continue
        low, high = np.min(output, axis=others), np.max(output, axis=others)
        scores = (low >= 0) & (high <= 1) & (high > FAINT)
        other = (high > OTHER_FROM) | (low < -OTHER_FROM)
        rectified = not (low[other] < -FAINT).any() and not (high[other] > PIXELS).any()
        if (
            scores.any()
            and other.any()
            and not rectified
            and np.mean(scores | other | ((low >= 0) & (high <= FAINT))) > 0.9
        ):
            return MixedOutput(axis, (low >= 0) & (high <= 1))
    return None


def _lost_precision(rows: list[tuple[Array, Array, Array]], weights: Array) -> Array:
    """The expected average precision lost, for each weighting of the samples."""
    lost, total = np.zeros(len(weights)), np.zeros(len(weights))
    for own, other, sample in rows:
        if not len(own):
            continue
        mass = weights[:, sample] @ own
        lost += mass * (_precision(own, own, sample, weights) - _precision(own, other, sample, weights))
        total += mass
    return lost / np.maximum(total, np.finfo(np.float64).tiny)


def _precision(truth: Array, score: Array, sample: Array, weights: Array) -> Array:
    """The average precision of ranking by `score` where each place is right with probability `truth`."""
    order = np.argsort(-score, kind="stable")
    seen = weights[:, sample[order]]
    right = seen * truth[order]
    precision = np.cumsum(right, axis=1) / np.maximum(np.cumsum(seen, axis=1), np.finfo(np.float64).tiny)
    found: Array = np.sum(right * precision, axis=1) / np.maximum(np.sum(right, axis=1), np.finfo(np.float64).tiny)
    return found
