"""Count multiply-accumulates, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import inliner

from onnxcomp.model import Model
from onnxcomp.shapes import Shape, traced_nodes

__all__ = ["LAYER_OPERATORS", "mac_counts"]


def mac_counts(
    model: Model, shapes: Mapping[str, Sequence[int]] | None = None, notes: list[str] | None = None
) -> dict[str, int]:
    """Count the multiply-accumulates of one run, a node.

    Counted are convolutions, matrix products (also integer ones, and those behind Q/DQ), Einsum and recurrent layers,
    in subgraphs too; a loop's body counts once, model-local functions are put in place first.

    Args:
        model: The model; it is not changed, and no large weight is read.
        shapes: Sizes of graph inputs, by name. Without it a dynamic first axis, and every other of its name, is 1.
        notes: Gets a line for each node that counts as 0 because a shape is unknown.

    Returns:
        Node name -> count. A node without a name, or with one that is taken, goes by its first output, as in
        `onnxcomp.runtime.explain`.
    """
    proto = model.proto()
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    counts: dict[str, int] = {}
    for traced in traced_nodes(proto, shapes or {}):
        rule = _RULES.get(traced.node.op_type)
        if rule is None:
            continue
        macs = rule(traced.node, traced.shapes)
        if macs is None and notes is not None:
            kind = traced.node.op_type
            notes.append(f"{traced.name} ({kind}): its multiply-accumulates are not counted, a shape is unknown")
        counts[traced.name] = macs or 0
    return counts


MacRule = Callable[[onnx.NodeProto, list[Shape | None]], int | None]
"""From a node and the shapes of its inputs and outputs (None: unknown or left out) to its count."""


def _convolution(weight: int) -> MacRule:
    def count(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
        kernel, output = shapes[weight], shapes[len(node.input)]
        return None if kernel is None or output is None else math.prod(output) * math.prod(kernel[1:])

    return count


def _transposed_convolution(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
    data, kernel = shapes[0], shapes[1]
    return None if data is None or kernel is None else math.prod(data) * math.prod(kernel[1:])


def _gemm(right: int) -> MacRule:
    def count(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
        a, b = shapes[0], shapes[right]
        if a is None or b is None or len(a) != 2 or len(b) != 2:
            return None
        return math.prod(a) * b[0 if _attribute(node, "transB", 0) else 1]

    return count


def _product(right: int) -> MacRule:
    def count(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
        a, b = shapes[0], shapes[right]
        if a is None or b is None or not a or not b:
            return None
        a = a if len(a) > 1 else (1, *a)
        b = b if len(b) > 1 else (*b, 1)
        rows, inner = a[-2:][::-1] if _attribute(node, "transA", 0) else a[-2:]
        columns = b[-2] if _attribute(node, "transB", 0) else b[-1]
        try:
            batch = np.broadcast_shapes(a[:-2], b[:-2])
        except ValueError:
            return None
        return math.prod(batch) * rows * inner * columns

    return count


def _block_product(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
    return None if shapes[0] is None else math.prod(shapes[0]) * int(_attribute(node, "N", 0))


def _recurrent(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
    data, weight, recurrence = shapes[:3]
    if data is None or weight is None or recurrence is None:
        return None
    return data[0] * data[1] * (math.prod(weight) + math.prod(recurrence))


def _einsum(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
    left = _attribute(node, "equation", b"").decode().replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for letters, shape in zip(left, shapes, strict=False):
        if shape is None or len(letters) != len(shape) or "." in letters:
            return None
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values()) if len(left) > 1 else 0


def _unknown(node: onnx.NodeProto, shapes: list[Shape | None]) -> int | None:
    return None


_RULES: dict[str, MacRule] = {
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "NhwcFusedConv", "DeformConv"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    **dict.fromkeys(("Gemm", "FusedGemm"), _gemm(1)),
    "QGemm": _gemm(3),
    **dict.fromkeys(("MatMul", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat"), _product(1)),
    **dict.fromkeys(("FusedMatMul", "DynamicQuantizeMatMul"), _product(1)),
    "QLinearMatMul": _product(3),
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4"), _block_product),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    "Einsum": _einsum,
    # Fused attention: it computes, and what it computes depends on too many variants to be told from shapes alone.
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"), _unknown),
}

LAYER_OPERATORS = frozenset(_RULES)
"""The operators whose multiply-accumulates are counted."""


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
