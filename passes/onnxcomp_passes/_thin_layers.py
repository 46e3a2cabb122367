"""Which weights of a graph can become products of thin ones, and which of them are factored together."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes._factor_chains import FACTOR, WEIGHT_AT, Merged, is_factor
from onnxcomp_passes._pruning import as_matrices, from_matrices
from onnxcomp_passes._shapes import KnownTensors, infer_known
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._views import WeightView, find_views, wanted_views

__all__ = ["Part", "Unit", "find_units", "units_named"]

Array = np.ndarray[Any, Any]

HELD_OTHERWISE = {
    "qdq": "its weight is behind a DequantizeLinear: factors are found before quantize",
    "integer": "its weight is multiplied as integers: factors are found before quantize-dynamic",
    "stored": "is stored as integers: factors are found before quantize-weights",
    "float16": "is stored as float16: factors are found before that",
}


@dataclass(frozen=True)
class Part:
    """One weight and the nodes that read it, which all do the same with it.

    Attributes:
        view: The weight.
        readers: At least one.
        merged: The factors that it was merged from; None where it is whole in the model given to the pass.
    """

    view: WeightView
    readers: tuple[gs.Node, ...]
    merged: Merged | None = None

    def matrices(self) -> Array:
        """The weight, float32 of shape (groups, inputs, outputs); the groups are a Conv's, or a MatMul's batches."""
        value = self.view.read()
        if self.view.node.op == "Conv":
            return as_matrices(self.view, value)
        stacked = value.reshape(-1, *value.shape[-2:])
        return stacked.swapaxes(1, 2) if self._is_turned else stacked

    def laid_out(self, matrices: Array) -> Array:
        """Matrices, of any inputs and outputs, as the operator (which is no Conv) reads its weight."""
        stacked = matrices.swapaxes(1, 2) if self._is_turned else matrices
        return stacked.reshape(*self.view.shape[:-2], *stacked.shape[1:])

    def weights(self, matrices: Array) -> Array:
        """The inverse of `matrices`."""
        return from_matrices(self.view, matrices) if self.view.node.op == "Conv" else self.laid_out(matrices)

    @property
    def is_batched(self) -> bool:
        """Whether the weight is a stack of matrices."""
        return self.view.node.op == "MatMul" and len(self.view.shape) > 2

    @property
    def _is_turned(self) -> bool:
        """Whether the weight has a row for each output."""
        node = self.view.node
        return bool(node.attrs.get("transB", 0)) if node.op == "Gemm" else node.op == "MatMul" and self.view.index == 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The shape of `matrices`."""
        shape, node = self.view.shape, self.view.node
        if node.op == "Conv":
            groups = int(node.attrs.get("group", 1))
            return groups, math.prod(shape[1:]), shape[0] // groups
        rows, columns = shape[-2:]
        return math.prod(shape[:-2]), *((columns, rows) if self._is_turned else (rows, columns))


@dataclass(frozen=True)
class Unit:
    """Weights that are factored together: one, or several that one tensor is multiplied with.

    Several have the first factor in common: [W1 W2] = A [B1 B2].
    """

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The names of the weights."""
        return "+".join(part.view.name for part in self.parts)

    @property
    def first(self) -> str:
        """The name of the first weight."""
        return self.parts[0].view.name

    @property
    def node(self) -> gs.Node:
        """The first node."""
        return self.parts[0].view.node

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs, of all parts side by side."""
        groups, inputs, _ = self.parts[0].sizes
        return groups, inputs, sum(part.sizes[2] for part in self.parts)

    @property
    def present(self) -> Thin | None:
        """What the unit is already in the model given to the pass; None: whole weights."""
        merged = self.parts[0].merged
        return merged.thin if merged else None

    @property
    def elements(self) -> int:
        """How many weights there are in the model given to the pass."""
        return self.present.parameters(self) if self.present else math.prod(self.sizes)

    def matrices(self) -> Array:
        """All weights side by side, shape `sizes`."""
        return np.concatenate([part.matrices() for part in self.parts], axis=2)

    def shares(self, outputs: Array) -> list[Array]:
        """What belongs to each part of something with all outputs along its last axis."""
        ends = np.cumsum([part.sizes[2] for part in self.parts])
        return np.split(outputs, ends[:-1], axis=-1)


