"""Finding the factors of weights, one layer after the other, each by what the layers before it give by then."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp.weights import Spool
from onnxcomp_passes._conv_factors import ConvFactors, factor, factor_shapes
from onnxcomp_passes._pruner import bias_of
from onnxcomp_passes._reduced_rank import Goal
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_graph import Factors, MatrixFactors, put_factors
from onnxcomp_passes._thin_layers import Unit, units_named
from onnxcomp_passes._windows import Moments, gather_products, inputs_of

__all__ = ["Found", "Solved", "Splitter", "fitted"]

Array = np.ndarray[Any, Any]

MOST_PASSES = 6
"""Passes over the data for one model: neighbours are fitted on the same pass where there are more layers. As many for a
model that is only tried: what was judged is what comes out."""


@dataclass(frozen=True)
class Found:
    """Factors of a unit.

    Attributes:
        factors: They.
        missed: The share of the energy of the layer's output that they miss, on calibration data.
    """

    factors: Factors
    missed: float


Solved = dict[tuple[str, Thin], ConvFactors]
"""Factors by the weight alone that were found already, by unit and form: some take seconds."""


def fitted(unit: Unit, thin: Thin, goal: Goal, solved: Solved) -> Found:
    """The factors of a unit that come nearest to a goal.

    The singular value forms of matrices are the best there are; of others the last factor is fitted to those before it.

    Args:
        unit: The unit, with the weights that it has in the base.
        thin: What becomes of it.
        goal: What is to be met.
        solved: What is known; more is added.
    """
    if thin.form == "svd":
        first, second = goal.factors(min(*thin.ranks, *unit.sizes[1:]))
        factors: Factors = MatrixFactors(first, second)
        if unit.node.op == "Conv":
            factors = _as_convs(unit, first, second)
        return Found(factors, goal.missed(first @ second))
    part = unit.parts[0]
    key = unit.name, thin
    if key not in solved:
        solved[key] = factor(part.view.read(), part.sizes[0], thin.form, thin.ranks)
    convs = solved[key]
    features = convs.features()
    last = goal.last(features)
    return Found(convs.with_last(last).balanced(), goal.missed(features @ last))


def _as_convs(unit: Unit, first: Array, second: Array) -> ConvFactors:
    """Matrices as weights of Convs."""
    part = unit.parts[0]
    shapes = factor_shapes("svd", part.view.shape, part.sizes[0], (first.shape[2],))
    weights = (matrices.swapaxes(1, 2).reshape(shape) for matrices, shape in zip((first, second), shapes, strict=True))
    return ConvFactors("svd", part.sizes[0], tuple(np.ascontiguousarray(weight, np.float32) for weight in weights))


@dataclass
class Splitter:
    """Factors weights of one model.

    Attributes:
        base: The model.
        units: What may be factored in it.
        moments: What weights are multiplied with, by name; others are factored by themselves alone.
        context: Its data are run again for layers behind others.
        refit: Fit a layer to what it gave in the base; else to what its whole weight would give. Either way from what
            the layers before it give by then.
        solved: Factors by weights alone that were found already.
    """

    base: Model
    units: Sequence[Unit]
    moments: Mapping[str, Moments]
    context: Context
    refit: bool
    solved: Solved = field(default_factory=dict)
    _spool: Spool = field(default_factory=Spool)
    _outputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Know the graph's outputs, and which moments are of use."""
        self._outputs = frozenset(str(tensor.name) for tensor in self.base.graph.outputs)
        self.moments = _finite(self.moments)

    def goal(self, unit: Unit) -> Goal:
        """What the factors of a unit come close to, in the base."""
        moments = self.moments.get(unit.first)
        if moments is not None and self._biases(unit) is not None:
            moments = moments.centred()
        return Goal.of(unit.matrices(), moments)

    def build(self, chosen: Mapping[str, Thin]) -> tuple[Model, dict[str, Found]]:
        """A copy of the model that computes what it would with factors, and these; its graph is that of the base.

        Args:
            chosen: What becomes of units, by name; others stay.
        """
        fork = self.base.fork()
        named = units_named(fork, self.units)
        found: dict[str, Found] = {}
        for number, group in enumerate(self._groups([unit for unit in self.units if unit.name in chosen])):
            moments = dict(self.moments)
            if number:  # before the first, nothing has changed yet
                views = [named[unit.name].parts[0].view for unit in group if unit.first in moments]
                moments |= _finite(gather_products(fork, views, self.context, original=self.base))
            for unit in group:
                self.context.progress(f"factoring {unit.name}")
                found[unit.name] = self._factor(named[unit.name], chosen[unit.name], moments.get(unit.first))
        return fork, found

    def split(self, model: Model, found: Mapping[str, Found]) -> None:
        """Put factors into the graph of what `build` returned (in place)."""
        named = units_named(model, self.units)
        for name, each in found.items():
            put_factors(model, named[name], each.factors, self._spool)

    def move(self, base: Model, gone: Collection[str]) -> None:
        """Work on a model that computes the same and has all units but a few, by name, from now on."""
        self.base = base
        self.units = list(units_named(base, [unit for unit in self.units if unit.name not in gone]).values())

    def _groups(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """Neighbours, down to so many groups; all in one where they need not wait for each other."""
        if not self.moments:
            return [list(units)]
        tensors = inputs_of(self.base, [unit.parts[0].view for unit in units])
        order = list(dict.fromkeys(tensors.values()))
        size = max(1, -(-len(order) // MOST_PASSES))
        groups: list[list[Unit]] = [[]]
        for unit in units:
            tensor = tensors.get(unit.parts[0].view.name)
            place = order.index(tensor) // size if tensor is not None else len(groups) - 1
            groups += [[] for _ in range(place + 1 - len(groups))]
            groups[place].append(unit)
        return groups

    def _factor(self, unit: Unit, thin: Thin, moments: Moments | None) -> Found:
        """Write what a unit's factors amount to, and what they miss in the mean into its biases."""
        before = unit.matrices()
        biases = self._biases(unit) if moments is not None else None
        fits = moments
        if fits is not None and not self.refit:
            fits = replace(fits, cross=fits.products)
        if fits is not None and biases is not None:
            fits = fits.centred()
        found = fitted(unit, thin, Goal.of(before, fits), self.solved)
        after = _matrices(unit, found.factors)
        for part, matrices in zip(unit.parts, unit.shares(after), strict=True):
            value = np.ascontiguousarray(part.weights(matrices), np.float32)
            part.view.write(value, self._spool)
        if moments is not None and biases is not None:
            missing = np.einsum("gi,gio->go", moments.original_means, before, dtype=np.float64)
            missing -= np.einsum("gi,gio->go", moments.means, after, dtype=np.float64)
            for bias, shift in zip(biases, unit.shares(missing), strict=True):
                bias.values = (value_of(bias) + shift.reshape(-1)).astype(np.float32)
        return found

    def _biases(self, unit: Unit) -> list[Any] | None:
        """The constants that are added to the results of each part alone, and to nothing else; None if one has none."""
        biases = [bias_of(part.view, self._outputs) for part in unit.parts if len(part.readers) == 1]
        found = [bias for bias in biases if bias is not None]
        return found if len(found) == len(unit.parts) else None


def _finite(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """Without those of inputs whose squares are too large for float32."""
    return {
        name: each
        for name, each in moments.items()
        if np.isfinite(each.products).all() and np.isfinite(each.cross).all()
    }


def _matrices(unit: Unit, factors: Factors) -> Array:
    if isinstance(factors, MatrixFactors):
        return factors.matrices()
    groups, inputs, outputs = unit.sizes
    return np.ascontiguousarray(factors.dense().reshape(groups, outputs, inputs).swapaxes(1, 2))
