"""Random graphs: factors amount to what was fitted, whoever else reads their inputs, results and weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.runtime import Runtime
from onnxcomp_passes import LowRank
from onnxcomp_passes._rank_options import forms_of
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_fit import Splitter
from onnxcomp_passes._thin_layers import find_units
from tests.models import Array, assert_same_outputs, graph_model, random_inputs, random_weights, run
from tests.strategies import small_graphs

SIDE = 12

LAYERS = (
    "MatMul({x}, {w})",
    "Gemm({x}, {w})",
    "Gemm({x}, {w}, {b})",
    "Gemm<transB = 1>({x}, {w}, {b})",
    "Gemm<alpha = 0.5, beta = 2.0>({x}, {w}, {b})",
)
OTHERS = ("Relu({x})", "Add({x}, {b})", "Add({x}, {z})", "Mul({x}, {z})", "Identity({x})", "Tanh({x})")


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Layers and what is between them, on tensors of one shape; weights and biases are sometimes read again."""
    tensors, lines = ["x"], list[str]()
    weights: dict[str, Array] = {}
    for number in range(draw(st.integers(2, 9))):
        op = draw(st.sampled_from(LAYERS if draw(st.booleans()) else OTHERS))
        known = [name for name in weights if name[0] == "w"]
        weight = draw(st.sampled_from(known)) if known and draw(st.integers(0, 4)) == 0 else f"w{number}"
        bias = draw(st.sampled_from(["b0", f"b{number}"]))
        if "{w}" in op:
            weights.setdefault(weight, random_weights(SIDE, SIDE, seed=number, scale=SIDE**-0.5))
        if "{b}" in op:
            weights.setdefault(bias, random_weights(SIDE, seed=number))
        x, z = (draw(st.sampled_from(tensors[-3:])) for _ in range(2))
        lines.append(f"t{number} = {op.format(x=x, z=z, w=weight, b=bias)}")
        tensors.append(f"t{number}")
    read = {name for name in tensors if any(f"({name}" in line or f" {name})" in line for line in lines)}
    ends = [name for name in tensors if name not in read or (name != "x" and draw(st.integers(0, 3)) == 0)]
    outs = ", ".join(f"float[N, {SIDE}] {name}" for name in ends)
    return graph_model(f"g (float[N, {SIDE}] x) => ({outs}) {{ {' '.join(lines)} }}", weights)


def check(proto: onnx.ModelProto, rank: int, form: str = "svd") -> None:
    """Put factors in the place of what they amount to: the model gives the same."""
    model = Model.load(proto)
    lift_constants(model.graph)
    units = find_units(model, Context(), Changes())
    chosen = {unit.name: Thin(forms[0], (rank,)) for unit in units if (forms := forms_of(unit, form))}
    splitter = Splitter(model, units, {}, Context(), refit=True)

    fitted, found = splitter.build(chosen)
    split = fitted.fork()
    splitter.split(split, found)

    onnx.checker.check_model(split.to_proto(), full_check=True)
    assert_same_outputs(fitted, split, random_inputs(proto))
    assert set(found) == set(chosen)
    assert not find_units(split, Context(), Changes(), lambda view: ".thin" in view.name)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.integers(1, 5))
def test_factors_of_shared_layers_amount_to_what_was_fitted(proto: onnx.ModelProto, rank: int):
    check(proto, rank)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_graphs(), st.integers(1, 3), st.sampled_from(["svd", "spatial", "cp"]))
def test_factors_in_graphs_of_all_kinds_amount_to_what_was_fitted(proto: onnx.ModelProto, rank: int, form: str):
    check(proto, rank, form)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(proto=networks(), rank=st.integers(1, 5), refit=st.booleans())
def test_fitted_to_data_all_is_finite_and_of_the_same_size(
    proto: onnx.ModelProto, rank: int, refit: bool, runtime: Runtime, tmp_path: Path
):
    x = random_weights(200, SIDE, seed=5) * np.geomspace(2, 0.05, SIDE, dtype=np.float32)
    data = open_data({"x": x}, input_specs(Model.load(proto).proto()))
    context = Context(data=data, runtime=runtime, workdir=tmp_path)

    def loss(*arguments: Any, **options: Any) -> float:
        model = Model.load(proto)
        LowRank(min_elements=1, rank=rank, **options).rewrite(model, *arguments)
        outputs = zip(run(proto, {"x": x}), run(model, {"x": x}), strict=True)
        return float(sum(np.square(got - wanted).sum() / max(np.square(wanted).sum(), 1e-9) for wanted, got in outputs))

    assert loss(context, refit=refit) <= 3 * loss(Context()) + 1e-3
