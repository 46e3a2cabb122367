"""K-means in one dimension."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp_passes._kmeans import code_book, codebook, nearest_of
from tests.models import random_weights

Array = np.ndarray[Any, Any]


def squared_error(weight: Array, centres: Array) -> float:
    nearest = centres[np.argmin(np.abs(weight.reshape(-1, 1) - centres), axis=1)]
    return float(np.sum((weight.reshape(-1) - nearest) ** 2))


def test_finds_clusters_that_lie_apart():
    rng = np.random.default_rng(0)
    truth = np.array([-3.0, -1.0, 0.5, 4.0], np.float32)
    values = rng.permutation(np.repeat(truth, 200)) + rng.normal(0, 0.01, 800).astype(np.float32)

    np.testing.assert_allclose(codebook(values.astype(np.float32), 4), truth, atol=0.005)


@pytest.mark.parametrize("size", [2, 4, 16, 64])
def test_is_near_the_best_codebook_of_normal_weights(size: int):
    weight = random_weights(128, 256)
    best = {2: 0.3634, 4: 0.1175, 16: 0.009497, 64: 0.0006642}
    # Max 1960, "Quantizing for Minimum Distortion", table I (2, 4, 16); 64: Panter and Dite's limit, 2.7207 / size**2.

    error = squared_error(weight, codebook(weight, size)) / weight.size

    assert error <= 1.04 * best[size]


def test_an_outlier_costs_one_value():
    weight = np.concatenate([random_weights(4096), np.array([1e6], np.float32)])

    centres = codebook(weight, 16)

    assert centres[-1] == 1e6
    assert squared_error(weight, centres) / weight.size <= 1.1 * 0.0108  # 15 values for the others


@given(
    values=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)),
    size=st.sampled_from([2, 3, 16]),
    keep_zeros=st.booleans(),
)
def test_the_codebook_is_small_sorted_and_inside_the_range(values: Array, size: int, keep_zeros: bool):
    centres = codebook(values, size, keep_zeros=keep_zeros)

    assert centres.dtype == np.float32
    assert 1 <= len(centres) <= size
    assert np.all(np.diff(centres) > 0)
    low, high = (
        min(values.min(), 0) if keep_zeros else values.min(),
        max(values.max(), 0) if keep_zeros else values.max(),
    )
    assert low <= centres[0]
    assert centres[-1] <= high
    assert np.any(centres == 0) or not (keep_zeros and np.any(values == 0))


def test_zeros_do_not_draw_the_other_values_to_them():
    weight = random_weights(1000)
    sparse = np.concatenate([weight, np.zeros(19000, np.float32)])

    kept = squared_error(weight, codebook(sparse, 16))

    assert kept <= 1.1 * squared_error(weight, codebook(weight, 16))


def cheapest_runs(values: Array, size: int) -> float:
    """The least squared error of any clustering into runs, tried one by one."""
    values = np.sort(values).astype(np.float64)
    cuts = itertools.combinations(range(1, len(values)), size - 1)
    return min(sum(float(np.sum((r - r.mean()) ** 2)) for r in np.split(values, cut)) for cut in cuts)


@given(values=hnp.arrays(np.float32, 9, elements=st.floats(-8, 8, width=16), unique=True), size=st.integers(2, 5))
def test_no_codebook_of_floats_is_better(values: Array, size: int):
    found = codebook(values, size, keep_zeros=False)

    assert squared_error(values, found) <= cheapest_runs(values, size) + 1e-4


@given(
    codes=hnp.arrays(np.int8, 12, elements=st.integers(-7, 7)),
    weights=hnp.arrays(np.float64, 12, elements=st.floats(0.1, 10)),
    size=st.integers(2, 4),
    zero=st.sampled_from([None, 0, 3]),
)
def test_no_codebook_of_codes_is_better(codes: Array, weights: Array, size: int, zero: int | None):
    counted = np.ones(12) if zero is None else codes != zero

    def error(centres: tuple[int, ...] | Array) -> float:
        off = np.min(np.abs(codes[:, None].astype(float) - np.array(centres, float)), axis=1)
        return float(np.sum(weights * counted * off**2))

    found = code_book(codes, weights, size, zero=zero)

    assert len(found) <= size
    assert np.all(np.diff(found.astype(int)) > 0)
    assert zero is None or zero in found or zero not in codes
    best = min(error(c) for c in itertools.combinations(range(-7, 8), size) if zero is None or zero in c)
    assert error(found) <= best + 1e-9


def test_many_values_are_clustered_as_well_as_if_each_were_looked_at(monkeypatch: pytest.MonkeyPatch):
    weight = np.random.default_rng(0).laplace(size=12_000).astype(np.float32)
    quick = squared_error(weight, codebook(weight, 64))
    monkeypatch.setattr("onnxcomp_passes._kmeans.RUNS", weight.size)

    assert quick <= 1.001 * squared_error(weight, codebook(weight, 64))


def test_a_value_is_mapped_to_the_nearest():
    centres = np.array([-1.0, 0.0, 2.0], np.float32)
    values = np.array([-9.0, -0.4, 0.9, 1.1], np.float32)
    assert nearest_of(values, centres).tolist() == [-1.0, 0.0, 0.0, 2.0]
