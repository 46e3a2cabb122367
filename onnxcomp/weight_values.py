"""The numbers that a weight stands for, whatever form it is held in: all of them, or some places of a large one.

::

    W                                       float32, float16, bfloat16
    Q -> Cast [-> Sub(zero)] -> Mul(scale)  stored as integers
    Q -> DequantizeLinear                   also in blocks; 8 bits or fewer
    Q -> QLinearConv, QLinearMatMul, QGemm, MatMulIntegerToFloat, DynamicQuantizeMatMul
    Q -> MatMulInteger -> Cast -> Mul(., Mul(., scale))
    Q -> MatMulNBits                        several codes a byte
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.analysis import HeldWeight, held_weights
from onnxcomp.model import Model, value_of
from onnxcomp.packed import find_packed, unpack
from onnxcomp.qdq import codes_of
from onnxcomp.weights import LazyWeight

__all__ = ["WeightValues", "sampled_places", "weight_values"]

Array = np.ndarray[Any, Any]

SETTINGS = {
    "DequantizeLinear": (1, 2),
    "QLinearConv": (4, 5),
    "QLinearMatMul": (4, 5),
    "QGemm": (4, 5),
    "MatMulIntegerToFloat": (3, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulInteger": (None, 3),
    "ConvInteger": (None, 3),
}
"""Operator that takes codes -> the inputs with the scale and the zero point of its weight."""

LONGEST_RUN = 1024
"""Neighbours that are drawn together: a page of a file holds so many floats."""


def weight_values(model: Model) -> dict[str, WeightValues]:
    """The weights of a model that can be read, by the names that `onnxcomp.analysis.weight_table` gives them.

    Packed weights are unpacked, into a temporary file. Names that several bodies use for weights of their own are left
    out.
    """
    if find_packed(model):
        model = model.fork()
        unpack(model)
    found = list(held_weights(model))
    count = Counter(held.name for held in found)
    return {held.name: WeightValues(held) for held in found if count[held.name] == 1}


def sampled_places(size: int, most: int) -> Array | None:
    """Places of a weight to look at, in short runs so that little of a mapped file is read; None for all.

    They are drawn with a fixed seed: no pattern of rows can hide from them, and the same are drawn each time.
    """
    if size <= most:
        return None
    run = max(1, min(LONGEST_RUN, most // LONGEST_RUN))
    starts = np.sort(np.random.default_rng(0).integers(0, size - run + 1, most // run))
    return np.asarray((starts[:, None] + np.arange(run)).reshape(-1))


@dataclass(frozen=True)
class WeightValues:
    """A weight that can be read.

    Attributes:
        held: Where it is.
    """

    held: HeldWeight

    @property
    def node(self) -> gs.Node:
        """The operator that uses it."""
        return self.held.node

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is held; of MatMulNBits what its codes stand for, (outputs, inputs)."""
        if self._is_nbits:
            return int(self.held.reader.attrs["N"]), int(self.held.reader.attrs["K"])
        return tuple(int(size) for size in self.held.constant.shape)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self, places: Array | None = None) -> Array | None:
        """The numbers as float32, flat.

        Args:
            places: Indices into the flattened weight; None is all of it.

        Returns:
            The numbers; None where it is held as codes that are not understood here.
        """
        if self._is_nbits:
            return _nbits(self.held.reader, value_of(self.held.constant), _all(places, self.size))
        found = _taken(self.held.constant, places)
        if _is_float(found.dtype) and self.held.reader.op != "DequantizeLinear":
            return np.asarray(found, np.float32)
        settings = _settings(self.held)
        if settings is None:
            return None
        scale, zero = settings
        values = found.astype(np.float32)
        if zero is not None:
            values -= self._spread(zero, places)
        values *= self._spread(scale, places)
        return values

    @property
    def _is_nbits(self) -> bool:
        return bool(self.held.reader.op == "MatMulNBits" and self.held.index == 1)

    def _spread(self, setting: Array, places: Array | None) -> Array:
        """A scale or zero point for each place: one for all, for each entry of an axis, or for each block of it."""
        setting = np.asarray(setting, np.float32)
        if setting.size == 1:
            return setting.reshape(())
        shape = self.shape
        setting = setting.reshape((1,) * (len(shape) - setting.ndim) + setting.shape)
        blocks = [1 if known in (1, size) else self._block(size, known) for size, known in
                  zip(shape, setting.shape, strict=True)]  # fmt: skip
        if places is None:
            for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
                if block > 1:
                    setting = np.repeat(setting, block, axis).take(range(size), axis)
            return np.broadcast_to(setting, shape).reshape(-1)
        index = np.unravel_index(places, shape)
        return np.asarray(setting[tuple(
            0 if known == 1 else one // block
            for one, known, block in zip(index, setting.shape, blocks, strict=True)
        )])  # fmt: skip

    def _block(self, size: int, known: int) -> int:
        return int(self.held.reader.attrs.get("block_size", 0)) or -(-size // known)


def _taken(constant: gs.Constant, places: Array | None) -> Array:
    """What a constant holds at some places, flat; of a weight in a file no more is read than runs of places need."""
    value = constant._values
    blob = value.blob if isinstance(value, LazyWeight) else None
    if places is None or blob is None or blob.nbytes != math.prod(value.shape) * value.dtype.itemsize:
        flat = value_of(constant).reshape(-1)
        return flat if places is None else flat[places]
    size, dtype = value.dtype.itemsize, value.dtype.newbyteorder("<")
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    parts = [np.frombuffer(blob.part(int(run[0]) * size, len(run) * size), dtype) for run in runs if len(run)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _all(places: Array | None, size: int) -> Array:
    return np.arange(size) if places is None else places


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name  # bfloat16 and float8 are of kind V


def _settings(held: HeldWeight) -> tuple[Array, Array | None] | None:
    """Scale and zero point of the codes that a reader takes, shaped to broadcast; None where they are not found."""
    reader = held.reader
    if reader.op == "Cast":
        return _behind_cast(reader)
    if reader.op not in SETTINGS or (reader.op.startswith(("QLinear", "QGemm", "MatMul")) and held.index == 0):
        return None
    place, other = SETTINGS[reader.op]
    scale = _dynamic_scale(reader) if place is None else _input(reader, place)
    if scale is None:
        return None
    zero = _input(reader, other)
    shaped = _along(held)
    return shaped(scale), None if zero is None or not zero.astype(np.float32).any() else shaped(zero)


def _input(node: gs.Node, place: int) -> Array | None:
    if place >= len(node.inputs) or not node.inputs[place].name:
        return None
    return codes_of(node.inputs[place])


def _along(held: HeldWeight) -> Callable[[Array], Array]:
    """What shapes a list of settings to lie along the channels of the codes."""
    reader, rank = held.reader, len(held.constant.shape)
    if reader.op == "DequantizeLinear":
        axis = int(reader.attrs.get("axis", 1))
    elif "Conv" in reader.op:
        axis = 0
    else:
        axis = 0 if reader.attrs.get("transB", 0) else -1

    def shaped(setting: Array) -> Array:
        if setting.ndim != 1 or setting.size == 1 or not rank:
            return setting
        return setting.reshape([-1 if place == axis % rank else 1 for place in range(rank)])

    return shaped


def _behind_cast(cast: gs.Node) -> tuple[Array, Array | None] | None:
    """Of the storage form, in which constants follow a Cast."""
    zero, step = None, _only_reader(cast)
    if step is not None and step.op == "Sub":
        zero, step = _input(step, 1), _only_reader(step)
    if step is None or step.op != "Mul":
        return None
    scale = next(_constants(step), None)
    return None if scale is None else (scale, zero)


def _dynamic_scale(reader: gs.Node) -> Array | None:
    """The weight's factor in the scale that an integer product is multiplied with at each run."""
    cast = _only_reader(reader)
    product = _only_reader(cast) if cast is not None and cast.op == "Cast" else None
    if product is None or product.op != "Mul":
        return None
    makers = [tensor.inputs[0] for tensor in product.inputs if len(tensor.inputs) == 1]
    factors = [scale for maker in makers if maker.op == "Mul" for scale in _constants(maker)]
    return factors[0] if len(factors) == 1 else None


def _constants(node: gs.Node) -> Iterator[Array]:
    for tensor in node.inputs:
        value = codes_of(tensor)
        if value is not None:
            yield value


def _only_reader(node: gs.Node) -> gs.Node | None:
    readers = node.outputs[0].outputs if node.outputs else []
    return readers[0] if len(readers) == 1 else None


def _nbits(node: gs.Node, packed: Array, places: Array) -> Array | None:
    """Codes of MatMulNBits: a row for each output, cut into blocks, the lowest bits of a byte first."""
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    scale = _input(node, 2)
    if scale is None or bits not in (2, 4, 8) or packed.ndim != 3:
        return None
    row, column = np.divmod(places, int(node.attrs["K"]))
    group, within = np.divmod(column, block)
    values = _unpacked(packed, (row, group), within, bits).astype(np.float32)
    zero = _input(node, 3)
    if zero is None:
        values -= np.float32(1 << (bits - 1))
    elif zero.dtype == np.uint8:
        values -= _unpacked(zero.reshape(packed.shape[0], -1), (row,), group, bits)
    else:
        values -= np.asarray(zero, np.float32).reshape(packed.shape[:2])[row, group]
    values *= np.asarray(scale, np.float32).reshape(packed.shape[:2])[row, group]
    return values


def _unpacked(packed: Array, index: tuple[Array, ...], place: Array, bits: int) -> Array:
    """The codes at places of the last axis, of which a byte holds several."""
    each = 8 // bits
    byte, part = np.divmod(place, each)
    return np.asarray((packed[(*index, byte)] >> (part * bits).astype(np.uint8)) & ((1 << bits) - 1))
