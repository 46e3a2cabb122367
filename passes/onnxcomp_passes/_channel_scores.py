"""In which order the units of a group of channels go, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp_passes._channels_groups import Group
from onnxcomp_passes._pruning import as_matrices
from onnxcomp_passes._views import WeightView
from onnxcomp_passes._windows import Moments

__all__ = ["Consumer", "Order", "compensated_rows", "consumers_of", "order_units"]

Array = np.ndarray[Any, Any]

DAMPING = 0.01
"""Added to the diagonal of the products, as a share of its mean: as in GPTQ and SparseGPT."""

STEPS = 64
"""Rounds in which the units of a group are ordered: of more units several go at once."""

MAX_INPUTS = 4608
"""Inputs of a layer up to which the inverse of its products is kept: 170 MB, and seconds for each round."""


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the units of a group.

    Attributes:
        view: Its weight.
        rows: The rows of its matrix that read each unit, shape (units, rows a unit).
        matrix: The weight, shape (inputs, outputs), float64.
        products: X^T X of its inputs with a last column of ones, by the number of rows; None: not known.
    """

    view: WeightView
    rows: Array
    matrix: Array
    products: Array | None


@dataclass(frozen=True)
class Order:
    """The units of one group as they go.

    Attributes:
        units: Those that matter least first.
        errors: What the first 0, 1, 2, ... of them cost: squared error over energy of what the consumers compute.
    """

    units: Array
    errors: Array


def consumers_of(
    group: Group, views: Mapping[tuple[str, int], WeightView], products: Mapping[str, Moments]
) -> list[Consumer] | None:
    """The layers that read a group, or None where one is no plain Conv, Gemm or MatMul.

    Args:
        group: The group.
        views: Weights by the first output of their operator and the index of the input.
        products: Moments of the inputs, by weight name.
    """
    found = []
    for slot in group.consumers:
        view = views.get((slot.node, slot.index))
        if view is None or view.node.op not in {"Conv", "Gemm", "MatMul"} or slot.index != 1:
            return None
        if int(view.node.attrs.get("group", 1)) != 1 or (view.node.op != "Conv" and len(view.shape) != 2):
            return None
        matrix = as_matrices(view, view.read())[0].astype(np.float64)
        each = matrix.shape[0] // view.shape[slot.axis]
        rows = (slot.entries[:, :, None] * each + np.arange(each)).reshape(len(slot.entries), -1)
        known = products.get(view.name)
        found.append(Consumer(view, rows, matrix, None if known is None else _with_means(known)))
    return found or None


def _with_means(moments: Moments) -> Array:
    """X^T X of inputs with a 1 behind each."""
    means = moments.means[0][:, None]
    return np.block([[moments.products[0], means], [means.T, np.ones((1, 1))]])


def order_units(group: Group, consumers: Sequence[Consumer], criterion: str, producers: Sequence[Array]) -> Order:
    """The order in which the units of a group should go.

    Args:
        group: The group.
        consumers: Who reads it.
        criterion: As the pass names it.
        producers: What makes each unit in each producer, shape (units, weights).
    """
    if criterion == "output" and all(c.products is not None and len(c.matrix) <= MAX_INPUTS for c in consumers):
        return _by_output(group.units, consumers)
    scores = _SCORES.get(criterion, _norms)(consumers, producers)
    units = np.argsort(scores, kind="stable")
    squares = np.square(scores[units])
    return Order(units, np.concatenate([[0.0], np.cumsum(squares) / max(float(squares.sum()), 1e-300)]))


# --- by what the outputs lose -----------------------------------------------------------------------------------------


