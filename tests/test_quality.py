from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.data import Dataset, generate, input_specs, open_data
from onnxcomp.errors import DataError
from onnxcomp.metrics import get_metric
from onnxcomp.quality import CENTRED_FROM_SAMPLES, LOSSLESS_ERROR, Quality, Reference, flatten
from onnxcomp.relative_error import Energies, energies, relative_error
from tests.models import graph_model, if_model, random_inputs, random_weights, run

Array = np.ndarray[Any, Any]

SAMPLES, FEATURES = 40, 12
ANY_BATCH = "g (float[N, 12] x) => (float[N, 12] y) { y = Relu(x) }"


def dataset(count: int = SAMPLES, labels: Array | None = None, *, graph: str = ANY_BATCH) -> Dataset:
    """Samples of 12 features; only their number matters, outputs are given by the tests."""
    arrays = {"x": random_weights(count, FEATURES)}
    return open_data(arrays if labels is None else {**arrays, "label": labels}, input_specs(graph_model(graph)))


def in_batches(data: Dataset, *outputs: Array) -> list[list[Any]]:
    """Whole outputs, first axis = sample, as runs give them."""
    ends = np.cumsum([batch.count for batch in data.batches()])[:-1]
    return [list(parts) for parts in zip(*(np.split(output, ends) for output in outputs), strict=True)]


def compared(
    original: Sequence[Array],
    candidate: Sequence[Array],
    *,
    labels: Array | None = None,
    metric: str | None = None,
    classifier: bool | None = None,
) -> Quality:
    """The loss of a candidate, both given by their whole outputs."""
    data = dataset(len(original[0]), labels)
    chosen = get_metric(metric) if metric else None
    reference = Reference(data, in_batches(data, *original), chosen, classifier, 0)
    return reference.compare(in_batches(data, *candidate), data)


def of_runs(original: Iterable[list[Any]], candidate: Iterable[list[Any]], data: Dataset | None = None) -> Quality:
    """The loss of a candidate, both given run by run."""
    data = data or dataset()
    return Reference(data, original, None, None, 0).compare(candidate, data)


def noisy(array: Array, share: float, seed: int = 1) -> Array:
    """The array with noise whose root mean square is a share of the array's."""
    noise = np.random.default_rng(seed).normal(size=array.shape)
    noise *= share * math.sqrt(np.square(array).mean() / np.square(noise).mean())
    return (array + noise).astype(array.dtype)


# --- kinds of loss ----------------------------------------------------------------------------------------------------


