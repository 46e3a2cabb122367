"""A weight as its operator sees it, whatever form the model holds it in, and back into that form.

::

    W_float32 -> Conv
    W_float16 -> Cast -> Conv                                       stored as float16
    W_int8 -> Cast [-> Sub(zero)] -> Mul(scale) [-> Reshape] -> Conv    stored as integers
    W_int8 -> DequantizeLinear(scale[, zero]) -> Conv               computed in int8
    W_int8 -> MatMulInteger -> Cast -> Mul(., Mul(., scale))        computed in int8 with ranges found at run time
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context
from onnxcomp.structure import spooled
from onnxcomp.weights import LazyWeight, Spool
from onnxcomp_passes._codes import Codes
from onnxcomp_passes._stored import leave_bodies, weight_inputs

__all__ = ["Grid", "WeightView", "find_views", "wanted_views"]

Array = np.ndarray[Any, Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
CODES = (np.dtype(np.int8), np.dtype(np.uint8))


@dataclass(frozen=True)
class Grid(Codes):
    """The values that the codes of a weight stand for, in the shape that they are held in.

    Scale and zero points are float32 and broadcast over the codes.
    """

    def encode(self, value: Array) -> Array:
        """The nearest codes within the range that the codes have used so far; 0 becomes the code of 0.

        The range is kept since kernels may overflow beyond it: some targets have 7-bit weights.
        """
        codes = value.reshape(self.codes.shape) / self.scale
        if self.zero is not None:
            codes += self.zero
        low, high = (int(end) for end in (self.codes.min(initial=0), self.codes.max(initial=0)))
        return np.asarray(np.clip(np.rint(codes), low, high).astype(self.codes.dtype))

    @property
    def zero_code(self) -> Array | None:
        """The code of 0 for each scale, in the codes' type; None where 0 is not on the grid."""
        if self.zero is None:
            return np.zeros(self.scale.shape, self.codes.dtype)
        limits = np.iinfo(self.codes.dtype)
        whole = (np.rint(self.zero) == self.zero) & (self.zero >= limits.min) & (self.zero <= limits.max)
        return self.zero.astype(self.codes.dtype) if whole.all() else None


@dataclass(frozen=True)
class WeightView:
    """A weight of the main graph that is held in a constant.

    Attributes:
        name: What reports call it: the float tensor's name in the storage forms, else the constant's.
        node: The operator that multiplies with it; the first where there are several.
        index: At which input.
        shape: As that operator sees it.
        holder: The constant with its values or codes.
        form: "float" (float32 or float16, as the operator reads it), "float16" (behind a Cast), "stored" (integers
            decoded at load), "qdq" (integers behind a DequantizeLinear) or "integer" (the operator multiplies them).
    """

    name: str
    node: gs.Node
    index: int
    shape: tuple[int, ...]
    holder: gs.Constant
    form: str
    _scale: gs.Constant | None = None
    _zero: gs.Constant | None = None
    _axis: int | None = None
    _block: int = 0

    @property
    def label(self) -> str:
        """What reports call it: codes have names that say nothing, their operator has one."""
        if self.form in {"qdq", "integer"}:
            return str(self.node.name or self.node.outputs[0].name)
        return self.name

    def read(self) -> Array:
        """The values, float32, of `shape`. Nothing is kept in memory."""
        grid = self.grid()
        if grid is not None:
            return grid.decode().reshape(self.shape)
        return np.asarray(value_of(self.holder), np.float32)

    def grid(self) -> Grid | None:
        """Its codes and what they stand for; None for floats."""
        if self._scale is None:
            return None
        codes = value_of(self.holder)
        scale = self._over_codes(value_of(self._scale).astype(np.float32))
        zero = None if self._zero is None else self._over_codes(value_of(self._zero).astype(np.float32))
        return Grid(codes, scale, zero if zero is not None and zero.any() else None)

    def _over_codes(self, values: Array) -> Array:
        """Scales or zero points of a DequantizeLinear, shaped to broadcast over the codes."""
        rank = len(self.holder.shape)
        if self._block and self._axis is not None:
            size = int(self.holder.shape[self._axis])
            return np.repeat(values, self._block, self._axis).take(range(size), self._axis)
        if values.ndim == 1 and self._axis is not None and values.size > 1:
            return values.reshape([-1 if axis == self._axis else 1 for axis in range(rank)])
        return values

    def write(self, value: Array, spool: Spool) -> None:
        """Give it other values, in the form that it is held in: codes are rounded, zeros stay exactly zero.

        Args:
            value: Finite floats of `shape`.
            spool: Where the bytes go.
        """
        grid = self.grid()
        if grid is not None:
            self.write_codes(grid.encode(value), spool)
            return
        self._put(np.asarray(value).astype(self.holder.dtype), spool)

    def write_codes(self, codes: Array, spool: Spool) -> None:
        """Give it other codes, in the shape and type of those it has."""
        self._put(codes, spool)

    def held(self, values: Array, spool: Spool) -> LazyWeight:
        """Values or codes as its holder may hold them, of the type and shape of those that it holds."""
        onnx_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        return spooled(np.ascontiguousarray(values).tobytes(), onnx_type, self.holder.shape, spool)

    def _put(self, values: Array, spool: Spool) -> None:
        self.holder.values = self.held(values, spool)


