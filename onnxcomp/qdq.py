"""QuantizeLinear and DequantizeLinear around the nodes of a graph: who quantizes what, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp.packed import packed_weight

__all__ = [
    "LAYERS",
    "QuantizedLayer",
    "codes_dtype",
    "codes_of",
    "decoder",
    "encoder",
    "is_constant",
    "quantized_layers",
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
    """

    node: gs.Node
    data: gs.Node
    weight: gs.Node
    bias: gs.Node | None

    @property
    def name(self) -> str:
        """The node's name, or its first output's."""
        return str(self.node.name or self.node.outputs[0].name)


def quantized_layers(graph: gs.Graph) -> Iterator[QuantizedLayer]:
    """The quantized layers of the main graph, in order."""
    for node in graph.nodes:
        if node.op not in LAYERS or node.domain or len(node.inputs) < 2:
            continue
        data, weight = decoder(node.inputs[0]), decoder(node.inputs[1])
        if data is None or weight is None or not is_constant(weight.inputs[0]):
            continue
        yield QuantizedLayer(node, data, weight, decoder(node.inputs[2]) if len(node.inputs) > 2 else None)


def decoder(tensor: gs.Tensor) -> gs.Node | None:
    """The DequantizeLinear that makes a tensor."""
    maker = next(iter(tensor.inputs), None)
    return maker if maker is not None and maker.op == "DequantizeLinear" else None


def encoder(tensor: gs.Tensor) -> gs.Node | None:
    """The QuantizeLinear that makes a tensor."""
    maker = next(iter(tensor.inputs), None)
    return maker if maker is not None and maker.op == "QuantizeLinear" else None


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, packed or not."""
    return isinstance(tensor, gs.Constant) or packed_weight(tensor) is not None


def codes_of(tensor: gs.Tensor) -> Array | None:
    """The value of a constant, packed or not; None where it is computed."""
    if isinstance(tensor, gs.Constant):
        return value_of(tensor)
    packed = packed_weight(tensor)
    return None if packed is None else packed.decode()


def scale_of(node: gs.Node) -> Array | None:
    """The scale of a QuantizeLinear or DequantizeLinear; None where it is computed."""
    return codes_of(node.inputs[1])


def zero_point_of(node: gs.Node) -> Array | None:
    """Its zero point; None where it is left out, which means 0, or computed."""
    return codes_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None


def codes_dtype(node: gs.Node) -> str | None:
    """The type of the codes of a QuantizeLinear or DequantizeLinear, such as "uint8"; None where it is not known."""
    if len(node.inputs) > 2 and node.inputs[2].name and node.inputs[2].dtype is not None:
        return str(np.dtype(node.inputs[2].dtype).name)
    codes = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    if node.op == "DequantizeLinear" and (maker := encoder(codes)) is not None:
        return codes_dtype(maker)
    if (packed := packed_weight(codes)) is not None:
        return str(packed.decode().dtype.name)
    if codes.dtype is not None:
        return str(np.dtype(codes.dtype).name)
    return "uint8" if node.op == "QuantizeLinear" else None  # what ONNX says it is without a zero point
