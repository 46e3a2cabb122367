"""What a report tells of each layer besides its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from onnxcomp import layer_details, optimize, reporting
from onnxcomp.activation_ranges import ActivationRanges
from onnxcomp.deviation import TensorError
from onnxcomp.errors import RuntimeFailure
from onnxcomp.judge import Judge
from onnxcomp.layer_details import MOST_DETAILED
from onnxcomp.ledger import Report
from onnxcomp.model import Model
from onnxcomp.report import schema, to_json
from onnxcomp.runtime import Runtime
from onnxcomp_passes.low_rank import LowRank
from onnxcomp_passes.prune import Prune
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.quantize_dynamic import QuantizeDynamic
from onnxcomp_passes.simplify import Simplify
from tests.models import graph_model, mlp_model, random_weights
from tests.thin_weights import fading

SAMPLES = Path(__file__).parent.parent / "sample_models"
GEMM = "g (float[N,64] x) => (float[N,48] y) { [layer] y = Gemm(x, W, b) }"


def report_of(*passes: Any, model: Any = None, **options: Any) -> Report:
    weights = {"W": fading(64, 48, 2.0), "b": np.zeros(48, np.float32)}
    source = graph_model(GEMM, weights) if model is None else model
    defaults: dict[str, Any] = {"force": True, "timing": False, "layers": True, "resume": False}
    return optimize(source, passes=list(passes), **{**defaults, **options}).report


@pytest.fixture(scope="module")
def int8() -> Report:
    """The mobilenet in int8, on a few samples, timed for a moment only."""
    model, images = SAMPLES / "fashion_mobilenet.onnx", np.load(SAMPLES / "fashion_calib.npz")["image"][:48]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "FINAL_TIMING_SECONDS", 0.02)
        patch.setattr(Judge, "_measured_speed", lambda judge, path: 1.0)
        return report_of(Simplify(), Quantize(), model=model, data={"image": images}, timing=True)


def layer_of(report: Report, name: str) -> dict[str, Any]:
    return next(layer for layer in report.layers if layer["name"] == name)


# --- a quantized model ------------------------------------------------------------------------------------------------


def test_a_report_with_details_is_as_the_schema_says(int8):
    jsonschema.validate(json.loads(to_json(int8)), schema())


def test_each_layer_of_an_int8_model_has_bits_a_cause_and_the_profilers_time(int8):
    for layer in int8.layers:
        assert (layer["bits_before"], layer["bits_after"], layer["rank"]) == (32, 8, None)
        assert 0 < layer["time_ms_before"] < 10
        assert 0 < layer["time_ms_after"] < 10
        assert layer["cause"].partition(":")[0] in {
            "from before", "clipped tail", "shifted means", "one channel", "outlier channel", "rounding"
        }  # fmt: skip


def test_the_range_of_an_activation_is_what_its_codes_stand_for_and_holds_what_was_seen(int8):
    for layer in int8.layers:
        [given, made] = layer["detail"]["activations"]
        assert (given["place"], made["place"]) == ("input", "output")
        assert given["type"] == "uint8"
        assert given["low"] == pytest.approx(-given["zero_point"] * given["scale"])
        assert given["high"] == pytest.approx((255 - given["zero_point"]) * given["scale"])
        assert given["seen_low"] <= given["seen_high"]
        assert given["seen_high"] < 4 * given["high"]
    first = layer_of(int8, "/0/Conv")["detail"]["activations"][0]
    assert (first["seen_low"], first["seen_high"]) == pytest.approx((0, 1))  # the pixels


def test_the_histograms_of_both_models_count_every_weight(int8):
    weights = layer_of(int8, "/14/Gemm")["detail"]["weights"]
    assert sum(weights["before"]) == sum(weights["after"]) == 2400


# --- other rewrites ---------------------------------------------------------------------------------------------------


def test_a_layer_that_was_split_has_its_rank_factors_and_singular_values():
    report = report_of(LowRank(rank=8, min_elements=1))
    layer = layer_of(report, "layer")

    assert layer["rank"] == [8]
    assert layer["cause"] == "low rank: its weight became 2 factors"
    assert layer["detail"]["factors"] == [[64, 8], [8, 48]]
    assert (layer["detail"]["singular_values"]["kept"], layer["detail"]["singular_values"]["total"]) == (8, 48)
    assert sum(layer["detail"]["weights"]["after"]) == 64 * 48


def test_a_layer_that_was_pruned_says_how_much_is_gone():
    layer = layer_of(report_of(Prune(sparsity=0.5)), "layer")
    assert layer["cause"] == "pruned: 50% of its weight became zero"


def test_a_layer_that_did_not_change_has_no_cause():
    assert [layer["cause"] for layer in report_of(Simplify(), model=mlp_model()).layers] == [None, None]


def test_without_timing_no_layer_has_a_time():
    for layer in report_of(LowRank(rank=8, min_elements=1)).layers:
        assert (layer["time_ms_before"], layer["time_ms_after"]) == (None, None)


def test_layers_that_cannot_be_profiled_are_listed_without_times(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        message = "no room for the trace"
        raise RuntimeFailure(message)

    monkeypatch.setattr(Runtime, "profile", refuse)
    monkeypatch.setattr(reporting, "FINAL_TIMING_SECONDS", 0.02)
    report = report_of(Simplify(), model=mlp_model(), timing=True)
    assert [layer["time_ms_before"] for layer in report.layers] == [None, None]
    assert "the layers have no times: no room for the trace" in report.notes


@pytest.mark.parametrize("quantize", [Quantize(), QuantizeDynamic()])
def test_the_factors_of_a_layer_are_found_in_int8_too(quantize):
    samples = {"x": random_weights(32, 64)}
    report = report_of(LowRank(rank=8, min_elements=1), quantize, data=samples)
    layer = layer_of(report, "layer")

    assert (layer["bits_after"], layer["rank"]) == (8, [8])
    weights = layer["detail"]["weights"]
    assert sum(weights["after"]) == 64 * 48
    assert np.abs(np.subtract(weights["before"], weights["after"])).sum() < 0.2 * 64 * 48


def test_the_input_range_of_a_layer_that_was_split_is_that_of_its_first_factor():
    report = report_of(LowRank(rank=8, min_elements=1), Quantize(), data={"x": random_weights(32, 64)})
    [whole] = layer_of(report, "layer")["detail"]["activations"][:1]
    [thin] = [each for layer in report.layers if layer["where"] == "new" for each in layer["detail"]["activations"][:1]]

    assert whole["scale"] == thin["scale"]
    assert whole["low"] == pytest.approx(whole["seen_low"], rel=0.1)
    assert whole["high"] == pytest.approx(whole["seen_high"], rel=0.1)


def test_of_many_layers_the_heaviest_and_the_worst_are_told_of_in_detail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer_details, "MOST_DETAILED", 4)
    sizes = (8, 32, 8, 64, 8, 16, 8)
    report = report_of(Prune(sparsity=0.3), model=mlp_model(sizes))

    told = [layer for layer in report.layers if layer["detail"]]
    assert 2 <= len(told) <= 4
    assert report.layers[0] in told
    assert max(report.layers, key=lambda layer: layer["weight_bytes_before"]) in told
    assert f"histograms and ranges are told of {len(told)} of 6 layers, the heaviest and the worst" in report.notes
    assert MOST_DETAILED == 200


def test_a_layer_has_its_own_weight_where_a_layer_in_a_body_has_its_name():
    def branch(seed: int) -> onnx.GraphProto:
        body = onnx.parser.parse_graph("b () => (float[N,64] t) { [mm] t = MatMul(x, W) }")
        body.initializer.append(onnx.numpy_helper.from_array(random_weights(16, 64, seed=seed), "W"))
        return body

    text = "g (float[N,16] x, bool c) => (float[N,4] y, float[N,64] z) { s = Identity(x) [mm] y = MatMul(s, V) }"
    model = graph_model(text, {"V": random_weights(16, 4)})
    made = onnx.helper.make_node("If", ["c"], ["z"], then_branch=branch(1), else_branch=branch(2), name="if")
    model.graph.node.append(made)

    report = report_of(Simplify(), model=model)
    layer = layer_of(report, "mm")
    assert (layer["weight_before"], layer["weight_shape"]) == ("V", (16, 4))
    assert layer["detail"]["weights"]["before_values"] == 64
    inner = [each for each in report.layers if each["weight_before"] == "W"]
    assert [each["weight_shape"] for each in inner] == [(16, 64)] * 2
    assert [each["detail"]["weights"] for each in inner] == [None, None]  # which of both is not known


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_an_operator_of_codes_tells_its_own_scales():
    text = """g (uint8[N,3,8,8] x) => (uint8[N,4,6,6] y) {
        [layer] y = QLinearConv(x, s, z, w, ws, wz, t, u)
    }"""
    weights = {
        "s": np.float32(0.5), "z": np.uint8(10), "t": np.float32(0.25), "u": np.uint8(255),
        "w": random_weights(4, 3, 3, 3).astype(np.int8), "ws": np.float32(1), "wz": np.int8(0),
    }  # fmt: skip
    ranges = ActivationRanges(Model.load(graph_model(text, weights))).of_layer("layer", ["y"], {})
    assert [(each["low"], each["high"], each["seen_low"]) for each in ranges] == [
        (-5.0, 122.5, None),
        (-63.75, 0.0, None),
    ]


def test_a_scale_that_is_computed_is_not_told_and_what_was_seen_is():
    text = "g (float[N,8] x) => (float[N,8] y) { [layer] y = MatMul(x, W) }"
    seen = TensorError()
    seen.update(np.array([[1.0, -2.0]], np.float32), np.array([[1.0, -2.0]], np.float32))
    [found] = ActivationRanges(Model.load(graph_model(text, W=random_weights(8, 8)))).of_layer(
        "layer", ["y"], {"input": seen, "output": TensorError()}
    )
    assert (found["place"], found["seen_low"], found["seen_high"], found["scale"]) == ("input", -2.0, 1.0, None)
