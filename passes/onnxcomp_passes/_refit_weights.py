"""Quantized weights and biases rounded anew, to what a target's kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.qdq import QuantizedLayer, codes_dtype, codes_of, quantized_layers, scale_of, zero_point_of
from onnxcomp.targets import QuantizationRules
from onnxcomp_passes._qdq import BIAS_MAX, REDUCED_MAX
from onnxcomp_passes._stored import INT8_MAX, encode, output_channel_axis

__all__ = ["refit_biases", "refit_weights"]

Array = np.ndarray[Any, Any]

SAME_SCALE = 1e-6
"""Relative: what a product of two float32 scales may differ by."""


def refit_weights(model: Model, rules: QuantizationRules, context: Context, changes: Changes) -> None:
    """Round the weights anew that the target does not take as they are: fewer bits, one scale, no offset."""
    done: dict[int, None] = {}
    for layer in list(quantized_layers(model.graph)):
        if context.excludes(layer.node) or id(layer.weight) in done:
            continue
        done[id(layer.weight)] = None
        why = list(_complaints(layer, rules))
        if why:
            _round_anew(model, layer, rules)
            changes.add(layer.name, f"its weight is rounded anew: {', '.join(why)}")
        elif rules.zero_points and len(layer.weight.inputs) < 3:
            scale = scale_of(layer.weight)
            zeros = np.zeros_like(scale, dtype=np.dtype(codes_dtype(layer.weight)))
            layer.weight.inputs.append(gs.Constant(model.unique_name("z.0"), zeros))
            changes.add(layer.name, "its weight's zero point 0 is written out")


def _complaints(layer: QuantizedLayer, rules: QuantizationRules) -> Iterator[str]:
    """What the target does not take of a weight."""
    scale, zero, dtype = scale_of(layer.weight), zero_point_of(layer.weight), codes_dtype(layer.weight)
    if scale is None or dtype not in {"int8", "uint8"}:
        return
    if scale.size > 1 and not rules.channel_scales(layer.node.op):
        yield "one scale"
    if dtype == "uint8" and codes_dtype(layer.data) == "int8":
        yield "int8"
    elif dtype == "int8" and zero is not None and np.any(zero):
        yield "zero point 0"
    if rules.reduce_range and dtype == "int8":
        codes = codes_of(layer.weight.inputs[0])
        if codes is not None and codes.size and max(int(codes.max()), -int(codes.min())) > REDUCED_MAX + 1:
            yield "7 bits"


def _round_anew(model: Model, layer: QuantizedLayer, rules: QuantizationRules) -> None:
    values = _decoded(layer.weight)
    scale = scale_of(layer.weight)
    axis = None
    if rules.channel_scales(layer.node.op) and scale is not None and scale.size > 1:
        axis = output_channel_axis(layer.node, 1, values.ndim)
    codes, steps = encode(values, axis, limit=REDUCED_MAX if rules.reduce_range else INT8_MAX)
    steps = np.asarray(steps.reshape(() if axis is None else -1), np.float32)
    inputs = [gs.Constant(model.unique_name("q.0"), codes), gs.Constant(model.unique_name("s.0"), steps)]
    if len(layer.weight.inputs) > 2 or rules.zero_points or layer.node.op == "Gemm":
        inputs.append(gs.Constant(model.unique_name("z.0"), np.zeros(steps.shape, np.int8)))
    layer.weight.inputs = inputs
    layer.weight.attrs.pop("block_size", None)
    if axis is None:
        layer.weight.attrs.pop("axis", None)
    else:
        layer.weight.attrs["axis"] = axis


def _decoded(node: gs.Node) -> Array:
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

    offset: Any = 0 if zero is None else spread(zero).astype(np.int32)
    return np.asarray((codes.astype(np.int32) - offset) * spread(scale), np.float32)


def refit_biases(model: Model, context: Context, changes: Changes, *, round_float: bool) -> None:
    """Hold each int32 bias in the scale of its layer's products, which the kernels add it to unseen.

    Args:
        model: Its graph is changed.
        context: Which nodes are excluded.
        changes: What is said.
        round_float: Whether float biases of layers with an int8 output become int32 too.
    """
    for layer in list(quantized_layers(model.graph)):
        if context.excludes(layer.node) or layer.node.op == "MatMul":
            continue
        data, weight = scale_of(layer.data), scale_of(layer.weight)
        if data is None or weight is None or data.size != 1:
            continue
        steps = np.asarray(data.ravel()[0] * weight, np.float32)  # 0-d arithmetic gives scalars
        if layer.bias is not None:
            _rescale(model, layer, steps, changes)
        elif round_float and len(layer.node.inputs) > 2 and isinstance(layer.node.inputs[2], gs.Constant):
            _round_bias(model, layer, steps, changes)


def _rescale(model: Model, layer: QuantizedLayer, steps: Array, changes: Changes) -> None:
    assert layer.bias is not None
    scale = scale_of(layer.bias)
    if codes_dtype(layer.bias) != "int32" or scale is None or codes_of(layer.bias.inputs[0]) is None:
        return
    if scale.size in (1, steps.size) and np.allclose(scale.ravel(), steps.ravel(), rtol=SAME_SCALE, atol=0):
        return
    values = _decoded(layer.bias)
    layer.node.inputs[2] = _bias(model, values, steps)
    changes.add(layer.name, "its bias is held in the scale of the products")


def _round_bias(model: Model, layer: QuantizedLayer, steps: Array, changes: Changes) -> None:
    values = codes_of(layer.node.inputs[2])
    assert values is not None
    if values.dtype != np.float32 or not np.all(np.abs(values) < BIAS_MAX * steps.astype(np.float64)):
        changes.leave(layer.name, "its bias does not fit int32 in the scale of the products")
        return
    layer.node.inputs[2] = _bias(model, values, steps)
    changes.add(layer.name, "its bias is int32")


def _bias(model: Model, values: Array, steps: Array) -> gs.Tensor:
    codes = np.asarray(np.clip(np.rint(values.astype(np.float64) / steps), -BIAS_MAX, BIAS_MAX), np.int32)
    result = Variable(model.unique_name("d.0"))
    inputs = [gs.Constant(model.unique_name("q.0"), codes), gs.Constant(model.unique_name("s.0"), steps)]
    model.graph.nodes.append(Node("DequantizeLinear", "", {"axis": 0} if steps.size > 1 else {}, inputs, [result]))
    return result
