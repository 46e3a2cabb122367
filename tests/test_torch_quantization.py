"""Quantized models in the bridge: gradients through rounding, and integers that come back as they were trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.model import Model
from onnxcomp.torch_bridge import NodeCall, load
from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES
from onnxcomp.torch_bridge.registry import find_operator
from tests.models import graph_model, random_weights

Array = np.ndarray[Any, Any]

INT8, UINT8, INT4 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4

ROUNDING = 1e-5
"""Of values below ten, which are sums of tens of products; the codes themselves are the same."""

X = torch.tensor([-300.0, -128.6, -128.4, -2.6, 0.2, 127.4, 127.6, 500.0]) * 0.1
SCALE = 0.1


def quantizers(kind: int = INT8) -> tuple[Any, Any]:
    """QuantizeLinear and DequantizeLinear to a type, as functions of the tensors alone."""
    into, out = find_operator("", "QuantizeLinear"), find_operator("", "DequantizeLinear")
    assert into is not None
    assert out is not None
    call = NodeCall("n", "QuantizeLinear", attrs={"output_dtype": kind}, input_types=(1, 1, kind))
    return lambda *given: into(call, *given), lambda *given: out(NodeCall("n", "DequantizeLinear"), *given)


def test_the_gradient_is_1_inside_of_the_range_and_0_outside():
    x = X.clone().requires_grad_()
    quantize, dequantize = quantizers()
    scale = torch.tensor(SCALE)

    dequantize(quantize(x, scale), scale).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))


def test_the_gradient_of_the_scale_is_that_of_learned_step_sizes():
    scale = torch.tensor(SCALE, requires_grad=True)
    weights = torch.linspace(-1, 2, len(X))
    quantize, dequantize = quantizers()

    (weights * dequantize(quantize(X, scale), scale)).sum().backward()

    ratio = X / SCALE
    codes = torch.round(ratio)
    # Esser et al. 2020, equation 3: round(v/s) - v/s inside, the end of the range outside.
    formula = torch.where(codes < -128, -128, torch.where(codes > 127, 127, codes - ratio))
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (weights * formula).sum())


@pytest.mark.parametrize("zero", [0, 3])
def test_there_and_back_in_one_is_the_same_as_in_two(zero):
    text = "g (float[N] x) => (float[N] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"
    module = load(
        graph_model(text, {"s": np.array(SCALE, np.float32), "z": np.array(zero, np.int8)}), learn_scales=True
    )
    results = []
    for watch in ([], ["q"]):
        module.zero_grad()
        x = X.clone().requires_grad_()
        y = module.run({"x": x}, watch=watch)["y"]
        (y**2).sum().backward()
        results.append((y.detach(), x.grad, module._parameters["s"].grad.clone()))

    assert [step.call.op for step in module._fast.steps] == ["quantize_and_back"]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_gradients_pass_what_lies_between():
    text = """g (float[2, 8] x) => (float[2, 8] y) {
        q = QuantizeLinear(x, s, z)  r = Reshape(q, shape)  t = Transpose(r)  y = DequantizeLinear(t, s, z)
    }"""
    weights = {"s": np.array(SCALE, np.float32), "z": np.array(1, np.int8), "shape": np.array([8, 2])}
    x = torch.randn(2, 8, requires_grad=True)

    load(graph_model(text, weights))(x).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == torch.ones(2, 8).tolist()


def weight_model(kind: int, *, axis: int = 1, block: int = 0, zero: bool = True) -> tuple[Model, Array]:
    """Y = x times a weight in codes, by channel or block, x itself through int8."""
    rng = np.random.default_rng(kind + block)
    low, high = INTEGER_RANGES[kind]
    shape = (8, 6)
    codes = rng.integers(low, high + 1, shape)
    grid = (shape[0] // block, shape[1]) if block else (shape[axis],)
    scale = rng.uniform(0.02, 0.1, grid).astype(np.float32)
    zeros = rng.integers(low, high + 1, grid)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    attrs: dict[str, Any] = {"axis": 0 if block else axis, **({"block_size": block} if block else {})}
    constants = {
        "W": codes.astype(dtype),
        "s": scale,
        "z": zeros.astype(dtype),
        "xs": np.array(0.02, np.float32),
        "xz": np.array(5, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        helper.make_node("DequantizeLinear", ["W", "s", *(["z"] if zero else [])], ["w"], name="decode", **attrs),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [None, 8])],
        [helper.make_tensor_value_info("y", 1, [None, 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if zero or name != "z"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Model.load(model), random_weights(3, 8)


def run(model: Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options)
    return np.asarray(session.run(None, {"x": x})[0])


KINDS = [
    (INT8, {"axis": 1}),
    (INT8, {"axis": 0, "zero": False}),
    (UINT8, {"axis": 1}),
    (INT4, {"axis": 1}),
    (INT4, {"block": 4}),
    (INT4, {"block": 2, "zero": False}),
    (TensorProto.UINT4, {"block": 4}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("learn_scales", [False, True])
def test_untrained_weights_are_written_back_bit_for_bit(kind, options, learn_scales):
    model, x = weight_model(kind, **options)
    before = model.to_proto().SerializeToString()
    module = load(model, learn_scales=learn_scales)

    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), run(model, x), atol=ROUNDING)
    assert module.write_back(model) == []
    assert model.to_proto().SerializeToString() == before


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("learn_scales", [False, True])
def test_saved_integers_give_exactly_what_was_trained(kind, options, learn_scales):
    model, x = weight_model(kind, **options)
    module = load(model, learn_scales=learn_scales)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        module(torch.from_numpy(x)).square().sum().backward()
        optimizer.step()

    changed = module.write_back(model)

    assert "W" in changed
    assert ("s" in changed) == learn_scales
    np.testing.assert_allclose(run(model, x), module(torch.from_numpy(x)).detach(), atol=ROUNDING)
    np.testing.assert_allclose(
        load(model)(torch.from_numpy(x)).detach(), module(torch.from_numpy(x)).detach(), atol=ROUNDING
    )


@pytest.mark.parametrize(("away", "start"), [(0.3, 0.3), (-0.9, -0.499)])
def test_weights_start_from_the_float_model_within_their_codes(away, start):
    model, _ = weight_model(INT8, axis=1, zero=False)
    steps, scale = model.weight("W").astype(np.float32), model.weight("s")
    text = "g (float[N, 8] x) => (float[N, 6] y) { y = MatMul(x, W) }"

    module = load(model, latents=graph_model(text, W=(steps + np.float32(away)) * scale))

    np.testing.assert_allclose(module._parameters["W"].detach(), (steps + np.float32(start)) * scale, atol=1e-5)
    assert module.write_back(model) == []


def test_dynamic_quantization_passes_gradients_as_if_it_were_not_there():
    text = """g (float[N, 8] x) => (float[N, 4] y) {
        q, s, z = DynamicQuantizeLinear(x)  p = MatMulInteger(q, W, z, w_zero)  f = Cast<to = 1>(p)
        both = Mul(s, w_scale)  y = Mul(f, both)
    }"""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 255, (8, 4)).astype(np.uint8)
    weights = {"W": codes, "w_zero": np.array(128, np.uint8), "w_scale": np.array(0.01, np.float32)}
    model = Model.load(graph_model(text, weights))
    x = torch.from_numpy(random_weights(3, 8)).requires_grad_()

    y = load(model)(x)
    y.sum().backward()

    np.testing.assert_allclose(y.detach(), run(model, x.detach().numpy()), atol=ROUNDING)
    dense = (codes.astype(np.float32) - 128) * np.float32(0.01)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, np.broadcast_to(dense.sum(1), (3, 8)), atol=ROUNDING)


@pytest.mark.parametrize("zero", ["Constant <value = int8 {0}> ()", "Cast <to = 3> (z0)"])
def test_a_zero_point_that_a_node_makes_tells_the_type_too(zero):
    model = Model.load(
        graph_model(
            f"""g (float[N, 3] x) => (float[N, 3] y) <float s = {{0.02}}, int32 z0 = {{0}}>
            {{ z = {zero} q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}"""
        )
    )
    x = random_weights(4, 3)

    np.testing.assert_allclose(load(model)(torch.from_numpy(x)).detach(), run(model, x), atol=ROUNDING)


def test_codes_with_a_computed_zero_point_are_not_trained():
    text = """g (float[N, 3] x) => (float[N, 2] y) <int8[3, 2] w = {1, 2, 3, -4, 5, -8}, float s = {0.1}, int32 o = {1}>
        { z = Cast<to = 3>(o)
          d = DequantizeLinear(w, s, z)
          y = MatMul(x, d) }"""
    model, x = Model.load(graph_model(text)), random_weights(4, 3)
    module = load(model)

    assert not list(module.parameters())
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), run(model, x), atol=ROUNDING)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_codes_with_scales_of_16_bits_give_16_bits(learn_scales):
    text = """g (float16[N, 3] x) => (float16[N, 2] y) <int8[3, 2] w = {1, 2, 3, -4, 5, -8}>
        { d = DequantizeLinear(w, s) y = MatMul(x, d) }"""
    model = Model.load(graph_model(text, opset=19, ir_version=9, s=np.asarray(0.125, np.float16)))
    x = random_weights(4, 3).astype(np.float16)

    found = load(model, learn_scales=learn_scales)(torch.from_numpy(x))

    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.detach(), run(model, x), atol=2e-3)


def test_codes_of_16_bits_in_older_opsets_are_trained_too():
    text = """g (float[N, 3] x) => (float[N, 2] y) <float xs = {0.001}, float ws = {0.01}> {
        q = com.microsoft.QuantizeLinear(x, xs, xz)
        d = com.microsoft.DequantizeLinear(q, xs, xz)
        w = com.microsoft.DequantizeLinear(W, ws, wz)
        y = MatMul(d, w) }"""
    codes = np.array([[100, -200], [30, 40], [-555, 6]], np.int16)
    zeros = {"xz": np.asarray(30000, np.uint16), "wz": np.asarray(0, np.int16)}
    proto = graph_model(text, zeros, W=codes)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model, x = Model.load(proto), random_weights(4, 3)
    module = load(model, learn_scales=True)

    assert {name for name, _ in module.named_parameters()} == {"W", "xs", "ws"}
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach(), run(model, x), atol=ROUNDING)


def test_codes_that_are_an_output_stay_codes():
    text = """g (float[N, 3] x) => (float[N, 2] y, int8[3, 2] w) <int8[3, 2] w = {1, 2, 3, -4, 5, -8}, float s = {0.1}>
        { d = DequantizeLinear(w, s) y = MatMul(x, d) }"""
    model = Model.load(graph_model(text))

    np.testing.assert_array_equal(load(model)(torch.zeros(1, 3))[1], model.weight("w"))


def test_a_float8_type_is_refused_by_name():
    quantize, _ = quantizers(TensorProto.FLOAT8E4M3FN)

    with pytest.raises(NotImplementedError, match="values of element type FLOAT8E4M3FN are not trained through"):
        quantize(X, torch.tensor(SCALE))
