"""What `low-rank` makes of factors: ranks that fall in steps, as if the weight that factors make had been split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp import Result, optimize
from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Distill, LowRank
from tests.models import Array, graph_model, random_inputs, random_weights, run
from tests.thin_weights import dense_kernel, fading, weights_of
from tests.training import LENET, arrays

SUM_ROUNDING = 3e-5
"""Relative to the largest output: sums of products in another order, with float32 weights on either side."""

FACTORS = "is one of several factors already"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def text(body: str, *, ins: str = "float[N, 24] x", outs: str = "float[N, 16] y") -> str:
    return f"g ({ins}) => ({outs}) {{ {body} }}"


def split(source: onnx.ModelProto | Model, context: Context | None = None, **options: Any) -> tuple[Model, Changes]:
    """The model after the pass, checked, and what it said."""
    model = Model.load(source)
    changes = LowRank(**{"min_elements": 1, **options}).rewrite(model, context or Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def ranks(changes: Changes) -> dict[str, str]:
    return dict(each.rsplit("=", 1) for each in changes.resolved.get("ranks", []))


def left(changes: Changes) -> dict[str, str]:
    return {each.where: each.why for each in changes.left}


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.to_proto().graph.node]


def same_outputs(first: Any, second: Any, feeds: Mapping[str, Any], rounding: float = SUM_ROUNDING) -> None:
    for wanted, got in zip(run(first, feeds), run(second, feeds), strict=True):
        assert wanted.shape == got.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=rounding * float(np.abs(wanted).max()))


def unchanged(model: Model, context: Context | None = None, **options: Any) -> Changes:
    """What the pass says of a model that it leaves exactly as it is."""
    again, changes = split(model, context, **options)
    assert changes.count == 0
    assert not changes.resolved
    assert again.digest == model.digest
    return changes


# --- the layers -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, dict[str, Array]]] = {
    "a product": ("float[N, 24] x", "y = MatMul(x, W)", {"W": fading(24, 16)}),
    "a product on the left": ("float[24, 5] x", "y = MatMul(W, x)", {"W": fading(16, 24)}),
    "a product with a bias": ("float[N, 24] x", "m = MatMul(x, W) y = Add(m, b)", {"W": fading(24, 16)}),
    "a stack of products": (
        "float[2, 3, 5, 24] x",
        "y = MatMul(x, W)",
        {"W": np.stack([fading(24, 16, seed=each) for each in range(3)])},
    ),
    "a Gemm": ("float[N, 24] x", "y = Gemm(x, W, b)", {"W": fading(24, 16)}),
    "a Gemm with rows of outputs": ("float[N, 24] x", "y = Gemm<transB = 1>(x, W, b)", {"W": fading(16, 24)}),
    "a Gemm with columns of inputs": ("float[24, 6] x", "y = Gemm<transA = 1>(x, W, b)", {"W": fading(24, 16)}),
    "a scaled Gemm": ("float[N, 24] x", "y = Gemm<alpha = 0.5, beta = 2.0>(x, W, b)", {"W": fading(24, 16)}),
    "a table": ("int64[N, 3] x", "y = Gather(W, x)", {"W": fading(40, 16)}),
}
"""Inputs, what is computed, and its weight; where there is a bias it has 16 numbers."""


def layer(name: str) -> onnx.ModelProto:
    ins, body, weights = LAYERS[name]
    more = {"b": random_weights(16)} if " b)" in body else {}
    proto = graph_model(text(body, ins=ins), {**weights, **more})
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto)


def feed_of(proto: onnx.ModelProto) -> dict[str, Array]:
    if proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64:
        return {"x": np.random.default_rng(0).integers(-40, 40, (4, 3))}
    return random_inputs(proto)


@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_a_high_rank_become_those_that_the_weight_has_at_a_low_one(name: str):
    proto = layer(name)
    at_once, _ = split(proto, rank=3)
    high, _ = split(proto, rank=8)  # fading weights: the best of rank 3 are the same, whether they are cut at 8 or not

    low, changes = split(high, rank=3)

    assert ranks(changes) == {"W": "svd:3"}
    assert ops(low) == ops(at_once)
    assert weights_of(low) == weights_of(at_once) < weights_of(high)
    same_outputs(at_once, low, feed_of(proto))


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_rank_twice_changes_nothing_and_neither_does_a_larger_one(name: str):
    thin, _ = split(layer(name), rank=4)

    for rank in (4, 5, 16):
        assert left(unchanged(thin, rank=rank)) == {
            "W": f"rank {rank} has no fewer weights: two matrices pay below rank 4"
        }


CONVS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "3x3": ("pads = [1, 1, 1, 1]", (24, 16, 3, 3), (2, 16, 7, 8)),
    "strides and dilations": (
        "pads = [1, 0, 1, 2], strides = [2, 1], dilations = [1, 2]",
        (24, 16, 3, 3),
        (2, 16, 9, 8),
    ),
    "same": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (24, 16, 3, 3), (2, 16, 7, 8)),
    "groups": ("group = 2, pads = [1, 1, 1, 1]", (24, 12, 3, 3), (2, 24, 7, 8)),
    "1x1": ("strides = [2, 2]", (24, 16, 1, 1), (2, 16, 7, 8)),
    "one axis": ("pads = [1, 1]", (24, 16, 3), (2, 16, 9)),
}


def conv(name: str, *, bias: bool = True) -> onnx.ModelProto:
    told, shape, given_shape = CONVS[name]
    ends = ", ".join("ABC"[: len(shape) - 2])
    ins, outs = f"float[{', '.join(map(str, given_shape))}] x", f"float[2, {shape[0]}, {ends}] y"
    body = f"y = Conv<{told}>(x, W{', b' if bias else ''})"
    more = {"b": random_weights(shape[0], seed=1)} if bias else {}
    return graph_model(text(body, ins=ins, outs=outs), {"W": random_weights(*shape), **more})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["svd", "spatial"])
@pytest.mark.parametrize("name", CONVS)
def test_a_chain_of_convs_becomes_that_of_a_lower_rank(name: str, form: str, bias: bool):
    if form == "spatial" and name in {"1x1", "one axis"}:
        pytest.skip("has no such form")
    proto = conv(name, bias=bias)
    at_once, _ = split(proto, rank=2, conv=form)
    high, _ = split(proto, rank=7, conv=form)

    low, changes = split(high, rank=2, conv=form)

    assert ranks(changes) == {"W": f"{form}:2"}
    assert weights_of(low) == weights_of(at_once)
    same_outputs(at_once, low, random_inputs(proto))
    unchanged(low, rank=2, conv=form)
    unchanged(high, rank=7, conv=form)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("name", ["3x3", "strides and dilations", "groups", "one axis"])
def test_a_chain_of_convs_in_one_form_may_take_another(name: str, form: str):
    proto = conv(name)
    high, _ = split(proto, rank=6, conv=form)
    whole = Model.load(proto)
    whole.set_weight("W", dense_kernel(high, CONVS[name][1]))
    same_outputs(whole, high, random_inputs(proto))

    low, changes = split(high, rank=1, conv="svd")

    assert ranks(changes) == {"W": "svd:1"}
    assert weights_of(low) < weights_of(high)
    same_outputs(split(whole, rank=1, conv="svd")[0], low, random_inputs(proto))


def test_a_conv_chain_that_someone_else_made_is_split_as_well():
    body = "t = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, A) y = Conv(t, B, b)"
    weights = {"A": random_weights(8, 12, 3, 3), "B": random_weights(16, 8, 1, 1), "b": random_weights(16)}
    proto = graph_model(text(body, ins="float[1, 12, 6, 6] x", outs="float[1, 16, 3, 3] y"), weights)
    kernel = np.einsum("oi,icyx->ocyx", weights["B"][:, :, 0, 0], weights["A"])
    whole = graph_model(
        text("y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, W, b)", ins="float[1, 12, 6, 6] x",
             outs="float[1, 16, 3, 3] y"),
        W=kernel, b=weights["b"],
    )  # fmt: skip

    low, changes = split(proto, rank=3, conv="svd")

    assert ranks(changes) == {"A*B": "svd:3"}
    same_outputs(split(whole, rank=3, conv="svd")[0], low, random_inputs(proto))


# --- several readers --------------------------------------------------------------------------------------------------


def test_factors_that_two_layers_read_are_split_once():
    body = "a = MatMul(x, W) r = Relu(z) b = MatMul(r, W) y = Add(a, b)"
    proto = graph_model(text(body, ins="float[N, 24] x, float[N, 24] z"), W=fading(24, 16))
    high, _ = split(proto, rank=8)

    low, changes = split(high, rank=3)

    assert changes.count == 1
    assert weights_of(low) == 3 * 40
    same_outputs(split(proto, rank=3)[0], low, random_inputs(proto))


def projections(op: str) -> onnx.ModelProto:
    body = f"n = Relu(x) q0 = {op}(n, Q) k0 = {op}(n, K) v0 = {op}(n, V) q = Add(q0, b) k = Relu(k0) v = Tanh(v0)"
    joint = fading(24, 16 + 16 + 20, power=1.5)
    weights = dict(zip("QKV", np.split(joint, [16, 32], axis=1), strict=True))
    outs = "float[N, 16] q, float[N, 16] k, float[N, 20] v"
    return graph_model(text(body, outs=outs), {**weights, "b": random_weights(16)})


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_projections_with_the_first_factor_in_common_keep_it_so(op: str):
    proto = projections(op)
    high, _ = split(proto, rank=8)
    assert weights_of(high) == 8 * (24 + 52)

    low, changes = split(high, rank=3)

    assert ranks(changes) == {"Q+K+V": "svd:3"}
    assert weights_of(low) == 3 * (24 + 52)
    same_outputs(split(proto, rank=3)[0], low, random_inputs(proto))
    unchanged(low, rank=3)
    unchanged(high, ratio=1.5)


def test_of_projections_in_common_none_is_split_if_one_is_to_stay():
    high, _ = split(projections("MatMul"), rank=8)

    assert set(left(unchanged(high, rank=3, skip=("K",))).values()) <= {FACTORS, "excluded"}


@pytest.mark.parametrize(
    ("more", "outs"),
    [("", "float[N, 16] y, float[N, 9] t"), ("u = Relu(t)", "float[N, 16] y, float[N, 9] u")],
)
def test_what_is_between_factors_may_not_be_read_elsewhere(more: str, outs: str):
    body = f"t = MatMul(x, A) y = MatMul(t, B) {more}"
    proto = graph_model(text(body, outs=outs), A=random_weights(24, 9), B=random_weights(9, 16))

    changes = left(unchanged(Model.load(proto), rank=3, skip=("A",)))

    assert changes["B"] == f"{FACTORS}, and what they are or have between them is read elsewhere too"


@pytest.mark.parametrize(
    "body",
    [
        "t = MatMul(x, A) y0 = MatMul(t, B) z = Relu(x) u = MatMul(z, A) y1 = MatMul(u, C) y = Add(y0, y1)",
        "t = MatMul(x, A) y0 = MatMul(t, B) z = MatMul(x, C) u = MatMul(z, B) y = Add(y0, u)",
        "t = MatMul(x, A) u = Relu(t) v = MatMul(u, B) r = MatMul(x, A) y0 = MatMul(r, C) y = Add(v, y0)",
    ],
)
def test_factors_may_not_be_those_of_other_weights(body: str):
    sizes = {"A": (24, 9), "B": (9, 16), "C": (24, 9) if "(x, C)" in body else (9, 16)}
    weights = {name: random_weights(*size, seed=seed) for seed, (name, size) in enumerate(sizes.items())}
    proto = graph_model(text(body), weights)

    changes = unchanged(Model.load(proto), ratio=1.01, include=("A*B", "A*C", "C*B"))

    assert all(why == "excluded" or why.startswith(FACTORS) for why in left(changes).values())


NO_WEIGHT = {
    "three": "t = MatMul(x, A) u = MatMul(t, B) y = MatMul(u, C)",
    "a scaled first": "t = Gemm<alpha = 0.5>(x, A) u = Gemm(t, B) v = Relu(u) y = MatMul(v, C)",
    "two kinds": "t = MatMul(x, A) u = Gemm(t, B) v = Relu(u) y = MatMul(v, C)",
    "two kernels": "p = Conv(c, K) q = Conv(p, L) y = Relu(x)",
    "strides behind": "p = Conv(c, K) q = Conv<strides = [2, 2]>(p, M) y = Relu(x)",
}


@pytest.mark.parametrize("case", NO_WEIGHT)
def test_factors_that_do_not_make_one_weight_stay(case: str):
    body = NO_WEIGHT[case]
    convs = {"K": (8, 8, 3, 3), "L": (8, 8, 3, 3), "M": (8, 8, 1, 1)}
    sizes = {"A": (24, 9), "B": (9, 12), "C": (12, 16), **convs}
    weights = {name: random_weights(*size) for name, size in sizes.items() if f", {name})" in body}
    ins, outs = (
        "float[N, 24] x, float[1, 8, 9, 9] c",
        "float[N, J] y" + (", float[1, 8, O, P] q" if "q" in body else ""),
    )

    model = Model.load(graph_model(text(body, ins=ins, outs=outs), weights))

    changes = unchanged(model, rank=3, skip=("C",))

    assert f"{FACTORS}, which do not make one weight" in left(changes).values()


# --- how much ---------------------------------------------------------------------------------------------------------


def network(powers: tuple[float, ...] = (0.5, 1, 2), side: int = 64) -> onnx.ModelProto:
    """Products, biases and Relus in turn."""
    lines, source = [], "x"
    weights: dict[str, Array] = {}
    for number, power in enumerate(powers):
        weights |= {f"W{number}": fading(side, side, power, seed=number), f"b{number}": random_weights(side, scale=0.3)}
        lines.append(f"m{number} = MatMul({source}, W{number}) h{number} = Add(m{number}, b{number})")
        source = f"r{number}"
        lines.append(f"{source} = Relu(h{number})")
    body = " ".join(lines) + f" y = Identity({source})"
    return graph_model(text(body, ins=f"float[N, {side}] x", outs=f"float[N, {side}] y"), weights)


@pytest.mark.parametrize(("first", "second"), [(1.3, 1.6), (1.5, 2.0), (2.0, 6.0)])
def test_a_ratio_counts_from_the_weights_that_factors_make(first: float, second: float):
    proto = network()
    high, _ = split(proto, ratio=first)

    low, changes = split(high, ratio=second)

    assert second <= weights_of(proto) / weights_of(low) <= 1.1 * second
    assert f"{weights_of(proto) / weights_of(low):.2f} times fewer weights in the whole model" in changes.notes


@settings(max_examples=20, deadline=None)
@given(st.floats(1.1, 40), st.lists(st.floats(0.1, 3), min_size=1, max_size=4), st.integers(12, 80))
def test_the_same_ratio_twice_changes_nothing(ratio: float, powers: list[float], side: int):
    thin, changes = split(network(tuple(powers), side), ratio=ratio)

    if changes.count:
        unchanged(thin, ratio=ratio)


def test_a_ratio_that_is_reached_is_told():
    thin, _ = split(network(), ratio=2.0)

    assert left(unchanged(thin, ratio=1.5))["the model"].endswith("times fewer weights already")


def test_weights_that_a_ratio_does_not_need_stay_bit_for_bit():
    proto = network((0.1, 2.5, 2.5))
    high, _ = split(proto, ranks=("W0=svd:30", "W1=svd:20", "W2=svd:20"))
    before = {tensor.name: tensor.raw_data for tensor in high.to_proto().graph.initializer}

    low, changes = split(high, ratio=1.9)

    assert "W0" not in ranks(changes)
    assert ranks(changes)
    after = {tensor.name: tensor.raw_data for tensor in low.to_proto().graph.initializer}
    assert {name for name in before if name.startswith("W0")} == {name for name in after if name.startswith("W0")}
    assert all(after[name] == before[name] for name in before if name.startswith("W0"))


def test_of_a_pair_that_is_thinner_than_the_rank_asked_for_and_one_that_is_not_the_second_is_split():
    high, _ = split(network((1, 1)), ranks=("W0=svd:4", "W1=svd:20"))

    low, changes = split(high, rank=8)

    assert ranks(changes) == {"W1": "svd:8"}
    assert left(changes) == {"W0": "rank 8 has no fewer weights: two matrices pay below rank 4"}
    assert weights_of(low) == (4 + 8) * 128
    assert all(
        np.array_equal(low.weight(name), high.weight(name))
        for name in (tensor.name for tensor in high.to_proto().graph.initializer)
        if name.startswith("W0")
    )


def test_whole_weights_and_factors_share_one_ratio():
    proto = network((1, 1, 1))
    half, _ = split(proto, ranks=("W0=svd:24",))

    low, changes = split(half, ratio=4.0)

    assert set(ranks(changes)) == {"W0", "W1", "W2"}
    assert weights_of(proto) / weights_of(low) >= 4.0


@pytest.mark.parametrize("options", [{}, {"energy": 0.3}])
def test_factors_stay_where_no_amount_of_weights_is_asked_for(options: dict[str, Any]):
    thin, _ = split(network(), rank=20)

    assert set(left(unchanged(thin, **options)).values()) == {FACTORS}


def test_what_was_done_can_be_done_again():
    high, _ = split(network(), ratio=1.5)
    low, changes = split(high, ratio=3.0)

    options = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.resolved.items()}
    again, _ = split(high, None, **options)

    assert again.digest == low.digest


def test_the_table_compares_with_the_factors_that_were_there():
    high, _ = split(network((1,)), rank=20)

    _, changes = split(high, rank=8)

    [row] = changes.tables[0].rows
    told = dict(itertools.zip_longest(changes.tables[0].columns[:7], row[:7]))
    assert (told["layer"], told["rank"], told["bytes"]) == ("W0", "8", 8 * 128 * 4)
    assert row[7] == 20 * 128 * 4
    assert changes.changed[0].what == "rank 8, 1,024 weights in place of 2,560"


def test_nodes_that_every_pass_leaves_are_not_split_anew():
    high, _ = split(network((1, 1)), rank=20)
    first, second, *_ = [node.name or node.outputs[0].name for node in high.fork().graph.nodes if node.op == "MatMul"]

    for name in (first, second):
        assert ranks(split(high, Context(exclude=(name,)), rank=8)[1]) == {"W1": "svd:8"}


# --- with data --------------------------------------------------------------------------------------------------------


def test_with_data_factors_are_fitted_to_what_the_factored_layers_give(runtime: Runtime, tmp_path: Path):
    proto = network((0.7, 0.7), side=32)
    rng = np.random.default_rng(0)
    samples = (rng.normal(size=(600, 8)) @ rng.normal(size=(8, 32)) + 0.1 * rng.normal(size=(600, 32))).astype("f4")
    data = open_data({"x": samples}, input_specs(proto))
    context = Context(data=data, runtime=runtime, workdir=tmp_path)
    high, _ = split(proto, context, rank=14)

    low, changes = split(high, context, rank=8)
    plain, _ = split(high, rank=8)

    assert ranks(changes) == {"W0": "svd:8", "W1": "svd:8"}
    [wanted], [got], [other] = (run(model, {"x": samples}) for model in (high, low, plain))
    error, without = (np.linalg.norm(each - wanted) / np.linalg.norm(wanted) for each in (got, other))
    assert error < 0.5 * without
    unchanged(low, context, rank=8)


# --- with training between --------------------------------------------------------------------------------------------

AS_GOOD = 1.1
"""Times the error of one step; both are trained equally often, and seeds alone move it by some percent."""


def test_ranks_fall_in_steps_with_training_between():
    training = Distill(epochs=10.0, batch_size=16)

    def made(*amounts: LowRank) -> Result:
        passes = [each for amount in amounts for each in (amount, training)]
        return optimize(LENET, data=arrays(400), passes=passes, force=True, resume=False, timing=False)

    first, steps = made(LowRank(ratio=2.0)), made(LowRank(ratio=2.0), LowRank(ratio=6.0))
    once = made(LowRank(ratio=6.0))

    original = Model.load(LENET)
    assert 2.0 <= weights_of(original) / weights_of(first.model) <= 2.2
    assert 6.0 <= weights_of(original) / weights_of(steps.model) <= 6.6
    assert ops(steps.model) == ops(once.model)
    unseen = {"image": arrays(1000)["image"][400:]}
    [wanted], [got], [other] = (run(model, unseen) for model in (original, steps.model, once.model))
    assert np.linalg.norm(got - wanted) <= AS_GOOD * np.linalg.norm(other - wanted)

    tables = [stage.attempts[-1].passes[0].tables[0] for stage in steps.report.stages]
    after, before = ({row[0]: row[8 + number] for row in table["rows"]} for number, table in enumerate(tables))
    assert after.keys() & before.keys()
    assert all(before[name] == after[name] for name in after.keys() & before.keys())


def test_factors_of_rank_nothing_are_left_alone():
    first, second = np.zeros((64, 0), np.float32), np.zeros((0, 64), np.float32)
    body = "g (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, A) y = MatMul(h, B) }"
    unchanged(Model.load(graph_model(body, A=first, B=second)), ratio=2.0)
