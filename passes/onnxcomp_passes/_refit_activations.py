"""Quantized activations brought to what a target's kernels take: their type, their scale, or out of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.lints.quantization import COARSEST, SOFTMAX_STEP, UNLIKE, made_by, step_before_softmax, unlike_scales
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.qdq import codes_dtype, codes_of, encoder, quantized_layers, scale_of, zero_point_of
from onnxcomp_passes._stored import redirect

__all__ = ["decode_at_load", "drop_ruinous", "shift", "widen_softmax"]

Array = np.ndarray[Any, Any]

BOUNDED = frozenset({"Softmax", "Sigmoid", "HardSigmoid", "Tanh"})
"""Operators whose results need no clipping once their codes are gone."""


def shift(model: Model, dtype: str, context: Context, changes: Changes) -> None:
    """Make all 8-bit activations int8, or all uint8: the same scales, zero points moved by 128. Exact."""
    weights = {id(layer.weight) for layer in quantized_layers(model.graph)}
    nodes = [
        node
        for node in model.graph.nodes
        if node.op in {"QuantizeLinear", "DequantizeLinear"} and id(node) not in weights
    ]
    moved = [node for node in nodes if codes_dtype(node) in {"int8", "uint8"} and codes_dtype(node) != dtype]
    if _excluded(model, context, changes):
        return
    held = next((name for node in moved if (name := _held(node, model.graph))), None)
    if held:
        changes.leave("the model", f"its activations stay as they are: {held!r} is read or made as codes elsewhere")
        return
    for node in moved:
        zero = zero_point_of(node)
        offset = 0 if zero is None else zero.astype(np.int32)
        by = -128 if dtype == "int8" else 128
        scale = scale_of(node)
        codes = codes_of(node.inputs[0]) if node.op == "DequantizeLinear" else None
        if codes is not None:
            node.inputs[0] = gs.Constant(model.unique_name("q.0"), np.asarray(codes.astype(np.int32) + by, dtype))
        else:
            (node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]).dtype = np.dtype(dtype)
        assert scale is not None
        point = np.broadcast_to(np.asarray(offset + by, dtype), scale.shape).copy()
        node.inputs = [*node.inputs[:2], gs.Constant(model.unique_name("z.0"), point)]
    if moved:
        changes.add("the model", f"{len(moved)} QuantizeLinear and DequantizeLinear of activations are {dtype}")


def _hands_off(quantizer: gs.Node, context: Context) -> bool:
    """Whether the user excludes a QuantizeLinear or the node whose result it takes."""
    return any(context.excludes(node) for node in (quantizer, *quantizer.inputs[0].inputs))


def _excluded(model: Model, context: Context, changes: Changes) -> bool:
    """Whether a change of the whole model would touch what the user excludes; says so."""
    node = next((node for node in model.graph.nodes if context.excludes(node)), None)
    if node is not None:
        changes.leave("the model", f"its types stay as they are: {node.name or node.outputs[0].name!r} is excluded")
    return node is not None


def _held(node: gs.Node, graph: gs.Graph) -> str | None:
    """Codes whose type cannot change: they are an input or output, or other nodes work on them."""
    codes = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    if isinstance(codes, gs.Constant):
        return None
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    alone = all(reader.op == "DequantizeLinear" for reader in codes.outputs) and encoder(codes) is not None
    readable = scale_of(node) is not None and (len(node.inputs) < 3 or zero_point_of(node) is not None)
    return None if alone and readable and id(codes) not in ends else str(codes.name)


def widen_softmax(model: Model, context: Context, changes: Changes, *, exactly: bool) -> None:
    """Give each Softmax the scale 1/256, over its whole range from 0 to 1.

    Args:
        model: Its graph is changed.
        context: Which nodes are excluded.
        changes: What is said.
        exactly: Whether another scale that reaches 1, such as 1/255, must go too.
    """
    for node in model.graph.nodes:
        dtype, scale, zero = codes_dtype(node), scale_of(node) if len(node.inputs) > 1 else None, zero_point_of(node)
        if node.op != "QuantizeLinear" or dtype not in {"uint8", "int8"} or scale is None or scale.size != 1:
            continue
        if not made_by(node, "Softmax") or _hands_off(node, context):
            continue
        limits = np.iinfo(dtype)
        step, point = float(scale.ravel()[0]), 0 if zero is None else int(zero.ravel()[0])
        reaches = step * (limits.max - point) >= 1 - 1.5 * SOFTMAX_STEP
        if (reaches and not exactly) or (np.isclose(step, SOFTMAX_STEP, rtol=1e-6) and point == limits.min):
            continue
        for user in (node, *(reader for reader in node.outputs[0].outputs if reader.op == "DequantizeLinear")):
            user.inputs = [
                user.inputs[0],
                gs.Constant(model.unique_name("s.0"), np.asarray(SOFTMAX_STEP, np.float32)),
                gs.Constant(model.unique_name("z.0"), np.asarray(limits.min, dtype)),
            ]
        changes.add(str(node.inputs[0].inputs[0].name or node.name), f"scale {step:.6g} becomes 1/256")


def drop_ruinous(model: Model, context: Context, changes: Changes) -> None:
    """Leave in float what one scale ruins: a Concat of unlike parts, a mask in front of a Softmax."""
    for node in [node for node in model.graph.nodes if node.op == "QuantizeLinear"]:
        if _hands_off(node, context):
            continue
        ratio, step = unlike_scales(node), step_before_softmax(node)
        if ratio >= UNLIKE:
            why = f"joins scales that differ by a factor of {ratio:.0f}"
        elif step >= COARSEST or not np.isfinite(step):
            why = f"a Softmax reads it in steps of {step:.3g}"
        else:
            continue
        name = str(node.name or node.outputs[0].name)
        if _remove_pair(model, node):
            changes.add(name, f"stays float: {why}")


def _remove_pair(model: Model, quantizer: gs.Node) -> bool:
    """Let the readers of a quantized tensor read the float one; whether all of them can."""
    readers = list(quantizer.outputs[0].outputs)
    ends = {id(tensor) for tensor in model.graph.outputs}
    if id(quantizer.outputs[0]) in ends or any(reader.op != "DequantizeLinear" for reader in readers):
        return False
    source = quantizer.inputs[0]
    for reader in readers:
        result = reader.outputs[0]
        if id(result) in ends:  # the output keeps its name
            reader.op, reader.inputs = "Identity", [source]
            reader.attrs.clear()
            continue
        redirect(result, source)
        reader.inputs.clear()
        reader.outputs.clear()
    quantizer.inputs.clear()
    quantizer.outputs.clear()
    _sweep(model)
    return True


def _sweep(model: Model) -> None:
    """Take nodes without outputs out of the graph."""
    model.graph.nodes = [node for node in model.graph.nodes if node.outputs]


def decode_at_load(model: Model, context: Context, changes: Changes) -> None:
    """Take all QuantizeLinear and DequantizeLinear out, for a target that has neither.

    Codes of constants are decoded by a Cast and a Mul, which ONNX Runtime computes when it loads the model: they stay
    as small as they are. Pairs around activations go; a Clip stays where the range of the codes may have stood for a
    Relu or Clip.
    """
    if _excluded(model, context, changes):
        return
    pairs = decoded = 0
    for node in [node for node in model.graph.nodes if node.op == "DequantizeLinear"]:
        if codes_of(node.inputs[0]) is not None and scale_of(node) is not None and not node.attrs.get("block_size"):
            model.graph.nodes[:0] = list(_decoder(model, node))
            decoded += 1
    _sweep(model)
    for node in [node for node in model.graph.nodes if node.op == "QuantizeLinear"]:
        clip = _clip(model, node)
        if clip is not None:
            node.inputs[0] = clip
        pairs += _remove_pair(model, node)
    left = sum(node.op in {"QuantizeLinear", "DequantizeLinear"} for node in model.graph.nodes)
    if pairs or decoded:
        changes.add("the model", f"{pairs} pairs are gone, {decoded} constants are decoded at load")
    if left:
        changes.leave("the model", f"{left} QuantizeLinear and DequantizeLinear stay: their codes are read elsewhere")


def _decoder(model: Model, node: gs.Node) -> Iterator[gs.Node]:
    """Cast, Sub where there is a zero point, and Mul in the place of a DequantizeLinear of constants."""
    codes, scale, zero = node.inputs[0], scale_of(node), zero_point_of(node)
    value = codes_of(codes)
    assert value is not None
    assert scale is not None
    axis = int(node.attrs.get("axis", 1)) % max(value.ndim, 1)
    shape = [-1 if place == axis else 1 for place in range(value.ndim)] if scale.size > 1 else []
    result = node.outputs[0]
    steps: list[tuple[str, Array | None]] = [("Cast", None)]
    if zero is not None and np.any(zero):
        steps.append(("Sub", zero.astype(np.float32).reshape(shape)))
    steps.append(("Mul", scale.astype(np.float32).reshape(shape)))
    node.inputs.clear()
    node.outputs.clear()
    tensor = codes
    for place, (op, operand) in enumerate(steps):
        inputs = [tensor] if operand is None else [tensor, gs.Constant(model.unique_name("s.0"), operand)]
        tensor = result if place == len(steps) - 1 else Variable(model.unique_name("c.0"))
        yield Node(op, "", {"to": int(onnx.TensorProto.FLOAT)} if operand is None else {}, inputs, [tensor])


def _clip(model: Model, quantizer: gs.Node) -> gs.Tensor | None:
    """What a quantized tensor is cut to, in float; None where nothing needs to be cut."""
    scale, zero, dtype = scale_of(quantizer), zero_point_of(quantizer), codes_dtype(quantizer)
    source = quantizer.inputs[0]
    maker = next(iter(source.inputs), None)
    if maker is None or maker.op in BOUNDED or scale is None or scale.size != 1 or dtype is None:
        return None
    limits, point = np.iinfo(dtype), 0 if zero is None else int(zero.ravel()[0])
    step = np.float32(scale.ravel()[0])
    ends = [np.asarray(step * (limit - point), np.float32) for limit in (limits.min, limits.max)]
    result = Variable(model.unique_name("f.0"))
    bounds = [gs.Constant(model.unique_name("l.0"), end) for end in ends]
    model.graph.nodes.append(Node("Clip", "", {}, [source, *bounds], [result]))
    return result
