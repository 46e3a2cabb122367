from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxcomp.comparison import compare, shortfalls
from onnxcomp.errors import DataError, ModelError, OptionError
from onnxcomp.metrics import Metric
from tests.small import INPUTS, classifier, save_classifier, save_samples


def model(body: str, opset: int = 17) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {body}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison")
    save_classifier(path / "a.onnx")
    save_classifier(path / "near.onnx", noise=0.01)
    save_classifier(path / "far.onnx", seed=5)
    save_samples(path / "test.npz")
    return path


def test_a_model_equals_itself(folder):
    found = compare(folder / "a.onnx", folder / "a.onnx", data=folder / "test.npz", timing=False)
    assert found.size == 1
    assert found.after.drop == 0
    assert found.after.error == 0
    assert found.after.metric == found.before.metric == 1.0
    assert found.sqnr_db == {"scores": math.inf}
    assert found.before.kernels == found.after.kernels


def test_finds_what_another_model_loses(folder):
    found = compare(folder / "a.onnx", folder / "far.onnx", data=folder / "test.npz", timing=False)
    assert found.metric == {"name": "top1", "higher_is_better": True}
    assert found.after.metric is not None
    assert found.after.drop == pytest.approx(1 - found.after.metric)
    assert found.after.drop is not None
    assert found.after.drop > 0.3
    assert found.sqnr_db["scores"] < 3


def test_a_little_noise_is_a_little_loss(folder):
    found = compare(folder / "a.onnx", folder / "near.onnx", data=folder / "test.npz", timing=False)
    assert 25 < found.sqnr_db["scores"] < 60
    assert found.after.sqnr_db == pytest.approx(found.sqnr_db["scores"], abs=1e-6)


def test_times_both_models_in_turn(folder):
    found = compare(folder / "a.onnx", folder / "near.onnx", data=folder / "test.npz")
    assert found.before.latency_evidence == "measured"
    assert found.before.latency_ms is not None
    assert found.after.latency_ms is not None
    assert found.speed == pytest.approx(found.before.latency_ms / found.after.latency_ms)


def test_does_not_time_for_a_machine_that_this_is_not(folder):
    found = compare(folder / "a.onnx", folder / "near.onnx", target="qnn")
    assert found.speed is None
    assert found.before.latency_evidence == "not measured"
    assert "speed was not measured: the target qnn is not this machine" in found.warnings


def test_without_data_inputs_are_made_up_and_it_says_so(folder):
    found = compare(folder / "a.onnx", folder / "near.onnx", timing=False)
    assert found.data["generated"]
    assert found.metric is None
    assert any("made-up inputs" in text for text in found.warnings)


def test_takes_models_and_arrays_in_memory():
    data = {"x": np.random.default_rng(0).normal(size=(10, INPUTS)).astype(np.float32)}
    found = compare(classifier(), classifier(noise=0.01), data=data, timing=False)
    assert (found.original, found.new) == ("model", "model")
    assert found.data["samples"] == 10


def test_a_model_with_a_fixed_batch_is_fed_as_it_wants(folder):
    fixed = classifier(noise=0.01)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    dynamic = compare(folder / "a.onnx", folder / "near.onnx", data=folder / "test.npz", timing=False)
    found = compare(folder / "a.onnx", fixed, data=folder / "test.npz", timing=False)
    assert found.after.metric == dynamic.after.metric
    assert found.sqnr_db["scores"] == pytest.approx(dynamic.sqnr_db["scores"], abs=0.01)


def test_tells_outputs_apart():
    body = "g (float[N,4] x) => (float[N,4] a, float[N,4] b) {{ a = Relu(x) b = {}(x) }}"
    found = compare(model(body.format("Abs")), model(body.format("Neg")), timing=False)
    assert found.sqnr_db["a"] == math.inf
    assert found.sqnr_db["b"] < 0


