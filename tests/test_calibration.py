from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.calibration import (
    BINS,
    METHODS,
    MSE,
    Calibrator,
    Entropy,
    MinMax,
    MovingAverage,
    Percentile,
    make_calibrator,
)
from onnxcomp.calibration.calibrator import CHUNK
from onnxcomp.errors import OptionError

Array = np.ndarray[Any, Any]

# Subnormal values would underflow to zero beside large ones: they are counted a bin too high.
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
PARTS = st.lists(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS), min_size=1, max_size=5)


def watched(calibrator: Calibrator, *parts: Any) -> Calibrator:
    for part in parts:
        calibrator.update(np.asarray(part))
    return calibrator


def bin_width(watch: Percentile) -> float:
    assert watch.exponent is not None
    return float(2.0**watch.exponent)


# --- all -------------------------------------------------------------------------------------------------------------

every = pytest.mark.parametrize("make", [MinMax, MovingAverage, Percentile, Entropy, MSE])


@every
def test_one_value_is_its_own_range(make: type[Calibrator]):
    assert watched(make(), [0.3]).range() == (0.3, 0.3)


@every
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -7.25, 3e38])
def test_a_constant_tensor_is_its_own_range(make: type[Calibrator], value: float):
    constant = np.full((3, 4), value, np.float32)

    assert watched(make(), constant, constant).range() == (float(constant[0, 0]), float(constant[0, 0]))


@every
def test_no_value_gives_an_empty_range(make: type[Calibrator]):
    watch = watched(make(), np.zeros((0, 3), np.float32))

    assert (watch.range(), watch.count) == ((0.0, 0.0), 0)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_never_in_the_range(make: type[Calibrator], bad: float):
    watch = watched(make(), [bad], [-1.0, bad, 2.0], [bad, bad])

    assert (watch.range(), watch.count, watch.nonfinite) == ((-1.0, 2.0), 2, 4)


@every
def test_a_first_run_without_finite_values_leaves_no_trace(make: type[Calibrator]):
    assert watched(make(), [np.nan, np.inf], [-5.0, 6.0]).range() == (-5.0, 6.0)


@every
def test_a_scalar_counts_as_one_value(make: type[Calibrator]):
    assert watched(make(), np.float32(3.0), np.float32(4.0)).count == 2


@every
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.bool_])
def test_every_numeric_type_is_taken(make: type[Calibrator], dtype: Any):
    assert watched(make(), np.array([0, 1, 1], dtype)).range() == (0.0, 1.0)


@every
def test_survives_the_way_to_the_worker_and_back(make: type[Calibrator]):
    there = pickle.loads(pickle.dumps(watched(make(), [1.0, 2.0])))

    assert watched(there, [-4.0]).range() == watched(make(), [1.0, 2.0], [-4.0]).range()


@every
@given(parts=PARTS)
def test_the_order_of_the_runs_does_not_change_what_is_covered(make: type[Calibrator], parts: list[Array]):
    forth, back = watched(make(), *parts), watched(make(), *parts[::-1])

    assert (forth.low, forth.high, forth.count) == (back.low, back.high, back.count)


@every
@given(parts=st.lists(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32)), min_size=1, max_size=4))
@example(parts=[np.array([1e-30, -1e30], np.float32)])
@example(parts=[np.array([1e-45, np.inf], np.float32), np.array([3.4e38, -3.4e38], np.float32)])
def test_any_values_give_a_finite_range_inside_of_what_was_seen(make: type[Calibrator], parts: list[Array]):
    watch = watched(make(), *parts)
    whole = np.concatenate(parts)
    finite = whole[np.isfinite(whole)].astype(float)

    low, high = watch.range()

    assert (watch.count, watch.nonfinite) == (finite.size, whole.size - finite.size)
    assert np.isfinite([low, high]).all()
    assert min(finite.min(initial=0.0), 0.0) <= low <= high <= max(finite.max(initial=0.0), 0.0)


@every
def test_values_are_looked_at_in_chunks_and_none_is_left_out(make: type[Calibrator]):
    values = np.random.default_rng(0).uniform(-1, 1, 3 * CHUNK + 7).astype(np.float32)
    values[-1], values[CHUNK] = 9.0, np.nan

    watch = watched(make(), values.reshape(1, -1, 1))

    assert (watch.count, watch.nonfinite, watch.high) == (values.size - 1, 1, 9.0)


