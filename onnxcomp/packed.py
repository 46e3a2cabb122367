"""Packed weights: constants that a few nodes decode when ONNX Runtime loads the model.

A packed tensor keeps its name; the tensors on the way to it have names that begin with `PREFIX`, and so the form
survives saving without a byte of its own. `onnxcomp_passes.pack` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import Model, value_of
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool

__all__ = ["PREFIX", "Packed", "find_packed", "packed_name", "packed_weight", "unpack"]

Array = np.ndarray[Any, Any]

PREFIX = "~"
"""Short, since in a small model names weigh as much as a small weight, and no exporter begins a name with it."""


@dataclass(frozen=True)
class Packed:
    """A weight that is decoded at load.

    Attributes:
        tensor: The decoded weight; its name is that of the dense one.
        nodes: Those that decode it, in order.
        constants: What they decode it from; small ones may be shared with other packed weights.
    """

    tensor: gs.Tensor
    nodes: tuple[gs.Node, ...]
    constants: tuple[gs.Constant, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the constants."""
        return sum(constant._values.nbytes for constant in self.constants)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense value."""
        last = self.nodes[-1]
        place = {"Reshape": 1, "ConstantOfShape": 0}.get(last.op)
        if place is not None and isinstance(last.inputs[place], gs.Constant):
            return tuple(int(size) for size in value_of(last.inputs[place]))
        return tuple(self.decode().shape)

    def decode(self) -> Array:
        """The dense value, bit for bit that which ONNX Runtime computes at load."""
        values: dict[int, Array] = {id(constant): value_of(constant) for constant in self.constants}
        for node in self.nodes:
            arrays = [values[id(tensor)] for tensor in node.inputs]
            values[id(node.outputs[0])] = np.asarray(_OPERATORS[node.op](node, arrays))
        return values[id(self.tensor)]


def packed_name(number: int) -> str:
    """The name of one tensor on the way to a packed one."""
    return f"{PREFIX}{np.base_repr(number, 36).lower()}"


def packed_weight(tensor: gs.Tensor) -> Packed | None:
    """The packed form behind a tensor, if it has one."""
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if maker is None or not any(source.name.startswith(PREFIX) for source in maker.inputs):
        return None
    nodes: dict[int, gs.Node] = {}
    constants: dict[int, gs.Constant] = {}
    if not _collect(tensor, nodes, constants):
        return None
    return Packed(tensor, tuple(nodes.values()), tuple(constants.values()))


def find_packed(model: Model) -> list[Packed]:
    """The packed weights of the main graph, in the order of the nodes that end their decoding."""
    tensors = (tensor for node in model.graph.nodes for tensor in node.outputs[:1])
    found = (packed_weight(tensor) for tensor in tensors if not tensor.name.startswith(PREFIX))
    return [packed for packed in found if packed is not None]


def unpack(model: Model) -> list[Packed]:
    """Put dense initializers in the place of the packed weights of the main graph, in place.

    Returns:
        The packed forms that were there.
    """
    found, spool = find_packed(model), Spool()
    gone: dict[int, gs.Node] = {}
    for packed in found:
        value = packed.decode()
        onnx_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        held = spooled(np.ascontiguousarray(value).tobytes(), onnx_type, value.shape, spool)
        dense = gs.Constant(packed.tensor.name, held)
        for reader in list(packed.tensor.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is packed.tensor:
                    reader.inputs[index] = dense
        gone.update((id(node), node) for node in packed.nodes)
    model.graph.nodes = [node for node in model.graph.nodes if id(node) not in gone]
    for node in gone.values():
        node.inputs.clear()
        node.outputs.clear()
    return found


def _collect(tensor: gs.Tensor, nodes: dict[int, gs.Node], constants: dict[int, gs.Constant]) -> bool:
    """Gather what a tensor is decoded from, in order; False where that is not constants and decoding nodes alone."""
    if isinstance(tensor, gs.Constant):
        constants[id(tensor)] = tensor
        return True
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if maker is None or maker.domain or maker.op not in _OPERATORS:
        return False
    if id(maker) not in nodes:
        if not all(_collect(source, nodes, constants) for source in maker.inputs):
            return False
        nodes[id(maker)] = maker
    return True


def _scatter(node: gs.Node, arrays: list[Array]) -> Array:
    result = arrays[0].copy()
    result[arrays[1]] = arrays[2]
    return result


def _filled(node: gs.Node, arrays: list[Array]) -> Array:
    value = node.attrs.get("value")
    fill = np.zeros(1, np.float32) if value is None else value_of(value)
    return np.full(arrays[0], fill.reshape(-1)[0], fill.dtype)


def _slice(node: gs.Node, arrays: list[Array]) -> Array:
    return arrays[0][int(arrays[1][0]) : int(arrays[2][0])]


_OPERATORS: dict[str, Callable[[gs.Node, list[Array]], Any]] = {
    "BitShift": lambda node, arrays: np.right_shift(*arrays),
    "Cast": lambda node, arrays: arrays[0].astype(helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))),
    "ConstantOfShape": _filled,
    "CumSum": lambda node, arrays: np.cumsum(arrays[0], axis=0, dtype=arrays[0].dtype),
    "Gather": lambda node, arrays: arrays[0][arrays[1]],
    "Mod": lambda node, arrays: np.mod(*arrays),
    "Mul": lambda node, arrays: np.multiply(*arrays),
    "Reshape": lambda node, arrays: arrays[0].reshape(arrays[1]),
    "ScatterElements": _scatter,
    "Slice": _slice,
}
"""What decodes a packed weight, all along axis 0."""
