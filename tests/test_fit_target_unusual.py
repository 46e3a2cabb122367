"""`fit-target` on quantized models that few exporters write: what it cannot change exactly, it leaves and says so."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxcomp import Changes, Context, Model
from onnxcomp.targets import TARGETS, find_target
from onnxcomp_passes import FitTarget
from tests import traps
from tests.models import graph_model, random_inputs, run

RNG = np.random.default_rng(0)
READ = "q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, sx, zx)"
WRITE = "cq = QuantizeLinear(c, sy, zy) y = DequantizeLinear(cq, sy, zy)"
WEIGHT = "w = DequantizeLinear(W, sw, zw)"
OF_OUTPUTS, OF_INPUTS = "w = DequantizeLinear<axis = 1>(W, sw, zw)", "w = DequantizeLinear<axis = 0>(W, sw, zw)"

STEPS = 2.5 * 0.05
"""Two steps of the output, of a range of 12.8: the weight was rounded anew and the result too."""


def codes(*shape: int, dtype: Any = np.int8) -> np.ndarray[Any, Any]:
    return RNG.integers(-127, 128, shape).astype(dtype)


def scales(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.uniform(0.005, 0.01, shape).astype(np.float32)


def quantized(
    body: str, ends: str = "float[2, 16] x) => (float[2, 8] y", *, sign: str = "uint8", opset: int = 17, **weights: Any
) -> onnx.ModelProto:
    """A model with scales and zero points for its activations; `body` uses x, sx, zx, sy, zy and its own weights."""
    middle = 128 if sign == "uint8" else 0
    values = {"sx": np.float32(0.02), "sy": np.float32(0.05), "zx": middle, "zy": middle, **weights}
    values |= {name: np.asarray(values[name], sign) for name in ("zx", "zy")}
    ir_version = 5 if opset < 11 else 10
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return graph_model(f"g ({ends}) {{ {body} }}", arrays, opset=opset, ir_version=ir_version)


def per(count: int) -> dict[str, Any]:
    """A scale and a zero point for each of some channels."""
    return {"sw": scales(count), "zw": np.zeros(count, np.int8)}


ONE: dict[str, Any] = {"sw": np.float32(0.01), "zw": np.int8(0)}
PRODUCT, GEMM = f"{READ} {WEIGHT} c = MatMul(d, w) {WRITE}", f"{READ} {OF_OUTPUTS} c = Gemm(d, w, B) {WRITE}"
BIASED = f"{READ} {OF_OUTPUTS} b = DequantizeLinear(B, sb) c = Gemm(d, w, b) {WRITE}"
PICTURE = "float[1, 4, 5, 5] x) => (float[1, 4, 3, 3] y"

MODELS = {
    "weight on the left": quantized(
        f"{READ} {OF_INPUTS} c = MatMul(w, d) {WRITE}", "float[16, 8] x) => (float[4, 8] y", W=codes(4, 16), **per(4)
    ),
    "square Gemm, scales of inputs": quantized(
        f"{READ} {OF_INPUTS} c = Gemm(d, w) {WRITE}", "float[2, 8] x) => (float[2, 8] y", W=codes(8, 8), **per(8)
    ),
    "Gemm with bias, scales of inputs": quantized(
        f"{READ} {OF_INPUTS} c = Gemm(d, w, B) {WRITE}", W=codes(16, 8), B=np.ones(8, np.float32), **per(16)
    ),
    "square Conv, scales of inputs": quantized(
        f"{READ} {OF_OUTPUTS} c = Conv(d, w) {WRITE}", PICTURE, W=codes(4, 4, 3, 3), **per(4)
    ),
    "Conv, scales of inputs": quantized(
        f"{READ} {OF_OUTPUTS} c = Conv(d, w, B) {WRITE}",
        "float[1, 4, 5, 5] x) => (float[1, 6, 3, 3] y",
        W=codes(6, 4, 3, 3),
        B=np.ones(6, np.float32),
        **per(4),
    ),
    "ConvTranspose of groups": quantized(
        f"{READ} {OF_OUTPUTS} c = ConvTranspose<group = 2>(d, w, B) {WRITE}",
        "float[1, 4, 5, 5] x) => (float[1, 6, 7, 7] y",
        W=codes(4, 3, 3, 3),
        B=np.arange(6, dtype=np.float32),
        **per(3),
    ),
    "blocks": quantized(
        f"{READ} w = DequantizeLinear<axis = 0, block_size = 8>(W, sw) c = Gemm(d, w, B) {WRITE}",
        opset=21,
        W=codes(16, 8),
        sw=scales(2, 8),
        B=np.ones(8, np.float32),
    ),
    "4 bits": quantized(
        GEMM,
        opset=21,
        W=(codes(16, 8) // 19).astype(ml_dtypes.int4),
        sw=scales(8),
        zw=np.zeros(8, ml_dtypes.int4),
        B=np.ones(8, np.float32),
    ),
    "float16": quantized(
        GEMM,
        "float16[2, 16] x) => (float16[2, 8] y",
        opset=19,
        W=codes(16, 8),
        sx=np.float16(0.02),
        sy=np.float16(0.05),
        sw=scales(8).astype(np.float16),
        zw=np.zeros(8, np.int8),
        B=np.ones(8, np.float16),
    ),
    "opset 10": quantized(PRODUCT, opset=10, W=codes(16, 8), **ONE),
    "a type in an attribute": quantized(
        f"""q = QuantizeLinear<output_dtype = 2>(x, sx, zx) d = DequantizeLinear(q, sx, zx) {WEIGHT} c = MatMul(d, w)
            cq = QuantizeLinear<output_dtype = 2>(c, sy, zy) y = DequantizeLinear(cq, sy, zy)""",
        opset=21,
        W=codes(16, 8),
        **ONE,
    ),
    "another scale on the way back": quantized(
        f"q = QuantizeLinear(x, sx, zx) d = DequantizeLinear(q, s2, zx) {WEIGHT} c = MatMul(d, w) {WRITE}",
        W=codes(16, 8),
        s2=np.float32(0.03),
        **ONE,
    ),
    "codes as inputs and outputs": quantized(
        f"d = DequantizeLinear(q, sx, zx) {WEIGHT} c = MatMul(d, w) y = QuantizeLinear(c, sy, zy)",
        "int8[2, 16] q) => (int8[2, 8] y",
        sign="int8",
        W=codes(16, 8),
        **ONE,
    ),
    "a computed scale": quantized(
        f"q = QuantizeLinear(x, t, zx) d = DequantizeLinear(q, t, zx) {WEIGHT} c = Gemm(d, w, B) {WRITE}",
        "float[2, 16] x, float t) => (float[2, 8] y",
        W=codes(16, 8),
        B=np.ones(8, np.float32),
        **ONE,
    ),
    "a constant under a computed scale": quantized(
        f"{READ} {WEIGHT} m = MatMul(d, w) v = DequantizeLinear(V, t, zw) c = Add(m, v) {WRITE}",
        "float[2, 16] x, float t) => (float[2, 8] y",
        sign="int8",
        W=codes(16, 8),
        V=codes(2, 8),
        **ONE,
    ),
    "a constant under a computed zero point": quantized(
        f"{READ} w = DequantizeLinear(W, sx, t) c = Add(d, w) {WRITE}",
        "float[2, 16] x, int8 t) => (float[2, 16] y",
        sign="int8",
        W=codes(2, 16),
    ),
    "a scale of 0": quantized(
        BIASED, W=codes(16, 8), B=np.ones(8, np.int32), sb=np.float32(1), **{**per(8), "sw": np.zeros(8, np.float32)}
    ),
    "a weight read by a Gather too": quantized(
        f"{READ} {OF_OUTPUTS} c = MatMul(d, w) e = Gather<axis = 1>(w, i) {WRITE}",
        "float[2, 16] x) => (float[2, 8] y, float[16, 2] e",
        W=codes(16, 8),
        i=np.asarray([0, 5]),
        **per(8),
    ),
    "no inputs": quantized(
        f"q = QuantizeLinear(K, sx, zx) d = DequantizeLinear(q, sx, zx) {WEIGHT} c = MatMul(d, w) {WRITE}",
        ") => (float[2, 8] y",
        K=np.ones((2, 16), np.float32),
        W=codes(16, 8),
        **ONE,
    ),
}


def fitted(model: onnx.ModelProto, target: str, **options: Any) -> tuple[Model, Changes]:
    loaded = Model.load(model)
    return loaded, FitTarget().rewrite(loaded, Context(target=find_target(target), **options))


def feeds(model: onnx.ModelProto) -> dict[str, Any]:
    values = random_inputs(model)
    if "t" in values:  # what is computed: a scale or a zero point
        values["t"] = np.asarray(0.02 if values["t"].dtype.kind == "f" else 3, values["t"].dtype)
    return values


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_stay_within_two_steps_for_every_target(name):
    """With ONNX Runtime's optimizations off, so that they cannot hide anything."""
    model = MODELS[name]
    feed = feeds(model)
    before = run(model, feed)
    for target in TARGETS:
        after = run(fitted(model, target)[0], feed)
        for one, other in zip(before, after, strict=True):
            limit = STEPS if one.dtype.kind == "f" else 2.5
            assert np.abs(one.astype(np.float64) - other).max() <= limit, target
            assert one.dtype == other.dtype


