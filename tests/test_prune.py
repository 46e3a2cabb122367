"""Which weights `prune` sets to zero, what it says, and what it does to the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Prune, QuantizeWeights
from onnxcomp_passes._pruner import Amount, Pruner
from onnxcomp_passes._pruning import lowest_by_output
from onnxcomp_passes._views import find_views
from onnxcomp_passes._windows import gather_products
from tests.models import graph_model, matmul_model, mlp_model, random_weights, run

Array = np.ndarray[Any, Any]

SAMPLES = Path(__file__).parent.parent / "sample_models"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


def zeros(model: Model, name: str) -> int:
    view = next(view for view in find_views(model) if view.name == name)
    return int(np.count_nonzero(view.read() == 0))


def prune(model: Model, context: Context | None = None, **options: Any) -> Changes:
    return Prune(keep_ends="false", min_elements=1, **options).rewrite(model, context or Context())


def context_for(model: Model, inputs: Array, runtime: Runtime, folder: Path) -> Context:
    return Context(data=open_data({"x": inputs}, input_specs(model.proto())), runtime=runtime, workdir=folder)


# --- how much ---------------------------------------------------------------------------------------------------------


def test_zeroes_the_smallest_weights():
    model = matmul_model(np.array([[0.9, -0.1], [0.2, -0.8]], np.float32))

    changes = prune(model, sparsity=0.5)

    assert [(change.where, change.what) for change in changes.changed] == [
        ("W", "2 of 4 weights are zero (50.0%), by magnitude")
    ]
    np.testing.assert_array_equal(model.weight("W"), np.array([[0.9, 0], [0, -0.8]], np.float32))


def test_a_threshold_is_a_magnitude():
    model = matmul_model(np.array([[0.5, -0.4], [0.3, -2.0]], np.float32))

    prune(model, threshold=0.45)

    np.testing.assert_array_equal(model.weight("W"), [[0.5, 0], [0, -2.0]])


def test_deviations_are_those_of_each_weight():
    small, large = random_weights(20, 30, scale=0.01), random_weights(30, 20, seed=1, scale=100)
    text = "g (float[N, 20] x) => (float[N, 20] y) { h = MatMul(x, W) y = MatMul(h, V) }"
    model = Model.load(graph_model(text, W=small, V=large))

    prune(model, deviations=0.5)

    for name, value in (("W", small), ("V", large)):
        np.testing.assert_array_equal(model.weight(name) == 0, np.abs(value) < 0.5 * value.std())


@pytest.mark.parametrize(("scope", "wanted"), [("layer", (64, 256)), ("global", None)])
def test_a_share_is_of_each_weight_or_of_all(scope: str, wanted: tuple[int, int] | None):
    model = Model.load(mlp_model((8, 16, 32)))
    even = np.full((8, 16), 3.0, np.float32)  # none of these matters less than the others
    model.set_weight("W0", even)

    prune(model, sparsity=0.5, scope=scope)

    found = zeros(model, "W0"), zeros(model, "W1")
    assert sum(found) == pytest.approx(0.5 * (128 + 512), abs=2)
    assert found == wanted if wanted else found[0] < 64


def test_ratios_name_weights_and_leave_the_others():
    model = Model.load(mlp_model((8, 16, 32)))

    prune(model, ratios=("W1=0.25",))

    assert (zeros(model, "W0"), zeros(model, "W1")) == (0, 128)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_a_pattern_holds_along_the_inputs_of_each_output(kept: int, more: int, rows: int, columns: int, turned: bool):
    weight = random_weights(rows, columns)
    op = "Gemm<transB = 1>(x, W)" if turned else "MatMul(x, W)"
    text = f"g (float[N, {rows}] x) => (float[N, {columns}] y) {{ y = {op} }}"
    model = Model.load(graph_model(text, W=np.ascontiguousarray(weight.T) if turned else weight))

    prune(model, pattern=f"{kept}:{kept + more}")

    found = model.weight("W").T if turned else model.weight("W")
    for start in range(0, rows, kept + more):
        part = found[start : start + kept + more]
        assert (np.count_nonzero(part, axis=0) <= kept).all()
        np.testing.assert_array_equal(part[part != 0], weight[start : start + kept + more][part != 0])


def test_a_second_run_changes_nothing():
    model = Model.load(mlp_model((8, 16, 32)))
    prune(model, sparsity=0.6)

    assert prune(model, sparsity=0.6).count == 0


# --- which weights ----------------------------------------------------------------------------------------------------


def test_names_and_operators_choose_weights():
    text = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, enc_W) b = Gemm(a, enc_V) y = MatMul(b, dec_W) }"
    weights = {name: random_weights(8, 8, seed=seed) for seed, name in enumerate(("enc_W", "enc_V", "dec_W"))}
    model = Model.load(graph_model(text, weights))

    prune(model, sparsity=0.5, include=("enc_*",), operators=("MatMul",))

    assert [zeros(model, name) for name in weights] == [32, 0, 0]


@pytest.mark.parametrize(("keep", "inner", "wanted"), [("true", 8, True), ("auto", 8, False), ("auto", 400, True)])
def test_first_and_last_layer_stay_where_that_costs_little(keep: str, inner: int, wanted: bool):
    model = Model.load(mlp_model((8, inner, inner, 4)))

    changes = Prune(sparsity=0.5, keep_ends=keep, min_elements=1).rewrite(model, Context())

    assert (zeros(model, "W0") == 0) == wanted
    assert zeros(model, "W1") > 0
    assert ("W0" in {left.where for left in changes.left}) == wanted


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay(value: float):
    weight = random_weights(8, 8)
    weight[2, 3] = value
    model = matmul_model(weight)

    changes = prune(model, sparsity=0.5)

    assert [(left.where, left.why) for left in changes.left] == [("W", "holds NaN or infinity")]
    np.testing.assert_array_equal(model.weight("W"), weight)


def test_the_table_tells_what_is_alive_and_pruned():
    model = Model.load(mlp_model((8, 16, 32)))

    (table,) = prune(model, sparsity=0.75, scope="layer").tables

    assert table.title == "160 weights alive, 480 pruned"
    assert table.columns == ("weight", "shape", "non-zeros", "total", "percent", "compression rate")
    assert [row[1:] for row in table.rows] == [
        ("8x16", 32, 128, 25.0, 4.0),
        ("16x32", 128, 512, 25.0, 4.0),
        ("", 160, 640, 25.0, 4.0),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5, "threshold": 0.1}, "both say how much"),
        ({"pattern": "4:2"}, "pattern must be N:M"),
        ({"threshold": 0.1, "criterion": "wanda"}, "leave out criterion=wanda"),
        ({"ratios": ("W=2",)}, "NAME=SHARE"),
        ({"sparsity": 1.5}, "sparsity must be from 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        Prune(**options)


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_criteria_that_look_at_inputs_need_data(criterion: str):
    with pytest.raises(RequirementError, match="needs data"):
        prune(matmul_model(random_weights(8, 8)), criterion=criterion, sparsity=0.5)


# --- with data --------------------------------------------------------------------------------------------------------


def test_wanda_prunes_weights_of_quiet_inputs_within_each_output(runtime: Runtime, tmp_path: Path):
    model = Model.load(graph_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, W) }", W=np.ones((4, 3), "f")))
    loudness = np.array([3.0, 0.1, 2.0, 0.2], np.float32)

    prune(
        model,
        context_for(model, random_weights(50, 4) * loudness, runtime, tmp_path),
        criterion="wanda",
        sparsity=0.5,
    )

    np.testing.assert_array_equal(model.weight("W"), [[1] * 3, [0] * 3, [1] * 3, [0] * 3])


def test_later_layers_make_up_for_earlier_ones(runtime: Runtime, tmp_path: Path):
    model = Model.load(mlp_model((24, 32, 32, 32, 8)))
    kind = random_weights(8, 24, seed=5)
    inputs, other = (random_weights(300, 8, seed=seed) @ kind for seed in (6, 7))
    context = context_for(model, inputs, runtime, tmp_path)
    pruner = Pruner(model, gather_products(model, find_views(model), context), context, compensate=True)
    amounts = {f"W{number}": Amount(share=0.6) for number in range(4)}

    errors = []
    for passes in (1, 4):
        made = pruner.build(amounts, most_passes=passes)
        errors.append(float(np.linalg.norm(run(made, {"x": other})[0] - run(model, {"x": other})[0])))

    assert errors[1] < 0.9 * errors[0]


def test_the_mean_error_goes_into_the_bias(runtime: Runtime, tmp_path: Path):
    text = "g (float[N, 12] x) => (float[N, 6] y) { h = MatMul(x, W) y = Add(h, b) }"
    proto = graph_model(text, W=random_weights(12, 6), b=np.zeros(6, np.float32))
    model = Model.load(proto)
    inputs = 5 + random_weights(400, 12, seed=3)

    prune(model, context_for(model, inputs, runtime, tmp_path), sparsity=0.7)

    wanted, found = run(proto, {"x": inputs})[0], run(model, {"x": inputs})[0]
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N, 12] x) => (float[N, 6] y, float[N, 6] h) { h = MatMul(x, W) y = Add(h, b) }",
        "g (float[N, 12] x) => (float[N, 6] y, float[6] z) { h = MatMul(x, W) y = Add(h, b) z = Relu(b) }",
        "g (float[N, 12] x) => (float[N, 6] y) { y = Gemm<beta = 0.5>(x, W, b) }",
    ],
)
def test_a_bias_that_others_see_stays(text: str, runtime: Runtime, tmp_path: Path):
    bias = random_weights(6, seed=9)
    model = Model.load(graph_model(text, W=random_weights(12, 6), b=bias))

    changes = prune(model, context_for(model, 5 + random_weights(50, 12, seed=3), runtime, tmp_path), sparsity=0.5)

    assert changes.count == 1
    np.testing.assert_array_equal(model.weight("b"), bias)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_convolutions_lose_less_with_data_than_without(group: int, runtime: Runtime, tmp_path: Path):
    text = f"""g (float[N, 8, 10, 10] x) => (float[N, 16, 10, 10] y) {{
        y = Conv<pads = [1, 1, 1, 1], group = {group}>(x, W, b) }}"""
    proto = graph_model(text, W=random_weights(16, 8 // group, 3, 3), b=random_weights(16, seed=1))
    smooth = np.cumsum(random_weights(40, 8, 10, 10, seed=2), axis=3)  # neighbours tell about each other
    models = [Model.load(proto), Model.load(proto)]

    prune(models[0], sparsity=0.6)
    prune(models[1], context_for(models[1], smooth[:20], runtime, tmp_path), sparsity=0.6)

    wanted = run(proto, {"x": smooth[20:]})[0]
    errors = [np.linalg.norm(run(model, {"x": smooth[20:]})[0] - wanted) for model in models]
    assert zeros(models[0], "W") == zeros(models[1], "W")
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_held_in_codes_keep_their_grid_and_get_exact_zeros(symmetric: bool, runtime: Runtime, tmp_path: Path):
    model = Model.load(
        graph_model("g (float[N, 24] x) => (float[N, 16] y) { y = MatMul(x, W) }", W=random_weights(24, 16))
    )
    QuantizeWeights(symmetric=symmetric, choose=False).rewrite(model, Context())
    before = find_views(model)[0].grid()

    prune(model, context_for(model, random_weights(100, 24, seed=4), runtime, tmp_path), sparsity=0.5)

    (view,) = find_views(model)
    after = view.grid()
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(before.scale, after.scale)
    assert zeros(model, view.name) >= 192
    onnx.checker.check_model(model.to_proto(), full_check=True)


# --- a real model -----------------------------------------------------------------------------------------------------


def accuracy(model: Model) -> float:
    with np.load(SAMPLES / "fashion_test.npz") as test:
        return float((run(model, {"image": test["image"]})[0].argmax(1) == test["label"]).mean())


def test_half_of_the_weights_of_a_real_model_go_at_next_to_no_loss(runtime: Runtime, tmp_path: Path):
    original = Model.load(SAMPLES / "fashion_lenet.onnx")
    data = open_data(SAMPLES / "fashion_calib.npz", input_specs(original.proto()))
    context = Context(data=data, runtime=runtime, workdir=tmp_path)
    half, second, magnitude = original.fork(), original.fork(), original.fork()

    Prune(sparsity=0.5).rewrite(half, context)
    Prune(sparsity=0.8).rewrite(second, context)
    Prune(sparsity=0.8, criterion="magnitude").rewrite(magnitude, context)

    before = accuracy(original)
    assert before - accuracy(half) <= 0.005 + 1e-9
    assert accuracy(magnitude) < accuracy(second) - 0.1


@given(share=st.floats(0.05, 0.95), shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
def test_the_lowest_by_output_are_as_many_as_asked_and_evenly_spread(share: float, shape: tuple[int, int, int]):
    scores = np.random.default_rng(0).random(shape)

    goes = lowest_by_output(scores, share)

    counts = goes.sum(axis=1)
    assert goes.sum() == round(share * scores.size)
    assert counts.max() - counts.min() <= 1


def test_a_bias_with_another_factor_than_the_products_is_left_alone(runtime: Runtime, tmp_path: Path):
    text = "g (float[N, 8] x) => (float[N, 4] y) { y = Gemm<alpha = 0.5>(x, W, b) }"
    bias = random_weights(4, seed=1)
    model = Model.load(graph_model(text, W=random_weights(8, 4), b=bias))

    prune(
        model, context_for(model, random_weights(100, 8, seed=2) + 1, runtime, tmp_path), criterion="obs", sparsity=0.5
    )

    np.testing.assert_array_equal(model.weight("b"), bias)


def test_what_has_its_zeros_already_is_not_told_as_changed():
    model = matmul_model(np.array([[1.0, 0.0], [0.0, 2.0]], np.float32))

    assert not prune(model, pattern="1:2").count


# --- once time is up --------------------------------------------------------------------------------------------------


def test_once_time_is_up_what_was_asked_for_is_done_by_magnitude(runtime: Runtime, tmp_path: Path):
    model = Model.load(mlp_model((24, 32, 8)))
    context = context_for(model, random_weights(50, 24), runtime, tmp_path)

    changes = prune(model, replace(context, deadline=time.monotonic()), sparsity=0.5)

    assert zeros(model, "W0") + zeros(model, "W1") == pytest.approx(0.5 * (24 * 32 + 32 * 8), abs=2)
    assert all(change.what.endswith("by magnitude") for change in changes.changed)
    assert changes.notes == ["the time limit was reached: weights are pruned by magnitude"]


def test_once_time_is_up_no_more_passes_are_made_over_the_data(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Model.load(mlp_model((24, 32, 32, 8)))
    context = context_for(model, random_weights(50, 24), runtime, tmp_path)
    pruner = Pruner(model, gather_products(model, find_views(model), context), context, compensate=True)
    wanted = pruner.build({f"W{number}": Amount(share=0.6) for number in range(3)}, most_passes=1)
    gathered = []

    def gather(*given: Any, **options: Any) -> Any:
        gathered.append(True)
        found = gather_products(*given, **options)
        given[2].deadline = time.monotonic()
        return found

    monkeypatch.setattr("onnxcomp_passes.prune.gather_products", gather)
    monkeypatch.setattr("onnxcomp_passes._pruner.gather_products", gather)
    changes = prune(model, context, ratios=tuple(f"W{number}=0.6" for number in range(3)))

    assert len(gathered) == 1
    assert changes.notes == ["the time limit was reached after 1 of 3 passes over the data"]
    for number in range(3):
        np.testing.assert_array_equal(model.weight(f"W{number}"), wanted.weight(f"W{number}"))


def test_once_time_is_up_the_model_that_was_tried_is_taken(runtime: Runtime, tmp_path: Path):
    model = Model.load(mlp_model((24, 32, 8)))
    context = context_for(model, random_weights(50, 24), runtime, tmp_path)
    pruner = Pruner(model, {}, context, compensate=True)
    amounts = {"W0": Amount(share=0.5)}
    tried = pruner.build(amounts)
    pruner.remember(tried)
    pruner.build({"W1": Amount(share=0.5)})

    assert pruner.final(amounts) is not tried
    context.deadline = time.monotonic()
    assert pruner.final(amounts) is tried
    assert list(pruner.criteria) == ["W0"]


@pytest.mark.parametrize("scale", [1e16, 1e25])
def test_layers_whose_inputs_overflow_are_pruned_by_magnitude(scale: float, runtime: Runtime, tmp_path: Path):
    """Their sums of products are no numbers that weights could be fitted by."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, W) g = Mul(h, big) i = MatMul(g, V) y = MatMul(i, U) }"
    weights = {name: random_weights(8, 8, seed=seed) for seed, name in enumerate("WVU")}
    model = Model.load(graph_model(text, weights, big=np.asarray(scale, np.float32)))
    context = context_for(model, random_weights(32, 8, seed=9), runtime, tmp_path)

    changes = prune(model, context, sparsity=0.5)

    assert {name: zeros(model, name) for name in "WVU"} == {"W": 32, "V": 32, "U": 32} or changes.count == 3
    assert all(np.isfinite(model.weight(name)).all() for name in "WVU")
