"""Writes a placement into the graph: QuantizeLinear and DequantizeLinear pairs, int8 weights, int32 biases."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp_passes._companions import adapt
from onnxcomp_passes._placement import Layer, Placement
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._stored import INT8_MAX, Stored, encode
from onnxcomp_passes._upsample import Repeats, as_gathers, repeats
from onnxcomp_passes._weights import input_mean_error

if TYPE_CHECKING:
    from onnxcomp_passes._scheme import Scheme

__all__ = ["Grid", "Ranges", "drop_unused_decoders", "insert", "is_written_by_us", "weight_codes"]

Array = np.ndarray[Any, Any]
Ranges = dict[str, tuple[float, float]]

CODES = "t"
"""Names of quantized activations begin with it; a dot and a number follow."""

REDUCED_MAX = 63
"""Weights in 7 bits: a pair of products with uint8 activations then fits 16 bits."""

WIDE_OPSET = 21
"""The first opset with 16-bit QuantizeLinear; before, ONNX Runtime's own operator of that name does."""

BIAS_MAX = float(1 << 30)
"""Room in an int32 accumulator for the products besides the bias."""


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of an activation."""

    scale: np.float32
    zero_point: Array

    @staticmethod
    def covering(low: float, high: float, dtype: str) -> Grid:
        """The grid over a range; zero is on it exactly, since padding and Relu need that.

        Example:
            >>> grid = Grid.covering(-1.0, 1.55, "uint8")
            >>> round(float(grid.scale), 4), int(grid.zero_point)
            (0.01, 100)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        limits = np.iinfo(dtype)
        scale = np.float32((high - low) / (limits.max - limits.min))
        if scale < np.finfo(np.float32).tiny:
            scale = np.float32(1.0)
        zero = np.clip(np.rint(limits.min - low / float(scale)), limits.min, limits.max)
        return Grid(scale, np.asarray(zero, dtype))


@dataclass
class _Writer:
    """Inserts into one model; constants that repeat are written once."""

    model: Model
    scheme: Scheme
    grids: dict[str, Grid]
    shared: dict[tuple[str, bytes], gs.Constant] = field(default_factory=dict)

    def constant(self, prefix: str, value: Array) -> gs.Constant:
        """An initializer; the same value is the same initializer."""
        value = np.asarray(value)  # arithmetic turns 0-d arrays into scalars
        key = (f"{value.dtype}{value.shape}", _fingerprint(value))
        if key not in self.shared:
            self.shared[key] = gs.Constant(self.model.unique_name(f"{prefix}.0"), value)
        return self.shared[key]

    def pair(self, tensor: gs.Tensor, result: gs.Tensor, grid: Grid) -> list[gs.Node]:
        """QuantizeLinear and DequantizeLinear from `tensor` to `result`."""
        scale = self.constant("s", np.asarray(grid.scale, np.float32))
        zero = self.constant("z", grid.zero_point)
        codes = Variable(self.model.unique_name(f"{CODES}.0"))
        wide = grid.zero_point.dtype.itemsize > 1 and self.model.opset < WIDE_OPSET
        quantize = Node("QuantizeLinear", "", {}, [tensor, scale, zero], [codes])
        decode = Node("DequantizeLinear", "", {}, [codes, scale, zero], [result])
        if wide:
            quantize.domain = decode.domain = "com.microsoft"
        return [quantize, decode]

    def dequantize(
        self, codes: Array, scale: Array, axis: int, *, zero_point: bool = False
    ) -> tuple[gs.Node, gs.Tensor]:
        """A DequantizeLinear of constant codes; the zero point is 0 and left out where the kernel allows it."""
        result = Variable(self.model.unique_name("d.0"))
        attrs = {"axis": axis} if scale.ndim else {}
        inputs = [self.constant("q", codes), self.constant("s", scale)]
        if zero_point:
            inputs.append(self.constant("z", np.zeros(scale.shape, codes.dtype)))
        return Node("DequantizeLinear", "", attrs, inputs, [result]), result

    def of_constant(self, value: Array) -> tuple[gs.Node, gs.Tensor]:
        """A DequantizeLinear of a float constant, as codes of the activations' type over its own range."""
        grid = Grid.covering(float(np.min(value)), float(np.max(value)), self.scheme.rules.activations)
        limits = np.iinfo(grid.zero_point.dtype)
        codes = np.clip(np.rint(value / grid.scale) + int(grid.zero_point), limits.min, limits.max)
        constant = self.constant("q", codes.astype(grid.zero_point.dtype))
        return self.of_codes(constant, np.asarray(grid.scale), self.constant("z", grid.zero_point))

    def of_codes(self, codes: gs.Tensor, scale: Array, zero_point: gs.Tensor) -> tuple[gs.Node, gs.Tensor]:
        """A DequantizeLinear of codes that are there, with a scale of its own."""
        result = Variable(self.model.unique_name("d.0"))
        inputs = [codes, self.constant("s", np.asarray(scale, np.float32)), zero_point]
        return Node("DequantizeLinear", "", {}, inputs, [result]), result