def test_outputs_in_another_order_are_matched_by_name():
    one = model("g (float[N,4] x) => (float[N,4] a, float[N,4] b) { a = Relu(x) b = Neg(x) }")
    other = model("g (float[N,4] x) => (float[N,4] b, float[N,4] a) { a = Relu(x) b = Neg(x) }")
    assert set(compare(one, other, timing=False).sqnr_db.values()) == {math.inf}


def test_refuses_models_with_other_inputs():
    one = model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    other = model("g (float[N,4] z) => (float[N,4] y) { y = Relu(z) }")
    with pytest.raises(ModelError, match="same inputs; the original has x, the new one z"):
        compare(one, other)
    wide = model("g (float[N,5] x) => (float[N,5] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match=r"'x' is float32 \(N, 4\) in the original and float32 \(N, 5\) in the new"):
        compare(one, wide)


def test_refuses_models_with_other_outputs():
    one = model("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    other = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x) z = Neg(x) }")
    with pytest.raises(ModelError, match="same outputs; the original has y, the new one y, z"):
        compare(one, other)


def test_a_metric_needs_labels(folder):
    with pytest.raises(DataError, match="metric 'top5' needs labels"):
        compare(folder / "a.onnx", folder / "near.onnx", metric="top5")


def test_layers_are_compared_when_asked_for(folder):
    found = compare(folder / "a.onnx", folder / "near.onnx", data=folder / "test.npz", timing=False, layers=True)
    assert found.layers is not None
    assert {(row.name, row.op, row.where, row.tensor) for row in found.layers} == {
        ("first", "Gemm", "both", "h"),
        ("head", "Gemm", "both", "scores"),
    }
    last = next(row for row in found.layers if row.name == "head")
    assert last.sqnr_db == pytest.approx(found.sqnr_db["scores"], abs=0.01)
    assert compare(folder / "a.onnx", folder / "near.onnx", timing=False).layers is None


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(folder):
    return compare(folder / "a.onnx", folder / "near.onnx", data=folder / "test.npz", timing=False)


def test_limits_that_are_reached_say_nothing(found):
    assert shortfalls(found, {"top1": 0.5, "sqnr": 20, "size": 0.99}) == []


def test_limits_that_are_missed_are_told(found):
    lines = shortfalls(found, {"sqnr": 200, "size": 1.5})
    assert lines[0].startswith("sqnr is ")
    assert lines[0].endswith(", under the limit of 200")
    assert lines[1] == "size is 1, under the limit of 1.5"


def test_a_limit_on_what_was_not_measured_is_an_error(found):
    with pytest.raises(OptionError, match="'speed' was not measured, so it has no limit to keep; measured were sqnr"):
        shortfalls(found, {"speed": 1})
    with pytest.raises(OptionError, match="'top9' was not measured"):
        shortfalls(found, {"top9": 1})


def test_where_lower_is_better_a_limit_is_the_most_that_will_do(folder):
    loss = Metric("loss", False, lambda outputs, labels: 0.25)
    found = compare(folder / "a.onnx", folder / "a.onnx", data=folder / "test.npz", metric=loss, timing=False)
    assert shortfalls(found, {"loss": 0.25}) == []
    assert shortfalls(found, {"loss": 0.2}) == ["loss is 0.25, above the limit of 0.2"]


def test_an_external_model_file_is_compared_where_it_lies(folder, tmp_path):
    onnx.save(classifier(), tmp_path / "e.onnx", save_as_external_data=True, size_threshold=0, location="e.data")
    found = compare(folder / "a.onnx", tmp_path / "e.onnx", timing=False)
    assert found.after.error == 0
    assert found.size == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("body", "random"), [("RandomNormalLike(x)", True), ("Exp(x)", False)])
def test_says_that_the_original_is_random(body, random):
    one = model(f"g (float[N, 4] x) => (float[N, 4] y) {{ y = {body} }}")
    other = model("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")

    found = compare(one, other, timing=False)

    assert any("random" in warning for warning in found.warnings) is random
