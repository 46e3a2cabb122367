"""What is known of the channels of each tensor while they are followed through a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import subgraphs, walk
from onnxcomp.model import Model, value_of
from onnxcomp.packed import packed_weight
from onnxcomp_passes._channels_labels import Labels, varying_axes
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._workspace import is_dense, label

__all__ = ["Block", "Flow", "LostError", "Read"]

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]


class LostError(Exception):
    """Channels cannot be followed through a node; the message says why."""


@dataclass(frozen=True, eq=False)
class Block:
    """Labels of one axis of a tensor, or of each combination of places on several axes.

    Attributes:
        axes: The axes, ascending.
        labels: int64; its shape is the sizes of the axes.
    """

    axes: tuple[int, ...]
    labels: Array

    def moved(self, new_axis: Callable[[int], int]) -> Block:
        """The same labels on other axes."""
        axes = [new_axis(axis) for axis in self.axes]
        order = np.argsort(axes)
        return Block(tuple(sorted(axes)), self.labels.transpose(order))


@dataclass(frozen=True, eq=False)
class Read:
    """A node reads channels from a weight or from another constant.

    Attributes:
        tensor: What it reads.
        axes: The axis for each axis of the labels; None where the tensor has one entry for all places.
        labels: Labels of the entries.
        node: Who reads.
        index: At which input.
        role: "out" or "in" (output and input channels of a weight), "group" (both, in a depthwise convolution), "batch"
            or "summed" (an axis of a product of activations), "coupled" (anything that is cut along).
    """

    tensor: gs.Tensor
    axes: tuple[int | None, ...]
    labels: Array
    node: gs.Node
    index: int
    role: str


class Flow:
    """The labels of all tensors of a model's main graph, as far as its nodes were visited.

    Attributes:
        model: The model.
        opset: Of the default domain.
        labels: What is tied and what is pinned.
        reads: What nodes read, in the order of the nodes.
        unseen: Node -> why nothing is known of the channels that its weight makes.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.opset = model.opset
        self.labels = Labels()
        self.reads: list[Read] = []
        self.unseen: dict[str, str] = {}
        self._known = infer_known(model)
        self._blocks: dict[int, tuple[gs.Tensor, list[Block]]] = {}
        self._rooted: set[int] = set()

    # --- looking ------------------------------------------------------------------------------------------------------

    def dims(self, tensor: gs.Tensor) -> Dims:
        """The proven shape of a tensor; unknown dimensions have names.

        Raises:
            LostError: Not even its rank is known.
        """
        if isinstance(tensor, gs.Constant):
            return tuple(int(size) for size in tensor.shape)
        known = self._known.get(id(tensor))
        if known is None or known[1].dims is None:
            message = f"the rank of {tensor.name} is not known"
            raise LostError(message)
        return known[1].dims

    def blocks(self, tensor: gs.Tensor) -> list[Block]:
        """The labels of a tensor; empty where nothing is followed."""
        return self._blocks[id(tensor)][1] if id(tensor) in self._blocks else []

    def axis(self, tensor: gs.Tensor, axis: int) -> Array | None:
        """The labels of one axis, which from now on is cut as a whole or not at all; None where there are none."""
        for block in self.blocks(tensor):
            if axis in block.axes:
                place = block.axes.index(axis)
                rows = np.moveaxis(block.labels, place, 0).reshape(block.labels.shape[place], -1)
                self.labels.unify(rows[:, :1], rows)
                return np.asarray(rows[:, 0])
        return None

    def is_weight(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a constant, or computed from constants alone."""
        return isinstance(tensor, gs.Constant) or id(tensor) in self._rooted

    def carriers(self) -> Iterable[tuple[gs.Tensor, Block]]:
        """The labels of all activations."""
        for tensor, blocks in self._blocks.values():
            if not isinstance(tensor, gs.Constant):
                for block in blocks:
                    yield tensor, block

    @staticmethod
    def ints(node: gs.Node, name: str, index: int) -> list[int] | None:
        """Whole numbers from an attribute or from a constant input; None where they are left out.

        Raises:
            LostError: They are computed.
        """
        if name in node.attrs:
            value = node.attrs[name]
            if isinstance(value, list | int):
                return [value] if isinstance(value, int) else value
        if index < 0 or index >= len(node.inputs) or node.inputs[index].is_empty():
            return None
        tensor = node.inputs[index]
        if not isinstance(tensor, gs.Constant):
            message = f"the {name} of {label(node)} are computed in the graph"
            raise LostError(message)
        return [int(value) for value in value_of(tensor).reshape(-1)]

    # --- labels of constants ------------------------------------------------------------------------------------------

    def data(self, node: gs.Node, index: int = 0) -> list[Block]:
        """The labels of an input; a constant gets some on each axis, the same for all that read it as a weight."""
        tensor = node.inputs[index]
        if isinstance(tensor, gs.Constant) and is_dense(tensor):
            if id(tensor) not in self._blocks:
                sizes = [int(size) for size in tensor.shape]
                blocks = [Block((axis,), self.labels.fresh(size)) for axis, size in enumerate(sizes) if size > 1]
                self._blocks[id(tensor)] = tensor, blocks
            for block in self.blocks(tensor):
                self.reads.append(Read(tensor, block.axes, block.labels, node, index, "coupled"))
        return self.blocks(tensor)

    def play(self, node: gs.Node, index: int, axis: int, role: str) -> Array | None:
        """Note which part an axis of a weight plays; returns its labels."""
        tensor = node.inputs[index]
        labels = self.axis(tensor, axis)
        if labels is not None:
            self.reads.append(Read(tensor, (axis,), labels, node, index, role))
        elif role == "out" and not (isinstance(tensor, gs.Constant) and tensor.shape[axis] == 1):
            packed = packed_weight(tensor) is not None
            why = (
                "is packed: unpack the model first (onnxcomp optimize --unpack)" if packed else "its weight is computed"
            )
            self.unseen.setdefault(label(node), why)
        return labels

    def vector(self, node: gs.Node, index: int, labels: Array | None) -> None:
        """A bias or the like has one entry for each of these channels.

        Raises:
            LostError: It is something else.
        """
        if index >= len(node.inputs) or node.inputs[index].is_empty() or labels is None:
            return
        tensor = node.inputs[index]
        if isinstance(tensor, gs.Constant):
            if not is_dense(tensor) or list(tensor.shape) != [labels.size]:
                message = f"{tensor.name} is not a vector with an entry for each channel"
                raise LostError(message)
            self.reads.append(Read(tensor, (0,), labels, node, index, "coupled"))
        else:
            self.tie(labels, self.axis(tensor, len(self.dims(tensor)) - 1), f"{label(node)} computes {tensor.name}")

    def scale_along(self, node: gs.Node, index: int, blocks: Iterable[Block], rank: int) -> None:
        """A constant is broadcast over a tensor with these labels.

        Raises:
            LostError: It is stored sparse.
        """
        tensor = node.inputs[index]
        shift = rank - len(tensor.shape)
        for block in blocks:
            axes = tuple(a - shift if a >= shift and tensor.shape[a - shift] > 1 else None for a in block.axes)
            if any(axis is not None for axis in axes):
                if not is_dense(tensor):
                    message = f"{tensor.name} is stored sparse"
                    raise LostError(message)
                self.reads.append(Read(tensor, axes, block.labels, node, index, "coupled"))

    # --- ties ---------------------------------------------------------------------------------------------------------

    def tie(self, one: Array | None, other: Array | None, reason: str) -> None:
        """Two axes lose the same entries; where one cannot, the other must not."""
        if one is not None and other is not None and one.size == other.size:
            self.labels.unify(one, other)
            return
        for labels in (one, other):
            if labels is not None:
                self.labels.pin(labels, reason)

    def without(self, blocks: Iterable[Block], axes: Iterable[int], reason: str) -> list[Block]:
        """The blocks without some axes, on which nothing may be cut any more."""
        gone, left = set(axes), []
        for block in blocks:
            labels = block.labels
            kept = tuple(axis for axis in block.axes if axis not in gone)
            if not kept:
                self.labels.pin(labels, reason)
                continue
            for place in reversed(range(len(block.axes))):
                if block.axes[place] in gone:
                    labels = self.labels.unify_along(labels, place)
            left.append(Block(kept, labels))
        return left

    def join(self, operands: Sequence[tuple[Sequence[int | str], list[Block]]], reason: str) -> list[Block]:
        """The labels of operands that are broadcast to one shape.

        Args:
            operands: For each its dimensions, padded to one rank by 1, and its blocks, moved along.
            reason: Said of what an operand without labels holds back.
        """
        joined: list[Block] = []
        for _, blocks in operands:
            for block in blocks:
                for other in [other for other in joined if set(other.axes) & set(block.axes)]:
                    joined.remove(other)
                    block = self._merged(other, block)
                joined.append(block)
        for dims, blocks in operands:
            own = {axis for block in blocks for axis in block.axes}
            fixed = {axis for axis, size in enumerate(dims) if size != 1 and axis not in own}
            joined = self.without(joined, fixed, reason)
        return joined

    def _merged(self, one: Block, other: Block) -> Block:
        axes = tuple(sorted({*one.axes, *other.axes}))
        wide = []
        for block in (one, other):
            missing = tuple(place for place, axis in enumerate(axes) if axis not in block.axes)
            wide.append(np.expand_dims(block.labels, missing))
        self.labels.unify(wide[0], wide[1])
        return Block(axes, np.array(np.broadcast_arrays(*wide)[0]))

    # --- results ------------------------------------------------------------------------------------------------------

    def put(self, tensor: gs.Tensor, blocks: Iterable[Block]) -> None:
        """Say what is known of an output."""
        kept = []
        for block in blocks:
            places = varying_axes(block.labels)
            if not places:  # a single one, without which the axis would be empty
                self.labels.pin(block.labels, f"one of them alone makes {tensor.name}")
                continue
            index = tuple(slice(None) if place in places else 0 for place in range(block.labels.ndim))
            block = Block(tuple(block.axes[place] for place in places), block.labels[index])
            if len(places) > 1:
                self.labels.grid(block.labels)
            kept.append(block)
        self._blocks[id(tensor)] = tensor, kept

    def follow(self, rules: Callable[[gs.Node], Callable[[Flow, gs.Node], None] | None], order: list[gs.Node]) -> None:
        """Visit all nodes.

        Args:
            rules: The rule for a node, or None.
            order: The nodes in topological order.
        """
        for node in order:
            inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
            if inputs and all(self.is_weight(tensor) for tensor in inputs):
                self._rooted.update(id(tensor) for tensor in node.outputs)
            rule = rules(node)
            try:
                if rule is None:
                    message = f"{label(node)} ({node.op}) reads it, through which channels are not followed"
                    raise LostError(message)
                rule(self, node)
            except LostError as error:
                self._lose(node, str(error))
        for tensor in self.model.graph.outputs:
            self._pin(tensor, "is an output of the model")
        self._pin_unknown_readers()

    def _lose(self, node: gs.Node, reason: str) -> None:
        captured = (t for inner in subgraphs(node) for g in walk(inner) for n in g.nodes for t in n.inputs)
        returned = (t for inner in subgraphs(node) for g in walk(inner) for t in g.outputs)
        for tensor in (*node.inputs, *captured, *returned):
            self._pin(tensor, reason)
        for tensor in node.outputs:
            self._pin(tensor, reason)
            self._blocks.pop(id(tensor), None)

    def _pin(self, tensor: gs.Tensor, reason: str) -> None:
        for block in self.blocks(tensor):
            self.labels.pin(block.labels, reason)

    def _pin_unknown_readers(self) -> None:
        """A weight that something else reads too stays whole."""
        followed = {(id(read.tensor), id(read.node), read.index) for read in self.reads}
        for tensor, blocks in list(self._blocks.values()):
            if not blocks or not isinstance(tensor, gs.Constant):
                continue
            for reader in tensor.outputs:
                for index, read in enumerate(reader.inputs):
                    if read is tensor and (id(tensor), id(reader), index) not in followed:
                        self._pin(tensor, f"{label(reader)} reads its weight too")
