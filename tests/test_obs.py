"""Pruning with compensation: which weights go, and what becomes of those that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcomp_passes._obs import DAMPING, REFIT_ERROR, compensated
from onnxcomp_passes._pruning import Pattern, lowest
from tests.models import random_weights

Array = np.ndarray[Any, Any]


def related_inputs(rows: int, inputs: int, *, seed: int = 0, draw: int = 0) -> Array:
    """Inputs that a third as many causes make, and noise; `draw` gives other rows of the same kind."""
    causes = random_weights(inputs // 3, inputs, seed=seed)
    return random_weights(rows, inputs // 3, seed=draw + 7) @ causes + 0.3 * random_weights(rows, inputs, seed=draw + 8)


def products_of(inputs: Array, other: Array | None = None) -> Array:
    return (inputs.astype(np.float64).T @ (inputs if other is None else other) / len(inputs))[None]


def error(inputs: Array, one: Array, other: Array) -> float:
    return float(np.linalg.norm(inputs @ one - inputs @ other) / np.linalg.norm(inputs @ other))


def test_what_stays_is_the_least_squares_solution_for_its_mask():
    matrix, products = random_weights(24, 10), products_of(related_inputs(200, 24))

    pruned = compensated(matrix[None], products, products, 0.6)

    assert pruned is not None
    norms = np.sqrt(np.diag(products[0]))[:, None]
    hessian = products[0] / (norms * norms.T) + DAMPING * np.eye(24)
    target = hessian @ (norms * matrix)
    for column, found in enumerate((norms * pruned[0]).T):
        kept = np.flatnonzero(found)
        part, wanted = hessian[np.ix_(kept, kept)], target[kept, column]
        off = found[kept] - np.linalg.solve(part, wanted)
        # A residual r leaves r^T H^-1 r of the loss, and no eigenvalue of H is less than the damping.
        assert off @ part @ off <= REFIT_ERROR**2 * (wanted @ wanted) / DAMPING


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_as_many_weights_go_as_asked(share: float):
    matrices, inputs = random_weights(3, 12, 5), related_inputs(100, 12)
    products = np.concatenate([products_of(inputs)] * 3)

    pruned = compensated(matrices, products, products, share)

    assert pruned is not None
    assert np.count_nonzero(pruned == 0) == round(share * matrices.size)


@pytest.mark.parametrize(("pattern", "inputs"), [("2:4", 24), ("1:4", 24), ("4:8", 24), ("2:4", 26)])
def test_a_pattern_holds_in_each_group_along_the_inputs(pattern: str, inputs: int):
    parsed = Pattern.parse(pattern)
    assert parsed is not None
    products = products_of(related_inputs(100, inputs))

    pruned = compensated(random_weights(1, inputs, 6), products, products, parsed)

    assert pruned is not None
    for start in range(0, inputs, parsed.group):
        assert (np.count_nonzero(pruned[0, start : start + parsed.group], axis=0) <= parsed.kept).all()


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_it_loses_less_than_magnitude_and_input_norms_do_on_other_data(share: float):
    matrix = random_weights(48, 32)
    products, held_out = products_of(related_inputs(400, 48)), related_inputs(400, 48, draw=50)

    pruned = compensated(matrix[None], products, products, share)

    assert pruned is not None
    norms = np.sqrt(np.diag(products[0]))[:, None]
    rivals = [np.where(lowest(np.abs(s), round(share * s.size)), 0, matrix) for s in (matrix, matrix * norms)]
    assert error(held_out, pruned[0], matrix) < 0.8 * min(error(held_out, rival, matrix) for rival in rivals)


def test_outputs_are_restored_from_inputs_that_have_changed():
    matrix, original = random_weights(24, 10), related_inputs(300, 24)
    now = original * np.linspace(0.4, 1.6, 24, dtype=np.float32)  # what another layer made of them

    products, cross = products_of(now), products_of(now, original)
    fitted, unaware = (compensated(matrix[None], products, c, 0.5) for c in (cross, products))

    assert fitted is not None
    assert unaware is not None
    wanted = original @ matrix
    losses = [np.linalg.norm(now @ found[0] - wanted) / np.linalg.norm(wanted) for found in (fitted, unaware)]
    assert losses[0] < 0.7 * losses[1]


def test_groups_compete_for_the_weights_that_stay():
    loud, quiet = products_of(10 * random_weights(200, 8)), products_of(0.1 * random_weights(200, 8))
    products = np.concatenate([loud, quiet])

    pruned = compensated(random_weights(2, 8, 4), products, products, 0.5)

    assert pruned is not None
    assert np.count_nonzero(pruned[0]) == 32
    assert not pruned[1].any()


def test_weights_of_inputs_that_are_never_there_go():
    inputs = related_inputs(100, 12)
    inputs[:, 3] = 0
    products = products_of(inputs)

    pruned = compensated(random_weights(1, 12, 5), products, products, 0.3)

    assert pruned is not None
    assert not pruned[0, 3].any()


def test_inputs_that_earlier_layers_lost_do_not_blow_up_what_stays():
    original = related_inputs(100, 12)
    now = original.copy()
    now[:, :4] = 1e-12
    matrix = random_weights(1, 12, 5)

    pruned = compensated(matrix, products_of(now), products_of(now, original), 0.2)

    assert pruned is not None
    assert np.abs(pruned).max() < 20 * np.abs(matrix).max()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_products_that_say_nothing_are_refused(value: float):
    products = np.full((1, 4, 4), value)

    assert compensated(random_weights(1, 4, 2), products, products, 0.5) is None


def test_products_that_no_inputs_have_are_refused():
    products = np.eye(4)[None].copy()
    products[0, 0, 1] = products[0, 1, 0] = -3

    assert compensated(random_weights(1, 4, 2), products, products, 0.5) is None


@pytest.mark.parametrize("share", [0.55, 0.7])
def test_zeros_of_an_earlier_run_stay_though_others_would_suit_changed_inputs_better(share: float):
    rng = np.random.default_rng(3)
    original = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    now = original * (rng.random((1, 12)) < 0.7) + 0.3 * rng.normal(size=original.shape)
    weight = rng.normal(size=(12, 6)).astype(np.float32)
    zeros = rng.random((12, 6)) < 0.5
    weight[zeros] = 0

    found = compensated(weight[None], (now.T @ now / 300)[None], (now.T @ original / 300)[None], share)

    assert found is not None
    assert np.any(found[0][~zeros] != weight[~zeros])  # the others were refitted
    assert not found[0][zeros].any()
