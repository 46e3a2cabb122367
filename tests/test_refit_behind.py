"""Layers fitted to what comes out behind their shortcut and activation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import Context, Model
from onnxcomp.data import input_specs, open_data
from onnxcomp.runtime import Runtime
from onnxcomp.weights import Spool
from onnxcomp_passes._behind import Behind, find_behind
from onnxcomp_passes._behind_fit import MAX_BYTES, Kept, Rows, fit_behind, read_rows, rows_to_keep
from onnxcomp_passes._refit import refit
from onnxcomp_passes._views import find_views
from onnxcomp_passes._windows import Window
from tests.models import graph_model, random_weights, run

INFINITE = float("inf")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


# --- what comes behind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Relu(a)", Behind("y", None, 0.0, 0.0)),
        ("y = Clip(a, zero, six)", Behind("y", None, 0.0, 0.0, 6.0)),
        ("s = Add(h, a) y = Relu(s)", Behind("y", "h", 0.0, 0.0)),
        ("s = Add(a, h) y = Neg(s)", Behind("s", "h")),
        ("y = Sigmoid(a)", None),
        ("b = Relu(a) y = Add(b, a)", None),
        ("y = Clip(a, low, six)", None),
        ("s = Add(a, a) y = Relu(s)", None),
    ],
)
def test_a_shortcut_and_an_activation_are_found_where_nothing_else_reads(body: str, found: Behind | None) -> None:
    text = f"g (float[N, 4] x, float low) => (float[N, 4] y) {{ h = Neg(x) a = Gemm(x, W) {body} }}"
    weights = {"W": random_weights(4, 4), "zero": np.float32(0), "six": np.float32(6)}
    model = Model.load(graph_model(text, {name: np.asarray(value) for name, value in weights.items()}))
    [node] = [node for node in model.graph.nodes if node.op == "Gemm"]
    assert find_behind(model, node) == found


def test_constants_behind_a_matmul_are_its_offset_and_outputs_of_the_model_end_the_search() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) {
        h = Neg(x) a = MatMul(x, W) b = Add(a, c) s = Add(h, b) y = Relu(s) z = MatMul(x, V) w = Relu(z)
    }"""
    weights = {"W": random_weights(4, 4), "V": random_weights(4, 4), "c": random_weights(4, seed=1)}
    model = Model.load(graph_model(text, weights))
    inner, outer = [node for node in model.graph.nodes if node.op == "MatMul"]
    behind = find_behind(model, inner)
    assert behind is not None
    assert (behind.result, behind.shortcut, behind.low, behind.high) == ("y", "h", 0.0, INFINITE)
    np.testing.assert_array_equal(behind.offset, weights["c"])
    assert find_behind(model, outer) is None


# --- rows -------------------------------------------------------------------------------------------------------------


