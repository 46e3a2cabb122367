"""How sparse each layer may be: measured layer by layer, and chosen together within the accuracy budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Table
from onnxcomp_passes._choice import most_worth_ranking
from onnxcomp_passes._views import WeightView

__all__ = ["choose_shares"]

Array = np.ndarray[Any, Any]
Shares = dict[str, float]
Build = Callable[[Mapping[str, float]], Model]

MEASURED = (0.5, 0.75, 0.9)
"""Shares of zeros at which each layer is measured alone."""

GRID = np.round(np.arange(0, 0.96, 0.05), 2)
"""Shares that are chosen from."""

MASK = 0.25
"""Zeros that pay for telling where they are: a bit a weight, beside codes of 4 bits. Fewer would only cost accuracy."""

PRICES = 96
"""Allocations along the trade of error for zeros, from none to all."""

MARGIN = 0.9
"""The share of its budget that is spent on the samples that choices are made on: others lose a little more."""

TINY = 1e-12


@dataclass(frozen=True)
class _Layer:
    """What one layer's zeros cost: squared errors of the whole model at each share of `GRID`."""

    elements: int
    costs: Array

    def best(self, price: float) -> float:
        """The share with the least of cost minus price times the zeros that pay."""
        return float(GRID[int(np.argmin(self.costs - price * self.elements * np.maximum(0.0, GRID - MASK)))])


def choose_shares(views: Sequence[WeightView], build: Build, context: Context, changes: Changes) -> Shares:
    """The shares of zeros, by weight, that remove most weights within the budget.

    Each layer's error is measured alone at a few shares; errors of layers are taken to add up as squares. Every price
    of a zero then gives one allocation, and the sparsest that the judge allows for the whole model is found by
    bisection.

    Args:
        views: The weights.
        build: The model with such shares of zeros; weights not named stay as they are.
        context: Its judge measures.
        changes: Gets the table of accuracy against sparsity.

    Returns:
        Weight -> share; weights that stay are left out.
    """
    assert context.judge is not None
    judge = context.judge
    elements = {view.name: int(np.prod(view.shape)) for view in views}
    labels = {view.name: view.label for view in views}
    base = judge.rough_error(build({}))
    measured: dict[str, list[float]] = {}
    for name in most_worth_ranking(elements, context):
        context.progress(f"measuring how sparse {name} may be")
        measured[name] = [_alone(judge, build, name, share) for share in MEASURED]
    if not measured:
        return {}
    layers = {name: _Layer(elements[name], _costs(errors, base)) for name, errors in measured.items()}
    chosen = _sparsest(list(_allocations(layers)), build, judge, context)
    columns = ("weight", "weights", *(f"error at {share:.0%}" for share in MEASURED), "zeros chosen")
    table = Table("accuracy against sparsity, each weight alone", columns, [])
    for name, errors in measured.items():
        table.rows.append((labels[name], elements[name], *errors, chosen.get(name, 0.0)))
    changes.tables.append(table)
    return chosen


def _alone(judge: Judge, build: Build, name: str, share: float) -> float:
    model = build({name: share})
    error = judge.rough_error(model)
    judge.forget(model)
    return error


def _costs(errors: list[float], base: float) -> Array:
    """The squared error that a layer adds at each share of the grid: log-linear between what was measured."""
    squares = np.maximum(np.square(np.nan_to_num(errors, nan=1e3, posinf=1e3)) - base**2, TINY)
    squares = np.maximum.accumulate(squares)
    logs = np.log(squares)
    slopes = np.diff(logs) / np.diff(MEASURED)
    found = np.interp(GRID, MEASURED, logs)
    found = np.where(MEASURED[0] > GRID, logs[0] + slopes[0] * (GRID - MEASURED[0]), found)
    found = np.where(MEASURED[-1] < GRID, logs[-1] + slopes[-1] * (GRID - MEASURED[-1]), found)
    costs = np.exp(found)
    costs[0] = 0.0
    return np.asarray(costs)


def _allocations(layers: Mapping[str, _Layer]) -> list[Shares]:
    """Allocations from few zeros to many, each once."""
    steps = np.concatenate([np.diff(layer.costs) / (layer.elements * np.diff(GRID)) for layer in layers.values()])
    steps = steps[steps > 0]
    prices = np.geomspace(steps.min() / 2, steps.max() * 2, PRICES)
    allocations: list[Shares] = []
    for price in prices:
        shares = {name: share for name, layer in layers.items() if (share := layer.best(float(price)))}
        if shares and (not allocations or shares != allocations[-1]):
            allocations.append(shares)
    return allocations


def _sparsest(options: list[Shares], build: Build, judge: Judge, context: Context) -> Shares:
    """The last of the options that holds, by bisection; none where not even the first does."""
    share = MARGIN * context.share

    def holds(index: int) -> bool:
        model = build(options[index])
        fits = judge.allows(judge.quality(model), share)
        judge.forget(model)
        return fits

    low, high = -1, len(options)
    while high - low > 1 and not context.out_of_time():
        middle = (low + high) // 2
        context.progress(f"pruning, allocation {middle + 1} of {len(options)}")
        low, high = (middle, high) if holds(middle) else (low, middle)
    return options[low] if low >= 0 else {}
