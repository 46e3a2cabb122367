"""Writes a packed weight into the graph.

::

    every element    codes -> unpack -> Cast -> Gather(codebook) -> Reshape
    gaps             gaps -> unpack -> Cast -> CumSum -> ScatterElements(ConstantOfShape, ., values) -> Reshape
    mask             mask -> unpack -> Cast -> Mul(., CumSum(.)) -> Gather(values, the background first) -> Reshape
    one value        ConstantOfShape

    unpack           BitShift -> Mod -> Reshape [-> Slice]; nothing for 8 bits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxcomp.graph_io import Node, Variable
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._packing import Contents, Layout, gaps, pack_bits

__all__ = ["PACKED_OPSET", "Form", "Writer"]

Array = np.ndarray[Any, Any]

PACKED_OPSET = 11
"""The first opset with BitShift, CumSum and ScatterElements."""


@dataclass
class Form:
    """The nodes and constants that decode one weight.

    Attributes:
        nodes: In order; the last one makes the weight.
        own: Constants of this weight alone.
        shared: Small constants that other weights may read too.
    """

    nodes: list[gs.Node] = field(default_factory=list)
    own: list[gs.Constant] = field(default_factory=list)
    shared: list[gs.Constant] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """What it adds to the file, shared constants left out: data, names, and what protobuf takes around them."""
        nodes = sum(len(node.op) + 4 + _attribute_bytes(node) for node in self.nodes)
        names = sum(len(t.name) + 2 for node in self.nodes for t in (*node.inputs, *node.outputs))
        constants = (int(c._values.nbytes) + len(c.name) + 12 + 2 * len(c.shape) for c in self.own)
        return nodes + names + sum(constants)


def _attribute_bytes(node: gs.Node) -> int:
    return sum(len(name) + (24 if isinstance(value, gs.Constant) else 12) for name, value in node.attrs.items())


class Writer:
    """Makes packed forms for one model.

    Args:
        names: Fresh tensor names.
        spool: Where large constants go.
    """

    def __init__(self, names: Iterator[str], spool: Spool) -> None:
        self._names = names
        self._spool = spool
        self._shared: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}

    def write(self, name: str, found: Contents, layout: Layout, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Form:
        """The form of one weight.

        Args:
            name: Of the weight.
            found: What it holds.
            layout: How to hold that.
            shape: The weight's.
            dtype: Its element type.
        """
        form = Form()
        if not found.others.size:
            self._blank(form, found, shape, dtype).name = name
            return form
        if layout.places == "every":
            last = self._values(form, found, layout, self._codes_of(found, found.raw), dtype)
        elif layout.places == "mask":
            last = self._masked(form, found, layout, dtype)
        else:
            last = self._scattered(form, found, layout, dtype)
        if len(shape) != 1 or layout.places == "every":
            last = self._node(form, "Reshape", [last, self._share(form, np.asarray(shape, np.int64))])
        last.name = name
        return form

    # --- the layouts ------------------------------------------------------------------------------------------------

    def _masked(self, form: Form, found: Contents, layout: Layout, dtype: np.dtype[Any]) -> gs.Tensor:
        mask = (found.raw != found.background).astype(np.uint8)
        ones = self._int32(form, self._unpacked(form, mask, 1))
        places = self._node(form, "Mul", [ones, self._running_sum(form, ones)])
        held = np.concatenate([np.array([found.background], found.raw.dtype), found.raw[found.others]])
        values = self._held(form, found, layout, held, dtype)
        return self._node(form, "Gather", [values, places])

    def _scattered(self, form: Form, found: Contents, layout: Layout, dtype: np.dtype[Any]) -> gs.Tensor:
        bits = int(layout.places.removeprefix("gaps"))
        steps, index = gaps(found.others, bits)
        background = np.array(found.background, found.raw.dtype)
        held = np.where(index < 0, background, found.raw[found.others[index] if found.others.size else index])
        places = self._running_sum(form, self._int32(form, self._unpacked(form, steps, bits)))
        values = self._held(form, found, layout, held.astype(found.raw.dtype), dtype)
        blank = self._blank(form, found, (found.raw.size,), dtype)
        return self._node(form, "ScatterElements", [blank, places, values])

    def _blank(self, form: Form, found: Contents, shape: tuple[int, ...], dtype: np.dtype[Any]) -> gs.Tensor:
        """The background everywhere."""
        fill = gs.Constant("value", np.array([found.background], found.raw.dtype).view(dtype))
        size = self._share(form, np.asarray(shape, np.int64))
        plain = found.background == 0 and dtype == np.float32
        return self._node(form, "ConstantOfShape", [size], **({} if plain else {"value": fill}))

    def _held(self, form: Form, found: Contents, layout: Layout, held: Array, dtype: np.dtype[Any]) -> gs.Tensor:
        """The values of a list, in order."""
        if not layout.bits:
            return self._own(form, held.view(dtype))
        return self._values(form, found, layout, self._codes_of(found, held), dtype)

    def _values(self, form: Form, found: Contents, layout: Layout, codes: Array, dtype: np.dtype[Any]) -> gs.Tensor:
        """The values that codes stand for."""
        assert found.book is not None
        book = self._own(form, found.book.view(dtype))
        return self._node(form, "Gather", [book, self._int32(form, self._unpacked(form, codes, layout.bits))])

    @staticmethod
    def _codes_of(found: Contents, raw: Array) -> Array:
        """The place of each value in the codebook, uint8."""
        assert found.book is not None
        order = np.argsort(found.book)
        return np.asarray(order[np.searchsorted(found.book, raw, sorter=order)], np.uint8)

    # --- the parts ---------------------------------------------------------------------------------------------------

    def _unpacked(self, form: Form, codes: Array, bits: int) -> gs.Tensor:
        """The codes as uint8, shape (n,), from as many bytes as they need."""
        data = pack_bits(codes, bits)
        if bits == 8:
            return self._own(form, data)
        each = 8 // bits
        shifts = self._share(form, bits * np.arange(each, dtype=np.uint8))
        shifted = self._node(form, "BitShift", [self._own(form, data.reshape(-1, 1)), shifts], direction="RIGHT")
        digits = self._node(form, "Mod", [shifted, self._share(form, np.array([1 << bits], np.uint8))])
        flat = self._node(form, "Reshape", [digits, self._share(form, np.array([-1], np.int64))])
        if data.size * each == codes.size:
            return flat
        ends = [self._share(form, np.array([end], np.int64)) for end in (0, codes.size)]
        return self._node(form, "Slice", [flat, *ends])

    def _int32(self, form: Form, tensor: gs.Tensor) -> gs.Tensor:
        return self._node(form, "Cast", [tensor], to=int(TensorProto.INT32))

    def _running_sum(self, form: Form, tensor: gs.Tensor) -> gs.Tensor:
        return self._node(form, "CumSum", [tensor, self._share(form, np.array(0, np.int64))])

    def _node(self, form: Form, op: str, inputs: list[gs.Tensor], **attrs: Any) -> gs.Tensor:
        result = Variable(next(self._names))
        form.nodes.append(Node(op, "", attrs, inputs, [result]))
        return result

    def _own(self, form: Form, value: Array) -> gs.Constant:
        onnx_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        held = spooled(np.ascontiguousarray(value).tobytes(), onnx_type, value.shape, self._spool)
        form.own.append(gs.Constant(next(self._names), held))
        return form.own[-1]

    def _share(self, form: Form, value: Array) -> gs.Constant:
        key = str(value.dtype), value.shape, value.tobytes()
        if key not in self._shared:
            self._shared[key] = gs.Constant(next(self._names), value)
        form.shared.append(self._shared[key])
        return self._shared[key]
