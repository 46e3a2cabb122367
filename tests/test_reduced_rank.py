"""The best weights of a given rank: how near they come, their scales, and numbers that are hard."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp_passes._reduced_rank import EXACT_SIDE, Goal, partial_svd, singular_energies
from onnxcomp_passes._windows import Moments, Products, Window
from tests.models import random_weights

Array = np.ndarray[Any, Any]

EXACT = 1e-9
"""Relative: float64 all the way, but by eigenvalues of squares."""


def structured_rows(count: int, inputs: int, seed: int = 0) -> Array:
    """Rows whose directions vary by very different amounts, about a mean."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    rows = rng.normal(size=(count, inputs)) * np.geomspace(1, 0.02, inputs) @ turned + 0.3
    return np.asarray(rows, np.float32)


def moments_of(rows: Array, original: Array | None = None) -> Moments:
    watch = Products([Window()])
    if original is None:
        watch.update(rows)
    else:
        watch.update(original, rows)
    moments = watch.moments(0)
    assert moments is not None
    return moments


def known(moments: Moments) -> Moments:
    """The same of so many rows that nothing ties to the weight."""
    return dataclasses.replace(moments, count=10**9)


def cut(matrix: Array, rank: int) -> Array:
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def product(goal: Goal, rank: int) -> Array:
    first, second = goal.factors(rank)
    return np.asarray(first @ second)


def output_error(moments: Moments, weight: Array, matrix: Array) -> float:
    off = matrix.astype(np.float64) - weight
    return float(np.einsum("io,ij,jo->", off, moments.products[0], off))


# --- plain ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(0, 99))
def test_without_inputs_it_is_the_truncated_svd(inputs: int, outputs: int, rank: int, seed: int):
    weight, rank = random_weights(inputs, outputs, seed=seed), min(rank, inputs, outputs)

    found = product(Goal.of(weight[None], None), rank)[0]

    np.testing.assert_allclose(found, cut(weight, rank), atol=1e-6 * np.abs(weight).max())


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_at_full_rank_it_is_the_weight(shape: tuple[int, int], seen: bool):
    weight = random_weights(2, *shape)
    rows = structured_rows(500, 2 * shape[0])
    moments = None
    if seen:
        halves = [moments_of(half) for half in np.split(rows, 2, axis=1)]
        names = "products", "means"
        joined = {name: np.concatenate([getattr(half, name) for half in halves]) for name in names}
        moments = Moments(joined["products"], joined["products"], joined["means"], joined["means"], 500)

    found = product(Goal.of(weight, moments), min(shape))

    np.testing.assert_allclose(found, weight, atol=1e-6 * np.abs(weight).max())


# --- fitted to inputs -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.integers(3, 20), st.data(), st.integers(0, 99))
def test_fitted_to_inputs_outputs_are_nearer_at_every_rank(inputs: int, outputs: int, data: st.DataObject, seed: int):
    rank = data.draw(st.integers(1, min(inputs, outputs) - 1))
    weight, moments = random_weights(inputs, outputs, seed=seed), known(moments_of(structured_rows(400, inputs, seed)))

    fitted = product(Goal.of(weight[None], moments), rank)[0]

    found, plain = (output_error(moments, weight, each) for each in (fitted, cut(weight, rank)))
    assert found < plain


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_no_other_matrix_of_its_rank_is_nearer(rank: int, seed: int):
    weight, moments = random_weights(10, 8, seed=seed), known(moments_of(structured_rows(400, 10, seed)))
    first, second = Goal.of(weight[None], moments).factors(rank)
    least = output_error(moments, weight, first[0] @ second[0])
    rng = np.random.default_rng(seed)

    for step in (1e-3, 1e-2, 0.1, 1.0):
        moved = [each[0] * (1 + step * rng.normal(size=each[0].shape)) for each in (first, second)]
        assert output_error(moments, weight, moved[0] @ moved[1]) > least
        best_behind = np.linalg.solve(
            moved[0].T @ moments.products[0] @ moved[0], moved[0].T @ moments.products[0] @ weight
        )
        assert output_error(moments, weight, moved[0] @ best_behind) >= least * (1 - 1e-6)


def test_inputs_that_came_out_otherwise_are_fitted_to_what_the_right_ones_gave():
    weight, right = random_weights(12, 9), structured_rows(600, 12)
    turn = np.eye(12) + 0.2 * random_weights(12, 12, seed=3)
    wrong = (right @ turn).astype(np.float32)

    found = product(Goal.of(weight[None], known(moments_of(wrong, right))), 9)[0]

    assert np.linalg.norm(wrong @ found - right @ weight) < 1e-2 * np.linalg.norm(wrong @ weight - right @ weight)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_the_fewer_rows_are_known_the_nearer_factors_are_to_the_weight(rank: int, seed: int):
    weight, moments = random_weights(12, 10, seed=seed), moments_of(structured_rows(300, 12, seed))

    found = [
        product(Goal.of(weight[None], dataclasses.replace(moments, count=count)), rank)[0] for count in (10, 300, 10**6)
    ]

    off = [np.linalg.norm(each - weight) for each in (cut(weight, rank), *found)]
    assert off == sorted(off)


@pytest.mark.parametrize("seen", [False, True])
def test_what_is_missed_is_told_by_the_values_left_out(seen: bool):
    weight = random_weights(14, 10)
    goal = Goal.of(weight[None], moments_of(structured_rows(300, 14)) if seen else None)
    energies = goal.energies()[0]
    assert energies.sum() == pytest.approx(goal.energy)

    for rank in range(1, 11):
        missed = goal.missed(product(goal, rank))
        assert missed == pytest.approx(energies[rank:].sum() / goal.energy, abs=1e-9)


