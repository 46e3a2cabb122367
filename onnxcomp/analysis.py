"""Facts about a model that need no run: multiply-accumulates, weights and their zeros, bytes once deflated."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.macs import mac_counts
from onnxcomp.model import Model, value_of
from onnxcomp.packed import find_packed, unpack
from onnxcomp.runtime.census import INT8_OPERATORS, unique_names
from onnxcomp.shapes import Shape
from onnxcomp.structure import model_files
from onnxcomp.weights import CHUNK_BYTES, LazyWeight

__all__ = [
    "HeldWeight",
    "WeightRow",
    "count_parameters",
    "deflated_bytes",
    "held_weights",
    "is_quantized",
    "mac_counts",
    "named_nodes",
    "operator_counts",
    "weight_table",
]

Array = np.ndarray[Any, Any]

DEFLATED_WHOLE_BYTES = 16 << 20
"""Of larger files a share is deflated."""

DEFLATED_SHARE = 8
DEFLATED_BLOCK_BYTES = 1 << 16

# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightRow:
    """One weight: a float initializer, or the integer codes that one is stored as.

    Attributes:
        name: The initializer, or the output of the Constant node, that holds it.
        shape: Its axes.
        dtype: Its numpy type, such as "float32" or, for codes, "int8".
        bytes: What it takes in the file.
        elements: How many parameters it holds.
        zeros: How many of them are zero (for codes: equal to their zero point).
        op: The operator that uses it, past the nodes that decode it.
        node: That operator's node.
    """

    name: str
    shape: Shape
    dtype: str
    bytes: int
    elements: int
    zeros: int
    op: str
    node: str


@dataclass(frozen=True)
class HeldWeight:
    """Where a weight is held, and what reads it.

    Attributes:
        name: As `WeightRow.name`.
        constant: Its values, or the codes that it is stored as.
        reader: The node that takes the constant.
        index: At which input.
        node: The operator that uses the weight, past the nodes that decode it.
    """

    name: str
    constant: gs.Constant
    reader: gs.Node
    index: int
    node: gs.Node


_CODES = {
    "DequantizeLinear": (0,),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (0, 3),
    "QLinearAdd": (0, 3),
    "QLinearMul": (0, 3),
    "QGemm": (0, 3, 6),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "MatMulNBits": (1,),
    "GatherBlockQuantized": (0,),
}
"""Operator -> the inputs whose integers are the codes of a weight."""

_SETTINGS = {
    "DequantizeLinear": (1,),
    "QuantizeLinear": (1,),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "QLinearAdd": (1, 4, 6),
    "QLinearMul": (1, 4, 6),
    "QGemm": (1, 4, 7),
    "MatMulIntegerToFloat": (2, 3),
    "DynamicQuantizeMatMul": (2,),
    "DynamicQuantizeLSTM": (8, 10),
    "MatMulNBits": (2,),
    "GatherBlockQuantized": (2,),
    "Clip": (1, 2),
    "Resize": (1, 2),
    "Upsample": (1,),
    "Range": (0, 1, 2),
    "Pad": (2,),
    "Dropout": (1,),
    "OneHot": (2,),
}
"""Operator -> the float inputs that are scales or other settings, and no parameters."""

_ZERO_POINTS = {"DequantizeLinear": 2, "QLinearConv": 5, "QLinearMatMul": 5, "QGemm": 5, "ConvInteger": 3}
_ZERO_POINTS |= {"MatMulInteger": 3, "MatMulIntegerToFloat": 5, "DynamicQuantizeMatMul": 3}
"""Operator -> the input with the zero point of its weight."""

_PASSING = {"Cast", "DequantizeLinear", "Identity", "Mul", "Reshape", "Transpose"}
"""What may stand between a weight's codes and the operator that uses it."""


def weight_table(model: Model) -> list[WeightRow]:
    """List the weights in the order of the nodes that read them; one is in memory at a time, large ones in pieces."""
    return list(_weight_rows(model))


def count_parameters(model: Model) -> tuple[int, int]:
    """Count the numbers in float weights, or in the integer codes they are stored as, and those that are not zero.

    Scales, zero points and the settings of operators (bounds of a Clip, factors of a Resize) are not counted.

    Returns:
        The parameters, and how many of them are not zero.
    """
    parameters = zeros = 0
    for row in _weight_rows(model):
        parameters += row.elements
        zeros += row.zeros
    return parameters, parameters - zeros


