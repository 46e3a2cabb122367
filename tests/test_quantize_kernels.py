"""The int8 kernels that ONNX Runtime makes of patterns as exporters write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.runtime import Runtime
from tests.patterns import GELU, GELU_ERF, LAYER_NORM, attention, image, norm, pattern, tokens
from tests.quantizing import Quantized, quantize

INT8_ERROR = 0.05
"""A few layers at 8 bits: each rounding adds about 1/255 of the range, a few percent of the signal."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def check(model: onnx.ModelProto, runtime: Runtime, folder: Path, expected: dict[str, int]) -> Quantized:
    """Quantize; all of these kernels are there, every layer is in int8, and the result is close."""
    result = quantize(model, runtime, folder)
    assert {op: result.kernels.get(op, 0) for op in expected} == expected
    assert not result.missed
    assert max(result.errors) < INT8_ERROR
    return result


def throughout(model: onnx.ModelProto, runtime: Runtime, folder: Path, expected: dict[str, int]) -> Quantized:
    """Also, nothing goes back to float between the first kernel and the last."""
    return check(model, runtime, folder, {"QuantizeLinear": 1, "DequantizeLinear": 1, **expected})


# --- activations ------------------------------------------------------------------------------------------------------


def test_silu_is_a_sigmoid_and_a_product(runtime: Runtime, tmp_path: Path) -> None:
    model = image("s = Sigmoid(a) z = Mul(a, s)")

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1})


HARD_SWISH: dict[str, tuple[str, dict[str, Any]]] = {
    "one node": ("z = HardSwish(a)", {}),
    "hard sigmoid": ("s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(a) z = Mul(a, s)", {}),
    "divided last": (
        "p = Add(a, three) k = Clip(p, zero, six) m = Mul(a, k) z = Div(m, six)",
        {"three": 3.0, "zero": 0.0, "six": 6.0},
    ),
    "divided first": (
        "p = Add(three, a) k = Clip(p, zero, six) d = Mul(k, sixth) z = Mul(d, a)",
        {"three": 3.0, "zero": 0.0, "six": 6.0, "sixth": 0.16667},
    ),
}


@pytest.mark.parametrize("form", HARD_SWISH)
def test_hard_swish_is_a_sum_that_saturates_and_a_product(form: str, runtime: Runtime, tmp_path: Path) -> None:
    body, constants = HARD_SWISH[form]

    throughout(image(body, **constants), runtime, tmp_path, {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1})


def test_a_clipped_sum_of_another_kind_is_no_hard_sigmoid(runtime: Runtime, tmp_path: Path) -> None:
    model = image("p = Add(a, three) k = Clip(p, zero, six) z = Div(k, two)", three=3.0, zero=0.0, six=6.0, two=2.0)

    result = check(model, runtime, tmp_path, {"QLinearConv": 2})

    assert "HardSigmoid" not in {node.op for node in result.model.graph.nodes}


def test_leaky_relu(runtime: Runtime, tmp_path: Path) -> None:
    throughout(image("z = LeakyRelu<alpha = 0.1>(a)"), runtime, tmp_path, {"QLinearConv": 2, "QLinearLeakyRelu": 1})


def test_relu6_with_constant_nodes_costs_nothing(runtime: Runtime, tmp_path: Path) -> None:
    body = "low = Constant<value = float {0.0}>() high = Constant<value = float {6.0}>() z = Clip(a, low, high)"

    throughout(image(body), runtime, tmp_path, {"QLinearConv": 2, "Clip": 0})


@pytest.mark.parametrize("relu", ["t = Relu(a)", "t = Clip(a, zero, six)"])
def test_a_relu_beside_another_reader_is_a_leaky_relu_without_a_leak(
    relu: str, runtime: Runtime, tmp_path: Path
) -> None:
    model = image(f"{relu} z = Add(a, t)", zero=0.0, six=6.0)

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "QLinearLeakyRelu": 1, "QLinearAdd": 1})


def test_gelu_stays_one_float_kernel_with_its_bias(runtime: Runtime, tmp_path: Path) -> None:
    model = tokens("b = Add(ba, a) " + GELU_ERF.format(i="b", o="z"), ba=(32,), **GELU)

    check(model, runtime, tmp_path, {"MatMulIntegerToFloat": 2, "BiasGelu": 1, "QuantizeLinear": 2, "Erf": 0})


def test_the_gelu_operator_stays_one_float_kernel_with_its_bias(runtime: Runtime, tmp_path: Path) -> None:
    model = tokens("b = Add(ba, a) z = Gelu(b)", ba=(32,), opset=20)

    check(model, runtime, tmp_path, {"MatMulIntegerToFloat": 2, "BiasGelu": 1, "QuantizeLinear": 2})


