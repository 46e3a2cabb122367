"""How channels pass through each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import subgraphs
from onnxcomp_passes._channels_flow import Block, Flow, LostError
from onnxcomp_passes._channels_products import conv, conv_transpose, gather, gemm, matmul, recurrent
from onnxcomp_passes._channels_shapes import depth_to_space, reshape, shape_of, shape_pieces, space_to_depth
from onnxcomp_passes._workspace import is_standard, label

__all__ = ["rule_for"]

Array = np.ndarray[Any, Any]
Rule = Callable[[Flow, gs.Node], None]

BROADCAST_OPSET = 7
"""Before it, operands were broadcast by attributes."""

SOFTMAX_OPSET = 13
"""Before it, Softmax went over all axes from its axis on."""


def _reason(node: gs.Node) -> str:
    return f"{label(node)} ({node.op}) computes across them"


def elementwise(flow: Flow, node: gs.Node) -> None:
    """Each element by itself, operands broadcast to one shape."""
    inputs = [(index, tensor) for index, tensor in enumerate(node.inputs) if not tensor.is_empty()]
    if len(inputs) > 1 and flow.opset < BROADCAST_OPSET:
        message = f"{label(node)} ({node.op}) broadcasts by the rules before opset 7"
        raise LostError(message)
    if len(inputs) == 1:
        blocks = flow.data(node)
    else:
        if not any(flow.blocks(tensor) for _, tensor in inputs if not isinstance(tensor, gs.Constant)):
            return
        rank = max(len(flow.dims(tensor)) for _, tensor in inputs)
        operands = []
        for _, tensor in inputs:
            if not isinstance(tensor, gs.Constant):
                dims = flow.dims(tensor)
                shift = rank - len(dims)
                moved = [block.moved(lambda axis, shift=shift: axis + shift) for block in flow.blocks(tensor)]  # type: ignore[misc]
                operands.append(((1,) * shift + dims, moved))
        blocks = flow.join(operands, f"{label(node)} ({node.op}) ties them to values that are not made by a weight")
        for index, tensor in inputs:
            if isinstance(tensor, gs.Constant):
                flow.scale_along(node, index, blocks, rank)
    for tensor in node.outputs:
        flow.put(tensor, blocks)


def batch_normalization(flow: Flow, node: gs.Node) -> None:
    """BatchNormalization, InstanceNormalization: each channel by itself, with its own parameters."""
    if any(not tensor.is_empty() for tensor in node.outputs[1:]):
        message = f"{label(node)} ({node.op}) is in training mode"
        raise LostError(message)
    x = node.inputs[0]
    channels = flow.axis(x, 1)
    for index in range(1, len(node.inputs)):
        flow.vector(node, index, channels)
    blocks = flow.blocks(x)
    if node.op == "InstanceNormalization":
        blocks = flow.without(blocks, range(2, len(flow.dims(x))), _reason(node))
    flow.put(node.outputs[0], blocks)


def quantize(flow: Flow, node: gs.Node) -> None:
    """QuantizeLinear, DequantizeLinear: with one scale, or with one for each entry of an axis."""
    if node.attrs.get("block_size", 0):
        message = f"{label(node)} ({node.op}) has scales for blocks"
        raise LostError(message)
    blocks = flow.data(node)
    dims = flow.dims(node.inputs[1])
    if len(dims) == 1 and dims[0] != 1:
        rank = len(flow.dims(node.inputs[0]))
        channels = flow.axis(node.inputs[0], int(node.attrs.get("axis", 1)) % rank)
        flow.vector(node, 1, channels)
        flow.vector(node, 2, channels)
    flow.put(node.outputs[0], blocks)


def _across(axes_of: Callable[[Flow, gs.Node, int], Iterable[int]]) -> Rule:
    """An operator that computes across some axes and keeps the shape."""

    def rule(flow: Flow, node: gs.Node) -> None:
        rank = len(flow.dims(node.inputs[0]))
        before, axes = flow.blocks(node.inputs[0]), set(axes_of(flow, node, rank))
        blocks = flow.without(before, axes, _reason(node))
        blocks += [block for block in before if set(block.axes) <= axes]  # pinned: later nodes then know why
        flow.put(node.outputs[0], blocks)

    return rule


def _softmax_axes(flow: Flow, node: gs.Node, rank: int) -> Iterable[int]:
    if flow.opset >= SOFTMAX_OPSET:
        return [int(node.attrs.get("axis", -1)) % rank]
    return range(int(node.attrs.get("axis", 1)) % rank, rank)


def _from_axis(flow: Flow, node: gs.Node, rank: int) -> Iterable[int]:
    return range(int(node.attrs.get("axis", -1)) % rank, rank)


def _one_axis(flow: Flow, node: gs.Node, rank: int) -> Iterable[int]:
    if node.op == "CumSum":
        return [axis % rank for axis in flow.ints(node, "axis", 1) or range(rank)]
    return [int(node.attrs.get("axis", -1)) % rank]


def _channel_axis(flow: Flow, node: gs.Node, rank: int) -> Iterable[int]:
    return [1]


def pool(flow: Flow, node: gs.Node) -> None:
    """Pooling and GridSample: channels stay, places do not."""
    if node.op == "MaxPool" and len(node.outputs) > 1 and not node.outputs[1].is_empty():
        message = f"{label(node)} (MaxPool) gives the places of its maxima"
        raise LostError(message)
    x, *others = node.inputs
    for tensor in others:
        flow.without(flow.blocks(tensor), range(len(flow.dims(tensor))), _reason(node))
    flow.put(node.outputs[0], flow.without(flow.blocks(x), range(2, len(flow.dims(x))), _reason(node)))


def resize(flow: Flow, node: gs.Node) -> None:
    """Resize, Upsample, Expand, Tile: axes that keep their size keep their labels."""
    x = node.inputs[0]
    held = flow.data(node)
    before, after = flow.dims(x), flow.dims(node.outputs[0])
    shift = len(after) - len(before)
    changed = [axis for axis, size in enumerate(before) if not isinstance(size, int) or after[axis + shift] != size]
    blocks = flow.without(held, changed, f"{label(node)} ({node.op}) changes their number")
    moved = [block.moved(lambda axis: axis + shift) for block in blocks]
    if node.op == "Expand" and blocks:
        pieces = shape_pieces(node)
        first = len(after) - len(pieces)
        computed = {first + place for place, size in enumerate(pieces) if size is None}
        moved = flow.without(moved, computed, f"the shape for {label(node)} (Expand) is computed in the graph")
    if node.op == "Resize" and blocks:
        flow.ints(node, "sizes", 3)
    flow.put(node.outputs[0], moved)


def pad(flow: Flow, node: gs.Node) -> None:
    """Pad: on other axes than that of the channels."""
    blocks = flow.blocks(node.inputs[0])
    if not blocks:
        return
    rank = len(flow.dims(node.inputs[0]))
    pads = flow.ints(node, "pads", 1) or flow.ints(node, "paddings", 1) or []
    axes = [axis % rank for axis in flow.ints(node, "axes", 3) or range(rank)]
    padded = [axis for place, axis in enumerate(axes) if pads[place] or pads[place + len(axes)]]
    flow.put(node.outputs[0], flow.without(blocks, padded, f"{label(node)} (Pad) adds to them"))


def transpose(flow: Flow, node: gs.Node) -> None:
    """Transpose: labels move along."""
    blocks = flow.data(node)
    rank = len(flow.dims(node.inputs[0]))
    order = list(node.attrs.get("perm", range(rank)[::-1]))
    flow.put(node.outputs[0], [block.moved(order.index) for block in blocks])


def reduce(flow: Flow, node: gs.Node) -> None:
    """Reductions, ArgMax: over other axes than that of the channels."""
    x = node.inputs[0]
    blocks = flow.blocks(x)
    if not blocks:
        return
    rank = len(flow.dims(x))
    if node.op in {"ArgMax", "ArgMin"}:
        axes = [int(node.attrs.get("axis", 0)) % rank]
    else:
        given = flow.ints(node, "axes", 1)
        default = () if node.attrs.get("noop_with_empty_axes", 0) else range(rank)
        axes = [axis % rank for axis in given or default]
    left = flow.without(blocks, axes, _reason(node))
    if not node.attrs.get("keepdims", 1):
        left = [block.moved(lambda axis: axis - sum(gone < axis for gone in axes)) for block in left]
    flow.put(node.outputs[0], left)


def concat(flow: Flow, node: gs.Node) -> None:
    """Concat: labels one after the other, or, on another axis, side by side."""
    if not any(flow.blocks(tensor) for tensor in node.inputs if not isinstance(tensor, gs.Constant)):
        return
    all_dims = [flow.dims(tensor) for tensor in node.inputs]
    rank = len(all_dims[0])
    axis = int(node.attrs["axis"]) % rank
    parts, operands = [], []
    reason = f"{label(node)} (Concat) ties them to values that are not made by a weight"
    for dims, tensor in zip(all_dims, node.inputs, strict=True):
        own = None if isinstance(tensor, gs.Constant) else flow.axis(tensor, axis)
        size = dims[axis]
        if own is None and isinstance(size, int):
            own = flow.labels.fresh(size)
            flow.labels.pin(own, "are not made by a weight")
        parts.append(own)
        if not isinstance(tensor, gs.Constant):
            padded = [1 if place == axis else size for place, size in enumerate(dims)]
            operands.append((padded, [block for block in flow.blocks(tensor) if axis not in block.axes]))
    blocks = flow.join(operands, reason)
    for index, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant):
            flow.scale_along(node, index, blocks, rank)
    known = [part for part in parts if part is not None]
    if len(known) == len(parts):
        blocks.append(Block((axis,), np.concatenate(known)))
    else:
        for part in known:
            flow.labels.pin(part, f"{label(node)} (Concat) puts them beside an unknown number of others")
    flow.put(node.outputs[0], blocks)


def split(flow: Flow, node: gs.Node) -> None:
    """Split: each output has its part of the labels."""
    x = node.inputs[0]
    blocks, dims = flow.blocks(x), flow.dims(x)
    if not blocks:
        return
    axis = int(node.attrs.get("axis", 0)) % len(dims)
    sizes = [flow.dims(tensor)[axis] for tensor in node.outputs]
    flow.ints(node, "split", 1)  # known, since they may have to change
    touched = [block for block in blocks if axis in block.axes]
    others = [block for block in blocks if axis not in block.axes]
    if all(size == 1 for size in sizes):  # as query, key and value: what goes, goes in all of them
        others += flow.without(touched, [axis], f"{label(node)} (Split) takes single ones")
        touched = []
    start = 0
    for tensor, size in zip(node.outputs, sizes, strict=True):
        parts = []
        for block in touched:
            if not isinstance(size, int):
                message = f"{label(node)} (Split) makes parts of unknown size"
                raise LostError(message)
            parts.append(Block(block.axes, block.labels.take(range(start, start + size), block.axes.index(axis))))
        start += size if isinstance(size, int) else 0
        flow.put(tensor, [*others, *parts])


def slice_(flow: Flow, node: gs.Node) -> None:
    """Slice: a part of the labels, where it is contiguous."""
    x = node.inputs[0]
    blocks, dims = flow.blocks(x), flow.dims(x)
    if not blocks:
        return
    axes = _slice_axes(flow, node, len(dims))
    touched = {axis for block in blocks for axis in block.axes} & set(axes)
    if touched:
        starts, ends = flow.ints(node, "starts", 1) or [], flow.ints(node, "ends", 2) or []
        steps = flow.ints(node, "steps", 4) or [1] * len(axes)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            if axis not in touched:
                continue
            if step != 1:
                blocks = flow.without(blocks, [axis], f"{label(node)} (Slice) takes every {step}th of them")
                continue
            chosen = range(int(dims[axis]))[slice(start, end)]
            blocks = [
                Block(block.axes, block.labels.take(chosen, block.axes.index(axis))) if axis in block.axes else block
                for block in blocks
            ]
    flow.put(node.outputs[0], blocks)


def _slice_axes(flow: Flow, node: gs.Node, rank: int) -> list[int]:
    axes = flow.ints(node, "axes", 3)
    if axes is None:
        count = len(node.attrs["starts"]) if "starts" in node.attrs else int(flow.dims(node.inputs[1])[0])
        return list(range(count))
    return [axis % rank for axis in axes]


# fmt: off
ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
    "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)
REDUCTIONS = (
    "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)
POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample", "LpPool", "MaxPool",
)
# fmt: on

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), batch_normalization),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), quantize),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _across(_softmax_axes)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _across(_from_axis)),
    **dict.fromkeys(("CumSum", "LpNormalization", "TopK"), _across(_one_axis)),
    **dict.fromkeys(("GroupNormalization", "LRN"), _across(_channel_axis)),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(("Resize", "Upsample", "Expand", "Tile"), resize),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DepthToSpace": depth_to_space,
    "Gather": gather,
    "Gemm": gemm,
    "MatMul": matmul,
    "Pad": pad,
    "Shape": shape_of,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Transpose": transpose,
}

CONTRIBUTED = frozenset({"Gelu", "QuickGelu"})
"""Operators of ONNX Runtime's own domain that go by the rule of their name."""


def rule_for(node: gs.Node) -> Rule | None:
    """The rule for a node; None where channels cannot be followed through it."""
    if any(True for _ in subgraphs(node)) or not (
        is_standard(node, node.op) or (node.domain == "com.microsoft" and node.op in CONTRIBUTED)
    ):
        return None
    return RULES.get(node.op)
