from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnxcomp.analysis import count_parameters, deflated_bytes, is_quantized, mac_counts, weight_table
from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from onnxcomp.structure import model_files
from onnxcomp.weights import LazyWeight

RNG = np.random.default_rng(0)


def parsed(body: str, opset: int = 17, ir_version: int = 8, functions: str = "") -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}, "local": 1]> {body} {functions}')


def with_weights(body: str, **weights: np.ndarray[Any, Any]) -> Model:
    """A model from text, with initializers of the given values."""
    proto = parsed(body)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return Model.load(proto)


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


# --- multiply-accumulates ---------------------------------------------------------------------------------------------


@given(
    groups=st.integers(1, 3),
    channels=st.integers(1, 3),
    filters=st.integers(1, 3),
    kernel=st.integers(1, 3),
    size=st.integers(3, 7),
    stride=st.integers(1, 2),
)
def test_counts_each_product_of_a_convolution(groups, channels, filters, kernel, size, stride):
    model = with_weights(
        f"g (float[1,{groups * channels},{size},{size}] x) => (float[n,c,h,w] y) "
        f"{{ [conv] y = Conv<group={groups}, strides=[{stride},{stride}]>(x, w) }}",
        w=zeros(groups * filters, channels, kernel, kernel),
    )
    positions = sum(1 for start in range(0, size - kernel + 1, stride)) ** 2
    assert mac_counts(model) == {"conv": positions * groups * filters * channels * kernel**2}


def test_counts_transposed_convolutions_by_their_input():
    model = with_weights(
        "g (float[1,2,5,5] x) => (float[1,3,11,11] y) { [up] y = ConvTranspose<strides=[2,2]>(x, w) }",
        w=zeros(2, 3, 3, 3),
    )
    assert mac_counts(model) == {"up": 5 * 5 * 2 * 3 * 9}


def test_counts_a_gemm_whichever_way_its_weight_lies():
    straight = with_weights("g (float[7,4] x) => (float[7,5] y) { [fc] y = Gemm(x, w) }", w=zeros(4, 5))
    turned = with_weights("g (float[7,4] x) => (float[7,5] y) { [fc] y = Gemm<transB=1>(x, w) }", w=zeros(5, 4))
    assert mac_counts(straight) == mac_counts(turned) == {"fc": 7 * 4 * 5}


def test_counts_a_batched_product_with_broadcasting():
    model = Model.load(parsed("g (float[2,1,3,4] a, float[5,4,6] b) => (float[2,5,3,6] y) { [mm] y = MatMul(a, b) }"))
    assert mac_counts(model) == {"mm": 2 * 5 * 3 * 4 * 6}


def test_counts_products_with_vectors():
    model = Model.load(parsed("g (float[4] a, float[4] b) => (float y) { [mm] y = MatMul(a, b) }"))
    assert mac_counts(model) == {"mm": 4}


def test_counts_recurrent_layers_at_every_step():
    model = with_weights(
        "g (float[7,2,3] x) => (float[7,1,2,4] y) { [lstm] y = LSTM<hidden_size=4>(x, w, r) }",
        w=zeros(1, 16, 3),
        r=zeros(1, 16, 4),
    )
    assert mac_counts(model) == {"lstm": 7 * 2 * 16 * (3 + 4)}


def test_counts_einsum_by_all_its_letters():
    model = Model.load(
        parsed('g (float[2,3] a, float[3,5] b) => (float[2,5] y) { [e] y = Einsum<equation="ij,jk->ik">(a, b) }')
    )
    assert mac_counts(model) == {"e": 2 * 3 * 5}


def test_counts_integer_and_quantized_convolutions_as_float_ones():
    scale, zero = np.float32(0.1), np.uint8(0)
    model = with_weights(
        "g (uint8[1,2,4,4] x) => (uint8[1,3,2,2] y) { [q] y = QLinearConv(x, s, z, w, s, z, s, z) }",
        w=zeros(3, 2, 3, 3, dtype=np.uint8),
        s=np.array(scale),
        z=np.array(zero),
    )
    assert mac_counts(model) == {"q": 4 * 3 * 2 * 9}


def test_counts_a_convolution_behind_dequantize_linear():
    model = with_weights(
        "g (float[1,2,4,4] x) => (float[1,3,2,2] y) { d = DequantizeLinear(w, s) [c] y = Conv(x, d) }",
        w=zeros(3, 2, 3, 3, dtype=np.int8),
        s=np.array(np.float32(0.1)),
    )
    assert mac_counts(model) == {"c": 4 * 3 * 2 * 9}


def test_takes_a_dynamic_batch_as_one_unless_told_otherwise():
    model = with_weights("g (float[n,4] x) => (float[n,5] y) { [fc] y = MatMul(x, w) }", w=zeros(4, 5))
    assert mac_counts(model) == {"fc": 20}
    assert mac_counts(model, {"x": [8, 4]}) == {"fc": 160}