def test_gelu_between_convolutions_is_one_float_kernel(runtime: Runtime, tmp_path: Path) -> None:
    model = image(GELU_ERF.format(i="a", o="z"), **GELU)

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Gelu": 1, "QuantizeLinear": 2, "DequantizeLinear": 2})


@pytest.mark.parametrize("body", ["z = PRelu(a, slope)", "z = Tanh(a)", "s = Softplus(a) t = Tanh(s) z = Mul(a, t)"])
def test_other_activations_are_float_between_int8_convolutions(body: str, runtime: Runtime, tmp_path: Path) -> None:
    check(image(body, slope=np.full((16, 1, 1), 0.2, np.float32)), runtime, tmp_path, {"QLinearConv": 2})


# --- sums, products, concatenations -----------------------------------------------------------------------------------


def test_a_chain_of_residual_sums(runtime: Runtime, tmp_path: Path) -> None:
    body = """r = Relu(a) b = Conv<pads = [1, 1, 1, 1]>(r, V) s = Add(b, r) t = Relu(s)
        c = Conv<pads = [1, 1, 1, 1]>(t, U) u = Add(t, c) z = Relu(u)"""

    model = image(body, V=(16, 16, 3, 3), U=(16, 16, 3, 3))

    throughout(model, runtime, tmp_path, {"QLinearConv": 4, "QLinearAdd": 2, "Relu": 0})


def test_a_residual_sum_before_and_behind_its_relu(runtime: Runtime, tmp_path: Path) -> None:
    model = image("b = Conv(a, V) s = Add(a, b) t = Relu(s) z = Add(s, t)", V=(16, 16, 1, 1))

    throughout(model, runtime, tmp_path, {"QLinearConv": 3, "QLinearAdd": 2, "QLinearLeakyRelu": 1})


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("order", ["a, k", "k, a"])
def test_sums_and_products_with_a_constant(op: str, order: str, runtime: Runtime, tmp_path: Path) -> None:
    model = image(f"z = {op}({order})", k=np.linspace(0.3, 1, 16, dtype=np.float32).reshape(1, 16, 1, 1))

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, f"QLinear{op}": 1})


def test_a_constant_of_very_different_factors_stays_float(runtime: Runtime, tmp_path: Path) -> None:
    model = image("z = Mul(a, k)", k=np.logspace(-3, 0, 16, dtype=np.float32).reshape(1, 16, 1, 1))

    check(model, runtime, tmp_path, {"QLinearConv": 2, "QLinearMul": 0})


def test_a_concat_keeps_a_scale_for_each_input(runtime: Runtime, tmp_path: Path) -> None:
    model = image(
        "b = Conv(a, V) r = Relu(b) z = Concat<axis = 1>(a, r)",
        V=np.full((16, 16, 1, 1), 2, np.float32),
        W2=(8, 32, 1, 1),
    )

    result = throughout(model, runtime, tmp_path, {"QLinearConv": 3, "QLinearConcat": 1})

    concat = next(node for node in result.model.graph.nodes if node.op == "Concat")
    assert len({tensor.inputs[0].inputs[1].name for tensor in concat.inputs}) == 2


def test_split_and_concat_as_in_c2f(runtime: Runtime, tmp_path: Path) -> None:
    body = """p, q = Split<axis = 1>(a, half) b = Conv<pads = [1, 1, 1, 1]>(q, V) s = Add(q, b)
        z = Concat<axis = 1>(p, q, s)"""

    model = image(body, half=np.array([8, 8]), V=(8, 8, 3, 3), W2=(8, 24, 1, 1))

    throughout(model, runtime, tmp_path, {"QLinearConv": 3, "Split": 1, "QLinearAdd": 1, "QLinearConcat": 1})


def test_a_gated_linear_unit(runtime: Runtime, tmp_path: Path) -> None:
    model = image(
        "p, q = Split<axis = 1>(a, half) s = Sigmoid(q) z = Mul(p, s)", half=np.array([8, 8]), W2=(8, 8, 1, 1)
    )

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Split": 1, "QLinearSigmoid": 1, "QLinearMul": 1})


def test_slices_of_pixels_as_in_focus(runtime: Runtime, tmp_path: Path) -> None:
    model = image(
        "p = Slice(a, s0, e, ax, two) q = Slice(a, s1, e, ax, two) z = Concat<axis = 1>(p, q)",
        s0=np.array([0]),
        s1=np.array([1]),
        e=np.array([1 << 30]),
        ax=np.array([2]),
        two=np.array([2]),
        W2=(8, 32, 1, 1),
    )

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Slice": 2, "QLinearConcat": 1})


