"""What is done for accuracy before a layer goes back to float, in the order of what it costs; kept where it helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnxcomp.calibration import Percentile
from onnxcomp.channels import ChannelMoments
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._equalize import equalize
from onnxcomp_passes._placement import Layer, place
from onnxcomp_passes._qdq import Ranges
from onnxcomp_passes._ranges import best_range, response
from onnxcomp_passes._scheme import Scheme
from onnxcomp_passes._weights import times_input_channel

__all__ = ["REMEDIES", "SLOWING", "Evidence", "Remedy", "treat"]

Array = np.ndarray[Any, Any]

SHRINK = np.linspace(1.0, 0.7, 16)
"""Shares of the largest magnitude that weight scales are tried with."""

BETTER = 0.98
"""Another weight scale is taken where it brings the expected error below this share."""


class Evidence:
    """Statistics of a scheme's float model, gathered when they are first asked for.

    Args:
        observe: Shows calibration data to observers of a model's tensors.
        context: The pass's.
    """

    def __init__(self, observe: Callable[..., Any], calibrate: Callable[..., Ranges], context: Context) -> None:
        self.context = context
        self.calibrate = calibrate
        self._observe = observe
        self._known: dict[tuple[int, str], tuple[Model, Mapping[str, Any]]] = {}

    def moments(self, scheme: Scheme) -> Mapping[str, ChannelMoments]:
        """The channels of every layer's input, by the input's name."""
        axes = {
            layer.node.inputs[0].name: 1 if layer.node.op == "Conv" else -1
            for layer in scheme.layers(scheme.base, self.context)
        }
        return self._get(scheme, "moments", lambda: {name: ChannelMoments(axis) for name, axis in axes.items()})

    def histograms(self, scheme: Scheme) -> Mapping[str, Percentile]:
        """The values of every tensor that has a range."""
        return self._get(scheme, "histograms", lambda: {name: Percentile() for name in scheme.ranges})

    def _get(self, scheme: Scheme, kind: str, watches: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        key = id(scheme.base), kind  # the model is held too, so that no other can get its id
        if key not in self._known:
            self._known[key] = scheme.base, self._observe(scheme.base, watches())
        return self._known[key][1]


Remedy = Callable[[Scheme, frozenset[int], Evidence], Scheme | None]
"""Gives a better scheme for the chosen layers, or None where it finds nothing to do."""


def fit_ranges(scheme: Scheme, chosen: frozenset[int], evidence: Evidence) -> Scheme | None:
    """Cover what costs least: fewer values in exchange for finer steps, judged behind the activation function."""
    del chosen
    if scheme.rules.is_wide:
        return None  # 16 bits have steps to spare
    producers = {t.name: t for node in scheme.base.graph.nodes for t in (*node.inputs, *node.outputs)}
    ranges = dict(scheme.ranges)
    for name, seen in evidence.histograms(scheme).items():
        ranges[name] = best_range(seen, response(producers[name])) if name in producers else ranges[name]
    changed = {name for name, range_ in ranges.items() if range_ != scheme.ranges[name]}
    if not changed:
        return None
    told = {}
    for layer in scheme.layers(scheme.base, evidence.context):
        source = layer.node.inputs[0].name
        if source in changed:
            low, high = scheme.ranges[source]
            new_low, new_high = ranges[source]
            told[layer.key] = f"range of its input {low:.3g} to {high:.3g} fitted to {new_low:.3g} to {new_high:.3g}"
    return replace(scheme, ranges=ranges, story=scheme.told(told))


def equalize_channels(scheme: Scheme, chosen: frozenset[int], evidence: Evidence) -> Scheme | None:
    """Even out the channels of layers' inputs."""
    fork, weights = scheme.base.fork(), scheme.weights.fork()
    layers = scheme.layers(fork, evidence.context, chosen)
    done = equalize(fork, layers, evidence.moments(scheme), weights)
    if not done:
        return None
    told = {
        key: f"outlier channel ({one.spread:.0f} times the median): equalized, expected noise {one.noise:.0%} of before"
        for one in done
        for key in one.layers
    }
    fresh = replace(scheme, base=fork, weights=weights, story=scheme.told(told))
    everything = place(fork.graph, fresh.layers(fork, evidence.context), fork.opset).tensors
    return replace(fresh, ranges=evidence.calibrate(fork, list(everything)))