@every
def test_memory_is_constant(make: type[Calibrator]):
    rng = np.random.default_rng(0)
    watch = make()
    sizes = set()
    for run in range(40):
        watch.update(rng.normal(size=5000).astype(np.float32) * 10.0 ** (run - 20))
        sizes.add(len(pickle.dumps(watch)) // 1024)

    assert len(sizes) == 1
    assert max(sizes) <= 33


# --- min-max ----------------------------------------------------------------------------------------------------------


@given(parts=PARTS)
def test_min_max_is_the_smallest_and_the_largest_value(parts: list[Array]):
    whole = np.concatenate(parts)

    assert watched(MinMax(), *parts).range() == (float(whole.min()), float(whole.max()))


# --- moving average ---------------------------------------------------------------------------------------------------


@given(parts=PARTS)
def test_few_runs_count_alike_in_the_moving_average(parts: list[Array]):
    low, high = watched(MovingAverage(), *parts).range()

    lows, highs = ([float(end) for end in ends] for ends in zip(*((p.min(), p.max()) for p in parts), strict=True))
    assert low == pytest.approx(np.mean(lows), rel=1e-6, abs=1e-6)
    assert high == pytest.approx(np.mean(highs), rel=1e-6, abs=1e-6)


def test_later_runs_count_by_the_rate_in_the_moving_average():
    watch = watched(MovingAverage(rate=0.5), [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 5.0])

    assert watch.range() == (0.0, ((1 + 2) / 2 + 3) / 4 + 5 / 2)


def test_one_run_of_outliers_moves_the_average_a_little():
    runs = [np.array([-1.0, 1.0])] * 199

    low, high = watched(MovingAverage(), *runs, [-1000.0, 1000.0]).range()

    assert -12 < low < -5
    assert 5 < high < 12


def test_a_run_without_finite_values_is_no_run():
    assert watched(MovingAverage(), [-1.0, 1.0], [np.nan], [], [-3.0, 3.0]).range() == (-2.0, 2.0)


# --- percentile -------------------------------------------------------------------------------------------------------


def check_against_numpy(parts: list[Array], percentile: float) -> None:
    """The range ends within one bin of numpy's percentile, which lies between two neighbouring values."""
    watch = Percentile(percentile)
    watched(watch, *parts)
    whole = np.concatenate(parts).astype(np.float64)
    cut = (100.0 - percentile) / 2
    below, above = (np.percentile(whole, cut, method=way) for way in ("lower", "higher"))
    low, high = watch.range()
    assert below - bin_width(watch) <= low <= above
    below, above = (np.percentile(whole, 100.0 - cut, method=way) for way in ("lower", "higher"))
    assert below <= high <= above + bin_width(watch)
    assert watch.low <= low <= high <= watch.high


@given(parts=PARTS, percentile=st.sampled_from([50.0, 90.0, 99.0, 99.99, 100.0]))
@example(parts=[np.array([1, 1.001, 1.5], np.float32), np.array([-1e6], np.float32)], percentile=100.0)
@example(parts=[np.array([1], np.float32), np.array([-1e6], np.float32)], percentile=50.0)
def test_percentile_is_within_one_bin_of_numpys(parts: list[Array], percentile: float):
    check_against_numpy(parts, percentile)


@given(
    exponents=st.lists(st.integers(-30, 30), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    percentile=st.sampled_from([90.0, 99.0, 100.0]),
)
def test_percentile_follows_growth_over_many_magnitudes(exponents: list[int], seed: int, percentile: float):
    rng = np.random.default_rng(seed)

    check_against_numpy([(rng.normal(size=50) * 10.0**e).astype(np.float32) for e in exponents], percentile)


@given(parts=PARTS)
def test_no_value_is_lost_when_bins_are_merged(parts: list[Array]):
    watch = Percentile()
    watched(watch, *parts)

    assert int(watch.counts.sum()) == watch.count == sum(part.size for part in parts)


@given(parts=PARTS)
def test_bins_stay_finer_than_an_eight_bit_step(parts: list[Array]):
    watch = Percentile()
    watched(watch, *parts)
    reach = max(watch.high, 0.0) - min(watch.low, 0.0)  # what a grid must cover: zero is always on it

    assert bin_width(watch) <= max(reach, float(np.finfo(np.float32).tiny)) / 255


def test_the_smallest_and_the_largest_float_fit_one_histogram():
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max

    assert watched(Percentile(100.0), [tiny], [huge], [-huge]).range() == (-float(huge), float(huge))


def test_percentile_cuts_an_outlier_that_min_max_keeps():
    values = np.append(np.linspace(-1, 1, 99_999), 1000.0)

    low, high = watched(Percentile(99.9), values).range()

    assert watched(MinMax(), values).range() == (-1.0, 1000.0)
    assert -1.0 <= low < -0.5
    assert 0.5 < high < 2.0


def test_half_of_the_rest_is_cut_at_each_end():
    low, high = watched(Percentile(80.0), np.linspace(-1, 1, 100_001)).range()

    assert (low, high) == pytest.approx((-0.8, 0.8), abs=1 / 1024)


def test_all_values_of_a_small_set_are_kept_by_the_default():
    assert watched(Percentile(), np.arange(100.0)).range() == (0.0, 99.0)


@given(parts=PARTS)
def test_the_histogram_is_that_of_the_whole_data(parts: list[Array]):
    watch = Percentile()
    watched(watch, *parts)
    edges = (watch.first + np.arange(BINS + 1)) * bin_width(watch)

    expected, _ = np.histogram(np.concatenate(parts).astype(np.float64), edges)

    np.testing.assert_array_equal(watch.counts, expected)


# --- making one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("minmax", MinMax),
        ("moving-average", MovingAverage),
        ("percentile", Percentile),
        ("entropy", Entropy),
        ("mse", MSE),
    ],
)
def test_is_made_by_the_name_of_the_method(method: str, kind: type[Calibrator]):
    assert method in METHODS
    assert type(make_calibrator(method)) is kind


def test_the_percentile_is_passed_on():
    watch = make_calibrator("percentile", 95.0)

    assert isinstance(watch, Percentile)
    assert watch.percentile == 95.0


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_levels_and_symmetry_are_passed_on(method: str):
    watch = make_calibrator(method, levels=65536, symmetric=True)

    assert isinstance(watch, Entropy | MSE)
    assert (watch.levels, watch.symmetric) == (65536, True)


def test_an_unknown_method_is_refused():
    with pytest.raises(OptionError, match="no calibration method is called 'magic'; there are minmax, moving-average"):
        make_calibrator("magic")


def test_too_few_levels_are_refused():
    with pytest.raises(OptionError, match="levels must be at least 3, got 2"):
        make_calibrator("mse", levels=2)
