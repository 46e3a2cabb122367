"""The ranges that entropy and MSE calibration find, against computations on the whole data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.calibration import MSE, Entropy
from onnxcomp.calibration.search import SHARES

Array = np.ndarray[Any, Any]

COUNT = 20_000

JAGGED = 1.08
"""Whole zero points make the error a jagged function of the range: the search may miss its deepest notch."""
BOTH = pytest.mark.parametrize("make", [Entropy, MSE])


def drawn(kind: str, seed: int = 0, count: int = COUNT) -> Array:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=count)
    data = {
        "normal": normal,
        "heavy": rng.standard_t(3, size=count),
        "relu": np.maximum(normal, 0.0),
        "gelu": 2 * normal / (1 + np.exp(-3.4 * normal)),
        "negative": -rng.lognormal(0.0, 1.0, size=count),
        "shifted": normal + 5.0,
        "uniform": rng.uniform(-1, 1, size=count),
    }
    return np.asarray(data[kind], np.float32)


KINDS = st.sampled_from(["normal", "heavy", "relu", "gelu", "negative", "shifted", "uniform"])


def squared_error(values: Array, low: float, high: float, levels: int, *, symmetric: bool = False) -> float:
    """The mean squared error of quantizing values as a quantizer does: float64, the zero point a whole number."""
    above = (levels - 1) // 2 if symmetric else levels - 1
    step = high / above if symmetric else (high - low) / above
    lowest = -above if symmetric else np.rint(low / step)
    codes = np.clip(np.rint(values / step), lowest, lowest + above * (2 if symmetric else 1))
    return float(np.mean((codes * step - values.astype(np.float64)) ** 2))


def divergence(values: Array, edges: Array, low: float, high: float, levels: int) -> float:
    """KL(P, Q) as the talk describes it, in plain loops, with zero on the grid and zeros left out."""
    counts, _ = np.histogram(values[values != 0].astype(np.float64), edges)
    step = (high - low) / (levels - 1)
    lowest = np.rint(low / step)
    middles = (edges[1:] + edges[:-1]) / 2
    level = np.floor(middles / step + 0.5) - lowest
    inside = np.flatnonzero((level >= 0) & (level < levels))
    if not inside.size:
        return float("inf")
    first, last = inside[0], inside[-1]
    p = counts.astype(np.float64)
    p[first] += counts[:first].sum()
    p[last] += counts[last + 1 :].sum()
    q = np.zeros(counts.size)
    for number in np.unique(level[inside]):
        members = inside[level[inside] == number]
        filled = members[counts[members] > 0]
        q[filled] = counts[members].sum() / max(len(filled), 1)
    for end in (first, last):
        q[end] = q[end] or (0.5 if p[end] else 0.0)
    total, kept = p[inside].sum(), q.sum()
    return float(sum(p[i] / total * np.log(p[i] / total / (q[i] / kept)) for i in inside if p[i]))


@settings(deadline=None, max_examples=30)
@given(
    kind=KINDS, seed=st.integers(0, 99), scale=st.sampled_from([1e-20, 1.0, 1e20]), levels=st.sampled_from([16, 256])
)
def test_mse_is_as_good_as_the_best_of_all_candidates_on_the_whole_data(
    kind: str, seed: int, scale: float, levels: int
):
    values = drawn(kind, seed) * np.float32(scale)
    watch = MSE(levels)
    for part in np.array_split(values, 7):
        watch.update(part)
    low, high = (float(end) for end in (min(values.min(), 0.0), max(values.max(), 0.0)))

    found_low, found_high = watch.range()
    found = squared_error(values / scale, found_low / scale, found_high / scale, levels)

    tried = [(low * share, high * share) for share in SHARES]
    tried += [(low, high * share) for share in SHARES if high] + [(low * share, high) for share in SHARES if low]
    best = min(squared_error(values / scale, a / scale, b / scale, levels) for a, b in tried if b > a)
    assert found <= JAGGED * best


@settings(deadline=None, max_examples=20)
@given(kind=KINDS, seed=st.integers(0, 99))
def test_symmetric_mse_is_as_good_as_the_best_of_all_candidates(kind: str, seed: int):
    values = drawn(kind, seed)
    watch = MSE(symmetric=True)
    watch.update(values)

    low, high = watch.range()

    top = float(np.abs(values).max())
    best = min(squared_error(values, -top * share, top * share, 256, symmetric=True) for share in SHARES)
    assert low == -high
    assert squared_error(values, low, high, 256, symmetric=True) <= JAGGED * best


@settings(deadline=None, max_examples=15)
@given(kind=KINDS, seed=st.integers(0, 9), levels=st.sampled_from([16, 256]))
def test_entropy_has_the_least_divergence_of_all_candidates_on_the_whole_data(kind: str, seed: int, levels: int):
    values = drawn(kind, seed)
    watch = Entropy(levels)
    for part in np.array_split(values, 7):
        watch.update(part)
    edges, _ = watch._bins()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)

    found = divergence(values, edges, *watch.range(), levels)

    fewest = (levels - 1) * (edges[2] - edges[1]) / (high - low)
    tried = [share for share in SHARES[::3] if share > fewest]
    best = min(divergence(values, edges, low * share, high * share, levels) for share in tried)
    assert found <= best + 1e-6


@BOTH
@pytest.mark.parametrize("symmetric", [False, True])
def test_uniform_values_are_not_clipped(make: Any, symmetric: bool):
    watch = make(symmetric=symmetric)
    watch.update(drawn("uniform"))

    assert watch.range() == pytest.approx((-1.0, 1.0), rel=1e-3)


@BOTH
def test_heavy_tails_are_clipped(make: Any):
    values = np.random.default_rng(0).standard_t(2, size=200_000).astype(np.float32)
    watch = make()
    watch.update(values)

    low, high = watch.range()

    assert values.min() < 1.2 * low
    assert values.max() > 1.2 * high
    assert np.mean((values > low) & (values < high)) > 0.999


@BOTH
def test_sixteen_bits_need_no_clipping(make: Any):
    values = drawn("normal")
    watch = make(levels=65536)
    watch.update(values)

    assert watch.range() == pytest.approx((values.min(), values.max()), rel=1e-3)


@BOTH
def test_more_levels_clip_less(make: Any):
    widths = []
    for levels in (16, 64, 256):
        watch = make(levels=levels)
        watch.update(drawn("heavy"))
        low, high = watch.range()
        widths.append(high - low)

    assert widths == sorted(widths)


def test_zeros_do_not_draw_the_range_together():
    # Every grid holds zero exactly, so a rectifier's zeros say nothing about where to clip.
    values = np.abs(drawn("normal"))
    without, with_zeros = Entropy(), Entropy()
    without.update(values)
    with_zeros.update(np.append(values, np.zeros(10 * COUNT, np.float32)))

    assert with_zeros.range() == without.range()


@BOTH
@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 1.0], [0.0, 1e-30], [-7.0]])
def test_what_has_few_values_is_covered(make: Any, values: list[float]):
    watch = make()
    watch.update(np.array(values * 50, np.float32))

    assert watch.range() == pytest.approx((np.float32(min(values)), np.float32(max(values))), rel=1e-2)


@BOTH
def test_codes_of_an_integer_tensor_are_covered(make: Any):
    watch = make()
    watch.update(np.arange(-128, 128, dtype=np.int8))

    assert watch.range() == pytest.approx((-128, 127), rel=1e-2)


@BOTH
def test_values_from_the_smallest_to_the_largest_give_a_range(make: Any):
    magnitudes = 10.0 ** np.linspace(-30, 30, 601)
    watch = make()
    watch.update(np.concatenate([-magnitudes, magnitudes]).astype(np.float32))

    low, high = watch.range()

    assert -1.001e30 < low < -1e28
    assert 1e28 < high < 1.001e30


@BOTH
@given(order=st.permutations(range(6)))
@settings(deadline=None, max_examples=10)
def test_the_order_of_the_runs_matters_by_a_bin_at_most(make: Any, order: list[int]):
    runs = [drawn("normal", seed) * np.float32(3.0**seed) for seed in range(6)]
    straight, shuffled = make(), make()
    for run in runs:
        straight.update(run)
    for index in order:
        shuffled.update(runs[index])

    low, high = straight.range()
    # Bins may end up twice as wide in another order, and the candidates are discrete.
    assert shuffled.range() == pytest.approx((low, high), rel=0.1)
