"""Constant folding: what can be computed when the model is made is not computed at each inference."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxcomp.graph_io import export_node
from onnxcomp.model import value_of
from onnxcomp.weights import LazyWeight
from onnxcomp_passes._shapes import ShapeValues, all_known
from onnxcomp_passes._workspace import Array, Workspace, is_dense, is_standard, label

__all__ = ["constants_to_initializers", "fold"]

# One name a line would hide how the lists differ.
# fmt: off
MOVING = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})
"""Operators that only move elements: right for every element type."""

COMPUTING = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "ConstantOfShape", "Cos", "Div", "Equal", "Exp", "Floor", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow",
    "Range", "Reciprocal", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Shape", "Sin", "Size", "Sqrt",
    "Sub", "Tanh", "Xor",
})
"""Operators whose value is the same everywhere, to float rounding, for `COMPUTED_DTYPES`."""
# fmt: on

GROWING = frozenset({"ConstantOfShape", "Expand", "Range", "Tile"})
"""Operators that make much out of little."""

COMPUTED_DTYPES = frozenset(map(np.dtype, ("float32", "float64", "int32", "int64", "bool")))
MOVED_DTYPES = COMPUTED_DTYPES | frozenset(map(np.dtype, ("float16", "int8", "uint8", "int16", "uint16")))

GROWN_BYTES = 256
"""How much a growing operator may add."""

PACKED_ELEMENTS = 64
"""A Cast of more 8-bit integers than this decodes a packed weight."""

LARGE_BYTES = 1 << 20
"""Values of this size are only made where they may be held in memory."""


def constants_to_initializers(work: Workspace) -> int:
    """Turn Constant nodes into initializers; returns how many."""
    count = 0
    for graph in work.graphs():
        for node in work.nodes(graph):
            if not is_standard(node, "Constant") or len(node.outputs) != 1 or work.is_fixed(node.outputs[0]):
                continue
            values = _constant_value(node)
            if values is None:
                continue
            constant = gs.Constant(node.outputs[0].name, values)
            constant.owner = graph
            work.replace(node.outputs[0], constant)
            work.kill(node)
            count += 1
    return count


def _constant_value(node: gs.Node) -> Any:
    """The value of a Constant node in any of its forms, else None (sparse, or a function's attribute)."""
    if len(node.attrs) != 1:
        return None
    name, value = next(iter(node.attrs.items()))
    if isinstance(value, gs.Constant):
        return value._values if name == "value" and is_dense(value) else None
    if isinstance(value, onnx.AttributeProto):
        if value.ref_attr_name or name not in {"value_ints", "value_floats", "value_strings", "value_string"}:
            return None
        value = helper.get_attribute_value(value)
    if name in {"value_string", "value_strings"}:
        strings = value if isinstance(value, list) else [value]
        dims = [len(strings)] if isinstance(value, list) else []
        return LazyWeight(helper.make_tensor("", onnx.TensorProto.STRING, dims, strings), None)
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return np.array(value, dtypes[name]) if name in dtypes else None


def fold(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    """Replace a node by its value if that is known and does not make the file bigger."""
    known = shapes.visit(node)
    if known is not None and all_known(known) and len(node.outputs) == 1 and not work.is_fixed(node.outputs[0]):
        dtype = work.dtype(node.outputs[0])
        if dtype in (np.int64, np.int32):
            return _become(work, node, [np.array(known.tolist(), dtype)])
    if not _foldable(work, node):
        return False
    values = _evaluate(work, node)
    return values is not None and _become(work, node, values)


def _become(work: Workspace, node: gs.Node, values: list[Array]) -> bool:
    """Put initializers in place of a node, if that pays."""
    added = sum(value.nbytes for value in values)
    if added > work.freed_bytes(node.inputs, [node]) + _allowance(work, node):
        return False
    work.changes.add(label(node), f"{node.op} replaced by its constant value")
    graph = work.graph_of(node)
    results = [tensor for tensor in node.outputs if tensor.name]
    for tensor, value in zip(results, values, strict=True):
        work.replace(tensor, work.constant(tensor.name, value, graph))
    work.kill(node)
    return True


def _allowance(work: Workspace, node: gs.Node) -> int:
    return min(work.slack, GROWN_BYTES) if node.op in GROWING else work.slack


def _foldable(work: Workspace, node: gs.Node) -> bool:
    """Whether all inputs are constants that may be computed with, and the result is sure not to be too large."""
    if not is_standard(node, *MOVING, *COMPUTING) or work.opset < 7 or not node.inputs:
        return False
    if any(work.is_fixed(tensor) for tensor in node.outputs) or not all(_plain(value) for value in node.attrs.values()):
        return False
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if not inputs or not all(is_dense(tensor) for tensor in inputs):
        return False
    allowed = MOVED_DTYPES if node.op in MOVING else COMPUTED_DTYPES
    if node.op == "Cast":
        if _decodes_weight(inputs[0]):
            work.leave(node, "it decodes a packed weight")
            return False
        if work.dtype(node.outputs[0]) not in MOVED_DTYPES or inputs[0].dtype not in MOVED_DTYPES:
            return False
    elif any(tensor.dtype not in allowed for tensor in inputs) and node.op not in {"Shape", "Size"}:
        return False
    bound = _result_bytes(work, node)
    if bound is not None and bound >= LARGE_BYTES and not work.holds_large:
        work.leave(node, f"its constant value of {bound:,} bytes is not computed: the model may not fit in memory")
        return False
    return bound is not None and bound <= work.freed_bytes(inputs, [node]) + _allowance(work, node)


def _plain(value: Any) -> bool:
    small = isinstance(value, gs.Constant) and is_dense(value) and value._values.nbytes <= PACKED_ELEMENTS
    return small or isinstance(value, int | float | str | list)


def _decodes_weight(tensor: gs.Tensor) -> bool:
    dtype = np.dtype(tensor.dtype)
    narrow = dtype.itemsize == 1 and dtype.kind != "b"  # 2- and 4-bit types have one byte an element in numpy
    return bool(narrow and math.prod(tensor.shape) > PACKED_ELEMENTS)


def _result_bytes(work: Workspace, node: gs.Node) -> int | None:
    """How many bytes the results take, from shape inference; None where that is not known."""
    total = 0
    for tensor in node.outputs:
        if not tensor.name:
            continue
        dims, dtype = work.static_dims(tensor), work.dtype(tensor)
        if dims is None or dtype is None:
            return None
        total += math.prod(dims) * dtype.itemsize
    return total


def _evaluate(work: Workspace, node: gs.Node) -> list[Array] | None:
    """Run one node in ONNX's reference evaluator; None where the result is not to be trusted."""
    feeds = {tensor.name: value_of(tensor) for tensor in node.inputs if not tensor.is_empty()}
    proto = onnx.NodeProto()
    export_node(node, proto, work.model._dump, {})
    results = [tensor for tensor in node.outputs if tensor.name]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    graph = helper.make_graph([proto], "node", inputs, [onnx.ValueInfoProto(name=tensor.name) for tensor in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", work.opset)])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            values = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever an operator raises, the node simply stays
        return None
    expected = [(work.dtype(tensor), work.static_dims(tensor)) for tensor in results]
    arrays = [np.asarray(value) for value in values]
    if [(array.dtype, array.shape) for array in arrays] != expected:
        return None
    finite_in = all(np.isfinite(value).all() for value in feeds.values() if value.dtype.kind == "f")
    finite_out = all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
    if not finite_out and (finite_in or node.op not in MOVING):
        return None
    if node.op == "Cast" and not _cast_is_defined(next(iter(feeds.values())), arrays[0].dtype):
        return None
    return arrays


def _cast_is_defined(value: Array, dtype: np.dtype[Any]) -> bool:
    """Whether a cast means the same everywhere: floats outside an integer type's range do not."""
    if value.dtype.kind != "f" or dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    return bool(np.isfinite(value).all() and (value > float(limits.min)).all() and (value < float(limits.max)).all())