def test_shuffled_channels(runtime: Runtime, tmp_path: Path) -> None:
    model = image(
        "r = Relu(a) b = Reshape(r, five) t = Transpose<perm = [0, 2, 1, 3, 4]>(b) z = Reshape(t, four)",
        five=np.array([0, 2, 8, 16, 16]),
        four=np.array([0, 16, 16, 16]),
    )

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Reshape": 2})


def test_gathered_channels(runtime: Runtime, tmp_path: Path) -> None:
    model = image("z = Gather<axis = 1>(a, i)", i=np.array([0, 3, 1]), W2=(8, 3, 1, 1))

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Gather": 1})


@pytest.mark.parametrize("body", ["b = Conv(a, V) z = Sub(a, b)", "p = Pad(a, pads) z = Abs(p)"])
def test_operators_without_an_int8_kernel_stay_float(body: str, runtime: Runtime, tmp_path: Path) -> None:
    model = image(body, inputs=16, V=(16, 16, 1, 1), pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]))

    check(model, runtime, tmp_path, {"QLinearConv": 2 + ("V" in body)})


# --- pooling, resizing, depthwise -------------------------------------------------------------------------------------


def test_depthwise_and_pointwise_convolutions(runtime: Runtime, tmp_path: Path) -> None:
    body = "r = Clip(a, zero, six) d = Conv<pads = [1, 1, 1, 1], group = 16>(r, D) z = Clip(d, zero, six)"

    throughout(image(body, D=(16, 1, 3, 3), zero=0.0, six=6.0), runtime, tmp_path, {"QLinearConv": 3, "Clip": 0})


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_squeeze_and_excitation(gate: str, runtime: Runtime, tmp_path: Path) -> None:
    body = f"g = GlobalAveragePool(a) e = Conv(g, E) r = Relu(e) f = Conv(r, F) s = {gate}(f) z = Mul(a, s)"
    gates = {"Sigmoid": "QLinearSigmoid", "HardSigmoid": "QLinearAdd"}

    result = check(
        image(body, E=(4, 16, 1, 1), F=(16, 4, 1, 1)),
        runtime,
        tmp_path,
        {"QLinearConv": 4, "QLinearGlobalAveragePool": 1, gates[gate]: 1, "QLinearMul": 1, "QuantizeLinear": 1},
    )

    assert not {"Conv", "Mul", gate} & result.kernels.keys()


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_mean_over_the_pixels_is_a_global_pooling(keepdims: int, runtime: Runtime, tmp_path: Path) -> None:
    tail = "y = Gemm<transB = 1>(g, V, c)" if not keepdims else "f = Flatten(g) y = Gemm<transB = 1>(f, V, c)"
    model = pattern(
        f"""(float[N, 3, 16, 16] x) => (float[N, 10] y) {{
            a = Conv(x, W, b) r = Relu(a) g = ReduceMean<axes = [2, 3], keepdims = {keepdims}>(r) {tail} }}""",
        W=(16, 3, 3, 3),
        b=(16,),
        V=(10, 16),
        c=(10,),
    )

    check(model, runtime, tmp_path, {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1, "QuantizeLinear": 1})


@pytest.mark.parametrize("attributes", ["", ", pads = [1, 1, 1, 1]", ", pads = [1, 0, 1, 1], count_include_pad = 1"])
@pytest.mark.parametrize("strides", ["1, 1", "2, 2"])
def test_an_average_pooling_is_a_depthwise_convolution(
    attributes: str, strides: str, runtime: Runtime, tmp_path: Path
) -> None:
    model = image(f"r = Relu(a) z = AveragePool<kernel_shape = [3, 3], strides = [{strides}]{attributes}>(r)")
    uneven = "pads" in attributes and "count" not in attributes

    throughout(model, runtime, tmp_path, {"QLinearConv": 3, "QLinearMul": int(uneven), "QLinearAveragePool": 0})


def test_an_average_over_all_pixels_is_a_global_pooling(runtime: Runtime, tmp_path: Path) -> None:
    model = image("z = AveragePool<kernel_shape = [16, 16]>(a)")

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "QLinearGlobalAveragePool": 1})


def test_a_relu_behind_a_max_pooling_moves_into_the_convolution(runtime: Runtime, tmp_path: Path) -> None:
    model = image("p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a) z = Relu(p)")

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "NhwcMaxPool": 1, "Relu": 0, "QLinearLeakyRelu": 0})


