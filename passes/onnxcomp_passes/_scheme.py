"""How layers are quantized: ranges, rounding, corrections, and the float model that they apply to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.targets import QuantizationRules
from onnxcomp_passes._placement import Layer, find_layers, place
from onnxcomp_passes._qdq import REDUCED_MAX, Ranges, insert
from onnxcomp_passes._stored import INT8_MAX
from onnxcomp_passes._weights import LayerWeights

__all__ = ["Scheme"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scheme:
    """Everything about int8 but which layers run in it.

    Attributes:
        base: The float model.
        rules: The target's.
        ranges: Tensor name -> the range to cover.
        keys: The layers by their first output, which no remedy renames.
        weights: The layers' float weights.
        steps: Key of a layer -> the weight scale of each output channel, where it is not the largest magnitude's.
        means: Name of a layer's input -> the mean of each channel, where biases are corrected for rounded weights.
        limits: Key of a layer -> the largest code of its weight, where that is not all of 8 bits.
        story: Key of a layer -> what was done for it.
    """

    base: Model
    rules: QuantizationRules
    ranges: Ranges
    keys: tuple[str, ...]
    weights: LayerWeights
    steps: Mapping[str, Array] = field(default_factory=dict)
    means: Mapping[str, Array] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    story: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def limit(self, layer: Layer) -> int:
        """The largest code that a layer's weight may have."""
        return min(self.limits.get(layer.key, INT8_MAX), REDUCED_MAX if self.rules.reduce_range else INT8_MAX)

    def layers(self, model: Model, context: Context, chosen: frozenset[int] | None = None) -> list[Layer]:
        """The layers of the base or of a fork of it; all, or those that are given by their place in `keys`."""
        wanted = set(self.keys) if chosen is None else {self.keys[index] for index in chosen}
        return [layer for layer in find_layers(model.graph, context) if layer.key in wanted]

    def build(self, chosen: frozenset[int], context: Context) -> Model:
        """The model with the chosen layers, given by their place in `keys`, in int8."""
        fork = self.base.fork()
        layers = self.layers(fork, context, chosen)
        insert(fork, place(fork.graph, layers, fork.opset, self.ranges, self.rules), self)
        return fork

    def told(self, told: Mapping[str, str]) -> Mapping[str, tuple[str, ...]]:
        """The story with one more sentence for some layers, by key."""
        more = {key: (*self.story.get(key, ()), text) for key, text in told.items()}
        return {**self.story, **more}
