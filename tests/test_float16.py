"""`float16`: half precision where it holds the values, float32 where not, and as few Casts as possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Float16, QuantizeWeights
from tests.models import conv_bn_model, graph_model, if_model, mlp_model, ops, random_inputs, random_weights, run

Array = np.ndarray[Any, Any]

HALF = 2.0**-11
"""The largest relative error of one rounding to float16."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def rewritten(
    proto: onnx.ModelProto, *, exclude: tuple[str, ...] = (), context: Context | None = None, **options: Any
) -> tuple[Model, Changes]:
    model = Model.load(proto)
    changes = Float16(**options).rewrite(model, context or Context(exclude=exclude))
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def dtypes(model: Model) -> dict[str, str]:
    return {constant.name: str(constant.dtype) for constant in model.constants()}


def casts_in_a_row(model: Model) -> int:
    nodes = [node for node in model.graph.nodes if node.op == "Cast"]
    return sum(bool(node.inputs[0].inputs) and node.inputs[0].inputs[0].op == "Cast" for node in nodes)


def why(changes: Changes) -> dict[str, str]:
    return {left.where: left.why for left in changes.left}


def matmul_bound(x: Array, weight: Array) -> Array:
    """Rounding of input, weight and result; products are summed in at least float16's precision.

    Three roundings of one product each, and a sum of k terms in float16 that loses at most k roundings of the sum of
    magnitudes.
    """
    return np.asarray((3 + len(weight)) * HALF * (np.abs(x) @ np.abs(weight)) + 1e-6)


# --- computation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("opset", [5, 7, 11, 13, 17, 21])
def test_the_error_is_within_that_of_eleven_bits(opset: int, optimized: bool):
    weight = random_weights(32, 24, scale=0.2)
    text = "g (float[N, 32] x) => (float[N, 24] y) { y = MatMul(x, W) }"
    if opset < 9:
        text = text.replace("x)", "x, float[32, 24] W)", 1)
    proto = graph_model(text, opset=opset, ir_version=3 if opset < 9 else 8, W=weight)
    model, changes = rewritten(proto)
    x = random_weights(5, 32, seed=9)

    got = run(model, {"x": x}, optimized=optimized)[0]

    assert (changes.count, model.opset) == (1, max(opset, 6))
    assert dtypes(model) == {"W": "float16"}
    assert ops(model) == ["Cast", "MatMul", "Cast"]
    assert got.dtype == np.float32
    assert np.all(np.abs(got - x @ weight) <= matmul_bound(x, weight))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=4), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_network_has_two_casts(sizes: list[int], batch: int, seed: int):
    proto = mlp_model(tuple(sizes), seed=seed)
    model, _ = rewritten(proto)
    feeds = random_inputs(proto, seed=seed, batch=batch)

    wanted, got = run(proto, feeds)[0], run(model, feeds)[0]

    assert ops(model).count("Cast") == 2
    # Each layer rounds its input, its weight, its bias and its sums: at most k + 4 roundings of the layer's norm.
    allowed = sum(size + 4 for size in sizes) * HALF
    assert np.linalg.norm(got - wanted) <= allowed * max(float(np.linalg.norm(wanted)), 1.0)


def test_inputs_and_outputs_are_converted_when_asked():
    proto = mlp_model((24, 32, 8))
    proto.graph.input[0].doc_string = "what it is"
    model, _ = rewritten(proto, keep_io=False)
    info = model.proto().graph

    assert "Cast" not in ops(model)
    assert {i.type.tensor_type.elem_type for i in (*info.input, *info.output)} == {TensorProto.FLOAT16}
    assert info.input[0].doc_string == "what it is"
    assert info.input[0].type.tensor_type.shape == proto.graph.input[0].type.tensor_type.shape
    x = random_weights(3, 24).astype(np.float16)
    wanted = run(proto, {"x": x.astype(np.float32)})[0]
    np.testing.assert_allclose(run(model, {"x": x})[0], wanted, atol=60 * HALF * np.abs(wanted).max())


def test_converted_outputs_that_other_nodes_make_get_a_cast():
    text = "g (float[N, 24] x) => (float[N, 24] y, float[N, 24] e) { y = MatMul(x, W) e = Exp(y) }"
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)), keep_io=False)

    got = run(model, {"x": random_weights(2, 24).astype(np.float16)})

    assert [str(value.dtype) for value in got] == ["float16", "float16"]