def _fingerprint(value: Array) -> bytes:
    """What tells an array from others, in few bytes: layers that share a large weight share its codes."""
    return hashlib.blake2b(np.ascontiguousarray(value).view(np.uint8).data).digest()


def is_written_by_us(model: Model) -> bool:
    """Whether `insert` wrote the pairs of a model: it is told by the names of the codes."""
    own = re.compile(rf"{CODES}\.0(_\d+)?")
    return any(node.op == "QuantizeLinear" and own.fullmatch(node.outputs[0].name) for node in model.graph.nodes)


def insert(model: Model, placement: Placement, scheme: Scheme) -> None:
    """Write the placement into the model that it was made for.

    Args:
        model: Its graph is changed.
        placement: What runs in int8.
        scheme: How: ranges, the target's rules, rounding.
    """
    grids, dtype = {}, scheme.rules.activations
    for name in placement.tensors:
        root = name
        while root in placement.grid:
            root = placement.grid[root]
        grids[name] = Grid.covering(*_range(placement.tensors[root], scheme.ranges, dtype), dtype)
    writer = _Writer(model, scheme, grids)
    upsampling = _upsampling(model, placement, scheme)
    added: list[gs.Node] = []
    for layer in placement.layers:
        added += _quantize_weights(writer, layer)
    _remove(model.graph, placement.absorbed)
    inside = {id(layer.node) for layer in placement.layers} | {id(node) for node in placement.companions}
    for tensor in placement.tensors.values():
        added += _quantize_tensor(writer, tensor, inside)
    for node in placement.companions:
        factors = upsampling.get(id(node))
        added += adapt(node, writer) if factors is None else as_gathers(model, node, factors)
    model.graph.nodes.extend(added)
    drop_unused_decoders(model.graph)


def _upsampling(model: Model, placement: Placement, scheme: Scheme) -> dict[int, Repeats]:
    """The companions that repeat pixels, by the id of the node; none where other kernels than the CPU's run them."""
    resizes = [node for node in placement.companions if node.op == "Resize" and scheme.rules.cpu]
    known = infer_known(model) if resizes else {}
    found = {id(node): repeats(node, known) for node in resizes}
    return {key: factors for key, factors in found.items() if factors is not None}


def _range(tensor: gs.Tensor, ranges: Ranges, dtype: str) -> tuple[float, float]:
    """The range to cover. That of a probability is known, and kernels refuse another.

    XNNPACK takes a Softmax with the step 1/256 and no other, 1/255 included; QNN a 16-bit Sigmoid with 1/65536.
    """
    levels = float(np.iinfo(dtype).max) - np.iinfo(dtype).min + 1
    known = {"Softmax", "Sigmoid"} if levels > 256 else {"Softmax"}
    made_by = tensor.inputs[0].op if tensor.inputs else None
    return (0.0, 1.0 - 1.0 / levels) if made_by in known else ranges[tensor.name]


def _one_float_reader(writer: _Writer, tensor: gs.Tensor, inside: set[int]) -> list[gs.Node]:
    """Let several float readers of an int8 result read one copy of it, a Sum of one.

    ONNX Runtime gives each reader a DequantizeLinear of its own, and then does not see what they are together: a Gelu
    of five operators, say. The copy costs what the second DequantizeLinear does.
    """
    readers = {id(reader): reader for reader in tensor.outputs if id(reader) not in inside}.values()
    if len(readers) < 2 or not writer.scheme.rules.cpu:
        return []
    copy = Variable(writer.model.unique_name("c.0"))
    for reader in readers:
        for index, other in enumerate(reader.inputs):
            if other is tensor:
                reader.inputs[index] = copy
    return [Node("Sum", writer.model.unique_name("copy.0"), {}, [tensor], [copy])]


def _quantize_tensor(writer: _Writer, tensor: gs.Tensor, inside: set[int]) -> list[gs.Node]:
    """Give a float tensor its pair: behind an int8 producer all readers read the result, else the int8 ones only."""
    grid = writer.grids[tensor.name]
    if tensor.inputs and id(tensor.inputs[0]) in inside:
        producer = tensor.inputs[0]
        raw = Variable(writer.model.unique_name("f.0"))
        index = next(index for index, output in enumerate(producer.outputs) if output is tensor)
        producer.outputs[index] = raw
        return [*writer.pair(raw, tensor, grid), *_one_float_reader(writer, tensor, inside)]
    result = Variable(writer.model.unique_name("d.0"))
    for reader in list(tensor.outputs):
        if id(reader) in inside:
            for index, other in enumerate(reader.inputs):
                if other is tensor:
                    reader.inputs[index] = result
    return writer.pair(tensor, result, grid)


