"""QuantizeLinear and DequantizeLinear around the nodes of a graph: who quantizes what, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import value_of
from onnxcomp.packed import packed_weight

__all__ = [
    "LAYERS",
    "QuantizedLayer",
    "codes_dtype",
    "codes_of",
    "constant_shape",
    "decoder",
    "encoder",
    "has_zero_point",
    "is_constant",
    "product_scale",
    "quantized_layers",
    "scale_axis",
    "scale_of",
    "zero_point_of",
]

Array = np.ndarray[Any, Any]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply with a weight."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer whose data and weight come from a DequantizeLinear each.

    Attributes:
        node: The layer.
        data: The DequantizeLinear of its input.
        weight: That of its constant weight.
        bias: That of its bias; None where the bias is float or there is none.
        place: Which of the node's inputs the weight is: 0 for a MatMul with the weight on the left.
    """

    node: gs.Node
    data: gs.Node
    weight: gs.Node
    bias: gs.Node | None
    place: int = 1

    @property
    def name(self) -> str:
        """The node's name, or its first output's."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def channel_axis(self) -> int | None:
        """The axis of the weight with its output channels; None where it has none."""
        if self.node.op == "Gemm":
            return 0 if self.node.attrs.get("transB", 0) else 1
        if self.node.op != "MatMul":
            return 0 if self.node.op == "Conv" else 1
        rank = len(self.weight_shape)
        return rank - 2 + self.place if rank > 1 else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight, packed or not; () where its codes are computed."""
        return constant_shape(self.weight.inputs[0])


def quantized_layers(graph: gs.Graph) -> Iterator[QuantizedLayer]:
    """The quantized layers of the main graph, in order."""
    for node in graph.nodes:
        if node.op not in LAYERS or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
            continue
        bias = decoder(node.inputs[2]) if len(node.inputs) > 2 else None
        for place in (1, 0) if node.op == "MatMul" else (1,):
            data, weight = decoder(node.inputs[1 - place]), decoder(node.inputs[place])
            if data is not None and weight is not None and is_constant(weight.inputs[0]):
                yield QuantizedLayer(node, data, weight, bias, place)
                break


def decoder(tensor: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that makes a tensor."""
    maker = next(iter(tensor.inputs), None)
    return maker if maker is not None and maker.op == "DequantizeLinear" else None


def encoder(tensor: gs.Tensor) -> gs.Node | None:
    """The QuantizeLinear that makes a tensor."""
    maker = next(iter(tensor.inputs), None)
    return maker if maker is not None and maker.op == "QuantizeLinear" else None


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant: an initializer, packed or not, or what a Constant node gives."""
    return isinstance(tensor, gs.Constant) or _written_out(tensor) is not None or packed_weight(tensor) is not None


def constant_shape(tensor: gs.Tensor) -> tuple[int, ...]:
    """The shape of a constant, packed or not; () where it is computed."""
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    packed = packed_weight(tensor)
    if packed is not None:
        return packed.shape
    value = codes_of(tensor)
    return () if value is None else value.shape


def codes_of(tensor: gs.Tensor) -> Array | None:
    """The value of a constant, packed or not; None where it is computed."""
    if isinstance(tensor, gs.Constant):
        return value_of(tensor)
    node = _written_out(tensor)
    if node is not None:
        value = node.attrs.get("value")
        if value is None:
            return np.asarray(node.attrs["value_float"], np.float32)
        return value_of(value)
    packed = packed_weight(tensor)
    return None if packed is None else packed.decode()


def _written_out(tensor: gs.Tensor) -> gs.Node | None:
    """The Constant node that gives a tensor, in one of the forms that exporters hide scales and weights in."""
    maker = next(iter(tensor.inputs), None)
    if maker is None or maker.op != "Constant" or maker.domain not in (None, "", "ai.onnx"):
        return None
    is_read = isinstance(maker.attrs.get("value"), gs.Constant) or "value_float" in maker.attrs
    return maker if is_read else None


def scale_of(node: gs.Node) -> Array | None:
    """The scale of a QuantizeLinear or DequantizeLinear; None where it is computed."""
    return codes_of(node.inputs[1])


def scale_axis(node: gs.Node, rank: int) -> int | None:
    """The axis of a tensor of this rank along which a QuantizeLinear or DequantizeLinear has a scale for each entry.

    Returns:
        The axis; None where there is one scale, one for each block, or it is computed.
    """
    scale = scale_of(node)
    if scale is None or scale.size == 1 or scale.ndim != 1 or node.attrs.get("block_size"):
        return None
    return int(node.attrs.get("axis", 1)) % max(rank, 1)


def product_scale(layer: QuantizedLayer) -> Array | None:
    """The scale of a layer's sums of products, which an int32 bias has to have.

    Returns:
        One number, or one for each output channel; None where these scales are computed, or are no such thing: the
        weight has scales along another axis or for blocks, or the bias is multiplied too.
    """
    data, weight = scale_of(layer.data), scale_of(layer.weight)
    if data is None or weight is None or data.size != 1 or layer.place != 1:
        return None
    shape = layer.weight_shape
    if weight.size > 1 and (scale_axis(layer.weight, len(shape)) != layer.channel_axis or not shape):
        return None
    attrs, factor = layer.node.attrs, np.float32(1)
    if layer.node.op == "Gemm":
        if float(attrs.get("beta", 1.0)) != 1.0:
            return None
        factor = np.float32(attrs.get("alpha", 1.0))
    steps = np.atleast_1d(np.asarray(data.ravel()[0] * weight.ravel() * factor, weight.dtype))
    if layer.node.op == "ConvTranspose" and steps.size > 1:
        steps = np.tile(steps, int(attrs.get("group", 1)))  # each group has the same scales
    return steps if weight.ndim or steps.size > 1 else steps.reshape(())


def has_zero_point(node: gs.Node) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear has a zero point written out."""
    return len(node.inputs) > 2 and bool(node.inputs[2].name)


def zero_point_of(node: gs.Node) -> Array | None:
    """Its zero point; None where it is left out, which means 0, or computed."""
    return codes_of(node.inputs[2]) if has_zero_point(node) else None


def codes_dtype(node: gs.Node) -> str | None:
    """The type of the codes of a QuantizeLinear or DequantizeLinear, such as "uint8"; None where it is not known."""
    if has_zero_point(node) and (dtype := _dtype(node.inputs[2])) is not None:
        return dtype
    codes = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    if node.op == "DequantizeLinear" and (maker := encoder(codes)) is not None:
        return codes_dtype(maker)
    if node.op == "QuantizeLinear" and node.attrs.get("output_dtype"):
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(int(node.attrs["output_dtype"]))).name)
    # What ONNX says it is without a zero point.
    return _dtype(codes) or ("uint8" if node.op == "QuantizeLinear" else None)


def _dtype(tensor: gs.Tensor) -> str | None:
    """The name of a tensor's type, where it is known."""
    if tensor.dtype is not None and packed_weight(tensor) is None:
        return str(np.dtype(tensor.dtype).name)
    value = codes_of(tensor)
    return None if value is None else str(value.dtype.name)
