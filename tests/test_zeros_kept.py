"""Weights that are exactly zero before quantization are exactly zero after it, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Context, Pass
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp_passes import Float16, Quantize, QuantizeDynamic, QuantizeWeights
from onnxcomp_passes._codes import Codes, Grouping, Width, group, nearest
from onnxcomp_passes._gptq import gptq, output_error
from onnxcomp_passes._hqq import half_quadratic
from onnxcomp_passes._remedies import REMEDIES
from onnxcomp_passes._views import find_views
from tests.models import SMALL_NETWORK, graph_model, random_weights
from tests.quantizing import random_samples

Array = np.ndarray[Any, Any]

WEIGHTS = {"first": (8, 4, 3, 3), "middle": (16, 8, 3, 3), "head": (64, 20)}


def sparse(*shape: int, seed: int, share: float = 0.7) -> Array:
    """Random weights of which a share is zero, with channels of unlike size."""
    rng = np.random.default_rng(seed)
    weight = random_weights(*shape, seed=seed, scale=0.2) * rng.uniform(0.1, 3, (shape[0], *[1] * (len(shape) - 1)))
    return np.where(rng.random(shape) < share, 0, weight).astype(np.float32)


def pruned_model() -> onnx.ModelProto:
    """Two Conv and a Gemm, 70 % of the weights zero."""
    weights = {f"{name}_w": sparse(*shape, seed=index) for index, (name, shape) in enumerate(WEIGHTS.items())}
    return graph_model(SMALL_NETWORK, weights, first_b=random_weights(8), head_b=random_weights(20))


def zeros_of(model: Model) -> dict[str, Array]:
    """Where the weight of each layer is exactly zero."""
    return {view.node.name: view.read() == 0 for view in find_views(model) if view.node.name in WEIGHTS}


def assert_zeros_kept(after: Model, *, layers: tuple[str, ...] = tuple(WEIGHTS)) -> None:
    before, found = zeros_of(Model.load(pruned_model())), zeros_of(after)
    for name in layers:
        assert before[name].mean() > 0.6
        np.testing.assert_array_equal(found[name] & before[name], before[name], err_msg=name)
        assert found[name].mean() < 0.9  # and not because all is zero


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime() as shared:
        yield shared


def applied(*passes: Pass, runtime: Runtime, folder: Path, target: str = "x86-vnni") -> Model:
    """The pruned model after some passes, calibrated with random samples."""
    model = Model.load(pruned_model())
    data = open_data(random_samples(model), input_specs(model.proto()))
    context = Context(
        data=data, runtime=runtime, workdir=folder, target=find_target(target), exact=Model.load(pruned_model())
    )
    for step in passes:
        assert step.rewrite(model, context).count
    return model


# --- rounding ---------------------------------------------------------------------------------------------------------


@st.composite
def sparse_matrices(draw: st.DrawFn) -> Array:
    values = draw(hnp.arrays(np.float32, (32, 3), elements=st.floats(-50, 50, width=32)))
    return np.where(draw(hnp.arrays(np.bool_, (32, 3))), np.float32(0), values)


@given(
    weight=sparse_matrices(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    block=st.sampled_from([0, 16]),
    method=st.sampled_from(["nearest", "hqq", "gptq"]),
)
def test_every_way_of_rounding_keeps_zeros(weight: Array, bits: int, symmetric: bool, block: int, method: str) -> None:
    grouping, width = group(weight.shape, 1, 0, block), Width(bits, symmetric)
    found = rounded(weight, grouping, width, method).decode().reshape(weight.shape)
    np.testing.assert_array_equal(found[weight == 0], 0)


def rounded(weight: Array, grouping: Grouping, width: Width, method: str) -> Codes:
    if method == "gptq":
        return gptq(weight, grouping, width, correlated_products(len(weight)))
    return (half_quadratic if method == "hqq" else nearest)(weight, grouping, width)


def correlated_products(size: int) -> Array:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(256, 6)) @ rng.normal(size=(6, size)) + 0.1 * rng.normal(size=(256, size))
    return np.asarray(rows.T @ rows)


def test_gptq_still_makes_up_for_rounding_where_weights_are_pruned() -> None:
    weight, products = sparse(64, 32, seed=5), correlated_products(64)
    grouping, width = group(weight.shape, 1), Width(3)

    made, plain = gptq(weight, grouping, width, products), nearest(weight, grouping, width)

    assert output_error(weight, made, products).sum() < 0.6 * output_error(weight, plain, products).sum()


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        QuantizeWeights(),
        QuantizeWeights(symmetric=False),
        QuantizeWeights(bits=4, block=16, symmetric=False),
        QuantizeWeights(bits=3, method="hqq", symmetric=False),
        QuantizeWeights(bits=4, method="gptq"),
        QuantizeWeights(form="compute", bits=8),
        Float16(storage_only=True),
        Float16(),
    ],
    ids=lambda step: "-".join(str(value) for value in (step.name, *step.options().values())),
)
def test_stored_weights_keep_zeros(step: Pass, runtime: Runtime, tmp_path: Path) -> None:
    assert_zeros_kept(applied(step, runtime=runtime, folder=tmp_path))


@pytest.mark.parametrize("remedy", [None, *REMEDIES])
@pytest.mark.parametrize("first", [None, QuantizeWeights(min_elements=1)], ids=["float", "stored"])
def test_int8_computation_keeps_zeros(remedy: str | None, first: Pass | None, runtime: Runtime, tmp_path: Path) -> None:
    step = Quantize(choose=False, remedies=(remedy,) if remedy else ())
    target = "qnn" if remedy == "widen-activations" else "x86-vnni"
    before = (first,) if first else ()
    treated = applied(*before, step, runtime=runtime, folder=tmp_path, target=target)
    assert_zeros_kept(treated)
    if remedy is not None:  # it did something
        plain = applied(*before, Quantize(choose=False), runtime=runtime, folder=tmp_path, target=target)
        assert treated.digest != plain.digest


@pytest.mark.parametrize("target", ["x86", "qnn"])
def test_int8_weights_of_other_targets_keep_zeros(target: str, runtime: Runtime, tmp_path: Path) -> None:
    assert_zeros_kept(applied(Quantize(choose=False), runtime=runtime, folder=tmp_path, target=target))


def test_int8_with_ranges_found_at_run_time_keeps_zeros() -> None:
    weight = sparse(64, 48, seed=1)
    model = Model.load(graph_model("g (float[N, 64] x) => (float[N, 48] y) { [head] y = MatMul(x, W) }", W=weight))
    assert QuantizeDynamic(choose=False).rewrite(model, Context()).count
    [codes] = [c for c in model.constants() if c.dtype == np.int8 and tuple(c.shape) == (64, 48)]
    [node] = [node for node in model.graph.nodes if codes in node.inputs]
    zero = model.weight(node.inputs[3].name) if len(node.inputs) > 3 and node.inputs[3].name else np.int8(0)
    np.testing.assert_array_equal((model.weight(codes.name) == zero)[weight == 0], True)
