from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes.simplify import Simplify
from tests.models import assert_same_outputs, graph_model, ops, random_inputs, random_weights


def simplify(proto: onnx.ModelProto) -> tuple[Model, Changes]:
    model = Model.load(proto)
    return model, Simplify().rewrite(model, Context())


NOOPS = {
    "Identity": "h = Identity(x)",
    "Dropout": "h = Dropout(x)",
    "Dropout, training off": "h = Dropout(x, ratio, off)",
    "Cast": "h = Cast<to = 1>(x)",
    "Reshape": "h = Reshape(x, same)",
    "Reshape, copied": "h = Reshape(x, copied)",
    "Transpose": "h = Transpose<perm = [0, 1]>(x)",
    "Flatten": "h = Flatten(x)",
    "Pad": "h = Pad(x, no_pads)",
    "Slice": "h = Slice(x, zeros, ends)",
    "Slice, known end": "h = Slice(x, zero1, six1, one1)",
    "Tile": "h = Tile(x, ones)",
    "Expand": "h = Expand(x, ones)",
    "Expand, known": "h = Expand(x, expanded)",
    "Concat": "h = Concat<axis = 1>(x)",
    "Sum": "h = Sum(x)",
    "Max": "h = Max(x)",
    "Add": "h = Add(x, zero)",
    "Add, other side": "h = Add(zero, x)",
    "Sub": "h = Sub(x, zero)",
    "Mul": "h = Mul(one, x)",
    "Div": "h = Div(x, one)",
    "Unsqueeze and Squeeze": "u = Unsqueeze(x, one1) h = Squeeze(u, one1)",
    "Unsqueeze and Squeeze, from the end": "u = Unsqueeze(x, one1) h = Squeeze(u, minus2)",
}
CONSTANTS = {
    "ratio": np.float32(0.5),
    "off": np.array(False),
    "same": np.array([-1, 6]),
    "copied": np.array([0, 0]),
    "no_pads": np.zeros(4, np.int64),
    "zeros": np.array([0, 0]),
    "ends": np.array([2**63 - 1, 6]),
    "zero1": np.array([0]),
    "six1": np.array([6]),
    "one1": np.array([1]),
    "minus2": np.array([-2]),
    "ones": np.array([1, 1]),
    "expanded": np.array([1, 6]),
    "zero": np.float32(0),
    "one": np.ones(1, np.float32),
}


@pytest.mark.parametrize("case", NOOPS)
def test_removes(case):
    text = f"g (float[N, 6] x) => (float[N, 6] y) {{ {NOOPS[case]} y = Relu(h) }}"
    proto = graph_model(text, CONSTANTS)

    model, _ = simplify(proto)

    assert ops(model) == ["Relu"]
    assert not model.to_proto().graph.initializer
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