def test_observers_that_see_as_many_rows_keep_the_same_ones_and_no_more_than_asked() -> None:
    numbers = np.arange(40 * 6 * 6, dtype=np.float32).reshape(40, 1, 6, 6)
    window = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
    read, shortcut = Kept(window, 100), Kept(window, 100, shortcut=True)
    for start in range(0, 40, 5):
        part = numbers[start : start + 5]
        read.update(part, 2 * part)
        shortcut.update(part, 3 * part)
    for half in range(2):
        one, other = read.halves[half], shortcut.halves[half]
        assert one is not None
        assert other is not None
        assert one[0].shape == (100, 1)
        np.testing.assert_array_equal(one[1], 2 * one[0])
        np.testing.assert_array_equal(other[1], 3 * one[0])
        assert set((one[0].astype(int).reshape(-1) // 36 % 2).tolist()) == {half}
    assert rows_to_keep((4608, 512)) * 2 * 4 * 4608 <= MAX_BYTES


def test_runs_whose_lengths_differ_are_left_out_and_rows_that_do_not_match_are_not_used() -> None:
    results = random_weights(8, 5, 3)
    read, shortcut = Kept(Window(), 100), Kept(Window(), 100, shortcut=True)
    for longer in (0, 1):
        read.update(results, random_weights(8, 5, 4))
        shortcut.update(results, random_weights(8, 5 + longer, 3))
    assert all(half is not None and len(half[0]) == 20 for half in shortcut.halves)
    assert not read_rows(read, shortcut, 0.0, (0.0, INFINITE))
    assert [rows.inputs.shape for rows in read_rows(read, None, 0.0, (0.0, INFINITE))] == [(40, 5), (40, 5)]


def test_a_shortcut_is_stretched_to_what_it_is_added_to() -> None:
    results = random_weights(8, 5, 3)
    read, shortcut = Kept(Window(), 100), Kept(Window(), 100, shortcut=True)
    read.update(results, random_weights(8, 5, 4))
    shortcut.update(results, np.full((5, 1), 2, np.float32))
    rows = read_rows(read, shortcut, np.array([1.0, 2.0, 3.0]), (0.0, INFINITE))
    assert rows[0].added[0].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(("low", "high"), [(0.0, INFINITE), (0.0, 6.0), (-INFINITE, INFINITE)])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_auxiliary_results_are_the_best_there_are(low: float, high: float, penalty: float) -> None:
    rng = np.random.default_rng(0)
    targets = np.clip(rng.normal(0, 4, (30, 3)), low, high).astype(np.float32)
    now = rng.normal(0, 5, (30, 3)).astype(np.float32)
    rows = Rows(np.ones((30, 1), np.float32), targets, np.zeros_like(targets), low, high)
    grid = np.linspace(-25, 25, 5001)[:, None, None]

    def cost(z: Any) -> Any:
        return np.square(np.clip(z, low, high) - targets) + penalty * np.square(z - now)

    assert np.all(cost(rows.auxiliary(now, penalty)) <= cost(grid).min(axis=0) + 1e-4)


# --- fits -------------------------------------------------------------------------------------------------------------


def test_behind_a_relu_the_fit_is_better_than_the_plain_one_on_rows_that_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    inputs = np.append(np.maximum(rng.normal(0, 1, (4000, 12)), 0), np.ones((4000, 1)), axis=1).astype(np.float32)
    weights = rng.normal(0, 1, (13, 6))
    weights[0] = -6  # what keeps most results negative is the unit that goes
    wanted = inputs @ weights
    alive = np.arange(13) >= 1
    rows = [
        Rows(inputs[part], np.maximum(wanted[part], 0).astype(np.float32), np.zeros((2000, 6), np.float32), 0, INFINITE)
        for part in (slice(2000), slice(2000, None))
    ]
    plain = np.zeros((13, 6))
    plain[alive] = np.linalg.lstsq(inputs[:2000, alive], wanted[:2000], rcond=None)[0]
    fitted = fit_behind(plain, alive, rows[0], 1e-3, plain)
    assert not fitted[~alive].any()
    assert rows[1].error(fitted) < 0.75 * rows[1].error(plain)


RESIDUAL = """g (float[N, 12] x) => (float[N, 10] y) {
    a = MatMul(x, A) h = Relu(a) s = MatMul(h, D) b = Gemm(h, B) t = Add(b, s) y = Relu(t) }"""
PLAIN = "g (float[N, 12] x) => (float[N, 10] y) { a = MatMul(x, A) h = Relu(a) b = Gemm(h, B) y = Neg(b) }"


def refitted(text: str, runtime: Runtime, workdir: Path, *, activations: bool) -> tuple[float, Model]:
    """The error on data that the fit has not seen, and the model: units are gone and its shortcut is wrong."""
    weights = {"A": random_weights(12, 24), "B": random_weights(24, 10, seed=1), "D": random_weights(24, 10, seed=2)}
    proto = graph_model(text, {name: value for name, value in weights.items() if f"{name})" in text})
    original, model, spool = Model.load(proto), Model.load(proto), Spool()
    for view in find_views(model):
        value = view.read().copy()
        if view.name == "B":
            value[:6] = 0
        if view.name == "D":
            value = value * np.float32(0.7)
        view.write(value, spool)
    data = open_data({"x": random_weights(600, 12, seed=5)}, input_specs(original.proto()))
    context = Context(data=data, runtime=runtime, workdir=workdir)
    assert refit(model, original, {"B": np.zeros(10)}, context, spool, activations=activations) == 1
    feed = {"x": random_weights(400, 12, seed=6)}
    onnx.checker.check_model(model.to_proto())
    return float(np.square(run(model, feed)[0] - run(proto, feed)[0]).sum()), model


def test_errors_of_the_shortcut_are_made_good(runtime: Runtime, tmp_path: Path) -> None:
    behind, _ = refitted(RESIDUAL, runtime, tmp_path, activations=True)
    plain, _ = refitted(RESIDUAL, runtime, tmp_path, activations=False)
    assert behind < 0.8 * plain


def test_a_layer_with_no_activation_gets_the_plain_fit(runtime: Runtime, tmp_path: Path) -> None:
    _, behind = refitted(PLAIN, runtime, tmp_path, activations=True)
    _, plain = refitted(PLAIN, runtime, tmp_path, activations=False)
    assert behind.digest == plain.digest


def test_an_input_that_is_the_shortcut_too(runtime: Runtime, tmp_path: Path) -> None:
    text = """g (float[N, 6, 8, 8] x) => (float[N, 6, 8, 8] y) {
        h = Relu(x) a = Conv<pads = [1, 1, 1, 1]>(h, W) t = Add(a, h) y = Clip(t, zero, six) }"""
    weights = {"W": random_weights(6, 6, 3, 3), "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    proto = graph_model(text, weights)
    original, model, spool = Model.load(proto), Model.load(proto), Spool()
    [view] = [view for view in find_views(model) if view.name == "W"]
    value = view.read().copy()
    value[:, 1] = 0
    view.write(value, spool)
    feed = {"x": random_weights(50, 6, 8, 8, seed=4)}
    before = np.square(run(model, feed)[0] - run(proto, feed)[0]).sum()
    data = open_data({"x": random_weights(60, 6, 8, 8, seed=3)}, input_specs(original.proto()))
    context = Context(data=data, runtime=runtime, workdir=tmp_path)
    assert refit(model, original, {"W": np.zeros(6)}, context, spool) == 1
    assert np.square(run(model, feed)[0] - run(proto, feed)[0]).sum() < 0.95 * before
