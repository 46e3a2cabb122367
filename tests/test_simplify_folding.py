from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes._folding import COMPUTING, MOVING
from onnxcomp_passes._noops import settled
from onnxcomp_passes.simplify import Simplify
from tests.models import assert_same_arrays, assert_same_outputs, graph_model, ops, random_inputs, random_weights, run


def simplify(proto: onnx.ModelProto) -> tuple[Model, Changes]:
    model = Model.load(proto)
    return model, Simplify().rewrite(model, Context())


# --- Constant nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = float[2] {1.5, 2.5}", np.array([1.5, 2.5], np.float32)),
        ("value_float = 1.5", np.array(1.5, np.float32)),
        ("value_floats = [1.5, 2.5]", np.array([1.5, 2.5], np.float32)),
        ("value_int = 3", np.array(3)),
        ("value_ints = [3, 4]", np.array([3, 4])),
        ('value_string = "a"', np.array("a", object)),
        ('value_strings = ["a", "b"]', np.array(["a", "b"], object)),
    ],
)
def test_turns_each_form_of_constant_into_an_initializer(attribute, expected):
    kind = {"f": "float", "i": "int64", "O": "string"}[expected.dtype.kind]
    text = f"g ({kind}[2] x) => (bool[2] y) {{ c = Constant<{attribute}>() y = Equal(x, c) }}"

    model, changes = simplify(graph_model(text, opset=19, ir_version=9))

    assert ops(model) == ["Equal"]
    assert_same_arrays(model.weight("c"), expected)
    assert changes.changed[0].what == "Constant nodes turned into initializers: 1"


@pytest.mark.parametrize("name", ["value_ints", "value_floats"])
def test_turns_an_empty_constant_into_an_initializer(name):
    proto = graph_model(
        "g (float[N, 2] x) => (float[N, 2] y) { c = Constant<value_int = 0>() y = Sum(x, z) z = Cast<to = 1>(c) }"
    )
    proto.graph.node[0].attribute[0].CopyFrom(
        helper.make_attribute(
            name, [], attr_type=onnx.AttributeProto.INTS if name == "value_ints" else onnx.AttributeProto.FLOATS
        )
    )
    proto.graph.node.insert(1, proto.graph.node.pop())

    model, _ = simplify(proto)

    assert "Constant" not in ops(model)


def test_keeps_a_constant_that_is_an_output():
    text = "g (float[2] x) => (float[2] y, float z) { z = Constant<value_float = 2.0>() y = Mul(x, z) }"

    model, changes = simplify(graph_model(text))

    assert ops(model) == ["Constant", "Mul"]
    assert changes.count == 0


def test_keeps_a_sparse_constant():
    values = numpy_helper.from_array(np.ones(1, np.float32), "c")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1]), "at"), [3])
    proto = graph_model("g (float[3] x) => (float[3] y) { y = Add(x, c) }")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))

    model, changes = simplify(proto)

    assert ops(model) == ["Constant", "Add"]
    assert changes.count == 0


# --- folding ----------------------------------------------------------------------------------------------------------


def test_folds_a_chain_of_constants_into_one():
    text = """g (float[N, 6] x) => (float[M, 3] y) {
        a = Constant<value_ints = [-1]>()
        b = Constant<value_ints = [1, 2]>()
        c = Add(b, b)
        d = Gather(c, e)
        e = Constant<value_int = 0>()
        f = Unsqueeze(d, g)
        g = Constant<value_ints = [0]>()
        h = Sub(f, a)
        s = Concat<axis = 0>(a, h)
        y = Reshape(x, s)
    }"""
    proto = graph_model(text)
    nodes = sorted(proto.graph.node, key=lambda node: node.op_type != "Constant")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)

    model, _ = simplify(proto)

    assert ops(model) == ["Reshape"]
    np.testing.assert_array_equal(model.weight("s"), [-1, 3])


def test_folds_the_transpose_of_a_weight():
    proto = graph_model(
        "g (float[N, 8] x) => (float[N, 4] y) { T = Transpose(W) y = MatMul(x, T) }", W=random_weights(4, 8)
    )

    model, _ = simplify(proto)

    assert ops(model) == ["MatMul"]
    assert_same_arrays(model.weight("T"), random_weights(4, 8).T, exact=True)
    assert_same_outputs(proto, model, random_inputs(proto), exact=True)


def test_does_not_fold_the_transpose_of_a_large_weight_that_is_also_used_as_it_is():
    text = """g (float[N, 32] x) => (float[N, 32] y) { T = Transpose(W) h = MatMul(x, T) y = MatMul(h, W) }"""

    model, changes = simplify(graph_model(text, W=random_weights(32, 32)))

    assert ops(model) == ["Transpose", "MatMul", "MatMul"]
    assert changes.count == 0