@pytest.mark.parametrize("name", ["square Gemm, scales of inputs", "square Conv, scales of inputs"])
def test_scales_of_inputs_that_onnx_runtime_takes_for_those_of_outputs_are_mended(name):
    model = MODELS[name]
    feed = feeds(model)
    meant, computed = (run(model, feed, optimized=optimized)[0] for optimized in (False, True))
    assert np.abs(meant - computed).max() > STEPS
    assert "weight-axis" in traps.found(model, "x86-vnni")

    mended, _ = fitted(model, "x86-vnni")

    assert "weight-axis" not in traps.found(mended, "x86-vnni")
    assert np.abs(meant - run(mended, feed, optimized=True)[0]).max() <= STEPS


@pytest.mark.parametrize("name", ["weight on the left", "blocks", "ConvTranspose of groups", "4 bits"])
def test_scales_along_the_axis_of_the_outputs_or_for_blocks_are_no_trap(name):
    assert "weight-axis" not in traps.found(MODELS[name], "x86-vnni")


def test_layers_that_share_a_weight_and_take_it_otherwise_get_one_each():
    model = quantized(
        f"{READ} {OF_OUTPUTS} c = Gemm(d, w) e = Gemm<transB = 1>(d, w) {WRITE} "
        "eq = QuantizeLinear(e, sy, zy) z = DequantizeLinear(eq, sy, zy)",
        "float[2, 8] x) => (float[2, 8] y, float[2, 8] z",
        W=codes(8, 8),
        **per(8),
    )
    mended, changes = fitted(model, "x86-vnni")
    assert changes.count == 1
    feed = feeds(model)
    for one, other in zip(run(model, feed), run(mended, feed, optimized=True), strict=True):
        assert np.abs(one - other).max() <= STEPS


