"""Groups of channels that can only be removed together, found by following channels through the graph.

::

    channels = find_channels(model)                 # groups, and what is left alone with its reason
    cut(model, channels, {group.name: [3, 7]})      # (_channels_cut) units 3 and 7 of a group disappear everywhere

A *unit* is the smallest thing that can go: an output channel with all that is tied to it by a residual Add or a
depthwise convolution, an attention head, a neuron of a feed-forward block. Units of a *group* are interchangeable: each
has the same number of entries on the same axes of the same tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import sorted_nodes
from onnxcomp.macs import mac_counts
from onnxcomp.model import Model
from onnxcomp.runtime.census import node_names
from onnxcomp_passes._channels_flow import Flow, LostError
from onnxcomp_passes._channels_labels import varying_axes
from onnxcomp_passes._channels_rules import rule_for
from onnxcomp_passes._workspace import label

__all__ = ["AxisClasses", "Channels", "Group", "Slot", "find_channels", "macs_by_node", "node_key"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Name of the tensor: a constant, a weight decoded from one, or an activation.
        axis: Which of its axes, counted from the front.
        entries: The positions on that axis that belong to each unit, int64 of shape (units, entries a unit), sorted.
        node: The node that reads it (for an activation: that makes it), by `node_key`.
        index: At which input that node reads it (for an activation: at which output it makes it).
    """

    tensor: str
    axis: int
    entries: Array
    node: str
    index: int


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one.

    Attributes:
        name: The first node that makes these channels: its name, or its first output's. Unique among groups: a node
            whose channels fall into several groups has "#2", ... behind its name from the second on.
        kind: "channels" (of convolutions), "heads" (of attention) or "neurons" (of MatMul and Gemm).
        units: How many there are.
        producers: Weights whose output channels these are, at the operators that multiply with them.
        consumers: Weights whose input channels these are, at the operators that multiply with them.
        coupled: Other constants that lose entries along: biases, BatchNormalization, slopes, depthwise weights, stored
            codes and scales.
        carriers: Activations that hold these channels, in the order of the nodes that make them.
        macs: Multiply-accumulates that the first removed unit saves in one run (dynamic axes counted as 1).
        size_bytes: Bytes of constants that one unit takes.
    """

    name: str
    kind: str
    units: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    coupled: tuple[Slot, ...]
    carriers: tuple[Slot, ...]
    macs: int
    size_bytes: int


@dataclass(frozen=True)
class AxisClasses:
    """One axis of a tensor, as one node reads or makes it.

    Attributes:
        tensor: The tensor's name.
        axis: Counted from the front.
        classes: For each entry the class of channels that it belongs to, int64 of shape (size of the axis,).
        node: Who reads it (who makes it, for a carrier), by `node_key`.
        index: At which input (output).
        role: As in `_channels_flow.Read`, or "carrier".
    """

    tensor: str
    axis: int
    classes: Array
    node: str
    index: int
    role: str


@dataclass(frozen=True)
class Channels:
    """What can be cut in a model.

    It holds names only, so it is valid for forks of the model that it was found in, too.

    Attributes:
        groups: In the order of the nodes that make them.
        left: Nodes whose output channels cannot be cut -> why.
        axes: All axes that hold channels.
        members: Group name -> the class of each unit.
        ranks: Tensor that holds channels -> its number of axes, where that is known.
    """

    groups: tuple[Group, ...]
    left: Mapping[str, str]
    axes: tuple[AxisClasses, ...] = field(repr=False)
    members: Mapping[str, Array] = field(repr=False)
    ranks: Mapping[str, int] = field(repr=False)

    def group(self, name: str) -> Group:
        """The group with this name.

        Raises:
            KeyError: There is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def is_gone(self, removed: Mapping[str, Any]) -> Array:
        """Which classes go, bool of shape (classes,), for units by group name.

        Raises:
            KeyError: There is no such group.
        """
        count = 1 + max((int(axis.classes.max()) for axis in self.axes), default=0)
        gone = np.zeros(count, np.bool_)
        for name, units in removed.items():
            gone[self.members[name][np.asarray(units, np.int64)]] = True
        return gone

    def allowed(self, removed: Mapping[str, Any]) -> dict[str, Array]:
        """As many of the wanted units as can go without emptying an axis of any tensor.

        Args:
            removed: Group name -> units, those that should go first in front.

        Returns:
            The same, without the last wanted unit on each axis that would be empty, and without groups that lose
            nothing.
        """
        wanted = {name: np.asarray(units, np.int64) for name, units in removed.items()}
        gone = self.is_gone(wanted)
        order: dict[int, int] = {}  # class -> when it goes
        for name, units in wanted.items():
            order.update(zip(self.members[name][units].tolist(), range(len(units)), strict=True))
        for axis in self.axes:
            if gone[axis.classes].all():
                gone[max(np.unique(axis.classes).tolist(), key=order.__getitem__)] = False
        left = {name: units[gone[self.members[name][units]]] for name, units in wanted.items()}
        return {name: units for name, units in left.items() if units.size}


