"""`quantize` on models at the edge: nothing to scale, weights shared or overridable, nested, old, half done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes._placement import find_layers, place
from tests.models import graph_model, random_weights
from tests.patterns import image, pattern, tokens
from tests.quantizing import SAMPLES, quantize

INT8_ERROR = 0.05
"""A few layers at 8 bits, on the samples that the ranges come from."""

NEWEST_OPSET = 27
"""The newest that ONNX Runtime 1.32 has a QuantizeLinear of."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def samples(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((SAMPLES, *shape)).astype(np.float32)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_activations(value: float, runtime: Runtime, tmp_path: Path) -> None:
    feed = {"x": np.full((SAMPLES, 3, 16, 16), value, np.float32)}

    result = quantize(image("r = Relu(a) z = Add(a, r)"), runtime, tmp_path, feed=feed)

    assert result.count("QLinearConv", "QLinearAdd") == (2, 1)
    assert max(result.errors) < INT8_ERROR


def test_channels_of_zeros_in_every_layer(runtime: Runtime, tmp_path: Path) -> None:
    zeros = np.zeros((16, 3, 3, 3), np.float32)
    zeros[1] = 0.1

    result = quantize(image("z = Relu(a)", W=zeros, bias=np.zeros(16, np.float32)), runtime, tmp_path)

    assert result.count("QLinearConv") == (2,)
    assert max(result.errors) < INT8_ERROR


def test_weights_of_zeros_alone(runtime: Runtime, tmp_path: Path) -> None:
    model = tokens("r = Relu(a) z = Add(r, x)", W=np.zeros((32, 32), np.float32))

    result = quantize(model, runtime, tmp_path)

    assert result.count("QLinearMatMul", "MatMulIntegerToFloat") == (1, 1)
    assert max(result.errors) < INT8_ERROR


def test_weights_of_one_element(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        "(float[N, 1] x) => (float[N, 1] y) { a = Gemm(x, W, b) r = Relu(a) y = MatMul(r, V) }",
        W=np.full((1, 1), 0.7, np.float32),
        b=np.full(1, 0.2, np.float32),
        V=np.full((1, 1), -2, np.float32),
    )

    result = quantize(model, runtime, tmp_path)

    assert result.count("QGemm", "MatMulIntegerToFloat") == (1, 1)
    assert max(result.errors) < INT8_ERROR


@pytest.mark.parametrize("factor", [1e-30, 1e-38, 1e-42])
def test_scales_that_would_underflow(factor: float, runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        "(float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, W) b = MatMul(a, V) y = Add(b, x) }",
        W=random_weights(16, 16) * np.float32(factor),
        V=(16, 16),
    )

    result = quantize(model, runtime, tmp_path)

    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales(result.model))
    assert max(result.errors) < INT8_ERROR


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_weight_that_no_code_stands_for_stays_float(odd: float, runtime: Runtime, tmp_path: Path) -> None:
    weight = random_weights(16, 16)
    weight[3, 3] = odd
    model = pattern(
        "(float[N, 16] x) => (float[N, 16] y, float[N, 16] z) { y = MatMul(x, W) z = MatMul(x, V) }",
        W=weight,
        V=(16, 16),
    )

    result = quantize(model, runtime, tmp_path)

    assert result.count("MatMul", "MatMulIntegerToFloat") == (1, 1)
    assert ("MatMul0", "its weight holds NaN or infinity") in [(left.where, left.why) for left in result.changes.left]


def scales(model: Model) -> list[np.ndarray[Any, Any]]:
    pairs = (node for node in model.graph.nodes if node.op in {"QuantizeLinear", "DequantizeLinear"})
    return [np.asarray(node.inputs[1].values) for node in pairs]


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_dynamic_images(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        """(float[N, 3, H, V] x) => (float[N, 8, P, Q] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, W) s = HardSwish(a) p = AveragePool<kernel_shape = [2, 2]>(s)
            m = ReduceMean<axes = [2, 3]>(p) g = Mul(p, m) y = Conv(g, W2) }""",
        W=(16, 3, 3, 3),
        W2=(8, 16, 1, 1),
    )

    result = quantize(model, runtime, tmp_path, feed={"x": samples(3, 12, 10)})

    assert result.count("QLinearConv", "QLinearGlobalAveragePool", "QLinearAdd") == (3, 1, 1)
    assert max(result.errors) < INT8_ERROR
    other = {"x": samples(3, 5, 7)[:2]}
    assert next(iter(runtime.run(tmp_path / "int8.onnx", [other])))[0].shape == (2, 8, 4, 6)