def find_views(model: Model) -> list[WeightView]:
    """The weights of the main graph, in the order of the nodes that read them; those read twice are found once.

    Found are constants of any type, and integers or float16 in a form above. Where the codes have other readers, which
    may see other values in them, there is no view.
    """
    found: dict[int, WeightView] = {}
    for node in model.graph.nodes:
        for index in (1,) if node.op == "MatMulInteger" else weight_inputs(node):
            tensor = node.inputs[index] if index < len(node.inputs) else None
            view = _view(tensor, node, index) if tensor is not None else None
            if view is not None and getattr(view.holder, "owner", model.graph) is model.graph:
                found.setdefault(id(view.holder), view)
    return list(found.values())


def wanted_views(
    model: Model, context: Context, changes: Changes, *, skip: Container[str] = (), min_elements: int = 1
) -> list[WeightView]:
    """The weights that a pass may change, judged without reading them; says why it leaves the others.

    Args:
        model: Where to look.
        context: For what the user excludes.
        changes: Gets the reasons.
        skip: Names of weights to leave.
        min_elements: Smaller ones are left.
    """
    outputs = {tensor.name for tensor in model.graph.outputs}
    found = []
    for view in find_views(model):
        dtype = np.dtype(view.holder.dtype)
        if context.excludes(view.node) or view.name in skip:
            changes.leave(view.label, "excluded")
        elif view.form == "float" and dtype not in FLOATS:
            floating = np.issubdtype(dtype, np.floating)
            changes.leave(view.label, f"is {dtype}, not float32" if floating else "not a float")
        elif math.prod(view.shape) < min_elements:
            changes.leave(view.label, f"has fewer than {min_elements} elements")
        elif view.name in outputs or view.holder.name in outputs:
            changes.leave(view.label, "is a graph output")
        else:
            found.append(view)
    leave_bodies(model, changes)
    return found


def _view(tensor: gs.Tensor, node: gs.Node, index: int) -> WeightView | None:
    if node.op == "MatMulInteger":
        return _of_integers(tensor, node)
    if isinstance(tensor, gs.Constant):
        return WeightView(str(tensor.name), node, index, tuple(tensor.shape), tensor, "float")
    maker = _maker(tensor)
    if maker is None:
        return None
    if maker.op == "DequantizeLinear":
        return _behind_dequantize(maker, node, index)
    if maker.op == "Cast":
        held = maker.inputs[0]
        if isinstance(held, gs.Constant) and held.dtype == np.float16 and len(held.outputs) == 1:
            return WeightView(str(tensor.name), node, index, tuple(held.shape), held, "float16")
        return None
    return _behind_cast(tensor, node, index)


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    return None if maker is None or maker.domain else maker


def _behind_dequantize(decode: gs.Node, node: gs.Node, index: int) -> WeightView | None:
    codes, scale, *more = decode.inputs
    zero = more[0] if more and not more[0].is_empty() else None
    constants = (codes, scale) if zero is None else (codes, scale, zero)
    if not all(isinstance(tensor, gs.Constant) for tensor in constants) or codes.dtype not in CODES:
        return None
    if len(codes.outputs) != 1:
        return None
    axis = int(decode.attrs.get("axis", 1)) % max(1, len(codes.shape))
    block = int(decode.attrs.get("block_size", 0))
    return WeightView(str(codes.name), node, index, tuple(codes.shape), codes, "qdq", scale, zero, axis, block)


def _of_integers(codes: gs.Tensor, node: gs.Node) -> WeightView | None:
    """Integers that are multiplied as they are; their scale is a factor of the product's."""
    if (
        not isinstance(codes, gs.Constant)
        or codes.dtype not in CODES
        or len(codes.outputs) != 1
        or len(node.inputs) > 3
    ):
        return None
    reader = node.outputs[0].outputs[0] if len(node.outputs[0].outputs) == 1 else None
    scaled = reader.outputs[0].outputs if reader is not None and reader.op == "Cast" else []
    factors = [_maker(tensor) for mul in scaled if mul.op == "Mul" for tensor in mul.inputs]
    steps = [maker for maker in factors if maker is not None and maker.op == "Mul"]
    scales = [tensor for step in steps for tensor in step.inputs if isinstance(tensor, gs.Constant)]
    if len(scaled) != 1 or len(scales) != 1 or len(scales[0].shape) > 1:
        return None
    return WeightView(str(codes.name), node, 1, tuple(codes.shape), codes, "integer", scales[0], None, 1)


def _behind_cast(tensor: gs.Tensor, node: gs.Node, index: int) -> WeightView | None:
    """The storage form as integers, read from its end."""
    step, shape, zero = _maker(tensor), None, None
    if step is not None and step.op == "Reshape" and isinstance(step.inputs[1], gs.Constant):
        shape, step = tuple(int(size) for size in value_of(step.inputs[1])), _maker(step.inputs[0])
    if step is None or step.op != "Mul" or not isinstance(step.inputs[1], gs.Constant):
        return None
    scale, step = step.inputs[1], _maker(step.inputs[0])
    if step is not None and step.op == "Sub" and isinstance(step.inputs[1], gs.Constant):
        zero, step = step.inputs[1], _maker(step.inputs[0])
    if step is None or step.op != "Cast" or not isinstance(step.inputs[0], gs.Constant):
        return None
    codes = step.inputs[0]
    if codes.dtype not in CODES or len(codes.outputs) != 1:
        return None
    return WeightView(str(tensor.name), node, index, shape or tuple(codes.shape), codes, "stored", scale, zero)
