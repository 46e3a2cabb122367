"""The operators that follow layers into int8: which there are, when, and how the int8 graph says them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of

__all__ = ["SAME_GRID", "Decoders", "adapt", "clip_low", "data_inputs", "is_adapted", "is_supported"]

Array = np.ndarray[Any, Any]


class Decoders(Protocol):
    """Makes DequantizeLinear nodes; each method gives the node and what it writes."""

    def of_constant(self, value: Array) -> tuple[gs.Node, gs.Tensor]:
        """Of a float constant, as codes over its own range."""

    def of_codes(self, codes: gs.Tensor, scale: Array, zero_point: gs.Tensor) -> tuple[gs.Node, gs.Tensor]:
        """Of codes that are there, with another scale."""


SAME_GRID = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that only move or pick values: output and input share scale and zero point, and the runtime drops the Q/DQ.

Pad, SpaceToDepth and the linear Resize are not here: ONNX Runtime keeps them in float (1.32).
"""

COMPUTING = frozenset(
    {
        "Add",
        "AveragePool",
        "Clip",
        "Concat",
        "GlobalAveragePool",
        "HardSigmoid",
        "LeakyRelu",
        "Mul",
        "Relu",
        "Sigmoid",
        "Where",
    }
)
"""Operators with an int8 kernel of their own. Softmax has one too, which takes five times as long as the float one."""

MAXPOOL_INT8_OPSET = 12

WIDEST_FACTORS = 8.0
"""A constant that something is multiplied with is rounded on one grid: its values may differ by this factor at most,
so that the smallest is off by 2 % at most."""


def is_supported(node: gs.Node, opset: int) -> bool:
    """Whether a node may follow its neighbours into int8: the int8 form exists for its operator and attributes."""
    if node.domain or node.op not in SAME_GRID | COMPUTING:
        return False
    if any(not tensor.name for tensor in node.outputs) or (len(node.outputs) != 1 and node.op != "Split"):
        return False
    check = _CHECKS.get(node.op)
    return check is None or check(node, opset)


def is_adapted(node: gs.Node) -> bool:
    """Whether `adapt` says a node with other operators, which is meant for ONNX Runtime's CPU kernels."""
    if node.op in {"Add", "Mul"}:
        return any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
    return node.op in {"Relu", "Clip", "HardSigmoid"}


def data_inputs(node: gs.Node) -> Iterator[gs.Tensor]:
    """The inputs that carry data computed by other nodes, not constants, shapes, conditions or bounds."""
    if node.op in {"Add", "Mul", "Concat"}:
        chosen = node.inputs
    else:
        chosen = node.inputs[1:3] if node.op == "Where" else node.inputs[:1]
    yield from (tensor for tensor in chosen if not isinstance(tensor, gs.Constant))


def clip_low(node: gs.Node) -> float | None:
    """The lower bound of a Clip; None where a bound is computed."""
    if any(t.name and not isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return None
    if "min" in node.attrs:
        return float(node.attrs["min"])
    low = node.inputs[1] if len(node.inputs) > 1 else None
    return float(value_of(low).item()) if isinstance(low, gs.Constant) else -np.inf


def _constants_fit(node: gs.Node, opset: int) -> bool:
    """Whether one grid holds the constant operand well enough, if there is one."""
    del opset
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if not constants:
        return True
    data = next(data_inputs(node), None)
    value = value_of(constants[0]) if constants[0].dtype == np.float32 else None
    if data is None or value is None or not value.size or not np.isfinite(value).all():
        return False
    if node.op == "Add":  # the bias of a MatMul fuses with what comes behind it in float
        return not data.inputs or data.inputs[0].op != "MatMul"
    sizes = np.abs(value[value != 0].astype(np.float64))
    return bool(sizes.size and sizes.max() <= WIDEST_FACTORS * sizes.min())


def _all_computed(node: gs.Node, opset: int) -> bool:
    del opset
    return not any(isinstance(tensor, gs.Constant) for tensor in node.inputs[-2:])


def _hard_sigmoid_fits(node: gs.Node, opset: int) -> bool:
    del opset
    return bool(node.attrs.get("alpha", 0.2) > 0 and node.attrs.get("beta", 0.5) > 0)


_CHECKS: dict[str, Callable[[gs.Node, int], bool]] = {
    "Add": _constants_fit,
    "Mul": _constants_fit,
    "Concat": lambda node, _: not any(isinstance(tensor, gs.Constant) for tensor in node.inputs),
    "Where": _all_computed,
    "HardSigmoid": _hard_sigmoid_fits,
    "Clip": lambda node, _: clip_low(node) == 0.0,
    "MaxPool": lambda _, opset: opset >= MAXPOOL_INT8_OPSET,
    "Resize": lambda node, _: node.attrs.get("mode", "nearest") == "nearest",
}


def adapt(node: gs.Node, decoders: Decoders) -> list[gs.Node]:
    """Say a companion, whose tensors have their Q/DQ pairs already, with operators that ONNX Runtime has in int8.

    ::

        before   DQ(q, s) -> Relu -> Q                      and Clip from 0, whose upper end is that of the range
        after    DQ(q, s) -> LeakyRelu(alpha = 0) -> Q

        before   DQ(q, s) -> HardSigmoid(alpha, beta) -> Q
        after    DQ(q, alpha * s) -> Add(DQ(beta)) -> Q     the range of Q, which is inside [0, 1], does the clipping

    Constant operands of Add and Mul become codes.

    Args:
        node: It is changed.
        decoders: Makes the DequantizeLinear nodes.

    Returns:
        New nodes, not in the graph yet.
    """
    if node.op in {"Relu", "Clip"}:
        node.op, node.attrs = "LeakyRelu", {"alpha": 0.0}
        while len(node.inputs) > 1:
            node.inputs.pop()
    elif node.op == "HardSigmoid":
        return _hard_sigmoid_as_add(node, decoders)
    elif node.op in {"Add", "Mul"}:
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                decoder, node.inputs[index] = decoders.of_constant(value_of(tensor))
                return [decoder]
    return []


def _hard_sigmoid_as_add(node: gs.Node, decoders: Decoders) -> list[gs.Node]:
    alpha, beta = (np.float32(node.attrs.get(name, usual)) for name, usual in (("alpha", 0.2), ("beta", 0.5)))
    codes, scale, zero_point = node.inputs[0].inputs[0].inputs
    scaled, data = decoders.of_codes(codes, value_of(scale) * alpha, zero_point)
    offset, constant = decoders.of_constant(np.asarray(beta))
    node.op, node.attrs = "Add", {}
    node.inputs[0] = data
    node.inputs.append(constant)
    return [scaled, offset]
