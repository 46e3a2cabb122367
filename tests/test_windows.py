"""The vectors that a layer's weight is multiplied with, and their moments."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes._fits import Fit
from onnxcomp_passes._pruning import as_matrices
from onnxcomp_passes._views import find_views
from onnxcomp_passes._windows import MAX_ROWS, Products, Window, gather_products
from tests.models import graph_model, random_weights, run

Array = np.ndarray[Any, Any]

SUM_ROUNDING = 1e-5
"""Relative: some dozens of float32 roundings (6e-8 each) in sums of another order."""


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, Array, Array]:
    """A Conv's attributes, its weight and an input."""
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, strides, dilations = (draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)) for _ in range(3))
    sizes = draw(st.lists(st.integers(5, 8), min_size=rank, max_size=rank))
    mode = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode.startswith("SAME"):  # ONNX Runtime has no dilation there
        dilations = [1] * rank
    told = f'auto_pad = "{mode}", group = {groups}, strides = {strides}, dilations = {dilations}'
    if mode == "NOTSET":
        pads = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
        told += f", pads = {pads}"
        padded = [size + sum(pads[axis::rank]) for axis, size in enumerate(sizes)]
    else:
        padded = sizes
    assume(all(size > (k - 1) * step for size, k, step in zip(padded, kernel, dilations, strict=True)))
    seed = draw(st.integers(0, 99))
    weight = random_weights(groups * outputs, inputs, *kernel, seed=seed)
    return told, weight, random_weights(2, groups * inputs, *sizes, seed=seed + 100)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_windows_times_weight_is_the_convolution(case: tuple[str, Array, Array]):
    told, weight, x = case
    axes = ", ".join(map(str, x.shape))
    ends = ", ".join("?" for _ in x.shape[2:])
    graph = f"g (float[{axes}] x) => (float[2, {len(weight)}, {ends}] y) {{ y = Conv<{told}>(x, W) }}"
    proto = graph_model(graph.replace("?", "N"), W=weight)
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    view = find_views(Model.load(proto))[0]

    rows = Window.of(view.node, view.shape).rows(x)

    wanted = run(proto, {"x": x})[0]
    made = rows @ as_matrices(view, weight)  # (groups, rows, outputs of a group)
    made = np.moveaxis(made, 1, 0).reshape(2, *wanted.shape[2:], len(weight))
    np.testing.assert_allclose(np.moveaxis(made, -1, 1), wanted, atol=SUM_ROUNDING * np.abs(rows).max() * rows.shape[2])


def test_of_very_many_windows_some_are_looked_at():
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))

    rows = window.rows(random_weights(2, 1, 64, 64))

    assert rows.shape == (1, MAX_ROWS, 9)
    padded = np.pad(random_weights(2, 1, 64, 64)[:, 0], ((0, 0), (1, 1), (1, 1)))
    everything = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    known = {row.tobytes() for row in np.ascontiguousarray(everything).reshape(-1, 9)}
    assert all(row.tobytes() in known for row in rows[0])


def test_moments_of_a_pair_are_those_of_numpy():
    original, now = random_weights(40, 6, seed=1), random_weights(40, 6, seed=2)
    watch = Products([Window()])

    watch.update(original[:15], now[:15])
    watch.update(original[15:], now[15:])

    found = watch.moments(0)
    assert found is not None
    np.testing.assert_allclose(found.products[0], now.T @ now / 40, rtol=0, atol=SUM_ROUNDING)
    np.testing.assert_allclose(found.cross[0], now.T @ original / 40, rtol=0, atol=SUM_ROUNDING)
    centred = found.centred()
    one, other = now - now.mean(0), original - original.mean(0)
    np.testing.assert_allclose(centred.products[0], one.T @ one / 40, rtol=0, atol=SUM_ROUNDING)
    np.testing.assert_allclose(centred.cross[0], one.T @ other / 40, rtol=0, atol=SUM_ROUNDING)


def test_the_variance_of_inputs_that_hardly_vary_is_found():
    values = 1000 + np.float32(0.01) * random_weights(4000, 3)
    watch = Products([Window()])

    watch.update(values[:100])
    watch.update(values[100:])

    found = watch.moments(0)
    assert found is not None
    wanted = np.cov(values.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(found.centred().products[0], wanted, rtol=0, atol=1e-3 * wanted.max())


def test_rows_with_nan_or_infinity_in_either_model_are_left_out():
    original, now = np.ones((4, 2), np.float32), np.ones((4, 2), np.float32)
    original[0, 0], now[1, 1] = np.nan, np.inf
    watch = Products([Window()])

    watch.update(original, now)

    found = watch.moments(0)
    assert found is not None
    np.testing.assert_array_equal(found.products[0], np.ones((2, 2)))


@pytest.mark.parametrize("value", [np.zeros((3, 2), np.float32), np.full((3, 2), np.nan, np.float32)])
def test_inputs_that_say_nothing_have_no_moments(value: Array):
    watch = Products([Window()])

    watch.update(value)

    assert watch.moments(0) is None


def test_moments_are_gathered_from_both_models(tmp_path: Path):
    text = "g (float[N, 4] x) => (float[N, 3] y) { h = MatMul(x, W) y = MatMul(h, V) }"
    weights = {"W": random_weights(4, 5), "V": random_weights(5, 3, seed=1)}
    original = Model.load(graph_model(text, weights))
    now = Model.load(graph_model(text, {**weights, "W": random_weights(4, 5, seed=2)}))
    x = random_weights(8, 4, seed=3)

    with Runtime() as runtime:
        context = Context(data=open_data({"x": x}, input_specs(now.proto())), runtime=runtime, workdir=tmp_path)
        found = gather_products(now, find_views(now), context, original=original)

    hidden = [x @ model.weight("W") for model in (original, now)]
    assert set(found) == {"W", "V"}
    np.testing.assert_allclose(found["V"].cross[0], hidden[1].T @ hidden[0] / 8, rtol=0, atol=10 * SUM_ROUNDING)
    np.testing.assert_allclose(found["W"].products[0], x.T @ x / 8, rtol=0, atol=SUM_ROUNDING)
    assert not list(tmp_path.iterdir())


def test_runs_of_unlike_lengths_are_left_out():
    watch = Products([Window()])
    watch.update(np.ones((5, 3), np.float32), np.ones((4, 3), np.float32))
    assert watch.moments(0) is None
    watch.update(np.eye(3, dtype=np.float32), 2 * np.eye(3, dtype=np.float32))
    assert watch.moments(0) is not None

    fit = Fit(Window())
    fit.update(np.ones((6, 2), np.float32), np.ones((3, 3), np.float32))
    assert [half.count for half in fit.halves] == [0, 0]
    fit.update(np.ones((4, 2), np.float32), np.ones((4, 3), np.float32))
    assert [half.count for half in fit.halves] == [2, 2]


def test_once_time_is_up_one_batch_has_to_do(tmp_path: Path):
    model = Model.load(graph_model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, W) }", W=random_weights(4, 3)))
    data = open_data({"x": random_weights(300, 4)}, input_specs(model.proto()))
    with Runtime() as runtime:
        context = Context(data=data, runtime=runtime, workdir=tmp_path)
        counts = [
            gather_products(model, find_views(model), each)["W"].count
            for each in (context, replace(context, deadline=time.monotonic()))
        ]

    assert counts == [300, len(next(data.feeds())["x"])]
    assert counts[1] < 300
