"""What `low-rank` makes of graphs: the same outputs from fewer weights, and what it leaves, with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes import LowRank
from onnxcomp_passes._conv_factors import has_form
from tests.models import Array, graph_model, mlp_model, random_inputs, random_weights, run
from tests.thin_weights import few, thin, weights_of

SUM_ROUNDING = 3e-5
"""Relative to the largest output: sums of products in another order, with a float32 weight on either side."""


def thinned(proto: onnx.ModelProto, context: Context | None = None, **options: Any) -> tuple[Model, Changes]:
    """The model after the pass, checked, and what it said."""
    model = Model.load(proto)
    changes = LowRank(**{"min_elements": 1, **options}).rewrite(model, context or Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def reasons(changes: Changes) -> dict[str, str]:
    return {left.where: left.why for left in changes.left}


def close(wanted: Array, got: Array, rounding: float = SUM_ROUNDING) -> None:
    assert (wanted.dtype, wanted.shape) == (got.dtype, got.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rounding * float(np.abs(wanted).max(initial=1e-30)))


def check(proto: onnx.ModelProto, count: int, feeds: Mapping[str, Any] | None = None, **options: Any) -> Model:
    """So many weights become factors, fewer in all; names stay, outputs too, and a second run changes nothing."""
    model, changes = thinned(proto, **options)
    assert changes.count == count, reasons(changes)
    assert weights_of(model) < weights_of(proto)
    result = model.to_proto()
    assert result.graph.input == proto.graph.input
    assert result.graph.output == proto.graph.output
    made = [name for node in result.graph.node for name in node.output]
    assert {name for node in proto.graph.node for name in node.output} <= set(made)
    assert len(made) == len(set(made))
    feeds = feeds or random_inputs(proto)
    for wanted, got in zip(run(proto, feeds), run(model, feeds), strict=True):
        close(wanted, got)
    again = model.fork()
    assert LowRank(**{"min_elements": 1, **options}).rewrite(again, Context()).count == 0
    assert again.digest == model.digest
    return model


def text(ins: str, outs: str, body: str) -> str:
    return f"g ({ins}) => ({outs}) {{ {body} }}"


def nodes(model: Model) -> list[str]:
    return [node.op_type for node in model.to_proto().graph.node]


# --- products ---------------------------------------------------------------------------------------------------------

MATMULS: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "right": ("N, 5, 20", "N, 5, 16", "MatMul(x, W)", (20, 16)),
    "left": ("N, 20, 5", "N, 16, 5", "MatMul(W, x)", (16, 20)),
    "right of a vector": ("20", "16", "MatMul(x, W)", (20, 16)),
    "left of a vector": ("20", "16", "MatMul(W, x)", (16, 20)),
    "a stack on the right": ("N, 4, 5, 20", "N, 4, 5, 16", "MatMul(x, W)", (4, 20, 16)),
    "a stack on the left": ("N, 4, 20, 5", "N, 4, 16, 5", "MatMul(W, x)", (4, 16, 20)),
    "a stack of stacks": ("2, 1, 5, 20", "2, 3, 5, 16", "MatMul(x, W)", (2, 3, 20, 16)),
    "a stack for one matrix": ("5, 20", "4, 5, 16", "MatMul(x, W)", (4, 20, 16)),
}


@pytest.mark.parametrize("form", MATMULS)
def test_a_matmul_becomes_two(form: str):
    given_shape, shape, op, weight = MATMULS[form]
    proto = graph_model(text(f"float[{given_shape}] x", f"float[{shape}] y", f"y = {op}"), W=thin(*weight))

    model = check(proto, 1, rank=3)

    assert nodes(model) == ["MatMul", "MatMul"]
    assert weights_of(model) == math.prod(weight) * 3 * (20 + 16) // (20 * 16)


@pytest.mark.parametrize("op", ["MatMul(x, W)", "MatMul(W, x)"])
def test_a_stack_of_matrices_for_one_vector_stays(op: str):
    weight = thin(4, 20, 16) if op == "MatMul(x, W)" else thin(4, 16, 20)
    proto = graph_model(text("float[20] x", "float[4, 16] y", f"y = {op}"), W=weight)

    _, changes = thinned(proto, rank=3)

    assert reasons(changes) == {"W": "is a stack of matrices, and multiplied with what may be a vector"}


@pytest.mark.parametrize("opset", [9, 11, 17])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("data_turned", [0, 1])
@pytest.mark.parametrize("bias", ["", "b", "c"])
def test_a_gemm_becomes_two(opset: int, turned: int, data_turned: int, bias: str):
    if opset < 11 and not bias:
        pytest.skip("must have one")
    weight, shape = thin(20, 16), "20, 6" if data_turned else "6, 20"
    op = f"Gemm<transA = {data_turned}, transB = {turned}, alpha = 0.5, beta = 2.0>(x, W{', ' + bias if bias else ''})"
    weights = {"W": np.ascontiguousarray(weight.T) if turned else weight}
    if bias:
        weights[bias] = random_weights(*((16,) if bias == "b" else (6, 16)))
    proto = graph_model(text(f"float[{shape}] x", "float[6, 16] y", f"y = {op}"), weights, opset=opset)

    model = check(proto, 1, rank=3)

    assert nodes(model) == ["Gemm", "Gemm"]


def test_a_gemm_may_add_what_is_no_constant():
    body = "y = Gemm(x, W, z)"
    proto = graph_model(text("float[6, 20] x, float[6, 16] z", "float[6, 16] y", body), W=thin(20, 16))

    check(proto, 1, rank=3)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("axis", ["", "<axis = 0>", "<axis = -2>"])
def test_a_table_is_read_in_thin_rows(shape: tuple[int, ...], axis: str):
    sizes = f"[{', '.join(map(str, shape))}]" if shape else ""
    ends = ", ".join(map(str, (*shape, 16)))
    proto = graph_model(text(f"int64{sizes} rows", f"float[{ends}] y", f"y = Gather{axis}(W, rows)"), W=thin(40, 16))
    rows = np.random.default_rng(0).integers(-40, 40, shape)

    model = check(proto, 1, {"rows": rows}, rank=3)

    assert nodes(model) == ["Gather", "MatMul"]


CONVS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {
    "3x3": ("pads = [1, 1, 1, 1]", (16, 12, 3, 3), (2, 12, 7, 8), 1),
    "strides": ("pads = [1, 0, 1, 2], strides = [2, 3]", (16, 12, 3, 3), (2, 12, 9, 8), 1),
    "dilations": ("dilations = [2, 1], kernel_shape = [3, 3]", (16, 12, 3, 3), (2, 12, 9, 8), 1),
    "same": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (16, 12, 3, 3), (2, 12, 7, 8), 1),
    "groups": ("group = 2, pads = [1, 1, 1, 1]", (24, 12, 3, 3), (2, 24, 7, 8), 2),
    "1x1": ("strides = [2, 2]", (16, 12, 1, 1), (2, 12, 7, 8), 1),
    "one axis": ("pads = [1, 1]", (16, 12, 3), (2, 12, 9), 1),
    "three axes": ("pads = [1, 1, 1, 1, 1, 1]", (16, 12, 3, 3, 3), (2, 12, 4, 5, 6), 1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["svd", "tucker", "spatial", "cp"])
@pytest.mark.parametrize("conv", CONVS)
def test_a_conv_becomes_a_chain(conv: str, form: str, bias: bool):
    told, shape, given_shape, group = CONVS[conv]
    if not has_form(form, shape, group):
        pytest.skip("has no such form")
    axes = ", ".join(map(str, given_shape))
    ends = ", ".join("ABC"[: len(shape) - 2])
    body = f"y = Conv<{told}>(x, W{', b' if bias else ''})"
    weights = {"W": few(form, shape, group), **({"b": random_weights(shape[0])} if bias else {})}
    proto = graph_model(text(f"float[{axes}] x", f"float[2, {shape[0]}, {ends}] y", body), weights)

    model = check(proto, 1, conv=form, rank=1 if form == "cp" else 2)

    assert nodes(model) == ["Conv"] * {"svd": 2, "spatial": 2, "tucker": 3, "cp": len(shape)}[form]


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.data(), st.integers(0, 99))
def test_any_weight_of_low_rank_is_found_to_be_one(inputs: int, outputs: int, data: st.DataObject, seed: int):
    most = (inputs * outputs - 1) // (inputs + outputs)
    rank = data.draw(st.integers(1, max(1, most)))
    proto = graph_model(
        text(f"float[N, {inputs}] x", f"float[N, {outputs}] y", "y = MatMul(x, W)"),
        W=thin(inputs, outputs, rank=rank, seed=seed),
    )

    model = check(proto, 1, rank=rank)

    assert weights_of(model) == rank * (inputs + outputs)


@pytest.mark.parametrize(
    ("ins", "outs", "body", "weight"),
    [
        ("float16[3, 20] x", "float16[3, 16] y", "y = MatMul(x, W)", thin(20, 16)),
        ("int64[5] x", "float16[5, 16] y", "y = Gather(W, x)", thin(20, 16)),
        ("float16[1, 12, 6, 6] x", "float16[1, 16, 4, 4] y", "y = Conv(x, W)", few("svd", (16, 12, 3, 3), 1)),
    ],
)
def test_float16_stays_float16(ins: str, outs: str, body: str, weight: Array):
    proto = graph_model(text(ins, outs, body), W=weight.astype(np.float16))
    feeds = random_inputs(proto)

    model, changes = thinned(proto, rank=3)

    assert changes.count == 1
    assert {tensor.data_type for tensor in model.to_proto().graph.initializer} == {onnx.TensorProto.FLOAT16}
    close(run(proto, feeds)[0], run(model, feeds)[0], rounding=1e-2)


# --- weights with several readers, readers with one input ------------------------------------------------------------


def test_a_weight_that_two_nodes_read_is_split_once():
    body = "a = MatMul(x, W) r = Relu(z) b = MatMul(r, W) y = Add(a, b)"
    ins = "float[N, 20] x, float[N, 20] z"
    proto = graph_model(text(ins, "float[N, 16] y", body), W=thin(20, 16))

    model = check(proto, 1, rank=3)

    assert nodes(model).count("MatMul") == 4
    assert weights_of(model) == 3 * 36


def projections(op: str = "MatMul", *, joint: bool = True, opset: int = 17) -> onnx.ModelProto:
    """Q, K and V of one tensor, of rank 3 together or each by itself."""
    body = f"""n = Relu(x) q0 = {op.format("Q")} k0 = {op.format("K")} v0 = {op.format("V")}
        q = Add(q0, bq) k = Add(k0, bk) v = Relu(v0)"""
    first = random_weights(20, 3)
    weights = {
        name: first @ random_weights(3, size, seed=seed) if joint else thin(20, size, seed=seed)
        for seed, (name, size) in enumerate((("Q", 16), ("K", 16), ("V", 24)), 1)
    }
    weights |= {"bq": random_weights(16), "bk": random_weights(16), "zq": np.zeros(16, np.float32)}
    return graph_model(text("float[N, 20] x", "float[N, 16] q, float[N, 16] k, float[N, 24] v", body), weights)


@pytest.mark.parametrize("op", ["MatMul(n, {})", "Gemm(n, {})"])
def test_projections_of_one_input_have_the_first_factor_in_common(op: str):
    model = check(projections(op), 1, rank=3)

    assert nodes(model).count(op.partition("(")[0]) == 4
    assert weights_of(model) == 3 * (20 + 16 + 16 + 24)


def test_projections_are_split_apart_where_that_loses_less():
    model = check(projections("MatMul(n, {})", joint=False), 3, rank=3)

    assert nodes(model).count("MatMul") == 6


def test_projections_that_lay_their_weights_out_otherwise_still_share():
    body = "a = Gemm(x, W, b) y = Relu(a) z = Gemm<transB = 1, alpha = 0.5>(x, V)"
    first = random_weights(20, 3)
    weights = {"W": first @ random_weights(3, 16), "V": (first @ random_weights(3, 24)).T.copy(), "b": np.ones(16, "f")}
    proto = graph_model(text("float[N, 20] x", "float[N, 16] y, float[N, 24] z", body), weights)

    model = check(proto, 1, rank=3)

    assert nodes(model).count("Gemm") == 3


def test_what_is_between_may_be_an_output_of_the_graph():
    body = "h = MatMul(x, W) a = Add(h, b) y = MatMul(a, V)"
    weights = {"W": thin(20, 16), "V": thin(16, 12), "b": random_weights(16)}
    proto = graph_model(text("float[N, 20] x", "float[N, 12] y, float[N, 16] h", body), weights)

    check(proto, 2, rank=3)


def test_the_names_and_notes_of_nodes_stay():
    proto = graph_model(text("float[N, 20] x", "float[N, 16] y", "[here] y = MatMul(x, W)"), W=thin(20, 16))
    proto.graph.node[0].metadata_props.add(key="namespace", value="encoder.1")

    model = check(proto, 1, rank=3)

    found = model.to_proto().graph.node[1]
    assert found.name == "here"
    assert [(prop.key, prop.value) for prop in found.metadata_props] == [("namespace", "encoder.1")]


def test_constants_in_nodes_are_weights_too():
    proto = graph_model(text("float[N, 20] x", "float[N, 16] y", "y = MatMul(x, W)"), W=thin(20, 16))
    node = onnx.helper.make_node("Constant", [], ["W"], value=proto.graph.initializer[0])
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, node)

    model, changes = thinned(proto, rank=3)

    assert changes.count == 1
    assert nodes(model) == ["MatMul", "MatMul"]
    feeds = random_inputs(proto)
    close(run(proto, feeds)[0], run(model, feeds)[0])


# --- asked for by name ------------------------------------------------------------------------------------------------


def test_what_was_done_can_be_done_again():
    first, changes = thinned(projections("MatMul(n, {})"), rank=3)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.resolved.items()}
    assert options["ranks"] == ("Q+K+V=svd:3",)

    again, _ = thinned(projections("MatMul(n, {})"), None, **options)

    assert again.digest == first.digest


def test_ranks_name_weights_and_the_others_stay():
    proto = mlp_model((20, 30, 16))

    model, changes = thinned(proto, ranks=("W0=svd:4",))

    assert [change.where for change in changes.changed] == ["W0"]
    names = {tensor.name for tensor in model.to_proto().graph.initializer}
    assert "W1" in names
    assert "W0" not in names


def test_ranks_of_what_is_not_there_are_told():
    model, changes = thinned(mlp_model((20, 30, 16)), ranks=("W7=svd:4", "W0=tucker:4x4"))

    assert model.digest == Model.load(mlp_model((20, 30, 16))).digest
    assert reasons(changes) == {
        "W7": "there is no such weight to factor",
        "W0": "a Gemm of its shape does not have the form tucker",
    }
