"""Units of channels that can go at no loss: nothing reads them, or all that is read of them is a constant.

::

    before   h = Relu(Conv(x, W, b))    y = Conv(h, V, c)       W[3] = 0: channel 3 of h is Relu(b[3]), everywhere
    after    the same without channel 3, and c + V[:, 3].sum() * Relu(b[3]) for c
"""

from __future__ import annotations

import math
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
from onnxcomp_passes._workspace import is_dense, is_standard, label

__all__ = ["Removed", "dead_units", "remove_dead", "shift_bias", "takes_shift"]

Array = np.ndarray[Any, Any]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SELECTING = frozenset({"Gather", "Shape", "Size", "Slice"})
"""Operators that may read a tensor and none of some units in it: what they take is carried on, or cannot be cut."""


@dataclass(frozen=True)
class _Reading:
    """How a layer reads the units of a group.

    Attributes:
        node: The layer.
        entries: Which channels of its input belong to each unit, shape (units, entries a unit).
        constant: What each channel of its input is, shape (channels,), NaN where that is not constant.
        idle: Whether its weights for each channel are all zero, shape (channels,).
        finite: Whether they are all finite, shape (channels,).
    """

    node: gs.Node
    entries: Array
    constant: Array
    idle: Array
    finite: Array

    def free(self) -> Array:
        """Whether each unit can go from here, shape (units,); what it adds moves into the bias if that can be."""
        known = np.isfinite(self.constant) if takes_shift(self.node) else self.constant == 0
        takes = self.idle | (known & self.finite)
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


