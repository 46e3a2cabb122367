"""Units of channels that can go at no loss: nothing reads them, or all that is read of them is a constant.

::

    before   h = Relu(Conv(x, W, b))    y = Conv(h, V, c)       W[3] = 0: channel 3 of h is Relu(b[3]), everywhere
    after    the same without channel 3, and c + V[:, 3].sum() * Relu(b[3]) for c
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.weights import Spool
from onnxcomp_passes._channels_cut import cut
from onnxcomp_passes._channels_groups import Channels, Group, find_channels
from onnxcomp_passes._constant_channels import ConstantChannels, by_input_channel
from onnxcomp_passes._residual import empty_blocks, remove_blocks
from onnxcomp_passes._workspace import is_dense, is_standard

__all__ = ["Removed", "dead_units", "move_constants", "remove_dead", "shift_bias", "takes_shift"]

Array = np.ndarray[Any, Any]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SHAPE_READERS = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class _Reading:
    """How a layer reads the units of a group.

    Attributes:
        node: The layer.
        entries: Which channels of its input belong to each unit, shape (units, entries a unit).
        constant: What each channel of its input is, shape (channels,), NaN where that is not constant.
        idle: Whether its weights for each channel are all zero, shape (channels,).
    """

    node: gs.Node
    entries: Array
    constant: Array
    idle: Array

    def free(self) -> Array:
        """Whether each unit can go from here, shape (units,); what it adds moves into the bias if that can be."""
        takes = self.idle | (self.constant == 0)
        if takes_shift(self.node):
            takes |= np.isfinite(self.constant)
        return np.asarray(takes[self.entries].all(axis=1))

    def shift(self, units: Array, weight: Array) -> Array:
        """What the units add to each output channel, float64."""
        lost = np.zeros(self.constant.size)
        channels = np.unique(self.entries[units])
        lost[channels] = np.where(self.idle[channels], 0.0, self.constant[channels])
        if self.node.op == "Conv":
            parts = by_input_channel(self.node, weight).sum(axis=3, dtype=np.float64)
            return np.asarray(np.einsum("goi,gi->go", parts, lost.reshape(parts.shape[0], -1)).reshape(-1))
        matrix = weight.T if self.node.attrs.get("transB") else weight
        alpha = self.node.attrs.get("alpha", 1.0) if self.node.op == "Gemm" else 1.0
        return np.asarray(alpha * (lost @ matrix.astype(np.float64)))


@dataclass
class Removed:
    """What was taken out of a model at no loss.

    Attributes:
        units: Group -> how many of its units.
        of: Group -> how many units it had.
        shifted: Layers that constants moved into, in the order in which they did.
        blocks: Sums one of whose sides was always zero.
    """

    units: dict[str, int] = field(default_factory=dict)
    of: dict[str, int] = field(default_factory=dict)
    shifted: dict[str, None] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)


def remove_dead(model: Model, *, wanted: Callable[[Group], bool] | None = None, spool: Spool | None = None) -> Removed:
    """Take out (in place) all that adds nothing: dead units, and what is dead once they are gone.

    Constants in `Constant` nodes are not seen: call `lift_constants` first.

    Args:
        model: The model.
        wanted: Which groups may lose units; None: all.
        spool: Where the bytes of large weights go.
    """
    removed = Removed()
    while True:
        constants = ConstantChannels(model)
        blocks = empty_blocks(model, constants)
        if blocks:
            remove_blocks(model, blocks)
            removed.blocks += [block.name for block in blocks]
            continue
        channels = find_channels(model)
        dead = dead_units(model, channels, constants)
        if wanted is not None:
            dead = {name: units for name, units in dead.items() if wanted(channels.group(name))}
        dead = channels.allowed(dead)
        if not dead:
            return removed
        removed.shifted.update(dict.fromkeys(move_constants(model, channels, dead, constants)))
        cut(model, channels, dead, spool)
        for name, units in dead.items():
            removed.of.setdefault(name, channels.group(name).units)
            removed.units[name] = removed.units.get(name, 0) + len(units)


def dead_units(model: Model, channels: Channels, constants: ConstantChannels) -> dict[str, Array]:
    """The units that can go and leave the outputs as they are, to float rounding.

    Each layer that reads a unit has to read zero, have zero weights for it, or read a constant that can move into its
    bias: no constant does where a border of zeros lies beside it.

    Args:
        model: The model; it is not changed.
        channels: Its groups.
        constants: Its constant channels.

    Returns:
        Group name -> units, int64; groups without any are left out.
    """
    nodes, carried = _nodes(model), _tensors(model)
    found = {}
    for group in channels.groups:
        if not _is_followed(group, carried):
            continue
        dead = np.ones(group.units, bool)
        for reading in _readings(group, nodes, constants):
            dead &= np.zeros(group.units, bool) if reading is None else reading.free()
        if dead.any():
            found[group.name] = np.flatnonzero(dead)
    return found


def move_constants(
    model: Model, channels: Channels, removed: Mapping[str, Array], constants: ConstantChannels
) -> list[str]:
    """Add to biases what units add, before they are cut (in place).

    Args:
        model: The model.
        channels: Its groups.
        removed: Group name -> units that are about to go, out of those of `dead_units`.
        constants: Its constant channels.

    Returns:
        The names of the layers whose bias has changed.
    """
    nodes = _nodes(model)
    shifts: dict[int, tuple[gs.Node, Array]] = {}
    for name, units in removed.items():
        for reading in _readings(channels.group(name), nodes, constants):
            assert reading is not None
            weight = constants.weight(reading.node, 1)
            assert weight is not None
            shift = reading.shift(units, weight) if reading.node.op != "ConvTranspose" else np.zeros(1)
            if shift.any():
                before = shifts.get(id(reading.node), (None, 0.0))[1]
                shifts[id(reading.node)] = reading.node, before + shift
    for node, shift in shifts.values():
        shift_bias(model, node, shift)
    return [node.name or node.outputs[0].name for node, _ in shifts.values()]


def _nodes(model: Model) -> dict[str, gs.Node]:
    return {node.outputs[0].name: node for node in model.graph.nodes if node.outputs}


def _tensors(model: Model) -> dict[str, gs.Tensor]:
    inner = (tensor for node in model.graph.nodes for tensor in node.outputs)
    return {tensor.name: tensor for tensor in (*model.graph.inputs, *inner)}


def _is_followed(group: Group, tensors: Mapping[str, gs.Tensor]) -> bool:
    """Whether all that reads the units is a layer whose weights are known, or carries them on."""
    carriers = {slot.tensor for slot in group.carriers}
    layers = {slot.node for slot in group.consumers}
    for name in carriers & tensors.keys():
        for reader in tensors[name].outputs:
            outputs = {output.name for output in reader.outputs}
            if reader.op not in SHAPE_READERS and not outputs & layers and not outputs & carriers:
                return False
    return bool(group.consumers)


def _readings(group: Group, nodes: Mapping[str, gs.Node], constants: ConstantChannels) -> Iterator[_Reading | None]:
    """How each layer reads the units; None for one that is not understood."""
    carriers = {(slot.tensor, slot.axis): slot.entries for slot in group.carriers}
    for consumer in group.consumers:
        node = nodes.get(consumer.node)
        if node is None or not is_standard(node, *LAYERS) or consumer.index != 1 or node.attrs.get("transA"):
            yield None
            continue
        weight = constants.weight(node, 1)
        rank = len(constants.dims(node.inputs[0]) or ())
        axis = 1 if node.op in ("Conv", "ConvTranspose") else rank - 1
        entries = carriers.get((node.inputs[0].name, axis))
        if weight is None or entries is None or (node.op == "MatMul" and weight.ndim != 2):
            yield None
            continue
        yield _reading(node, weight, entries, constants)


def _reading(node: gs.Node, weight: Array, entries: Array, constants: ConstantChannels) -> _Reading:
    if node.op == "Conv":
        idle = ~np.any(by_input_channel(node, weight) != 0, axis=(1, 3)).reshape(-1)
        return _Reading(node, entries, constants.channels_read(node, idle.size), idle)
    if node.op == "ConvTranspose":
        idle = ~np.any(weight != 0, axis=tuple(range(1, weight.ndim)))
        return _Reading(node, entries, constants.channels_read(node, idle.size), idle)
    idle = ~np.any(weight != 0, axis=0 if node.attrs.get("transB") else 1)
    return _Reading(node, entries, constants.along(node.inputs[0], -1, idle.size), idle)


# --- biases -----------------------------------------------------------------------------------------------------------


def takes_shift(node: gs.Node) -> bool:
    """Whether a constant can be added to what a layer adds up."""
    if node.op == "MatMul":
        return True
    if node.op == "Gemm" and node.attrs.get("beta", 1.0) == 0:
        return False
    return node.op != "ConvTranspose" and (_has_no(node, 2) or is_dense(node.inputs[2]))


def _has_no(node: gs.Node, index: int) -> bool:
    return len(node.inputs) <= index or not node.inputs[index].name


def shift_bias(model: Model, node: gs.Node, shift: Array) -> None:
    """Add a constant to each output channel of a layer."""
    if node.op == "MatMul":
        _shift_product(model, node, shift)
        return
    beta = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    old = None if _has_no(node, 2) else node.inputs[2]
    fresh = _sum(model, node, old, shift / beta)
    if old is None:
        del node.inputs[2:]
        node.inputs.append(fresh)
    else:
        node.inputs[2] = fresh


def _shift_product(model: Model, node: gs.Node, shift: Array) -> None:
    """The constant goes into the Add behind a MatMul, or into a new one."""
    product = node.outputs[0]
    reader = product.outputs[0] if len(product.outputs) == 1 else None
    is_output = any(tensor is product for tensor in model.graph.outputs)
    if reader is not None and not is_output and is_standard(reader, "Add"):
        index = 1 if reader.inputs[0] is product else 0
        other = reader.inputs[index]
        if is_dense(other) and len(other.shape) <= 1 and np.dtype(other.dtype).kind == "f":
            reader.inputs[index] = _sum(model, node, other, shift)
            return
    inner = Variable(model.unique_name(f"{product.name}_product"), dtype=product.dtype, shape=product.shape)
    node.outputs[0] = inner
    bias = _sum(model, node, None, shift)
    added = Node("Add", model.unique_name(f"{node.name or product.name}_bias"), inputs=[inner, bias], outputs=[product])
    model.graph.nodes.insert(next(i for i, each in enumerate(model.graph.nodes) if each is node) + 1, added)


def _sum(model: Model, node: gs.Node, old: gs.Constant | None, shift: Array) -> gs.Constant:
    """A constant and the shift, in the constant's type: the constant itself unless others read it, too."""
    if old is not None:
        value = np.ascontiguousarray(value_of(old).astype(np.float64) + shift, np.dtype(old.dtype))
        if len(old.outputs) == 1:
            old.values = value
            return old
        return gs.Constant(model.unique_name(old.name), value)
    dtype = np.dtype(node.inputs[1].dtype or np.float32)
    name = model.unique_name(f"{node.name or node.outputs[0].name}_bias")
    return gs.Constant(name, np.ascontiguousarray(shift, dtype if dtype.kind == "f" else np.float32))
