"""What shape inference can prove about a model, and the values of tensors that hold shapes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import shape_inference

from onnxcomp.inference import infer_shapes
from onnxcomp.weights import numpy_dtype

if TYPE_CHECKING:
    from onnxcomp.model import Model
    from onnxcomp_passes._workspace import Workspace

__all__ = ["Known", "KnownTensors", "ShapeValues", "all_known", "infer_known"]


@dataclass(frozen=True)
class Known:
    """What is proven of a tensor: its element type and its dimensions, None where unknown."""

    dtype: np.dtype[Any] | None
    dims: tuple[int | str, ...] | None


Dims = tuple[int | str, ...] | None
KnownTensors = dict[int, tuple[gs.Tensor, Known]]


def infer_known(model: Model) -> KnownTensors:
    """Infer dtypes and shapes from the inputs and weights alone, by identity of the tensor.

    What the model declares about inner tensors and outputs is not believed: exporters get it wrong. Each unknown input
    dimension gets a name of its own, so equal names mean equal numbers (runtimes do not check that two inputs that
    both declare `N` agree).
    """
    proto = model.proto()
    _forget(proto.graph)
    _forget_default_values(proto)
    for number, info in enumerate(proto.graph.input):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                dim.dim_param = f"?{number}.{axis}"
    try:
        inferred = infer_shapes(proto)
    except (shape_inference.InferenceError, RuntimeError, ValueError):
        inferred = proto  # its operators contradict each other: only what the inputs say is known
    known: KnownTensors = {}
    _collect(model.graph, inferred.graph, known, itertools.count())
    return known


def _forget(graph: onnx.GraphProto, *, inner: bool = False) -> None:
    """Take out what is declared but not inferred: inner tensors, output shapes, shapes of the inputs of subgraphs."""
    del graph.value_info[:]
    for info in (*graph.output, *(graph.input if inner else ())):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _forget(body, inner=True)


def _forget_default_values(proto: onnx.ModelProto) -> None:
    """An initializer that is also an input is a default that the caller may override, so its value proves nothing."""
    inputs = {info.name for info in proto.graph.input} if proto.ir_version >= 4 else set()
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in inputs]
    if len(kept) < len(proto.graph.initializer):
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)


def _collect(graph: gs.Graph, proto: onnx.GraphProto, known: KnownTensors, numbers: Iterator[int]) -> None:
    found = {info.name: info for info in (*proto.value_info, *proto.output, *proto.input)}
    tensors = (*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs))
    for tensor in tensors:
        info = found.get(tensor.name)
        if info is not None and info.type.HasField("tensor_type"):
            known[id(tensor)] = tensor, _known(info.type.tensor_type, numbers)
    for node, node_proto in zip(graph.nodes, proto.node, strict=True):
        for attribute in node_proto.attribute:
            body = node.attrs.get(attribute.name)
            if isinstance(body, gs.Graph):
                _collect(body, attribute.g, known, numbers)


def _known(tensor_type: onnx.TypeProto.Tensor, numbers: Iterator[int]) -> Known:
    dtype = numpy_dtype(tensor_type.elem_type) if tensor_type.elem_type else None
    if not tensor_type.HasField("shape"):
        return Known(dtype, None)
    dims: list[int | str] = []
    for dim in tensor_type.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(int(dim.dim_value))
        else:  # a dimension without a name equals no other
            dims.append(dim.dim_param or f"?{next(numbers)}")
    return Known(dtype, tuple(dims))


# --- values of shapes -------------------------------------------------------------------------------------------------

MAX_ELEMENTS = 64
"""Longer integer tensors are data, not shapes."""

ARITHMETIC: dict[str, Callable[[int, int], int]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}

Rule = Callable[["ShapeValues", gs.Node], np.ndarray[Any, Any] | None]


class ShapeValues:
    """The values of integer tensors that hold shapes, element by element: a number, the name of a dimension, or None.

    Ask `visit` for each node in topological order; `of` then knows what can be proven of a tensor.
    """

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self._values: dict[int, tuple[gs.Tensor, np.ndarray[Any, Any]]] = {}

    def of(self, tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
        """What is known of a tensor's elements: an object array of rank 0 or 1, or None."""
        if id(tensor) in self._values:
            return self._values[id(tensor)][1]
        value = self._work.value(tensor)
        if value is None or value.dtype not in (np.int64, np.int32) or value.ndim > 1 or value.size > MAX_ELEMENTS:
            return None
        return np.array([int(item) for item in value.reshape(-1)], dtype=object).reshape(value.shape)

    def visit(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Work out the output of a node from what is known of its inputs."""
        rule = RULES.get(node.op)
        if rule is None or node.domain not in (None, "", "ai.onnx") or not node.outputs:
            return None
        value = rule(self, node)
        if value is None or value.ndim > 1 or value.size > MAX_ELEMENTS:
            return None
        self._values[id(node.outputs[0])] = node.outputs[0], value
        return value

    # --- one rule an operator ----------------------------------------------------------------------------------------

    def shape(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Shape, with start and end."""
        dims = self._work.dims(node.inputs[0])
        if dims is None:
            return None
        return _objects(dims[slice(node.attrs.get("start", 0), node.attrs.get("end"))])

    def gather(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Gather of elements of a shape."""
        data, index = self.of(node.inputs[0]), self._work.value(node.inputs[1])
        if data is None or index is None or data.ndim != 1 or node.attrs.get("axis", 0) not in (0, -1):
            return None
        if not all(-data.size <= int(item) < data.size for item in index.reshape(-1)):
            return None
        picked = [data[int(item)] for item in index.reshape(-1)]
        return _objects(picked).reshape(index.shape)

    def concat(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Concat of pieces of a shape; an integer piece that is unknown but of known length counts."""
        pieces = []
        for tensor in node.inputs:
            piece = self.of(tensor)
            if piece is None:
                dims = self._work.static_dims(tensor)
                if dims is None or len(dims) != 1 or dims[0] > MAX_ELEMENTS:
                    return None
                piece = _objects([None] * dims[0])
            pieces.append(piece)
        if any(piece.ndim != 1 for piece in pieces) or all(item is None for piece in pieces for item in piece):
            return None
        return np.concatenate(pieces)

    def unsqueeze(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """A scalar as a list of one."""
        data = self.of(node.inputs[0])
        axes = self._work.ints(node, "axes", 1)
        return data.reshape(1) if data is not None and data.ndim == 0 and axes in ([0], [-1]) else None

    def squeeze(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """A list of one as a scalar."""
        data = self.of(node.inputs[0])
        return data.reshape(()) if data is not None and data.shape == (1,) else None

    def reshape(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """A scalar or a list as a list, or as a scalar."""
        data = self.of(node.inputs[0])
        target = self._work.ints(node, "shape", 1)
        if data is None or target is None:
            return None
        if target in ([-1], [data.size]):
            return data.reshape(-1)
        return data.reshape(()) if target == [] and data.size == 1 else None

    def same(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Identity."""
        return self.of(node.inputs[0])

    def cast(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Cast between the integer types that shapes come in."""
        data = self.of(node.inputs[0])
        if data is None or node.attrs.get("to") not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            return None
        small = all(not isinstance(item, int) or -(2**31) <= item < 2**31 for item in data.reshape(-1))
        return data if small else None

    def slice(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Slice of a shape."""
        data = self.of(node.inputs[0])
        starts, ends = (self._work.ints(node, name, index) for name, index in (("starts", 1), ("ends", 2)))
        if data is None or data.ndim != 1 or starts is None or ends is None or len(starts) != 1 or len(ends) != 1:
            return None
        optional = {3: [0], 4: [1]}
        for index, name in ((3, "axes"), (4, "steps")):
            if name in node.attrs or (len(node.inputs) > index and not node.inputs[index].is_empty()):
                given = self._work.ints(node, name, index)
                if given is None or len(given) != 1:
                    return None
                optional[index] = given
        if optional[3][0] not in (0, -1) or optional[4][0] <= 0:
            return None
        return data[slice(starts[0], ends[0], optional[4][0])]

    def arithmetic(self, node: gs.Node) -> np.ndarray[Any, Any] | None:
        """Add, Sub, Mul and Div of numbers that are known."""
        left, right = (self.of(tensor) for tensor in node.inputs)
        if left is None or right is None or left.size * right.size > MAX_ELEMENTS**2:
            return None
        if left.ndim == right.ndim == 1 and left.size != right.size and 1 not in (left.size, right.size):
            return None

        def combine(one: Any, other: Any) -> int | None:
            if not isinstance(one, int) or not isinstance(other, int):
                return None
            if node.op == "Div":
                return one // other if one >= 0 and other > 0 else None
            result = ARITHMETIC[node.op](one, other)
            return result if abs(result) < 2**31 else None

        return np.asarray(np.frompyfunc(combine, 2, 1)(left, right), dtype=object)


RULES: dict[str, Rule] = {
    "Shape": ShapeValues.shape,
    "Gather": ShapeValues.gather,
    "Concat": ShapeValues.concat,
    "Unsqueeze": ShapeValues.unsqueeze,
    "Squeeze": ShapeValues.squeeze,
    "Reshape": ShapeValues.reshape,
    "Identity": ShapeValues.same,
    "Cast": ShapeValues.cast,
    "Slice": ShapeValues.slice,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), ShapeValues.arithmetic),
}


def _objects(items: Iterable[Any]) -> np.ndarray[Any, Any]:
    listed = list(items)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def all_known(value: np.ndarray[Any, Any] | None) -> bool:
    """Whether every element is a number."""
    return value is not None and all(isinstance(item, int) for item in value.reshape(-1))