def test_does_not_write_out_a_large_tensor_that_few_numbers_describe():
    text = """g (float[N, 4096] x) => (float[N, 4096] y) {
        n = Constant<value_ints = [4096]>()
        c = ConstantOfShape<value = float[1] {2.0}>(n)
        y = Mul(x, c)
    }"""

    model, _ = simplify(graph_model(text))

    assert ops(model) == ["ConstantOfShape", "Mul"]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_leaves_packed_weights_packed(dtype):
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        f = Cast<to = 1>(W)
        m = Mul(f, s)
        W2 = Reshape(m, shape)
        y = MatMul(x, W2)
    }"""
    weights = {"W": np.arange(256).astype(dtype), "s": np.float32(0.5), "shape": np.array([16, 16])}

    model, changes = simplify(graph_model(text, weights))

    assert ops(model) == ["Cast", "Mul", "Reshape", "MatMul"]
    assert changes.count == 0
    assert [(left.where, left.why) for left in changes.left] == [("f", "it decodes a packed weight")]


def test_leaves_a_4_bit_codebook_packed():
    text = """g (float[N, 16] x) => (float[N, 16] y) {
        i = Cast<to = 6>(codes)
        W = Gather(book, i)
        y = MatMul(x, W)
    }"""
    proto = graph_model(text, book=random_weights(16), opset=21, ir_version=10)
    codes = helper.make_tensor("codes", TensorProto.UINT4, [16, 16], np.arange(256) % 16)
    proto.graph.initializer.append(codes)

    model, changes = simplify(proto)

    assert ops(model) == ["Cast", "Gather", "MatMul"]
    assert changes.count == 0


def test_leaves_quantized_weights_quantized():
    text = "g (float[N, 4] x) => (float[N, 4] y) { W = DequantizeLinear(q, s) y = MatMul(x, W) }"
    weights = {"q": np.arange(16, dtype=np.int8).reshape(4, 4), "s": np.float32(0.1)}

    model, changes = simplify(graph_model(text, weights))

    assert ops(model) == ["DequantizeLinear", "MatMul"]
    assert changes.count == 0


def test_leaves_random_operators_alone():
    text = """g (float[2] x) => (float[2] y) {
        a = RandomNormal<shape = [2]>()
        b = RandomNormal<shape = [2]>()
        c = Add(a, b)
        y = Add(x, c)
    }"""

    model, changes = simplify(graph_model(text))

    assert ops(model) == ["RandomNormal", "RandomNormal", "Add", "Add"]
    assert changes.count == 0


def test_does_not_fold_an_initializer_that_the_caller_may_override():

    proto = graph_model(
        "g (float[2] x, float[2] c) => (float[2] y) { d = Neg(c) y = Add(x, d) }", c=np.ones(2, np.float32)
    )

    model, changes = simplify(proto)

    assert (ops(model), changes.count) == (["Neg", "Add"], 0)


def test_does_not_believe_the_default_of_a_shape_that_the_caller_may_override():
    text = """g (float[2, 3] x, int64[2] s) => (int64[K] y) { r = Reshape(x, s) y = Shape(r) }"""
    proto = graph_model(text, s=np.array([3, 2]))

    model, _ = simplify(proto)

    feeds = {**random_inputs(proto), "s": np.array([6, 1])}
    assert_same_outputs(proto, model, feeds, exact=True)


@pytest.mark.parametrize("value", [np.nan, 3e9, -3e9])
def test_does_not_fold_a_cast_without_a_defined_result(value):
    text = "g (int32[2] x) => (int32[2] y) { i = Cast<to = 6>(f) y = Add(x, i) }"

    model, _ = simplify(graph_model(text, f=np.float32(value)))

    assert ops(model) == ["Cast", "Add"]


ELEMENTWISE = {
    "float32": ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"],
    "int64": ["Add", "Sub", "Mul", "Div", "Max", "Min"],
    "int32": ["Add", "Sub", "Mul", "Div", "Max", "Min"],
}
UNARY = {"float32": ["Abs", "Ceil", "Cos", "Exp", "Floor", "Neg", "Reciprocal", "Sin", "Tanh"], "int64": ["Abs", "Neg"]}
ANY_SHAPE = hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)


@st.composite
def constant_nodes(draw):
    """One node of constants, and its inputs."""
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(sorted(ELEMENTWISE)))
        op = draw(st.sampled_from(ELEMENTWISE[dtype]))
        shapes = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3)).input_shapes
    else:
        dtype = draw(st.sampled_from(sorted(UNARY)))
        op = draw(st.sampled_from(UNARY[dtype]))
        shapes = (draw(ANY_SHAPE),)
    elements = st.floats(-20, 20, width=32) if dtype == "float32" else st.integers(-20, 20)
    values = [draw(hnp.arrays(dtype, shape, elements=elements)) for shape in shapes]
    if op == "Div" and dtype != "float32":
        values[1] = np.where(values[1] == 0, 3, values[1]).astype(dtype)
    return op, values


@given(constant_nodes())
@settings(max_examples=60, deadline=None)
def test_folds_to_what_onnx_runtime_computes(case):
    op, values = case
    names = [f"c{number}" for number in range(len(values))]
    dtype = "float" if values[0].dtype == np.float32 else str(values[0].dtype)
    text = f"g ({dtype} x) => ({dtype}[?] y) {{ f = {op}({', '.join(names)}) y = Max(x, f) }}"
    proto = graph_model(text.replace("[?]", ""), dict(zip(names, values, strict=True)))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    lowest = np.array(-np.inf if dtype == "float" else -(10**6), values[0].dtype)

    model, _ = simplify(proto)

    wanted, got = (run(each, {"x": lowest})[0] for each in (proto, model))
    with np.errstate(all="ignore"):
        assert_same_arrays(np.nan_to_num(wanted), np.nan_to_num(got))


def test_knows_only_operators_that_exist():
    assert all(onnx.defs.has(op) for op in COMPUTING | MOVING)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_replaces_the_shape_of_a_tensor_of_known_shape():
    text = "g (float[2, 3] x) => (int64[2] y) { r = Relu(x) s = Shape(r) y = Add(s, s) }"

    model, _ = simplify(graph_model(text))

    assert "Shape" not in ops(model)


def test_replaces_one_static_dimension_among_dynamic_ones():
    text = """g (float[N, 3] x, int64 k) => (int64 y) {
        s = Shape(x)
        one = Constant<value_int = 1>()
        d = Gather(s, one)
        y = Mul(d, k)
    }"""

    model, _ = simplify(graph_model(text))

    assert ops(model) == ["Mul"]
    assert model.weight("d") == 3


def test_a_computed_shape_with_one_unknown_becomes_constant():
    text = """g (float[N, 3, 4] x) => (float[A, B] y) {
        s = Shape(x)
        zero = Constant<value_int = 0>()
        n = Gather(s, zero)
        axes = Constant<value_ints = [0]>()
        n1 = Unsqueeze(n, axes)
        three = Constant<value_ints = [3]>()
        n3 = Mul(n1, three)
        four = Constant<value_ints = [4]>()
        target = Concat<axis = 0>(n3, four)
        y = Reshape(x, target)
    }"""
    proto = graph_model(text)

    model, _ = simplify(proto)

    assert ops(model) == ["Reshape"]
    np.testing.assert_array_equal(model.weight("y.shape"), [-1, 4])
    for batch in (0, 1, 5):
        assert_same_outputs(proto, model, random_inputs(proto, batch=batch), exact=True)


def test_dimensions_that_provably_stay_are_copied():
    text = """g (float[N, S, 12] x) => (float[A, B, 3, 4] y) {
        r = Relu(x)
        s = Shape(r)
        tail = Constant<value_ints = [3, 4]>()
        first = Constant<value_ints = [0]>()
        two = Constant<value_ints = [2]>()
        head = Slice(s, first, two)
        target = Concat<axis = 0>(head, tail)
        y = Reshape(x, target)
    }"""
    proto = graph_model(text)

    model, _ = simplify(proto)

    assert ops(model) == ["Reshape"]
    np.testing.assert_array_equal(model.weight("y.shape"), [0, 0, 3, 4])
    for batch in (0, 3):
        assert_same_outputs(proto, model, random_inputs(proto, batch=batch), exact=True)


def test_does_not_take_two_inputs_to_be_equal_because_they_declare_the_same_name():
    # Both say N, and runtimes do not check that.
    text = """g (float[N, 4] x, float[N, 4] other) => (float[A, B] y) {
        the_shape_of_the_other_input = Shape(other)
        y = Reshape(x, the_shape_of_the_other_input)
    }"""
    proto = graph_model(text)

    model, _ = simplify(proto)

    np.testing.assert_array_equal(model.weight("y.shape"), [-1, 4])
    assert ops(model) == ["Reshape"]


def test_does_not_believe_declared_inner_shapes():
    proto = graph_model("g (float[N, 4] x) => (int64[2] y) { r = Relu(x) y0 = Shape(r) y = Add(y0, y0) }")
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [7, 4]))

    model, _ = simplify(proto)

    assert_same_outputs(proto, model, random_inputs(proto, batch=3), exact=True)


@pytest.mark.parametrize(
    ("target", "dims", "expected"),
    [
        (["N", 4], ("N", 4), [0, 4]),
        (["N", 4], ("M", 4), [-1, 4]),
        ([None, 4], None, [-1, 4]),
        (["N", -1], ("N", "M"), [0, -1]),
        ([None, None], ("N", "M"), None),
        (["N", None], ("N", "M"), None),  # an empty N would leave the other one unknown
        ([None, 0], ("N", 0), None),
        ([None, -1], ("N", 4), None),
        ([2, 3], ("N",), [2, 3]),
    ],
)
def test_settles_a_shape_only_where_it_means_the_same(target, dims, expected):
    assert settled(target, dims) == expected