def test_counts_zero_and_says_so_where_a_shape_is_unknown():
    model = with_weights("g (float[n,t,4] x) => (float[n,t,5] y) { [fc] y = MatMul(x, w) }", w=zeros(4, 5))
    notes: list[str] = []
    assert mac_counts(model, notes=notes) == {"fc": 0}
    assert notes == ["fc (MatMul): its multiply-accumulates are not counted, a shape is unknown"]


@pytest.mark.parametrize("opset", [11, 17])
def test_follows_shapes_that_the_graph_computes(opset):
    unsqueeze = "u = Unsqueeze<axes=[0]>(h)" if opset < 13 else "z = Constant<value=int64[1]{0}>() u = Unsqueeze(h, z)"
    model = Model.load(
        parsed(
            "g (float[n,4,6] x, float[3,5] w) => (float[a,b,c] y) {"
            "s = Shape(x) i = Constant<value=int64{2}>() d = Gather<axis=0>(s, i) two = Constant<value=int64{2}>()"
            f"h = Div(d, two) {unsqueeze} head = Constant<value=int64[2]{{-1, 4}}>()"
            "shape = Concat<axis=0>(head, u) r = Reshape(x, shape) [mm] y = MatMul(r, w) }",
            opset=opset,
        )
    )
    assert mac_counts(model, {"x": [5, 4, 6]}) == {"mm": 5 * 2 * 4 * 3 * 5}


def test_counts_nodes_of_both_branches():
    model = with_weights(
        "g (bool c, float[2,4] x) => (float[2,n] y) { y = If(c) <"
        "then_branch = t () => (float[2,5] a) { [one] a = MatMul(x, w) },"
        "else_branch = e () => (float[2,3] b) { [two] b = MatMul(x, v) }> }",
        w=zeros(4, 5),
        v=zeros(4, 3),
    )
    assert mac_counts(model) == {"one": 40, "two": 24}


def test_counts_inside_the_models_own_functions():
    model = Model.load(
        parsed(
            "g (float[2,4] x, float[4,5] w) => (float[2,5] y) { y = local.twice(x, w) }",
            functions='<opset_import: ["": 17], domain: "local"> twice (a, b) => (c) { c = MatMul(a, b) }',
        )
    )
    assert list(mac_counts(model).values()) == [40]


def test_names_unnamed_and_doubly_named_nodes_by_their_output():
    model = Model.load(
        parsed("g (float[2,2] x) => (float[2,2] y) { a = MatMul(x, x) [n] b = MatMul(a, a) [n] y = MatMul(b, b) }")
    )
    assert list(mac_counts(model)) == ["a", "n", "y"]


def test_reads_no_weight_to_count():
    model = with_weights("g (float[1,64] x) => (float[1,64] y) { [fc] y = MatMul(x, w) }", w=zeros(64, 64))
    before = model.digest
    mac_counts(model)
    assert isinstance(next(model.constants())._values, LazyWeight)
    assert model.digest == before


# --- weights ----------------------------------------------------------------------------------------------------------


def sparse_weight(*shape: int) -> np.ndarray[Any, Any]:
    weight = RNG.normal(size=shape).astype(np.float32)
    weight[0] = 0
    return weight


def test_counts_float_weights_and_their_zeros():
    model = with_weights(
        "g (float[1,64] x) => (float[1,32] y) { p = MatMul(x, w) y = Add(p, b) }", w=sparse_weight(64, 32), b=zeros(32)
    )
    assert count_parameters(model) == (64 * 32 + 32, 63 * 32)


def test_counts_the_codes_of_a_stored_weight_and_not_its_scale():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    model = with_weights(
        "g (float[1,4] x) => (float[1,4] y) { c = Cast<to=1>(q) w = Mul(c, s) [fc] y = MatMul(x, w) }",
        q=codes,
        s=np.ones((1, 4), np.float32),
    )
    assert count_parameters(model) == (16, 15)
    [row] = weight_table(model)
    assert (row.name, row.dtype, row.bytes, row.op, row.node) == ("q", "int8", 16, "MatMul", "fc")


def test_codes_with_zero_points_are_the_weight_and_their_settings_are_none():
    model = with_weights(
        """g (float[1,2] x) => (float[1,2] y) {
            c = Cast<to = 1>(q) m = Sub(c, z) w = Mul(m, s) [fc] y = MatMul(x, w)
        }""",
        q=np.array([[3, 7], [5, 7]], np.uint8),
        z=np.array([[3, 7]], np.float32),
        s=np.array([[0.5, 0.25]], np.float32),
    )
    [row] = weight_table(model)
    assert (row.name, row.node, row.op, row.elements, row.zeros) == ("q", "fc", "MatMul", 4, 3)


def test_what_is_taken_off_a_float_is_a_parameter():
    model = with_weights("g (float[1,2] x) => (float[1,2] y) { y = Sub(x, b) }", b=np.ones(2, np.float32))
    assert count_parameters(model) == (2, 2)