def test_an_excluded_layer_keeps_a_weight_that_it_shares():
    model = quantized(
        f"{READ} {OF_OUTPUTS} [mine] c = MatMul(d, w) [other] e = MatMul(d, w) {WRITE}",
        "float[2, 16] x) => (float[2, 8] y, float[2, 8] e",
        W=codes(16, 8),
        **per(8),
    )
    mended, changes = fitted(model, "qnn", exclude=("mine",))
    assert [change.where for change in changes.changed] == ["other"]
    feed = feeds(model)
    np.testing.assert_array_equal(run(model, feed)[0], run(mended, feed)[0])


@pytest.mark.parametrize("shape", [(), (1,), (8,), (1, 8), (2, 8), (2, 1)])
@pytest.mark.parametrize("kind", ["float", "int32"])
def test_a_bias_of_any_shape_is_held_in_int32_or_left(shape, kind):
    value = RNG.integers(-900, 900, shape)
    if kind == "float":
        model = quantized(GEMM, W=codes(16, 8), B=(value * 1e-3).astype(np.float32), **per(8))
    else:
        model = quantized(BIASED, W=codes(16, 8), B=value.astype(np.int32), sb=np.float32(1e-3), **per(8))
    mended, changes = fitted(model, "arm64")
    assert changes.count == (len(shape) < 2 or shape[0] == 1)
    assert len(changes.left) == 1 - changes.count
    feed = feeds(model)
    assert np.abs(run(model, feed)[0] - run(mended, feed)[0]).max() <= STEPS