def node_key(node: gs.Node) -> str:
    """The name of a node's first output: unlike node names, unique and always there."""
    return next((str(tensor.name) for tensor in node.outputs if tensor.name), "")


def _nothing(node: gs.Node) -> bool:
    """No node is excluded."""
    return False


def find_channels(model: Model, excluded: Callable[[gs.Node], bool] = _nothing) -> Channels:
    """Follow channels through the main graph.

    Related: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", which groups layers of a traced module; here
    single entries of tensors are followed, so that parts of a Split, repeated ones of a Flatten and heads need no rules
    of their own. No large weight is read.

    Args:
        model: The model; it is not changed. Weights in `Constant` nodes are not seen: call `lift_constants` first.
        excluded: Nodes whose weights stay whole.

    Example:
        >>> from onnx import parser, numpy_helper
        >>> text = '''<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y) {
        ...     h = MatMul(x, A)
        ...     y = MatMul(h, B)
        ... }'''
        >>> proto = parser.parse_model(text)
        >>> weights = {"A": np.ones((2, 8), np.float32), "B": np.ones((8, 2), np.float32)}
        >>> proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
        >>> [(group.name, group.units, group.size_bytes) for group in find_channels(Model.load(proto)).groups]
        [('h', 8, 16)]
    """
    flow = Flow(model)
    order = sorted_nodes(model.graph)
    own = {function.name for function in model.functions if function.domain in ("", "ai.onnx")}
    flow.follow(lambda node: None if node.op in own else rule_for(node), order)
    for read in flow.reads:
        if excluded(read.node):
            flow.labels.pin(read.labels, f"{label(read.node)} is excluded")
    flow.labels.settle()
    return _Grouping(flow, order).channels()


class _Grouping:
    """From labels to groups."""

    def __init__(self, flow: Flow, order: list[gs.Node]) -> None:
        self._flow = flow
        self._nodes = {node_key(node): node for node in order}
        self._number = {key: number for number, key in enumerate(self._nodes)}
        classes = flow.labels.classes()
        self._bytes = {read.tensor.name: (read.tensor.shape, _item_bytes(read.tensor)) for read in flow.reads}
        self._constants = {read.tensor.name for read in flow.reads if isinstance(read.tensor, gs.Constant)}
        self._decoded = {str(tensor.name) for tensor, _ in flow.carriers() if flow.is_weight(tensor)}
        self._axes = [*self._reads(classes), *self._carriers(classes)]
        self._reasons = flow.labels.reasons()
        for axis in self._axes:
            if (axis.classes == axis.classes[0]).all():
                self._reasons.setdefault(int(axis.classes[0]), f"all of {axis.tensor} could only go at once")

    def _reads(self, classes: Array) -> Iterator[AxisClasses]:
        for read in self._flow.reads:
            where = _one_axis(classes[read.labels], read.axes)
            if where is not None:
                yield AxisClasses(read.tensor.name, *where, node_key(read.node), read.index, read.role)

    def _carriers(self, classes: Array) -> Iterator[AxisClasses]:
        found = []
        for tensor, block in self._flow.carriers():
            where = _one_axis(classes[block.labels], block.axes)
            if where is not None and tensor.inputs:
                maker = tensor.inputs[0]
                index = next(index for index, made in enumerate(maker.outputs) if made is tensor)
                found.append(AxisClasses(tensor.name, *where, node_key(maker), index, "carrier"))
        yield from sorted(found, key=lambda axis: self._number[axis.node])

    def channels(self) -> Channels:
        """The groups, and what is left alone."""
        cuttable = self._cuttable()
        names: dict[str, int] = {}
        groups, members = [], {}
        macs = macs_by_node(self._flow.model)
        for numbers, classes in self._signatures(cuttable):
            axes = [self._axes[number] for number in numbers]
            first = next(axis for axis in axes if axis.role == "out")
            name = label(self._nodes[first.node])
            names[name] = names.get(name, 0) + 1
            if names[name] > 1:
                name = f"{name} #{names[name]}"
            groups.append(self._group(name, axes, classes, macs))
            members[name] = classes
        ranks = {}
        for tensor, _ in self._flow.carriers():
            with contextlib.suppress(LostError):
                ranks[str(tensor.name)] = len(self._flow.dims(tensor))
        return Channels(tuple(groups), self._left(), tuple(self._axes), members, ranks)

    def _cuttable(self) -> Array:
        made = [axis.classes for axis in self._axes if axis.role == "out"]
        classes = np.unique(np.concatenate(made)) if made else np.zeros(0, np.int64)
        return classes[~np.isin(classes, np.fromiter(self._reasons, np.int64, len(self._reasons)))]

    def _signatures(self, cuttable: Array) -> list[tuple[list[int], Array]]:
        """Classes that are alike, with the numbers of the axes that they lie on; both as they come in the graph."""
        rows = [np.zeros((0, 3), np.int64)]
        places: dict[int, tuple[int, int]] = {}  # class -> its first place in a weight that makes it
        for number, axis in enumerate(self._axes):
            names, firsts, counts = np.unique(axis.classes, return_index=True, return_counts=True)
            rows.append(np.stack([names, np.full_like(names, number), counts], axis=1))
            if axis.role == "out":
                for name, first in zip(names.tolist(), firsts.tolist(), strict=True):
                    places.setdefault(name, (number, first))
        table = np.concatenate(rows)
        table = table[np.isin(table[:, 0], cuttable)]
        table = table[np.argsort(table[:, 0], kind="stable")]
        alike: dict[bytes, tuple[list[int], list[int]]] = {}
        edges = [0, *(np.flatnonzero(np.diff(table[:, 0])) + 1).tolist(), len(table)]
        for start, end in itertools.pairwise(edges if table.size else ()):
            part = table[start:end]
            entry = alike.setdefault(part[:, 1:].tobytes(), (part[:, 1].tolist(), []))
            entry[1].append(int(part[0, 0]))
        ordered = [(numbers, sorted(names, key=places.__getitem__)) for numbers, names in alike.values()]
        ordered.sort(key=lambda entry: places[entry[1][0]])
        return [(numbers, np.array(names, np.int64)) for numbers, names in ordered]

    def _group(self, name: str, axes: list[AxisClasses], classes: Array, macs: Mapping[str, int]) -> Group:
        slots: dict[str, list[Slot]] = defaultdict(list)
        played = {(axis.node, axis.index, axis.axis) for axis in axes if axis.role in {"out", "in"}}
        shares: dict[str, dict[str, float]] = defaultdict(dict)
        held: dict[str, dict[int, float]] = defaultdict(dict)
        for axis in axes:
            entries = _entries(axis.classes, classes)
            share = entries.shape[1] / axis.classes.size
            slot = Slot(axis.tensor, axis.axis, entries, axis.node, axis.index)
            if axis.role in {"out", "in", "group", "batch", "summed"}:
                shares[axis.node][axis.role] = max(share, shares[axis.node].get(axis.role, 0.0))
            if axis.tensor in self._constants:
                held[axis.tensor][axis.axis] = share
            if axis.role in {"out", "in"}:
                slots[axis.role].append(slot)
            elif axis.role == "carrier" and axis.tensor not in self._decoded:
                slots["carrier"].append(slot)
            elif axis.role == "coupled" and (axis.node, axis.index, axis.axis) not in played:
                slots["coupled"].append(slot)
        roles = {role for by_role in shares.values() for role in by_role}
        maker = self._nodes[next(axis.node for axis in axes if axis.role == "out")]
        kind = "channels" if maker.op in {"Conv", "ConvTranspose"} else "neurons"
        return Group(
            name=name,
            kind="heads" if "batch" in roles else kind,
            units=classes.size,
            producers=tuple(slots["out"]),
            consumers=tuple(slots["in"]),
            coupled=tuple(slots["coupled"]),
            carriers=tuple(slots["carrier"]),
            macs=round(sum(macs.get(node, 0) * _both(by_role.values()) for node, by_role in shares.items())),
            size_bytes=round(
                sum(math.prod(self._bytes[t][0]) * self._bytes[t][1] * _both(by.values()) for t, by in held.items())
            ),
        )

    def _left(self) -> dict[str, str]:
        left = dict(self._flow.unseen)
        for axis in self._axes:
            if axis.role != "out":
                continue
            kept = [name for name in axis.classes.tolist() if name in self._reasons]
            if kept:
                where = label(self._nodes[axis.node])
                count = "" if len(kept) == axis.classes.size else f"{len(kept)} of {axis.classes.size} channels stay: "
                left.setdefault(where, f"{count}{self._reasons[kept[0]]}")
        return left


