"""Remove units of channel groups from a model: every coupled constant, shape and attribute at once."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import Model, value_of
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._channels_flow import Flow
from onnxcomp_passes._channels_groups import Channels, node_key
from onnxcomp_passes._channels_shapes import shape_pieces

__all__ = ["cut"]

Array = np.ndarray[Any, Any]
Masks = dict[int, Array]
"""Axis -> which of its entries stay, bool."""

SPLIT_INPUT_OPSET = 13
"""From it on the sizes of Split are an input."""


def cut(model: Model, channels: Channels, removed: Mapping[str, Any], spool: Spool | None = None) -> None:
    """Remove units in place.

    Args:
        model: The model that `channels` was found in, or a fork of it.
        channels: From `find_channels`.
        removed: Group name -> the units that go, integers in any order.
        spool: Where the bytes of large weights go.

    Raises:
        ValueError: An axis would lose all of its entries (see `Channels.allowed`).
        KeyError: There is no such group.
    """
    spool = spool or Spool()
    gone = channels.is_gone(removed)
    constants: dict[str, dict[tuple[str, int], Masks]] = defaultdict(lambda: defaultdict(dict))
    kept: dict[str, Masks] = defaultdict(dict)
    for axis in channels.axes:
        stays = ~gone[axis.classes]
        if stays.all():
            continue
        if not stays.any():
            message = f"axis {axis.axis} of {axis.tensor} would lose all of its {stays.size} entries"
            raise ValueError(message)
        constants[axis.tensor][axis.node, axis.index][axis.axis] = stays
        if axis.role == "carrier":
            kept[axis.tensor][axis.axis] = stays
    outside = {id(tensor) for graph in model.graphs() for tensor in graph.outputs}
    work = _Cut(model, kept, channels.ranks)
    touched = [node for node in model.graph.nodes if any(t.name in constants for t in (*node.inputs, *node.outputs))]
    for tensor in {id(t): t for node in touched for t in node.inputs if isinstance(t, gs.Constant)}.values():
        if tensor.name in constants:
            _cut_constant(model, tensor, constants[tensor.name], outside, spool)
    for node in touched:
        work.fix(node)


def _cut_constant(
    model: Model,
    constant: gs.Constant,
    plans: Mapping[tuple[str, int], Masks],
    outside: Container[int],
    spool: Spool,
) -> None:
    """Give each reader its part of a constant; where all want the same, the constant itself becomes that."""
    readers: dict[Any, list[tuple[gs.Node, int]]] = defaultdict(list)
    for reader in dict.fromkeys(constant.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is constant:
                masks = plans.get((node_key(reader), index), {})
                readers[tuple((axis, masks[axis].tobytes()) for axis in sorted(masks))].append((reader, index))
    whole = value_of(constant)
    in_place = len(readers) == 1 and id(constant) not in outside
    for wanted, places in readers.items():
        if not wanted:
            continue
        value = whole
        for axis, mask in wanted:
            value = np.compress(np.frombuffer(mask, np.bool_), value, axis)
        target = constant if in_place else gs.Constant(model.unique_name(f"{constant.name}.c"), value)
        _set(target, value, spool)
        for reader, index in places if not in_place else ():
            reader.inputs[index] = target


def _set(constant: gs.Constant, value: Array, spool: Spool) -> None:
    value = np.ascontiguousarray(value)
    if value.dtype.kind in "fiu":
        onnx_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        constant.values = spooled(value.tobytes(), onnx_type, value.shape, spool)
    else:  # 4-bit integers and the like are packed when they are written
        constant.values = value


class _Cut:
    """Mends what depends on sizes around tensors that were cut.

    Args:
        model: The model.
        kept: Activation -> what stays of its axes.
        ranks: Activation -> its number of axes.
    """

    def __init__(self, model: Model, kept: Mapping[str, Masks], ranks: Mapping[str, int]) -> None:
        self._model = model
        self._kept = kept
        self._ranks = ranks

    def fix(self, node: gs.Node) -> None:
        """Mend one node, and the shapes that are declared for its outputs."""
        rule = RULES.get(node.op)
        if rule is not None:
            rule(self, node)
        for tensor in node.outputs:
            masks = self._of(tensor)
            if masks and tensor.shape is not None:
                tensor.shape = [int(masks[a].sum()) if a in masks else size for a, size in enumerate(tensor.shape)]

    def _of(self, tensor: gs.Tensor) -> Masks:
        return self._kept.get(tensor.name, {})

    def _give(
        self, node: gs.Node, name: str, index: int, values: list[int], dims: tuple[int, ...] | None = None
    ) -> None:
        """Set whole numbers, as an attribute or as a constant of the node's own."""
        if name in node.attrs:
            node.attrs[name] = values
            return
        old = node.inputs[index]
        shape = (len(values),) if dims is None else dims
        value = np.array(values, old.dtype or np.int64).reshape(shape)
        node.inputs[index] = gs.Constant(self._model.unique_name(f"{old.name}.c"), value)

    # --- one rule an operator -----------------------------------------------------------------------------------------

    def convolution(self, node: gs.Node) -> None:
        """The number of groups, where whole ones went."""
        stays = self._of(node.inputs[0]).get(1)
        group = int(node.attrs.get("group", 1))
        if group == 1 or stays is None:
            return
        rows = stays.reshape(group, -1)
        if (rows == rows[:, :1]).all():
            node.attrs["group"] = int(rows[:, 0].sum())

    def reshape(self, node: gs.Node) -> None:
        """Reshape, Expand: numbers in the target."""
        masks = self._of(node.outputs[0])
        if not masks:
            return
        pieces = shape_pieces(node)
        first = self._ranks.get(node.outputs[0].name, len(pieces)) - len(pieces)  # Expand aligns at the end
        before = self._of(node.inputs[0])
        for axis, stays in masks.items():
            place = axis - first
            size = pieces[place] if place >= 0 else None
            same = axis in before and before[axis].sum() == stays.sum()
            if size == stays.size or (node.op == "Reshape" and size == 0 and not same):
                pieces[place] = int(stays.sum())
        self._retarget(node, pieces)

    def _retarget(self, node: gs.Node, pieces: list[int | None]) -> None:
        target = node.inputs[1]
        if isinstance(target, gs.Constant):
            if pieces != [int(size) for size in value_of(target).reshape(-1)]:
                self._give(node, "shape", 1, [int(size) for size in pieces if size is not None])
            return
        maker = target.inputs[0]
        inputs, start = [], 0
        for piece in maker.inputs:
            count = 1
            if isinstance(piece, gs.Constant):
                count = int(np.prod(piece.shape, dtype=np.int64))
                values = np.array(pieces[start : start + count], piece.dtype)
                if not np.array_equal(values, value_of(piece).reshape(-1)):
                    piece = gs.Constant(self._model.unique_name(f"{piece.name}.c"), values)
            inputs.append(piece)
            start += count
        if all(new is old for new, old in zip(inputs, maker.inputs, strict=True)):
            return
        made = type(target)(self._model.unique_name(f"{target.name}.c"))
        made.dtype = target.dtype
        copy = type(maker)("Concat", self._model.unique_name(f"{maker.name}.c"), dict(maker.attrs), inputs, [made])
        nodes = self._model.graph.nodes
        nodes.insert(next(place for place, other in enumerate(nodes) if other is maker) + 1, copy)
        node.inputs[1] = made

    def resize(self, node: gs.Node) -> None:
        """Resize: sizes, if it goes by them."""
        masks = self._of(node.outputs[0])
        sizes = Flow.ints(node, "sizes", 3)
        if not masks or not sizes:
            return
        rank = self._ranks[node.outputs[0].name]
        axes = [axis % rank for axis in Flow.ints(node, "axes", -1) or range(rank)]
        left = [int(masks[axis].sum()) if axis in masks else size for axis, size in zip(axes, sizes, strict=True)]
        self._give(node, "sizes", 3, left)

    def split(self, node: gs.Node) -> None:
        """Split: the sizes of its parts."""
        masks = self._of(node.inputs[0])
        axis = int(node.attrs.get("axis", 0)) % self._ranks.get(node.inputs[0].name, 1)
        if axis not in masks:
            return
        total, count = masks[axis].size, len(node.outputs)
        sizes = Flow.ints(node, "split", 1)
        if sizes is None:
            part = -(-total // count)
            sizes = [min(part, total - start) for start in range(0, total, part)]
        edges = np.cumsum([0, *sizes])
        left = [int(masks[axis][start:end].sum()) for start, end in itertools.pairwise(edges)]
        node.attrs.pop("num_outputs", None)
        if self._model.opset < SPLIT_INPUT_OPSET:
            node.attrs["split"] = left
        elif len(node.inputs) > 1 and not node.inputs[1].is_empty():
            self._give(node, "split", 1, left)
        else:
            made = gs.Constant(self._model.unique_name("split.c"), np.array(left, np.int64))
            node.inputs = [node.inputs[0], made]

    def slice(self, node: gs.Node) -> None:
        """Slice: where it starts and ends."""
        masks = self._of(node.inputs[0])
        if not masks:
            return
        rank = self._ranks[node.inputs[0].name]
        axes = [axis % rank for axis in Flow.ints(node, "axes", 3) or range(rank)]
        if not set(axes) & set(masks):
            return
        starts, ends = (list(Flow.ints(node, name, index) or ()) for name, index in (("starts", 1), ("ends", 2)))
        for place, axis in enumerate(axes[: len(starts)]):
            if axis in masks:
                first, last, _ = slice(starts[place], ends[place]).indices(masks[axis].size)
                starts[place], ends[place] = int(masks[axis][:first].sum()), int(masks[axis][:last].sum())
        self._give(node, "starts", 1, starts)
        self._give(node, "ends", 2, ends)

    def gather(self, node: gs.Node) -> None:
        """Gather: constant indices of channels."""
        masks = self._of(node.inputs[0])
        axis = int(node.attrs.get("axis", 0)) % self._ranks.get(node.inputs[0].name, 1)
        if axis not in masks:
            return
        indices = value_of(node.inputs[1]).reshape(-1) % masks[axis].size
        places = np.cumsum(masks[axis]) - 1
        self._give(node, "indices", 1, [int(places[index]) for index in indices if masks[axis][index]])


Rule = Callable[[_Cut, gs.Node], None]

RULES: dict[str, Rule] = {
    "Conv": _Cut.convolution,
    "ConvTranspose": _Cut.convolution,
    "Expand": _Cut.reshape,
    "Gather": _Cut.gather,
    "Reshape": _Cut.reshape,
    "Resize": _Cut.resize,
    "Slice": _Cut.slice,
    "Split": _Cut.split,
}
