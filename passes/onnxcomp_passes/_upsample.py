"""Repeats pixels in int8 without ONNX Runtime's Resize, which takes four times as long channels last."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp_passes._shapes import KnownTensors

__all__ = ["Repeats", "as_gathers", "repeats"]

Repeats = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns: how many there are, and how often each is repeated."""

REPEATING = {
    "asymmetric": {"floor"},
    "half_pixel": {"round_prefer_floor", "round_prefer_ceil"},
    "pytorch_half_pixel": {"round_prefer_floor", "round_prefer_ceil"},
}
"""Coordinates and roundings of the nearest Resize that repeat each pixel k times, for a whole factor k."""


def repeats(node: gs.Node, known: KnownTensors) -> Repeats | None:
    """How often a nearest Resize of images repeats their pixels; None for another node, or where sizes are unknown.

    Args:
        node: Any node, before Q/DQ pairs are written around it.
        known: Proven shapes.
    """
    if node.op != "Resize" or node.attrs.get("mode", "nearest") != "nearest" or node.attrs.get("axes") is not None:
        return None
    coordinates = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if node.attrs.get("nearest_mode", "round_prefer_floor") not in REPEATING.get(coordinates, ()):
        return None
    before, after = (known[id(t)][1].dims if id(t) in known else None for t in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or len(before) != 4 or before[1] != after[1]:
        return None
    if before[0] != after[0] and not _keeps_batch(node):
        return None
    factors = []
    for size, wanted in zip(before[2:], after[2:], strict=True):
        if not isinstance(size, int) or not isinstance(wanted, int) or size < 1 or wanted % size:
            return None
        factors.append((size, wanted // size))
    return factors[0], factors[1]


def _keeps_batch(node: gs.Node) -> bool:
    """Whether the factor of a dynamic first axis is 1."""
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    return isinstance(scales, gs.Constant) and len(value_of(scales)) == 4 and value_of(scales)[0] == 1


def as_gathers(model: Model, node: gs.Node, factors: Repeats) -> list[gs.Node]:
    """Make two Gathers of a Resize between its Q/DQ pairs.

    ::

        before   DQ -> Resize -> Q
        after    DQ -> Transpose -> Q, DQ -> Gather(rows) -> Q, DQ -> Gather(columns) -> Q, DQ -> Transpose -> Q

    ONNX Runtime runs int8 convolutions channels last, so that the two Transposes cancel out with its own, and each
    Gather copies whole pixels.

    Args:
        model: For names.
        node: A Resize that reads a DequantizeLinear; it becomes the last Transpose.
        factors: How often it repeats what.

    Returns:
        New nodes, not in the graph yet.
    """
    _, scale, zero_point = node.inputs[0].inputs[0].inputs
    added: list[gs.Node] = []

    def paired(op: str, attrs: dict[str, object], inputs: list[gs.Tensor]) -> gs.Tensor:
        raw, quantized, result = (Variable(model.unique_name("u.0")) for _ in range(3))
        added.append(Node(op, model.unique_name("upsample.0"), attrs, inputs, [raw]))
        added.append(Node("QuantizeLinear", "", {}, [raw, scale, zero_point], [quantized]))
        added.append(Node("DequantizeLinear", "", {}, [quantized, scale, zero_point], [result]))
        return result

    tensor = paired("Transpose", {"perm": [0, 2, 3, 1]}, [node.inputs[0]])
    for axis, (size, factor) in enumerate(factors, 1):
        places = gs.Constant(model.unique_name("n.0"), np.repeat(np.arange(size, dtype=np.int64), factor))
        tensor = paired("Gather", {"axis": axis}, [tensor, places])
    node.op, node.attrs = "Transpose", {"perm": [0, 3, 1, 2]}
    node.inputs.clear()
    node.inputs.append(tensor)
    return added
