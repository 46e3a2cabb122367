"""`quantize`: int8 kernels that really run, and layers that stay float for a reason."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from onnxcomp.calibration import METHODS
from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime, explain
from onnxcomp.targets import find_target
from onnxcomp_passes import _placement
from onnxcomp_passes._search import expected_fewest, fewest, most_worth_ranking
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.quantize_weights import QuantizeWeights
from tests.models import mlp_model
from tests.quantizing import quantize

INT8_ERROR = 0.05
"""Two or three layers at 8 bits: each rounding adds about 1/255 of the range, a few percent of the signal."""

SAMPLES = 32


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    scale = 1.0 / np.sqrt(np.prod(shape[1:]) if len(shape) > 2 else shape[0])
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


def graph(text: str, *, opset: int = 17, **constants: np.ndarray[Any, Any]) -> Model:
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text}')
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}{index}"
        if node.domain == "ai.onnx":
            node.ClearField("domain")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return Model.load(proto)


def conv_net(tail: str = "y = Relu(c)", **more: Any) -> Model:
    text = "(float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y) { c = Conv<pads = [1, 1, 1, 1]>(x, W, b) " + tail + " }"
    return graph(text, W=weights(8, 3, 3, 3), b=weights(8, 1).reshape(8), **more)


def inputs(model: Model, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal([SAMPLES, *(d if isinstance(d, int) else 4 for d in spec.shape[1:])]).astype(
            np.float32
        )
        for spec in input_specs(model.proto())
    }


def quantized(
    model: Model, runtime: Runtime, folder: Path, target: str = "x86-vnni", **options: Any
) -> tuple[Model, Changes]:
    data = open_data(inputs(model), input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=folder, target=find_target(target))
    result = model.fork()
    return result, Quantize(**options).rewrite(result, context)


def run(model: Model, runtime: Runtime, path: Path, *, optimize: bool = True) -> list[Any]:
    model.save(path)
    return next(iter(runtime.run(path, [inputs(model, seed=2)], optimize=optimize)))


def kernels(model: Model, runtime: Runtime, path: Path) -> dict[str, int]:
    model.save(path)
    return runtime.census(path).counts()


def assert_close(model: Model, result: Model, runtime: Runtime, folder: Path) -> None:
    wanted = run(model, runtime, folder / "float.onnx")[0]
    for optimize in (True, False):
        got = run(result, runtime, folder / f"int8-{optimize}.onnx", optimize=optimize)[0]
        assert relative_error([(wanted, got)]) < INT8_ERROR


def test_makes_one_int8_kernel_of_conv_and_relu(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()

    result, changes = quantized(model, runtime, tmp_path)

    counts = kernels(result, runtime, tmp_path / "k.onnx")
    assert counts["QLinearConv"] == 1
    assert "Conv" not in counts
    assert "Relu" not in [node.op for node in result.graph.nodes]
    assert changes.count == 1
    assert_close(model, result, runtime, tmp_path)


def test_takes_relu6_into_the_range_of_the_output(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net("y = Clip(c, low, high)", low=np.asarray(0, np.float32), high=np.asarray(0.5, np.float32))

    result, _ = quantized(model, runtime, tmp_path)

    assert kernels(result, runtime, tmp_path / "k.onnx")["QLinearConv"] == 1
    assert_close(model, result, runtime, tmp_path)


def test_keeps_a_clip_that_does_not_start_at_zero(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net("y = Clip(c, low, high)", low=np.asarray(-0.2, np.float32), high=np.asarray(0.5, np.float32))

    result, _ = quantized(model, runtime, tmp_path)

    assert "Clip" in [node.op for node in result.graph.nodes]
    assert_close(model, result, runtime, tmp_path)


def test_runs_a_residual_block_in_int8_throughout(runtime: Runtime, tmp_path: Path) -> None:
    text = """(float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W, b)  r = Relu(a)
        c = Conv<pads = [1, 1, 1, 1]>(r, V)     s = Add(r, c)  t = Relu(s)
        y = Conv<pads = [1, 1, 1, 1]>(t, U) }"""
    model = graph(
        text,
        W=weights(8, 3, 3, 3),
        b=weights(8, 1).reshape(8),
        V=weights(8, 8, 3, 3, seed=1),
        U=weights(8, 8, 3, 3, seed=2),
    )

    result, _ = quantized(model, runtime, tmp_path)

    counts = kernels(result, runtime, tmp_path / "k.onnx")
    assert (counts["QLinearConv"], counts["QLinearAdd"]) == (3, 1)
    assert not {"Conv", "Add", "Relu"} & counts.keys()
    assert_close(model, result, runtime, tmp_path)


def test_follows_pooling_and_flatten_into_a_gemm(runtime: Runtime, tmp_path: Path) -> None:
    text = """(float[N, 3, 8, 8] x) => (float[N, 5] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, W, b)  r = Relu(a)  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
        f = Flatten(p)  y = Gemm<transB = 1>(f, V, c) }"""
    model = graph(
        text,
        W=weights(8, 3, 3, 3),
        b=weights(8, 1).reshape(8),
        V=weights(5, 128, seed=1),
        c=weights(5, 1, seed=2).reshape(5),
    )

    result, _ = quantized(model, runtime, tmp_path)

    counts = kernels(result, runtime, tmp_path / "k.onnx")
    assert (counts["QLinearConv"], counts["QGemm"]) == (1, 1)
    assert "DequantizeLinear" not in counts
    assert_close(model, result, runtime, tmp_path)


def test_leaves_the_mask_arithmetic_around_an_attention_matmul_in_float(runtime: Runtime, tmp_path: Path) -> None:
    text = """(float[N, 4, 16] x) => (float[N, 4, 16] y) {
        q = MatMul(x, W)  m = Add(q, minus)  s = Softmax(m)  y = MatMul(s, V) }"""
    model = graph(text, W=weights(16, 16), V=weights(16, 16, seed=1), minus=np.array([-1e4] * 8 + [0] * 8, np.float32))

    result, _ = quantized(model, runtime, tmp_path)

    readers = {node.op: [t.inputs[0].op for t in node.inputs if t.inputs] for node in result.graph.nodes}
    assert readers["Softmax"] == ["Add"]
    assert kernels(result, runtime, tmp_path / "k.onnx")["MatMulIntegerToFloat"] == 2
    assert_close(model, result, runtime, tmp_path)


def test_takes_over_the_codes_of_stored_weights(runtime: Runtime, tmp_path: Path) -> None:
    model = graph("(float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, W) }", W=weights(64, 64))
    QuantizeWeights().rewrite(model, Context())
    codes = next(tensor for tensor in model.constants() if tensor.dtype == np.int8)
    wanted = np.array(codes.values)

    result, _ = quantized(model, runtime, tmp_path)

    weight = next(t for t in result.constants() if t.dtype == np.int8 and len(t.shape) == 2)
    np.testing.assert_array_equal(weight.values, wanted)
    assert not {"Cast", "Mul"} & {node.op for node in result.graph.nodes}


def test_quantizes_weights_hidden_in_constant_nodes(runtime: Runtime, tmp_path: Path) -> None:
    proto = conv_net().to_proto()
    hidden = proto.graph.initializer.pop(0)
    proto.graph.node.insert(0, helper.make_node("Constant", [], [hidden.name], value=hidden))
    model = Model.load(proto)

    result, changes = quantized(model, runtime, tmp_path)

    assert changes.count == 1
    assert_close(model, result, runtime, tmp_path)


def test_one_scale_a_weight_on_request(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()

    result, _ = quantized(model, runtime, tmp_path, per_channel=False)

    assert {tensor.shape for tensor in scales(result)} == {()}
    assert kernels(result, runtime, tmp_path / "k.onnx")["QLinearConv"] == 1
    assert_close(model, result, runtime, tmp_path)


def test_uses_seven_bits_for_x86_without_vnni(runtime: Runtime, tmp_path: Path) -> None:
    result, _ = quantized(conv_net(), runtime, tmp_path, target="x86")

    codes = next(t for t in result.constants() if t.dtype == np.int8 and len(t.shape) == 4)
    assert np.abs(codes.values).max() == 63


def test_uses_int8_activations_for_arm(runtime: Runtime, tmp_path: Path) -> None:
    result, _ = quantized(conv_net(), runtime, tmp_path, target="arm64")

    zero_points = [node.inputs[2] for node in result.graph.nodes if node.op == "QuantizeLinear"]
    assert {tensor.dtype for tensor in zero_points} == {np.dtype(np.int8)}


def test_has_nothing_to_do_for_a_target_without_int8_kernels(runtime: Runtime, tmp_path: Path) -> None:
    _, changes = quantized(conv_net(), runtime, tmp_path, target="coreml")

    assert changes.count == 0
    assert "no int8 kernels" in changes.left[0].why


def test_leaves_a_quantized_model_alone(runtime: Runtime, tmp_path: Path) -> None:
    once, _ = quantized(conv_net(), runtime, tmp_path)

    twice, changes = quantized(once, runtime, tmp_path)

    assert twice.digest == once.digest
    assert (changes.count, changes.left[0].why) == (0, "is already quantized")


def test_leaves_a_layer_alone_whose_input_holds_infinity(runtime: Runtime, tmp_path: Path) -> None:
    model = graph(
        "(float[N, 16] x) => (float[N, 16] y) { z = Div(x, zero)  a = MatMul(z, W)  y = MatMul(x, W) }",
        W=weights(16, 16),
        zero=np.zeros(1, np.float32),
    )

    _, changes = quantized(model, runtime, tmp_path)

    assert [change.where for change in changes.changed] == ["MatMul2"]
    assert any(left.where == "z" and "infinity" in left.why for left in changes.left)


def test_raises_the_opset_for_per_channel_scales(runtime: Runtime, tmp_path: Path) -> None:
    model = graph("(float[N, 16] x) => (float[N, 16] y) { y = MatMul(x, W) }", opset=11, W=weights(16, 16))

    result, _ = quantized(model, runtime, tmp_path)

    assert result.opset == 13
    assert_close(model, result, runtime, tmp_path)


def test_gives_a_large_bias_beside_tiny_weights_room(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()
    model.set_weight("W", model.weight("W") * np.float32(1e-9))
    model.set_weight("b", np.full(8, 100, np.float32))

    result, _ = quantized(model, runtime, tmp_path)

    assert_close(model, result, runtime, tmp_path)


def test_gives_channels_of_zeros_a_scale(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()
    weight = np.array(model.weight("W"))
    weight[3] = 0
    model.set_weight("W", weight)

    result, _ = quantized(model, runtime, tmp_path)

    assert all(np.isfinite(t.values).all() and (t.values > 0).all() for t in scales(result))
    assert_close(model, result, runtime, tmp_path)


def scales(model: Model) -> list[Any]:
    return [node.inputs[1] for node in model.graph.nodes if node.op in {"QuantizeLinear", "DequantizeLinear"}]


def test_percentile_ranges_are_narrower_than_min_max(runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()

    full, _ = quantized(model, runtime, tmp_path)
    cut, _ = quantized(model, runtime, tmp_path, calibration="percentile", percentile=99.0)

    assert first_scale(cut) < first_scale(full)


@pytest.mark.parametrize("method", METHODS)
def test_every_calibration_method_gives_a_sound_model(method: str, runtime: Runtime, tmp_path: Path) -> None:
    model = conv_net()

    result, changes = quantized(model, runtime, tmp_path, calibration=method)

    assert changes.count == 1
    assert_close(model, result, runtime, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_reported_with_the_node_that_makes_it(method: str, runtime: Runtime, tmp_path: Path) -> None:
    text = "(float[N, 16] x) => (float[N, 16] y) { s = Sqrt(x)  a = MatMul(s, W)  y = MatMul(x, V) }"
    model = graph(
        text.replace("y = MatMul(x, V)", "b = MatMul(x, V)  y = Add(a, b)"), W=weights(16, 16), V=weights(16, 16)
    )

    result, changes = quantized(model, runtime, tmp_path, calibration=method)

    reasons = {left.where: left.why for left in changes.left}
    assert reasons["s"].startswith("output of Sqrt 'Sqrt0', holds NaN or infinity (")
    assert [change.where for change in changes.changed] == ["MatMul2"]
    assert all(np.isfinite(scale.values).all() for scale in scales(result))


def first_scale(model: Model) -> float:
    return float(next(node for node in model.graph.nodes if node.op == "QuantizeLinear").inputs[1].values)


def test_leaves_excluded_and_skipped_layers_alone(runtime: Runtime, tmp_path: Path) -> None:
    text = "(float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, W)  b = MatMul(a, V)  y = MatMul(b, U) }"
    model = graph(text, W=weights(16, 16), V=weights(16, 16, seed=1), U=weights(16, 16, seed=2))
    data = open_data(inputs(model), input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=tmp_path, exclude=("MatMul0",))

    changes = Quantize(skip=("MatMul1",)).rewrite(model, context)

    assert [change.where for change in changes.changed] == ["MatMul2"]


def test_every_quantized_layer_has_its_int8_kernel(runtime: Runtime, tmp_path: Path) -> None:
    text = """(float[N, 4, 8, 8] x) => (float[N, 6, 8, 8] y) {
        a = Conv<pads = [1, 1, 1, 1], group = 4>(x, W)  r = Relu(a)
        b = Conv(r, V)  s = Sigmoid(b)  m = Mul(b, s)  y = Conv(m, U) }"""
    model = graph(text, W=weights(4, 1, 3, 3), V=weights(8, 4, 1, 1, seed=1), U=weights(6, 8, 1, 1, seed=2))

    result, changes = quantized(model, runtime, tmp_path)

    path = tmp_path / "k.onnx"
    result.save(path)
    report = explain(result.proto(), runtime.census(path))
    assert not report.missed
    assert set(report.int8) == {change.where for change in changes.changed}
    assert_close(model, result, runtime, tmp_path)


def test_needs_data() -> None:
    with pytest.raises(RequirementError, match="needs data"):
        Quantize().rewrite(conv_net(), Context())


@pytest.mark.parametrize("options", [{"calibration": "magic"}, {"percentile": 20.0}, {"per_channel": "yes"}])
def test_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"quantize: {next(iter(options))} must be"):
        Quantize(**options)


def test_weights_in_the_graph_are_checker_valid(runtime: Runtime, tmp_path: Path) -> None:
    result, _ = quantized(conv_net(), runtime, tmp_path)

    onnx.checker.check_model(result.to_proto(), full_check=True)


def test_quantizes_models_of_ir_3_whose_initializers_are_inputs(runtime: Runtime, tmp_path: Path) -> None:
    proto = graph("(float[N, 16] x) => (float[N, 16] y) { y = MatMul(x, W) }", opset=9, W=weights(16, 16)).to_proto()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [16, 16]))
    model = Model.load(proto)

    result, changes = quantized(model, runtime, tmp_path)

    assert changes.count == 1
    assert [tensor.name for tensor in result.graph.inputs] == ["x"]
    assert_close(model, result, runtime, tmp_path)


def test_the_graph_is_walked_as_often_for_many_layers_as_for_few(runtime: Runtime, tmp_path: Path, monkeypatch: Any):
    """Else it takes 13 times as long for 4 times the nodes."""
    walks: list[int] = []
    real = _placement._reach

    def counted(*arguments: Any) -> Any:
        walks.append(1)
        return real(*arguments)

    monkeypatch.setattr(_placement, "_reach", counted)
    counts = []
    for layers in (3, 12):
        walks.clear()
        quantize(mlp_model((8,) * (layers + 1)), runtime, tmp_path)
        counts.append(len(walks))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("seconds", "most_given_up"), [(0.3, 0.8), (None, 0.7)])
def test_a_choice_that_runs_out_of_time_gives_up_no_more_than_it_must(seconds: float | None, most_given_up: float):
    """600 of 1,000 are needed; a call takes 10 ms."""

    def holds(count: int) -> bool:
        time.sleep(0.01)
        return count >= 600

    context = Context(deadline=None if seconds is None else time.monotonic() + seconds)
    assert 600 <= fewest(1000, holds, context) <= most_given_up * 1000


def test_where_the_count_can_be_foreseen_fewer_counts_are_tried():
    """Of 1,000 items that cost the same, 600 must go for a loss that is 1.58 times too large: squares add up."""
    tried: dict[int, list[int]] = {}

    for expected in (1, expected_fewest([0.01] * 1000, (1000 / 400.5) ** 0.5)):
        counts = tried[expected] = []

        def holds(count: int, counts: list[int] = counts) -> bool:
            counts.append(count)
            return count >= 600

        assert fewest(1000, holds, Context(), expected=expected) == 600

    few, many = len(tried[600]), len(tried[1])
    assert few < many / 2


@pytest.mark.parametrize(("size", "ranked"), [(1 << 20, 40), (1 << 31, 16), (1 << 40, 8)])
def test_of_a_large_model_fewer_layers_are_ranked(size: int, ranked: int):
    judge: Any = SimpleNamespace(timed=False, original_bytes=size)

    found = list(most_worth_ranking({str(index): float(index) for index in range(40)}, Context(judge=judge)))

    assert found == [str(index) for index in range(39, 39 - ranked, -1)]
