"""Which constants of a graph are trained, and in what form: as they are, or as the numbers behind integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxcomp.graph_io import walk
from onnxcomp.model import value_of
from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES, onnx_type

__all__ = [
    "SCALES",
    "Held",
    "Reading",
    "find_constants",
    "is_matrix",
    "is_trainable",
    "kind_of",
    "trainable_names",
    "value_of_node",
]

Array = np.ndarray[Any, Any]

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

FIXED = {
    "Attention": {3},
    "BatchNormalization": {3, 4},
    "Clip": {1, 2},
    "Dropout": {1},
    "Equal": {0, 1},
    "GreaterOrEqual": {0, 1},
    "GridSample": {1},
    "Greater": {0, 1},
    "LessOrEqual": {0, 1},
    "Less": {0, 1},
    "Max": {1, 2},
    "MatMulNBits": {2, 3},
    "Min": {1, 2},
    "OneHot": {2},
    "Pad": {1, 2, 3},
    "Pow": {1},
    "QLinearConv": {1, 4, 6},
    "QLinearMatMul": {1, 4, 6},
    "Range": {0, 1, 2},
    "Resize": {1, 2, 3},
    "Upsample": {1},
    "Where": {0, 1, 2},
}
"""Operator -> inputs that set what it does rather than being learnt: statistics, limits, masks, scales."""

MATRICES = {
    **{op: {0, 1} for op in ("Einsum", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")},
    **{op: {1} for op in ("Attention", "Conv", "ConvInteger", "ConvTranspose", "FusedConv", "MatMulInteger")},
    **{op: {1, 2} for op in ("GRU", "LSTM", "RNN")},
    **{op: {3} for op in ("QLinearConv", "QLinearMatMul")},
    "Gather": {0},
}
"""Operator -> inputs that are matrices, kernels and tables, which may have zeros in many places."""

SCALES = {"DequantizeLinear": 1, "MatMulNBits": 2, "QuantizeLinear": 1}
"""Operator -> the input that is its scale, which is trained where that is asked for."""

ELEMENTWISE = {"Add", "Div", "Mul", "Sub", "PRelu"}
"""A single number in these is a constant of a formula (an epsilon, the root of a width), not a weight."""


@dataclass(frozen=True)
class Reading:
    """A node that reads a constant, and through which of its inputs."""

    node: gs.Node
    index: int


@dataclass(frozen=True)
class Held:
    """A constant of the model.

    Attributes:
        name: Its own name; numbered where subgraphs have several of one name.
        constant: Where its value is: an initializer, or the value of a Constant node.
        readers: The nodes that read it.
    """

    name: str
    constant: gs.Constant
    readers: tuple[Reading, ...]


def find_constants(graph: gs.Graph) -> list[Held]:
    """All constants of a graph and of its subgraphs, the tensors of Constant nodes included.

    A constant whose name another one has too is renamed in the graph, so that all names differ.
    """
    readers: dict[int, list[Reading]] = {}
    tensors: dict[int, gs.Tensor] = {}
    for each in walk(graph):
        for node in each.nodes:
            for index, tensor in enumerate(node.inputs):
                readers.setdefault(id(tensor), []).append(Reading(node, index))
                tensors[id(tensor)] = tensor
        for tensor in each.outputs:
            tensors.setdefault(id(tensor), tensor)
    found: list[Held] = []
    taken = {tensor.name for tensor in tensors.values() if not isinstance(tensor, gs.Constant)}
    for key, tensor in tensors.items():
        constant = tensor if isinstance(tensor, gs.Constant) else value_of_node(tensor)
        if constant is None:
            continue
        if isinstance(tensor, gs.Constant):
            tensor.name = _unique(tensor.name, taken)
        found.append(Held(tensor.name, constant, tuple(readers.get(key, ()))))
    return found


def _unique(name: str, taken: set[str]) -> str:
    fresh, number = name, 1
    while fresh in taken:
        fresh, number = f"{name}#{number}", number + 1
    taken.add(fresh)
    return fresh


def value_of_node(tensor: gs.Tensor) -> gs.Constant | None:
    """What a Constant node gives, where that is a tensor."""
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    value = maker.attrs.get("value") if maker is not None and maker.op == "Constant" and not maker.domain else None
    return value if isinstance(value, gs.Constant) else None


def kind_of(held: Held) -> int:
    """The ONNX element type of a constant."""
    return onnx_type(held.constant.dtype)


def is_matrix(held: Held) -> bool:
    """Whether a constant is the matrix, kernel or table of a layer, as it is or decoded from constants.

    Not: biases, scales of normalization, masks and tables that are added, however many axes they have.
    """
    return any(map(_is_of_layer, held.readers))


def _is_of_layer(reading: Reading) -> bool:
    node = reading.node
    if reading.index in MATRICES.get(node.op, ()):
        return True
    if not all(_is_fixed(tensor) for place, tensor in enumerate(node.inputs) if place != reading.index):
        return False
    return any(
        _is_of_layer(Reading(reader, index))
        for result in node.outputs
        for reader in result.outputs
        for index, tensor in enumerate(reader.inputs)
        if tensor is result
    )


def is_trainable(held: Held) -> bool:
    """Whether a constant is a weight that may be learnt."""
    kind = kind_of(held)
    if not held.readers:
        return False
    if kind in FLOATS:
        return all(_is_learnt(reading, held.constant) for reading in held.readers) and _is_finite(held.constant)
    if kind in INTEGER_RANGES:
        return all(_is_code(reading) for reading in held.readers)
    return False


def _is_learnt(reading: Reading, constant: gs.Constant) -> bool:
    node, index = reading.node, reading.index
    if index in FIXED.get(node.op, ()) or (node.op in {"QuantizeLinear", "DequantizeLinear"} and index > 0):
        return False
    return not (node.op in ELEMENTWISE and int(np.prod(constant.shape)) == 1)


def _is_finite(constant: gs.Constant) -> bool:
    return bool(np.isfinite(np.asarray(value_of(constant), np.float32)).all())


def _is_code(reading: Reading) -> bool:
    """Whether a constant is the codes that a DequantizeLinear with a constant scale and zero point reads."""
    node = reading.node
    return node.op == "DequantizeLinear" and reading.index == 0 and all(map(_is_fixed, node.inputs[1:]))


def _is_fixed(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, or none at all."""
    return not tensor.name or isinstance(tensor, gs.Constant) or value_of_node(tensor) is not None


def trainable_names(graph: gs.Graph) -> list[str]:
    """The names of the constants that are trained unless they are frozen."""
    return [held.name for held in find_constants(graph) if is_trainable(held)]
