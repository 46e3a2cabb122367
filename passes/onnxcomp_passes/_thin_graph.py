"""Factors in the place of a weight.

::

    Y = MatMul(X, W)             Y = MatMul(MatMul(X, A), B)
    Y = MatMul(W, X)             Y = MatMul(B', MatMul(A', X))                W = B' A'
    Y = Gemm(X, W, b)            Y = Gemm(Gemm(X, A), B, b)
    Y = Gather(W, rows)          Y = MatMul(Gather(A, rows), B)
    Y = Conv(X, W, b)            Y = Conv(Conv(X, A), B, b)                   and longer chains, see `FORMS`
    Q, K, V = MatMul(X, Wq), ..  T = MatMul(X, A)    Q, K, V = MatMul(T, Bq), ..
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._conv_factors import ConvFactors
from onnxcomp_passes._thin import THIN
from onnxcomp_passes._thin_layers import Unit
from onnxcomp_passes._views import WeightView

__all__ = ["Factors", "MatrixFactors", "put_factors"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MatrixFactors:
    """Two thin matrices for each group of a unit.

    Attributes:
        first: Shape (groups, inputs, rank).
        second: Shape (groups, rank, outputs).
    """

    first: Array
    second: Array

    @property
    def parameters(self) -> int:
        """How many numbers they have."""
        return self.first.size + self.second.size

    def matrices(self) -> Array:
        """What they amount to, shape (groups, inputs, outputs)."""
        return np.asarray(self.first @ self.second)


Factors = MatrixFactors | ConvFactors


def put_factors(model: Model, unit: Unit, factors: Factors, spool: Spool) -> None:
    """Let the nodes of a unit compute with factors in place of its weights (in place)."""
    make = _Maker(model, unit.parts[0].view, spool)
    if isinstance(factors, ConvFactors):
        weights = [make.constant(weight) for weight in factors.weights]
        for reader in unit.parts[0].readers:
            _put_convs(make, reader, factors, weights)
        return
    first = make.constant(unit.parts[0].laid_out(factors.first))
    between: dict[int, gs.Tensor] = {}
    for part, matrices in zip(unit.parts, unit.shares(factors.second), strict=True):
        second = make.constant(part.laid_out(matrices), part.view.name)
        for reader in part.readers:
            _put_matrices(make, reader, part.view.index, (first, second), between)


class _Maker:
    """Makes constants and nodes with names of their own."""

    def __init__(self, model: Model, view: WeightView, spool: Spool) -> None:
        self._model = model
        self._name = view.name
        self._dtype = np.dtype(view.holder.dtype)
        self._spool = spool

    def constant(self, value: Array, name: str = "") -> gs.Constant:
        """A new constant, called after a weight; by default after the first."""
        held = np.ascontiguousarray(value, self._dtype)
        onnx_type = helper.np_dtype_to_tensor_dtype(self._dtype)
        lazy = spooled(held.tobytes(), onnx_type, held.shape, self._spool)
        return gs.Constant(self._model.unique_name(f"{name or self._name}{THIN}"), lazy)

    def node(self, op: str, like: gs.Node, attrs: dict[str, Any], inputs: list[gs.Tensor]) -> gs.Tensor:
        """A new node before `like`; its output."""
        output = Variable(self._model.unique_name(f"{like.outputs[0].name}{THIN}"))
        name = self._model.unique_name(f"{like.name or like.outputs[0].name}{THIN}")
        self._model.graph.nodes.append(Node(op, name, attrs, inputs, [output]))
        return output

    def no_bias(self, rank: int) -> list[gs.Tensor]:
        """The third input of a Gemm without one, which it must have before opset 11."""
        return [] if self._model.opset >= 11 else [self.constant(np.zeros(rank))]


def _put_matrices(
    make: _Maker, reader: gs.Node, place: int, factors: tuple[gs.Constant, gs.Constant], between: dict[int, gs.Tensor]
) -> None:
    """Split a node that reads the product of two constants.

    Args:
        make: Makes what is new.
        reader: The node; it keeps its outputs.
        place: At which input its weight is.
        factors: The one that is multiplied with the other input, and the one that follows.
        between: Results of nodes with `first`, by the id of what they read; more are added.
    """
    (first, second), data = factors, reader.inputs[1 - place]
    if id(data) not in between:
        inputs = [data, first] if place else [first, data]
        if reader.op == "Gemm":
            rank = first.shape[0 if reader.attrs.get("transB", 0) else 1]
            inputs += make.no_bias(rank)
        attrs = {name: value for name, value in reader.attrs.items() if name in {"transA", "transB", "axis"}}
        between[id(data)] = make.node(reader.op, reader, attrs, inputs)
    reader.attrs.pop("transA", None)
    if reader.op == "Gather":
        reader.op, reader.attrs = "MatMul", {}
        place = 1
    reader.inputs[place], reader.inputs[1 - place] = second, between[id(data)]


def _put_convs(make: _Maker, reader: gs.Node, factors: ConvFactors, weights: list[gs.Constant]) -> None:
    """Put a chain in the place of a Conv, which becomes the last one of it."""
    *most, last = factors.attributes(reader.attrs)
    data = reader.inputs[0]
    for attrs, weight in zip(most, weights, strict=False):
        data = make.node("Conv", reader, attrs, [data, weight])
    reader.inputs[0], reader.inputs[1] = data, weights[-1]
    reader.attrs = last
