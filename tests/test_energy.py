"""What each value of a weight is multiplied with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Cluster
from onnxcomp_passes._energy import input_energies
from onnxcomp_passes._views import find_views
from tests.models import graph_model, random_weights, run

Array = np.ndarray[Any, Any]

LAYERS = {
    "Conv": ("float[N, 6, 5, 5] x", "y = Conv(x, W)", (4, 6, 1, 1), 1),
    "Conv<group = 2>": ("float[N, 6, 5, 5] x", "y = Conv<group = 2>(x, W)", (4, 3, 1, 1), 1),
    "Conv<group = 6>": ("float[N, 6, 5, 5] x", "y = Conv<group = 6>(x, W)", (6, 1, 1, 1), 1),
    "ConvTranspose": ("float[N, 6, 5, 5] x", "y = ConvTranspose(x, W)", (6, 4, 1, 1), 1),
    "Gemm": ("float[N, 6] x", "y = Gemm(x, W)", (6, 4), -1),
    "Gemm<transB = 1>": ("float[N, 6] x", "y = Gemm<transB = 1>(x, W)", (4, 6), -1),
    "MatMul": ("float[N, 3, 6] x", "y = MatMul(x, W)", (6, 4), -1),
}


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime() as shared:
        yield shared


def context(proto: onnx.ModelProto, x: Array, runtime: Runtime, folder: Path) -> Context:
    return Context(data=open_data({"x": x}, input_specs(proto)), runtime=runtime, workdir=folder)


def uneven(*shape: int, axis: int) -> Array:
    """Inputs whose channels are of unlike size."""
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    sizes = (2.0 ** np.arange(x.shape[axis])).astype(np.float32)
    return np.asarray(x * sizes.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_value_counts_what_it_adds_to_the_output(layer: str, runtime: Runtime, tmp_path: Path) -> None:
    """One value of the weight set to 1 and all others to 0: the outputs are the input channel that it meets."""
    takes, node, shape, axis = LAYERS[layer]
    dims = takes.partition("[")[2].partition("]")[0].split(", ")
    gives = ", ".join(f"D{place}" for place in range(len(dims)))
    proto = graph_model(f"g ({takes}) => (float[{gives}] y) {{ {node} }}", W=random_weights(*shape))
    x = uneven(*(32 if dim == "N" else int(dim) for dim in dims), axis=axis)
    model = Model.load(proto)
    views = find_views(model)

    [energy] = input_energies(model, views, context(proto, x, runtime, tmp_path)).values()

    found = np.broadcast_to(energy, shape)
    for place in ((0, 0), (3, 0), (shape[0] - 1, shape[1] - 1)):
        index = (*place, *[0] * (len(shape) - 2))
        single = np.zeros(shape, np.float32)
        single[index] = 1
        model.set_weight("W", single)
        [y] = run(model, {"x": x})
        outputs = y.shape[axis]
        assert found[index] == pytest.approx(np.mean(np.square(y, dtype=float)) * outputs, rel=1e-5)


def test_codebooks_fit_where_the_input_is_large(runtime: Runtime, tmp_path: Path) -> None:
    weight = (
        random_weights(12, 96) / (2.0 ** np.arange(12, dtype=np.float32))[:, None]
    )  # small where the input is large
    proto = graph_model("g (float[N, 12] x) => (float[N, 96] y) { y = MatMul(x, W) }", W=weight)
    seen, held_out = np.split(uneven(256, 12, axis=1), 2)
    [wanted] = run(proto, {"x": held_out})
    errors = []
    for energy in (False, True):
        model = Model.load(proto)
        Cluster(bits=3, energy=energy).rewrite(model, context(proto, seen, runtime, tmp_path))
        errors.append(relative_error([(wanted, run(model, {"x": held_out})[0])]))
    assert errors[1] < 0.5 * errors[0]
