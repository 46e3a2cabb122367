"""Quantized weights and biases rounded anew, to what a target's kernels take."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.lints.biases import has_float_bias, same_steps
from onnxcomp.lints.quantization import INT8_KERNELS, REDUCED, largest_code
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.qdq import (
    QuantizedLayer,
    codes_dtype,
    codes_of,
    has_zero_point,
    product_scale,
    quantized_layers,
    scale_axis,
    scale_of,
    zero_point_of,
)
from onnxcomp.targets import QuantizationRules
from onnxcomp_passes._qdq import BIAS_MAX, REDUCED_MAX
from onnxcomp_passes._stored import INT8_MAX, encode

__all__ = ["decoded", "refit_biases", "refit_weights"]

Array = np.ndarray[Any, Any]

EIGHT_BITS = frozenset({"int8", "uint8"})
NARROW = EIGHT_BITS | {"int4", "uint4"}

SAME_SCALE = 1e-6
"""Relative: what a product of two float32 scales may differ by."""


def refit_weights(
    model: Model, rules: QuantizationRules, found: Collection[str], context: Context, changes: Changes
) -> None:
    """Round the weights anew that the target does not take as they are: fewer bits, one scale, no offset.

    Args:
        model: Its graph is changed.
        rules: What the target takes.
        found: The lints that found something: what none complains of stays.
        context: Which nodes are excluded.
        changes: What is said.
    """
    layers = [layer for layer in quantized_layers(model.graph) if not context.excludes(layer.node)]
    readers = {id(layer.node): layer for layer in layers}
    ends = {id(tensor) for tensor in model.graph.outputs}
    done: set[int] = set()
    for layer in layers:
        if id(layer.weight) in done:
            continue
        why = list(_complaints(layer, rules, found))
        if why:
            alike = _is_read_alike(layer, readers, ends)
            if alike:
                done.add(id(layer.weight))
            _round_anew(model, layer, rules, in_place=alike)
            changes.add(layer.name, f"its weight is rounded anew: {', '.join(why)}")
        elif rules.zero_points and not has_zero_point(layer.weight):
            _write_zero(model, layer, changes)


def _is_read_alike(layer: QuantizedLayer, readers: Mapping[int, QuantizedLayer], ends: Collection[int]) -> bool:
    """Whether all that reads a layer's weight takes it as the layer does, so that it can be changed where it is."""
    result = layer.weight.outputs[0]
    for reader in result.outputs:
        other = readers.get(id(reader))
        if other is None or other.weight is not layer.weight or other.node.op != layer.node.op:
            return False
        if other.channel_axis != layer.channel_axis or other.place != layer.place:
            return False
    return id(result) not in ends


def _write_zero(model: Model, layer: QuantizedLayer, changes: Changes) -> None:
    """Write a zero point out that is left out and so is 0."""
    scale, codes = scale_of(layer.weight), codes_of(layer.weight.inputs[0])
    if scale is None or codes is None:
        changes.leave(layer.name, "its weight's zero point cannot be written out: the scale is computed")
        return
    zeros = gs.Constant(model.unique_name("z.0"), np.zeros(scale.shape, codes.dtype))
    layer.weight.inputs = [*layer.weight.inputs[:2], zeros]
    changes.add(layer.name, "its weight's zero point 0 is written out")


def _complaints(layer: QuantizedLayer, rules: QuantizationRules, found: Collection[str]) -> Iterator[str]:
    """What the target does not take of a weight."""
    scale, zero, dtype = scale_of(layer.weight), zero_point_of(layer.weight), codes_dtype(layer.weight)
    if scale is None or dtype not in NARROW or (has_zero_point(layer.weight) and zero is None):
        return
    if scale.size > 1 and not rules.channel_scales(layer.node.op):
        yield "one scale"
    elif scale.size > 1 and dtype in EIGHT_BITS and _is_aside(layer):
        yield "a scale for each output channel"
    if dtype == "uint8" and codes_dtype(layer.data) == "int8" and "uint8-int8" in found:
        yield "int8"
    elif dtype == "int8" and zero is not None and np.any(zero) and "weight-offset" in found:
        yield "zero point 0"
    if rules.reduce_range and dtype == "int8" and layer.place == 1 and layer.node.op in INT8_KERNELS:
        codes = codes_of(layer.weight.inputs[0])
        if codes_dtype(layer.data) in EIGHT_BITS and codes is not None and largest_code(codes) > REDUCED:
            yield "7 bits"


def _is_aside(layer: QuantizedLayer) -> bool:
    """Whether the weight's scales lie along another axis than its output channels."""
    axis = scale_axis(layer.weight, len(layer.weight.inputs[0].shape))
    return axis is not None and axis != layer.channel_axis