def test_names_types_and_dynamic_axes_stay():
    proto = conv_bn_model()

    model, _ = rewritten(proto)

    assert list(model.proto().graph.input) == list(proto.graph.input)
    assert list(model.proto().graph.output) == list(proto.graph.output)
    assert ops(model).count("Cast") == 2


def test_a_second_time_changes_nothing():
    model, _ = rewritten(conv_bn_model())
    digest = model.digest

    assert Float16().rewrite(model, Context()).count == 0
    assert model.digest == digest


# --- what stays float32 -----------------------------------------------------------------------------------------------

HARMFUL = {
    "overflow": (np.full((24, 24), 1e5, np.float32), "beyond 65504"),
    "underflow": (np.full((24, 24), 1e-9, np.float32), "below the range"),
    "denormal": (random_weights(24, 24, scale=1e-7), "below the range"),
    "nan": (np.full((24, 24), np.nan, np.float32), "NaN"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_weights_that_do_not_fit_stay_float32(kind: str):
    weight, reason = HARMFUL[kind]
    proto = graph_model("g (float[N, 24] x) => (float[N, 24] y) { [fc] y = MatMul(x, W) }", W=weight)

    model, changes = rewritten(proto)

    assert (changes.count, model.digest) == (0, Model.load(proto).digest)
    assert reason in why(changes)["fc"]
    assert reason in why(changes)["W"]


def test_channels_of_zeros_and_single_small_weights_do_no_harm():
    weight = random_weights(24, 24)
    weight[:, 3], weight[0, 0] = 0, 1e-9

    model, _ = rewritten(graph_model("g (float[N, 24] x) => (float[N, 24] y) { y = MatMul(x, W) }", W=weight))

    assert dtypes(model) == {"W": "float16"}


def test_an_epsilon_keeps_its_division_from_zero():
    text = """g (float[N, 24] x) => (float[N, 24] y) {
        h = MatMul(x, W)
        a = Abs(h)
        [add] s = Add(a, e)
        y = Div(h, s)
    }"""
    model, changes = rewritten(graph_model(text, W=random_weights(24, 24), e=np.asarray([1e-12], np.float32)))

    assert "below the range" in why(changes)["add"]
    assert np.isfinite(run(model, {"x": np.zeros((2, 24), np.float32)})[0]).all()


def test_a_divisor_that_would_become_zero_stays_float32():
    text = "g (float[N, 24] x) => (float[N, 24] y) { h = MatMul(x, W) [div] y = Div(h, d) }"
    divisor = np.ones(24, np.float32)
    divisor[5] = 1e-9

    model, changes = rewritten(graph_model(text, W=random_weights(24, 24), d=divisor))

    assert "0 in float16" in why(changes)["div"]
    assert np.isfinite(run(model, {"x": random_weights(2, 24)})[0]).all()


def test_a_mask_of_the_most_negative_float_makes_no_nan():
    """-3.4e38 would become -infinity, and a row of those NaN in the Softmax."""
    text = """g (float[N, 24] x, int64[N, 24] mask) => (float[N, 24] y) {
        h = MatMul(x, W)
        f = Cast<to = 1>(mask)
        t = Sub(one, f)
        m = Mul(t, low)
        [add] s = Add(h, m)
        [soft] p = Softmax(s)
        y = MatMul(p, V)
    }"""
    weights: dict[str, Any] = {"W": random_weights(24, 24), "V": random_weights(24, 24, seed=1)}
    low = np.asarray(np.finfo(np.float32).min)
    model, changes = rewritten(graph_model(text, weights, one=np.asarray(1, np.float32), low=low))

    got = run(model, {"x": random_weights(2, 24), "mask": np.zeros((2, 24), np.int64)})[0]

    assert np.isfinite(got).all()
    assert "does not fit" in why(changes)["add"]
    assert sum(kind == "float16" for kind in dtypes(model).values()) == 2


def test_infinity_in_a_constant_is_float16_too():
    text = "g (float[N, 24] x, bool[24] c) => (float[N, 24] y) { h = MatMul(x, W) m = Where(c, h, b) y = MatMul(m, W) }"
    proto = graph_model(text, W=np.eye(24, dtype=np.float32), b=np.asarray(-np.inf, np.float32))

    model, _ = rewritten(proto)

    assert dtypes(model) == {"W": "float16", "b": "float16"}


def data_context(proto: onnx.ModelProto, feeds: Mapping[str, Array], runtime: Runtime, folder: Path) -> Context:
    return Context(data=open_data(dict(feeds), input_specs(proto)), runtime=runtime, workdir=folder)


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e4, False)])
def test_activations_that_were_seen_to_overflow_stay_float32(
    runtime: Runtime, tmp_path: Path, scale: float, fits: bool
):
    body = "[one] h = MatMul(x, W) [two] s = Sigmoid(h) [three] y = MatMul(s, V)"
    text = f"g (float[N, 24] x) => (float[N, 24] y) {{ {body} }}"
    proto = graph_model(text, W=random_weights(24, 24), V=random_weights(24, 24, seed=1))
    x = (scale * random_weights(16, 24)).astype(np.float32)

    model, changes = rewritten(proto, context=data_context(proto, {"x": x}, runtime, tmp_path))

    assert ("one" in why(changes)) is not fits
    assert np.isfinite(run(model, {"x": x})[0]).all()
    assert "three" in [change.where for change in changes.changed]


