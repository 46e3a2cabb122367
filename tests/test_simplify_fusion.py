from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes.simplify import Simplify
from tests.models import (
    assert_same_outputs,
    batch_norm_weights,
    conv_bn_model,
    graph_model,
    ops,
    random_inputs,
    random_weights,
)


def simplify(proto: onnx.ModelProto, **context: Any) -> tuple[Model, Changes]:
    model = Model.load(proto)
    return model, Simplify().rewrite(model, Context(**context))


BATCH_NORM = "n = BatchNormalization(c, scale, bias, mean, variance)"


# --- BatchNormalization -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_folds_batch_normalization_into_a_conv(bias, group):
    proto = conv_bn_model(bias=bias, group=group)

    model, changes = simplify(proto)

    assert ops(model) == ["Conv", "Relu"]
    assert len(model.to_proto().graph.initializer) == 2
    assert [(change.where, change.what) for change in changes.changed] == [
        ("n", "BatchNormalization folded into Conv c")
    ]
    assert_same_outputs(proto, model, random_inputs(proto))


@pytest.mark.parametrize("bias", ["", ", b"])
@pytest.mark.parametrize("group", [1, 2])
def test_folds_batch_normalization_into_a_conv_transpose(bias, group):
    text = f"""g (float[N, 4, 5, 5] x) => (float[N, C, H, V] y) {{
        c = ConvTranspose<group = {group}, strides = [2, 2]>(x, W{bias})
        {BATCH_NORM}
        y = Relu(n)
    }}"""
    weights = {"W": random_weights(4, 3, 3, 3), **batch_norm_weights(3 * group), "b": random_weights(3 * group)}
    proto = graph_model(text, weights)

    model, _ = simplify(proto)

    assert ops(model) == ["ConvTranspose", "Relu"]
    assert_same_outputs(proto, model, random_inputs(proto))


@pytest.mark.parametrize("shape", [None, (), (1,), (6,), (1, 6)])
@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0, transB = 1>", "<transA = 1>"])
def test_folds_batch_normalization_into_a_gemm(shape, attributes):
    text = f"""g (float[4, 4] x) => (float[4, 6] y) {{
        c = Gemm{attributes}(x, W{"" if shape is None else ", b"})
        {BATCH_NORM}
        y = Relu(n)
    }}"""
    weights = {"W": random_weights(*((6, 4) if "transB" in attributes else (4, 6))), **batch_norm_weights(6)}
    if shape is not None:
        weights["b"] = np.asarray(random_weights(*shape), np.float32)
    proto = graph_model(text, weights)

    model, _ = simplify(proto)

    assert ops(model) == ["Gemm", "Relu"]
    assert_same_outputs(proto, model, random_inputs(proto))


def test_does_not_fold_into_a_gemm_whose_bias_differs_from_row_to_row():
    text = f"g (float[4, 4] x) => (float[4, 6] y) {{ c = Gemm(x, W, b) {BATCH_NORM} y = Relu(n) }}"
    proto = graph_model(text, {"W": random_weights(4, 6), "b": random_weights(4, 1), **batch_norm_weights(6)})

    model, changes = simplify(proto)

    assert ops(model) == ops(proto)
    assert changes.left[0].why == "not folded into c: its bias is not one number a channel"


def test_keeps_the_name_of_an_output_that_a_fusion_takes_over():
    proto = conv_bn_model(tail="y = Identity(n)")

    model, _ = simplify(proto)

    assert [(node.op, node.outputs[0].name) for node in model.graph.nodes] == [("Conv", "y")]
    assert_same_outputs(proto, model, random_inputs(proto))


def with_weights(**changed: Any) -> onnx.ModelProto:
    proto = conv_bn_model()
    for tensor in proto.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed[tensor.name], tensor.name))
    return proto


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (conv_bn_model(tail="r = Relu(n) s = Relu(c) y = Add(r, s)"), "its output is used elsewhere"),
        (with_weights(W=random_weights(8, 4, 3, 3) * np.float32(1e38)), "the folded weights would overflow"),
    ],
)
def test_says_why_it_does_not_fold(proto, reason):
    model, changes = simplify(proto)

    assert ops(model) == ops(proto)
    assert [(left.where, left.why) for left in changes.left] == [("n", f"not folded into c: {reason}")]


def test_does_not_fold_where_the_variance_has_no_square_root():
    proto = with_weights(variance=-np.ones(8, np.float32))

    model, _ = simplify(proto)

    assert ops(model) == ops(proto)


