from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.data import Dataset, input_specs, open_data
from onnxcomp.errors import RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.pipeline import optimize
from onnxcomp.runtime import Runtime
from onnxcomp_passes import QuantizeWeights
from onnxcomp_passes._codes import Width, group, nearest
from onnxcomp_passes._gptq import InputProducts, gptq, output_error
from onnxcomp_passes._hqq import half_quadratic, sparse_error
from tests.models import graph_model, matmul_model, mlp_model, random_weights, run

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as running:
        yield running


def correlated(count: int, features: int, *, seed: int = 0) -> Array:
    """Inputs as layers have them: few directions carry most of the energy."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features // 4, features))
    return (rng.normal(size=(count, features // 4)) @ mixing + 0.1 * rng.normal(size=(count, features))).astype(
        np.float32
    )


def data_for(proto: onnx.ModelProto, x: Array) -> Dataset:
    return open_data({"x": x}, input_specs(proto))


def stored(proto: onnx.ModelProto, context: Context, **options: Any) -> tuple[Model, Changes]:
    """Apply the pass."""
    model = Model.load(proto)
    changes = QuantizeWeights(**options).rewrite(model, context)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


# --- hqq --------------------------------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block=st.sampled_from([0, 16]),
    seed=st.integers(0, 100),
    per_channel=st.booleans(),
)
def test_hqq_is_never_worse_than_nearest_by_its_own_measure(
    bits: int, symmetric: bool, block: int, seed: int, per_channel: bool
):
    weight = np.random.default_rng(seed).standard_t(3, size=(32, 6)).astype(np.float32)
    weight[:, 1] = 0
    weight[:, 2] = 0.5
    grouping, width = group(weight.shape, 1 if per_channel else None, 0, block), Width(bits, symmetric)

    plain, made = nearest(weight, grouping, width), half_quadratic(weight, grouping, width)

    assert np.all(sparse_error(weight, grouping, made) <= sparse_error(weight, grouping, plain))
    assert made.codes.min() >= width.low
    assert made.codes.max() <= width.high
    np.testing.assert_array_equal(made.decode().reshape(weight.shape)[:, 1], 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_gains_where_tails_are_heavy(symmetric: bool):
    weight = np.random.default_rng(0).standard_t(3, size=(512, 32)).astype(np.float32)
    grouping, width = group(weight.shape, None, 0, 64), Width(3, symmetric)

    plain, made = (method(weight, grouping, width) for method in (nearest, half_quadratic))

    assert np.sum(sparse_error(weight, grouping, made)) < 0.9 * np.sum(sparse_error(weight, grouping, plain))


def test_hqq_does_not_depend_on_the_size_of_the_weights():
    weight = random_weights(64, 8)
    grouping = group(weight.shape, 1)

    made, tiny = (half_quadratic(values, grouping, Width(3)) for values in (weight, weight * np.float32(2.0**-30)))

    np.testing.assert_array_equal(made.codes, tiny.codes)


def test_hqq_needs_no_data():
    proto = matmul_model(random_weights(64, 48)).to_proto()

    _, changes = stored(proto, Context(), bits=3, method="hqq")

    assert changes.changed[0].what == "64x48 float32 stored as int3 by hqq (held in 8 bits)"


# --- gptq -------------------------------------------------------------------------------------------------------------


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block=st.sampled_from([0, 16]),
    seed=st.integers(0, 100),
    per_channel=st.booleans(),
)
def test_gptq_is_never_worse_than_nearest_by_its_own_measure(
    bits: int, symmetric: bool, block: int, seed: int, per_channel: bool
):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(48, 5)).astype(np.float32), correlated(20, 48, seed=seed)
    x[:, 3] = 0  # an input that never is anything else
    products = x.T.astype(np.float64) @ x
    grouping, width = group(weight.shape, 1 if per_channel else None, 0, block), Width(bits, symmetric)

    plain, made = nearest(weight, grouping, width), gptq(weight, grouping, width, products)

    assert np.all(output_error(weight, made, products) <= output_error(weight, plain, products))
    assert made.codes.min() >= width.low
    assert made.codes.max() <= width.high
    np.testing.assert_array_equal(made.scale, plain.scale)


@pytest.mark.parametrize("rows", [96, 300])
def test_gptq_halves_the_output_error_on_correlated_inputs(rows: int):
    weight, x = random_weights(rows, 24), correlated(400, rows)
    products = x.T.astype(np.float64) @ x
    grouping = group(weight.shape, 1)

    plain, made = nearest(weight, grouping, Width(4)), gptq(weight, grouping, Width(4), products)

    assert np.sum(output_error(weight, made, products)) < 0.5 * np.sum(output_error(weight, plain, products))


def test_gptq_without_any_input_energy_rounds_to_nearest():
    weight, grouping = random_weights(32, 4), group((32, 4), 1)

    made = gptq(weight, grouping, Width(4), np.zeros((32, 32)))

    np.testing.assert_array_equal(made.codes, nearest(weight, grouping, Width(4)).codes)


def test_products_are_summed_in_constant_memory_and_without_nan():
    x = correlated(64, 16)
    watch = InputProducts()
    for part in np.split(x, 8):
        watch.update(part.reshape(2, 4, 16))
    watch.update(np.full((1, 16), np.nan, np.float32))

    np.testing.assert_allclose(watch.total, x.T.astype(np.float64) @ x, rtol=1e-5, atol=1e-3)
    assert watch.rows == 64
    assert watch.total.shape == (16, 16)


GRAPHS = {
    "MatMul": ("g (float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, W) }", (64, 48)),
    "Gemm": ("g (float[N, 64] x) => (float[N, 48] y) { y = Gemm(x, W) }", (64, 48)),
    "Gemm transB": ("g (float[N, 64] x) => (float[N, 48] y) { y = Gemm<transB = 1>(x, W) }", (48, 64)),
    "shared": ("g (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, W) y = MatMul(h, W) }", (64, 64)),
}


@pytest.mark.parametrize("form", ["load", "compute"])
@pytest.mark.parametrize("options", [{}, {"block": 16}, {"symmetric": False}, {"per_channel": False}])
@pytest.mark.parametrize("kind", GRAPHS)
def test_gptq_from_data_beats_nearest(kind: str, options: dict[str, Any], form: str, runtime: Runtime, tmp_path: Path):
    text, shape = GRAPHS[kind]
    proto = graph_model(text, W=random_weights(*shape, scale=0.125))
    x = correlated(256, 64)
    context = Context(data=data_for(proto, x), runtime=runtime, workdir=tmp_path)
    wanted = run(proto, {"x": x})[0]

    errors = {}
    for method in ("nearest", "gptq"):
        model, changes = stored(proto, context, bits=4, method=method, form=form, max_opset=21, **options)
        assert method == "nearest" or "by gptq" in changes.changed[0].what
        errors[method] = np.linalg.norm(run(model, {"x": x})[0] - wanted)

    assert errors["gptq"] < 0.75 * errors["nearest"]
    assert list(tmp_path.iterdir()) == []


def test_gptq_leaves_convolutions_and_tables_to_nearest_and_says_so(runtime: Runtime, tmp_path: Path):
    text = """g (float[N, 4, 8, 8] x) => (float[N, 32] y) {
        c = Conv(x, V)
        p = GlobalAveragePool(c)
        f = Flatten(p)
        y = Gemm(f, W)
    }"""
    proto = graph_model(text, V=random_weights(16, 4, 3, 3), W=random_weights(16, 32))
    x = np.random.default_rng(0).normal(size=(16, 4, 8, 8)).astype(np.float32)
    context = Context(data=data_for(proto, x), runtime=runtime, workdir=tmp_path)

    _, changes = stored(proto, context, method="gptq", min_elements=64)

    told = {change.where: change.what for change in changes.changed}
    assert told == {"V": "16x4x3x3 float32 stored as int8", "W": "16x32 float32 stored as int8 by gptq"}
    assert changes.notes == ["gptq is for MatMul and Gemm: 1 other weight is rounded to nearest"]


def test_gptq_sees_the_readers_of_the_main_graph_alone(runtime: Runtime, tmp_path: Path):
    text = """g (float[N, 24] x) => (float[N, 24] z) {
        y = MatMul(x, W)
        yes = Constant<value = bool {1}>()
        z = If(yes) <
            then_branch = then () => (float[N, 24] a) { t = Neg(y) a = MatMul(t, W) },
            else_branch = otherwise () => (float[N, 24] b) { b = Identity(y) }
        >
    }"""
    proto = graph_model(text, W=random_weights(24, 24, scale=0.2))
    context = Context(data=data_for(proto, correlated(64, 24)), runtime=runtime, workdir=tmp_path)

    _, changes = stored(proto, context, bits=4, method="gptq")

    assert changes.changed[0].what == "24x24 float32 stored as int4 by gptq (held in 8 bits)"


def test_gptq_leaves_layers_whose_input_is_never_finite_to_nearest(runtime: Runtime, tmp_path: Path):
    text = "g (float[N, 24] x) => (float[N, 24] y) { r = Abs(x) l = Log(r) i = Neg(l) y = MatMul(i, W) }"
    proto = graph_model(text, W=random_weights(24, 24))
    zeros = np.zeros((16, 24), np.float32)
    context = Context(data=data_for(proto, zeros), runtime=runtime, workdir=tmp_path)

    _, changes = stored(proto, context, bits=4, method="gptq")

    assert changes.changed[0].what == "24x24 float32 stored as int4 (held in 8 bits)"


def test_gptq_gathers_large_layers_in_several_passes(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxcomp_passes._products.BATCH_BYTES", 1000)
    proto = mlp_model((24, 48, 24))
    x = correlated(64, 24)
    context = Context(data=data_for(proto, x), runtime=runtime, workdir=tmp_path)
    said: list[str] = []
    context.progress = said.append

    _, changes = stored(proto, context, bits=4, method="gptq")

    assert [text for text in said if text.startswith("gathering")] == ["gathering the products of 1 inputs"] * 2
    assert all("by gptq" in change.what for change in changes.changed)


def test_gptq_without_data_is_refused_before_any_work():
    with pytest.raises(RequirementError, match="the pass 'quantize-weights' needs data; give --data"):
        optimize(mlp_model((24, 48, 24)), passes=[QuantizeWeights(method="gptq")])
    with pytest.raises(RequirementError, match="quantize-weights: the method gptq needs data"):
        QuantizeWeights(method="gptq").rewrite(Model.load(mlp_model()), Context())


def test_other_methods_ask_for_nothing():
    assert QuantizeWeights().requires == QuantizeWeights(method="hqq").requires == frozenset()