def test_a_dynamic_number_of_tokens(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        "(float[N, T, 16] x) => (float[N, T, 16] y) { a = MatMul(x, W) b = Add(a, c) r = Relu(b) y = MatMul(r, V) }",
        W=(16, 16),
        V=(16, 16),
        c=(16,),
    )

    result = quantize(model, runtime, tmp_path, feed={"x": samples(6, 16)})

    assert result.count("MatMulIntegerToFloat", "QuantizeLinear") == (2, 2)
    assert max(result.errors) < INT8_ERROR


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_that_two_convolutions_share(runtime: Runtime, tmp_path: Path) -> None:
    model = image("r = Relu(a) b = Conv(r, V) s = Relu(b) z = Conv(s, V)", V=(16, 16, 1, 1))

    result = quantize(model, runtime, tmp_path)

    assert result.count("QLinearConv") == (4,)
    assert max(result.errors) < INT8_ERROR


def test_layers_that_share_a_weight_share_its_codes(runtime: Runtime, tmp_path: Path) -> None:
    again = " ".join(f"c{n} = Conv(r{n}, V) r{n + 1} = Relu(c{n})" for n in range(6))
    model = image(f"r0 = Relu(a) {again} z = Relu(r6)", V=(16, 16, 3, 3))

    result = quantize(model, runtime, tmp_path)

    assert len(result.changes.changed) == 8
    assert [tuple(held.shape) for held in result.model.constants()].count((16, 16, 3, 3)) == 1
    assert max(result.errors) < INT8_ERROR


def test_a_weight_that_a_layer_shares_with_another_operator(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        """(float[N, 16] x) => (float[N, 16] y) {
            a = MatMul(x, W) g = Gemm<transB = 1>(a, W) t = Sum(W) y = MatMul(g, t) }""",
        W=(16, 16),
    )

    result = quantize(model, runtime, tmp_path)

    assert [change.where for change in result.changes.changed] == ["MatMul0", "Gemm1"]
    assert max(result.errors) < INT8_ERROR


def test_a_weight_that_the_caller_may_override_is_left_alone(runtime: Runtime, tmp_path: Path) -> None:
    proto = pattern(
        "(float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, W) y = MatMul(a, V) }", W=(16, 16), V=(16, 16)
    )
    proto.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [16, 16]))

    result = quantize(proto, runtime, tmp_path, feed={"x": samples(16)})

    assert [change.where for change in result.changes.changed] == ["MatMul1"]
    assert [(left.where, left.why) for left in result.changes.left] == [("MatMul0", "its weight 'W' is a graph input")]


# --- structure --------------------------------------------------------------------------------------------------------


def test_bodies_of_control_flow_are_left_alone_and_named() -> None:
    text = """g (bool which, float[2, 4] x) => (float[2, 4] y) {
        a = MatMul(x, W)
        y = If(which) <
            then_branch = yes () => (float[2, 4] p) { [inner] p = MatMul(a, W) },
            else_branch = no () => (float[2, 4] q) { q = Identity(a) }
        >
    }"""
    proto = graph_model(text, W=random_weights(4, 4))
    proto.graph.node[0].name, proto.graph.node[1].name = "outer", "choice"
    changes = Changes()

    layers = find_layers(Model.load(proto).graph, Context(), changes)

    assert [layer.name for layer in layers] == ["outer"]
    assert [(left.where, left.why) for left in changes.left] == [
        ("inner", "is in a body of the If choice; bodies stay float")
    ]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 21, NEWEST_OPSET])