def find_units(
    model: Model,
    context: Context,
    changes: Changes,
    wanted: Callable[[WeightView], bool] = lambda _: True,
    *,
    least: int = 1,
    merged: Mapping[str, Merged] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> list[Unit]:
    """Every weight that may be factored, in the order of the graph; MatMuls and Gemms of one input together.

    Of merged weights those are together that had their first factor in common.

    Args:
        model: Its constants are lifted.
        context: For what the user excludes.
        changes: Gets the reasons for the weights that are left.
        wanted: Whether the user wants a weight factored.
        least: Weights with fewer elements are left.
        merged: What weights were merged from, by their names.
        reasons: Why factors could not be merged, by their names.
    """
    merged, reasons = merged or {}, reasons or {}
    main = {id(node) for node in model.graph.nodes}
    units: list[Unit] = []
    by_input: dict[tuple[Any, ...], int] = {}
    views = wanted_views(model, context, changes, min_elements=least)
    known = infer_known(model) if any(view.node.op == "MatMul" and len(view.shape) > 2 for view in views) else {}
    for view in views:
        part, why = _part(view, main, known) if wanted(view) else (None, "excluded")
        if part is None:
            changes.leave(view.label, reasons.get(view.name, why) if why == FACTOR else why)
            continue
        part = replace(part, merged=merged.get(view.name))
        key = _shared_input(part)
        if key is not None and key in by_input:
            place = by_input[key]
            units[place] = replace(units[place], parts=(*units[place].parts, part))
            continue
        if key is not None:
            by_input[key] = len(units)
        units.append(Unit((part,)))
    return units


def units_named(model: Model, units: Sequence[Unit]) -> dict[str, Unit]:
    """The same units in a copy of their model, by name."""
    views = {view.name: view for view in find_views(model)}
    found = {}
    for unit in units:
        pairs = ((part, views[part.view.name]) for part in unit.parts)
        found[unit.name] = Unit(tuple(replace(part, view=view, readers=_readers(view)) for part, view in pairs))
    return found


def _readers(view: WeightView) -> tuple[gs.Node, ...]:
    return tuple({id(node): node for node in view.holder.outputs}.values())


def _part(view: WeightView, main: Container[int], known: KnownTensors) -> tuple[Part | None, str]:
    """The part that a weight is; or why it can be none."""
    node, readers = view.node, _readers(view)
    if view.form != "float":
        return None, HELD_OTHERWISE[view.form]
    if node.domain or view.index not in WEIGHT_AT.get(node.op, ()):
        return None, f"input {view.index} of a {node.op} cannot be split in two"
    if len(view.shape) < 2 or (node.op in {"Gemm", "Gather"} and len(view.shape) != 2):
        return None, "is no matrix"
    if any(id(reader) not in main for reader in readers):
        return None, "is also read in a body of If, Loop or Scan"
    if any(_use(reader, view.holder) != _use(node, view.holder) for reader in readers):
        return None, "is read in several ways"
    if node.op == "Gather" and int(node.attrs.get("axis", 0)) not in {0, -2}:
        return None, "is not read row by row"
    others = [reader.inputs[1 - view.index] for reader in readers]
    if node.op != "Gather" and any(isinstance(tensor, gs.Constant) for tensor in others):
        return None, "is multiplied with a constant"
    if node.op == "MatMul" and len(view.shape) > 2 and not all(_is_matrix(tensor, known) for tensor in others):
        return None, "is a stack of matrices, and multiplied with what may be a vector"
    if any(is_factor(reader) for reader in readers):
        return None, FACTOR
    part = Part(view, readers)
    if min(part.sizes[1:]) < 2:
        return None, "is no thicker than rank 1"
    if not np.isfinite(view.read()).all():
        return None, "has values that are not finite"
    return part, ""


def _is_matrix(tensor: gs.Tensor, known: KnownTensors) -> bool:
    """Whether a tensor is known to be no vector, whose product with a stack of matrices has no rows."""
    dims = known[id(tensor)][1].dims if id(tensor) in known else None
    return dims is not None and len(dims) > 1


def _use(node: gs.Node, holder: gs.Constant) -> tuple[Any, ...]:
    """What a node does with a weight, as far as factors of it have to be laid out for that."""
    places = tuple(index for index, tensor in enumerate(node.inputs) if tensor is holder)
    names = {"Gemm": ("transA", "transB"), "Gather": ("axis",), "Conv": tuple(sorted(node.attrs))}.get(node.op, ())
    return node.op, node.domain, places, *(str(node.attrs.get(name)) for name in names)


def _shared_input(part: Part) -> tuple[Any, ...] | None:
    """What parts must have in common to be factored together; None where that cannot be."""
    node = part.view.node
    if part.merged is not None:
        return ("merged", part.merged.shared) if part.merged.shared else None
    if len(part.readers) != 1 or part.is_batched:
        return None
    if node.op == "Gemm" and part.view.index == 1 and not isinstance(node.inputs[0], gs.Constant):
        return node.op, id(node.inputs[0]), int(node.attrs.get("transA", 0)), part.view.holder.dtype
    if node.op == "MatMul" and part.view.index == 1:
        return node.op, id(node.inputs[0]), part.view.holder.dtype
    return None
