"""Quantized activations brought to what a target's kernels take: their type, their scale, or out of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.graph_io import Node, Variable
from onnxcomp.lints.quantization import COARSEST, SOFTMAX_STEP, UNLIKE, made_by, step_before_softmax, unlike_scales
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.qdq import LAYERS, codes_dtype, codes_of, encoder, has_zero_point, scale_of, zero_point_of
from onnxcomp.targets import QuantizationRules
from onnxcomp_passes._refit_weights import decoded
from onnxcomp_passes._stored import redirect

__all__ = ["decode_at_load", "drop_ruinous", "shift", "widen_softmax"]

Array = np.ndarray[Any, Any]

BOUNDED = frozenset({"Softmax", "Sigmoid", "HardSigmoid", "Tanh"})
"""Operators whose results need no clipping once their codes are gone."""

GROUPING = {"axis": 1, "block_size": 0}
"""Attributes that say which part of a tensor a scale is for, with what they are where left out."""


OTHER_SIGN = {"int8": "uint8", "uint8": "int8", "int16": "uint16"}

LIMITS = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    **{name: (int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in ("int8", "uint8", "int16", "uint16")},
}
"""Type of codes -> where they end."""


def shift(model: Model, rules: QuantizationRules, context: Context, changes: Changes) -> None:
    """Make all 8-bit activations int8, or all uint8, and 16-bit ones uint16 where the target has kernels for these.

    The same scales, zero points moved by half the range. Exact.
    """
    nodes = [node for node in model.graph.nodes if _is_of_activations(node)]
    wanted = {rules.activations, rules.wide} - {None}
    moved = []
    for node in nodes:
        dtype = codes_dtype(node) or ""
        if dtype not in wanted and OTHER_SIGN.get(dtype) in wanted:
            moved.append((node, OTHER_SIGN[dtype]))
    wide = sorted({codes_dtype(node) or "" for node in nodes} & {"int16", "uint16"})
    if wide and rules.wide is None:
        changes.leave("the model", f"{' and '.join(wide)} activations stay: 8 bits have other values")
    if _excluded(model, context, changes):
        return
    held = next((name for node, _ in moved if (name := _held(node, model.graph))), None)
    if held:
        changes.leave("the model", f"its activations stay as they are: {held!r} is read or made as codes elsewhere")
        return
    for node, dtype in moved:
        _move(model, node, dtype)
    for dtype in sorted({dtype for _, dtype in moved}):
        count = sum(other == dtype for _, other in moved)
        changes.add("the model", f"{count} QuantizeLinear and DequantizeLinear of activations are {dtype}")


def _move(model: Model, node: gs.Node, dtype: str) -> None:
    """Give codes the other sign."""
    zero, scale = zero_point_of(node), scale_of(node)
    assert scale is not None
    by = LIMITS[dtype][0] or -np.iinfo(np.dtype(dtype.removeprefix("u"))).min
    codes = codes_of(node.inputs[0]) if node.op == "DequantizeLinear" else None
    if codes is not None:
        node.inputs[0] = gs.Constant(model.unique_name("q.0"), np.asarray(codes.astype(np.int32) + by, dtype))
    else:
        (node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]).dtype = np.dtype(dtype)
    point = np.asarray((0 if zero is None else zero.astype(np.int32)) + by, dtype)
    point = np.broadcast_to(point, scale.shape).copy()
    node.inputs = [*node.inputs[:2], gs.Constant(model.unique_name("z.0"), point)]
    node.attrs.pop("output_dtype", None)  # the zero point has the type


def _is_of_activations(node: gs.Node) -> bool:
    """Whether a node quantizes or dequantizes something else than a layer's constant weight or bias."""
    if node.op != "DequantizeLinear" or codes_of(node.inputs[0]) is None:
        return node.op in {"QuantizeLinear", "DequantizeLinear"}
    return not any(reader.op in LAYERS for reader in node.outputs[0].outputs)


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
    """Codes whose type cannot change: they are an input or output, other nodes work on them, or they mean who knows."""
    codes = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    readable = scale_of(node) is not None and (not has_zero_point(node) or zero_point_of(node) is not None)
    if node.op == "DequantizeLinear" and codes_of(codes) is not None:
        return None if readable else str(codes.name)
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    alone = all(reader.op == "DequantizeLinear" for reader in codes.outputs) and encoder(codes) is not None
    return None if alone and readable and id(codes) not in ends else str(codes.name)