def _both(shares: Iterable[float]) -> float:
    """The share that goes when these shares go on different axes."""
    return 1 - math.prod(1 - share for share in shares)


def _one_axis(classes: Array, axes: tuple[int | None, ...]) -> tuple[int, Array] | None:
    """The axis that a cut goes along, and its classes; None where the tensor is not cut."""
    varying = varying_axes(classes) or [0]
    axis = axes[varying[0]]
    if axis is None:
        return None
    return axis, np.moveaxis(classes, varying[0], 0).reshape(classes.shape[varying[0]], -1)[:, 0]


def _entries(found: Array, classes: Array) -> Array:
    """Where each class is on an axis: int64 of shape (classes, places a class)."""
    sorter = np.argsort(classes)
    place = np.searchsorted(classes, found, sorter=sorter).clip(max=classes.size - 1)
    unit = sorter[place]
    mine = np.flatnonzero(classes[unit] == found)
    return np.asarray(mine[np.argsort(unit[mine], kind="stable")].reshape(classes.size, -1))


def _item_bytes(tensor: gs.Tensor) -> int:
    return np.dtype(tensor.dtype).itemsize if isinstance(tensor, gs.Constant) else 0


def macs_by_node(model: Model) -> dict[str, int]:
    """Multiply-accumulates of the main graph's nodes, by `node_key`."""
    shapes = {
        tensor.name: [size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape]
        for tensor in model.graph.inputs
        if tensor.shape is not None
    }
    counts = mac_counts(model, shapes)
    names = node_names(model.proto().graph)
    return {node_key(node): counts.get(name, 0) for node, name in zip(model.graph.nodes, names, strict=False)}
