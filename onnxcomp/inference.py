"""ONNX's shape inference, kept from computing constants that do not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from onnx import shape_inference

from onnxcomp.runtime.census import graphs

__all__ = ["infer_shapes"]

MOST_PROPAGATED = 1 << 20
"""Elements of a value that may be computed along the way. Shapes have a few; a chain of Concat doubles without end."""


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with the shapes that ONNX's own inference finds.

    Small values are computed on the way, since shapes hang on them, unless these would become large: ONNX sets no
    limit, and 40 Concat of a value with itself make terabytes.

    Raises:
        InferenceError: The model contradicts itself.
    """
    return shape_inference.infer_shapes(model, data_prop=_largest_value(model) <= MOST_PROPAGATED)


def _largest_value(model: onnx.ModelProto) -> int:
    """How many elements a value may get; only Concat makes one larger than what it is made of."""
    sizes: dict[str, int] = {}
    parts_of = [(graph.initializer, graph.node) for graph in graphs(model.graph)]
    parts_of += [([], function.node) for function in model.functions]
    return max((_largest_of(initializers, nodes, sizes) for initializers, nodes in parts_of), default=0)


def _largest_of(
    initializers: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto], sizes: dict[str, int]
) -> int:
    sizes.update((tensor.name, math.prod(tensor.dims)) for tensor in initializers if len(tensor.dims) <= 1)
    largest = 0
    for node in nodes:
        parts = [sizes.get(name, 0) for name in node.input]
        if node.op_type == "Constant":
            parts = [math.prod(attribute.t.dims) for attribute in node.attribute if attribute.HasField("t")]
        elif node.op_type == "Shape":
            parts = [64]
        size = sum(parts) if node.op_type == "Concat" else max(parts, default=0)
        largest = max(largest, size if node.op_type == "Concat" else 0)
        sizes.update(dict.fromkeys(node.output, size))
    return largest
