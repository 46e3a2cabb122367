"""Writes Q/DQ pairs of 4 or 8 bits around layers, for training to make up for what so few bits lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.calibration import make_calibrator
from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context
from onnxcomp_passes._companions import clip_low
from onnxcomp_passes._placement import Layer, find_layers
from onnxcomp_passes._statistics import observe

__all__ = ["EIGHT", "WIDTHS", "quantize_layers"]

Array = np.ndarray[Any, Any]

WIDTHS = (4, 8)
EIGHT = 8

FOUR_BIT_OPSET = 21
"""The first opset with 4-bit QuantizeLinear and DequantizeLinear."""

PER_CHANNEL_OPSET = 13

SHARES = np.linspace(0.4, 1.0, 25)
"""Of a channel's largest weight, that its range is tried at."""

_SIGNED: dict[int, Any] = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}
_UNSIGNED: dict[int, Any] = {4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}


@dataclass
class _Writer:
    """Inserts into one model; an activation that several layers read gets one pair."""

    model: Model
    ranges: Mapping[str, tuple[float, float]]
    decoded: dict[tuple[str, int], gs.Tensor] = field(default_factory=dict)

    def activation(self, tensor: gs.Tensor, bits: int) -> gs.Tensor:
        """The tensor behind its QuantizeLinear and DequantizeLinear."""
        key = tensor.name, bits
        if key not in self.decoded:
            low, high = self.ranges[tensor.name]
            low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
            step = np.float32((high - low) / top or 1.0)
            zero = np.asarray(np.clip(np.rint(-low / step), 0, top)).astype(_UNSIGNED[bits])
            scale = gs.Constant(self.model.unique_name(f"{tensor.name}_scale"), np.asarray(step, np.float32))
            origin = gs.Constant(self.model.unique_name(f"{tensor.name}_zero_point"), zero)
            codes = Variable(self.model.unique_name(f"{tensor.name}_quantized"))
            result = Variable(self.model.unique_name(f"{tensor.name}_dequantized"))
            self._add("QuantizeLinear", [_before_clip(tensor), scale, origin], codes)
            self._add("DequantizeLinear", [codes, scale, origin], result)
            self.decoded[key] = result
        return self.decoded[key]

    def weight(self, layer: Layer, bits: int) -> gs.Tensor:
        """The layer's weight as codes behind a DequantizeLinear, a scale for each output channel."""
        constant: gs.Constant = layer.weight
        weight = np.asarray(value_of(constant), np.float32)
        rows = np.moveaxis(weight, layer.axis, 0).reshape(weight.shape[layer.axis], -1)
        scale = _scales(rows, 2 ** (bits - 1) - 1)
        shape = [1] * weight.ndim
        shape[layer.axis] = -1
        top = 2 ** (bits - 1) - 1
        codes = np.clip(np.rint(weight / scale.reshape(shape)), -top, top).astype(_SIGNED[bits])
        # Under the weight's own name where it is free: training then finds what the codes were rounded from.
        alone = len(constant.outputs) == 1
        held = gs.Constant(constant.name if alone else self.model.unique_name(f"{constant.name}_quantized"), codes)
        scales = gs.Constant(self.model.unique_name(f"{constant.name}_scale"), scale)
        zeros = gs.Constant(self.model.unique_name(f"{constant.name}_zero_point"), np.zeros(len(scale), codes.dtype))
        result = Variable(self.model.unique_name(f"{constant.name}_dequantized"))
        self._add("DequantizeLinear", [held, scales, zeros], result, axis=layer.axis)
        return result

    def _add(self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, **attrs: int) -> None:
        name = self.model.unique_name(f"{output.name}_node")
        self.model.graph.nodes.append(Node(op, name, attrs, inputs, [output]))


def _before_clip(tensor: gs.Tensor) -> gs.Tensor:
    """What a Clip from 0 on reads, instead of what it gives: codes from 0 on bound values in the same way.

    ONNX Runtime refuses 4-bit codes of a Clip that nothing else reads (1.32).
    """
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if maker is None or maker.op != "Clip" or maker.domain or clip_low(maker) != 0.0:
        return tensor
    return maker.inputs[0]


def _drop_unread_clips(graph: gs.Graph) -> None:
    """Take out the Clip nodes that nothing reads any more."""
    outputs = {id(tensor) for tensor in graph.outputs}
    unread = [
        node
        for node in graph.nodes
        if node.op == "Clip" and not node.outputs[0].outputs and id(node.outputs[0]) not in outputs
    ]
    for node in unread:
        node.inputs.clear()
        node.outputs.clear()
    gone = {id(node) for node in unread}
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def _scales(rows: Array, top: int) -> Array:
    """The scale of each row with the smallest squared error; (rows,) float32."""
    largest = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny)
    best, least = largest / top, np.full(len(rows), np.inf)
    for share in SHARES:
        step = (largest * share / top)[:, None]
        missed = np.square(np.clip(np.rint(rows / step), -top, top) * step - rows).sum(axis=1)
        best = np.where(missed < least, step[:, 0], best)
        least = np.minimum(least, missed)
    return np.asarray(best, np.float32)


def quantize_layers(
    model: Model, context: Context, changes: Changes, *, weights: int, activations: int
) -> Sequence[str]:
    """Put every layer with a float weight onto a grid of few bits, in place.

    Args:
        model: Changed in place.
        context: Its data tell ranges.
        changes: Told what was done and why others were left.
        weights: Bits of weights.
        activations: Bits of what layers read. The first and the last layer, whose errors nothing evens out, have 8 of
            both.

    Returns:
        The names of the layers.
    """
    layers = [layer for layer in find_layers(model.graph, context, changes) if isinstance(layer.weight, gs.Constant)]
    if not layers:
        return []
    model.raise_opset(FOUR_BIT_OPSET if min(weights, activations) != EIGHT else PER_CHANNEL_OPSET)
    layers = [layer for layer in find_layers(model.graph, context) if isinstance(layer.weight, gs.Constant)]
    at_ends = {layers[0].name, layers[-1].name}
    bits = {layer.name: (EIGHT, EIGHT) if layer.name in at_ends else (weights, activations) for layer in layers}
    watches = {}
    for layer in layers:
        levels = 2 ** bits[layer.name][1]
        watches[str(layer.node.inputs[0].name)] = make_calibrator("mse", levels=levels)
    ranges = {name: watch.range() for name, watch in observe(model, watches, context).items()}
    writer = _Writer(model, ranges)
    for layer in layers:
        own, read = bits[layer.name]
        layer.node.inputs[0] = writer.activation(layer.node.inputs[0], read)
        layer.node.inputs[1] = writer.weight(layer, own)
        changes.add(layer.name, f"weights in {own} bits, what it reads in {read}")
    _drop_unread_clips(model.graph)
    model.infer_shapes()
    return [layer.name for layer in layers]
