"""Models made for each target: they obey its rules, and ONNX Runtime, set to fuse as the target does, runs the int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import onnxcomp
from onnxcomp.model import Model, value_of
from onnxcomp.pipeline import Result
from onnxcomp.runtime import Runtime, explain
from onnxcomp.targets import TARGETS, find_target
from onnxcomp_passes import Quantize, Simplify
from tests.models import graph_model, mlp_model, proto_of, random_weights, run

SAMPLES = 64
LOOSE = onnxcomp.Budget(max_drop=1.0, max_error=0.5)
"""The weights are random: what is asked here is which kernels run, and that the outputs are not unrelated (1.4)."""

INT8_TARGETS = [name for name, target in TARGETS.items() if target.rules]
LAYERS = ("Conv", "Gemm", "MatMul")

every_int8_target = pytest.mark.parametrize("name", INT8_TARGETS)


def cnn_model() -> onnx.ModelProto:
    """Conv, depthwise Conv, a residual Add, both poolings, Gemm, Softmax, on x: (N, 3, 12, 12)."""
    text = """g (float[N, 3, 12, 12] x) => (float[N, 5] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W0, b0)              r = Relu(a)
        d = Conv<pads = [1, 1, 1, 1], group = 8>(r, W1, b1)   s = Relu(d)
        c = Conv(s, W2, b2)   t = Add(r, c)   u = Relu(t)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(u)
        e = Conv(p, W3, b3)   v = Relu(e)
        m = GlobalAveragePool(v)   f = Flatten(m)   h = Gemm(f, W4, b4)   y = Softmax(h)
    }"""
    shapes = [(8, 3, 3, 3), (8, 1, 3, 3), (8, 8, 1, 1), (16, 8, 3, 3), (16, 5)]
    weights: dict[str, Any] = {}
    for index, shape in enumerate(shapes):
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        weights[f"W{index}"] = random_weights(*shape, seed=index, scale=fan_in**-0.5)
        weights[f"b{index}"] = random_weights(shape[0] if len(shape) > 2 else shape[1], seed=9 + index, scale=0.1)
    return graph_model(text, weights)


MODELS = {"cnn": (cnn_model, (3, 12, 12)), "mlp": (lambda: mlp_model((32, 64, 32, 5)), (32,))}


def data_of(kind: str) -> dict[str, Any]:
    shape = (SAMPLES, *MODELS[kind][1])
    return {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def optimized(kind: str, name: str, **options: Any) -> Result:
    defaults = {"passes": [Simplify(), Quantize()], "timing": False, "budget": LOOSE, "resume": False}
    return onnxcomp.optimize(MODELS[kind][0](), data=data_of(kind), target=name, **{**defaults, **options})


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], Result]:
    """Each model for each target, fixed to one sample where the target wants static shapes."""
    return {
        (kind, name): optimized(kind, name, shapes={"x": (1, *MODELS[kind][1])}) for kind in MODELS for name in TARGETS
    }


@dataclass(frozen=True)
class Quantized:
    """A layer with a quantized weight: the node, its codes, their scale, and its other quantized neighbours."""

    node: gs.Node
    codes: np.ndarray[Any, Any]
    scale: np.ndarray[Any, Any]


def quantized_layers(result: Result) -> Iterator[Quantized]:
    for node in result.model.graph.nodes:
        if node.op in LAYERS and node.inputs[1].inputs and node.inputs[1].inputs[0].op == "DequantizeLinear":
            decode = node.inputs[1].inputs[0]
            yield Quantized(node, value_of(decode.inputs[0]), value_of(decode.inputs[1]))


def activation_types(result: Result) -> set[str]:
    return {str(node.inputs[2].dtype) for node in result.model.graph.nodes if node.op == "QuantizeLinear"}


# --- the rules of the table -------------------------------------------------------------------------------------------


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_activations_have_the_target_s_type(results: Mapping[Any, Result], kind: str, name: str):
    rules = find_target(name).rules
    assert rules is not None
    quantized = activation_types(results[kind, name])

    assert quantized == (set() if (kind, name) == ("mlp", "xnnpack") else {rules.activations})


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_symmetric_int8_in_the_target_s_range(results: Mapping[Any, Result], kind: str, name: str):
    rules = find_target(name).rules
    assert rules is not None
    for layer in quantized_layers(results[kind, name]):
        zero_points = layer.node.inputs[1].inputs[0].inputs[2:]
        assert layer.codes.dtype == np.int8
        assert all(not value_of(zero).any() for zero in zero_points)
        assert np.abs(layer.codes.astype(int)).max() == (63 if rules.reduce_range else 127)


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_weights_have_a_scale_a_channel_where_the_target_takes_it(results: Mapping[Any, Result], kind: str, name: str):
    rules = find_target(name).rules
    assert rules is not None
    for layer in quantized_layers(results[kind, name]):
        channels = layer.codes.shape[0 if layer.node.op == "Conv" else 1]
        assert layer.scale.shape == ((channels,) if rules.channel_scales(layer.node.op) else ())


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_only_operators_with_kernels_on_the_target_are_quantized(results: Mapping[Any, Result], kind: str, name: str):
    rules = find_target(name).rules
    assert rules is not None
    found = [layer.node.op for layer in quantized_layers(results[kind, name])]

    wanted = {"cnn": ["Conv"] * 4 + ["Gemm"], "mlp": ["Gemm"] * 3}[kind]
    assert sorted(found) == sorted(op for op in wanted if rules.supports(op))


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_the_int8_kernels_are_in_the_census_of_the_target_s_session(
    results: Mapping[Any, Result], tmp_path: Path, kind: str, name: str
):
    target, result = find_target(name), results[kind, name]
    path = tmp_path / "model.onnx"
    result.save(path)
    config = {} if target.is_host else dict(target.session_config)
    with Runtime(session_config=config) as runtime:
        census = runtime.census(path)

    report = explain(result.model.proto(), census)
    assert not report.missed
    assert len(report.int8) == len(list(quantized_layers(result)))
    assert result.report.after.kernels == census.counts()


@every_int8_target
@pytest.mark.parametrize("kind", MODELS)
def test_the_outputs_are_those_of_the_float_model_to_8_bits(results: Mapping[Any, Result], kind: str, name: str):
    one = {"x": data_of(kind)["x"][:1]}
    [wanted], [got] = run(MODELS[kind][0](), one), run(results[kind, name].model, one)

    assert np.abs(wanted - got).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["nnapi", "qnn"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_ends_in_a_quantizelinear_where_the_target_wants_it(
    results: Mapping[Any, Result], kind: str, name: str
):
    ends = [layer.node.outputs[0].outputs for layer in quantized_layers(results[kind, name])]

    assert all([reader.op for reader in readers if reader.op != "Relu"] == ["QuantizeLinear"] for readers in ends)


def test_xnnpack_gets_its_weights_zero_points_written(results: Mapping[Any, Result]):
    for layer in quantized_layers(results["cnn", "xnnpack"]):
        [zero_point] = layer.node.inputs[1].inputs[0].inputs[2:]  # without it XNNPACK refuses the model
        assert (zero_point.dtype, tuple(zero_point.shape)) == (np.int8, layer.scale.shape)


def test_coreml_gets_small_weights_and_no_quantizelinear():
    result = optimized("mlp", "coreml", passes=None, shapes={"x": (1, 32)})

    operators = {node.op for node in result.model.graph.nodes}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}
    assert result.report.size > 2
    assert any(tensor.dtype == np.int8 for tensor in result.model.constants())


def test_a_layer_that_the_target_cannot_run_in_int8_is_named(results: Mapping[Any, Result]):
    attempt = results["mlp", "xnnpack"].report.stages[-1].attempts[-1]

    assert [left["why"] for left in attempt.passes[0].left] == ["xnnpack has no int8 Gemm"] * 3


def test_the_range_of_a_softmax_is_known(tmp_path: Path):
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        h = MatMul(x, W)   s = Softmax(h)   y = MatMul(s, V) }"""
    model = graph_model(text, W=random_weights(16, 16), V=random_weights(16, 16, seed=1))
    data = {"x": np.random.default_rng(0).normal(size=(SAMPLES, 16)).astype(np.float32)}
    result = onnxcomp.optimize(
        model, data=data, target="web", passes=[Quantize(choose=False)], budget=LOOSE, force=True, resume=False
    )

    quantize = next(n for n in result.model.graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "s")
    assert float(value_of(quantize.inputs[1])) == 1 / 256
    assert int(value_of(quantize.inputs[2])) == 0


