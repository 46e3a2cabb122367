"""How channels pass through operators that multiply with weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp_passes._channels_flow import Block, Flow, LostError
from onnxcomp_passes._workspace import label

__all__ = ["conv", "conv_transpose", "gather", "gemm", "matmul", "recurrent"]

Array = np.ndarray[Any, Any]


def _fixed(node: gs.Node) -> str:
    """Why the weight's channels of a node stay where its input's do."""
    return f"{label(node)} ({node.op}) ties them to channels that are not made by a weight or cannot be cut"


def conv(flow: Flow, node: gs.Node) -> None:
    """Conv: input channels are the weight's axis 1, output channels its axis 0; groups stay equal."""
    x, group = node.inputs[0], int(node.attrs.get("group", 1))
    flow.data(node, 1)
    rest = flow.without([b for b in flow.blocks(x) if 1 not in b.axes], range(2, len(flow.dims(x))), _fixed(node))
    channels = flow.axis(x, 1)
    if group == 1:
        flow.tie(channels, flow.play(node, 1, 1, "in"), _fixed(node))
        out = flow.play(node, 1, 0, "out")
    elif (inner := flow.dims(node.inputs[1])[1]) == 1:
        out = _whole_groups(flow, node, group, channels, flow.play(node, 1, 0, "group"))
    elif isinstance(inner, int) and group >= inner:  # more units than places in a group
        out = _whole_groups(flow, node, group, channels, flow.play(node, 1, 0, "out"))
        flow.tie(flow.axis(node.inputs[1], 1), None, _fixed(node))
    else:
        out = _places_in_groups(flow, node, group, channels)
    flow.vector(node, 2, out)
    flow.put(node.outputs[0], [*rest, *_block(1, out)])


def _whole_groups(flow: Flow, node: gs.Node, group: int, inner: Array | None, outer: Array | None) -> Array | None:
    """A group goes with all of its input and output channels; in a depthwise convolution a group is a channel."""
    if inner is None or outer is None:
        flow.tie(inner, outer, _fixed(node))
        return outer
    inner, rows = inner.reshape(group, -1), outer.reshape(group, -1)
    flow.labels.unify(inner[:, :1], inner)
    flow.labels.unify(inner[:, :1], rows)
    return outer


def _places_in_groups(flow: Flow, node: gs.Node, group: int, channels: Array | None) -> Array | None:
    """All groups lose the channels at the same places."""
    place = flow.play(node, 1, 1, "in")
    if channels is not None:
        rows = channels.reshape(group, -1)
        flow.labels.unify(rows[:1], rows)
        channels = rows[0]
    flow.tie(channels, place, _fixed(node))
    out = flow.play(node, 1, 0, "out")
    if out is not None:
        rows = out.reshape(group, -1)
        flow.labels.unify(rows[:1], rows)
    return out


def conv_transpose(flow: Flow, node: gs.Node) -> None:
    """ConvTranspose: input channels are the weight's axis 0, output channels its axis 1."""
    x, group = node.inputs[0], int(node.attrs.get("group", 1))
    flow.data(node, 1)
    rest = flow.without([b for b in flow.blocks(x) if 1 not in b.axes], range(2, len(flow.dims(x))), _fixed(node))
    channels = flow.axis(x, 1)
    if group == 1:
        flow.tie(channels, flow.play(node, 1, 0, "in"), _fixed(node))
        out = flow.play(node, 1, 1, "out")
    else:
        rows = _whole_groups(flow, node, group, channels, flow.play(node, 1, 0, "group"))
        flow.tie(flow.axis(node.inputs[1], 1), None, _fixed(node))
        size = flow.dims(node.inputs[1])[1]
        out = None
        if rows is not None and isinstance(size, int):
            out = np.repeat(rows.reshape(group, -1)[:, 0], size)
    flow.vector(node, 2, out)
    flow.put(node.outputs[0], [*rest, *_block(1, out)])


def _block(axis: int, labels: Array | None) -> list[Block]:
    return [] if labels is None else [Block((axis,), labels)]


def gemm(flow: Flow, node: gs.Node) -> None:
    """Gemm: as MatMul, with transposed operands and a third one that is broadcast."""
    swapped = [bool(node.attrs.get(name, 0)) for name in ("transA", "transB")]
    blocks = _product(flow, node, (1 - swapped[0], 0 + swapped[0]), (0 + swapped[1], 1 - swapped[1]), 2)
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        added = node.inputs[2]
        if isinstance(added, gs.Constant):
            flow.scale_along(node, 2, blocks, 2)
        else:
            shift = 2 - len(flow.dims(added))
            dims = flow.dims(node.outputs[0]), (1,) * shift + flow.dims(added)
            moved = [block.moved(lambda axis: axis + shift) for block in flow.blocks(added)]
            blocks = flow.join([(dims[0], blocks), (dims[1], moved)], _fixed(node))
    flow.put(node.outputs[0], blocks)


