"""What layers cost, whole and in factors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from onnxcomp.macs import mac_counts
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp.weights import Spool
from onnxcomp_passes._factor_chains import merge_factors
from onnxcomp_passes._layer_costs import LayerTimes, layer_macs, layer_sizes
from onnxcomp_passes._rank_options import forms_of, options_of
from onnxcomp_passes._reduced_rank import Goal
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_fit import Splitter
from onnxcomp_passes._thin_layers import find_units
from tests.models import graph_model, random_weights


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


LAYERS: dict[str, tuple[str, str, str, dict[str, tuple[int, ...]]]] = {
    "matmul": ("float[3, 5, 20] x", "float[3, 5, 16] y", "y = MatMul(x, W)", {"W": (20, 16)}),
    "of a vector": ("float[20] x", "float[16] y", "y = MatMul(x, W)", {"W": (20, 16)}),
    "from the left": ("float[3, 20, 5] x", "float[3, 16, 5] y", "y = MatMul(W, x)", {"W": (16, 20)}),
    "a stack": ("float[4, 5, 20] x", "float[4, 5, 16] y", "y = MatMul(x, W)", {"W": (4, 20, 16)}),
    "a stack from the left": ("float[4, 20, 5] x", "float[4, 16, 5] y", "y = MatMul(W, x)", {"W": (4, 16, 20)}),
    "gemm": ("float[7, 20] x", "float[7, 16] y", "y = Gemm(x, W, b)", {"W": (20, 16), "b": (16,)}),
    "turned": ("float[20, 7] x", "float[7, 16] y", "y = Gemm<transA = 1, transB = 1>(x, W)", {"W": (16, 20)}),
    "table": ("int64[2, 5] x", "float[2, 5, 16] y", "y = Gather(W, x)", {"W": (40, 16)}),
    "one row": ("int64 x", "float[16] y", "y = Gather(W, x)", {"W": (40, 16)}),
    "conv": (
        "float[2, 12, 9, 8] x",
        "float[2, 16, 4, 8] y",
        "y = Conv<strides = [2, 1], pads = [0, 1, 0, 1]>(x, W)",
        {"W": (16, 12, 3, 3)},
    ),
    "grouped conv": ("float[2, 24, 9] x", "float[2, 16, 7] y", "y = Conv<group = 2>(x, W)", {"W": (16, 12, 3)}),
    "projections": (
        "float[3, 5, 20] x",
        "float[3, 5, 16] y, float[3, 5, 24] z",
        "y = MatMul(x, W) z = MatMul(x, V)",
        {"W": (20, 16), "V": (20, 24)},
    ),
    "read twice": (
        "float[3, 20] x, float[5, 20] w",
        "float[3, 16] y, float[5, 16] z",
        "y = MatMul(x, W) z = MatMul(w, W)",
        {"W": (20, 16)},
    ),
}


def layer(name: str) -> onnx.ModelProto:
    ins, outs, body, shapes = LAYERS[name]
    return graph_model(f"g ({ins}) => ({outs}) {{ {body} }}", {name: random_weights(*s) for name, s in shapes.items()})


def thins(model: Model) -> list[Thin]:
    [unit] = find_units(model, Context(), Changes())
    forms = [form for form in ("svd", "spatial", "tucker", "cp") if form in forms_of(unit, form)]
    return [Thin(form, (3, 2) if form == "tucker" else (3,)) for form in forms]


@pytest.mark.parametrize("name", LAYERS)
def test_multiply_accumulates_are_those_of_the_graph_that_is_made(name: str):
    model = Model.load(layer(name))
    units = find_units(model, Context(), Changes())
    [unit] = units
    [sizes] = layer_sizes(model, units, {}).values()
    assert layer_macs(unit, sizes) == sum(mac_counts(model).values())

    for thin in thins(model):
        splitter = Splitter(model, units, {}, Context(), refit=True)
        split, found = splitter.build({unit.name: thin})
        splitter.split(split, found)
        assert layer_macs(unit, sizes, thin) == sum(mac_counts(split).values())
        [each] = found.values()
        assert each.factors.parameters == thin.parameters(unit)


@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_known_again_and_cost_what_their_graph_does(name: str):
    model = Model.load(layer(name))
    units = find_units(model, Context(), Changes())

    for thin in thins(model):
        splitter = Splitter(model, units, {}, Context(), refit=True)
        split, found = splitter.build({units[0].name: thin})
        splitter.split(split, found)
        one = split.fork()
        merged, reasons = merge_factors(one, Context(), Spool())
        [unit] = find_units(one, Context(), Changes(), merged=merged)
        assert not reasons
        assert (unit.name, unit.present) == (units[0].name, thin)
        assert unit.elements == thin.parameters(unit)
        [sizes] = layer_sizes(one, [unit], {}).values()
        assert layer_macs(unit, sizes, unit.present) == sum(mac_counts(split).values())
        assert [node.op for node in one.graph.nodes] == [node.op for node in model.graph.nodes]


def test_what_becomes_of_factors_computes_less_than_they_do():
    body = "t = Conv<strides = [2, 2]>(x, A) y = Conv(t, B)"
    weights = {"A": random_weights(10, 16, 3, 3), "B": random_weights(24, 10, 1, 1)}
    model = Model.load(graph_model(f"g (float[1, 16, 17, 17] x) => (float[1, 24, 8, 8] y) {{ {body} }}", weights))
    now = sum(mac_counts(model).values())
    merged, _ = merge_factors(model, Context(), Spool())
    [unit] = find_units(model, Context(), Changes(), merged=merged)
    [sizes] = layer_sizes(model, [unit], {}).values()

    options = options_of(unit, Goal.of(unit.matrices(), None), sizes, ["svd", "spatial"], 1, {})

    assert {option.thin.form for option in options} == {"svd", "spatial"}
    assert all(option.macs < now and option.parameters < unit.elements for option in options)


def test_sizes_that_are_not_known_are_left_out():
    text = "g (float[N, M, 20] x) => (float[N, M, 16] y) { y = MatMul(x, W) }"
    model = Model.load(graph_model(text, W=random_weights(20, 16)))
    units = find_units(model, Context(), Changes())

    assert set(layer_sizes(model, units, {"x": [2, 3, 20]})) == {"W"}
    assert layer_macs(units[0], []) == 0


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_can_be_timed_by_itself(name: str, runtime: Runtime, tmp_path: Path):
    model = Model.load(layer(name))
    units = find_units(model, Context(), Changes())
    [sizes] = layer_sizes(model, units, {}).values()
    times = LayerTimes(runtime, tmp_path)

    for thin in thins(model):
        whole, share = times.measure(units[0], sizes, thin)
        assert whole > 0
        assert share > 0
        assert times.measure(units[0], sizes, thin) == (whole, share)  # known by now
    assert not list(tmp_path.iterdir())