def test_what_is_missed_is_the_share_of_the_output_energy():
    weight, rows = random_weights(14, 10), structured_rows(300, 14)
    goal = Goal.of(weight[None], known(moments_of(rows)))
    found = product(goal, 4)[0]

    wanted = np.square(rows @ (found - weight)).sum() / np.square(rows @ weight).sum()

    assert goal.missed(found[None]) == pytest.approx(wanted, rel=1e-2)


def test_the_last_factor_is_the_least_squares_solution():
    weight, rows = random_weights(2, 12, 6), structured_rows(300, 12)
    one = moments_of(rows)
    products, means = (np.concatenate([each, each]) for each in (one.products, one.means))
    both = Moments(products, products, means, means, 10**9)
    features = random_weights(2, 12, 5, seed=4)

    found = Goal.of(weight, both).last(features)

    for group in range(2):
        wanted = np.linalg.lstsq(rows @ features[group], rows @ weight[group], rcond=None)[0]
        np.testing.assert_allclose(found[group], wanted, atol=2e-3 * np.abs(wanted).max())


# --- balanced ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.floats(-6, 6), st.booleans())
def test_both_sides_of_an_inner_channel_have_the_root_of_its_value(inputs: int, outputs: int, power: float, seen: bool):
    weight = (random_weights(inputs, outputs) * 10**power).astype(np.float32)
    moments = known(moments_of(structured_rows(400, inputs))) if seen else None
    goal = Goal.of(weight[None], moments)
    rank = min(inputs, outputs)
    values = np.sqrt(goal.energies()[0][:rank])

    first, second = (each[0] for each in goal.factors(rank))

    products = np.eye(inputs) if moments is None else moments.products[0]
    inner = np.sqrt(np.einsum("ir,ij,jr->r", first, products, first))
    large = values > 1e-5 * values.max()
    for sizes in (inner, np.linalg.norm(second, axis=1)):
        np.testing.assert_allclose(sizes[large], np.sqrt(values[large]), rtol=1e-2)


# --- hard numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("seen", ["nothing", "rows", "wide rows", "still rows", "tiny rows", "huge rows"])
def test_weights_of_any_scale_and_rank_give_finite_factors(scale: float, rank: int, seen: str):
    thin = random_weights(12, 3) @ random_weights(3, 20, seed=1)
    weight = (scale * thin[None]).astype(np.float32)
    rows = {
        "rows": structured_rows(100, 12),
        "wide rows": structured_rows(5, 12),
        "still rows": np.full((50, 12), 0.7, np.float32),
        "tiny rows": 1e-20 * structured_rows(100, 12),
        "huge rows": 1e15 * structured_rows(100, 12),
    }
    moments = None if seen == "nothing" else moments_of(rows[seen].astype(np.float32))
    moments = moments.centred() if moments is not None and seen == "still rows" else moments
    goal = Goal.of(weight, moments)

    first, second = (each.astype(np.float32) for each in goal.factors(rank))

    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert 0 <= goal.missed(first @ second) <= 1 + 1e-6
    if rank >= 3:
        np.testing.assert_allclose(first @ second, weight, atol=2e-4 * np.abs(weight).max())


def test_a_weight_of_zeros_stays_one():
    goal = Goal.of(np.zeros((1, 6, 8), np.float32), moments_of(structured_rows(50, 6)))

    first, second = goal.factors(3)

    assert not (first @ second).any()
    assert np.isfinite(first).all()
    assert goal.missed(first @ second) == 0


# --- singular vectors -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data(), st.integers(0, 99))
def test_singular_vectors_are_orthonormal_and_hold_the_largest_values(
    rows: int, columns: int, data: st.DataObject, seed: int
):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = random_weights(rows, columns, seed=seed)

    vectors, values = partial_svd(matrix, rank)

    wanted = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=EXACT)
    np.testing.assert_allclose(values, wanted[:rank], atol=1e-6 * wanted[0])
    np.testing.assert_allclose(singular_energies(matrix), wanted**2, atol=EXACT * wanted[0] ** 2)
    held = np.linalg.norm(vectors.T @ matrix.astype(np.float64)) ** 2
    assert held == pytest.approx(np.square(wanted[:rank]).sum(), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_of_a_large_matrix_the_first_vectors_are_nearly_the_best(scale: float):
    rows, columns, rank = EXACT_SIDE + 52, EXACT_SIDE + 252, 64
    rng = np.random.default_rng(0)
    spread = np.geomspace(1, 0.05, 300, dtype=np.float32)
    structure = (rng.standard_normal((rows, 300), np.float32) * spread) @ rng.standard_normal(
        (300, columns), np.float32
    )
    matrix = structure * np.float32(scale)

    vectors, values = partial_svd(matrix, rank)

    # what is exact is found in the few directions that there are
    left, right = np.linalg.qr(structure @ rng.standard_normal((columns, 300), np.float32))[0], structure
    energies = singular_energies(left.T @ right)
    off = structure - vectors @ (vectors.T @ structure)
    assert np.linalg.norm(off) <= 1.01 * np.sqrt(energies[rank:].sum())
    np.testing.assert_allclose(values / scale, np.sqrt(energies[:rank]), rtol=1e-3)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_values_of_a_large_matrix_of_any_scale_are_finite(scale: float):
    side = EXACT_SIDE + 2
    matrix = np.zeros((side, side + 10), np.float32)
    matrix[np.arange(side), np.arange(side)] = np.float32(scale) * np.linspace(1, 0.1, side, dtype=np.float32)

    energies = singular_energies(matrix)

    np.testing.assert_allclose(np.sqrt(energies), scale * np.linspace(1, 0.1, side), rtol=1e-3)