# --- 16-bit activations -----------------------------------------------------------------------------------------------


def sigmoid_model() -> onnx.ModelProto:
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        h = Gemm(x, W, b)   s = Sigmoid(h)   y = Gemm(s, V, b) }"""
    weights = {name: random_weights(16, 16, seed=seed) for seed, name in enumerate("WV")}
    for name, weight in weights.items():  # on the grid of int8, so that only activations are rounded
        weights[name] = (np.rint(127 / np.abs(weight).max() * weight) / 256).astype(np.float32)
    return graph_model(text, weights, b=random_weights(16, scale=0.1))


def widened(name: str) -> Result:
    few = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    data = {"x": np.tile(few, (SAMPLES // 4, 1))}  # few, so that calibration sees every value and none is cut off
    quantize = Quantize(choose=False, remedies=("widen-activations",))
    return onnxcomp.optimize(
        sigmoid_model(), data=data, target=name, passes=[quantize], budget=LOOSE, timing=False, resume=False
    )


@every_int8_target
def test_activations_have_16_bits_only_where_the_target_has_kernels_for_them(name: str):
    assert (activation_types(widened(name)) == {"uint16"}) == (name == "qnn")


def test_16_bit_layers_count_by_the_target_s_rules_since_no_cpu_shows_them():
    after = widened("qnn").report.after

    assert not any(kernel.startswith(("QGemm", "QLinear", "MatMulInteger")) for kernel in after.kernels)
    assert after.int8_macs == after.macs == 2 * 16 * 16


def test_a_16_bit_sigmoid_has_the_scale_that_qnn_asks_for():
    nodes = widened("qnn").model.graph.nodes
    quantize = next(n for n in nodes if n.op == "QuantizeLinear" and "Sigmoid" in [m.op for m in n.inputs[0].inputs])

    assert float(value_of(quantize.inputs[1])) == 1 / 65536
    assert int(value_of(quantize.inputs[2])) == 0


def test_16_bits_before_opset_21_are_onnx_runtime_s_own_operators():
    result = widened("qnn")
    domains = {n.domain for n in result.model.graph.nodes if n.op == "QuantizeLinear"}

    assert result.model.opset < 21
    assert domains == {"com.microsoft"}
    onnx.checker.check_model(result.model.to_proto())


def test_16_bits_are_nearer_to_the_float_model():
    def error(result: Result) -> float:
        return result.report.after.error or 0.0

    assert error(widened("qnn")) < 0.05 * error(widened("nnapi"))  # a step is 256 times smaller; biases round too


@pytest.mark.parametrize(("limit", "expected"), [(0.5, "uint8"), (1e-6, "uint16")])
def test_16_bits_are_tried_where_8_do_not_hold(limit: float, expected: str):
    data = {"x": np.random.default_rng(0).normal(size=(SAMPLES, 16)).astype(np.float32)}
    result = onnxcomp.optimize(
        sigmoid_model(),
        data=data,
        target="qnn",
        passes=[Quantize()],
        budget=onnxcomp.Budget(max_drop=limit, max_error=limit),
        timing=False,
        resume=False,
    )

    told = " ".join(
        note for stage in result.report.stages for a in stage.attempts for p in a.passes for note in p.notes
    )
    assert ("widen-activations" in told) == (expected == "uint16")


# --- static shapes ----------------------------------------------------------------------------------------------------


def dims(model: Model) -> list[list[int | str]]:
    graph = proto_of(model).graph
    return [
        [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.input, *graph.output)
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_axes_are_fixed_where_the_target_wants_static_shapes(results: Mapping[Any, Result], name: str):
    static = find_target(name).static_shapes
    result = results["cnn", name]

    first: int | str = 1 if static else "N"
    assert dims(result.model) == [[first, 3, 12, 12], [first, 5]]
    assert any("axes are fixed" in note for note in result.report.notes) == static
    assert not any("wants static shapes" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("name", TARGETS)
def test_dynamic_axes_that_the_target_does_not_take_are_warned_of(name: str):
    text = "g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }"
    result = onnxcomp.optimize(graph_model(text), target=name, timing=False, resume=False)

    warned = [warning for warning in result.report.warnings if "wants static shapes" in warning]
    assert dims(result.model)[0] == ["N", 3, "H", 8]
    assert bool(warned) == find_target(name).static_shapes
    assert all("'x' float32 (N, 3, H, 8); give --shape" in warning for warning in warned)


def test_axes_that_no_shape_was_given_for_are_taken_from_the_data_and_a_batch_is_1():
    text = "g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }"
    data = {"x": np.ones((6, 3, 5, 8), np.float32)}
    result = onnxcomp.optimize(graph_model(text), target="nnapi", data=data, timing=False, resume=False)

    assert dims(result.model) == [[1, 3, 5, 8], [1, 3, 5, 8]]
    assert not any("wants static shapes" in warning for warning in result.report.warnings)


def test_axes_stay_dynamic_where_the_samples_differ_in_them():
    text = "g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }"
    data = [{"x": np.ones((1, 3, size, 8), np.float32)} for size in (5, 6, 7, 8)]
    result = onnxcomp.optimize(graph_model(text), target="nnapi", data=data, timing=False, resume=False)

    assert dims(result.model)[0] == ["N", 3, "H", 8]


def test_a_dynamic_batch_is_taken_by_xnnpack():
    text = "g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = Relu(x) }"
    result = onnxcomp.optimize(graph_model(text), target="xnnpack", timing=False, resume=False)

    assert not any("static" in warning for warning in result.report.warnings)


def test_a_model_that_is_only_fixed_still_runs(tmp_path: Path):
    text = "g (float[N, 3, H, 8] x) => (float[N, 3, 8, H] y) { y = Transpose<perm = [0, 1, 3, 2]>(x) }"
    source = tmp_path / "model.onnx"
    onnx.save(graph_model(text), source)
    result = onnxcomp.optimize(source, target="qnn", shapes={"x": (2, 3, 5, 8)}, timing=False, resume=False)

    assert dims(result.model) == [[2, 3, 5, 8], [2, 3, 8, 5]]
    x = np.ones((2, 3, 5, 8), np.float32)
    assert run(result.model, {"x": x})[0].shape == (2, 3, 8, 5)


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(onnxcomp.OptionError, match="has 4 axes, but the shape 1,3 has 2"):
        optimized("cnn", "qnn", shapes={"x": (1, 3)})


# --- several targets --------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each calibration watches; one entry a calibration."""
    calls: list[int] = []
    observe = Runtime.observe

    def counted(self: Runtime, path: Path, feeds: Any, observers: Mapping[str, Any], **options: Any) -> Any:
        calls.append(len(observers))
        return observe(self, path, feeds, observers, **options)

    monkeypatch.setattr(Runtime, "observe", counted)
    return calls