def remove_dead(
    model: Model,
    excludes: Callable[[gs.Node], bool] | None = None,
    *,
    wanted: Callable[[Group], bool] | None = None,
    multiple: int = 1,
    spool: Spool | None = None,
) -> Removed:
    """Take out (in place) all that adds nothing: dead units, and what is dead once they are gone.

    Constants in `Constant` nodes are not seen: call `lift_constants` first.

    Args:
        model: The model.
        excludes: Says which nodes the user wants left alone; None: none.
        wanted: Which groups may lose units; None: all.
        multiple: What the channels and neurons that stay are a multiple of; dead ones stay to make up for it.
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
        channels = find_channels(model, excludes) if excludes else find_channels(model)
        dead = dead_units(model, channels, constants)
        if wanted is not None:
            dead = {name: units for name, units in dead.items() if wanted(channels.group(name))}
        dead = {name: units[: _most(channels.group(name), len(units), multiple)] for name, units in dead.items()}
        dead = channels.allowed({name: units for name, units in dead.items() if units.size})
        if not dead:
            return removed
        shifts = _shifts(model, channels, dead, constants)
        if [node for node, _ in shifts if _give_bias(model, node)]:
            continue  # the groups have to know these biases
        for node, shift in shifts:
            _add(node, shift)
            removed.shifted[label(node)] = None
        cut(model, channels, dead, spool)
        for name, units in dead.items():
            removed.of.setdefault(name, channels.group(name).units)
            removed.units[name] = removed.units.get(name, 0) + len(units)


def _most(group: Group, dead: int, multiple: int) -> int:
    """How many of the dead units may go, so that a multiple stays."""
    if group.kind == "heads":
        return dead
    stay = -(-(group.units - dead) // multiple) * multiple
    return max(0, group.units - stay)


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


def _shifts(
    model: Model, channels: Channels, removed: Mapping[str, Array], constants: ConstantChannels
) -> list[tuple[gs.Node, Array]]:
    """What the layers that read dead units lose with them, for each of their output channels."""
    nodes = _nodes(model)
    shifts: dict[int, tuple[gs.Node, Array]] = {}
    for name, units in removed.items():
        for reading in _readings(channels.group(name), nodes, constants):
            assert reading is not None
            weight = constants.weight(reading.node, 1)
            assert weight is not None
            shift = reading.shift(units, weight) if reading.node.op != "ConvTranspose" else np.zeros(1)
            if shift.any():
                before = shifts[id(reading.node)][1] if id(reading.node) in shifts else 0.0
                shifts[id(reading.node)] = reading.node, before + shift
    return list(shifts.values())


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
            if reader.op not in SELECTING and not outputs & layers and not outputs & carriers:
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
        parts = by_input_channel(node, weight)
        rows = np.moveaxis(parts, 2, 1).reshape(parts.shape[0] * parts.shape[2], -1)
    elif node.op == "Gemm" and node.attrs.get("transB"):
        rows = weight.T
    else:
        rows = weight.reshape(weight.shape[0], -1)
    if node.op in {"Conv", "ConvTranspose"}:
        constant = constants.channels_read(node, rows.shape[0])
    else:
        constant = constants.along(node.inputs[0], -1, rows.shape[0])
    return _Reading(node, entries, constant, ~np.any(rows != 0, axis=1), np.asarray(np.isfinite(rows).all(axis=1)))


# --- biases -----------------------------------------------------------------------------------------------------------


def takes_shift(node: gs.Node) -> bool:
    """Whether a constant can be added to each output channel of a layer."""
    if node.op == "MatMul":
        return True
    if node.op == "ConvTranspose" or (node.op == "Gemm" and node.attrs.get("beta", 1.0) == 0):
        return False
    return _has_no(node, 2) or _is_bias(node.inputs[2], _output_channels(node))


def shift_bias(model: Model, node: gs.Node, shift: Array) -> None:
    """Add a constant to each output channel of a layer, which `takes_shift`; it gets a bias where it has none."""
    _give_bias(model, node)
    _add(node, shift)


def _is_bias(tensor: gs.Tensor, channels: int) -> bool:
    """Whether a constant has one value for all channels, or one for each."""
    return is_dense(tensor) and np.dtype(tensor.dtype).kind == "f" and math.prod(tensor.shape) in (1, channels)


def _has_no(node: gs.Node, index: int) -> bool:
    return len(node.inputs) <= index or not node.inputs[index].name


def _bias_place(node: gs.Node) -> tuple[gs.Node, int]:
    """The node that adds the bias of a layer, and at which input: the layer itself, or the Add behind a MatMul."""
    if node.op != "MatMul":
        return node, 2
    product = node.outputs[0]
    reader = product.outputs[0] if len(product.outputs) == 1 else None
    if reader is not None and is_standard(reader, "Add"):
        index = 1 if reader.inputs[0] is product else 0
        if _is_bias(reader.inputs[index], _output_channels(node)) and len(reader.inputs[index].shape) <= 1:
            return reader, index
    return node, 2


def _give_bias(model: Model, node: gs.Node) -> bool:
    """Give a layer a bias of its own, with a value for each output channel; False: it has one."""
    channels = _output_channels(node)
    place, index = _bias_place(node)
    old = None if _has_no(place, index) else place.inputs[index]
    if old is not None and len(old.outputs) == 1 and tuple(old.shape) == (channels,):
        return False
    if old is not None:
        value = np.broadcast_to(value_of(old).reshape(-1), (channels,))
        name = old.name
    else:
        value = np.zeros(channels, _float_type(node))
        name = f"{label(node)}_bias"
    fresh = gs.Constant(model.unique_name(name), np.ascontiguousarray(value))
    if node.op == "MatMul" and place is node:
        _insert_add(model, node, fresh)
    elif len(place.inputs) > index:
        place.inputs[index] = fresh
    else:
        place.inputs.append(fresh)
    return True


def _output_channels(node: gs.Node) -> int:
    shape = node.inputs[1].shape
    rows = node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB"))
    return int(shape[0] if rows else shape[1])


def _insert_add(model: Model, node: gs.Node, bias: gs.Constant) -> None:
    """Put an Add behind a MatMul."""
    product = node.outputs[0]
    inner = Variable(model.unique_name(f"{product.name}_product"), dtype=product.dtype, shape=product.shape)
    node.outputs[0] = inner
    added = Node("Add", model.unique_name(f"{label(node)}_bias"), inputs=[inner, bias], outputs=[product])
    model.graph.nodes.insert(next(i for i, each in enumerate(model.graph.nodes) if each is node) + 1, added)


def _float_type(node: gs.Node) -> np.dtype[Any]:
    dtypes = [tensor.dtype for tensor in node.inputs[:2] if tensor.dtype is not None]
    return next((np.dtype(dtype) for dtype in dtypes if np.dtype(dtype).kind == "f"), np.dtype(np.float32))


def _add(node: gs.Node, shift: Array) -> None:
    """Add a constant to the bias that a layer has for each output channel."""
    place, index = _bias_place(node)
    bias = place.inputs[index]
    beta = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    bias.values = np.ascontiguousarray(value_of(bias) + shift / beta, dtype=np.dtype(bias.dtype))
