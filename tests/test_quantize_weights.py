from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.budget import Budget
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import QuantizeWeights
from onnxcomp_passes._stored import decode, encode, find_stored, output_channel_axis
from tests.models import (
    assert_same_outputs,
    graph_model,
    matmul_model,
    mlp_model,
    ops,
    random_inputs,
    random_weights,
    run,
)

Array = np.ndarray[Any, Any]

HALF_STEP = 0.5 + 1e-4
"""Of a scale: rounding to nearest, and float32 rounding of quotient and product (127 * 2 * 6e-8, ten times over)."""

KINDS: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "Conv": (
        "g (float[N, 4, 8, 8] x) => (float[N, 24, 6, 6] y) { y = Conv(x, W) }",
        {"W": (24, 4, 3, 3)},
        (24, 1, 1, 1),
    ),
    "grouped Conv": (
        "g (float[N, 4, 8, 8] x) => (float[N, 32, 6, 6] y) { y = Conv<group = 4>(x, W) }",
        {"W": (32, 1, 3, 3)},
        (32, 1, 1, 1),
    ),
    "ConvTranspose": (
        "g (float[N, 4, 5, 5] x) => (float[N, 24, 7, 7] y) { y = ConvTranspose(x, W) }",
        {"W": (4, 24, 3, 3)},
        (1, 24, 1, 1),
    ),
    "Gemm": ("g (float[N, 24] x) => (float[N, 30] y) { y = Gemm(x, W, b) }", {"W": (24, 30), "b": (30,)}, (1, 30)),
    "Gemm transB": ("g (float[N, 24] x) => (float[N, 30] y) { y = Gemm<transB = 1>(x, W) }", {"W": (30, 24)}, (30, 1)),
    "Gemm A": ("g (float[24, 5] x) => (float[30, 5] y) { y = Gemm(W, x) }", {"W": (30, 24)}, (30, 1)),
    "Gemm transA": ("g (float[24, 5] x) => (float[30, 5] y) { y = Gemm<transA = 1>(W, x) }", {"W": (24, 30)}, (1, 30)),
    "MatMul": ("g (float[N, 24] x) => (float[N, 30] y) { y = MatMul(x, W) }", {"W": (24, 30)}, (1, 30)),
    "MatMul of a stack": (
        "g (float[3, 2, 24] x) => (float[3, 2, 30] y) { y = MatMul(x, W) }",
        {"W": (3, 24, 30)},
        (1, 1, 30),
    ),
    "MatMul A": ("g (float[24, 5] x) => (float[30, 5] y) { y = MatMul(W, x) }", {"W": (30, 24)}, (30, 1)),
    "Gather": ("g (int64[N] i) => (float[N, 24] y) { y = Gather(W, i) }", {"W": (30, 24)}, (30, 1)),
    "LSTM": (
        "g (float[5, N, 8] x) => (float[5, 1, N, 16] y) { y = LSTM<hidden_size = 16>(x, W, R) }",
        {"W": (1, 64, 8), "R": (1, 64, 16)},
        (1, 64, 1),
    ),
    "GRU": (
        "g (float[5, N, 8] x) => (float[5, 2, N, 16] y)"
        '{ y = GRU<hidden_size = 16, direction = "bidirectional">(x, W, R) }',
        {"W": (2, 48, 8), "R": (2, 48, 16)},
        (1, 48, 1),
    ),
    "RNN": (
        "g (float[5, N, 8] x) => (float[5, 1, N, 32] y) { y = RNN<hidden_size = 32>(x, W, R) }",
        {"W": (1, 32, 8), "R": (1, 32, 32)},
        (1, 32, 1),
    ),
}
"""Operator -> its graph, the shapes of its weights, and the shape of W's scale."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as running:
        yield running


def stored(source: onnx.ModelProto | Model, context: Context | None = None, **options: Any) -> tuple[Model, Changes]:
    """Apply the pass."""
    model = Model.load(source)
    changes = QuantizeWeights(**options).rewrite(model, context or Context())
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def changed(changes: Changes) -> list[str]:
    return [change.where for change in changes.changed]


def left(changes: Changes) -> dict[str, str]:
    return {item.where: item.why for item in changes.left}


def decoded(model: Model, name: str = "W") -> tuple[Array, Array]:
    """A stored weight as it is decoded, and its scale."""
    form = find_stored(next(t for node in model.graph.nodes for t in node.outputs if t.name == name))
    assert form is not None
    return decode(form), np.asarray(form.scale.values)


# --- every kind of weight ---------------------------------------------------------------------------------------------

every_kind = pytest.mark.parametrize("kind", KINDS)


def kind_model(kind: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    text, shapes, _ = KINDS[kind]
    weights = {name: random_weights(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    return graph_model(text, weights), weights


@every_kind
def test_each_value_is_off_by_half_a_step_of_its_channel_at_most(kind: str):
    proto, weights = kind_model(kind)

    model, changes = stored(proto)

    assert changed(changes) == [name for name in weights if name != "b"]
    for name in changed(changes):
        values, scale = decoded(model, name)
        assert np.all(np.abs(weights[name] - values) <= HALF_STEP * scale)
    values, scale = decoded(model)
    assert scale.shape == KINDS[kind][2]
    assert model.size_bytes < Model.load(proto).size_bytes


@every_kind
def test_the_runtime_computes_with_the_decoded_weight(kind: str):
    proto, _ = kind_model(kind)
    model, changes = stored(proto)
    plain = Model.load(proto)
    for name in changed(changes):
        plain.set_weight(name, decoded(model, name)[0])

    assert_same_outputs(plain, model, random_inputs(proto), exact=True)


@every_kind
def test_the_runtime_decodes_at_load_and_not_at_each_run(kind: str, runtime: Runtime, tmp_path: Path):
    proto, _ = kind_model(kind)
    model, changes = stored(proto, Context(runtime=runtime, workdir=tmp_path))
    Model.load(proto).save(tmp_path / "before.onnx")
    model.save(tmp_path / "after.onnx")

    before, after = (runtime.census(tmp_path / name) for name in ("before.onnx", "after.onnx"))

    assert changes.count
    assert not {"Cast", "Mul"} & after.counts().keys()
    assert after.counts() == before.counts()
    assert after.initializer_bytes == before.initializer_bytes


@every_kind
def test_one_scale_a_weight_when_asked(kind: str):
    proto, weights = kind_model(kind)

    model, _ = stored(proto, per_channel=False)

    values, scale = decoded(model)
    assert scale.size == 1
    assert np.all(np.abs(weights["W"] - values) <= HALF_STEP * scale)


def test_every_operator_that_the_pass_knows_is_tested():
    tested = {kind.split()[-1] if kind.startswith("grouped") else kind.split()[0] for kind in KINDS}

    assert tested == {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN"}


# --- encoding ---------------------------------------------------------------------------------------------------------

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1.0, 1.0, width=32),
)


@given(weight=WEIGHTS, axis=st.sampled_from([None, 0, 1]), limit=st.sampled_from([63, 127]))
def test_encodes_to_the_nearest_code(weight: Array, axis: int | None, limit: int):
    codes, scale = encode(weight, axis, limit=limit)

    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max() <= limit
    assert np.all(scale > 0)
    error = np.abs(weight.astype(np.float64) - codes * scale.astype(np.float64))
    assert np.all(error <= np.maximum(HALF_STEP * scale, 2e-36) * (np.abs(weight) > 0))


def test_channels_of_zeros_stay_zeros():
    weight = random_weights(16, 20)
    weight[:, 3] = 0

    model, _ = stored(matmul_model(weight))

    values, scale = decoded(model)
    assert scale[0, 3] == 1.0
    np.testing.assert_array_equal(values[:, 3], 0)


def test_a_weight_of_zeros_stays_zeros():
    model, changes = stored(matmul_model(np.zeros((16, 20), np.float32)))

    assert changes.count == 1
    np.testing.assert_array_equal(decoded(model)[0], 0)


def test_small_and_large_channels_keep_their_own_precision():
    weight = random_weights(16, 20) * (10.0 ** np.arange(-10, 10)).astype(np.float32)

    model, _ = stored(matmul_model(weight))

    error = np.linalg.norm(decoded(model)[0] - weight, axis=0) / np.linalg.norm(weight, axis=0)
    assert error.max() < 0.01


def test_bias_and_what_is_no_weight_have_no_channel_axis():
    model = Model.load(graph_model("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"))

    assert output_channel_axis(model.graph.nodes[0], 0, 2) is None


# --- who reads the weight ---------------------------------------------------------------------------------------------


def test_a_shared_weight_is_stored_once():
    text = "g (float[N, 24] x) => (float[N, 24] y) { h = MatMul(x, W) y = MatMul(h, W) }"
    proto = graph_model(text, W=random_weights(24, 24, scale=0.2))

    model, changes = stored(proto)

    assert changed(changes) == ["W"]
    assert ops(model) == ["Cast", "Mul", "MatMul", "MatMul"]


def test_tied_embeddings_are_stored_once_and_read_by_both():
    text = """g (int64[N] i) => (float[N, 40] y) {
        e = Gather(W, i)
        t = Transpose<perm = [1, 0]>(W)
        y = MatMul(e, t)
    }"""
    proto = graph_model(text, W=random_weights(40, 24))

    model, changes = stored(proto)

    assert changed(changes) == ["W"]
    plain = Model.load(proto)
    plain.set_weight("W", decoded(model)[0])
    assert_same_outputs(plain, model, {"i": np.array([0, 7, 39])}, exact=True)


def test_a_weight_that_other_operators_read_too_serves_all():
    text = "g (float[N, 24] x) => (float[N, 24] y, float[24, 24] z) { y = MatMul(x, W) z = Neg(W) }"
    proto = graph_model(text, W=random_weights(24, 24))

    model, _ = stored(proto)

    np.testing.assert_array_equal(run(model, random_inputs(proto))[1], -decoded(model)[0])


def test_a_weight_that_a_subgraph_captures_is_decoded_for_both():
    text = """g (bool c, float[N, 24] x) => (float[N, 24] z) {
        y = MatMul(x, W)
        z = If(c) <
            then_branch = yes () => (float[N, 24] a) { a = MatMul(y, W) },
            else_branch = no () => (float[N, 24] b) { b = Identity(y) }
        >
    }"""
    proto = graph_model(text, W=random_weights(24, 24, scale=0.2))

    model, changes = stored(proto)

    assert changed(changes) == ["W"]
    plain = Model.load(proto)
    plain.set_weight("W", decoded(model)[0])
    for condition in (True, False):
        feeds = {**random_inputs(proto), "c": np.array(condition)}
        assert_same_outputs(plain, model, feeds)


# --- left alone -------------------------------------------------------------------------------------------------------


def only_left(proto: onnx.ModelProto, **options: Any) -> dict[str, str]:
    """Why the weights were left alone; the model must be as it was."""
    model, changes = stored(proto, **options)
    assert changes.count == 0
    assert model.to_proto() == proto
    return left(changes)


def matmul_proto(weight: Array, kind: str = "float", more: str = "") -> onnx.ModelProto:
    rows, columns = weight.shape
    text = f"g ({kind}[N, {rows}] x) => ({kind}[N, {columns}] y{more}) {{ y = MatMul(x, W) }}"
    return graph_model(text, W=weight)


def test_leaves_a_weight_that_is_a_graph_output():
    assert only_left(matmul_proto(random_weights(24, 24), more=", float[24, 24] W")) == {"W": "is a graph output"}


def test_leaves_a_tiny_weight():
    assert only_left(matmul_proto(random_weights(8, 15))) == {"W": "has fewer than 128 elements"}


def test_leaves_a_weight_whose_scales_and_nodes_would_outweigh_it():
    reason = "too small for int8 codes, scales and two nodes to be smaller"

    assert only_left(matmul_proto(random_weights(1, 200))) == {"W": reason}
    assert only_left(matmul_proto(random_weights(4, 4)), min_elements=1) == {"W": reason}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_leaves_a_weight_that_is_not_finite(bad: float):
    weight = random_weights(24, 24)
    weight[3, 4] = bad

    assert only_left(matmul_proto(weight)) == {"W": "holds NaN or infinity"}


@pytest.mark.parametrize(("dtype", "kind"), [(np.float16, "float16"), (np.float64, "double")])
def test_leaves_other_floats(dtype: Any, kind: str):
    proto = matmul_proto(random_weights(24, 24).astype(dtype), kind)

    assert only_left(proto) == {"W": f"is {np.dtype(dtype)}, not float32"}


def test_leaves_whole_numbers():
    proto = graph_model("g (int64[N] i) => (int64[N, 24] y) { y = Gather(W, i) }", W=np.ones((30, 24), np.int64))

    assert only_left(proto) == {"W": "not a float"}


def test_leaves_a_weight_of_a_subgraph():
    text = """g (bool c, float[N, 24] x) => (float[N, 24] z) {
        z = If(c) <
            then_branch = yes () => (float[N, 24] a) <float[24, 24] V> { a = MatMul(x, V) },
            else_branch = no () => (float[N, 24] b) { b = Identity(x) }
        >
    }"""
    proto = graph_model(text.replace("<float[24, 24] V> ", ""))
    weight = onnx.numpy_helper.from_array(random_weights(24, 24), "V")
    next(a for a in proto.graph.node[0].attribute if a.name == "then_branch").g.initializer.append(weight)

    assert only_left(proto) == {"a": "the MatMul is in a body of If, Loop or Scan"}


def test_leaves_a_weight_that_the_caller_may_feed():
    proto = matmul_proto(random_weights(24, 24))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [24, 24]))

    assert only_left(proto) == {}


@pytest.mark.parametrize("excluded", [{"skip": ("W0", "W1")}, {"context": Context(exclude=("h0", "y"))}])
def test_leaves_what_the_user_excludes(excluded: dict[str, Any]):
    assert only_left(mlp_model((24, 24, 24)), **excluded) == {"W0": "excluded", "W1": "excluded"}


def test_leaves_biases_and_a_bias_is_no_reason_to_speak():
    _, changes = stored(mlp_model((16, 400, 16)))

    assert (changed(changes), left(changes)) == (["W0", "W1"], {})


def test_puts_back_a_weight_that_the_runtime_does_not_fold(tmp_path: Path):
    class StubRuntime:
        """Folds nothing."""

        def census(self, path: Path) -> Any:
            with Runtime() as runtime:
                return runtime.census(path, optimize=False)

    runtime: Any = StubRuntime()
    proto = mlp_model((24, 24, 24))

    found = only_left(proto, context=Context(runtime=runtime, workdir=tmp_path))

    assert found == dict.fromkeys(["W0", "W1"], "ONNX Runtime does not fold its decoding")


def test_a_weight_that_costs_too_much_gets_its_exact_values_back():
    class StubJudge:
        """Allows W0 to be rounded and W1 not."""

        timed = False
        original_bytes = 1
        budget = Budget()

        def quality(self, model: Model) -> Any:
            return SimpleNamespace(kind="metric", model=model)

        def allows(self, quality: Any, share: float) -> bool:
            assert 0 < share <= 1
            constants = {constant.name: constant for constant in quality.model.constants()}
            return "W1" in constants and np.array_equal(value_of(constants["W1"]), weights["W1"])

        def rough_error(self, model: Model) -> float:
            return 0.1 if "W1" in {constant.name for constant in model.constants()} else 0.2

        def forget(self, model: Model) -> None:
            """Nothing was written."""

    proto = mlp_model((24, 24, 24))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    judge: Any = StubJudge()

    model, changes = stored(proto, Context(judge=judge))

    assert (changed(changes), left(changes)) == (["W0"], {"W1": "costs too much accuracy"})
    assert changes.resolved == {"choose": False, "skip": ["W1"]}
    np.testing.assert_array_equal(model.weight("W1"), weights["W1"])


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_file_shrinks_to_a_quarter():
    proto = mlp_model((128, 256, 256, 64))

    model, _ = stored(proto)

    assert 3.7 < Model.load(proto).size_bytes / model.size_bytes < 4


def test_a_second_time_changes_nothing():
    model, _ = stored(mlp_model((24, 32, 24)))
    digest = model.digest

    _, again = stored(model)

    assert again.count == 0
    assert model.digest == digest


def test_names_that_are_taken_are_not_used_again():
    text = "g (float[N, 24] q) => (float[N, 24] y) { q.0 = Relu(q) s.0 = Neg(q.0) c.0 = Relu(s.0) y = MatMul(c.0, W) }"
    proto = graph_model(text.replace(".0", "_0"), W=random_weights(24, 24))
    for node in proto.graph.node:
        node.input[:] = [name.replace("_0", ".0") for name in node.input]
        node.output[:] = [name.replace("_0", ".0") for name in node.output]

    model, changes = stored(proto)

    assert changes.count == 1
    onnx.checker.check_model(model.to_proto(), full_check=True)
