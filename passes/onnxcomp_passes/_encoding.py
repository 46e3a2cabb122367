"""From a float weight to codes in a file: how it is grouped, how it is rounded, and in what form it is held.

One weight is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context
from onnxcomp.structure import spooled
from onnxcomp.weights import LazyWeight, Spool
from onnxcomp_passes._codes import Codes, Grouping, Width, group, nearest, pack
from onnxcomp_passes._gptq import gptq
from onnxcomp_passes._hqq import half_quadratic
from onnxcomp_passes._nbits import compute_refusal, dequantize, is_transposed
from onnxcomp_passes._stored import Encoded, leave_bodies, output_channel_axis, reduction_axis, store, weight_inputs

__all__ = ["Encoder", "Held", "Weight", "find_weights", "wanted", "write"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weight:
    """A constant of the main graph that feeds a weight input, and its first reader."""

    constant: gs.Constant
    node: gs.Node
    index: int

    @property
    def name(self) -> str:
        """The constant's name."""
        return str(self.constant.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The constant's shape."""
        return tuple(self.constant.shape)


@dataclass(frozen=True)
class Held:
    """A weight as it will be held.

    Attributes:
        encoded: The integers.
        compute: Whether it has the compute form.
        block: Values in a group; 0 for a scale for each channel, or for the whole.
        method: How it was rounded.
    """

    encoded: Encoded
    compute: bool
    block: int
    method: str

    @property
    def nodes(self) -> int:
        """How many operands, and so about how many nodes, decode it."""
        zero = self.encoded.zero is not None
        return 1 + zero if self.compute else 2 + zero + bool(self.block)


def find_weights(model: Model) -> list[Weight]:
    """The constants of the main graph that feed a weight input, in the order of the nodes."""
    found: dict[int, Weight] = {}
    for node in model.graph.nodes:
        for index in weight_inputs(node):
            tensor = node.inputs[index] if index < len(node.inputs) else None
            if isinstance(tensor, gs.Constant) and getattr(tensor, "owner", model.graph) is model.graph:
                found.setdefault(id(tensor), Weight(tensor, node, index))
    return list(found.values())


def wanted(
    model: Model, context: Context, changes: Changes, *, skip: Container[str], min_elements: int
) -> list[Weight]:
    """The float32 weights that a pass may change, judged without reading them; says why it leaves the others."""
    outputs = {tensor.name for tensor in model.graph.outputs}
    found = []
    for weight in find_weights(model):
        dtype = weight.constant.dtype
        if context.excludes(weight.node) or weight.name in skip:
            changes.leave(weight.name, "excluded")
        elif dtype != np.float32:
            floating = np.issubdtype(dtype, np.floating)
            changes.leave(weight.name, f"is {dtype}, not float32" if floating else "not a float")
        elif math.prod(weight.shape) < min_elements:
            changes.leave(weight.name, f"has fewer than {min_elements} elements")
        elif weight.name in outputs:
            changes.leave(weight.name, "is a graph output")
        else:
            found.append(weight)
    leave_bodies(model, changes)
    return found


def write(model: Model, held: Mapping[str, Held], *, per_channel: bool) -> None:
    """Write weights into a model, by name."""
    for weight in find_weights(model):
        form = held.get(weight.name)
        if form is None:
            continue
        if form.compute:
            dequantize(model, model.graph, weight.constant, form.encoded, block=form.block, per_channel=per_channel)
        else:
            store(model, model.graph, weight.constant, form.encoded)


@dataclass(frozen=True)
class Encoder:
    """Encodes weights one by one.

    Attributes:
        width: The integers.
        stored_bits: The bits of their ONNX type.
        block: Values in a group; 0 for none.
        per_channel: Whether there is a scale for each output channel, where there are no blocks.
        method: "nearest", "hqq" or "gptq".
        spool: Where the results go.
    """

    width: Width
    stored_bits: int
    block: int
    per_channel: bool
    method: str
    spool: Spool

    def computes(self, weight: Weight) -> bool:
        """Whether a weight can have the compute form."""
        return compute_refusal(weight.constant, weight.node, weight.index) is None

    def encode(self, weight: Weight, *, compute: bool, products: Array | None = None) -> Held | None:
        """Encode one weight.

        Args:
            weight: The weight.
            compute: Whether to make the compute form, which it can have, or the storage form.
            products: X^T X of the layer's input for "gptq"; without it the weight is rounded to nearest.

        Returns:
            The weight in integers, or None where it holds NaN or infinity.
        """
        value = value_of(weight.constant)
        if not np.isfinite([np.min(value, initial=0.0), np.max(value, initial=0.0)]).all():
            return None
        if compute:
            return self._compute_form(value, is_transposed(weight.node), products)
        return self._storage_form(weight, value, products)

    def _compute_form(self, value: Array, transposed: bool, products: Array | None) -> Held:
        """Codes of shape (inputs, outputs), blocks along the inputs, the last of which may be short."""
        matrix = np.ascontiguousarray(value.T) if transposed else value
        inputs, outputs = matrix.shape
        missing = -inputs % self.block if self.block else 0
        if missing:
            matrix = np.pad(matrix, ((0, missing), (0, 0)))
            products = None if products is None else np.pad(products, (0, missing))
        grouping = group(matrix.shape, 1 if self.per_channel else None, 0, self.block)
        made, method = self._round(matrix, grouping, products)
        shape = (-1, outputs) if self.block else (-1,) if self.per_channel else ()
        zero = None if made.zero is None else made.zero.reshape(shape)
        codes = made.codes.reshape(matrix.shape)[:inputs]
        encoded = Encoded(self._integers(codes), self._floats(made.scale.reshape(shape)), self._maybe_integers(zero))
        return Held(encoded, True, self.block, method)

    def _storage_form(self, weight: Weight, value: Array, products: Array | None) -> Held:
        """Codes in the weight's own layout; blocks only where they fit its reduction axis."""
        channel = output_channel_axis(weight.node, weight.index, value.ndim) if self.per_channel else None
        along = reduction_axis(weight.node, weight.index, value.ndim)
        shape = (value.shape[0], math.prod(value.shape[1:])) if weight.node.op == "Conv" else value.shape
        block = self.block if along is not None and shape[along] % max(1, self.block) == 0 else 0
        grouping = group(shape if block else value.shape, channel, along, block)
        if products is not None and along == 1:  # (outputs, inputs): GPTQ wants the other
            made, method = self._round(
                np.ascontiguousarray(value.T), group(value.T.shape, None if channel is None else 1, 0, block), products
            )
            zeros = None if made.zero is None else np.moveaxis(made.zero, -1, 0)
            made = Codes(np.moveaxis(made.codes, -1, 0), np.moveaxis(made.scale, -1, 0), zeros)
        else:
            made, method = self._round(value, grouping, products)
        zero = None if made.zero is None else self._floats(made.zero.astype(np.float32))
        return Held(Encoded(self._integers(made.codes), self._floats(made.scale), zero), False, block, method)

    def _round(self, value: Array, grouping: Grouping, products: Array | None) -> tuple[Codes, str]:
        """The codes, and the method that made them."""
        if self.method == "gptq" and products is not None:
            return gptq(value, grouping, self.width, products), "gptq"
        if self.method == "hqq":
            return half_quadratic(value, grouping, self.width), "hqq"
        return nearest(value, grouping, self.width), "nearest"

    def _integers(self, codes: Array) -> LazyWeight:
        onnx_type = self.width.onnx_type(self.stored_bits)
        return spooled(pack(codes, self.stored_bits), onnx_type, codes.shape, self.spool)

    def _maybe_integers(self, codes: Array | None) -> LazyWeight | None:
        return None if codes is None else self._integers(codes)

    def _floats(self, values: Array) -> LazyWeight:
        data = np.ascontiguousarray(values, "<f4").tobytes()
        return spooled(data, onnx.TensorProto.FLOAT, values.shape, self.spool)