def test_a_code_equal_to_its_zero_point_is_zero():
    model = with_weights(
        "g (float[1,4] x) => (float[1,3] y) { w = DequantizeLinear<axis=1>(q, s, z) y = MatMul(x, w) }",
        q=np.array([[128, 7, 9], [0, 7, 1], [128, 3, 9], [5, 7, 9]], np.uint8),
        s=np.ones(3, np.float32),
        z=np.array([128, 7, 9], np.uint8),
    )
    assert count_parameters(model) == (12, 4)


def test_counts_quantized_biases_and_no_scales():
    scale = np.array(np.float32(0.1))
    model = with_weights(
        "g (uint8[1,2,4,4] x) => (uint8[1,3,2,2] y) { y = QLinearConv(x, s, z, w, s, z, s, z, b) }",
        w=np.ones((3, 2, 3, 3), np.uint8),
        s=scale,
        z=np.array(np.uint8(0)),
        b=np.array([0, 1, 2], np.int32),
    )
    assert count_parameters(model) == (54 + 3, 54 + 2)


def test_counts_a_shared_weight_once_and_shapes_never():
    model = with_weights(
        "g (float[4,4] x) => (float[2,8] y) { a = MatMul(x, w) b = MatMul(a, w) y = Reshape(b, shape) }",
        w=np.ones((4, 4), np.float32),
        shape=np.array([2, 8]),
    )
    assert count_parameters(model) == (16, 16)


def test_bounds_of_a_clip_are_no_parameters():
    model = with_weights(
        "g (float[4] x) => (float[4] y) { y = Clip(x, low, high) }", low=zeros(), high=np.array(6, np.float32)
    )
    assert count_parameters(model) == (0, 0)


def test_finds_weights_in_constant_nodes():
    value = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(sparse_weight(16, 8)))
    proto = parsed("g (float[1,16] x, float[16,8] w0) => (float[1,8] y) { y = MatMul(x, w) }")
    del proto.graph.input[1]
    proto.graph.node.insert(0, value)
    assert count_parameters(Model.load(proto)) == (128, 120)


def test_counts_bfloat16_weights():
    weight = helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [16, 16], [0.0] * 16 + [1.5] * 240)
    proto = parsed("g (bfloat16[1,16] x) => (bfloat16[1,16] y) { y = MatMul(x, w) }")
    proto.graph.initializer.append(weight)
    assert count_parameters(Model.load(proto)) == (256, 240)


def test_weights_stay_on_disk_when_they_are_counted(tmp_path):
    weight = sparse_weight(64, 64)
    with_weights("g (float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }", w=weight).save(
        tmp_path / "m.onnx", external_data=True
    )
    model = Model.load(tmp_path / "m.onnx")
    assert count_parameters(model) == (4096, 4032)
    assert isinstance(next(model.constants())._values, LazyWeight)


def test_a_model_with_storage_codes_only_is_not_quantized():
    stored = with_weights(
        "g (float[1,4] x) => (float[1,4] y) { c = Cast<to=1>(q) w = Mul(c, s) y = MatMul(x, w) }",
        q=zeros(4, 4, dtype=np.int8),
        s=np.ones((1, 4), np.float32),
    )
    qdq = with_weights(
        "g (float[1,4] x) => (float[1,4] y) { w = DequantizeLinear(q, s) y = MatMul(x, w) }",
        q=zeros(4, 4, dtype=np.int8),
        s=np.array(np.float32(1)),
    )
    assert not is_quantized(stored)
    assert is_quantized(qdq)


# --- files ------------------------------------------------------------------------------------------------------------


def test_deflates_as_zlib_does(tmp_path):
    path = tmp_path / "m.onnx"
    with_weights("g (float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }", w=sparse_weight(64, 64)).save(path)
    assert deflated_bytes(path) == len(zlib.compress(path.read_bytes()))


def test_estimates_what_a_large_file_takes_deflated(tmp_path):
    path = tmp_path / "m.onnx"
    big = np.rint(np.random.default_rng(0).normal(size=(64, 80_000)) * 20).astype(np.float32)
    with_weights("g (float[1,64] x) => (float[1,80000] y) { y = MatMul(x, w) }", w=big).save(path)
    assert deflated_bytes(path) == pytest.approx(len(zlib.compress(path.read_bytes())), rel=0.01)


def test_deflates_external_data_too(tmp_path):
    path = tmp_path / "m.onnx"
    model = with_weights("g (float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }", w=sparse_weight(64, 64))
    model.save(path, external_data=True)
    assert model_files(path) == [path, tmp_path / "m.onnx.data"]
    assert deflated_bytes(path) > 12_000


def test_refuses_to_deflate_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.onnx: cannot be read \(No such file"):
        deflated_bytes(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.onnx: is not an ONNX model"):
        deflated_bytes(tmp_path / "text.onnx")
