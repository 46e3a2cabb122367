"""Which channels of a tensor are constant, whatever the input: proven from the weights alone.

A channel whose weights are all zero is its bias; what comes of it is followed through the graph. The value of a tensor
is an array of its rank in which NaN stands for what is not known. An axis along which all is the same has length 1, so
that (1, channels, 1, 1) stands for any batch and any image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxcomp.graph_io import export_node, sorted_nodes
from onnxcomp.model import Model, value_of
from onnxcomp_passes._constant_moves import LARGEST, MOVES, adds_border
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._views import WeightView, find_views
from onnxcomp_passes._workspace import is_dense, is_standard

__all__ = ["ConstantChannels", "by_input_channel"]

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]

FIRST_OPSET = 7
"""Before it, operators broadcast in another way."""

LARGEST_CONSTANT = 1 << 16
"""Constants with more elements than this are weights and tables, not something with an entry for each channel."""

# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu",
    "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh",
    "ThresholdedRelu",
))
# fmt: on
def by_input_channel(node: gs.Node, weight: Array) -> Array:
    """A Conv's weight as (groups, outputs of a group, inputs of a group, kernel positions)."""
    groups = int(node.attrs.get("group", 1))
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


class ConstantChannels:
    """What is known of each tensor of the main graph.

    Args:
        model: The model; it is not changed. Each weight is read once.

    Example:
        >>> from onnx import numpy_helper, parser
        >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y) '
        >>> proto = parser.parse_model(text + "{ h = Gemm(x, W, b) y = Relu(h) }")
        >>> arrays = {"W": np.array([[1, 0], [2, 0]], np.float32), "b": np.array([3, -4], np.float32)}
        >>> proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
        >>> model = Model.load(proto)
        >>> ConstantChannels(model).of(model.graph.outputs[0]).tolist()
        [[nan, 0.0]]
    """

    def __init__(self, model: Model) -> None:
        self._opset = model.opset
        self._known = infer_known(model)
        self._values: dict[int, Array] = {}
        self._views = {id(view.node.inputs[view.index]): view for view in find_views(model)}
        nodes = sorted_nodes(model.graph)
        self._tensors = [tensor for node in nodes for tensor in (*node.inputs, *node.outputs)]  # keeps their ids
        own = {function.name for function in model.functions if function.domain in ("", "ai.onnx")}
        if self._opset < FIRST_OPSET:
            return
        with np.errstate(all="ignore"):
            for node in nodes:
                if is_standard(node, node.op) and node.op not in own and node.outputs:
                    self._visit(node)

    def of(self, tensor: gs.Tensor) -> Array | None:
        """The values of a tensor, NaN where they are not known, float64; None: nothing is known."""
        if isinstance(tensor, gs.Constant):
            if not is_dense(tensor) or not 0 < np.prod(tensor.shape, dtype=np.int64) <= LARGEST_CONSTANT:
                return None
            value = value_of(tensor)
            return value.astype(np.float64) if value.dtype.kind in "fiu" else None
        return self._values.get(id(tensor))

    def along(self, tensor: gs.Tensor, axis: int, extent: int) -> Array:
        """What is known of each channel, where it is the same throughout the channel, shape (extent,); else NaN.

        Args:
            tensor: A tensor.
            axis: Its channel axis.
            extent: How many channels it has.
        """
        value = self.of(tensor)
        if value is None or value.size not in (1, value.shape[axis]):
            return np.full(extent, np.nan)
        return np.broadcast_to(value.reshape(-1), (extent,))

    def weight(self, node: gs.Node, index: int) -> Array | None:
        """The weight at an input of a node, float32; None if that is no constant."""
        view = self.view(node, index)
        return None if view is None else view.read()

    def view(self, node: gs.Node, index: int) -> WeightView | None:
        """Where the weight at an input of a node is held."""
        return self._views.get(id(node.inputs[index])) if len(node.inputs) > index else None

    def dims(self, tensor: gs.Tensor) -> Dims | None:
        """The dimensions, a name for each that is not known."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        found = self._known.get(id(tensor))
        return found[1].dims if found else None

    # --- one node -----------------------------------------------------------------------------------------------------

    def _visit(self, node: gs.Node) -> None:
        if node.op in ELEMENTWISE:
            self.put(node.outputs[0], self._elementwise(node))
        elif node.op in MOVES:
            MOVES[node.op](self, node)
        elif node.op in LAYERS:
            self.put(node.outputs[0], LAYERS[node.op](self, node))

    def put(self, tensor: gs.Tensor, value: Array | None, *, kinds: str = "f") -> None:
        """Keep what was found, unless that is nothing, or contradicts the shape or type.

        Args:
            tensor: An output.
            value: What is known of it. Of integers that stand for floats, these.
            kinds: The kinds of type that the tensor may have, as numpy calls them.
        """
        if value is None or not np.any(np.isfinite(value)):
            return
        dims, dtype = self.dims(tensor), self._known[id(tensor)][1].dtype if id(tensor) in self._known else None
        if dims is None or len(dims) != value.ndim or dtype is None or dtype.kind not in kinds:
            return
        value = np.where(np.isfinite(value), value, np.nan)
        for axis in range(value.ndim):  # an axis along which all is equal has length 1
            first = np.take(value, [0], axis)
            if value.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, value.shape), value, equal_nan=True):
                value = first
        if all(size in (1, dim) for size, dim in zip(value.shape, dims, strict=True)):
            self._values[id(tensor)] = value

    def or_unknown(self, tensor: gs.Tensor) -> Array | None:
        """The value of a tensor, all NaN where nothing is known; None if not even its rank is known."""
        value = self.of(tensor)
        if value is not None:
            return value
        dims = self.dims(tensor)
        return None if dims is None else np.full((1,) * len(dims), np.nan)

    def ints(self, node: gs.Node, attribute: str, index: int) -> list[int] | None:
        """An attribute in older opsets, a constant input in later ones."""
        if attribute in node.attrs:
            return [int(item) for item in np.atleast_1d(node.attrs[attribute])]
        if len(node.inputs) <= index or not is_dense(node.inputs[index]):
            return None
        return [int(item) for item in value_of(node.inputs[index]).reshape(-1)]

    # --- values -------------------------------------------------------------------------------------------------------

    def _elementwise(self, node: gs.Node) -> Array | None:
        given = [tensor for tensor in node.inputs if tensor.name]
        values = [self.or_unknown(tensor) for tensor in given]
        if all(value is None or np.isnan(value).all() for value in values):
            return None
        if any(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        shape = np.broadcast_shapes(*(value.shape for value in known))
        if np.prod(shape, dtype=np.int64) > LARGEST:
            return None
        result = self._evaluated(node, given, known)
        if result is None:
            return None
        unknown = np.zeros(shape, bool)
        zero = np.zeros(shape, bool)
        for value in known:
            unknown |= np.isnan(value)
            zero |= value == 0
        result = np.where(unknown, np.nan, np.broadcast_to(result, shape))
        return np.where(zero, 0.0, result) if node.op == "Mul" else result

    def _evaluated(self, node: gs.Node, given: list[gs.Tensor], values: list[Array]) -> Array | None:
        """What a node makes of these values, by ONNX's reference implementation."""
        proto = onnx.NodeProto()
        export_node(node, proto, _no_tensors, {})
        inputs = [helper.make_tensor_value_info(t.name, onnx.TensorProto.DOUBLE, None) for t in given]
        del proto.output[1:]
        unique = {info.name: info for info in inputs}
        output = helper.make_empty_tensor_value_info(proto.output[0])
        graph = helper.make_graph([proto], "one", list(unique.values()), [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)])
        feeds: dict[str, Any] = {tensor.name: value for tensor, value in zip(given, values, strict=True)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results: Any = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # noqa: BLE001 - whatever an operator raises, its result is simply not known
            return None
        return np.asarray(results[0], np.float64)

    def _batch_norm(self, node: gs.Node) -> Array | None:
        x = self.or_unknown(node.inputs[0])
        parameters = [self.of(tensor) for tensor in node.inputs[1:5]]
        if x is None or x.ndim < 2 or any(p is None for p in parameters) or node.attrs.get("training_mode"):
            return None
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale, bias, mean, variance = (np.asarray(p).reshape(shape) for p in parameters)
        result = (x - mean) / np.sqrt(variance + node.attrs.get("epsilon", 1e-5)) * scale + bias
        return np.where((scale == 0) & np.isfinite(mean) & np.isfinite(variance), bias, result)

    def _conv(self, node: gs.Node) -> Array | None:
        weight, bias = self.weight(node, 1), self._bias(node, 2)
        if weight is None or not weight.size or bias is None:
            return None
        parts = by_input_channel(node, weight)
        x = self.channels_read(node, parts.shape[0] * parts.shape[2]).reshape(parts.shape[0], -1)
        counted = np.any(parts != 0, axis=3)
        unknown = np.einsum("goi,gi->go", counted, np.isnan(x)) > 0
        sums = np.einsum("goi,gi->go", np.sum(parts, axis=3, dtype=np.float64), np.nan_to_num(x))
        result = np.where(unknown, np.nan, sums).reshape(-1) + bias
        return result.reshape(1, -1, *(1,) * (weight.ndim - 2))

    def _conv_transpose(self, node: gs.Node) -> Array | None:
        weight, bias = self.weight(node, 1), self._bias(node, 2)
        if weight is None or not weight.size or bias is None:
            return None
        groups = int(node.attrs.get("group", 1))
        x = self.channels_read(node, weight.shape[0])
        counted = np.any(weight != 0, axis=tuple(range(2, weight.ndim))) & (np.nan_to_num(x, nan=1.0) != 0)[:, None]
        seen = counted.reshape(groups, -1, weight.shape[1]).any(axis=1).reshape(-1)
        return np.where(seen, np.nan, bias).reshape(1, -1, *(1,) * (weight.ndim - 2))

    def channels_read(self, node: gs.Node, channels: int) -> Array:
        """The constant in each input channel of a Conv or ConvTranspose, NaN where its output would not be constant."""
        x = self.along(node.inputs[0], 1, channels)
        return np.where(x == 0, x, np.nan) if node.op == "ConvTranspose" or adds_border(node) else x

    def _bias(self, node: gs.Node, index: int) -> Array | None:
        if len(node.inputs) <= index or not node.inputs[index].name:
            return np.zeros(1)
        return self.of(node.inputs[index])

    def _gemm(self, node: gs.Node) -> Array | None:
        weight, bias = self.weight(node, 1), self._bias(node, 2)
        if weight is None or bias is None or node.attrs.get("transA"):
            return None
        weight = weight.T if node.attrs.get("transB") else weight
        product = self._times(self.or_unknown(node.inputs[0]), weight)
        return None if product is None else node.attrs.get("alpha", 1.0) * product + node.attrs.get("beta", 1.0) * bias

    def _matmul(self, node: gs.Node) -> Array | None:
        weight = self.weight(node, 1)
        if weight is not None and weight.ndim == 2:
            return self._times(self.or_unknown(node.inputs[0]), weight)
        right = self.of(node.inputs[1])
        dims = self.dims(node.inputs[1])
        if right is None or right.ndim < 2 or dims is None:
            return None
        column = np.where(np.all(right == 0, axis=-2, keepdims=True), 0.0, np.nan)  # zero, whatever it is mixed by
        mixed_by = self.dims(node.inputs[0])
        lead = 0 if mixed_by is None else max(0, len(mixed_by) - column.ndim)
        return column.reshape((1,) * lead + column.shape)

    @staticmethod
    def _times(x: Array | None, weight: Array) -> Array | None:
        """Rows that are known in part, times a constant matrix."""
        if x is None or x.ndim < 1:
            return None
        rows = np.broadcast_to(x, (*x.shape[:-1], weight.shape[0])).reshape(-1, weight.shape[0])
        if rows.size > LARGEST or rows.shape[0] * weight.shape[1] > LARGEST:
            return None
        unknown = np.isnan(rows).astype(np.float32) @ (weight != 0).astype(np.float32) > 0
        product = np.where(unknown, np.nan, np.nan_to_num(rows) @ weight.astype(np.float64))
        return product.reshape(*x.shape[:-1], weight.shape[1])


def _no_tensors(constant: gs.Constant) -> onnx.TensorProto:
    """Elementwise operators have no tensors as attributes."""
    raise NotImplementedError(constant.name)


LAYERS: dict[str, Callable[[ConstantChannels, gs.Node], Array | None]] = {
    "BatchNormalization": ConstantChannels._batch_norm,
    "Conv": ConstantChannels._conv,
    "ConvTranspose": ConstantChannels._conv_transpose,
    "Gemm": ConstantChannels._gemm,
    "MatMul": ConstantChannels._matmul,
}