@pytest.mark.parametrize(
    "attributes",
    ['coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"', 'nearest_mode = "round_prefer_floor"'],
)
def test_a_nearest_resize_copies_whole_pixels(attributes: str, runtime: Runtime, tmp_path: Path) -> None:
    model = image(f'z = Resize<mode = "nearest", {attributes}>(a, , scales)', scales=np.array([1, 1, 2, 3], np.float32))

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Gather": 2, "Resize": 0})


def test_a_nearest_resize_of_unknown_size_stays_a_resize_of_codes(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern(
        """(float[N, 3, H, V] x) => (float[N, 8, P, Q] y) {
            a = Conv(x, W) z = Resize<mode = "nearest">(a, , scales) y = Conv(z, W2) }""",
        W=(16, 3, 1, 1),
        W2=(8, 16, 1, 1),
        scales=np.array([1, 1, 2, 2], np.float32),
    )

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Resize": 1})


def test_a_nearest_resize_that_drops_pixels_stays_a_resize(runtime: Runtime, tmp_path: Path) -> None:
    model = image('z = Resize<mode = "nearest">(a, , scales)', scales=np.array([1, 1, 0.5, 1.5], np.float32))

    throughout(model, runtime, tmp_path, {"QLinearConv": 2, "Resize": 1})


def test_a_linear_resize_is_float_between_int8_convolutions(runtime: Runtime, tmp_path: Path) -> None:
    model = image('z = Resize<mode = "linear">(a, , scales)', scales=np.array([1, 1, 2, 2], np.float32))

    check(model, runtime, tmp_path, {"QLinearConv": 2, "Resize": 1, "QuantizeLinear": 2, "DequantizeLinear": 2})


def test_a_transposed_convolution_stays_float_and_says_why(runtime: Runtime, tmp_path: Path) -> None:
    model = image("z = ConvTranspose<strides = [2, 2]>(a, T)", T=(16, 16, 2, 2))

    result = check(model, runtime, tmp_path, {"QLinearConv": 2, "ConvTranspose": 1})

    assert [left.why for left in result.changes.left] == ["ONNX Runtime has no int8 ConvTranspose"]


# --- matrix products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_op", ["operator", "decomposed"])
@pytest.mark.parametrize("batch", ["N", "2"])
def test_layer_normalization_stays_float_and_is_not_made_slower(
    norm_op: str, batch: str, runtime: Runtime, tmp_path: Path
) -> None:
    decomposed = LAYER_NORM.format(i="r", o="z")
    body = "b = Add(ba, a) r = Add(b, x) " + (
        "z = LayerNormalization(r, gamma, beta)" if norm_op == "operator" else decomposed
    )
    model = tokens(body, ba=(32,), **norm(32))
    model.graph.input[0].type.tensor_type.shape.dim[0].CopyFrom(dimension(batch))
    products = {"MatMulIntegerToFloat": 2} if batch == "N" else {"QGemm": 1, "MatMulIntegerToFloat": 1}

    result = quantize(model, runtime, tmp_path, feed=None if batch == "N" else two_batches())

    expected = {"LayerNormalization": 1, "SkipLayerNormalization": 0, "QuantizeLinear": 2, **products}
    assert {op: result.kernels.get(op, 0) for op in expected} == expected
    assert max(result.errors) < INT8_ERROR


def dimension(text: str) -> onnx.TensorShapeProto.Dimension:
    return onnx.TensorShapeProto.Dimension(**({"dim_value": int(text)} if text.isdigit() else {"dim_param": text}))


def two_batches() -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.random.default_rng(1).standard_normal((2, 8, 32)).astype(np.float32)}


@pytest.mark.parametrize("masked", [False, True])
def test_attention_quantizes_its_weights_and_leaves_products_of_activations(
    masked: bool, runtime: Runtime, tmp_path: Path
) -> None:
    result = check(attention(masked=masked), runtime, tmp_path, {"MatMulIntegerToFloat": 4, "Softmax": 1})

    assert result.count("QuantizeLinear") == (2,)  # one for the three products of x, one before the last
    left = {left.where: left.why for left in result.changes.left}
    assert set(left.values()) == {"both its operands are computed: rounding them costs what int8 gains"}
    assert len(left) == 2


def test_attention_of_a_fixed_size_keeps_its_int8_kernels(runtime: Runtime, tmp_path: Path) -> None:
    model = attention()
    model.graph.input[0].type.tensor_type.shape.dim[0].CopyFrom(dimension("2"))

    result = quantize(model, runtime, tmp_path, feed=two_batches())

    assert result.count("QGemm", "Gemm", "QuantizeLinear") == (4, 0, 2)
    assert not result.missed
    assert max(result.errors) < INT8_ERROR


