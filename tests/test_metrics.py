from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.errors import DataError, OptionError
from onnxcomp.metrics import (
    Metric,
    drop,
    expected_drop,
    get_metric,
    looks_like_classifier,
    paired_interval,
)

FINITE = st.floats(-1e6, 1e6, width=32)
SCORES = hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(2, 9)), elements=FINITE)


def logits(count: int, classes: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, classes)).astype(np.float32)


# Named metrics


@given(SCORES, st.data())
def test_top1_is_the_share_of_right_classes(scores: np.ndarray, data: st.DataObject):
    labels = data.draw(hnp.arrays(np.int64, len(scores), elements=st.integers(0, scores.shape[1] - 1)))

    assert get_metric("top1")([scores], labels) == pytest.approx((scores.argmax(axis=1) == labels).mean())


@given(SCORES, st.data())
def test_top5_is_the_share_among_the_first_five(scores: np.ndarray, data: st.DataObject):
    labels = data.draw(hnp.arrays(np.int64, len(scores), elements=st.integers(0, scores.shape[1] - 1)))
    first = np.argsort(-scores, axis=1, kind="stable")[:, :5]

    assert get_metric("top5")([scores], labels) == pytest.approx((first == labels[:, None]).any(axis=1).mean())


def test_top1_takes_columns_one_hot_rows_and_pixels_of_one():
    scores, labels = logits(20), np.arange(20) % 10
    expected = get_metric("top1")([scores], labels)

    assert get_metric("top1")([scores[:, :, None, None]], labels) == expected
    assert get_metric("top1")([scores], labels[:, None].astype(np.float32)) == expected
    assert get_metric("top1")([scores], np.eye(10)[labels]) == expected


def test_scores_with_a_nan_are_wrong():
    scores = np.full((4, 3), np.nan, np.float32)

    assert get_metric("top1")([scores], np.zeros(4, np.int64)) == 0
    assert get_metric("top5")([scores], np.zeros(4, np.int64)) == 0


def test_takes_the_first_output_that_fits():
    features = np.zeros((20, 4, 8), np.float32)
    labels = logits(20).argmax(axis=1)

    assert get_metric("top1")([features, logits(20)], labels) == 1


