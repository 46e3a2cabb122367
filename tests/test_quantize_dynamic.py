"""`quantize-dynamic`: the fused kernels, what they cost in accuracy, and what stays float for a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp import Budget, optimize
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime, explain
from onnxcomp.targets import find_target
from onnxcomp_passes import QuantizeDynamic, QuantizeWeights
from tests.models import graph_model, mlp_model, ops, random_inputs, random_weights, run

Array = np.ndarray[Any, Any]

FUSED = "DynamicQuantizeMatMul"
SHARING = "MatMulIntegerToFloat"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def rewritten(
    proto: onnx.ModelProto, *, target: str = "x86-vnni", exclude: tuple[str, ...] = (), **options: Any
) -> tuple[Model, Changes]:
    model = Model.load(proto)
    return model, QuantizeDynamic(**options).rewrite(model, Context(target=find_target(target), exclude=exclude))


def kernels(model: Model, runtime: Runtime, folder: Path) -> dict[str, int]:
    model.save(folder / "model.onnx")
    return runtime.census(folder / "model.onnx").counts()


def linear(weight: Array, text: str = "y = MatMul(x, W)", *, opset: int = 17, **more: Any) -> onnx.ModelProto:
    """One layer on x: (N, rows)."""
    rows, columns = weight.shape
    header = f"g (float[N, {rows}] x) => (float[N, {columns}] y)"
    return graph_model(f"{header} {{ [fc] {text} }}", {"W": weight}, opset=opset, **more)


def bound(x: Array, weight: Array) -> Array:
    """The largest error of x @ weight with 8-bit inputs and weights, per element.

    Half a step of the input (its range, with zero, over 255) times the weights' magnitudes, half a step of each weight
    (its column's peak over 127) times the inputs' magnitudes, and the product of the two. The zero point is rounded
    too, which moves the ends of the grid by up to half a step more.
    """
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    weight_step = np.max(np.abs(weight), axis=0) / 127
    inner = len(weight)
    error = step * np.abs(weight).sum(axis=0) + 0.5 * weight_step * (
        np.abs(x).sum(axis=1, keepdims=True) + inner * step
    )
    return np.asarray(1.001 * error + 1e-6)


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("opset", [7, 10, 11, 13, 17, 21])
def test_the_error_is_within_that_of_eight_bits(opset: int, optimized: bool):
    weight = random_weights(32, 24, scale=0.2)
    model, changes = rewritten(linear(weight, opset=opset, ir_version=3 if opset < 9 else 8))
    x = random_weights(5, 32, seed=9)

    got = run(model, {"x": x}, optimized=optimized)[0]

    assert changes.count == 1
    assert np.all(np.abs(got - x @ weight) <= bound(x, weight))


def test_the_bound_notices_a_wrong_scale():
    weight = random_weights(32, 24, scale=0.2)
    x = random_weights(5, 32, seed=9)

    assert not np.all(np.abs(1.1 * (x @ weight) - x @ weight) <= bound(x, weight))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20)),
    transposed=st.booleans(),
    alpha=st.sampled_from([1.0, 0.25, -2.0]),
    beta=st.sampled_from([0.0, 1.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_gemm_keeps_its_attributes(shape: tuple[int, int, int], transposed: bool, alpha: float, beta: float, seed: int):
    batch, rows, columns = shape
    weight, bias = random_weights(rows, columns, seed=seed), random_weights(columns, seed=seed + 1)
    attributes = f"alpha = {alpha}, beta = {beta}, transB = {int(transposed)}"
    text = f"g (float[N, {rows}] x) => (float[N, {columns}] y) {{ y = Gemm<{attributes}>(x, W, b) }}"
    held = np.ascontiguousarray(weight.T) if transposed else weight
    model, _ = rewritten(graph_model(text, W=held, b=bias), min_elements=1)
    x = random_weights(batch, rows, seed=seed + 2)

    got = run(model, {"x": x})[0]

    assert "MatMulInteger" in ops(model)
    assert np.all(np.abs(got - (alpha * (x @ weight) + beta * bias)) <= abs(alpha) * bound(x, weight) + 1e-5)


@pytest.mark.parametrize("text", ["y = MatMul(x, W)", "t = MatMul(x, W) y = Add(t, b)", "y = Gemm(x, W, b)"])
def test_a_layer_is_one_kernel_with_its_bias(runtime: Runtime, tmp_path: Path, text: str):
    weights: dict[str, Any] = {"b": random_weights(24)} if "b" in text else {}
    model, _ = rewritten(linear(random_weights(32, 24), text, **weights))

    assert kernels(model, runtime, tmp_path) == {FUSED: 1}


def test_layers_that_share_an_input_share_its_quantization(runtime: Runtime, tmp_path: Path):
    text = "g (float[N, 32] x) => (float[N, 24] y) { [a] a = MatMul(x, V) [b] b = MatMul(x, W) y = Add(a, b) }"
    model, _ = rewritten(graph_model(text, V=random_weights(32, 24), W=random_weights(32, 24, seed=1)))

    assert kernels(model, runtime, tmp_path) == {SHARING: 2, "DynamicQuantizeLinear": 1, "Add": 1}


def test_the_report_counts_the_fused_kernels_alone(runtime: Runtime, tmp_path: Path):
    model, _ = rewritten(mlp_model((24, 32, 16)))
    path = tmp_path / "model.onnx"
    model.save(path)
    names = [node.name for node in model.graph.nodes if node.op == "MatMulInteger"]

    assert explain(model.proto(), runtime.census(path)).int8 == tuple(names)

    plain = explain(model.proto(), runtime.census(path, optimize=False))
    assert plain.int8 == ()
    assert {miss.rule for miss in plain.missed} == {"dynamic-unfused"}


def test_an_integer_product_that_is_not_scaled_at_once_is_a_miss(runtime: Runtime, tmp_path: Path):
    text = """g (float[4, 32] x) => (float[4, 24] y) {
        q, s, z = DynamicQuantizeLinear(x)
        [fc] i = MatMulInteger(q, W, z)
        f = Cast<to = 1>(i)
        r = Relu(f)
        y = Mul(r, s)
    }"""
    onnx.save(graph_model(text, W=np.ones((32, 24), np.int8)), tmp_path / "m.onnx")

    report = explain(onnx.load(tmp_path / "m.onnx"), runtime.census(tmp_path / "m.onnx"))

    assert report.int8 == ()
    assert [(miss.node, miss.rule) for miss in report.missed] == [("fc", "dynamic-unfused")]


def test_names_types_and_dynamic_axes_stay():
    proto = mlp_model((24, 32, 16))

    model, _ = rewritten(proto)

    assert list(model.proto().graph.input) == list(proto.graph.input)
    assert list(model.proto().graph.output) == list(proto.graph.output)
    for batch in (1, 7):
        assert run(model, random_inputs(proto, batch=batch))[0].shape == (batch, 16)


def test_takes_over_the_codes_of_stored_weights():
    stored = Model.load(linear(random_weights(32, 24)))
    QuantizeWeights().rewrite(stored, Context())
    codes = {bytes(c.values.tobytes()) for c in stored.constants() if c.dtype == np.int8}

    QuantizeDynamic().rewrite(stored, Context(target=find_target("x86-vnni")))

    assert {bytes(c.values.tobytes()) for c in stored.constants() if c.dtype == np.int8} == codes
    assert sum(c.dtype == np.int8 for c in stored.constants()) == 1


def test_what_stays_float_stays_stored():
    stored = Model.load(mlp_model((24, 32, 16)))
    QuantizeWeights().rewrite(stored, Context())

    QuantizeDynamic(skip=("r0",)).rewrite(stored, Context(exclude=("y",)))

    assert "Gemm" in ops(stored)
    assert all(c.dtype == np.int8 for c in stored.constants() if len(c.shape) == 2 and c.shape[0] > 1)


def test_processors_without_vnni_get_seven_bits():
    model, _ = rewritten(linear(random_weights(32, 24)), target="x86")

    assert max(np.abs(c.values).max() for c in model.constants() if c.dtype == np.int8) == 63


def test_a_weight_that_two_layers_share_is_written_once():
    text = "g (float[N, 24] x) => (float[N, 24] y) { a = MatMul(x, W) r = Relu(a) y = MatMul(r, W) }"
    model, changes = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert changes.count == 2
    assert sum(c.dtype == np.int8 for c in model.constants()) == 1


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_activations_and_channels_of_zeros_are_exact_enough(value: float):
    weight = random_weights(32, 24)
    weight[:, ::2] = 0
    model, _ = rewritten(linear(weight))
    x = np.full((2, 32), value, np.float32)

    got = run(model, {"x": x})[0]

    np.testing.assert_array_equal(got[:, ::2], 0)
    assert np.all(np.abs(got - x @ weight) <= bound(x, weight))


REFUSED = {
    "[fc] t = MatMul(x, B) y = Identity(t)": (random_weights(3, 24, 24), "3 axes"),
    "[fc] y = MatMul(x, x)": (random_weights(3, 24, 24), "not constant"),
    "[fc] t = MatMul(x, B) u = Add(B, B) y = Add(t, u)": (random_weights(24, 24), "read its weight too"),
    "[fc] y = MatMul(B, x)": (random_weights(24, 24), "not constant"),
    "[fc] y = Gemm<transA = 1>(x, B)": (random_weights(24, 24), "transposed"),
    "[fc] y = Gemm<beta = 0.5>(x, B, x)": (random_weights(24, 24), "beta is not 1"),
    "[fc] y = MatMul(x, B)": (np.full((24, 24), np.inf, np.float32), "NaN or infinity"),
    "[fc] t = MatMul(x, B) y = Relu(t) ": (random_weights(24, 5), "fewer than 256"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_has_no_kernel_is_left_with_its_reason(text: str):
    weight, reason = REFUSED[text]
    dims = "3, 24, 24" if weight.ndim == 3 else f"24, {weight.shape[1]}"
    shape = "3, 24, 24" if weight.ndim == 3 else "24, 24"
    proto = graph_model(f"g (float[{shape}] x) => (float[{dims}] y) {{ {text} }}", B=weight)
    digest = Model.load(proto).digest

    model, changes = rewritten(proto)

    assert model.digest == digest
    assert [left.where for left in changes.left] == ["fc"]
    assert reason in changes.left[0].why


def test_convolutions_are_left_with_their_reason():
    text = "g (float[1, 4, 8, 8] x) => (float[1, 8, 6, 6] y) { [c] y = Conv(x, W) }"

    _, changes = rewritten(graph_model(text, W=random_weights(8, 4, 3, 3)))

    assert changes.count == 0
    assert "ConvInteger" in changes.left[0].why


def test_a_weight_that_the_caller_may_feed_is_left():
    proto = linear(random_weights(32, 24))
    proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [32, 24]))

    _, changes = rewritten(proto)

    assert changes.count == 0
    assert "not constant" in changes.left[0].why


def test_subgraphs_are_left_with_their_reason():
    text = """g (bool c, float[3, 24] x) => (float[3, 24] y) {
        y = If(c) <
            then_branch = yes () => (float[3, 24] a) { [inner] a = MatMul(x, W) },
            else_branch = no () => (float[3, 24] b) { b = Relu(x) }
        >
    }"""

    _, changes = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert [(left.where, left.why) for left in changes.left] == [("inner", "is in a subgraph")]


def test_layers_beside_static_int8_are_left():
    text = """g (float[N, 24] x) => (float[N, 24] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        [fc] y = MatMul(d, W)
    }"""
    scale: dict[str, Any] = {"s": np.asarray(0.02, np.float32), "z": np.asarray(128, np.uint8)}

    _, changes = rewritten(graph_model(text, W=random_weights(24, 24), **scale))

    assert [(left.where, left.why) for left in changes.left] == [("fc", "is quantized already")]


@pytest.mark.parametrize("target", ["xnnpack", "nnapi", "qnn", "coreml"])
def test_targets_without_such_kernels_get_nothing(target: str):
    _, changes = rewritten(mlp_model((24, 32, 16)), target=target)

    assert changes.count == 0
    assert target in changes.left[0].why


def test_layers_are_chosen_by_measurement_without_data(runtime: Runtime, tmp_path: Path):
    """Whether it pays is for this machine to say; where it does, the kernels are there."""
    proto = mlp_model((256, 512, 256))

    result = optimize(Model.load(proto), passes=[QuantizeWeights(), QuantizeDynamic()], budget=Budget())

    entry = result.report.stages[-1]
    assert entry.verdict in ("kept", "dropped")
    if entry.verdict == "kept":
        assert kernels(result.model, runtime, tmp_path).get(FUSED)