def _quantize_weights(writer: _Writer, layer: Layer) -> list[gs.Node]:
    """Put DequantizeLinear nodes of integer codes in the place of a layer's weight and bias."""
    node = layer.node
    source = node.inputs[0].name
    input_scale = float(writer.grids[source].scale)
    codes, scale = weight_codes(layer, writer.scheme)
    values = _bias(layer, codes, scale, writer.scheme)
    if values is not None:
        codes, scale = _room_for_bias(layer, codes, scale, values, input_scale)
    # ONNX Runtime makes a QGemm only where the weight's zero point is written out, and XNNPACK refuses the model.
    written = node.op == "Gemm" or writer.scheme.rules.zero_points
    weight, node.inputs[1] = writer.dequantize(codes, scale, layer.axis, zero_point=written)
    if values is None:
        return [weight]
    bias_scale = (input_scale * scale).astype(np.float32)
    bias_codes = np.clip(np.rint(values / bias_scale), -BIAS_MAX, BIAS_MAX).astype(np.int32)
    decoded, result = writer.dequantize(bias_codes, bias_scale, 0)
    if len(node.inputs) > 2:
        node.inputs[2] = result
    else:
        node.inputs.append(result)
    return [weight, decoded]


def _bias(layer: Layer, codes: Array, scale: Array, scheme: Scheme) -> Array | None:
    """A layer's bias, less the mean error that its rounded weight makes of its mean input; None without either.

    Bias correction: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
    section 4.2, with the mean of the calibration data.
    """
    node = layer.node
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    values = None if bias is None else value_of(bias).astype(np.float64)
    mean = scheme.means.get(node.inputs[0].name)
    if mean is None or node.op == "MatMul":
        return values
    error = input_mean_error(layer, scheme.weights.get(layer), codes, scale, mean)
    return -error if values is None else values - error


def weight_codes(layer: Layer, scheme: Scheme) -> tuple[Array, Array]:
    """The int8 codes and the scale, taken over from the storage form where that has the same grid."""
    rules = scheme.rules
    limit = scheme.limit(layer)
    per_channel = rules.channel_scales(layer.node.op)
    weight, steps = layer.weight, scheme.steps.get(layer.key)
    if isinstance(weight, Stored) and per_channel and limit == INT8_MAX and steps is None:
        scale = value_of(weight.scale)
        if scale.ndim and scale.size == scale.shape[layer.axis] == weight.codes.shape[layer.axis]:
            return value_of(weight.codes), scale.reshape(-1)
    values = scheme.weights.get(layer)
    if steps is not None:
        shaped = steps.reshape([-1 if axis == layer.axis else 1 for axis in range(values.ndim)])
        return np.clip(np.rint(values / shaped), -limit, limit).astype(np.int8), steps
    codes, scale = encode(values, layer.axis if per_channel else None, limit=limit)
    return codes, scale.reshape(-1) if per_channel else scale.reshape(())


def _room_for_bias(layer: Layer, codes: Array, scale: Array, bias: Array, input_scale: float) -> tuple[Array, Array]:
    """Coarsen the scale of channels whose bias would not fit an int32 (tiny weights beside a large bias)."""
    needed = np.abs(bias) / (input_scale * BIAS_MAX)
    needed = needed if scale.ndim else np.asarray(np.max(needed, initial=0.0))
    if not np.any(needed > scale):
        return codes, scale
    wider = np.maximum(scale, needed).astype(np.float32)
    shape = [-1 if axis == layer.axis else 1 for axis in range(codes.ndim)] if scale.ndim else []
    ratio = (scale.astype(np.float64) / wider).reshape(shape)
    return np.rint(codes * ratio).astype(np.int8), wider


def _remove(graph: gs.Graph, nodes: tuple[gs.Node, ...]) -> None:
    """Take out Relu and Clip nodes: their producer writes their output."""
    gone = {id(node) for node in nodes}
    for node in nodes:
        producer, result = node.inputs[0].inputs[0], node.outputs[0]
        node.inputs.clear()
        node.outputs.clear()
        producer.outputs[0] = result
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def drop_unused_decoders(graph: gs.Graph) -> None:
    """Remove storage-form decoders whose weight nobody reads any more."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for op in ("Mul", "Cast"):
        dead = {
            id(node)
            for node in graph.nodes
            if node.op == op
            and all(not t.outputs and id(t) not in outputs for t in node.outputs)
            and all(isinstance(t, gs.Constant) for t in node.inputs[-1:])
        }
        for node in graph.nodes:
            if id(node) in dead:
                node.inputs.clear()
                node.outputs.clear()
        graph.nodes = [node for node in graph.nodes if id(node) not in dead]