def correct_biases(scheme: Scheme, chosen: frozenset[int], evidence: Evidence) -> Scheme | None:
    """Take the mean error of rounded weights out of the biases."""
    del chosen
    means = {name: seen.mean() for name, seen in evidence.moments(scheme).items() if seen.count}
    layers = [layer for layer in scheme.layers(scheme.base, evidence.context) if layer.node.op != "MatMul"]
    fitting = {
        layer.node.inputs[0].name: means[layer.node.inputs[0].name]
        for layer in layers
        if layer.node.inputs[0].name in means and _channels(layer, scheme) == len(means[layer.node.inputs[0].name])
    }
    return replace(scheme, means=fitting) if fitting else None


def _channels(layer: Layer, scheme: Scheme) -> int:
    shape = scheme.weights.get(layer).shape
    if layer.node.op == "Conv":
        return int(shape[1] * layer.node.attrs.get("group", 1))
    return int(shape[1 - layer.axis])


def round_weights(scheme: Scheme, chosen: frozenset[int], evidence: Evidence) -> Scheme | None:
    """Give each output channel the weight scale that makes the smallest output error, not the largest magnitude's.

    The error is the squared rounding error of each weight times the mean square of what it is multiplied with.
    """
    layers = scheme.layers(scheme.base, evidence.context, chosen)
    layers = [layer for layer in layers if scheme.rules.channel_scales(layer.node.op)]
    if not layers:
        return None
    moments = evidence.moments(scheme)
    steps = {}
    for layer in layers:
        seen = moments.get(layer.node.inputs[0].name)
        if seen is None or not seen.count or _channels(layer, scheme) != len(seen.square()):
            continue
        found = _best_steps(layer, scheme.weights.get(layer), np.sqrt(seen.square()), scheme.limit(layer))
        if found is not None:
            steps[layer.key] = found
    told = dict.fromkeys(steps, "weights rounded for the least output error")
    return replace(scheme, steps=steps, story=scheme.told(told)) if steps else None


def _best_steps(layer: Layer, weight: Array, rms: Array, limit: int) -> Array | None:
    others = tuple(i for i in range(weight.ndim) if i != layer.axis)
    peak = np.max(np.abs(weight), axis=others, keepdims=True) / limit
    peak[peak < np.finfo(np.float32).tiny] = 1.0
    costs, tried = [], [(peak * share).astype(np.float32) for share in SHRINK]
    for step in tried:
        error = np.clip(np.rint(weight / step), -limit, limit) * step - weight
        costs.append(np.sum(np.square(times_input_channel(layer, error, rms), dtype=np.float64), axis=others))
    best = np.argmin(costs, axis=0)
    if not np.sum(np.min(costs, axis=0)) < BETTER * np.sum(costs[0]):
        return None
    steps = np.stack([step.reshape(-1) for step in tried])
    return np.asarray(steps[best, np.arange(steps.shape[1])])


def widen_activations(scheme: Scheme, chosen: frozenset[int], evidence: Evidence) -> Scheme | None:
    """Activations in 16 bits, all of them: the target's kernels take one type."""
    del evidence
    if scheme.rules.wide is None or scheme.rules.is_wide:
        return None
    rules = replace(scheme.rules, activations=scheme.rules.wide)
    told = {scheme.keys[index]: "activations in 16 bits, which only the target can show to fuse" for index in chosen}
    return replace(scheme, rules=rules, story=scheme.told(told))


REMEDIES: dict[str, Remedy] = {
    # Free at run time; one more pass over the data.
    "fit-ranges": fit_ranges,
    # Mostly folded into weights; a Mul where nothing takes the factors over.
    "equalize": equalize_channels,
    # Both closed form, from the same statistics.
    "round-weights": round_weights,
    "correct-biases": correct_biases,
    # About half the speed of 8 bits, and faster than float.
    "widen-activations": widen_activations,
}
"""In the order of their cost."""

SLOWING = frozenset({"equalize", "widen-activations"})
"""Those that may cost time: not tried where the budget holds without."""


def treat(scheme: Scheme, names: Iterable[str], chosen: frozenset[int], evidence: Evidence) -> Scheme:
    """Apply some remedies, one after the other, to the layers that run in int8."""
    for name in names:
        scheme = REMEDIES[name](scheme, chosen, evidence) or scheme
    return scheme