def test_powers_are_float16_where_data_show_that_they_fit(runtime: Runtime, tmp_path: Path):
    text = "g (float[N, 24] x) => (float[N, 24] y) { a = MatMul(x, W) [pow] b = Pow(a, two) y = MatMul(b, W) }"
    proto = graph_model(text, W=random_weights(24, 24), two=np.asarray(2, np.float32))
    x = random_weights(16, 24)

    _, blind = rewritten(proto)
    _, seeing = rewritten(proto, context=data_context(proto, {"x": x}, runtime, tmp_path))

    assert "overflow" in why(blind)["pow"]
    assert "pow" in [change.where for change in seeing.changed]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[op] t = ReduceSum(h)", "sums"),
        ("[op] t = Exp(h)", "overflow"),
        ("[op] t = CumSum(h, axis)", "sums"),
        ("[op] t = Relu(h)", "excluded"),
        ("[op] t = Tanh(h)", "Tanh is blocked"),
    ],
)
def test_unsafe_operators_stay_float32(text: str, reason: str):
    body = f"g (float[4, 24] x) => (float[?, 24] y) {{ h = MatMul(x, W) {text} y = MatMul(t, W) }}".replace("?", "R")
    weights: dict[str, Any] = {"axis": np.asarray(1, np.int64)} if "axis" in text else {}
    exclude = ("op",) if reason == "excluded" else ()
    text = body.replace("float[R, 24] y", "float[R, S] y" if "ReduceSum" in text else "float[R, 24] y")
    if "ReduceSum" in text:
        text = text.replace("ReduceSum(h)", "ReduceSum<keepdims = 1>(h, rows)")
        weights["rows"] = np.asarray([0], np.int64)
    proto = graph_model(text, W=random_weights(24, 24), **weights)

    model, changes = rewritten(proto, exclude=exclude, block=("Tanh",))

    assert reason in why(changes)["op"]
    assert casts_in_a_row(model) == 0
    assert ops(model).count("Cast") == 4


def test_operators_whose_schema_has_no_float16_stay_float32():
    text = "g (float[N, 24] x) => (float[N, 24] y) { h = MatMul(x, W) [celu] t = Celu(h) y = MatMul(t, W) }"

    model, changes = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert why(changes) == {"celu": "its schema has no float16"}
    assert ops(model) == ["Cast", "MatMul", "Cast", "Celu", "Cast", "MatMul", "Cast"]


@pytest.mark.parametrize("reduction", ["none", "add", "max"])
def test_scattering_is_float16_where_onnx_runtime_runs_it(reduction: str):
    text = f"""g (float[4, 24] x) => (float[4, 24] y) {{
        h = MatMul(x, W)
        [put] t = ScatterElements<reduction = "{reduction}">(h, at, v)
        y = MatMul(t, W)
    }}"""
    values: dict[str, Any] = {"at": np.asarray([[1]], np.int64), "v": np.ones((1, 1), np.float32)}
    proto = graph_model(text, opset=18, W=random_weights(24, 24), **values)

    model, changes = rewritten(proto)

    assert ("put" in why(changes)) is (reduction != "none")
    assert np.isfinite(run(model, {"x": random_weights(4, 24)})[0]).all()


def test_arithmetic_on_sizes_stays_float32():
    """2049 is no float16."""
    text = """g (float[N, 2049] x) => (float[N, 24] y, int64[1] n) {
        y = MatMul(x, W)
        s = Shape<start = 1>(x)
        f = Cast<to = 1>(s)
        m = Mul(f, one)
        n = Cast<to = 7>(m)
    }"""
    model, changes = rewritten(graph_model(text, W=random_weights(2049, 24), one=np.asarray(1, np.float32)))

    assert run(model, {"x": random_weights(1, 2049)})[1].tolist() == [2049]
    assert "computes with what were integers" in why(changes).values()


