"""What samples tell: that a candidate loses nothing on them is evidence only where a ruined model would lose something.

A model may give one answer whatever it is fed: a frequency band without a voice in it, an image without a text, scores
that are all the same for noise. Then its weights could be anything, and every candidate would seem to be free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from onnxcomp import metrics
from onnxcomp.relative_error import energies

__all__ = ["are_constant", "constant_drop", "may_show_loss"]

Array = np.ndarray[Any, Any]


def are_constant(runs: Sequence[Sequence[Array]], counts: Sequence[int]) -> bool:
    """Return whether every output is the same for all samples, to float rounding.

    Args:
        runs: The outputs of each run.
        counts: The samples of each run; of fewer than two in all, nothing can be said: then it is False.
    """
    if sum(counts) < 2 or len({len(run) for run in runs}) != 1:
        return False
    return all(_is_constant(outputs, counts) for outputs in zip(*runs, strict=True))


def constant_drop(scores: Array) -> float:
    """Return the expected drop of one answer for all samples: the mean of their class scores.

    Args:
        scores: (samples, ..., classes).

    Example:
        >>> each_its_own, all_alike = np.eye(2), np.array([[0.6, 0.4], [0.51, 0.49]])
        >>> constant_drop(each_its_own), constant_drop(all_alike)
        (0.5, 0.0)
    """
    answer = np.broadcast_to(scores.mean(axis=0, keepdims=True), scores.shape)
    rows = (array.reshape(-1, scores.shape[-1]) for array in (scores, answer))
    return float(metrics.expected_drop(*rows).mean())


def may_show_loss(outputs: Iterable[Array]) -> bool:
    """Whether a model that computes something else could be told by these outputs of the original.

    Where all are empty, 0 or not finite, as those of a detector that finds nothing, most others give the same.

    Example:
        >>> may_show_loss([np.zeros((4, 2)), np.zeros((0, 6)), np.array([np.nan])])
        False
        >>> may_show_loss([np.zeros((4, 2)), np.array([0, 7])])
        True
    """
    return any(_has_values(array) for array in outputs)


def _is_constant(outputs: Sequence[Array], counts: Sequence[int]) -> bool:
    samples = [part for each, count in zip(outputs, counts, strict=True) for part in _samples(each, count)]
    if len({part.shape for part in samples}) != 1:
        return False
    if outputs[0].dtype.kind == "f":
        return energies([(each, each) for each in outputs], counts).constant
    return all(np.array_equal(samples[0], other) for other in samples[1:])


def _samples(output: Array, count: int) -> Sequence[Array]:
    """An output's part of each sample; the whole where its first axis is not the samples."""
    if not output.ndim or len(output) != count:
        return [output]
    return [output[index : index + 1] for index in range(count)]  # not its items: strings are no arrays


def _has_values(array: Array) -> bool:
    if array.dtype.kind in "fc":
        return bool((np.isfinite(array) & (array != 0)).any())
    return bool(array.any()) if array.dtype.kind in "biu" else bool(array.size)