def test_does_not_fold_into_a_shared_weight():
    text = f"""g (float[N, 4, 8, 8] x) => (float[N, 32, 6, 6] y) {{
        c = Conv(x, W)
        {BATCH_NORM}
        d = Conv(x, W)
        e = Neg(d)
        y = Add(n, e)
    }}"""
    # The second Conv would become the first: another input keeps them apart.
    text = text.replace("d = Conv(x, W)", "a = Neg(x) d = Conv(a, W)")
    proto = graph_model(text, {"W": random_weights(32, 4, 3, 3), **batch_norm_weights(32)})

    model, changes = simplify(proto)

    assert ops(model) == ops(proto)
    assert changes.left[0].why == "not folded into c: its weight is shared, and a second one would cost more"


def test_does_not_fold_into_a_weight_that_is_a_graph_input():
    text = f"""g (float[N, 4, 8, 8] x, float[8, 4, 3, 3] W) => (float[N, 8, 6, 6] y) {{
        c = Conv(x, W)
        {BATCH_NORM}
        y = Relu(n)
    }}"""
    proto = graph_model(text, batch_norm_weights(8))

    model, changes = simplify(proto)

    assert ops(model) == ops(proto)
    assert changes.left[0].why == "not folded into c: its weights are not constant"


def test_does_not_round_16_bit_weights_again():
    text = f"g (float16[N, 4, 8, 8] x) => (float16[N, 8, 6, 6] y) {{ c = Conv(x, W) {BATCH_NORM} y = Relu(n) }}"
    weights = {"W": random_weights(8, 4, 3, 3).astype(np.float16), **batch_norm_weights(8, dtype="float16")}

    model, changes = simplify(graph_model(text, weights))

    assert ops(model) == ["Conv", "BatchNormalization", "Relu"]
    assert changes.left[0].why == "not folded into c: its weights are not 32- or 64-bit floats"


def test_does_not_fold_a_batch_normalization_that_trains():
    proto = conv_bn_model()
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    proto.graph.node[1].output.extend(["new_mean", "new_variance"])

    model, _ = simplify(proto)

    assert ops(model) == ops(proto)


def test_does_not_fold_excluded_nodes():
    proto = conv_bn_model()
    proto.graph.node[0].name = "first"

    model, _ = simplify(proto, exclude=("first",))

    assert ops(model) == ops(proto)


def test_keeps_a_batch_normalization_that_stands_alone():
    text = "g (float[N, 8, 6] c) => (float[N, 8, 6] y) { " + BATCH_NORM + " y = Relu(n) }"

    model, changes = simplify(graph_model(text, batch_norm_weights(8)))

    assert (ops(model), changes.count) == (["BatchNormalization", "Relu"], 0)


# --- arithmetic -------------------------------------------------------------------------------------------------------

ARITHMETIC = ["Add(c, k)", "Add(k, c)", "Mul(c, k)", "Mul(k, c)", "Sub(c, k)", "Sub(k, c)", "Div(c, k)"]


