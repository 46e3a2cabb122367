"""Where constant channels go in operators that move or gather values: see `_constant_channels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp_passes._workspace import is_dense

if TYPE_CHECKING:
    from onnxcomp_passes._constant_channels import ConstantChannels

__all__ = ["LARGEST", "MOVES", "adds_border"]

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]

LARGEST = 1 << 20
"""Values with more elements are not followed: no row of channels is as long."""

REDUCTIONS: dict[str, Callable[..., Array]] = {"ReduceMean": np.mean, "ReduceMax": np.max, "ReduceMin": np.min}
"""Those of a constant are the constant, however long the axis is."""


def adds_border(node: gs.Node) -> bool:
    """Whether a Conv or a pool may read zeros beside its input: then a constant image is none for it."""
    padding = node.attrs.get("auto_pad", "NOTSET")
    if padding in {"SAME_UPPER", "SAME_LOWER"}:
        return True
    return padding == "NOTSET" and any(int(pad) for pad in node.attrs.get("pads", ()))


def _axes(known: ConstantChannels, node: gs.Node, index: int, rank: int) -> list[int] | None:
    found = known.ints(node, "axes", index)
    return None if found is None else [axis % rank for axis in found]


def _same(known: ConstantChannels, node: gs.Node) -> Array | None:
    return known.of(node.inputs[0])


def _pool(known: ConstantChannels, node: gs.Node) -> Array | None:
    x = known.of(node.inputs[0])
    if x is None or any(size > 1 for size in x.shape[2:]):
        return None
    counts = node.op == "AveragePool" and node.attrs.get("count_include_pad", 0) and adds_border(node)
    return np.where(x == 0, x, np.nan) if counts else x


def _resize(known: ConstantChannels, node: gs.Node) -> Array | None:
    x, before, after = known.of(node.inputs[0]), known.dims(node.inputs[0]), known.dims(node.outputs[0])
    plain = node.attrs.get("coordinate_transformation_mode") != "tf_crop_and_resize"
    if x is None or before is None or after is None or not plain:
        return None
    return x if all(size == 1 or before[i] == after[i] for i, size in enumerate(x.shape)) else None


def _reduced(known: ConstantChannels, node: gs.Node) -> Array | None:
    x = known.of(node.inputs[0])
    if x is None:
        return None
    axes = _axes(known, node, 1, x.ndim)
    if axes is None and len(node.inputs) > 1 and node.inputs[1].name:
        return None
    if not axes and node.attrs.get("noop_with_empty_axes"):
        return x
    along = tuple(range(x.ndim)) if not axes else tuple(axes)
    return np.asarray(REDUCTIONS[node.op](x, axis=along, keepdims=bool(node.attrs.get("keepdims", 1))))


def _transpose(known: ConstantChannels, node: gs.Node) -> Array | None:
    x = known.of(node.inputs[0])
    return None if x is None else np.transpose(x, node.attrs.get("perm", range(x.ndim)[::-1]))


def _reshaped(known: ConstantChannels, node: gs.Node) -> Array | None:
    x, before, after = known.of(node.inputs[0]), known.dims(node.inputs[0]), known.dims(node.outputs[0])
    return None if x is None or before is None or after is None else _reshape(x, before, after)


def _concat(known: ConstantChannels, node: gs.Node) -> Array | None:
    values, dims = [known.or_unknown(t) for t in node.inputs], [known.dims(t) for t in node.inputs]
    if any(value is None or value.ndim == 0 for value in values) or any(each is None for each in dims):
        return None
    parts = [value for value in values if value is not None]
    axis = int(node.attrs["axis"]) % parts[0].ndim
    extents = [each[axis] for each in dims if each is not None]
    if any(isinstance(extent, str) for extent in extents):
        return None
    beside = np.broadcast_shapes(*(np.take(value, [0], axis).shape for value in parts))
    if np.prod(beside, dtype=np.int64) * sum(int(extent) for extent in extents) > LARGEST:
        return None
    shapes = [(*beside[:axis], int(extent), *beside[axis + 1 :]) for extent in extents]
    return np.concatenate([np.broadcast_to(v, s) for v, s in zip(parts, shapes, strict=True)], axis)


def _split(known: ConstantChannels, node: gs.Node) -> None:
    x = known.of(node.inputs[0])
    if x is None:
        return
    axis = int(node.attrs.get("axis", 0)) % x.ndim
    dims = [known.dims(output) for output in node.outputs]
    start = 0
    for output, each in zip(node.outputs, dims, strict=True):
        extent = None if each is None else each[axis]
        if not isinstance(extent, int):
            return
        part = x if x.shape[axis] == 1 else np.take(x, range(start, start + extent), axis)
        known.put(output, part)
        start += extent


def _slice(known: ConstantChannels, node: gs.Node) -> Array | None:
    x = known.of(node.inputs[0])
    starts, ends = known.ints(node, "starts", 1), known.ints(node, "ends", 2)
    if x is None or starts is None or ends is None:
        return None
    axes = _axes(known, node, 3, x.ndim) or list(range(len(starts)))
    given = len(node.inputs) > 4 and bool(node.inputs[4].name)
    steps = known.ints(node, "steps", 4) if given else [1] * len(starts)
    if steps is None or (len(node.inputs) > 3 and node.inputs[3].name and not is_dense(node.inputs[3])):
        return None
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if x.shape[axis] > 1:
            whole = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
            x = x[(slice(None),) * axis + (whole,)]
    return x


def _gather(known: ConstantChannels, node: gs.Node) -> Array | None:
    x, dims = known.of(node.inputs[0]), known.dims(node.inputs[1])
    if x is None or dims is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % x.ndim
    if x.shape[axis] == 1:
        return x.reshape(*x.shape[:axis], *(1,) * len(dims), *x.shape[axis + 1 :])
    return np.take(x, value_of(node.inputs[1]), axis) if is_dense(node.inputs[1]) else None


def _pad(known: ConstantChannels, node: gs.Node) -> Array | None:
    x, pads = known.of(node.inputs[0]), known.ints(node, "pads", 1)
    if x is None or pads is None or len(pads) != 2 * x.ndim:
        return None
    padded = [axis for axis in range(x.ndim) if pads[axis] or pads[axis + x.ndim]]
    if any(x.shape[axis] > 1 for axis in padded):
        return None
    if node.attrs.get("mode", "constant") != "constant":
        return x
    filling = known.of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(())
    return None if filling is None else np.where(x == filling.reshape(-1)[0], x, np.nan)


def _expanded(known: ConstantChannels, node: gs.Node) -> Array | None:
    x, after = known.of(node.inputs[0]), known.dims(node.outputs[0])
    return None if x is None or after is None else x.reshape((1,) * (len(after) - x.ndim) + x.shape)


def _reshape(x: Array, before: Dims, after: Dims) -> Array | None:
    """A value in another shape: axes are matched from both ends, what is left between has to be alike throughout."""
    shape: list[int] = [1] * len(after)
    low_in, low_out = 0, 0
    pieces: list[tuple[range, range]] = []
    while low_in < len(before) and low_out < len(after) and before[low_in] == after[low_out]:
        pieces.append((range(low_in, low_in + 1), range(low_out, low_out + 1)))
        low_in, low_out = low_in + 1, low_out + 1
    high_in, high_out = len(before), len(after)
    while (piece := _from_the_end(before[low_in:high_in], after[low_out:high_out])) is not None:
        pieces.append((range(high_in - piece[0], high_in), range(high_out - piece[1], high_out)))
        high_in, high_out = high_in - piece[0], high_out - piece[1]
    if any(x.shape[axis] > 1 for axis in range(low_in, high_in)):
        return None
    for old, new in pieces:
        if all(x.shape[axis] == 1 for axis in old):
            continue
        if len(old) == len(new) == 1:
            shape[new[0]] = x.shape[old[0]]
            continue
        whole = tuple(int(before[i]) if i in old else size for i, size in enumerate(x.shape))
        if np.prod(whole, dtype=np.int64) > LARGEST:
            return None
        x = np.broadcast_to(x, whole)
        for axis in new:
            shape[axis] = int(after[axis])
    return x.reshape(shape)


def _from_the_end(before: Dims, after: Dims) -> tuple[int, int] | None:
    """How many axes at the end of both shapes hold equally many elements, at least one of each; None: none do."""
    taken, given = 0, 0
    left, right = 1, 1
    while not (taken and given and left == right):
        from_left = not taken or (bool(given) and left < right)
        side, count = (before, taken) if from_left else (after, given)
        if count == len(side) or isinstance(side[-1 - count], str):
            return None
        if from_left:
            left, taken = left * int(side[-1 - count]), taken + 1
        else:
            right, given = right * int(side[-1 - count]), given + 1
    return taken, given


def _quantize(known: ConstantChannels, node: gs.Node) -> None:
    """What the codes stand for: the value, rounded to the grid."""
    x, scale = known.of(node.inputs[0]), known.of(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if x is None or scale is None or scale.size != 1 or (zero is not None and not is_dense(zero)):
        return
    limits = np.iinfo(np.uint8 if zero is None else zero.dtype)
    offset = 0.0 if zero is None else float(value_of(zero).reshape(-1)[0])
    codes = np.clip(np.rint(x / scale.reshape(-1)[0]) + offset, limits.min, limits.max)
    known.put(node.outputs[0], (codes - offset) * scale.reshape(-1)[0], kinds="iu")


def _dequantize(known: ConstantChannels, node: gs.Node) -> Array | None:
    """What a tensor of codes stands for is known already; constant codes are looked up."""
    x = known.of(node.inputs[0])
    if x is None or not isinstance(node.inputs[0], gs.Constant):
        return x
    scale = known.of(node.inputs[1])
    zero = known.of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(())
    if scale is None or zero is None or node.attrs.get("block_size"):
        return None
    if scale.size > 1:
        shape = [-1 if axis == int(node.attrs.get("axis", 1)) % x.ndim else 1 for axis in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.size > 1 else zero
    return np.asarray((x - zero) * scale)


def _single(rule: Callable[[ConstantChannels, gs.Node], Array | None]) -> Move:
    """A rule for an operator with one output."""

    def move(known: ConstantChannels, node: gs.Node) -> None:
        known.put(node.outputs[0], rule(known, node))

    return move


Move = Callable[["ConstantChannels", gs.Node], None]

MOVES: dict[str, Move] = {
    "Split": _split,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _single(_dequantize),
    "Resize": _single(_resize),
    "Transpose": _single(_transpose),
    "Concat": _single(_concat),
    "Slice": _single(_slice),
    "Gather": _single(_gather),
    "Pad": _single(_pad),
    "Expand": _single(_expanded),
    **dict.fromkeys(("Cast", "Identity", "Dropout"), _single(_same)),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _single(_reshaped)),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _single(_pool)),
    **dict.fromkeys(REDUCTIONS, _single(_reduced)),
}
"""Operator -> what it makes of what is known of its input."""
