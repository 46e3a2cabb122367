"""Which inner tensors of a teacher and a student to compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model

__all__ = ["matched_tensors"]

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
ACTIVATIONS = {
    *("Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu"),
    *("Sigmoid", "Softplus", "Swish", "Tanh", "ThresholdedRelu"),
}
BETWEEN = {"Add", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "Identity"}
"""What may be between a layer and its activation, with constants only beside."""


def matched_tensors(teacher: Model, student: Model, *, limit: int = 8, any_channels: bool = False) -> list[str]:
    """Choose inner tensors that are in both graphs, by name, to compare a student with its teacher by.

    Ends of blocks: sums of two paths (behind their activation, if there is one); where there are fewer than two of
    those, activations behind layers too; where there is neither, the layers themselves. Half of the places are for
    attention weights (Softmax of rank 4) where there are any. Both kinds are spread evenly over the depth. Only tensors
    of floats outside of subgraphs count, whose shapes are equal as far as they can be inferred; outputs of the graph
    are left out.

    Args:
        teacher: The model that is learned from; it is not changed.
        student: The model that learns; it is not changed.
        limit: How many at most.
        any_channels: Take tensors too that differ in their count of channels, as those of a pruned student.

    Returns:
        Names, in the order of the teacher's graph.

    Example:
        >>> from onnx import parser
        >>> text = '''<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y)
        ...     <float[2, 2] w = {1, 2, 3, 4}> { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }'''
        >>> model = Model.load(parser.parse_model(text))
        >>> matched_tensors(model, model)
        ['b']
    """
    one, other = teacher.fork(), student.fork()
    one.infer_shapes()
    other.infer_shapes()
    theirs = {tensor.name: tensor for node in other.graph.nodes for tensor in node.outputs}
    outputs = {tensor.name for tensor in (*one.graph.outputs, *other.graph.outputs)}

    def suits(tensor: gs.Tensor) -> bool:
        match = theirs.get(tensor.name)
        return (
            bool(tensor.name)
            and match is not None
            and tensor.name not in outputs
            and _is_float(tensor)
            and _is_float(match)
            and _shapes_match(tensor.shape, match.shape, any_channels)
        )

    nodes = one.graph.nodes
    maps = [tensor for tensor in _attention_weights(nodes) if suits(tensor)]
    ends = [tensor for tensor in _sums(nodes) if suits(tensor)]
    if len(ends) < 2:
        ends += [tensor for tensor in _activated(nodes) if suits(tensor) and not any(tensor is end for end in ends)]
    if not ends:
        ends = [tensor for tensor in _layers(nodes) if suits(tensor)]
    order = {tensor.name: place for place, tensor in enumerate(tensor for node in nodes for tensor in node.outputs)}
    ends.sort(key=lambda tensor: order[tensor.name])
    places = min(len(maps), limit // 2 if ends else limit)
    chosen = {tensor.name for tensor in (*_spread(maps, places), *_spread(ends, limit - places))}
    return sorted(chosen, key=order.__getitem__)


def _attention_weights(nodes: Iterable[gs.Node]) -> list[gs.Tensor]:
    return [node.outputs[0] for node in nodes if node.op == "Softmax" and len(_shape(node.outputs[0]) or (0,) * 4) == 4]


def _sums(nodes: Iterable[gs.Node]) -> list[gs.Tensor]:
    """Sums of two paths of the same shape, each behind the activation that alone reads it."""
    return [
        _behind(node.outputs[0])
        for node in nodes
        if node.op == "Add" and not any(_is_constant(tensor) for tensor in node.inputs) and _is_of_equals(node)
    ]


def _is_of_equals(node: gs.Node) -> bool:
    """Whether a node's two inputs may have the same shape, of two axes at least: no bias, and no mask, is added."""
    one, other = (_shape(tensor) for tensor in node.inputs)
    if one is None or other is None:
        known = one if other is None else other
        return known is None or len(known) >= 2
    sizes = [[size if isinstance(size, int) else None for size in shape] for shape in (one, other)]
    return len(one) >= 2 and sizes[0] == sizes[1]


def _activated(nodes: Iterable[gs.Node]) -> list[gs.Tensor]:
    found = []
    for node in nodes:
        if node.op not in ACTIVATIONS or not node.inputs or not _is_of_layer(node.inputs[0]):
            continue
        result = node.outputs[0]
        if len(result.outputs) == 1 and result.outputs[0].op == "Mul":  # x * Sigmoid(x)
            product = result.outputs[0]
            if any(tensor is node.inputs[0] for tensor in product.inputs):
                result = product.outputs[0]
        found.append(result)
    return found


def _layers(nodes: Iterable[gs.Node]) -> list[gs.Tensor]:
    return [node.outputs[0] for node in nodes if node.op in LAYERS]


def _behind(tensor: gs.Tensor) -> gs.Tensor:
    """The output of the activation that alone reads a tensor, or the tensor."""
    if len(tensor.outputs) == 1 and tensor.outputs[0].op in ACTIVATIONS:
        return tensor.outputs[0].outputs[0]
    return tensor


def _is_of_layer(tensor: gs.Tensor) -> bool:
    """Whether a layer makes a tensor, constants added and normalization included."""
    while tensor.inputs:
        node = tensor.inputs[0]
        if node.op in LAYERS:
            return True
        paths = [each for each in node.inputs if each.name and not _is_constant(each)]
        if node.op not in BETWEEN or len(paths) != 1:
            return False
        tensor = paths[0]
    return False


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or (bool(tensor.inputs) and tensor.inputs[0].op == "Constant")


def _is_float(tensor: gs.Tensor) -> bool:
    """Whether a tensor is, or may be, of floats."""
    if tensor.dtype is None:
        return True
    try:
        return bool(np.dtype(tensor.dtype).kind == "f")
    except TypeError:  # a type of ONNX's own
        return False


def _shape(tensor: gs.Tensor) -> Sequence[Any] | None:
    return None if tensor.shape is None else tuple(tensor.shape)


def _shapes_match(one: Sequence[Any] | None, other: Sequence[Any] | None, any_channels: bool) -> bool:
    if one is None or other is None:
        return True
    if len(one) != len(other):
        return False
    channel = {3: 2, 4: 1}.get(len(one)) if any_channels else None
    return all(
        axis == channel or a == b or not (isinstance(a, int) and isinstance(b, int))
        for axis, (a, b) in enumerate(zip(one, other, strict=True))
    )


def _spread(tensors: Sequence[gs.Tensor], count: int) -> list[gs.Tensor]:
    """So many of them, evenly, the last one included."""
    if len(tensors) <= count:
        return list(tensors)
    return [tensors[round((number + 1) * len(tensors) / count) - 1] for number in range(count)]