def test_a_bias_that_overflows_in_the_scale_of_the_products_is_left():
    tiny: dict[str, Any] = {**per(8), "sw": np.full(8, 1e-12, np.float32)}
    model = quantized(BIASED, W=codes(16, 8), B=np.arange(8, dtype=np.int32), sb=np.float32(1), **tiny)
    mended, changes = fitted(model, "arm64")
    assert [left.why for left in changes.left] == ["its bias does not fit int32 in the scale of the products"]
    np.testing.assert_array_equal(run(model, feeds(model))[0], run(mended, feeds(model))[0])


def test_the_zero_point_of_a_bias_which_no_kernel_reads_is_found_and_mended():
    body = f"{READ} {WEIGHT} b = DequantizeLinear(B, sb, zb) c = Gemm(d, w, b) {WRITE}"
    model = quantized(
        body, W=codes(16, 8), B=np.arange(8, dtype=np.int32), sb=np.float32(0.0002), zb=np.int32(9000), **ONE
    )
    assert "bias-scale" in traps.found(model, "arm64")
    mended, _ = fitted(model, "arm64")
    assert np.abs(run(model, feeds(model))[0] - run(mended, feeds(model), optimized=True)[0]).max() <= STEPS


def test_an_alpha_belongs_to_the_scale_of_the_products():
    body = f"{READ} {WEIGHT} b = DequantizeLinear(B, sb) c = Gemm<alpha = 0.5>(d, w, b) {WRITE}"
    model = quantized(body, W=codes(16, 8), B=np.arange(8, dtype=np.int32), sb=np.float32(0.0001), **ONE)
    assert "bias-scale" not in traps.found(model, "arm64")


def test_a_float_bias_of_a_layer_that_gives_float_stays():
    body = f"{READ} {WEIGHT} c = Gemm(d, w, B) {WRITE} e = Gemm(d, w, C)"
    ends = "float[2, 16] x) => (float[2, 8] y, float[2, 8] e"
    values: dict[str, Any] = {"B": np.ones(8, np.float32), "C": np.full(8, 0.3, np.float32)}
    mended, changes = fitted(quantized(body, ends, W=codes(16, 8), **values, **ONE), "arm64")
    assert [(change.where, change.what) for change in changes.changed] == [("c", "its bias is int32")]
    np.testing.assert_array_equal(mended.weight("C"), values["C"])


def test_weights_in_constant_nodes_are_seen():
    body = """W = Constant<value = int8[2, 2] {127, -127, 3, 5}>() sw = Constant<value_float = 0.01>()
        zw = Constant<value = int8 {0}>()"""
    model = quantized(f"{body} {PRODUCT}", "float[1, 2] x) => (float[1, 2] y")
    assert "saturation" in traps.found(model, "x86")
    mended, _ = fitted(model, "x86")
    assert "saturation" not in traps.found(mended, "x86")


