"""Shapes of all tensors of a model, for given sizes of its inputs, without running it.

ONNX's own inference stops where a shape is computed in the graph by more than a few operators (a Div in attention is
enough). Here small values are computed along the way, so that it goes on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from onnxcomp.inference import infer_shapes
from onnxcomp.runtime.census import graphs, node_names

__all__ = ["Shape", "TracedNode", "traced_nodes"]

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

SMALL = 1024
"""Values of at most this many elements are computed: shapes, axes, indices."""

_QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})
# fmt: off
_COMPUTED = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Flatten",
    "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul",
    "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze",
    "Where",
))
# fmt: on
"""Operators of shape arithmetic."""


@dataclass(frozen=True)
class TracedNode:
    """A node and the shapes around it.

    Attributes:
        node: The node.
        name: Its unique name, as `onnxcomp.runtime.census.node_names` gives it.
        shapes: Of its inputs, then of its outputs; None where unknown or left out.
    """

    node: onnx.NodeProto
    name: str
    shapes: list[Shape | None]


def traced_nodes(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> Iterator[TracedNode]:
    """Yield the nodes of the graph, then those of its subgraphs, with the shapes of their inputs and outputs.

    Args:
        proto: The model; weights may be stubs without data. It is changed: dynamic axes get their sizes.
        shapes: Sizes of graph inputs, by name. Without it a dynamic first axis, and every other of its name, is 1.
    """
    _bind(proto.graph, shapes)
    # Of a model that its own operators contradict, what it declares and what each node tells has to do.
    with contextlib.suppress(shape_inference.InferenceError, RuntimeError, ValueError):
        proto = infer_shapes(proto)
    trace = _Trace(proto)
    names = iter(node_names(proto.graph))
    for graph in graphs(proto.graph):
        trace.enter(graph)
        for node in graph.node:
            trace.step(node)
            yield TracedNode(node, next(names), [trace.shape(name) for name in (*node.input, *node.output)])


def _bind(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give dynamic axes their sizes, wherever their names occur."""
    sizes: dict[str, int] = {}
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        given = list(shapes.get(info.name, ()))
        if len(given) != len(dims):
            given = [dim.dim_value or (1 if axis == 0 else 0) for axis, dim in enumerate(dims)]
        for dim, size in zip(dims, given, strict=True):
            if dim.dim_param and size:
                sizes.setdefault(dim.dim_param, int(size))
            elif size and dim.dim_value <= 0:
                dim.dim_value = int(size)
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


class _Trace:
    """What is known of tensors by name, as far as the nodes were looked at."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._opsets = list(proto.opset_import)
        self._versions = {"" if item.domain == "ai.onnx" else item.domain: item.version for item in self._opsets}
        self._types: dict[str, onnx.TypeProto] = {}
        self._values: dict[str, Array] = {}

    def enter(self, graph: onnx.GraphProto) -> None:
        """Take in what a graph declares. Outer names stay known: a subgraph comes right after the graph it is in."""
        for info in (*graph.input, *graph.output, *graph.value_info):
            self._types[info.name] = info.type
            self._values.pop(info.name, None)
        for tensor in graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            self._hold(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            name, kind = sparse.values.name, sparse.values.data_type
            self._types[name] = helper.make_tensor_type_proto(kind, list(sparse.dims))

    def _hold(self, name: str, tensor: onnx.TensorProto) -> None:
        inline = tensor.data_location != onnx.TensorProto.EXTERNAL
        if inline and tensor.data_type != onnx.TensorProto.STRING and math.prod(tensor.dims) <= SMALL:
            self._values[name] = numpy_helper.to_array(tensor)

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor, if all of it is known."""
        known = self._types.get(name) if name else None
        if known is None or not known.tensor_type.HasField("shape"):
            return None
        dims = known.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims):
            return None
        return tuple(dim.dim_value for dim in dims)

    def step(self, node: onnx.NodeProto) -> None:
        """Infer the outputs of a node, and compute them if they are small and follow from known values."""
        for name in node.output:
            self._values.pop(name, None)
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return  # what the whole model's inference said of If, Loop and Scan
        for name, inferred in self._infer(node).items():
            self._merge(name, inferred)
        if node.domain in ("", "ai.onnx"):
            for name, value in zip(node.output, self._compute(node), strict=False):
                if name:
                    self._values[name] = value
                    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                    self._types[name] = helper.make_tensor_type_proto(kind, list(value.shape))

    def _merge(self, name: str, inferred: onnx.TypeProto) -> None:
        """Keep the more definite of what was known and what a node tells."""
        if self.shape(name) is None and (inferred.tensor_type.HasField("shape") or name not in self._types):
            self._types[name] = inferred

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain == "com.microsoft" and node.op_type in _QUANTIZING:  # 16 bits before ONNX has them in opset 21
            kind = self._types.get(node.input[2]) if node.op_type == "QuantizeLinear" and len(node.input) > 2 else None
            shape = self.shape(node.input[0])
            elements = kind.tensor_type.elem_type if kind else onnx.TensorProto.FLOAT
            return {node.output[0]: helper.make_tensor_type_proto(elements, shape)} if shape is not None else {}
        types = {name: self._types[name] for name in node.input if name in self._types}
        data = {name: numpy_helper.from_array(self._values[name]) for name in node.input if name in self._values}
        if any(name and name not in types for name in node.input):
            return {}
        try:
            schema = defs.get_schema(node.op_type, self._versions.get(domain, 1), domain)
            return shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=self._opsets)
        except (defs.SchemaError, shape_inference.InferenceError, RuntimeError, ValueError, KeyError):
            return {}  # an operator of another domain, or one that ONNX cannot infer

    def _compute(self, node: onnx.NodeProto) -> list[Array]:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    self._hold(node.output[0], attribute.t)
                    value = self._values.get(node.output[0])
                    return [] if value is None else [value]
        if node.op_type == "Shape" and (shape := self.shape(node.input[0])) is not None:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            return [np.array(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], np.int64)]
        if node.op_type == "Size" and (shape := self.shape(node.input[0])) is not None:
            return [np.array(math.prod(shape), np.int64)]
        known = all(name in self._values for name in node.input if name)
        sizes = [math.prod(shape) if (shape := self.shape(name)) is not None else SMALL + 1 for name in node.output]
        if node.op_type not in _COMPUTED or not known or max(sizes, default=0) > SMALL:
            return []
        feed = {name: self._values[name] for name in node.input if name}
        try:
            with np.errstate(all="ignore"):
                outputs = ReferenceEvaluator(_alone(node, feed), opsets=self._versions).run(None, feed)
        except Exception:  # noqa: BLE001 - the reference raises what numpy raises; what it cannot do stays unknown
            return []
        return [np.asarray(value) for value in outputs]


def _alone(node: onnx.NodeProto, feed: Mapping[str, Array]) -> onnx.GraphProto:
    """A graph of one node: unlike a bare node, it can be given its operator set."""
    inputs, outputs = ([onnx.ValueInfoProto(name=name) for name in names] for names in (feed, node.output))
    return helper.make_graph([node], "one", inputs, outputs)