@pytest.mark.parametrize("case", NOOPS)
def test_removes_before_an_output(case):
    text = (
        f"g (float[N, 6] x) => (float[N, 6] y) {{ r = Relu(x) {NOOPS[case].replace('(x', '(r').replace(', x', ', r')} "
    )
    text = text.replace("h = ", "y = ") + "}"
    proto = graph_model(text, CONSTANTS)

    model, _ = simplify(proto)

    assert ops(model) == ["Relu"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


KEPT = {
    "an Identity between input and output": "y = Identity(x)",
    "a Dropout whose mask is used": "y, mask = Dropout(x) m = Cast<to = 1>(mask) z = Neg(m)",
    "a Dropout that trains": "y, mask = Dropout(x, ratio, on)",
    "a Cast to another type": "d = Cast<to = 11>(x) y = Cast<to = 1>(d)",
    "a Reshape that may change the shape": "y = Reshape(x, other)",
    "a Transpose": "t = Transpose(x) u = Reshape(t, copied) y = Relu(u)",
    "a Pad with something": "y = Pad(x, pads)",
    "a Slice of a part": "y = Slice(x, zeros, ends)",
    "a Slice that runs backwards": "y = Slice(x, minus1, lowest, axis, minus1)",
    "a Slice up to a length that may be shorter": "y = Slice(x, zero1, big, zero1)",
    "an Expand of an unknown dimension": "y = Expand(x, expanded)",
    "an Add that broadcasts": "y = Add(x, wide)",
    "a Mul by something else": "y = Mul(x, two)",
    "a 1 divided by something": "y = Div(one, x)",
    "a 0 minus something": "y = Sub(zero, x)",
    "an Unsqueeze and a Squeeze of other axes": "u = Unsqueeze(x, zero1) y = Squeeze(u, axis2)",
}
KEPT_CONSTANTS = {
    **CONSTANTS,
    "on": np.array(True),
    "other": np.array([6, -1]),
    "copied": np.array([6, 1]),
    "pads": np.array([0, 1, 0, 0]),
    "ends": np.array([2**63 - 1, 5]),
    "minus1": np.array([-1]),
    "lowest": np.array([-(2**62)]),
    "axis": np.array([1]),
    "axis2": np.array([1]),
    "big": np.array([100]),
    "expanded": np.array([5, 6]),
    "wide": np.zeros((1, 1, 1), np.float32),
    "two": np.float32(2),
}


@pytest.mark.parametrize("case", KEPT)
def test_keeps(case):
    proto = graph_model(f"g (float[N, 6] x) => (float[A, B] y) {{ {KEPT[case]} }}", KEPT_CONSTANTS)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    if "mask is used" in case:
        proto.graph.output.add().name = "z"
        proto.graph.output[1].type.tensor_type.elem_type = 1

    model, _ = simplify(proto)

    assert ops(model) == ops(proto)
    if "trains" not in case:
        feeds = random_inputs(proto, batch=1)
        assert_same_outputs(proto, model, feeds, exact=True)


def test_merges_transposes_that_do_not_cancel():
    text = """g (float[2, 3, 4] x) => (float[A, B, C] y) {
        t = Transpose<perm = [1, 2, 0]>(x)
        y = Transpose<perm = [0, 2, 1]>(t)
    }"""
    proto = graph_model(text)

    model, _ = simplify(proto)

    assert ops(model) == ["Transpose"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_removes_transposes_that_cancel_also_where_the_first_is_used_elsewhere():
    text = """g (float[2, 3] x) => (float[2, 3] y, float[3, 2] z) {
        t = Transpose<perm = [1, 0]>(x)
        u = Transpose<perm = [1, 0]>(t)
        y = Relu(u)
        z = Neg(t)
    }"""
    proto = graph_model(text)

    model, _ = simplify(proto)

    assert sorted(ops(model)) == ["Neg", "Relu", "Transpose"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_removes_a_reshape_before_a_reshape():
    text = """g (float[N, 6] x) => (float[M, 2] y) {
        a = Reshape(x, s3)
        b = Flatten(a)
        c = Unsqueeze(b, axis)
        y = Reshape(c, s2)
    }"""
    proto = graph_model(text, s3=np.array([-1, 3]), s2=np.array([-1, 2]), axis=np.array([0]))

    model, _ = simplify(proto)

    assert ops(model) == ["Reshape"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_keeps_a_reshape_before_a_reshape_that_copies_from_it():
    text = "g (float[N, 6] x) => (float[M, 3] y) { a = Reshape(x, s3) r = Reshape(a, s2) y = Relu(r) }"
    proto = graph_model(text, s3=np.array([-1, 3, 1]), s2=np.array([0, -1]))

    model, _ = simplify(proto)

    assert ops(model) == ["Reshape", "Reshape", "Relu"]


def test_removes_nodes_that_nothing_reads():
    text = """g (float[N] x) => (float[N] y) {
        a = Neg(x)
        b, c = Split(a)
        d = Add(b, W)
        y = Relu(x)
    }"""

    model, changes = simplify(graph_model(text, W=random_weights(1)))

    assert ops(model) == ["Relu"]
    assert [change.what for change in changes.changed] == ["nodes that nothing reads removed: 3"]


def test_removes_initializers_that_nothing_reads():
    model, changes = simplify(graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }", W=random_weights(100)))

    assert not model.to_proto().graph.initializer
    assert [change.what for change in changes.changed] == ["initializers that nothing reads removed: 1"]


def test_keeps_an_unused_input():
    proto = graph_model("g (float[N] x, float[N] unused) => (float[N] y) { y = Relu(x) }")

    model, changes = simplify(proto)

    assert (model.to_proto(), changes.count) == (proto, 0)


def test_keeps_what_a_quantization_annotation_names():
    proto = graph_model(
        "g (float[N] x) => (float[N] y) { i = Neg(x) n = Identity(i) y = Relu(n) }", s=np.ones(1, np.float32)
    )
    annotation = proto.graph.quantization_annotation.add(tensor_name="n")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")

    model, _ = simplify(proto)

    result = model.to_proto()
    assert result.graph.quantization_annotation == proto.graph.quantization_annotation
    assert [tensor.name for tensor in result.graph.initializer] == ["s"]
    assert "n" in {name for node in result.graph.node for name in node.output}


# --- equal nodes and initializers -------------------------------------------------------------------------------------


def test_computes_equal_nodes_once():
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        a = LeakyRelu<alpha = 0.5>(x)
        b = LeakyRelu<alpha = 0.5>(x)
        c = Exp(a)
        d = Exp(b)
        y = Add(c, d)
    }"""
    proto = graph_model(text)

    model, changes = simplify(proto)

    assert ops(model) == ["LeakyRelu", "Exp", "Add"]
    assert [change.what for change in changes.changed] == [
        "equal LeakyRelu computed once, by a",
        "equal Exp computed once, by c",
    ]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_an_output_stays_when_its_node_equals_another():
    text = "g (float[N] x) => (float[N] y, float[N] z) { a = Exp(x) z = Neg(a) y = Exp(x) }"
    proto = graph_model(text)

    model, _ = simplify(proto)

    assert ops(model) == ["Exp", "Neg"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


@pytest.mark.parametrize(
    "body",
    [
        "y = Exp(x) z = Exp(x)",  # both are outputs
        "y = LeakyRelu<alpha = 0.5>(x) b = LeakyRelu<alpha = 0.25>(x) z = Neg(b)",
        "y = RandomNormalLike(x) b = RandomNormalLike(x) z = Neg(b)",
        "a = Sub(x, w) y = Neg(a) b = Sub(w, x) z = Neg(b)",
    ],
)
def test_keeps_nodes_that_only_look_equal(body):
    proto = graph_model(f"g (float[N] x, float[N] w) => (float[N] y, float[N] z) {{ {body} }}")

    model, changes = simplify(proto)

    assert (ops(model), changes.count) == (ops(proto), 0)


def test_keeps_equal_initializers_once():
    text = """g (float[N, 64] x) => (float[N, 64] y) {
        a = Add(x, one)
        b = Exp(a)
        c = Add(b, two)
        d = Exp(c)
        y = Add(d, other)
    }"""
    same = random_weights(64)
    proto = graph_model(text, one=same, two=same.copy(), other=same + 1)

    model, changes = simplify(proto)

    assert [tensor.name for tensor in model.to_proto().graph.initializer] == ["one", "other"]
    assert [change.what for change in changes.changed] == ["initializers that equal another one removed: 1"]
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_initializers_of_other_shape_or_type_are_not_equal():
    text = """g (float[4] x, int32[4] i) => (float[4] y, int32[4] j, float[2, 2] z) {
        y = Add(x, a)
        j = Add(i, b)
        c2 = Exp(c)
        r = Reshape(x, s)
        z = Add(r, c)
    }"""
    zeros = np.zeros(4, np.float32)
    weights = {"a": zeros, "b": np.zeros(4, np.int32), "c": zeros.reshape(2, 2), "s": np.array([2, 2])}

    model, _ = simplify(graph_model(text, weights))

    names = {tensor.name for tensor in model.to_proto().graph.initializer}
    assert {"b", "c", "s"} <= names


def test_nodes_that_read_equal_initializers_become_one():
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, V) b = MatMul(x, W) y = Sub(a, b) }"
    proto = graph_model(text, V=random_weights(4, 4), W=random_weights(4, 4))

    model, _ = simplify(proto)

    assert ops(model) == ["MatMul", "Sub"]
    assert_same_outputs(proto, model, random_inputs(proto))
