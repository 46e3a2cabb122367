"""How sparse each layer may be: measured layer by layer, and chosen together within the accuracy budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Table
from onnxcomp_passes._search import BUDGET_USED, OUT_OF_TIME, last_that_holds, most_worth_ranking
from onnxcomp_passes._views import WeightView

__all__ = ["choose_shares"]

Array = np.ndarray[Any, Any]
Shares = dict[str, float]
Build = Callable[[Mapping[str, float]], Model]

MEASURED = (0.5, 0.75, 0.9)
"""Shares of zeros at which each layer is measured alone."""

GRID = np.round(np.arange(0, 0.96, 0.05), 2)
"""Shares that are chosen from."""

FEWEST = 0.3
"""The least share of those that pays."""

MASK = 0.25
"""Zeros that pay for telling where they are: a bit a weight, beside codes of 4 bits. Fewer would only cost accuracy."""

PRICES = 96
"""Allocations along the trade of error for zeros, from none to all."""

MARGIN = 0.9
"""The share of its budget that is spent on the samples that choices are made on: others lose a little more."""

TINY = 1e-12

NOT_MEASURED = "was not measured: so many weights are larger"


@dataclass(frozen=True)
class _Layer:
    """What one layer's zeros cost: squared errors of the whole model at each share of `GRID`."""

    elements: int
    costs: Array

    def best(self, price: float) -> float:
        """The share with the least of cost minus price times the zeros that pay."""
        return float(GRID[int(np.argmin(self.costs - price * self.elements * np.maximum(0.0, GRID - MASK)))])


def choose_shares(
    views: Sequence[WeightView], build: Build, context: Context, changes: Changes, remember: Callable[[Model], None]
) -> Shares:
    """The shares of zeros, by weight, that remove most weights within the budget.

    Each layer's error is measured alone at a few shares; errors of layers are taken to add up as squares. Every price
    of a zero then gives one allocation, and the sparsest that the judge allows for the whole model is found by
    bisection. Where not even the model as it is, or that with the fewest zeros in its best layer, is allowed, no more
    is measured.

    Args:
        views: The weights.
        build: The model with such shares of zeros; weights not named stay as they are.
        context: Its judge measures.
        changes: Gets the table of accuracy against sparsity, and why weights stay.
        remember: Called with each whole model that holds, the chosen one last.

    Returns:
        Weight -> share; weights that stay are left out.
    """
    assert context.judge is not None
    if not _fits(build({}), context):
        for view in views:
            changes.leave(view.label, BUDGET_USED)
        return {}
    measured, chosen = _measured(views, build, context), Shares()
    complete = {name: errors for name, errors in measured.items() if len(errors) == len(MEASURED)}
    if complete:
        elements = {view.name: int(np.prod(view.shape)) for view in views}
        base = context.judge.rough_error(build({}))
        layers = {name: _Layer(elements[name], _costs(errors, base)) for name, errors in complete.items()}
        chosen = _sparsest(list(_allocations(layers)), build, context, remember)
    late = context.out_of_time()
    for view in views:
        if view.name not in chosen:
            why = "no share of zeros pays within the budget" if view.name in measured else NOT_MEASURED
            changes.leave(view.label, OUT_OF_TIME if late else why)
    changes.tables.append(_table(views, measured, chosen))
    return chosen


def _table(views: Sequence[WeightView], measured: Mapping[str, list[float]], chosen: Shares) -> Table:
    columns = ("weight", "weights", *(f"error at {share:.0%}" for share in MEASURED), "zeros chosen")
    table = Table("accuracy against sparsity, each weight alone", columns, [])
    known = {view.name: view for view in views}
    for name, errors in measured.items():
        cells = [*errors, *[None] * (len(MEASURED) - len(errors))]
        table.rows.append((known[name].label, int(np.prod(known[name].shape)), *cells, chosen.get(name, 0.0)))
    return table


def _measured(views: Sequence[WeightView], build: Build, context: Context) -> dict[str, list[float]]:
    """The errors of layers alone at the shares of `MEASURED`; at the first only, where nothing holds."""
    judge = context.judge
    assert judge is not None
    elements = {view.name: int(np.prod(view.shape)) for view in views}
    base = judge.rough_error(build({}))
    measured: dict[str, list[float]] = {}
    for name in most_worth_ranking(elements, context):
        context.progress(f"measuring how sparse {name} may be")
        measured[name] = [_alone(judge, build, name, MEASURED[0])]
    if not measured or context.out_of_time():
        return measured
    added = {name: np.nan_to_num(max(0.0, errors[0] ** 2 - base**2), nan=np.inf) for name, errors in measured.items()}
    best = min(measured, key=lambda name: float(added[name]) / elements[name])
    if not _fits(build({best: FEWEST}), context):
        return measured
    for name in most_worth_ranking({name: elements[name] for name in measured}, context):
        context.progress(f"measuring how much sparser {name} may be")
        measured[name] += [_alone(judge, build, name, share) for share in MEASURED[1:]]
    return measured


def _fits(model: Model, context: Context) -> bool:
    """Whether the judge allows a model, which is then forgotten."""
    judge = context.judge
    assert judge is not None
    fits = judge.allows(judge.quality(model), MARGIN * context.share)
    judge.forget(model)
    return fits


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


def _sparsest(options: list[Shares], build: Build, context: Context, remember: Callable[[Model], None]) -> Shares:
    """The last of the options that holds, by bisection; none where not even the first does."""

    def holds(option: Shares) -> bool:
        model = build(option)
        fits = _fits(model, context)
        if fits:
            remember(model)
        return fits

    return last_that_holds(options, holds, context) or {}