@pytest.mark.parametrize("expression", ARITHMETIC)
@pytest.mark.parametrize("shape", [(), (1,), (8, 1, 1), (1, 8, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_folds_arithmetic_into_a_conv(expression, shape, bias):
    text = f"g (float[N, 4, 8, 8] x) => (float[N, 8, 6, 6] y) {{ c = Conv(x, W{bias}) n = {expression} y = Relu(n) }}"
    weights = {"W": random_weights(8, 4, 3, 3), "b": random_weights(8), "k": np.asarray(random_weights(*shape, seed=5))}
    proto = graph_model(text, {name: np.asarray(value, np.float32) for name, value in weights.items()})

    model, _ = simplify(proto)

    assert ops(model) == ["Conv", "Relu"]
    assert_same_outputs(proto, model, random_inputs(proto))


def test_a_weight_that_a_fusion_does_not_scale_keeps_every_bit():
    text = "g (float[N, 4, 8, 8] x) => (float[N, 8, 6, 6] y) { c = Conv(x, W) n = Add(c, k) y = Relu(n) }"
    weights = {"W": random_weights(8, 4, 3, 3), "k": random_weights(8, 1, 1)}

    model, _ = simplify(graph_model(text, weights))

    np.testing.assert_array_equal(model.weight("W"), weights["W"])


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        ("Div(k, c)", (8, 1, 1)),
        ("Mul(c, k)", (6,)),  # the last axis is not the channels
        ("Mul(c, k)", (8, 6, 6)),
        ("Mul(c, k)", (2, 8, 1, 1)),
        ("Mul(c, k)", (1, 1, 8, 1, 1)),
        ("Add(c, x2)", ()),
    ],
)
def test_keeps_arithmetic_that_is_not_one_number_a_channel(expression, shape):
    text = f"""g (float[2, 4, 8, 8] x, float[2, 8, 6, 6] x2) => (float y) {{
        c = Conv(x, W)
        n = {expression}
        y = Relu(n)
    }}"""
    proto = graph_model(text, W=random_weights(8, 4, 3, 3), k=np.asarray(random_weights(*shape), np.float32))
    proto.graph.output[0].type.tensor_type.ClearField("shape")

    model, _ = simplify(proto)

    assert ops(model) == ops(proto)


def test_keeps_a_bias_after_a_matmul():
    text = "g (float[N, 4] x) => (float[N, 8] y) { c = MatMul(x, W) n = Add(c, b) y = Relu(n) }"

    model, changes = simplify(graph_model(text, W=random_weights(4, 8), b=random_weights(8)))

    assert (ops(model), changes.count) == (["MatMul", "Add", "Relu"], 0)


@given(st.lists(st.sampled_from([*ARITHMETIC, "BatchNormalization"]), min_size=2, max_size=5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_folds_any_chain_into_one_conv(chain, seed):
    weights = {"W": random_weights(8, 4, 3, 3), "b": random_weights(8)}
    lines, source = ["h = Conv(x, W, b)"], "h"
    for number, step in enumerate(chain):
        rng = np.random.default_rng((seed, number))
        weights[f"k{number}"] = (rng.uniform(0.5, 2, (8, 1, 1)) * rng.choice([-1, 1], (8, 1, 1))).astype(np.float32)
        for name, value in batch_norm_weights(8, seed=seed + number).items():
            weights[f"{name}{number}"] = value
        parameters = ", ".join(f"{name}{number}" for name in ("scale", "bias", "mean", "variance"))
        expression = step.replace("(c, k)", f"({source}, k{number})").replace("(k, c)", f"(k{number}, {source})")
        if step == "BatchNormalization":
            expression = f"BatchNormalization({source}, {parameters})"
        source = f"h{number}"
        lines.append(f"{source} = {expression}")
    body = " ".join(lines)
    proto = graph_model(f"g (float[N, 4, 8, 8] x) => (float[N, 8, 6, 6] y) {{ {body} y = Relu({source}) }}", weights)

    model, _ = simplify(proto)

    assert ops(model) == ["Conv", "Relu"]
    assert_same_outputs(proto, model, random_inputs(proto))


# --- Pad --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes", ["", "<pads = [0, 1, 2, 0]>", '<auto_pad = "VALID">', "<strides = [2, 2]>"])
@pytest.mark.parametrize("value", ["", ", zero"])
def test_folds_zero_padding_into_a_conv(attributes, value):
    text = f"""g (float[N, 4, 8, 8] x) => (float[N, 8, H, V] y) {{
        p = Pad(x, pads{value})
        c = Conv{attributes}(p, W)
        y = Relu(c)
    }}"""
    pads = np.array([0, 0, 1, 2, 0, 0, 3, 0])
    proto = graph_model(text, W=random_weights(8, 4, 3, 3), pads=pads, zero=np.float32(0))

    model, changes = simplify(proto)

    assert ops(model) == ["Conv", "Relu"]
    assert ("p", "Pad folded into Conv c") in [(change.where, change.what) for change in changes.changed]
    assert_same_outputs(proto, model, random_inputs(proto))


def test_folds_padding_of_given_axes():
    text = "g (float[N, 4, 8, 8] x) => (float[N, 8, H, V] y) { p = Pad(x, pads, , axes) y = Conv(p, W) }"
    weights = {"W": random_weights(8, 4, 3, 3), "pads": np.array([1, 2, 3, 0]), "axes": np.array([-1, 2])}
    proto = graph_model(text, weights, opset=18)

    model, _ = simplify(proto)

    assert ops(model) == ["Conv"]
    assert_same_outputs(proto, model, random_inputs(proto))


@pytest.mark.parametrize(
    ("pad", "layer", "pads"),
    [
        ('Pad<mode = "reflect">(x, pads)', "Conv(p, W)", [0, 0, 1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads, one)", "Conv(p, W)", [0, 0, 1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads)", "Conv(p, W)", [0, 0, -1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads)", "Conv(p, W)", [1, 0, 1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads)", 'Conv<auto_pad = "SAME_UPPER">(p, W)', [0, 0, 1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads)", "MaxPool<kernel_shape = [3, 3]>(p)", [0, 0, 1, 1, 0, 0, 1, 1]),
        ("Pad(x, pads)", "AveragePool<kernel_shape = [3, 3]>(p)", [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_keeps_padding_that_a_layer_cannot_do(pad, layer, pads):
    proto = graph_model(
        f"g (float[N, 4, 8, 8] x) => (float[A, B, C, D] y) {{ p = {pad} c = {layer} y = Relu(c) }}",
        {"W": random_weights(8, 4, 3, 3), "pads": np.array(pads), "one": np.float32(1)},
    )

    model, _ = simplify(proto)

    assert ops(model) == ops(proto)
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)
