"""Which channels are constant: what is claimed is what ONNX Runtime computes, and silenced channels are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcomp.model import Model
from onnxcomp_passes._constant_channels import ConstantChannels
from tests.channel_graphs import silenced_cnns, silenced_transformers
from tests.models import assert_same_arrays, graph_model, random_inputs, random_weights, run

SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def inner_values(proto: onnx.ModelProto, *, seed: int) -> dict[str, Any]:
    """What every node computes."""
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    outputs = {info.name for info in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name and name not in outputs]
    watched.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    results = run(watched, random_inputs(watched, seed=seed, batch=3))
    return dict(zip([info.name for info in watched.graph.output], results, strict=True))


@given(st.one_of(silenced_cnns(), silenced_transformers()))
@SETTINGS
def test_what_is_known_is_what_onnx_runtime_computes(case):
    model = Model.load(case.model)
    constants = ConstantChannels(model)
    computed = inner_values(case.model, seed=1)

    for node in model.graph.nodes:
        for tensor in node.outputs:
            value = constants.of(tensor)
            if value is not None:
                wanted = computed[tensor.name]
                known = np.broadcast_to(value, wanted.shape)
                here = np.isfinite(known)
                assert_same_arrays(wanted[here], known[here].astype(wanted.dtype))


def known(text: str, /, **weights: Any) -> Any:
    """What is known of y."""
    model = Model.load(graph_model(text, weights))
    value = ConstantChannels(model).of(model.graph.outputs[0])
    return None if value is None else value.reshape(value.shape[0], -1).tolist()


X = "g (float[N, 2, 6, 6] x) => (float[N, C, H, V] y)"
DEAD = np.stack([np.ones((2, 3, 3)), np.zeros((2, 3, 3))]).astype(np.float32)
BIAS = np.array([1, 2], np.float32)
unknown = pytest.approx(np.nan, nan_ok=True)


def test_a_channel_without_weights_is_its_bias():
    assert known(f"{X} {{ y = Conv(x, W, b) }}", W=DEAD, b=BIAS) == [[unknown, 2]]


def test_a_constant_channel_stays_one_only_where_no_zeros_lie_beside_it():
    second = np.stack([DEAD[1], np.stack([0 * DEAD[0, 0], DEAD[0, 0]])])  # its second output reads the constant alone
    body = "a = Conv(x, W, b) y = Conv<pads = [{pad}, {pad}, {pad}, {pad}]>(a, V)"

    assert known(f"{X} {{ {body.format(pad=0)} }}", W=DEAD, b=BIAS, V=second) == [[0, 18]]
    assert known(f"{X} {{ {body.format(pad=1)} }}", W=DEAD, b=BIAS, V=second) == [[0, unknown]]


def test_zero_times_anything_is_zero():
    text = f"{X} {{ a = Conv(x, W) c = Conv(x, V) y = Mul(c, a) }}"

    assert known(text, W=DEAD, V=random_weights(2, 2, 3, 3)) == [[unknown, 0]]


def test_a_constant_and_something_live_is_not_constant():
    text = f"{X} {{ a = Conv(x, W, b) c = Conv(x, V) y = Add(a, c) }}"

    assert known(text, W=DEAD, b=BIAS, V=random_weights(2, 2, 3, 3)) is None


def test_a_batch_normalization_without_scale_is_its_bias():
    ones = np.ones(2, np.float32)
    text = f"{X} {{ y = BatchNormalization(x, s, b, m, v) }}"

    assert known(text, s=np.array([1, 0], "f"), b=BIAS, m=ones, v=ones) == [[unknown, 2]]


def test_a_negative_constant_is_zero_behind_a_relu():
    assert known(f"{X} {{ a = Conv(x, W, b) y = Relu(a) }}", W=DEAD, b=-BIAS) == [[unknown, 0]]


def test_a_flattened_image_has_a_constant_at_each_place_of_its_channel():
    text = "g (float[N, 2, 4, 4] x) => (float[N, 8] y) { a = Conv(x, W, b) y = Flatten(a) }"

    assert known(text, W=DEAD, b=BIAS) == [[*[unknown] * 4, *[2] * 4]]


def test_weights_that_are_not_finite_prove_nothing():
    text = "g (float[N, 2] x) => (float[N, 2] y) { y = Gemm(x, W, b) }"
    weight = np.array([[np.nan, 0], [np.inf, 0]], np.float32)

    assert known(text, W=weight, b=BIAS) == [[unknown, 2]]


def test_a_weight_that_the_caller_may_replace_proves_nothing():
    proto = graph_model(
        "g (float[N, 2] x, float[2, 2] W) => (float[N, 2] y) { y = MatMul(x, W) }", W=np.zeros((2, 2), "f")
    )
    model = Model.load(proto)

    assert ConstantChannels(model).of(model.graph.outputs[0]) is None


@pytest.mark.parametrize(("include", "wanted"), [(0, [[unknown, 2]]), (1, None)])
def test_an_average_that_counts_its_border_is_not_constant(include, wanted):
    pool = f"AveragePool<kernel_shape = [2, 2], pads = [1, 1, 1, 1], count_include_pad = {include}>"

    assert known(f"{X} {{ a = Conv(x, W, b) y = {pool}(a) }}", W=DEAD, b=BIAS) == wanted


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("y = Reshape(a, s)", [[unknown, 0, unknown, unknown]]),
        ("r = Reshape(a, s) y = Transpose<perm = [0, 2, 1]>(r)", [[unknown, unknown, 0, unknown]]),
    ],
)
def test_channels_are_followed_through_reshapes(body, wanted):
    weight = random_weights(3, 4)
    weight[:, 1] = 0
    text = f"g (float[N, 3] x) => (float[N, A, B] y) {{ a = MatMul(x, W) {body} }}"

    assert known(text, W=weight, s=np.array([0, 2, 2])) == wanted


def test_constants_are_followed_through_quantization():
    text = f"""{X} {{
        a = Conv(x, W, b) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(V, t, v)
        y = Conv(d, e) }}"""
    second = np.array([[[[5]], [[0]]], [[[0]], [[7]]]], np.int8)  # its second output reads the constant alone
    grids = {"s": np.float32(0.7), "z": np.uint8(3), "t": np.float32(0.5), "v": np.int8(0)}

    assert known(text, W=DEAD, b=BIAS, V=second, **grids) == [[unknown, pytest.approx(3 * 0.7 * 3.5)]]


def test_channels_of_a_quantized_model_are_found():
    text = f"""{X} {{
        e = DequantizeLinear<axis = 0>(W, t, v) c = DequantizeLinear<axis = 0>(b, t, o) y = Conv(x, e, c) }}"""
    weight = (DEAD * 9).astype(np.int8)
    grids = {"t": np.array([0.5, 0.25], np.float32), "v": np.zeros(2, np.int8), "o": np.zeros(2, np.int32)}

    assert known(text, W=weight, b=np.array([8, 8], np.int32), **grids) == [[unknown, 2]]