def _round_anew(model: Model, layer: QuantizedLayer, rules: QuantizationRules, *, in_place: bool) -> None:
    """Give a layer's DequantizeLinear other codes, or the layer one of its own where others read the weight too."""
    values, scale = decoded(layer.weight), scale_of(layer.weight)
    assert scale is not None
    axis = layer.channel_axis if rules.channel_scales(layer.node.op) and scale.size > 1 and layer.place == 1 else None
    codes, steps = encode(values.astype(np.float32), axis, limit=REDUCED_MAX if rules.reduce_range else INT8_MAX)
    steps = np.asarray(steps.reshape(() if axis is None else -1), scale.dtype)
    inputs = [gs.Constant(model.unique_name("q.0"), codes), gs.Constant(model.unique_name("s.0"), steps)]
    if len(layer.weight.inputs) > 2 or rules.zero_points or layer.node.op == "Gemm":
        inputs.append(gs.Constant(model.unique_name("z.0"), np.zeros(steps.shape, np.int8)))
    attrs = {} if axis is None else {"axis": axis}
    if in_place:
        layer.weight.inputs = inputs
        layer.weight.attrs.clear()
        layer.weight.attrs.update(attrs)
        return
    result = Variable(model.unique_name("d.0"), dtype=scale.dtype, shape=list(values.shape))
    model.graph.nodes.append(Node("DequantizeLinear", "", attrs, inputs, [result]))
    layer.node.inputs[layer.place] = result


def decoded(node: gs.Node) -> Array:
    """What a DequantizeLinear of constants gives."""
    codes, scale, zero = codes_of(node.inputs[0]), scale_of(node), zero_point_of(node)
    assert codes is not None
    assert scale is not None
    axis = int(node.attrs.get("axis", 1)) % max(codes.ndim, 1)
    block = int(node.attrs.get("block_size", 0))

    def spread(values: Array) -> Array:
        if values.size == 1:
            return values.reshape(())
        if block:
            return np.repeat(values, block, axis)[tuple(slice(size) for size in codes.shape)]
        return values.reshape([-1 if place == axis else 1 for place in range(codes.ndim)])

    offset: Any = 0 if zero is None else spread(zero).astype(np.int64)
    return np.asarray((codes.astype(np.int64) - offset) * spread(scale), scale.dtype)


def refit_biases(model: Model, context: Context, changes: Changes) -> None:
    """Hold biases in int32, in the scale of their layer's products, which the kernels add them to unseen.

    Args:
        model: Its graph is changed.
        context: Which nodes are excluded.
        changes: What is said.
    """
    for layer in list(quantized_layers(model.graph)):
        steps = product_scale(layer)
        if context.excludes(layer.node) or steps is None:
            continue
        if layer.bias is None:
            if has_float_bias(layer):
                values = codes_of(layer.node.inputs[2])
                assert values is not None
                _write_bias(model, layer, values, steps, "its bias is int32", changes)
        elif codes_dtype(layer.bias) == "int32" and codes_of(layer.bias.inputs[0]) is not None:
            scale, zero = scale_of(layer.bias), zero_point_of(layer.bias)
            if scale is None or (has_zero_point(layer.bias) and zero is None):
                continue
            if (zero is not None and np.any(zero)) or not same_steps(scale, steps, SAME_SCALE):
                told = "its bias is held in the scale of the products"
                _write_bias(model, layer, decoded(layer.bias), steps, told, changes)


def _write_bias(model: Model, layer: QuantizedLayer, values: Array, steps: Array, told: str, changes: Changes) -> None:
    """Give a layer an int32 bias of these values, if it can have one."""
    if steps.size > 1 and values.shape in {(), (1,), (1, steps.size), (steps.size,)}:
        values = np.broadcast_to(values.reshape(-1), steps.shape)
    elif steps.size > 1:
        changes.leave(layer.name, f"its bias is not one number for each output channel: {list(values.shape)}")
        return
    if values.dtype != steps.dtype:
        changes.leave(layer.name, f"its bias is {values.dtype.name} and its scales are {steps.dtype.name}")
        return
    wide = steps.astype(np.float64)
    if not np.all(np.abs(values) <= BIAS_MAX * wide) or not np.all(wide > 0):
        changes.leave(layer.name, "its bias does not fit int32 in the scale of the products")
        return
    codes = np.asarray(np.rint(values.astype(np.float64) / wide), np.int32)  # 0-d arithmetic gives scalars
    result = Variable(model.unique_name("d.0"))
    inputs = [gs.Constant(model.unique_name("q.0"), codes), gs.Constant(model.unique_name("s.0"), steps)]
    model.graph.nodes.append(Node("DequantizeLinear", "", {"axis": 0} if steps.size > 1 else {}, inputs, [result]))
    layer.node.inputs[2] = result
    changes.add(layer.name, told)
