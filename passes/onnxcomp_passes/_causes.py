"""Why a layer loses accuracy in int8: the first cause that its input, its ranges and its weights show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxcomp.channels import ChannelMoments
from onnxcomp.model import value_of
from onnxcomp_passes._placement import Layer
from onnxcomp_passes._qdq import BIAS_MAX, Ranges

__all__ = ["find_cause"]

Array = np.ndarray[Any, Any]

TINY = float(np.finfo(np.float32).tiny)

UNLIKE = 8.0
"""Ranges, or channels, this many times apart lose three of eight bits to one another."""

LONG_TAIL = 20.0
"""A largest value this many times the root mean square: a normal distribution of a million values has 5."""

CLIPPED = 0.9
"""A range that covers less than this share of what was seen cuts a tail off."""


def find_cause(layer: Layer, ranges: Ranges, moments: Mapping[str, ChannelMoments], weight: Array) -> str | None:
    """Name what makes a layer lose accuracy in int8.

    Args:
        layer: The layer, in its graph.
        ranges: Tensor name -> the range that its scale covers.
        moments: Name of a layer's input -> the statistics of its channels.
        weight: The layer's float weight.

    Returns:
        The first cause found, in words, the worst kind first; None if the layer shows none.
    """
    name = layer.node.inputs[0].name
    seen = moments.get(name)
    causes = [_shared_scale(layer, ranges), _saturated_bias(layer, ranges.get(name), weight)]
    if seen is not None and seen.count:
        causes += [_outlier_channel(seen), _clipped_tail(seen, ranges.get(name)), _long_tail(seen)]
    return next((cause for cause in causes if cause), None)


def _shared_scale(layer: Layer, ranges: Ranges) -> str | None:
    makers = layer.node.inputs[0].inputs
    if not makers or makers[0].op != "Concat":
        return None
    parts = dict(_widths((tensor.name for tensor in makers[0].inputs), ranges))
    if len(parts) < 2:
        return None
    narrow, wide = min(parts, key=parts.__getitem__), max(parts, key=parts.__getitem__)
    ratio = parts[wide] / max(parts[narrow], TINY)
    return (
        f"shared scale: {makers[0].name or 'Concat'} joins ranges {ratio:.0f} times apart" if ratio >= UNLIKE else None
    )


def _widths(names: Iterator[str], ranges: Ranges) -> Iterator[tuple[str, float]]:
    for name in names:
        if name in ranges:
            low, high = ranges[name]
            yield name, max(high, 0.0) - min(low, 0.0)


def _saturated_bias(layer: Layer, range_: tuple[float, float] | None, weight: Array) -> str | None:
    node = layer.node
    if range_ is None or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    input_scale = (max(range_[1], 0.0) - min(range_[0], 0.0)) / 255.0
    others = tuple(i for i in range(weight.ndim) if i != layer.axis)
    weight_scale = np.max(np.abs(weight), axis=others) / 127.0
    fits = np.abs(value_of(node.inputs[2])) <= input_scale * weight_scale * BIAS_MAX
    channels = int(np.count_nonzero(~fits))
    return f"saturated bias: {channels} channels have weights too small beside their bias" if channels else None


def _outlier_channel(seen: ChannelMoments) -> str | None:
    peak = seen.peak()
    ratio = float(peak.max() / max(float(np.median(peak)), TINY))
    if len(peak) < 3 or ratio < UNLIKE:
        return None
    return f"outlier channel: {int(np.argmax(peak))} of its input reaches {ratio:.0f} times the median channel"


def _clipped_tail(seen: ChannelMoments, range_: tuple[float, float] | None) -> str | None:
    if range_ is None or seen.low is None or seen.high is None:
        return None
    width = max(float(seen.high.max()), 0.0) - min(float(seen.low.min()), 0.0)
    covered = (max(range_[1], 0.0) - min(range_[0], 0.0)) / max(width, TINY)
    return f"clipped tail: its input's scale covers {covered:.0%} of the range" if covered < CLIPPED else None


def _long_tail(seen: ChannelMoments) -> str | None:
    rms = float(np.sqrt(np.mean(seen.square())))
    ratio = float(seen.peak().max()) / max(rms, TINY)
    return f"long tail: its input reaches {ratio:.0f} times its root mean square" if ratio >= LONG_TAIL else None
