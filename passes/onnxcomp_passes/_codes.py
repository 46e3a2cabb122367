"""Weights as integers: groups that share a scale, rounding to nearest, and the packing of codes below 8 bits.

weight = (code - zero point) * scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

__all__ = ["Codes", "Grouping", "Width", "group", "nearest", "pack", "with_scale"]

Array = np.ndarray[Any, Any]

CHUNK_ELEMENTS = 1 << 17
"""Weights are rounded in pieces that stay in a core's cache, which also bounds the memory besides the weight."""

INT2 = int(getattr(onnx.TensorProto, "INT2", 0))
UINT2 = int(getattr(onnx.TensorProto, "UINT2", 0))

OPSET_OF_TYPE = {2: 25, 4: 21, 8: 13}
"""Bits of a stored code -> the first opset that has Cast and DequantizeLinear of the type."""


@dataclass(frozen=True)
class Width:
    """The integers that codes may be.

    Attributes:
        bits: 2 to 8.
        symmetric: Signed codes and no zero point; else unsigned ones and a zero point for each group.

    Example:
        >>> Width(4).low, Width(4).high, Width(4, symmetric=False).high
        (-7, 7, 15)
    """

    bits: int = 8
    symmetric: bool = True

    @property
    def low(self) -> int:
        """The smallest code. The most negative number of a signed type is not used, so that negation is exact."""
        return -self.high if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def dtype(self) -> type[np.generic]:
        """The numpy type of codes before they are packed."""
        return np.int8 if self.symmetric else np.uint8

    def stored_bits(self, opset: int) -> int:
        """The bits that one code takes in a file of this opset: the smallest type that ONNX has there, 2, 4 or 8."""
        return min(bits for bits, since in OPSET_OF_TYPE.items() if bits >= self.bits and (since <= opset or bits == 8))

    def onnx_type(self, stored_bits: int) -> int:
        """The ONNX element type of codes that take so many bits."""
        signed = {2: INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}
        unsigned = {2: UINT2, 4: onnx.TensorProto.UINT4, 8: onnx.TensorProto.UINT8}
        return int((signed if self.symmetric else unsigned)[stored_bits])


@dataclass(frozen=True)
class Grouping:
    """A weight seen as groups of values that share one scale.

    Attributes:
        shape: The weight's shape with the grouped axis cut in two: (..., blocks, block, ...).
        over: The axes of `shape` that lie inside a group.
    """

    shape: tuple[int, ...]
    over: tuple[int, ...]


def group(shape: tuple[int, ...], channel: int | None, along: int | None = None, block: int = 0) -> Grouping:
    """Cut a weight into groups.

    Args:
        shape: The weight's; the length of the axis `along` must be a multiple of `block`.
        channel: The axis with a scale per entry where there are no blocks; None for one scale.
        along: The axis that blocks lie along.
        block: Values in a group; 0 for no blocks.

    Example:
        >>> group((64, 3), channel=1, along=0, block=32)
        Grouping(shape=(2, 32, 3), over=(1,))
        >>> group((64, 3), channel=1)
        Grouping(shape=(64, 3), over=(0,))
    """
    if block and along is not None:
        cut = (*shape[:along], shape[along] // block, block, *shape[along + 1 :])
        return Grouping(cut, (along + 1,))
    return Grouping(tuple(shape), tuple(axis for axis in range(len(shape)) if axis != channel))


@dataclass(frozen=True)
class Codes:
    """A weight in integers, in the shape of its groups.

    Attributes:
        codes: int8, or uint8 with a zero point; shape of the grouping.
        scale: float32, shaped to broadcast over the codes.
        zero: The zero point, shaped as the scale; None: 0.
    """

    codes: Array
    scale: Array
    zero: Array | None

    def decode(self) -> Array:
        """The float32 values, with the arithmetic that ONNX Runtime uses."""
        values = self.codes.astype(np.float32)
        if self.zero is not None:
            values -= self.zero.astype(np.float32)
        values *= self.scale
        return values


def nearest(weight: Array, grouping: Grouping, width: Width) -> Codes:
    """Round to nearest, with the scale that just covers each group.

    Args:
        weight: Finite float32 values.
        grouping: Which of them share a scale.
        width: The integers.

    Returns:
        The codes. No value is off by more than half a scale. Groups of zeros, and those whose scale would underflow,
        get the scale 1 and the code of 0.

    Example:
        >>> made = nearest(np.array([[0.0, 3.0], [1.5, 1.0]], np.float32), group((2, 2), channel=0), Width(3))
        >>> made.codes.tolist(), made.scale.tolist()
        ([[0, 3], [3, 2]], [[1.0], [0.5]])
    """
    view = weight.reshape(grouping.shape)
    low = np.min(view, axis=grouping.over, keepdims=True, initial=0.0).astype(np.float64)
    high = np.max(view, axis=grouping.over, keepdims=True, initial=0.0).astype(np.float64)
    if width.symmetric:
        return with_scale(weight, grouping, width, _usable(np.maximum(high, -low) / width.high), None)
    scale = _usable((high - low) / width.high)
    zero = np.clip(np.rint(-low / scale), width.low, width.high).astype(np.uint8)
    return with_scale(weight, grouping, width, scale, zero)


def _usable(scale: Array) -> Array:
    """Scales in float32; 1 in the place of those that are zero or have lost digits to underflow."""
    scale = scale.astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    return scale


def with_scale(weight: Array, grouping: Grouping, width: Width, scale: Array, zero: Array | None) -> Codes:
    """Round to nearest with given scales and zero points, clipped to the codes that there are."""
    view = weight.reshape(grouping.shape)
    codes = np.empty(view.shape, width.dtype)
    for part in _chunks(view.shape):
        values = view[part] / _part(scale, part)
        np.rint(values, out=values)
        if zero is not None:
            values += _part(zero, part).astype(np.float32)
        np.clip(values, width.low, width.high, out=values)
        codes[part] = values
    return Codes(codes, scale, zero)


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of the leading axis that hold few elements each."""
    if not shape:
        yield ()
        return
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)


def _part(array: Array, part: tuple[slice, ...]) -> Array:
    """The part of a broadcast array that belongs to a chunk."""
    return array if not part or array.shape[0] == 1 else array[part]


def pack(codes: Array, stored_bits: int) -> bytes:
    """Codes as ONNX stores them: in the order of memory, the first of a byte in its lowest bits.

    Args:
        codes: int8 or uint8.
        stored_bits: 2, 4 or 8.

    Example:
        >>> pack(np.array([1, -1, 7], np.int8), 4).hex()
        'f107'
    """
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if stored_bits == 8:
        return flat.tobytes()
    each = 8 // stored_bits
    if flat.size % each:
        flat = np.concatenate([flat, np.zeros(-flat.size % each, np.uint8)])
    packed = np.empty(flat.size // each, np.uint8)
    words = flat.view("<u2" if each == 2 else "<u4")
    mask = (1 << stored_bits) - 1
    for (part,) in _chunks(words.shape):
        chunk = words[part]
        out = chunk & mask
        for place in range(1, each):
            out |= chunk >> ((8 - stored_bits) * place) & (mask << (stored_bits * place))
        packed[part] = out
    return packed.tobytes()