def _by_output(units: int, consumers: Sequence[Consumer]) -> Order:
    """Greedy: the unit goes whose loss, once all others make up for it, is least.

    Hassibi & Stork 1992, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", with all weights of a
    unit removed at once, as in Kurtic et al. 2023, "ZipLM", arXiv 2302.04089, section 3.
    """
    states = [_State.of(consumer) for consumer in consumers]
    alive = np.ones(units, bool)
    order: list[int] = []
    errors = [0.0]
    step = -(-units // STEPS)
    while alive.any():
        left = np.flatnonzero(alive)
        scores = np.sum([state.losses(left) for state in states], axis=0)
        goes = left[np.argsort(scores, kind="stable")[:step]]
        lost = sum(state.remove(goes) for state in states)
        alive[goes] = False
        order += goes.tolist()
        errors += [errors[-1] + lost * (count + 1) / len(goes) for count in range(len(goes))]
    return Order(np.array(order), np.maximum.accumulate(errors))


@dataclass
class _State:
    """One consumer while units are taken from it."""

    rows: Array
    weight: Array
    inverse: Array
    energy: float

    @staticmethod
    def of(consumer: Consumer) -> _State:
        """Before any has gone."""
        assert consumer.products is not None
        weight = np.concatenate([consumer.matrix, np.zeros((1, consumer.matrix.shape[1]))])
        products = consumer.products
        mean = products[-1:, :-1]
        varying = products[:-1, :-1] - mean.T @ mean
        energy = float(np.sum(consumer.matrix * (varying @ consumer.matrix)))
        return _State(consumer.rows, weight, np.linalg.inv(damped(products)), max(energy, 1e-300))

    def losses(self, units: Array) -> Array:
        """What each unit alone costs now."""
        rows = self.rows[units]
        inner = np.linalg.inv(self.inverse[rows[:, :, None], rows[:, None, :]])
        weight = self.weight[rows]
        return np.asarray(np.einsum("uro,urs,uso->u", weight, inner, weight, optimize=True) / self.energy)

    def remove(self, units: Array) -> float:
        """Take units out; what that costs."""
        rows = self.rows[units].reshape(-1)
        inner = np.linalg.inv(self.inverse[np.ix_(rows, rows)])
        weight = self.weight[rows]
        lost = float(np.sum(weight * (inner @ weight)) / self.energy)
        spread = self.inverse[:, rows] @ inner
        self.weight -= spread @ weight
        self.inverse -= spread @ self.inverse[rows]
        self.weight[rows] = 0
        self.inverse[rows], self.inverse[:, rows] = 0, 0
        self.inverse[rows, rows] = 1.0
        return max(lost, 0.0)


def damped(products: Array) -> Array:
    """Products with a diagonal that makes them safe to invert."""
    return products + np.eye(len(products)) * DAMPING * float(np.mean(np.diag(products)))


def compensated_rows(consumer: Consumer, units: Array) -> tuple[Array, Array]:
    """A consumer's matrix without some units, the others made to stand in for them by least squares.

    Returns:
        The matrix, with rows of zeros; and what is added to the bias.
    """
    gone = np.zeros(len(consumer.matrix) + 1, bool)
    gone[consumer.rows[units].reshape(-1)] = True
    matrix = np.where(gone[:-1, None], 0.0, consumer.matrix)
    if consumer.products is None:
        return matrix, np.zeros(matrix.shape[1])
    products = damped(consumer.products)
    shift = np.linalg.solve(products[~gone][:, ~gone], consumer.products[~gone][:, gone] @ consumer.matrix[gone[:-1]])
    matrix[~gone[:-1]] += shift[:-1]
    return matrix, shift[-1]


# --- by weights and activations ---------------------------------------------------------------------------------------


def _norms(consumers: Sequence[Consumer], producers: Sequence[Array]) -> Array:
    """Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, with the L2 norm."""
    return _summed([np.linalg.norm(weights, axis=1) for weights in producers])


def _sums(consumers: Sequence[Consumer], producers: Sequence[Array]) -> Array:
    """Li et al. 2017, section 3.1: the L1 norm."""
    return _summed([np.abs(weights).sum(axis=1) for weights in producers])


def _distances(consumers: Sequence[Consumer], producers: Sequence[Array]) -> Array:
    """He et al. 2019, "Filter Pruning via Geometric Median", arXiv 1811.00250: how far from all others."""
    found = []
    for weights in producers:
        squares = np.sum(np.square(weights), axis=1)
        gaps = squares[:, None] + squares[None, :] - 2 * weights @ weights.T
        found.append(np.sqrt(np.maximum(gaps, 0)).sum(axis=1))
    return _summed(found)


def _energies(consumers: Sequence[Consumer], producers: Sequence[Array]) -> Array:
    """Root mean square of the unit's activations, as its consumers read them."""
    known = [(consumer.products, consumer.rows) for consumer in consumers if consumer.products is not None]
    found = [np.sqrt(np.maximum(np.diag(products)[rows], 0).sum(axis=1)) for products, rows in known]
    return _summed(found) if found else _norms(consumers, producers)


def _summed(parts: Sequence[Array]) -> Array:
    """Scores of several layers, each with a mean of 1."""
    return np.asarray(np.sum([part / max(float(part.mean()), 1e-300) for part in parts], axis=0))


_SCORES = {"l1": _sums, "l2": _norms, "median": _distances, "activation": _energies}