@given(hnp.arrays(np.float32, st.integers(2, 40), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75])), st.data())
def test_auc_counts_pairs_in_the_right_order(scores: np.ndarray, data: st.DataObject):
    labels = data.draw(hnp.arrays(np.int64, len(scores), elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]

    auc = get_metric("auc")([scores], labels)

    assert auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert get_metric("auc")([np.stack([-scores, scores], axis=1)], labels) == auc
    assert get_metric("auc")([-scores[:, None]], labels) == pytest.approx(1 - auc)


def test_auc_is_fast_on_distinct_scores():
    scores, labels = logits(200_000, 1), np.arange(200_000) % 2

    start = time.perf_counter()
    get_metric("auc")([scores], labels)

    assert time.perf_counter() - start < 2


def test_mse_is_better_when_lower():
    metric = get_metric("mse")
    output = np.array([[1, 2], [3, 5]], np.float32)

    assert metric([output], np.array([[1, 2], [3, 4]])) == 0.25
    assert drop(metric, 0.25, 0.75) == 0.5
    assert drop(get_metric("top1"), 0.75, 0.25) == 0.5


def test_mse_takes_a_column_for_single_values():
    assert get_metric("mse")([np.array([[1.0], [3.0]])], np.array([1.0, 1.0])) == 2


@pytest.mark.parametrize("name", ["top1", "top5", "mse"])
def test_values_a_sample_have_the_metric_as_their_mean(name: str):
    outputs = [logits(50)]
    labels = logits(50, seed=1) if name == "mse" else np.arange(50) % 10

    values = get_metric(name).per_sample(outputs, labels)

    assert values is not None
    assert values.shape == (50,)
    assert values.mean() == pytest.approx(get_metric(name)(outputs, labels))


@pytest.mark.parametrize(
    ("name", "output", "labels", "message"),
    [
        ("top1", logits(5), np.arange(6), r"wants an output \(N, C\) for int64 \(6,\) labels; the outputs are float32"),
        ("top1", logits(5), np.full(5, 10), r"wants classes from 0 to 9 as labels; got 10 to 10"),
        ("top1", logits(5), np.full(5, 0.5), r"wants classes from 0 to 9"),
        ("top1", logits(5), np.zeros((5, 3)), r"wants one class a sample"),
        ("top1", logits(5), np.full(5, "cat"), r"wants numbers as labels"),
        ("mse", logits(5), np.zeros((5, 3)), r"wants an output of the labels' shape"),
        ("auc", logits(5, 2), np.zeros(5), r"wants labels of 0 and 1, both present; got 0.0"),
        ("auc", logits(5, 3), np.arange(5) % 2, r"wants an output \(N,\), \(N, 1\) or \(N, 2\)"),
        ("auc", np.full(5, np.nan), np.arange(5) % 2, r"cannot rank outputs that are NaN"),
    ],
)
def test_refuses_outputs_and_labels_that_do_not_fit(name: str, output: np.ndarray, labels: np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        get_metric(name)([output], labels)


# Metrics of the user


def lowest(outputs: list[np.ndarray], labels: np.ndarray) -> float:
    return float(np.abs(outputs[0][:, 0] - labels).min())


lowest.higher_is_better = False  # type: ignore[attr-defined]


def test_a_function_is_a_metric_with_its_direction():
    metric = get_metric(lowest)

    assert (metric.name, metric.higher_is_better) == ("lowest", False)
    assert metric([np.array([[3.0], [5.0]])], np.array([1.0, 4.0])) == 1
    assert metric.per_sample([], np.zeros(0)) is None
    assert get_metric(metric) is metric
    assert get_metric(lambda outputs, labels: 1).higher_is_better


def test_imports_a_metric_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_metric_module.py").write_text("def score(outputs, labels):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)

    assert get_metric("my_metric_module:score")([], np.zeros(0)) == 0.5
    with pytest.raises(OptionError, match="not allowed here"):
        get_metric("my_metric_module:score", allow_code=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "top2",
            r"no metric is called 'top2'; did you mean 'top[15]'\?; expected one of top1, top5, mse, auc, or module",
        ),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("math:pi", "'math:pi' is not a function but a float"),
        (3, "a metric must be a name or a function, got int"),
    ],
)
def test_refuses_an_unknown_metric(spec: str, message: str):
    with pytest.raises(OptionError, match=message):
        get_metric(spec)


def test_refuses_a_direction_that_is_no_truth_value():
    def metric(outputs: list[np.ndarray], labels: np.ndarray) -> float:
        return 0.0

    metric.higher_is_better = "no"  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="must be True or False, got 'no'"):
        get_metric(metric)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
        (lambda: math.nan, "is nan; expected a finite"),
        (lambda: "a", "failed"),
    ],
)
def test_a_metric_that_fails_says_so(result, message: str):
    with pytest.raises(DataError, match=message):
        Metric("mine", True, lambda outputs, labels: result())([], np.zeros(0))


# Intervals


def test_the_interval_of_a_paired_drop_is_narrower_than_an_unpaired_one():
    labels = np.arange(400) % 10
    original = logits(400)
    original[np.arange(0, 400, 2), labels[::2]] += 9  # about half right
    new = original.copy()
    new[:40:2] = np.roll(original[:40:2], 1, axis=1)  # 20 right ones become wrong

    low, high = paired_interval(get_metric("top1"), [original], [new], labels, seed=0)

    assert low < 0.05 < high
    # 20 of 400: a standard error of 0.0109, whatever else is right or wrong.
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.05 * 0.95 / 400), rel=0.15)


@given(st.integers(0, 1000), st.integers(1, 60))
def test_the_interval_of_equal_models_is_zero(seed: int, count: int):
    labels = np.arange(count) % 10

    assert paired_interval(get_metric("top1"), [logits(count)], [logits(count)], labels, seed=seed) == (0, 0)


def test_the_interval_is_reproducible():
    near, far = logits(60, seed=1), logits(60, seed=2)
    first, again, other = (
        paired_interval(get_metric("mse"), [near], [far], logits(60), seed=seed) for seed in (1, 1, 2)
    )

    assert first == again != other