def test_targets_that_fix_the_same_axes_share_one_calibration(calibrations: list[int]):
    shared = onnxcomp.Shared()
    kinds = {}
    for name in ("arm64", "xnnpack", "x86", "nnapi", "qnn"):
        kinds[name] = activation_types(optimized("cnn", name, shared=shared))

    assert len(calibrations) == 2  # nnapi and qnn want a fixed batch, which makes it another model
    assert kinds == {"arm64": {"int8"}, "xnnpack": {"int8"}, "x86": {"uint8"}, "nnapi": {"uint8"}, "qnn": {"uint8"}}


def test_a_shared_calibration_gives_what_one_of_its_own_gives():
    shared = onnxcomp.Shared()
    for name in ("xnnpack", "arm64", "qnn"):
        assert optimized("cnn", name, shared=shared).model.digest == optimized("cnn", name).model.digest


def test_other_data_are_not_taken_for_shared_ones(calibrations: list[int]):
    shared = onnxcomp.Shared()
    for seed in (0, 1):
        optimized("mlp", "arm64", shared=shared, seed=seed)  # the seed decides which samples calibrate

    assert len(calibrations) == 2


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.is_host])
def test_another_target_is_never_timed_on_this_clock(monkeypatch: pytest.MonkeyPatch, name: str):
    def clock(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(Runtime, "time", clock)
    monkeypatch.setattr(Runtime, "profile", clock)
    after = optimized("cnn", name, timing=True).report.after

    assert after.latency_ms is None
    assert after.load_ms is None
    assert after.latency_evidence == ("same kernels" if name == "coreml" else "estimated")


def test_a_loss_that_this_machine_exaggerates_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp.targets.host_target", lambda: TARGETS["x86"])

    told = {
        name: any("saturate" in text for text in optimized("mlp", name).report.warnings) for name in ("arm64", "x86")
    }
    assert told == {"arm64": True, "x86": False}