# --- structure --------------------------------------------------------------------------------------------------------


def test_an_initializer_that_both_sides_read_is_held_once():
    text = "g (float[24, 24] x) => (float[24, 24] y, float[24, 24] e) { y = MatMul(x, W) e = Pow(x, W) }"
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)))
    x = np.abs(random_weights(24, 24, seed=1))

    assert list(dtypes(model).values()) == ["float16"]
    exact = np.power(x, random_weights(24, 24).astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(run(model, {"x": x})[1], exact, rtol=1e-4)


def test_a_result_that_both_sides_read_has_one_cast():
    text = """g (float[N, 24] x) => (float[N, 24] y, float[N, 24] a, float[N, 24] b) {
        h = MatMul(x, W)
        y = MatMul(h, W)
        a = Exp(h)
        b = Exp(h)
    }"""
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert ops(model).count("Cast") == 3  # of x, h and y


def test_casts_that_were_there_are_used():
    text = """g (float[N, 24] x) => (int64[N, 24] z, float[N, 24] y) {
        h = MatMul(x, W)
        z = Cast<to = 7>(h)
        f = Cast<to = 1>(z)
        y = MatMul(f, W)
    }"""
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert ops(model) == ["Cast", "MatMul", "Cast", "Cast", "MatMul", "Cast"]


def test_a_cast_that_does_nothing_is_no_border():
    text = "g (float[N, 32] x) => (float[N, 8] y) { a = MatMul(x, W) c = Cast<to = 1>(a) r = Relu(c) y = MatMul(r, V) }"
    proto = graph_model(text, W=random_weights(32, 16), V=random_weights(16, 8))

    model, changes = rewritten(proto)

    assert [change.where for change in changes.changed] == ["a", "r", "y"]
    assert rewritten(model.to_proto())[1].count == 0


@pytest.mark.parametrize("order", ["[1, 0, 2]", "[1, 2, 0]"])
def test_a_matmul_that_onnx_runtime_crashes_on_stays_float32(order: str, runtime: Runtime, tmp_path: Path):
    text = f"""g (float[8, 8, 8] x) => (float[8, 8, 4] y) {{
        r = MatMul(x, V)
        t = Transpose<perm = {order}>(r)
        y = MatMul(t, W)
    }}"""
    model, changes = rewritten(graph_model(text, W=random_weights(8, 4), V=random_weights(8, 8)))
    model.save(tmp_path / "m.onnx")

    runtime.check(tmp_path / "m.onnx")
    assert [left.where for left in changes.left if "crashes" in left.why] == ["t", "y"]
    assert "r" in [change.where for change in changes.changed]
    assert rewritten(model.to_proto())[1].count == 0


def test_a_transpose_before_a_matmul_in_a_branch_stays_float32(runtime: Runtime, tmp_path: Path):
    text = """g (float[8, 8, 8] x) => (float[8, 8, 4] y) {
        yes = Constant<value = bool {1}>()
        r = MatMul(x, V)
        t = Transpose<perm = [1, 0, 2]>(r)
        y = If(yes) <
            then_branch = a () => (float[8, 8, 4] m) { m = MatMul(t, W) },
            else_branch = b () => (float[8, 8, 4] n) { o = MatMul(t, W) n = Relu(o) }
        >
    }"""
    model, changes = rewritten(graph_model(text, W=random_weights(8, 4), V=random_weights(8, 8)))
    model.save(tmp_path / "m.onnx")

    runtime.check(tmp_path / "m.onnx")
    assert "t" in [left.where for left in changes.left if "crashes" in left.why]


def test_nodes_between_float32_nodes_are_not_converted():
    text = "g (float[N, 24] x) => (float[N, 24] y) { a = Exp(x) b = Relu(a) c = Neg(b) d = Exp(c) y = MatMul(d, W) }"
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)))

    assert ops(model) == ["Exp", "Relu", "Neg", "Exp", "Cast", "MatMul", "Cast"]


def test_constant_nodes_are_weights_too():
    body = "W = Constant<value = float[3, 2] {1, 2, 3, 4, 5, 6}>() y = MatMul(x, W)"
    model, _ = rewritten(graph_model(f"g (float[2, 3] x) => (float[2, 2] y) {{ {body} }}"))

    assert list(dtypes(model).values()) == ["float16"]


