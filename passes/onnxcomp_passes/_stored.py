"""The storage form of a weight: an integer initializer, decoded at load.

::

    W_int8 -> Cast -> Mul(scale) -> W
    W_uint8 -> Cast -> Sub(zero) -> Mul(scale) -> Reshape -> W      with zero points and blocks

ONNX Runtime folds these nodes when it makes a session, so inference runs on the float weight as before. A
DequantizeLinear in their place would not be folded. Other passes recognise the first form and take the integers over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes
from onnxcomp.weights import LazyWeight
from onnxcomp_passes._codes import Width, group, nearest

__all__ = [
    "Encoded",
    "Stored",
    "decode",
    "encode",
    "find_stored",
    "is_decoded",
    "leave_bodies",
    "lift_constants",
    "output_channel_axis",
    "redirect",
    "reduction_axis",
    "store",
    "weight_inputs",
]

Array = np.ndarray[Any, Any]

INT8_MAX = 127
"""Symmetric: -128 is not used, so that negation is exact and no kernel overflows."""

WEIGHT_INPUTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "Gather": (0,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
"""Operator -> the inputs that may hold a weight."""


@dataclass(frozen=True)
class Stored:
    """A weight in its storage form."""

    cast: gs.Node
    mul: gs.Node

    @property
    def codes(self) -> gs.Constant:
        """The int8 initializer."""
        return self.cast.inputs[0]

    @property
    def scale(self) -> gs.Constant:
        """The float scale, shaped to broadcast over the codes."""
        return self.mul.inputs[1]


@dataclass(frozen=True)
class Encoded:
    """A weight in integers, ready to be written into a graph; large parts are in a file.

    Attributes:
        codes: The codes, in the shape of their groups.
        scale: float32, shaped to broadcast over the codes.
        zero: float32 zero points, shaped as the scale; None: 0.
    """

    codes: LazyWeight
    scale: LazyWeight
    zero: LazyWeight | None

    @property
    def nbytes(self) -> int:
        """What the parts add to a file."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero) if part is not None)


def weight_inputs(node: gs.Node) -> tuple[int, ...]:
    """Which inputs of a node may hold a weight."""
    return WEIGHT_INPUTS.get(node.op, ()) if not node.domain else ()


def output_channel_axis(node: gs.Node, index: int, rank: int) -> int | None:
    """The axis of a weight that is worth a scale of its own per entry: the output channels, or a table's rows.

    Returns:
        The axis, or None where one scale has to do.
    """
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        transposed = bool(node.attrs.get("transB" if index else "transA", 0))
        return (0 if transposed else 1) if index else (1 if transposed else 0)
    if node.op in {"MatMul", "MatMulInteger"}:
        return rank - 1 if index else max(rank - 2, 0)
    if node.op == "Gather":
        return 0
    if node.op in {"LSTM", "GRU", "RNN"}:
        return 1
    return None


def reduction_axis(node: gs.Node, index: int, rank: int) -> int | None:
    """The axis of a weight that products are summed over, which blocks lie along; a table's columns.

    Returns:
        The axis; for a Conv 1, where all axes behind it are seen as one. None where there is none.
    """
    if node.op == "Conv":
        return 1
    if node.op == "ConvTranspose":
        return 0
    if node.op == "Gemm":
        channel = output_channel_axis(node, index, rank)
        return None if channel is None else 1 - channel
    if node.op in {"MatMul", "MatMulInteger"}:
        return max(rank - 2, 0) if index else rank - 1
    if node.op == "Gather":
        return rank - 1 if rank > 1 else None
    return 2 if node.op in {"LSTM", "GRU", "RNN"} else None


def leave_bodies(model: Model, changes: Changes) -> None:
    """Say why weights in bodies of If, Loop and Scan stay as they are: passes see the main graph alone."""
    for graph in model.graphs():
        for node in graph.nodes if graph is not model.graph else ():
            if weight_inputs(node):
                changes.leave(node.name or node.outputs[0].name, f"the {node.op} is in a body of If, Loop or Scan")


