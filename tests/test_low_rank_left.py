"""What `low-rank` leaves as it is, and the reasons that it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.pipeline import optimize
from onnxcomp_passes import Float16, LowRank, Pack, QuantizeDynamic, QuantizeWeights
from tests.models import Array, graph_model, matmul_model, mlp_model, random_weights


def text(body: str, *, ins: str = "float[N, 20] x", outs: str = "float[N, 16] y") -> str:
    return f"g ({ins}) => ({outs}) {{ {body} }}"


def low_rank(source: onnx.ModelProto | Model, context: Context | None = None, **options: Any) -> Changes:
    """What the pass says; a model that it does not change stays exactly as it is."""
    model = source if isinstance(source, Model) else Model.load(source)
    before, graph = model.digest, model.to_proto().graph.SerializeToString()
    amount = {} if {"ratio", "energy", "ranks"} & options.keys() else {"rank": 3}
    changes = LowRank(**{"min_elements": 1, **amount, **options}).rewrite(model, context or Context())
    if not changes.count:
        assert model.digest == before
        assert model.to_proto().graph.SerializeToString() == graph
        assert not changes.resolved
    return changes


def reason(source: onnx.ModelProto | Model, context: Context | None = None, **options: Any) -> str:
    """Why the only weight is left."""
    changes = low_rank(source, context, **options)
    assert not changes.count
    [left] = changes.left
    return left.why


def split(changes: Changes) -> list[str]:
    return [change.where for change in changes.changed]


# --- held otherwise ---------------------------------------------------------------------------------------------------


def test_behind_a_dequantizelinear():
    body = "w = DequantizeLinear<axis = 1>(W, scale) y = MatMul(x, w)"
    codes = np.random.default_rng(0).integers(-127, 127, (20, 16)).astype(np.int8)
    proto = graph_model(text(body), W=codes, scale=np.full(16, 0.01, np.float32))

    assert reason(proto) == "its weight is behind a DequantizeLinear: factors are found before quantize"


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (QuantizeWeights(min_elements=1), "is stored as integers: factors are found before quantize-weights"),
        (QuantizeDynamic(), "its weight is multiplied as integers: factors are found before quantize-dynamic"),
        (Float16(storage_only=True), "is stored as float16: factors are found before that"),
    ],
)
def test_behind_passes_that_round(before: Any, why: str):
    model = Model.load(graph_model(text("y = MatMul(x, W)", ins="float[N, 64] x"), W=random_weights(64, 16)))
    assert before.rewrite(model, Context()).count

    assert reason(model) == why


def test_in_a_packed_model():
    model = matmul_model(np.where(random_weights(64, 64) > 1.5, 1, 0).astype(np.float32))
    assert Pack().rewrite(model, Context()).count

    assert "unpack it first" in reason(model)


@pytest.mark.parametrize(("dtype", "why"), [("double", "is float64, not float32"), ("int32", "not a float")])
def test_of_another_type(dtype: str, why: str):
    proto = graph_model(
        text("y = MatMul(x, W)", ins=f"{dtype}[N, 20] x", outs=f"{dtype}[N, 16] y"),
        W=random_weights(20, 16).astype({"double": "float64"}.get(dtype, dtype)),
    )

    assert reason(proto) == why


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"energy": 0.5}, {"ratio": 2.0}])
def test_with_values_that_are_not_finite(value: float, options: dict[str, float]):
    weight = random_weights(20, 16)
    weight[3, 4] = value

    assert reason(matmul_model(weight), None, **options) == "has values that are not finite"


def test_that_the_caller_may_replace():
    proto = mlp_model((20, 24))
    proto.graph.input.append(helper.make_tensor_value_info("W0", TensorProto.FLOAT, [20, 24]))

    assert not low_rank(proto).count


# --- read otherwise ---------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[str, dict[str, Array], str]] = {
    "as a table and as a projection": (
        "e = Gather(W, rows) p = MatMul(x, W) y = Add(e, p)",
        {"W": random_weights(20, 16), "rows": np.array([3])},
        "is read in several ways",
    ),
    "turned and not": (
        "t = Gemm(x, W) y = Gemm<transB = 1>(t, W)",
        {"W": random_weights(20, 20)},
        "is read in several ways",
    ),
    "on either side": ("t = MatMul(W, x) y = MatMul(t, W)", {"W": random_weights(20, 20)}, "is read in several ways"),
    "also by an Add": ("t = MatMul(x, W) y = Add(t, W)", {"W": random_weights(20, 20)}, "is read in several ways"),
    "by columns": (
        "y = Gather<axis = 1>(W, rows) z = Relu(x)",
        {"W": random_weights(20, 16), "rows": np.array([3])},
        "is not read row by row",
    ),
    "as vectors": ("y = MatMul(x, W)", {"W": random_weights(20)}, "is no matrix"),
    "of one column": ("y = MatMul(x, W)", {"W": random_weights(20, 1)}, "is no thicker than rank 1"),
    "on the left of a Gemm": ("y = Gemm(W, x)", {"W": random_weights(16, 20)}, "input 0 of a Gemm cannot be split"),
    "by a ConvTranspose": (
        "r = Unsqueeze(x, two) y = ConvTranspose(r, W)",
        {"W": random_weights(20, 16, 3), "two": np.array([2])},
        "input 1 of a ConvTranspose cannot be split",
    ),
    "by a depthwise Conv": (
        "r = Unsqueeze(x, two) y = Conv<group = 20>(r, W)",
        {"W": random_weights(20, 1, 1), "two": np.array([2])},
        "is no thicker than rank 1",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_read(way: str):
    body, weights, why = WAYS[way]
    proto = graph_model(text(body), weights)
    proto.graph.output[0].type.tensor_type.ClearField("shape")

    changes = low_rank(proto)

    assert not changes.count
    assert why in {left.where: left.why for left in changes.left}["W"]


def test_multiplied_with_another_weight():
    proto = graph_model(text("w = MatMul(W, V) y = MatMul(x, w)"), W=random_weights(20, 24), V=random_weights(24, 16))

    changes = low_rank(proto)

    assert not changes.count
    assert {left.where: left.why for left in changes.left} == dict.fromkeys("WV", "is multiplied with a constant")


def test_in_a_body_and_outside():
    body = """h = MatMul(x, W) y = If(condition) <
        then_branch = yes () => (float[3, 24] a) { a = MatMul(h, W) },
        else_branch = no () => (float[3, 24] b) { t = Identity(h) u = MatMul(t, V) b = Relu(u) }
    >"""
    ins, outs = "bool condition, float[3, 24] x", "float[3, 24] y"
    proto = graph_model(text(body, ins=ins, outs=outs), W=random_weights(24, 24), V=random_weights(24, 24))

    changes = low_rank(proto)

    assert not changes.count
    assert any("If" in left.why for left in changes.left if left.where == "W")


def test_a_weight_that_is_an_output_of_the_graph():
    proto = graph_model(text("y = MatMul(x, W)", outs="float[N, 16] y, float[20, 16] W"), W=random_weights(20, 16))

    assert reason(proto) == "is a graph output"


# --- factors already --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("t = MatMul(x, A) y = MatMul(t, B)", 17),
        ("t = Gemm(x, A) y = Gemm(t, B, b)", 17),
        ("t = Gemm(x, A, zeros) y = Gemm(t, B, b)", 9),
        ("t = MatMul(x, A) p = MatMul(t, B) q = MatMul(t, B2) y = Add(p, q)", 17),
    ],
)
def test_products_with_nothing_between(body: str, opset: int):
    weights = {"A": random_weights(20, 12), "B": random_weights(12, 16), "B2": random_weights(12, 16, seed=2)}
    weights = {name: value for name, value in weights.items() if name in body.replace("(", " ").replace(")", " ")}
    more = {"zeros": np.zeros(12, np.float32), "b": random_weights(16)}
    weights |= {name: value for name, value in more.items() if name + ")" in body}
    proto = graph_model(text(body), weights, opset=opset)

    changes = low_rank(proto, energy=0.3)

    assert not changes.count
    assert {left.why for left in changes.left} == {"is one of several factors already"}


def test_convs_with_nothing_between():
    body = "t = Conv(x, A) y = Conv(t, B, b)"
    weights = {"A": random_weights(8, 12, 3, 3), "B": random_weights(16, 8, 1, 1), "b": random_weights(16)}
    proto = graph_model(text(body, ins="float[1, 12, 6, 6] x", outs="float[1, 16, 4, 4] y"), weights)

    changes = low_rank(proto, energy=0.3)

    assert {left.why for left in changes.left} == {"is one of several factors already"}


def test_products_with_something_between_are_layers():
    for between in ("Add(t, b)", "Relu(t)"):
        body = f"t = MatMul(x, A) r = {between} y = MatMul(r, B)"
        weights = {"A": random_weights(20, 20), "B": random_weights(20, 16), "b": random_weights(20)}

        assert split(low_rank(graph_model(text(body), weights))) == ["A", "B"]


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("op", ["MatMul(r, W)", "Gemm(r, W, b)", "Gemm(r, W, zeros)"])
def test_what_the_pass_has_made_where_no_fewer_weights_are_asked_for(op: str, opset: int):
    body = f"r = Relu(x) y = {op}"
    values = np.geomspace(1, 1e-3, 20)  # of which a few have nearly all of the energy
    weight = (np.linalg.qr(random_weights(20, 20))[0] * values @ random_weights(20, 16)).astype(np.float32)
    weights = {"W": weight, "b": random_weights(16), "zeros": np.zeros(16, np.float32)}
    proto = graph_model(text(body), {name: weights[name] for name in ("W", "b", "zeros") if name in op}, opset=opset)
    model = Model.load(proto)
    assert low_rank(model, rank=8).count

    for options in ({"energy": 0.5}, {"energy": 0.0}, {"ratio": 1.1}, {"rank": 8}, {"rank": 9}):
        assert not low_rank(model, **options).count


# --- asked to stay ----------------------------------------------------------------------------------------------------


def test_ranks_that_save_nothing():
    assert reason(mlp_model((20, 20)), rank=10) == "rank 10 has no fewer weights: two matrices pay below rank 10"
    assert low_rank(mlp_model((20, 20)), rank=9).count


def test_convs_without_the_form_that_is_asked_for():
    body = "y = Conv(x, W)"
    proto = graph_model(
        text(body, ins="float[1, 20, 6, 6] x", outs="float[1, 16, 6, 6] y"), W=random_weights(16, 20, 1, 1)
    )

    assert reason(proto, conv="spatial") == "does not have the form spatial"
    assert reason(proto, conv="tucker", energy=0.5, rank=0) == "does not have the form tucker"


def test_small_weights():
    changes = low_rank(mlp_model((20, 20, 30)), min_elements=500)

    assert split(changes) == ["W1"]
    assert "has fewer than 500 elements" in [left.why for left in changes.left if left.where == "W0"]


def named() -> onnx.ModelProto:
    body = "e = Gather(table, rows) a = MatMul(e, A) r = Relu(a) [last] y = MatMul(r, B)"
    weights = {
        "table": random_weights(40, 20),
        "A": random_weights(20, 20, seed=1),
        "B": random_weights(20, 16, seed=2),
    }
    body = body.replace("a = MatMul", "s = Relu(e) [first] a = MatMul").replace("(e, A)", "(s, A)")
    return graph_model(text(body, ins="int64[N] rows"), weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["table", "A", "B"]),
        ({"tables": False}, ["A", "B"]),
        ({"skip": ("A",)}, ["table", "B"]),
        ({"include": ("A",)}, ["A"]),
        ({"include": ("fir*", "tab?e")}, ["table", "A"]),
        ({"include": ("last",), "skip": ("B",)}, []),
    ],
)
def test_weights_are_named_by_themselves_or_by_their_nodes(options: dict[str, Any], expected: list[str]):
    changes = low_rank(named(), **options)

    assert split(changes) == expected
    assert {left.where for left in changes.left if left.why == "excluded"} == {"table", "A", "B"} - set(expected)


def test_nodes_that_every_pass_leaves():
    changes = low_rank(named(), Context(exclude=("fir*",)))

    assert split(changes) == ["table", "B"]
    assert {left.where: left.why for left in changes.left} == {"A": "excluded"}


def test_a_form_whose_extra_is_missing_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcomp_passes.low_rank.find_spec", lambda name: None)
    LowRank(conv="spatial", rank=4)
    with pytest.raises(OptionError, match=r"needs TensorLy: pip install 'onnxcomp\[low-rank\]'"):
        LowRank(conv="tucker", rank=4)
    with pytest.raises(OptionError, match="TensorLy"):
        LowRank(ranks=("W=tucker:4x4",))


def test_a_stage_tells_what_holds_for_the_whole_model_before_what_holds_for_one_weight() -> None:
    weights = {"W": random_weights(64, 64), "V": random_weights(64, 2), "U": random_weights(2, 64)}
    text = "g (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, W) r = Relu(h) m = MatMul(r, V) y = MatMul(m, U) }"
    [entry] = optimize(graph_model(text, weights), passes=[LowRank()]).report.stages
    assert (entry.verdict, entry.reason) == (
        "unchanged",
        "how much may go is measured on data; give --data, or ratio=RATIO",
    )