def test_labels_and_a_metric_make_it_the_drop_of_the_metric():
    labels = np.arange(SAMPLES) % 4
    right = np.eye(4, dtype=np.float32)[labels]
    half_wrong = np.where((np.arange(SAMPLES) < SAMPLES // 2)[:, None], right, np.roll(right, 1, axis=1))

    quality = compared([right], [half_wrong], labels=labels, metric="top1")

    assert (quality.kind, quality.metric, quality.drop, quality.samples) == ("metric", 0.5, 0.5, SAMPLES)
    assert quality.interval is not None
    assert 0.3 < quality.interval[0] < 0.5 < quality.interval[1] < 0.7


def test_a_drop_is_bigger_is_worse_for_a_metric_that_should_be_small():
    labels = np.zeros((SAMPLES, 1), np.float32)

    quality = compared([labels + 1], [labels + 2], labels=labels, metric="mse")

    assert (quality.metric, quality.drop) == (4.0, 3.0)


def test_a_metric_without_labels_is_not_used():
    original = random_weights(SAMPLES, 3, 4)

    assert compared([original], [original], metric="mse").kind == "relative-error"


def test_class_scores_make_it_the_expected_drop():
    teacher = np.tile(np.array([[0.5, 0.3, 0.2]], np.float32), (SAMPLES, 1))
    student = np.tile(np.array([[0.1, 0.8, 0.1]], np.float32), (SAMPLES, 1))

    quality = compared([teacher], [student])

    assert (quality.kind, quality.agreement) == ("expected-drop", 0.0)
    assert quality.drop == pytest.approx(0.2)
    assert quality.interval == pytest.approx((0.2, 0.2))


def test_flips_of_near_ties_cost_next_to_nothing():
    teacher = np.tile(np.array([[0.501, 0.499]], np.float32), (SAMPLES, 1))

    quality = compared([teacher], [teacher[:, ::-1]])

    assert quality.agreement == 0.0
    assert quality.drop == pytest.approx(0.002, abs=1e-6)


def test_other_outputs_make_it_the_relative_error():
    original = random_weights(SAMPLES, 3, 5)

    quality = compared([original], [noisy(original, 0.1)])

    assert (quality.kind, quality.drop, quality.interval, quality.agreement) == ("relative-error", None, None, None)
    assert quality.plain_error == pytest.approx(0.1, rel=1e-4)
    assert quality.sqnr_db == pytest.approx(20, abs=0.01)


def test_a_model_declared_no_classifier_is_judged_by_relative_error():
    scores = np.tile(np.array([[0.9, 0.1]], np.float32), (SAMPLES, 1))

    assert compared([scores], [scores], classifier=False).kind == "relative-error"


def test_a_model_declared_a_classifier_is_judged_by_its_choices_whatever_its_scores_look_like():
    scores = random_weights(SAMPLES, 3, scale=0.1)

    assert compared([scores], [scores], classifier=True).kind == "expected-drop"
    assert compared([scores], [scores]).kind == "relative-error"


def test_generated_samples_never_make_a_classifier():
    data = generate(graph_model(ANY_BATCH))
    scores = np.tile(np.array([[0.9, 0.1]], np.float32), (data.size, 1))

    assert Reference(data, in_batches(data, scores), None, None, 0).kind == "relative-error"


def test_the_worst_output_counts():
    good, bad = random_weights(SAMPLES, 3, 2), random_weights(SAMPLES, 2, 4, seed=1)

    quality = compared([good, bad], [noisy(good, 0.01), noisy(bad, 0.4)])

    assert quality.plain_error == pytest.approx(0.4, rel=1e-4)


def test_a_candidate_whose_outputs_no_metric_takes_has_lost_everything():
    labels = random_weights(SAMPLES, 3)

    quality = compared([labels], [np.full_like(labels, np.nan)], labels=labels, metric="mse")

    assert (quality.metric, quality.drop) == (None, math.inf)


def test_an_original_whose_outputs_the_metric_does_not_take_is_an_error():
    labels = np.arange(SAMPLES) % 2
    words = np.full((SAMPLES, 2), "no", object)

    with pytest.raises(DataError, match="metric 'top1' wants an output"):
        compared([words], [words], labels=labels, metric="top1")


def test_the_interval_is_the_same_for_the_same_seed():
    scores, other = random_weights(SAMPLES, 3, scale=3), random_weights(SAMPLES, 3, seed=1, scale=3)

    first, second = (compared([scores], [other], classifier=True) for _ in range(2))

    assert first == second
    assert first.interval is not None
    assert first.drop is not None
    assert first.interval[0] < first.drop < first.interval[1]


# --- relative error ---------------------------------------------------------------------------------------------------


@given(share=st.floats(1e-6, 1.0), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_relative_error_is_that_of_the_noise_whatever_the_scale(share: float, scale: float):
    array = random_weights(30, 7).astype(np.float64) * scale

    found = relative_error([(array[:10], noisy(array, share)[:10]), (array[10:], noisy(array, share)[10:])])

    assert found == pytest.approx(share, rel=1e-6)


@given(seed=st.integers(0, 99), split=st.integers(1, 15))
def test_the_interval_of_an_error_is_the_same_however_samples_are_put_into_runs(seed: int, split: int):
    array = np.random.default_rng(seed).normal(size=(16, 7))
    parts = [(array[a:b], noisy(array, 0.1)[a:b]) for a, b in ((0, split), (split, 16))]
    whole, apart = energies([(array, noisy(array, 0.1))], [16]), energies(parts, [split, 16 - split])

    assert whole.interval(centred=True) == pytest.approx(apart.interval(centred=True))
    assert whole.interval(centred=True)[0] < whole.error(centred=True) < whole.interval(centred=True)[1]


def test_an_output_without_samples_along_its_first_axis_counts_as_one():
    array = random_weights(5, 7)

    found = energies([(array, noisy(array, 0.1))] * 2, [3, 3])

    assert found.noise.shape == (2,)


def test_the_interval_of_an_error_over_very_many_samples_is_narrow():
    noise = np.random.default_rng(0).chisquare(1, 200_000)
    low, high = Energies(noise, np.ones(200_000), np.ones(200_000)).interval(centred=False)

    spread = 3.92 * math.sqrt(2) / 2 / math.sqrt(200_000)  # of the root of a mean of squares of normal numbers
    assert high - low == pytest.approx(spread, rel=0.02)


def test_the_upper_end_of_the_interval_is_mostly_above_the_error_of_all_samples_where_few_have_most_of_it():
    sigma = 1.0
    noise = np.random.default_rng(3).lognormal(sigma=sigma, size=(400, 8))  # 400 draws of 8 samples each
    truth = math.sqrt(math.exp(sigma**2 / 2))

    covered = [Energies(row, np.ones(8), np.ones(8)).interval(centred=False)[1] >= truth for row in noise]

    assert (
        np.mean(np.sqrt(noise.mean(axis=1)) >= truth) < 0.45
    )  # what the error alone says is too little as often as not
    assert np.mean(covered) > 0.75


def test_the_centred_error_catches_damage_that_a_constant_hides():
    varying = random_weights(SAMPLES, 3, 4)
    damaged = noisy(varying, 0.5)

    quality = compared([varying + 100], [damaged + 100])

    assert quality.plain_error < 0.01
    assert quality.error == pytest.approx(0.5, rel=0.05)


def test_a_candidate_that_no_longer_depends_on_its_input_has_an_error_of_one():
    varying = random_weights(SAMPLES, 3, 4) + 100
    constant = np.broadcast_to(varying.mean(axis=0), varying.shape)

    assert compared([varying], [constant]).error == pytest.approx(1.0, rel=1e-4)


def test_few_samples_have_no_mean_worth_taking_out():
    original = random_weights(CENTRED_FROM_SAMPLES - 1, 3, 4) + 100

    quality = compared([original], [noisy(original, 0.01)])

    assert quality.error == quality.plain_error


def test_an_output_that_is_constant_but_for_rounding_is_compared_as_a_whole():
    constant = np.broadcast_to(random_weights(1, 3, 4), (SAMPLES, 3, 4)).copy()
    jitter = np.nextafter(constant, np.float32(9))
    jitter[::2] = constant[::2]

    assert compared([constant], [jitter]).error < LOSSLESS_ERROR
    assert compared([jitter], [noisy(constant, 0.05)]).error == pytest.approx(0.05, rel=1e-3)


def test_noise_where_there_should_be_zeros_is_an_infinite_error():
    assert compared([np.zeros((SAMPLES, 3, 4), np.float32)], [random_weights(SAMPLES, 3, 4)]).error == math.inf


def test_the_same_infinities_and_nans_are_no_error():
    original = random_weights(SAMPLES, 3, 4)
    original[0, 0], original[1, 1], original[2, 2] = np.inf, -np.inf, np.nan

    quality = compared([original], [original.copy()])

    assert (quality.error, quality.sqnr_db) == (0.0, math.inf)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_infinity_of_its_own_is_an_infinite_error(bad: float):
    original = random_weights(SAMPLES, 3, 4)
    candidate = original.copy()
    candidate[3, 1, 1] = bad

    quality = compared([original], [candidate])

    assert (quality.error, quality.sqnr_db) == (math.inf, -math.inf)


def test_rounding_is_lossless_and_a_wrong_model_is_not():
    original = random_weights(SAMPLES, 3, 4)
    shifted = original.copy()
    shifted[:, 0, 0] += 0.001

    assert compared([original], [np.nextafter(original, np.float32(9))]).plain_error <= LOSSLESS_ERROR
    assert compared([original], [shifted]).plain_error > LOSSLESS_ERROR


def test_whole_numbers_count_by_how_many_differ():
    original = np.arange(SAMPLES * 4).reshape(SAMPLES, 4)
    candidate = original.copy()
    candidate[:, 0] += 1000

    quality = compared([original], [candidate])

    assert (quality.plain_error, quality.error) == (0.25, 0.25)


def test_strings_count_by_how_many_differ():
    words = np.full((SAMPLES, 2), "cat", object)
    other = words.copy()
    other[: SAMPLES // 2, 0] = "dog"

    assert compared([words], [other]).error == 0.25


# --- shapes and kinds of outputs --------------------------------------------------------------------------------------


def test_another_shape_is_an_infinite_error():
    scores = np.tile(np.array([[0.9, 0.1]], np.float32), (SAMPLES, 1))

    quality = compared([scores], [np.concatenate([scores, scores], axis=1)])

    assert (quality.error, quality.drop) == (math.inf, math.inf)


def test_another_type_is_an_infinite_error():
    original = random_weights(SAMPLES, 3, 4)

    assert compared([original], [original.astype(np.float64)]).error == math.inf


def test_outputs_whose_shape_changes_from_run_to_run_are_compared():
    data = dataset(64)
    runs = [[random_weights(3 + number, 6)] for number, _ in enumerate(data.batches())]

    assert len(runs) > 1
    assert of_runs(runs, [[noisy(run[0], 0.2)] for run in runs], data).plain_error == pytest.approx(0.2, rel=0.02)


def test_a_metric_refuses_outputs_whose_shape_changes_from_run_to_run():
    data = dataset(64, np.zeros(64, np.int64))
    runs = [[random_weights(32, 3 + number)] for number, _ in enumerate(data.batches())]

    with pytest.raises(DataError, match="a metric needs outputs of one shape for all samples"):
        Reference(data, runs, get_metric("top1"), None, 0).compare(runs, data)


def test_no_detections_at_all_are_no_error():
    none = [[np.zeros((0, 4), np.float32)] for _ in dataset().batches()]

    assert of_runs(none, none).error == 0.0


def test_sequences_maps_and_empty_optionals_are_spread_out():
    x = np.ones(2, np.float32)

    spread = flatten([[x, [x]], {"cat": 0.25, "dog": 0.75}, None, {3: x}])

    expected = [x, x, ["cat", "dog"], [0.25, 0.75], [], [3], x]
    assert [array.tolist() for array in spread] == [np.asarray(value).tolist() for value in expected]


def test_the_scores_of_a_map_are_one_output():
    likely = [[{"cat": 1e-9, "dog": 1.0}] for _ in dataset().batches()]
    almost = [[{"cat": 2e-9, "dog": 1.0}] for _ in dataset().batches()]

    assert of_runs(likely, almost).error < 1e-8


def test_sequences_that_grow_are_compared_to_their_end():
    data = dataset(96)
    arrays = random_weights(3, 4)
    runs = [[list(arrays[: number + 1])] for number, _ in enumerate(data.batches())]
    wrong = [[list(arrays[: number + 1])] for number, _ in enumerate(data.batches())]
    wrong[2][0][2] = arrays[2] * 1.5

    assert of_runs(runs, runs, data).error == 0.0
    assert of_runs(runs, wrong, data).plain_error == pytest.approx(0.5)


def test_a_sequence_of_another_length_is_an_infinite_error():
    x = np.ones(2, np.float32)
    two, one = [[[x, x]] for _ in dataset().batches()], [[[x]] for _ in dataset().batches()]

    assert of_runs(two, one).error == math.inf
    assert of_runs(one, two).error == math.inf


def test_an_optional_that_the_candidate_leaves_empty_is_an_infinite_error():
    some, none = [[np.ones(2, np.float32)] for _ in dataset().batches()], [[None] for _ in dataset().batches()]

    assert of_runs(some, none).error == math.inf


# --- batches ----------------------------------------------------------------------------------------------------------


def test_the_samples_that_fill_up_a_fixed_batch_do_not_count():
    data = dataset(10, graph="g (float[8, 12] x) => (float[8, 12] y) { y = Relu(x) }")
    first, second = random_weights(8, 3, 2), random_weights(8, 3, 2, seed=1)
    spoilt = second.copy()
    spoilt[2:] = 99  # the second batch holds two samples

    quality = of_runs([[first], [second]], [[first], [spoilt]], data)

    assert (quality.error, quality.samples) == (0.0, 10)


def test_a_run_that_is_one_sample_is_compared_as_a_whole():
    proto = if_model()
    feed = {**random_inputs(proto), "condition": np.array(True)}
    data = open_data([feed] * 3, input_specs(proto))
    right = [run(proto, feed)] * 3
    wrong = [[np.concatenate([outputs[0][:1], outputs[0][1:] * 2])] for outputs in right]

    assert of_runs(right, wrong, data).error > 0.1


def test_inputs_that_are_scalars_are_taken():
    proto = graph_model("g (float[N, 12] x, float s) => (float[N, 12] y) { y = Mul(x, s) }")
    data = generate(proto)
    outputs = [run(proto, feed) for feed in data.feeds()]

    assert of_runs(outputs, outputs, data).error == 0.0


def test_only_as_many_outputs_as_fit_in_memory_are_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.quality.OUTPUT_BYTES", 1000)
    data = dataset(96)
    outputs = random_weights(96, 3, 4)

    reference = Reference(data, in_batches(data, outputs), None, None, 0)

    assert (reference.batches, reference.samples) == (1, 32)
    assert reference.compare(in_batches(data, outputs), data).samples == 32


def test_the_originals_own_metric_is_known():
    labels = np.arange(SAMPLES) % 4
    data = dataset(SAMPLES, labels)
    reference = Reference(data, in_batches(data, np.eye(4, dtype=np.float32)[labels]), get_metric("top1"), None, 0)

    assert reference.metric_value() == 1.0


def boxes_and_scores(seed: int = 0) -> Array:
    """What a detector gives: four coordinates and two scores at each of 30 places."""
    generator = np.random.default_rng(seed)
    boxes = generator.uniform(0, 320, (SAMPLES, 30, 4))
    return np.concatenate([boxes, generator.beta(0.3, 4.0, (SAMPLES, 30, 2))], axis=2).astype(np.float32)


def test_a_detector_is_judged_by_its_scores_and_by_its_boxes():
    original = boxes_and_scores()
    without_scores, moved_boxes = original.copy(), original.copy()
    without_scores[..., 4:] = 0.0
    moved_boxes[..., :4] += 100.0

    lost, moved = compared([original], [without_scores]), compared([original], [moved_boxes])

    assert (lost.kind, lost.detection) == ("expected-drop", True)
    assert lost.drop is not None
    assert lost.drop > 0.1
    assert (lost.error, lost.score_error) == (0.0, 1.0)
    assert lost.plain_error < 0.01  # what the whole output would have said
    assert moved.drop == pytest.approx(0.0, abs=1e-9)
    assert moved.error > 0.5


def test_a_sequence_of_class_scores_is_judged_at_each_step():
    logits = np.random.default_rng(0).normal(0, 4, (SAMPLES, 6, 10))
    scores = (np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)).astype(np.float32)
    turned = scores.copy()
    turned[:, 0] = np.roll(scores[:, 0], 1, axis=1)

    quality = compared([scores], [turned])

    chosen = np.take_along_axis(scores[:, 0], np.roll(scores[:, 0], 1, axis=1).argmax(1)[:, None], 1)[:, 0]
    assert quality.kind == "expected-drop"
    assert quality.drop == pytest.approx(float((scores[:, 0].max(axis=1) - chosen).mean()) / 6, rel=1e-5)
    assert quality.agreement == pytest.approx(5 / 6)