def test_every_opset_from_7(opset: int, runtime: Runtime, tmp_path: Path) -> None:
    pool = "p = MaxPool<kernel_shape = [2, 2]>(r)"
    proto = pattern(
        f"""(float[N, 3, 8, 8] x) => (float[N, 5] y) {{
            a = Conv(x, W, b) r = Relu(a) {pool} c = Conv(p, U) f = Flatten(c) y = Gemm<transB = 1>(f, V, d) }}""",
        opset=opset if opset < 19 else 17,
        W=(8, 3, 3, 3),
        b=(8,),
        U=(4, 8, 1, 1),
        V=(5, 100),
        d=(5,),
    )
    proto.opset_import[0].version = opset
    proto.ir_version = 10 if opset > 18 else 8

    result = quantize(proto, runtime, tmp_path)

    assert result.count("QLinearConv", "QGemm") == (2, 1)
    assert not result.missed
    assert max(result.errors) < INT8_ERROR


def test_half_precision_around_the_layers_keeps_its_operators(runtime: Runtime, tmp_path: Path) -> None:
    model = image("h = Cast<to = 10>(a) s = HardSwish(h) p = AveragePool<kernel_shape = [2, 2]>(s) z = Cast<to = 1>(p)")

    result = quantize(model, runtime, tmp_path)

    assert {"HardSwish", "AveragePool"} <= {node.op for node in result.model.graph.nodes}
    assert result.count("QLinearConv") == (2,)


def test_declared_shapes_stay_true(runtime: Runtime, tmp_path: Path) -> None:
    body = (
        "p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a) r = Relu(p) z = AveragePool<kernel_shape = [2, 2]>(r)"
    )
    model = onnx.shape_inference.infer_shapes(image(body))

    result = quantize(model, runtime, tmp_path)

    onnx.shape_inference.infer_shapes(result.model.to_proto(), check_type=True, strict_mode=True)


# --- partly quantized -------------------------------------------------------------------------------------------------


def partly_quantized() -> onnx.ModelProto:
    """A Conv that somebody quantized, and a float Conv behind it."""
    text = """(float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, ws)
        a = Conv(xd, wd) aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z)
        y = Conv(ad, V) }"""
    codes = np.random.default_rng(0).integers(-100, 100, (8, 3, 1, 1)).astype(np.int8)
    return pattern(text, s=np.float32(0.04), z=np.uint8(128), w=codes, ws=np.float32(0.005), V=(8, 8, 1, 1))


def test_the_float_part_of_a_partly_quantized_model(runtime: Runtime, tmp_path: Path) -> None:
    result = quantize(partly_quantized(), runtime, tmp_path)

    assert [change.where for change in result.changes.changed] == ["Conv6"]
    assert [(left.where, left.why) for left in result.changes.left] == [("Conv3", "its weight is quantized already")]
    assert result.count("QLinearConv", "Conv") == (2, 0)
    assert max(result.errors) < INT8_ERROR


def test_a_model_that_others_quantized_throughout_is_left_alone(runtime: Runtime, tmp_path: Path) -> None:
    once = quantize(image("z = Relu(a)"), runtime, tmp_path).model
    for node in once.graph.nodes:
        for tensor in node.outputs:
            tensor.name = f"other/{tensor.name}" if tensor.name != "y" else "y"

    again = quantize(once.to_proto(), runtime, tmp_path)

    assert again.changes.count == 0
    assert {left.why for left in again.changes.left} == {"its weight is quantized already", "is already quantized"}


def test_a_layer_that_was_left_in_float_by_choice_stays_float(runtime: Runtime, tmp_path: Path) -> None:
    once = quantize(image("z = Relu(a)"), runtime, tmp_path, skip=("Conv0",)).model

    again = quantize(once.to_proto(), runtime, tmp_path)

    assert (again.changes.count, again.changes.left[0].why) == (0, "is already quantized")


# --- placement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Concat3", "z"])
def test_an_operator_can_be_left_in_float_with_int8_on_both_sides(name: str) -> None:
    model = Model.load(
        image("b = Conv(a, V) r = Relu(b) z = Concat<axis = 1>(a, r)", V=(16, 16, 1, 1), W2=(8, 32, 1, 1))
    )
    layers = find_layers(model.graph, Context())

    with_all = place(model.graph, layers, model.opset)
    without = place(model.graph, layers, model.opset, leave={name})

    assert [node.op for node in with_all.companions] == ["Concat"]
    assert not without.companions
    assert [layer.name for layer in without.layers] == [layer.name for layer in layers]
    assert without.tensors.keys() == with_all.tensors.keys()