def test_a_zero_point_that_is_left_out_by_an_empty_name_is_written_out():
    model = traps.conv(activations="int8")
    next(node for node in model.graph.node if node.output[0] == "w").input[2] = ""
    assert "weight-zero-point" in traps.found(model, "xnnpack")
    assert "weight-zero-point" not in traps.found(fitted(model, "xnnpack")[0], "xnnpack")


def test_an_offset_that_the_target_takes_stays():
    body = f"{READ} {WEIGHT} c = Gemm(d, w, B) {WRITE}"
    model = quantized(body, W=codes(16, 8), B=np.ones(8, np.float32), sw=np.float32(0.01), zw=np.int8(5))
    _, changes = fitted(model, "web")
    assert [change.what for change in changes.changed] == ["its bias is int32"]


def test_weights_beside_float_data_keep_their_type():
    body = (
        f"{OF_OUTPUTS} m = MatMul(x, w) {READ.replace('(x', '(m')} v = DequantizeLinear(V, sx) c = MatMul(d, v) {WRITE}"
    )
    model = quantized(body, sign="int8", W=codes(16, 8), V=codes(8, 8), **per(8))
    mended, _ = fitted(model, "nnapi")
    assert mended.weight("W").dtype == np.int8


def test_int16_activations_become_uint16_where_the_target_has_these_alone():
    values = {"sx": np.float32(1e-4), "sy": np.float32(1e-3), "zx": np.int16(0), "zy": np.int16(0)}
    text = f"g (float[2, 16] x) => (float[2, 8] y) {{ {PRODUCT} }}"
    arrays = {name: np.asarray(value) for name, value in {**values, "W": codes(16, 8), **ONE}.items()}
    model = graph_model(text, arrays, opset=21, ir_version=10)
    assert "activation-type" in traps.found(model, "qnn")
    mended, _ = fitted(model, "qnn")
    assert "activation-type" not in traps.found(mended, "qnn")
    np.testing.assert_array_equal(run(model, feeds(model))[0], run(mended, feeds(model))[0])
    _, changes = fitted(model, "nnapi")
    assert [left.why for left in changes.left] == ["int16 activations stay: 8 bits have other values"]


@pytest.mark.parametrize(
    "behind", ["r = Reshape(sq, sh) y = DequantizeLinear(r, ss, zs)", "y = DequantizeLinear(sq, s2, zs)"]
)
def test_a_softmax_whose_codes_are_read_in_another_way_keeps_its_scale(behind):
    body = f"{READ} s = Softmax(d) sq = QuantizeLinear(s, ss, zs) {behind}"
    ends = "float[2, 16] x) => (float[2, 16] y"
    values: dict[str, Any] = {
        "ss": np.float32(1 / 255),
        "s2": np.float32(0.5),
        "zs": np.uint8(0),
        "sh": np.asarray([2, 16]),
    }
    model = quantized(body, ends, **values)
    mended, changes = fitted(model, "xnnpack")
    assert len(changes.left) == 1
    np.testing.assert_array_equal(run(model, feeds(model))[0], run(mended, feeds(model))[0])


def test_what_is_quantized_in_the_body_of_an_if_is_told_and_left():
    then = f"then_branch = a () => (float[2, 8] t) {{ {WEIGHT} t = MatMul(d, w) }}"
    other = "else_branch = b () => (float[2, 8] o) { v = DequantizeLinear(W, sw) o = Gemm(x, v) }"
    ends = "float[2, 16] x, bool p) => (float[2, 8] y"
    model = quantized(f"{READ} y = If(p) <{then}, {other}>", ends, W=codes(16, 8), **ONE)
    assert "saturation" in traps.found(model, "x86")
    _, changes = fitted(model, "x86")
    assert changes.count == 0
    assert [left.where for left in changes.left] == ["a", "b"]
