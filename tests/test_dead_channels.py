"""Channels that can go at no loss, and those that only look like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.model import Model
from onnxcomp_passes._dead import remove_dead
from tests.models import assert_same_outputs, batch_norm_weights, graph_model, random_inputs, random_weights

Array = np.ndarray[Any, Any]


def without(weights: Array, *channels: int, axis: int = 0) -> Array:
    """The weights with zeros for these channels."""
    weights = weights.copy()
    np.moveaxis(weights, axis, 0)[list(channels)] = 0
    return weights


def pruned(proto: onnx.ModelProto) -> Model:
    """What is left, which has to compute the same."""
    model = Model.load(proto)
    remove_dead(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert_same_outputs(proto, model, random_inputs(proto))
    return model


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {constant.name: tuple(constant.shape) for constant in model.constants()}


TWO_CONVS = """g (float[N, 3, 8, 8] x) => (float[N, 5, 4, 4] y) {{
    a = Conv(x, W, b) r = {act}(a) {inner} y = Conv<pads = [{pad}, {pad}, {pad}, {pad}]>({last}, V, c) }}"""


def two_convs(act: str = "Relu", inner: str = "", last: str = "r", pad: int = 0, **changed: Any) -> onnx.ModelProto:
    """x -> Conv W (6 channels) -> act -> Conv V (5 channels) -> y."""
    weights = {
        **{"W": random_weights(6, 3, 3, 3, scale=0.2), "b": np.abs(random_weights(6, seed=1)) + 0.1},
        **{"V": random_weights(5, 6, 3, 3, seed=2, scale=0.2), "c": random_weights(5, seed=3)},
    }
    text = TWO_CONVS.format(act=act, inner=inner, last=last, pad=pad)
    return graph_model(text.replace("float[N, 5, 4, 4] y", "float[N, 5, H, V] y"), {**weights, **changed})


W, V, B = random_weights(6, 3, 3, 3, scale=0.2), random_weights(5, 6, 3, 3, seed=2, scale=0.2), np.ones(6, np.float32)


def test_a_constant_channel_moves_into_the_next_bias():
    model = pruned(two_convs(W=without(W, 1, 4)))

    assert shapes(model)["W"] == (4, 3, 3, 3)
    assert shapes(model)["V"] == (5, 4, 3, 3)


def test_a_constant_channel_stays_where_zeros_lie_beside_it():
    model = pruned(two_convs(W=without(W, 1, 4), pad=1))

    assert shapes(model)["W"] == (6, 3, 3, 3)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_channel_that_is_zero_goes_whatever_lies_beside_it(pad):
    model = pruned(two_convs(W=without(W, 1, 4), b=-B, pad=pad))  # negative: zero behind the Relu

    assert shapes(model)["W"] == (4, 3, 3, 3)


def test_zero_weights_with_an_activation_that_moves_zero():
    proto = two_convs(act="Sigmoid", W=without(W, 2), b=without(B, 2), pad=1)

    assert shapes(pruned(proto))["W"] == (6, 3, 3, 3)
    assert shapes(pruned(two_convs(act="Sigmoid", W=without(W, 2), b=without(B, 2))))["W"] == (5, 3, 3, 3)


def test_a_channel_that_nothing_reads_goes():
    model = pruned(two_convs(V=without(V, 0, 5, axis=1), pad=1))

    assert shapes(model)["W"] == (4, 3, 3, 3)


def test_a_bias_is_made_where_there_is_none():
    proto = two_convs(W=without(W, 1))
    proto.graph.node[2].input.pop()

    model = pruned(proto)

    assert shapes(model)["W"] == (5, 3, 3, 3)
    assert len(model.graph.nodes[-1].inputs) == 3


def test_a_bias_that_others_read_stays_theirs():
    proto = two_convs(W=without(W, 1), inner="s = Conv(r, U, c) p = Sigmoid(s) t = Relu(r)", last="t")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(random_weights(5, 6, 3, 3, seed=8), "U"))
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info("p"))
    proto = onnx.shape_inference.infer_shapes(proto)

    assert shapes(pruned(proto))["W"] == (5, 3, 3, 3)


def test_a_channel_without_scale_is_constant():
    norm: dict[str, Any] = {f"n{key}": value for key, value in batch_norm_weights(6).items()}
    inner = "m = BatchNormalization(r, nscale, nbias, nmean, nvariance)"
    model = pruned(two_convs(inner=inner, last="m", **{**norm, "nscale": without(norm["nscale"], 0, 3)}))

    assert shapes(model)["W"] == (4, 3, 3, 3)
    assert shapes(model)["nmean"] == (4,)


def test_a_sum_with_something_live_stays():
    text = """g (float[N, 3, 8, 8] x) => (float[N, 5, 6, 6] y) {
        a = Conv(x, W) d = Conv(x, U) s = Add(a, d) r = Relu(s) y = Conv(r, V) }"""
    weights = {"U": random_weights(6, 3, 3, 3, seed=5), "V": random_weights(5, 6, 1, 1)}

    assert shapes(pruned(graph_model(text, weights, W=without(W, 1, 2))))["W"] == (6, 3, 3, 3)
    assert (
        shapes(pruned(graph_model(text, {**weights, "U": without(weights["U"], 2)}, W=without(W, 1, 2))))["W"][0] == 5
    )


def test_a_gate_of_a_zero_channel_goes_with_it():
    text = """g (float[N, 3, 8, 8] x) => (float[N, 5, 6, 6] y) {
        a = Conv(x, W) p = GlobalAveragePool(a) e = Conv(p, E) f = Relu(e) h = Conv(f, F, b) g = Sigmoid(h)
        m = Mul(a, g) y = Conv(m, V) }"""
    weights = {
        "E": random_weights(2, 6, 1, 1),
        "F": random_weights(6, 2, 1, 1, seed=3),
        "V": random_weights(5, 6, 1, 1),
    }

    model = pruned(graph_model(text, weights, W=without(W, 1, 2), b=B))

    assert shapes(model)["W"][0] == shapes(model)["F"][0] == shapes(model)["E"][1] == 4


def mlp(body: str, **weights: Array) -> onnx.ModelProto:
    return graph_model(f"g (float[N, T, 4] x) => (float[N, T, 3] y) {{ {body} }}", weights)


A, C = random_weights(4, 8), random_weights(8, 3, seed=1)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, A) i = Add(h, b) r = Relu(i) y = MatMul(r, C)",
        "h = MatMul(x, A) i = Add(h, b) r = Relu(i) z = MatMul(r, C) y = Add(d, z)",
        "h = MatMul(x, A) i = Add(b, h) r = Erf(i) z = MatMul(r, C) e = Exp(z) y = Add(z, e)",
    ],
)
def test_a_constant_neuron_moves_behind_a_product(body):
    bias = np.linspace(0.5, 1, 8).astype(np.float32)
    proto = mlp(body, A=without(A, 3, 7, axis=1), b=bias, C=C, d=np.ones(3, np.float32))

    assert shapes(pruned(proto))["A"] == (4, 6)


def test_alpha_and_beta_of_a_gemm_are_minded():
    text = """g (float[N, 4] x) => (float[N, 3] y) {
        h = Gemm(x, A, b) r = Relu(h) y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(r, C, d) }"""
    weights = {"A": without(A, 3, 7, axis=1), "b": np.ones(8, np.float32), "C": np.ascontiguousarray(C.T)}

    assert shapes(pruned(graph_model(text, weights, d=np.ones((1, 3), np.float32))))["C"] == (3, 6)


def test_what_is_dead_once_something_dead_is_gone_goes_too():
    proto = mlp(
        "h = MatMul(x, A) r = Relu(h) i = MatMul(r, E) s = Relu(i) y = MatMul(s, C)",
        A=A,
        E=without(random_weights(8, 8, seed=4), *range(1, 8), axis=1),
        C=C,
    )

    weights = shapes(pruned(proto))

    assert weights["E"] == (8, 1)
    assert weights["C"] == (1, 3)


def test_channels_of_an_output_stay():
    proto = two_convs(W=without(W, 1), b=without(B, 1))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", 6, 6, 6]))

    assert shapes(pruned(proto))["W"] == (6, 3, 3, 3)


def test_channels_that_a_layer_normalization_reads_stay():
    body = "h = MatMul(x, A) n = LayerNormalization(h, g, b) y = MatMul(n, C)"
    proto = mlp(body, A=without(A, 2, axis=1), g=np.ones(8, np.float32), b=np.zeros(8, np.float32), C=C)

    assert shapes(pruned(proto))["A"] == (4, 8)


def test_weights_that_are_not_finite_are_left_alone():
    first, second = without(W, 1), V.copy()
    second[0, 1, 0, 0] = np.inf  # times a constant
    model = Model.load(two_convs(W=first, V=second))

    remove_dead(model)

    assert shapes(model)["W"] == (6, 3, 3, 3)
