"""What the error of a layer's result is named after."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.deviation import TensorError
from onnxcomp.layer_causes import error_cause, is_worth_a_cause, outlier_channel

Array = np.ndarray[Any, Any]

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(64, 8)).astype(np.float32)


def error_of(reference: Array, candidate: Array) -> TensorError:
    error = TensorError(axis=-1)
    error.update(reference.astype(np.float32), candidate.astype(np.float32))
    return error


def noisy(share: float) -> TensorError:
    """An error that is spread evenly."""
    return error_of(VALUES, VALUES + share * RNG.normal(size=VALUES.shape))


def test_noise_that_its_input_has_already_came_from_before():
    cause = error_cause(noisy(0.05), {"/a/Conv": noisy(0.045), "/b/Conv": noisy(0.001)})
    assert cause is not None
    assert cause.startswith("from before: ")
    assert "by /a/Conv (" in cause


def test_the_noise_of_two_inputs_adds_up():
    both = {"q": noisy(0.03), "k": noisy(0.03)}
    assert error_cause(noisy(0.05), {"q": both["q"]}) is None
    assert error_cause(noisy(0.05), both) is not None


def test_noise_of_its_own_did_not_come_from_before():
    assert error_cause(noisy(0.05), {"/a/Conv": noisy(0.01)}) is None


def test_values_beyond_the_range_are_a_clipped_tail():
    far = VALUES.copy()
    far[:3] *= 20
    assert error_cause(error_of(far, np.clip(far, -4, 4)), {}) == (
        "clipped tail: 100% of the noise is in values beyond the range"
    )


def test_channels_that_are_off_by_a_constant_have_shifted():
    cause = error_cause(error_of(VALUES, VALUES + np.linspace(-0.1, 0.1, 8)), {})
    assert cause is not None
    assert cause.startswith("shifted means: 100%")


def test_a_channel_that_has_the_noise_is_named():
    wrong = VALUES.copy()
    wrong[:, 5] += 0.2 * RNG.normal(size=64)
    cause = error_cause(error_of(VALUES, wrong), {})
    assert cause is not None
    assert cause.startswith("one channel: number 5 has ")


def test_a_channel_that_reaches_far_beyond_the_others_is_an_outlier():
    far = VALUES.copy()
    far[:, 2] *= 30
    cause = outlier_channel(error_of(far, far))
    assert cause is not None
    assert cause.startswith("outlier channel: number 2 reaches ")
    assert outlier_channel(error_of(VALUES, VALUES)) is None


def test_what_is_equal_or_nearly_so_or_broken_needs_no_cause():
    assert not is_worth_a_cause(error_of(VALUES, VALUES))
    assert not is_worth_a_cause(noisy(1e-5))
    assert not is_worth_a_cause(error_of(VALUES, np.full_like(VALUES, np.nan)))
    assert error_cause(noisy(1e-5), {"x": noisy(0.1)}) is None