def _decoders(model: Model, quantizer: gs.Node) -> list[gs.Node] | None:
    """The nodes that read codes, where all of them give back what was quantized; None where some do not."""
    codes = quantizer.outputs[0]
    if any(tensor is codes for tensor in model.graph.outputs):
        return None
    readers = list(codes.outputs)
    return readers if all(_means_the_same(quantizer, reader) for reader in readers) else None


def _means_the_same(quantizer: gs.Node, reader: gs.Node) -> bool:
    """Whether a node dequantizes with the scale and zero point of a QuantizeLinear, to the type that went in."""
    if reader.op != "DequantizeLinear":
        return False
    source, result = quantizer.inputs[0].dtype, reader.outputs[0].dtype
    if source is not None and result is not None and np.dtype(source) != np.dtype(result):
        return False
    if any(quantizer.attrs.get(name, other) != reader.attrs.get(name, other) for name, other in GROUPING.items()):
        scale = scale_of(reader)
        if scale is None or scale.size > 1:
            return False
    return _equal(quantizer.inputs[1], reader.inputs[1]) and _equal(_zero(quantizer), _zero(reader))


def _zero(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[2] if has_zero_point(node) else None


def _equal(one: gs.Tensor | None, other: gs.Tensor | None) -> bool:
    """Whether two scales or zero points are the same; one that is left out is 0."""
    if one is other:
        return True
    a, b = (np.zeros(1) if tensor is None else codes_of(tensor) for tensor in (one, other))
    return (
        a is not None
        and b is not None
        and (a.size == b.size or 1 in {a.size, b.size})
        and bool(np.all(a.ravel() == b.ravel()))
    )


def widen_softmax(model: Model, context: Context, changes: Changes, *, exactly: bool) -> None:
    """Give each Softmax the scale 1/256, over its whole range from 0 to 1.

    Args:
        model: Its graph is changed.
        context: Which nodes are excluded.
        changes: What is said.
        exactly: Whether another scale that reaches 1, such as 1/255, must go too.
    """
    for node in model.graph.nodes:
        if node.op != "QuantizeLinear" or not made_by(node, "Softmax") or _hands_off(node, context):
            continue
        dtype, scale, zero = codes_dtype(node), scale_of(node), zero_point_of(node)
        if dtype not in {"uint8", "int8"} or scale is None or scale.size != 1:
            continue
        (low, high), step, point = LIMITS[dtype], float(scale.ravel()[0]), 0 if zero is None else int(zero.ravel()[0])
        reaches = step * (high - point) >= 1 - 1.5 * SOFTMAX_STEP
        if (reaches and not exactly) or (np.isclose(step, SOFTMAX_STEP, rtol=1e-6) and point == low):
            continue
        name, decoders = str(node.inputs[0].inputs[0].name or node.name), _decoders(model, node)
        if decoders is None:
            changes.leave(name, f"its scale {step:.6g} stays: its codes are read or dequantized in another way")
            continue
        for user in (node, *decoders):
            one = gs.Constant(model.unique_name("s.0"), np.asarray(SOFTMAX_STEP, scale.dtype))
            user.inputs = [user.inputs[0], one, gs.Constant(model.unique_name("z.0"), np.asarray(low, dtype))]
            user.attrs.pop("output_dtype", None)  # the zero point has the type
        changes.add(name, f"scale {step:.6g} and zero point {point} become 1/256 and {low}")


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
        if _remove_pair(model, node, node.inputs[0]):
            changes.add(name, f"stays float: {why}")
        else:
            changes.leave(name, f"{why}, and its codes are read or dequantized in another way")
    _sweep(model)


def _remove_pair(model: Model, quantizer: gs.Node, source: gs.Tensor) -> bool:
    """Let the readers of a quantized tensor read a float one; whether all of them can.

    The nodes of the pair lose their inputs and outputs; `_sweep` takes them out.
    """
    readers = _decoders(model, quantizer)
    if readers is None:
        return False
    ends = {id(tensor) for tensor in model.graph.outputs}
    for reader in readers:
        result = reader.outputs[0]
        if id(result) in ends:  # the output keeps its name
            reader.op, reader.domain, reader.inputs = "Identity", None, [source]
            reader.attrs.clear()
            continue
        redirect(result, source)
        reader.inputs.clear()
        reader.outputs.clear()
    quantizer.inputs.clear()
    quantizer.outputs.clear()
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
    pairs, steps = 0, 0
    made: list[gs.Node] = []
    for node in [node for node in model.graph.nodes if node.op == "DequantizeLinear"]:
        if codes_of(node.inputs[0]) is None or scale_of(node) is None:
            continue
        if has_zero_point(node) and zero_point_of(node) is None:
            continue
        made += _decoder(model, node)
        steps += 1
    model.graph.nodes[:0] = made
    for node in [node for node in model.graph.nodes if node.op == "QuantizeLinear"]:
        if scale_of(node) is None or _decoders(model, node) is None:
            continue
        clip = _clip(model, node)
        pairs += _remove_pair(model, node, node.inputs[0] if clip is None else clip)
    _sweep(model)
    left = sum(node.op in {"QuantizeLinear", "DequantizeLinear"} for node in model.graph.nodes)
    if pairs or steps:
        changes.add("the model", f"{pairs} pairs are gone, {steps} constants are decoded at load")
    if left:
        why = "their codes are read or made elsewhere, or their scales are computed"
        changes.leave("the model", f"{left} QuantizeLinear and DequantizeLinear stay: {why}")


def _decoder(model: Model, node: gs.Node) -> Iterator[gs.Node]:
    """Cast, Sub where there is a zero point, and Mul in the place of a DequantizeLinear of constants.

    Codes with a scale for each block have no such form: they become the dense weight.
    """
    codes, scale, zero = node.inputs[0], scale_of(node), zero_point_of(node)
    value, result = codes_of(codes), node.outputs[0]
    assert value is not None
    assert scale is not None
    if node.attrs.get("block_size"):
        dense = gs.Constant(model.unique_name("w.0"), decoded(node))
        node.inputs.clear()
        node.outputs.clear()
        yield Node("Identity", "", {}, [dense], [result])
        return
    axis = int(node.attrs.get("axis", 1)) % max(value.ndim, 1)
    shape = [-1 if place == axis else 1 for place in range(value.ndim)] if scale.size > 1 else []
    steps: list[tuple[str, Array | None]] = [("Cast", None)]
    if zero is not None and np.any(zero):
        steps.append(("Sub", zero.astype(scale.dtype).reshape(shape if zero.size > 1 else [])))
    steps.append(("Mul", scale.reshape(shape)))
    node.inputs.clear()
    node.outputs.clear()
    tensor, to = codes, int(helper.np_dtype_to_tensor_dtype(scale.dtype))
    for place, (op, operand) in enumerate(steps):
        inputs = [tensor] if operand is None else [tensor, gs.Constant(model.unique_name("s.0"), operand)]
        tensor = result if place == len(steps) - 1 else Variable(model.unique_name("c.0"))
        yield Node(op, "", {"to": to} if operand is None else {}, inputs, [tensor])


def _clip(model: Model, quantizer: gs.Node) -> gs.Tensor | None:
    """What a quantized tensor is cut to, in float; None where nothing needs to be cut."""
    scale, zero, limits = scale_of(quantizer), zero_point_of(quantizer), LIMITS.get(codes_dtype(quantizer) or "")
    source = quantizer.inputs[0]
    maker = next(iter(source.inputs), None)
    if maker is None or maker.op in BOUNDED or scale is None or scale.size != 1 or limits is None:
        return None
    if has_zero_point(quantizer) and zero is None:
        return None
    point = 0 if zero is None else int(zero.ravel()[0])
    ends = [np.asarray(float(scale.ravel()[0]) * (limit - point), scale.dtype) for limit in limits]
    result = Variable(model.unique_name("f.0"), dtype=scale.dtype, shape=source.shape)
    bounds = [gs.Constant(model.unique_name("l.0"), end) for end in ends]
    model.graph.nodes.append(Node("Clip", "", {}, [source, *bounds], [result]))
    return result