def test_the_interval_is_above_zero_for_a_worse_model():
    labels = logits(60)
    near, far = labels + 0.1 * logits(60, seed=1), labels + 0.5 * logits(60, seed=2)

    low, high = paired_interval(get_metric("mse"), [near], [far], labels, seed=1)
    back = paired_interval(get_metric("mse"), [far], [near], labels, seed=1)

    assert 0 < low < 0.24 < high
    assert back == (-high, -low)


def test_a_metric_that_is_no_mean_gets_an_interval_too():
    labels = np.arange(200) % 2
    original = labels + logits(200, 1)[:, 0]
    new = labels + 3 * logits(200, 1, seed=1)[:, 0]
    metric = get_metric("auc")

    low, high = paired_interval(metric, [original], [new], labels, seed=0)

    assert low < drop(metric, metric([original], labels), metric([new], labels)) < high


def test_a_slow_metric_is_resampled_for_a_limited_time():
    def slow(outputs: list[np.ndarray], labels: np.ndarray) -> float:
        time.sleep(0.1)
        return float(outputs[0].mean())

    start = time.perf_counter()
    low, high = paired_interval(get_metric(slow), [logits(9)], [logits(9, seed=1)], np.zeros(9), seed=0)

    assert low < high
    assert time.perf_counter() - start < 4


def test_an_interval_that_cannot_be_told_is_infinite():
    two_a_label = paired_interval(get_metric(lowest), [logits(8)], [logits(8)], np.zeros(4), seed=0)
    one_class = paired_interval(get_metric("auc"), [logits(8, 1)], [logits(8, 1)], np.zeros(8), seed=0)

    assert two_a_label == one_class == (-math.inf, math.inf)


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}])
def test_refuses_an_interval_without_sense(options: dict[str, float]):
    with pytest.raises(OptionError):
        paired_interval(get_metric("top1"), [logits(3)], [logits(3)], np.zeros(3), seed=0, **options)  # type: ignore[arg-type]


# Without labels


@given(SCORES, st.data())
def test_the_expected_drop_is_between_zero_and_one(teacher: np.ndarray, data: st.DataObject):
    student = data.draw(hnp.arrays(np.float32, teacher.shape, elements=FINITE))

    lost = expected_drop(teacher, student)

    assert lost.shape == (len(teacher),)
    assert (lost >= 0).all()
    assert (lost <= 1).all()
    same = student.argmax(axis=1) == teacher.argmax(axis=1)
    assert (lost[same] == 0).all()


def test_the_expected_drop_weighs_choices_by_the_teacher():
    teacher = np.array([[0.5, 0.4, 0.1], [0.9, 0.1, 0.0]])
    student = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    np.testing.assert_allclose(expected_drop(teacher, student), [0.1, 0.9])
    np.testing.assert_allclose(expected_drop(np.log(teacher + 1e-30), student), [0.1, 0.9])


def test_a_student_with_nan_gets_no_credit():
    student = np.array([[0.5, np.nan]])

    np.testing.assert_allclose(expected_drop(np.array([[0.3, 0.7]]), student), [0.7])


def test_refuses_class_scores_of_different_shapes():
    with pytest.raises(DataError, match=r"got \(3, 10\) and \(3, 9\)"):
        expected_drop(logits(3), logits(3, 9))


# Classifiers


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("outputs", "elements", "reason"),
    [
        (softmax(logits(9)), 5, "probabilities"),
        (softmax(logits(9)).astype(np.float16), 5, "probabilities"),
        (8 * logits(9), 3072, "confident logits"),
        (8 * logits(9), 39, None),
        (0.1 * logits(9), 3072, None),
        (logits(9)[:, :1], 3072, None),
        (logits(9)[:, :, None], 3072, None),
        (np.arange(20).reshape(2, 10), 3072, None),
        (np.full((2, 10), np.nan, np.float32), 3072, None),
        (np.zeros((0, 10), np.float32), 3072, None),
    ],
)
def test_tells_classifiers_by_their_outputs(outputs: np.ndarray, elements: int, reason: str | None):
    assert looks_like_classifier(outputs, elements) == reason
