"""What the error of a layer's result is made of, named by its largest part."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxcomp.deviation import TensorError

__all__ = ["error_cause", "is_worth_a_cause", "outlier_channel"]

ROUNDING_DB = 60.0
"""What is closer than this (a thousandth) needs no cause: eight bits alone make 40 to 50."""

HALF = 0.5
"""The share of the noise that makes a cause of something."""

FEW_CHANNELS = 4
"""Among fewer channels one has half of the noise by chance."""

UNLIKE = 8.0
"""A channel that reaches this many times as far as others leaves these three of eight bits less."""


def error_cause(result: TensorError, inputs: Mapping[str, TensorError]) -> str | None:
    """Name what makes a layer's result differ, from what was measured there.

    Relative errors of what is multiplied add up as squares, so those of the inputs tell how much of the noise is not
    the layer's own.

    Args:
        result: The error of the layer's result.
        inputs: Those of its inputs, by what to call where they come from.

    Returns:
        The first cause that holds, in words: it came with the inputs, values are clipped, the means have shifted, one
        channel has the noise. None where none of these shows.
    """
    if not is_worth_a_cause(result):
        return None
    brought = sum(error.relative_error**2 for error in inputs.values()) / result.relative_error**2
    if brought >= HALF:
        worst = max(inputs, key=lambda name: inputs[name].relative_error)
        return f"from before: {min(1.0, brought):.0%} of the noise, by {worst} ({inputs[worst].sqnr_db:.1f} dB)"
    if result.clip_share >= HALF:
        return f"clipped tail: {result.clip_share:.0%} of the noise is in values beyond the range"
    if result.shift_share >= HALF:
        return f"shifted means: {result.shift_share:.0%} of the noise is a constant shift of the channels"
    return _one_channel(result)


def is_worth_a_cause(result: TensorError) -> bool:
    """Whether an error is more than fine rounding, and a number."""
    return -math.inf < result.sqnr_db < ROUNDING_DB


def outlier_channel(result: TensorError) -> str | None:
    """Name the channel that leaves the others few of the steps of a common scale; None where there is none."""
    peak = np.zeros(0) if result.channels is None else result.channels.peak
    if peak.size < FEW_CHANNELS:
        return None
    middle = float(np.median(peak))
    ratio = float(peak.max()) / middle if middle > 0 else 0.0
    if ratio < UNLIKE:
        return None
    return f"outlier channel: number {int(np.argmax(peak))} reaches {ratio:.0f} times the median"


def _one_channel(result: TensorError) -> str | None:
    channels = result.channels
    if channels is None or channels.noise.size < FEW_CHANNELS:
        return None
    worst = int(np.argmax(channels.noise))
    share = float(channels.noise[worst]) / max(float(channels.noise.sum()), np.finfo(np.float64).tiny)
    return f"one channel: number {worst} has {share:.0%} of the noise" if share >= HALF else None