@pytest.mark.parametrize(("shape", "bias"), [("N, 32", (32,)), ("N, 32", (1, 32)), ("2, 8, 32", (32,))])
def test_the_bias_behind_a_product_goes_into_its_kernel(
    shape: str, bias: tuple[int, ...], runtime: Runtime, tmp_path: Path
) -> None:
    model = pattern(
        f"(float[{shape}] x) => (float[{shape}] y) {{ a = MatMul(x, W) b = Add(c, a) r = Relu(b) y = MatMul(r, V) }}",
        W=(32, 32),
        V=(32, 32),
        c=np.linspace(-1, 1, 32, dtype=np.float32).reshape(bias),
    )

    result = quantize(model, runtime, tmp_path, feed=None if "N" in shape else two_batches())

    assert result.count("QGemm", "MatMulIntegerToFloat", "QuantizeLinear", "Add", "Gemm") == (1, 1, 1, 0, 0)
    assert max(result.errors) < INT8_ERROR


@pytest.mark.parametrize("relu", ["r = Relu(a)", "r = Clip(a, zero, six)"])
def test_a_product_with_a_relu_before_a_float_reader_has_its_int8_kernel(
    relu: str, runtime: Runtime, tmp_path: Path
) -> None:
    check(
        tokens(f"{relu} z = Add(r, x)", zero=0.0, six=6.0),
        runtime,
        tmp_path,
        {"QLinearMatMul": 1, "MatMulIntegerToFloat": 1, "MatMul": 0, "Clip": 0, "Relu": 0},
    )


def test_a_product_with_a_relu_at_the_end_of_the_graph_ends_in_float(runtime: Runtime, tmp_path: Path) -> None:
    model = pattern("(float[N, 32] x) => (float[N, 8] y) { a = MatMul(x, W) y = Relu(a) }", W=(32, 8))

    check(model, runtime, tmp_path, {"MatMulIntegerToFloat": 1, "Relu": 1, "DequantizeLinear": 0})


def test_softmax_is_float_because_its_int8_kernel_is_slower(runtime: Runtime, tmp_path: Path) -> None:
    check(tokens("z = Softmax(a)"), runtime, tmp_path, {"MatMulIntegerToFloat": 2, "Softmax": 1, "QLinearSoftmax": 0})


def test_a_tensor_with_int8_and_float_readers_has_one_quantizer(runtime: Runtime, tmp_path: Path) -> None:
    model = tokens("t = Tanh(a) b = MatMul(t, V) c = MatMul(t, U) d = Sub(b, c) z = Div(d, t)", V=(32, 32), U=(32, 32))

    result = quantize(model, runtime, tmp_path)

    assert result.count("MatMulIntegerToFloat", "QuantizeLinear", "DequantizeLinear") == (4, 3, 0)


# --- who decides ------------------------------------------------------------------------------------------------------


def test_accelerators_get_the_operators_as_they_are(runtime: Runtime, tmp_path: Path) -> None:
    result = quantize(image("t = Relu(a) z = Add(a, t)"), runtime, tmp_path, target="qnn")

    assert "LeakyRelu" not in {node.op for node in result.model.graph.nodes}


def test_an_excluded_operator_is_not_rewritten(runtime: Runtime, tmp_path: Path) -> None:
    result = quantize(image("z = HardSwish(a)"), runtime, tmp_path, exclude=("HardSwish1",))

    assert "HardSwish" in {node.op for node in result.model.graph.nodes}


@pytest.mark.parametrize("target", ["arm64", "x86", "web"])
@pytest.mark.parametrize(
    "body",
    [
        "z = HardSwish(a)",
        "t = Clip(a, zero, six) z = Add(a, t)",
        "z = Mul(k, a)",
        "z = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)",
        'z = Resize<mode = "nearest">(a, , scales)',
    ],
)
def test_other_cpus_compute_the_same(body: str, target: str, runtime: Runtime, tmp_path: Path) -> None:
    model = image(
        body,
        zero=0.0,
        six=6.0,
        k=np.linspace(-1, -0.3, 16, dtype=np.float32).reshape(16, 1, 1),
        scales=np.array([1, 1, 2, 2], np.float32),
    )

    result = quantize(model, runtime, tmp_path, target=target)

    assert result.changes.count >= 2
    assert max(result.errors) < INT8_ERROR
