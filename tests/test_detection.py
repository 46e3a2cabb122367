"""What a candidate loses on outputs that mix scores with other numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.detection import MixedOutput, find_mixed


def detections(seed: int = 0, samples: int = 12, places: int = 60, classes: int = 3) -> np.ndarray:
    """Boxes in pixels and scores of which few are high, as a detector gives them: (samples, places, 4 + classes)."""
    generator = np.random.default_rng(seed)
    boxes = generator.uniform(0, 320, (samples, places, 4))
    scores = generator.beta(0.3, 4.0, (samples, places, classes))
    return np.concatenate([boxes, scores], axis=2).astype(np.float32)


def test_scores_beside_boxes_are_told_apart_on_either_axis():
    rows = detections()

    last, middle = find_mixed(rows), find_mixed(rows.transpose(0, 2, 1))

    assert last is not None
    assert middle is not None
    assert (last.axis, middle.axis) == (2, 1)
    assert last.scores.tolist() == middle.scores.tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize(
    "output",
    [
        detections()[..., 4:],
        detections()[..., :4],
        np.random.default_rng(0).normal(0, 3, (8, 16, 32)).astype(np.float32),
        detections()[:, 0],
        np.maximum(np.random.default_rng(0).normal(0, 1, (8, 16, 32)) * np.repeat([0.2, 1.5], 16), 0).astype(
            np.float32
        ),
    ],
    ids=["scores alone", "boxes alone", "hidden states", "two axes", "features behind a Relu"],
)
def test_outputs_of_one_kind_are_not_taken_for_detections(output: np.ndarray):
    assert find_mixed(output) is None


def mixed() -> MixedOutput:
    found = find_mixed(detections())
    assert found is not None
    return found


def test_the_same_ranking_loses_nothing():
    rows = detections()
    squared = rows.copy()
    squared[..., 4:] = np.sqrt(rows[..., 4:])  # other scores in the same order; nothing falls below what counts

    drop, (low, high) = mixed().drop(rows, squared, seed=0)

    assert abs(drop) < 0.02  # places that were too faint to count now rank last
    assert low <= drop <= high


def test_shuffled_scores_lose_about_all_that_the_ranking_was_worth():
    rows = detections()
    shuffled = rows.copy()
    shuffled[..., 4:] = np.random.default_rng(1).permutation(rows[..., 4:].reshape(-1, 3)).reshape(12, 60, 3)

    drop, _ = mixed().drop(rows, shuffled, seed=0)

    assert drop > 0.1


@given(noise=st.floats(0.0, 0.05))
def test_more_noise_on_scores_is_never_a_gain(noise: float):
    rows = detections()
    noisy = rows.copy()
    noisy[..., 4:] += np.random.default_rng(2).normal(0, noise, noisy[..., 4:].shape)

    drop, _ = mixed().drop(rows, noisy, seed=0)

    assert drop >= -1e-9  # the original's own ranking is the best one by its own scores


def test_lost_scores_do_not_hide_behind_large_boxes():
    rows = detections()
    without = rows.copy()
    without[..., 4:] = 0.0

    assert mixed().score_error(rows, without) == pytest.approx(1.0)
    assert mixed().error(rows, without) == 0.0


def test_boxes_count_where_the_scores_are_high():
    rows = detections()
    rows[..., 4:] = 0.0
    rows[:, 0, 4] = 1.0
    elsewhere, there = rows.copy(), rows.copy()
    elsewhere[:, 1:, :4] += 50.0
    there[:, 0, :4] += 50.0
    found = MixedOutput(2, np.array([False] * 4 + [True] * 3))

    assert found.error(rows, elsewhere) == 0.0
    signal = np.sqrt(np.mean(np.square(rows[:, 0, :4] - rows[:, 0, :4].mean(axis=0))))
    assert found.error(rows, there) == pytest.approx(50.0 / signal, rel=1e-4)


def test_boxes_that_became_nan_are_no_small_loss():
    rows = detections()
    broken = rows.copy()
    broken[0, 0, 0] = np.nan

    assert mixed().error(rows, broken) == float("inf")