def _weight_rows(model: Model) -> Iterator[WeightRow]:
    packed: dict[str, int] = {}
    if find_packed(model):
        model = model.fork()
        packed = {str(weight.tensor.name): weight.nbytes for weight in unpack(model)}
    names = named_nodes(model)
    for held in held_weights(model):
        name, constant, reader, index, user = held.name, held.constant, held.reader, held.index, held.node
        shape = tuple(int(size) for size in constant.shape)
        elements = math.prod(shape)
        nbytes = packed.get(name, getattr(constant._values, "nbytes", 0))
        if reader.op == "MatMulNBits" and index == 1:
            # Several codes a byte, and zero points in a packing of their own: zeros are not looked for.
            elements, zeros = int(reader.attrs.get("N", 0)) * int(reader.attrs.get("K", 0)), 0
        else:
            zeros = elements - _nonzeros(constant, _zero_point(reader, index))
        yield WeightRow(name, shape, str(constant.dtype), nbytes, elements, zeros, user.op, names[id(user)])


def named_nodes(model: Model) -> dict[int, str]:
    """The unique name of each node of a model, as `onnxcomp.runtime.census.node_names` gives it, by the node's id."""
    nodes = [node for graph in model.graphs() for node in graph.nodes]
    told = ((node.name, [tensor.name for tensor in node.outputs], node.op) for node in nodes)
    return dict(zip(map(id, nodes), unique_names(told), strict=True))


def held_weights(model: Model) -> Iterator[HeldWeight]:
    """Find the weights of a model, in the order of the nodes that read them; none is read.

    Args:
        model: The model. Packed weights are not found: unpack it first, with `onnxcomp.packed.unpack`.
    """
    for name, constant, readers in _constants(model):
        found = next((reader for reader in readers if _is_weight(constant, *reader)), None)
        if found is not None:
            yield HeldWeight(name, constant, *found, _user(found[0]))


def _constants(model: Model) -> Iterator[tuple[str, gs.Constant, list[tuple[gs.Node, int]]]]:
    """Every initializer and every Constant node's value, with who reads it at which input."""
    for constant in model.constants():
        yield constant.name, constant, _readers(constant)
    for graph in model.graphs():
        for node in graph.nodes:
            value = node.attrs.get("value") if node.op == "Constant" and not node.domain else None
            if isinstance(value, gs.Constant) and node.outputs:
                yield node.outputs[0].name, value, _readers(node.outputs[0])


