"""Streaming statistics of channels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcomp.channels import ChannelMoments

VALUES = arrays(np.float32, (3, 4, 5), elements=st.floats(-1e3, 1e3, width=32))


@given(runs=st.lists(VALUES, min_size=1, max_size=4), axis=st.sampled_from([1, -1]))
def test_runs_add_up_to_the_statistics_of_all_values(runs: list[np.ndarray], axis: int):
    moments = ChannelMoments(axis)
    for run in runs:
        moments.update(run)

    rows = np.moveaxis(np.concatenate(runs).astype(np.float64), axis, -1).reshape(-1, runs[0].shape[axis])
    np.testing.assert_allclose(moments.mean(), rows.mean(axis=0), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(moments.square(), np.square(rows).mean(axis=0), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(moments.peak(), np.abs(rows).max(axis=0))
    assert moments.count == len(rows)


def test_what_was_seen_takes_the_same_room_however_much_there_was():
    few, many = ChannelMoments(1), ChannelMoments(1)
    few.update(np.ones((1, 8, 4), np.float32))
    for _ in range(50):
        many.update(np.ones((16, 8, 4), np.float32))

    assert abs(len(pickle.dumps(few)) - len(pickle.dumps(many))) < 16


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_runs_that_hold_no_numbers_are_counted_and_left_out(bad: float):
    moments = ChannelMoments(-1)
    moments.update(np.array([[1.0, bad]], np.float32))
    moments.update(np.array([[2.0, 3.0]], np.float32))

    assert moments.nonfinite == 1
    assert moments.peak().tolist() == [2.0, 3.0]


def test_scalars_and_other_numbers_of_channels_are_ignored():
    moments = ChannelMoments(1)
    moments.update(np.ones((2, 3), np.float32))
    moments.update(np.array(7.0, np.float32))
    moments.update(np.full((2, 4), 9.0, np.float32))

    assert moments.peak().tolist() == [1.0, 1.0, 1.0]