def test_subgraphs_stay_float32():
    model, changes = rewritten(if_model())

    assert changes.count == 0
    text = """g (bool c, float[3, 24] x) => (float[3, 24] y) {
        h = MatMul(x, W)
        y = If(c) <
            then_branch = yes () => (float[3, 24] a) { a = MatMul(h, W) },
            else_branch = no () => (float[3, 24] b) { b = Relu(h) }
        >
    }"""
    proto = graph_model(text, W=random_weights(24, 24, scale=0.2))
    model, changes = rewritten(proto)

    assert "has subgraphs, which stay float32" in why(changes).values()
    for condition in (True, False):
        feeds = {"c": np.asarray(condition), "x": random_weights(3, 24)}
        wanted = run(proto, feeds)[0]
        np.testing.assert_allclose(run(model, feeds)[0], wanted, atol=60 * HALF * np.abs(wanted).max())


def test_a_weight_that_the_caller_may_feed_stays_as_it_is():
    proto = mlp_model((24, 32, 8))
    proto.graph.input.append(helper.make_tensor_value_info("W0", TensorProto.FLOAT, [24, 32]))

    for keep_io in (True, False):
        model, _ = rewritten(proto, keep_io=keep_io)
        assert model.proto().graph.input[1] == proto.graph.input[1]
        kind = np.float32 if keep_io else np.float16
        assert run(model, {"x": np.ones((2, 24), kind)})[0].dtype == kind


def test_weights_stored_as_int8_stay_so():
    model = Model.load(mlp_model((24, 32, 16)))
    QuantizeWeights().rewrite(model, Context())
    codes = [c.name for c in model.constants() if c.dtype == np.int8]

    Float16().rewrite(model, Context())

    assert [c.name for c in model.constants() if c.dtype == np.int8] == codes


def test_int8_computation_is_left_alone(runtime: Runtime, tmp_path: Path):
    text = """g (float[N, 24] x) => (float[N, 24] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        w = DequantizeLinear(W8, s, zw)
        [fc] h = MatMul(d, w)
        p = QuantizeLinear(h, s, z)
        y = DequantizeLinear(p, s, z)
    }"""
    constants: dict[str, Any] = {
        "s": np.asarray(0.02, np.float32),
        "z": np.asarray(128, np.uint8),
        "zw": np.asarray(0, np.int8),
    }
    proto = graph_model(text, W8=np.ones((24, 24), np.int8), **constants)

    _, changes = rewritten(proto)

    assert changes.count == 0
    assert why(changes)["fc"] == "is part of int8 computation"


# --- storage ----------------------------------------------------------------------------------------------------------


def test_storage_halves_the_bytes_and_is_folded_at_load(runtime: Runtime, tmp_path: Path):
    proto = mlp_model((64, 128, 64))
    model, changes = rewritten(proto, storage_only=True)
    Model.load(proto).save(tmp_path / "before.onnx")
    model.save(tmp_path / "after.onnx")

    before, after = (runtime.census(tmp_path / name).counts() for name in ("before.onnx", "after.onnx"))

    assert before == after
    assert changes.count == 3  # W0, W1, b0; b1 has 64 elements
    assert model.size_bytes < 0.55 * Model.load(proto).size_bytes


def test_storage_computes_exactly_with_the_rounded_weights():
    proto = mlp_model((24, 48, 16))
    rounded = Model.load(proto)
    for name in ("W0", "W1"):
        rounded.set_weight(name, rounded.weight(name).astype(np.float16).astype(np.float32))
    model, _ = rewritten(proto, storage_only=True)
    feeds = random_inputs(proto)

    np.testing.assert_array_equal(run(model, feeds)[0], run(rounded, feeds)[0])


def test_storage_leaves_weights_that_do_not_fit():
    proto = mlp_model((24, 48, 16))
    model = Model.load(proto)
    model.set_weight("W0", np.full((24, 48), 1e6, np.float32))

    changes = Float16(storage_only=True).rewrite(model, Context())

    assert [change.where for change in changes.changed] == ["W1"]
    assert "beyond 65504" in why(changes)["W0"]


def test_what_stays_float32_is_stored_as_float16_where_it_fits():
    text = "g (float[N, 24] x) => (float[N, 24] y) { [fc] y = MatMul(x, W) }"
    model, _ = rewritten(graph_model(text, W=random_weights(24, 24)), block=("MatMul",))

    assert ops(model) == ["Cast", "MatMul"]
    assert list(dtypes(model).values()) == ["float16"]


def test_the_weaker_form_is_storage():
    assert [form.storage_only for form in Float16().weaker()] == [True]
    assert not list(Float16(storage_only=True).weaker())
