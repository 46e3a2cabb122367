"""Shapes: the same values, put elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.common import axes_of, numbers, wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["pad_axis"]


@operator("Reshape")
def _reshape(call: NodeCall, x: Tensor, shape: Tensor | None = None) -> Tensor:
    wanted = numbers(call.attrs["shape"] if shape is None else shape)
    if 0 in wanted and not call.get("allowzero", 0):
        wanted = [x.shape[index] if size == 0 else size for index, size in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Transpose")
def _transpose(call: NodeCall, x: Tensor) -> Tensor:
    order = call.get("perm")
    return x.permute(order if order else tuple(reversed(range(x.ndim))))


@operator("Squeeze")
def _squeeze(call: NodeCall, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = axes_of(call, axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


@operator("Unsqueeze")
def _unsqueeze(call: NodeCall, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = axes_of(call, axes) or []
    if len(given) == 1:
        return x.unsqueeze(given[0])
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@operator("Flatten")
def _flatten(call: NodeCall, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    if axis < 0:
        axis += x.ndim
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x[(0,) * axis].numel() if rows else 0)


@operator("Expand")
def _expand(call: NodeCall, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(numbers(shape))))


@operator("Concat")
def _concat(call: NodeCall, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.get("axis", 1))


@operator("Split")
def _split(call: NodeCall, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    given = call.get("split") if sizes is None else sizes
    if given is not None:
        return tuple(x.split(numbers(given), axis))
    count = call.get("num_outputs", len(call.wanted))
    part = -(-x.shape[axis] // count)
    lengths = [max(min(part, x.shape[axis] - part * index), 0) for index in range(count)]
    return tuple(x.split(lengths, axis))


LARGEST = {2**31 - 1, 2**63 - 1}


@operator("Slice")
def _slice(
    call: NodeCall,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = numbers(call.attrs["starts"] if starts is None else starts)
    last = numbers(call.attrs["ends"] if ends is None else ends)
    along = axes_of(call, axes) or list(range(len(first)))
    strides = [1] * len(first) if steps is None else numbers(steps)
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        if step < 0:
            # A start in front of all is the first place, other than in Python. And ONNX Runtime takes the largest end
            # as that of the direction, whichever it is.
            size = x.shape[axis]
            begin, stop, _ = slice(max(start, -size), None if end in LARGEST else end, step).indices(size)
            x = x.index_select(axis, torch.arange(begin, min(stop, begin), step))
            continue
        begin, stop, _ = slice(start, end, step).indices(x.shape[axis])
        if step == 1:
            x = x.narrow(axis, begin, max(stop - begin, 0))
        else:
            index: list[Any] = [slice(None)] * x.ndim
            index[axis] = slice(begin, max(stop, begin), step)
            x = x[tuple(index)]
    return x


@operator("Shape")
def _shape(call: NodeCall, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@operator("Size")
def _size(call: NodeCall, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("Tile")
def _tile(call: NodeCall, x: Tensor, repeats: Tensor, axis: Tensor | None = None) -> Tensor:
    if axis is None:
        return x.repeat(numbers(repeats))
    counts = [1] * x.ndim
    counts[int(axis)] = int(repeats)
    return x.repeat(counts)


@operator("Trilu")
def _trilu(call: NodeCall, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    function = torch.triu if call.get("upper", 1) else torch.tril
    return wide(lambda each: function(each, diagonal), x)


@operator("Pad")
def _pad(
    call: NodeCall, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = numbers(call.get("pads", call.get("paddings")) if pads is None else pads)
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in numbers(axes)]
    mode = _text(call.get("mode", "constant"))
    before, after = widths[: len(along)], widths[len(along) :]
    if mode != "constant":
        for axis, low, high in zip(along, before, after, strict=True):
            x = pad_axis(x, axis, low, high, mode)
        return x
    flat = [0] * (2 * x.ndim)
    for axis, low, high in zip(along, before, after, strict=True):
        flat[2 * (x.ndim - 1 - axis)], flat[2 * (x.ndim - 1 - axis) + 1] = low, high
    fill = call.get("value", 0.0) if value is None else value.item()
    return F.pad(x, flat, value=fill) if any(flat) else x


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def pad_axis(x: Tensor, axis: int, low: int, high: int, mode: str) -> Tensor:
    """Pad an axis with its own values; negative widths cut.

    Args:
        x: What is padded.
        axis: Along which.
        low: How much in front.
        high: How much behind.
        mode: "edge", "reflect" or "wrap".
    """
    if low == high == 0:
        return x
    size = x.shape[axis]
    if mode == "reflect":
        # A cut comes first, as numpy has it: what is cut off is not reflected.
        cut_low, cut_high = max(-low, 0), max(-high, 0)
        x = x.narrow(axis, cut_low, size - cut_low - cut_high)
        size, low, high = x.shape[axis], max(low, 0), max(high, 0)
    places = torch.arange(-low, size + high)
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    else:
        period = max(2 * (size - 1), 1)
        places = places % period
        places = torch.where(places >= size, period - places, places)
    return x.index_select(axis, places)


@operator("DepthToSpace")
def _depth_to_space(call: NodeCall, x: Tensor) -> Tensor:
    block, (count, depth, height, width) = call.attrs["blocksize"], x.shape
    if _text(call.get("mode", "DCR")) == "CRD":
        return F.pixel_shuffle(x, block)
    blocks = x.reshape(count, block, block, depth // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(count, depth // block**2, height * block, width * block)


@operator("SpaceToDepth")
def _space_to_depth(call: NodeCall, x: Tensor) -> Tensor:
    block, (count, depth, height, width) = call.attrs["blocksize"], x.shape
    if _text(call.get("mode", "DCR")) == "CRD":
        return F.pixel_unshuffle(x, block)
    blocks = x.reshape(count, depth, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(count, depth * block**2, height // block, width // block)


@operator("ReverseSequence")
def _reverse_sequence(call: NodeCall, x: Tensor, lengths: Tensor) -> Tensor:
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    steps = torch.arange(x.shape[time])
    ends = lengths.reshape(-1, 1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)  # (batch, time)
    shape = [1] * x.ndim
    shape[batch], shape[time] = places.shape
    index = (places if batch < time else places.T).reshape(shape)
    return wide(lambda each: each.gather(time, index.expand(x.shape)), x)


@operator("CenterCropPad")
def _center_crop_pad(call: NodeCall, x: Tensor, shape: Tensor) -> Tensor:
    axes = axes_of(call, None)
    for axis, size in zip(range(x.ndim) if axes is None else axes, numbers(shape), strict=True):
        more = size - x.shape[axis]
        if more < 0:
            x = x.narrow(axis, -more // 2, size)
        elif more:
            widths = [0] * (2 * x.ndim)
            place = 2 * (x.ndim - 1 - axis % x.ndim)
            widths[place], widths[place + 1] = more // 2, more - more // 2
            x = F.pad(x, widths)
    return x
