"""The float weights of layers, whatever form the model holds them in, seen by input channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model, value_of
from onnxcomp_passes._placement import Layer
from onnxcomp_passes._stored import Stored, decode, encode

__all__ = [
    "LayerWeights",
    "PerInputChannel",
    "input_mean_error",
    "per_input_channel",
    "times_input_channel",
    "weight_name",
]

Array = np.ndarray[Any, Any]


class LayerWeights:
    """Float weights by layer: those of the model before any rounding where it is known, so that none is rounded twice.

    Args:
        exact: The model before any lossy stage, or None.
    """

    def __init__(self, exact: Model | None = None) -> None:
        self._exact = {constant.name: constant for constant in exact.constants()} if exact else {}
        self._changed: dict[str, Array] = {}

    def fork(self) -> LayerWeights:
        """A copy to change freely; the arrays are shared."""
        copy = LayerWeights()
        copy._exact, copy._changed = self._exact, dict(self._changed)
        return copy

    @staticmethod
    def is_own(layer: Layer) -> bool:
        """Whether no other node reads a layer's weight, so that it may change."""
        held = layer.weight
        tensor = held.mul.outputs[0] if isinstance(held, Stored) else held
        return len(tensor.outputs) == 1 and (not isinstance(held, Stored) or len(held.codes.outputs) == 1)

    def get(self, layer: Layer) -> Array:
        """A layer's weight, float32."""
        name = weight_name(layer)
        if name in self._changed:
            return self._changed[name]
        held = layer.weight
        shape = list(held.codes.shape if isinstance(held, Stored) else held.shape)
        exact = self._exact.get(name)
        if exact is not None and exact.dtype == np.float32 and list(exact.shape) == shape:
            return value_of(exact)
        return decode(held) if isinstance(held, Stored) else value_of(held)

    def set(self, model: Model, layer: Layer, value: Array) -> None:
        """Give a layer another weight of the same shape, in the form that it is held in."""
        value = np.ascontiguousarray(value, np.float32)
        held = layer.weight
        if isinstance(held, Stored):
            codes, scale = encode(value, layer.axis if np.size(value_of(held.scale)) > 1 else None)
            held.codes.values = codes
            fresh = gs.Constant(model.unique_name(f"{held.scale.name}.e"), scale)  # the old one may be shared
            held.mul.inputs[1] = fresh
        else:
            held.values = value
        self._changed[weight_name(layer)] = value


def weight_name(layer: Layer) -> str:
    """The name of a layer's weight; the storage form keeps that of the float weight."""
    held = layer.weight
    return str(held.mul.outputs[0].name if isinstance(held, Stored) else held.name)


@dataclass(frozen=True)
class PerInputChannel:
    """What is known of a weight for each channel of the layer's input.

    Attributes:
        peak: Largest magnitude, shape (channels,).
        square: Sum of squares over all outputs and kernel positions, shape (channels,).
        reuse: Kernel positions: how many values of one channel go into one output.
    """

    peak: Array
    square: Array
    reuse: int


def _groups(layer: Layer) -> int:
    return int(layer.node.attrs.get("group", 1)) if layer.node.op == "Conv" else 1


def _by_input(layer: Layer, weight: Array) -> Array:
    """The weight as (outputs of a group, groups x inputs of a group, kernel positions)."""
    if layer.node.op == "Conv":
        groups = _groups(layer)
        out, inner = weight.shape[0] // groups, weight.shape[1]
        return weight.reshape(groups, out, inner, -1).transpose(1, 0, 2, 3).reshape(out, groups * inner, -1)
    matrix = weight if layer.axis == 1 else weight.T
    return matrix.T[:, :, None]


def per_input_channel(layer: Layer, weight: Array) -> PerInputChannel:
    """Sum a layer's weight up by input channel."""
    parts = _by_input(layer, weight)
    square = np.einsum("oik,oik->i", parts, parts, dtype=np.float64)
    return PerInputChannel(np.max(np.abs(parts), axis=(0, 2)).astype(np.float64), square, parts.shape[2])


def times_input_channel(layer: Layer, weight: Array, factors: Array) -> Array:
    """A layer's weight, each input channel's part times its factor.

    Args:
        layer: The layer.
        weight: Its weight.
        factors: One factor a channel of the layer's input.
    """
    if layer.node.op == "Conv":
        groups = _groups(layer)
        inner = weight.shape[1]
        shaped = factors.reshape(groups, 1, inner, *[1] * (weight.ndim - 2))
        whole = weight.reshape(groups, -1, *weight.shape[1:]) * shaped
        return np.asarray(whole.reshape(weight.shape), np.float32)
    return np.asarray(weight * (factors[:, None] if layer.axis == 1 else factors[None, :]), np.float32)


def input_mean_error(layer: Layer, weight: Array, codes: Array, scale: Array, mean: Array) -> Array:
    """What rounding a weight adds to each output on average, given the mean of each input channel.

    Args:
        layer: The layer.
        weight: Its float weight.
        codes: The int8 codes.
        scale: Their scale: one, or one for each output channel.
        mean: The mean of each channel of the layer's input.

    Returns:
        One value an output channel, float64.
    """
    shape = [-1 if axis == layer.axis else 1 for axis in range(codes.ndim)] if scale.ndim else []
    error = codes.astype(np.float64) * scale.reshape(shape) - weight
    weighted = times_input_channel(layer, error, mean)
    others = tuple(i for i in range(weighted.ndim) if i != layer.axis)
    return np.asarray(np.sum(weighted, axis=others, dtype=np.float64))