def _readers(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    unique = {id(node): node for node in tensor.outputs}.values()
    return [(node, index) for node in unique for index, used in enumerate(node.inputs) if used is tensor]


def _is_weight(constant: gs.Constant, reader: gs.Node, index: int) -> bool:
    dtype = np.dtype(constant.dtype)
    if _is_float(dtype):
        is_setting = index in _SETTINGS.get(reader.op, ()) or _decodes(reader) or _moves_zero(reader)
        return not is_setting
    if dtype.kind not in "iu" and "int" not in dtype.name:
        return False
    if reader.op == "Cast":  # the storage form: Cast, perhaps Sub with zero points, then Mul with a constant scale
        readers = [*reader.outputs[0].outputs]
        readers += [later for node in readers if _moves_zero(node) for later in node.outputs[0].outputs]
        return any(_decodes(node) for node in readers)
    return index in _CODES.get(reader.op, ())


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name  # bfloat16 and float8 are of kind V


def _decodes(node: gs.Node) -> bool:
    """Whether a node is a Mul that scales integer codes that a Cast made float."""
    if node.op != "Mul" or not any(isinstance(tensor, gs.Constant) for tensor in node.inputs):
        return False
    makers = [tensor.inputs[0] for tensor in node.inputs if len(tensor.inputs) == 1]
    return any(_casts_codes(maker) or _moves_zero(maker) for maker in makers)


def _moves_zero(node: gs.Node) -> bool:
    """Whether a node is a Sub that takes zero points off codes that a Cast made float."""
    if node.op != "Sub" or len(node.inputs) != 2 or not isinstance(node.inputs[1], gs.Constant):
        return False
    makers = node.inputs[0].inputs
    return len(makers) == 1 and _casts_codes(makers[0])


def _casts_codes(node: gs.Node) -> bool:
    return node.op == "Cast" and _is_integer_constant(node.inputs[0])


def _is_integer_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype is not None and not _is_float(np.dtype(tensor.dtype))


def _user(node: gs.Node) -> gs.Node:
    """The operator behind the nodes that decode a weight."""
    for _ in range(8):  # a decoding is a handful of nodes at most
        readers = node.outputs[0].outputs if (node.op in _PASSING or _moves_zero(node)) and node.outputs else []
        if not readers:
            break
        node = readers[0]
    return node


def _zero_point(reader: gs.Node, index: int) -> Array | None:
    """The zero point of the codes that a reader takes, shaped to broadcast over them; None where it is 0."""
    if reader.op == "Cast":
        moved = next((node for node in reader.outputs[0].outputs if _moves_zero(node)), None)
        return None if moved is None else value_of(moved.inputs[1])
    position = _ZERO_POINTS.get(reader.op)
    codes = reader.inputs[index]
    if position is None or position >= len(reader.inputs) or not isinstance(reader.inputs[position], gs.Constant):
        return None
    if reader.op.startswith("QLinear") and index in (0, 8):
        return None
    value = value_of(reader.inputs[position])
    if not value.astype(np.int64).any():
        return None
    rank = len(codes.shape or ())
    if value.size == 1 or value.ndim == rank:
        return value.reshape(-1) if value.size == 1 else value
    axis = int(reader.attrs.get("axis", 1)) if reader.op == "DequantizeLinear" else (0 if "Conv" in reader.op else -1)
    return value.reshape([-1 if position == axis % max(rank, 1) else 1 for position in range(rank)])


def _nonzeros(constant: gs.Constant, zero_point: Array | None) -> int:
    value = constant._values
    blob = value.blob if isinstance(value, LazyWeight) else None
    whole_items = blob is not None and blob.nbytes == math.prod(value.shape) * value.dtype.itemsize
    if blob is not None and whole_items and CHUNK_BYTES % value.dtype.itemsize == 0 and zero_point is None:
        dtype = value.dtype.newbyteorder("<")
        # Ml_dtypes' types have no fast count_nonzero; a comparison does for all.
        return sum(int(np.count_nonzero(np.frombuffer(chunk, dtype) != 0)) for chunk in blob.chunks())
    array = value_of(constant)
    if zero_point is None:
        return int(np.count_nonzero(array != 0))
    if zero_point.ndim == array.ndim:
        for axis, (size, known) in enumerate(zip(array.shape, zero_point.shape, strict=True)):
            if 1 < known < size:  # one zero point a block
                zero_point = np.repeat(zero_point, -(-size // known), axis).take(range(size), axis)
    return int(np.count_nonzero(array != zero_point))


# --- the whole model --------------------------------------------------------------------------------------------------


def is_quantized(model: Model) -> bool:
    """Whether a model holds quantized computation already: Q/DQ nodes or integer operators.

    Weights that are only stored as int8, and decoded by Cast and Mul, do not make it quantized.
    """
    quantizing = INT8_OPERATORS | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    return any(node.op in quantizing for graph in model.graphs() for node in graph.nodes)


def operator_counts(model: Model) -> dict[str, int]:
    """Operator -> how many nodes, in subgraphs too, the most frequent first; other domains' with their domain."""
    nodes = (node for graph in model.graphs() for node in graph.nodes)
    names = (f"{node.domain}.{node.op}" if node.domain not in (None, "", "ai.onnx") else node.op for node in nodes)
    return dict(Counter(names).most_common())


def deflated_bytes(path: str | Path) -> int:
    """Measure what a model takes once deflated (zlib's level 6), as in an APK, a wheel or a zip.

    The file and the external data that it names are streamed; nothing is written. Deflating everything would take
    longer than much else that is done with a large model: of files above 16 MB an eighth is deflated, in blocks
    spread evenly, and stands for the rest (within 1% on models of 50 and 70 MB).

    Raises:
        ModelError: The file cannot be read or is not a model, or its external data are unsafe to read.
    """
    deflate = zlib.compressobj()
    size = 0
    for part in model_files(Path(path)):
        with part.open("rb") as file:
            if part.stat().st_size > DEFLATED_WHOLE_BYTES:
                size += _estimate_deflated(file, part.stat().st_size)
                continue
            while chunk := file.read(CHUNK_BYTES):
                size += len(deflate.compress(chunk))
    return size + len(deflate.flush())


def _estimate_deflated(file: IO[bytes], size: int) -> int:
    seen = deflated = 0
    for start in range(0, size, DEFLATED_BLOCK_BYTES * DEFLATED_SHARE):
        file.seek(start)
        block = file.read(DEFLATED_BLOCK_BYTES)
        seen += len(block)
        deflated += len(zlib.compress(block))
    return round(deflated / seen * size)