def matmul(flow: Flow, node: gs.Node) -> None:
    """MatMul: of an activation and a weight, or of two activations, as in attention."""
    ranks = [len(flow.dims(tensor)) for tensor in node.inputs]
    if min(ranks) < 2:
        message = f"{label(node)} (MatMul) multiplies with a vector"
        raise LostError(message)
    left, right = ranks
    flow.put(node.outputs[0], _product(flow, node, (left - 1, left - 2), (right - 2, right - 1), max(ranks)))


def _product(flow: Flow, node: gs.Node, left: Sequence[int], right: Sequence[int], rank: int) -> list[Block]:
    """The labels of a matrix product.

    Args:
        flow: What is known.
        node: Its first two inputs are the factors.
        left: Axes of the first factor: the one that is summed over, then the one of rows.
        right: Axes of the second factor: the one that is summed over, then the one of columns.
        rank: Of the result.
    """
    activations = not any(flow.is_weight(tensor) for tensor in node.inputs[:2])
    operands, summed = [], []
    for index, (contracted, kept) in enumerate((left, right)):
        tensor = node.inputs[index]
        flow.data(node, index)
        if flow.is_weight(tensor):
            flow.play(node, index, contracted, "in")
            flow.play(node, index, kept, "out")
        labels, rest = _contract(flow, flow.blocks(tensor), contracted)
        if activations and labels is not None:
            flow.play(node, index, contracted, "summed")
        summed.append(labels)
        place = rank - 2 + index
        shift = rank - len(flow.dims(tensor))

        def moved(axis: int, kept: int = kept, place: int = place, shift: int = shift) -> int:
            return place if axis == kept else axis + shift

        dims: list[int | str] = [1] * rank
        for axis, size in enumerate(flow.dims(tensor)):
            if axis != contracted:
                dims[moved(axis)] = size
        operands.append((dims, [block.moved(moved) for block in rest]))
    flow.tie(summed[0], summed[1], _fixed(node))
    blocks = flow.join(operands, _fixed(node))
    if activations:
        for index, (_, rest) in enumerate(operands):
            shift = rank - len(flow.dims(node.inputs[index]))
            for axis in {axis for block in rest for axis in block.axes if axis < rank - 2}:
                flow.play(node, index, axis - shift, "batch")
    return blocks


def _contract(flow: Flow, blocks: list[Block], axis: int) -> tuple[Array | None, list[Block]]:
    """The labels of the axis that is summed over, if they are its own, and the blocks that stay.

    Where an axis shares its labels with others, as the features of attention heads do, what stays is cut.
    """
    labels, rest = None, []
    for block in blocks:
        if block.axes == (axis,):
            labels = block.labels
        elif axis in block.axes:
            rest += flow.without([block], [axis], "")
        else:
            rest.append(block)
    return labels, rest


def gather(flow: Flow, node: gs.Node) -> None:
    """Gather: of a table's rows by computed indices, or of channels by constant ones."""
    data, indices = node.inputs
    blocks = flow.data(node)
    rank = len(flow.dims(data))
    axis = int(node.attrs.get("axis", 0)) % rank
    if flow.blocks(indices):
        message = f"{label(node)} (Gather) takes it for indices"
        raise LostError(message)
    width = len(flow.dims(indices))
    if flow.is_weight(data):
        for other in range(rank):
            if other != axis:
                flow.play(node, 0, other, "out")
    if isinstance(indices, gs.Constant) and not isinstance(data, gs.Constant):
        blocks = _chosen(flow, blocks, axis, [int(i) for i in value_of(indices).reshape(-1)], width)
    else:
        blocks = flow.without(blocks, [axis], f"{label(node)} (Gather) picks from them by number")
    flow.put(node.outputs[0], [block.moved(lambda a: a if a <= axis else a + width - 1) for block in blocks])


def _chosen(flow: Flow, blocks: list[Block], axis: int, indices: list[int], width: int) -> list[Block]:
    """The blocks behind a Gather with constant indices."""
    chosen = []
    for block in blocks:
        if axis not in block.axes:
            chosen.append(block)
        elif width == 1:
            place = block.axes.index(axis)
            chosen.append(Block(block.axes, block.labels.take(indices, place)))
        elif len(block.axes) > 1 and width == 0:  # one of query, key and value: what goes, goes in all of them
            chosen += flow.without([block], [axis], "")
        else:
            flow.labels.pin(block.labels, "single ones of them are picked by number (Gather)")
    return chosen


def recurrent(flow: Flow, node: gs.Node) -> None:
    """LSTM, GRU, RNN: input features can go, hidden ones are left alone."""
    x = node.inputs[0]
    flow.data(node, 1)
    flow.without([b for b in flow.blocks(x) if 2 not in b.axes], (0, 1), _fixed(node))
    flow.tie(flow.axis(x, 2), flow.play(node, 1, 2, "in"), _fixed(node))
    for tensor in node.inputs[2:]:
        flow.without(flow.blocks(tensor), range(8), f"{label(node)} ({node.op}) reads it as state")
