"""How channels pass through Reshape and its kin: axes that are merged and split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp_passes._channels_flow import Block, Flow, LostError
from onnxcomp_passes._workspace import label

__all__ = ["depth_to_space", "reshape", "runs", "shape_of", "shape_pieces", "space_to_depth"]

Array = np.ndarray[Any, Any]
Sizes = Sequence[int | str]
Run = tuple[list[int], list[int]]

MAX_LABELS = 1 << 22
"""Axes that become longer than this when they are merged are not followed: 32 MB of labels for each tensor."""


def runs(before: Sizes, after: Sizes) -> list[Run]:
    """The shortest runs of axes that hold the same elements before and after a reshape.

    Args:
        before: Dimensions; unknown ones have names, where equal names mean equal numbers.
        after: Dimensions of the same number of elements.

    Returns:
        Pairs of axes before and after. What cannot be told apart for unknown dimensions is left out.

    Example:
        >>> runs(["N", 6, 4, 5], ["N", 2, 3, 20])
        [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
        >>> runs(["N", "T", 8], ["M", 2, 4])
        [([2], [1, 2])]
    """
    front = _front_runs(before, after)
    used = [sum(len(run[side]) for run in front) for side in (0, 1)]
    rest = before[used[0] :], after[used[1] :]
    back = _front_runs(rest[0][::-1], rest[1][::-1])
    ends = len(before) - 1, len(after) - 1
    mirrored = [([ends[0] - i for i in run[0]][::-1], [ends[1] - i for i in run[1]][::-1]) for run in back]
    return front + mirrored[::-1]


def _front_runs(before: Sizes, after: Sizes) -> list[Run]:
    found: list[Run] = []
    start, end = [0, 0], [0, 0]
    sides = before, after
    while all(start[side] < len(sides[side]) for side in (0, 1)):
        end = [start[0] + 1, start[1] + 1]
        while True:
            parts = [list(sides[side][start[side] : end[side]]) for side in (0, 1)]
            if parts[0] == parts[1]:
                break
            if any(isinstance(size, str) for part in parts for size in part):
                return found
            products = [math.prod(int(size) for size in part) for part in parts]
            if products[0] == products[1]:
                break
            shorter = int(products[0] > products[1])
            if end[shorter] == len(sides[shorter]):
                return found
            end[shorter] += 1
        found.append((list(range(start[0], end[0])), list(range(start[1], end[1]))))
        start = end
    return found


def reshape(flow: Flow, node: gs.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: labels stay with their elements.

    An axis that is split has labels for each combination of places, until something tells along which of them a cut
    goes.
    """
    blocks = flow.data(node)
    before = flow.dims(node.inputs[0])
    pieces = shape_pieces(node) if node.op == "Reshape" else None
    after = _after(flow, node, before, pieces)
    if 0 in before or 0 in after:
        message = f"{label(node)} ({node.op}) reshapes nothing"
        raise LostError(message)
    pairs = runs(before, after)
    reason = f"{label(node)} ({node.op}) mixes them with other axes"
    reshaped = []
    for block in blocks:
        moved = _through(flow, block, blocks, pairs, before, after)
        if moved is None:
            flow.labels.pin(block.labels, reason)
            continue
        if pieces is not None and any(pieces[axis] is None for axis in moved.axes):
            flow.labels.pin(block.labels, f"the shape for {label(node)} (Reshape) is computed in the graph")
        reshaped.append(moved)
    flow.put(node.outputs[0], reshaped)


def shape_pieces(node: gs.Node) -> list[int | None]:
    """The elements of a Reshape's or Expand's target; None for those that are computed.

    Raises:
        LostError: Not even their number is known.
    """
    if "shape" in node.attrs:
        message = f"{label(node)} ({node.op}) has its shape in an attribute (opset 1 to 4)"
        raise LostError(message)
    target = node.inputs[1]
    if isinstance(target, gs.Constant):
        return [int(size) for size in value_of(target).reshape(-1)]
    maker = target.inputs[0] if len(target.inputs) == 1 else None
    pieces: list[int | None] = []
    for piece in maker.inputs if maker is not None and maker.op == "Concat" else ():
        if isinstance(piece, gs.Constant):
            pieces += [int(size) for size in value_of(piece).reshape(-1)]
        elif piece.inputs and piece.inputs[0].op == "Unsqueeze":  # of a scalar: one element
            pieces.append(None)
        else:
            pieces.clear()
            break
    if not pieces:
        message = f"the shape for {label(node)} ({node.op}) is computed in the graph"
        raise LostError(message)
    return pieces


def _after(flow: Flow, node: gs.Node, before: Sizes, pieces: list[int | None] | None) -> list[int | str]:
    """The dimensions behind a node, from inference and from the target."""
    try:
        after = list(flow.dims(node.outputs[0]))
    except LostError:
        if pieces is None:
            raise
        after = [f"!{axis}" for axis in range(len(pieces))]  # unlike any name that inference gives
    for axis, size in enumerate(pieces or ()):
        if isinstance(after[axis], str) and size is not None:
            if size > 0:
                after[axis] = size
            elif size == 0 and not node.attrs.get("allowzero", 0):
                after[axis] = before[axis]
    return after


def _through(
    flow: Flow, block: Block, blocks: list[Block], pairs: list[Run], before: Sizes, after: Sizes
) -> Block | None:
    """A block behind a reshape; None where it cannot be followed."""
    touched = [run for run in pairs if set(run[0]) & set(block.axes)]
    if not set(block.axes) <= {axis for run in touched for axis in run[0]}:
        return None
    places = {run[0][0]: run[1][0] for run in touched if len(run[0]) == len(run[1]) == 1}
    if len(places) == len(touched):
        return block.moved(lambda axis: places[axis])
    if len(touched) > 1 or any(other is not block and set(other.axes) & set(touched[0][0]) for other in blocks):
        return None
    olds, news = touched[0]
    sizes = [int(before[axis]) for axis in olds]
    if math.prod(sizes) > MAX_LABELS:
        return None
    wide = np.expand_dims(block.labels, tuple(place for place, axis in enumerate(olds) if axis not in block.axes))
    labels = np.broadcast_to(wide, sizes).reshape([int(after[axis]) for axis in news])
    return Block(tuple(news), labels)


def depth_to_space(flow: Flow, node: gs.Node) -> None:
    """DepthToSpace: all channels that become one go together."""
    blocks, size = _square(flow, node)
    channels = flow.axis(node.inputs[0], 1)
    if channels is not None:
        rows = (
            channels.reshape(size**2, -1) if node.attrs.get("mode", "DCR") == "DCR" else channels.reshape(-1, size**2).T
        )
        flow.labels.unify(rows[:1], rows)
        blocks.append(Block((1,), rows[0]))
    flow.put(node.outputs[0], blocks)


def space_to_depth(flow: Flow, node: gs.Node) -> None:
    """SpaceToDepth: a channel becomes several, which go together."""
    blocks, size = _square(flow, node)
    channels = flow.axis(node.inputs[0], 1)
    if channels is not None:
        blocks.append(Block((1,), np.tile(channels, size**2)))
    flow.put(node.outputs[0], blocks)


def _square(flow: Flow, node: gs.Node) -> tuple[list[Block], int]:
    others = [block for block in flow.blocks(node.inputs[0]) if 1 not in block.axes]
    return flow.without(others, (2, 3), f"{label(node)} ({node.op}) moves them"), int(node.attrs["blocksize"])


def shape_of(flow: Flow, node: gs.Node) -> None:
    """Shape: sizes that the graph computes with must not change."""
    blocks = flow.blocks(node.inputs[0])
    if not blocks:
        return
    rank = len(flow.dims(node.inputs[0]))
    listed = list(range(rank))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    used: set[int] = set()
    output = node.outputs[0]
    if any(tensor is output for tensor in flow.model.graph.outputs):
        used.update(listed)
    for reader in output.outputs:
        used.update(_read_sizes(flow, reader, listed))
    flow.without(blocks, used, f"the graph computes with their number (Shape, {label(node)})")


def _read_sizes(flow: Flow, reader: gs.Node, listed: list[int]) -> list[int]:
    """Which of the axes whose sizes are listed a reader of a shape looks at."""
    try:
        if reader.op == "Gather" and (indices := flow.ints(reader, "indices", 1)) is not None:
            return [listed[index] for index in indices]
        if reader.op == "Slice":
            starts, ends = flow.ints(reader, "starts", 1), flow.ints(reader, "ends", 2)
            steps = flow.ints(reader, "steps", 4) or [1]
            if starts is not None and ends is not None and len(starts) == 1:
                return listed[starts[0] : ends[0] : steps[0]]
    except (LostError, IndexError):
        pass
    return listed