def encode(weight: Array, axis: int | None, *, limit: int = INT8_MAX) -> tuple[Array, Array]:
    """Round a weight to symmetric int8, to nearest.

    Args:
        weight: A finite float array.
        axis: The axis with a scale per entry; None for one scale.
        limit: The largest code: 127, or 63 for 7 bits.

    Returns:
        The int8 codes, and the float32 scale shaped to broadcast over them. Channels of zeros get the scale 1.

    Example:
        >>> codes, scale = encode(np.array([[1.0, -2.0], [0.0, 4.0]], np.float32), axis=1)
        >>> codes.tolist(), scale.shape
        ([[127, -64], [0, 127]], (1, 2))
    """
    made = nearest(weight, group(weight.shape, axis), Width(limit.bit_length() + 1))
    return made.codes, made.scale


def lift_constants(graph: gs.Graph) -> None:
    """Make initializers of the tensors in Constant nodes: exporters hide weights there."""
    outputs = {id(tensor) for tensor in graph.outputs}
    lifted = set()
    for node in graph.nodes:
        value = node.attrs.get("value")
        if node.op != "Constant" or node.domain or not isinstance(value, gs.Constant) or id(node.outputs[0]) in outputs:
            continue
        tensor = node.outputs[0]
        redirect(tensor, gs.Constant(tensor.name, value._values))
        node.outputs.clear()
        lifted.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in lifted]


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let the readers of one tensor read another."""
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def find_stored(tensor: gs.Tensor) -> Stored | None:
    """The storage form behind a tensor, if it has one."""
    if len(tensor.inputs) != 1 or tensor.inputs[0].op != "Mul" or len(tensor.inputs[0].inputs) != 2:
        return None
    mul = tensor.inputs[0]
    casts, scale = mul.inputs[0].inputs, mul.inputs[1]
    if len(casts) != 1 or casts[0].op != "Cast" or not isinstance(scale, gs.Constant):
        return None
    codes = casts[0].inputs[0]
    if not isinstance(codes, gs.Constant) or codes.dtype != np.int8:
        return None
    return Stored(casts[0], mul)


def is_decoded(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a weight in any storage form: Reshape, Mul, Sub and Cast lead back to constant integers."""
    for op in ("Reshape", "Mul", "Sub", "Cast"):
        if len(tensor.inputs) == 1 and tensor.inputs[0].op == op:
            tensor = tensor.inputs[0].inputs[0]
    return isinstance(tensor, gs.Constant) and not np.issubdtype(tensor.dtype, np.floating)


def store(model: Model, graph: gs.Graph, constant: gs.Constant, encoded: Encoded) -> None:
    """Put a constant into its storage form; its readers keep reading a tensor of the same name.

    The names in between are short: in small models they would otherwise weigh as much as a small weight.
    """

    def fresh(letter: str) -> str:
        return model.unique_name(f"{letter}.0")

    steps = [("Cast", gs.Constant(fresh("q"), encoded.codes), {"to": int(onnx.TensorProto.FLOAT)})]
    if encoded.zero is not None:
        steps.append(("Sub", gs.Constant(fresh("z"), encoded.zero), {}))
    steps.append(("Mul", gs.Constant(fresh("s"), encoded.scale), {}))
    if list(encoded.codes.shape) != list(constant.shape):
        steps.append(("Reshape", gs.Constant(fresh("r"), np.asarray(constant.shape, np.int64)), {}))
    nodes: list[gs.Node] = []
    for op, operand, attrs in steps:
        inputs = [*nodes[-1].outputs, operand] if nodes else [operand]
        result = Variable(constant.name if len(nodes) == len(steps) - 1 else fresh("c"))
        nodes.append(Node(op, "", attrs, inputs, [result]))
    redirect(constant, nodes[-1].outputs[0])
    graph.nodes[:0] = nodes


def decode(stored: Stored) -> Array:
    """The float weight that ONNX Runtime computes at load."""
    return np.asarray(value_of(stored.codes).astype(np.float32) * value_of(stored.scale))
