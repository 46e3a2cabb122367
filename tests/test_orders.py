"""Pruning, clustering, quantization and packing in any order that a user writes: it works, or is refused beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import optimize
from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.packed import unpack
from onnxcomp.passes import Context, Pass
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp_passes import Cluster, Float16, Pack, Prune, Quantize, QuantizeWeights
from onnxcomp_passes._views import find_views
from tests.models import SMALL_NETWORK, graph_model, random_weights
from tests.quantizing import random_samples
from tests.small import classifier

Array = np.ndarray[Any, Any]

PASSES: dict[str, Pass] = {
    "prune": Prune(sparsity=0.6, keep_ends="false"),
    "cluster": Cluster(bits=4),
    "quantize": Quantize(choose=False),
    "quantize-weights": QuantizeWeights(min_elements=1),
    "float16": Float16(storage_only=True),
    "pack": Pack(),
}
ORDERS = [
    *((*two, "pack") for two in itertools.permutations([name for name in PASSES if name != "pack"], 2)),
    *itertools.permutations(("prune", "quantize", "quantize-weights")),
]
UNDOES_CLUSTERS = frozenset({"quantize", "quantize-weights"})
"""With a scale a channel, a few values a tensor become other codes in each channel."""

REFUSED = [order for order in itertools.permutations(("prune", "quantize", "pack")) if order[-1] != "pack"]

LAYERS = ("first", "middle", "head")


def small_network() -> onnx.ModelProto:
    """Two Conv and a Gemm."""
    shapes = {"first": (16, 4, 3, 3), "middle": (32, 16, 3, 3), "head": (128, 20)}
    weights = {f"{name}_w": random_weights(*shape, seed=i, scale=0.1) for i, (name, shape) in enumerate(shapes.items())}
    return graph_model(SMALL_NETWORK, weights, first_b=random_weights(16), head_b=random_weights(20))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime() as shared:
        yield shared


@pytest.fixture
def context(runtime: Runtime, tmp_path: Path) -> Context:
    proto = small_network()
    data = open_data(random_samples(Model.load(proto)), input_specs(proto))
    return Context(data=data, runtime=runtime, workdir=tmp_path, target=find_target("x86-vnni"))


def zeros_of(model: Model) -> dict[str, Array]:
    """Where each layer's weight is zero, packed or not."""
    dense = model.fork()
    unpack(dense)
    return {view.node.name: view.read() == 0 for view in find_views(dense) if view.node.name in LAYERS}


def outputs(model: Model, context: Context, *, optimized: bool) -> Array:
    assert context.runtime is not None
    assert context.workdir is not None
    assert context.data is not None
    path = context.workdir / "model.onnx"
    model.save(path)
    return np.concatenate([run[0] for run in context.runtime.run(path, context.data.feeds(), optimize=optimized)])


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order_gives_a_valid_model_that_keeps_its_zeros(order: tuple[str, ...], context: Context) -> None:
    model = Model.load(small_network())
    wanted = outputs(model, context, optimized=True)
    zeros: dict[str, Array] = {}
    for name in order:
        before = model.size_bytes
        changes = PASSES[name].rewrite(model, context)
        onnx.checker.check_model(model.to_proto(), full_check=True)
        assert changes.count or name not in {"prune", "cluster"}
        if name == "pack":
            few = "cluster" in order and not UNDOES_CLUSTERS.intersection(order[order.index("cluster") :])
            assert model.size_bytes <= (0.75 if few or "prune" in order else 1.0) * before
        if name == "prune":
            zeros = zeros_of(model)
            assert np.concatenate([found.reshape(-1) for found in zeros.values()]).mean() == pytest.approx(
                0.6, abs=0.05
            )
    after = zeros_of(model)
    for name, found in zeros.items():
        np.testing.assert_array_equal(after[name] & found, found)

    plain, fused = (outputs(model, context, optimized=optimized) for optimized in (False, True))
    assert relative_error([(wanted, fused)]) < (0.6 if "prune" in order else 0.2)
    assert relative_error([(plain, fused)]) < 0.02  # int8 kernels round where Q and DQ do


@pytest.mark.parametrize("order", REFUSED, ids="-".join)
def test_what_packing_would_hide_is_refused_before_any_work(order: tuple[str, ...]) -> None:
    def no_work(text: str) -> None:
        pytest.fail(f"work was begun: {text}")

    with pytest.raises(OptionError, match="cannot look into the weights that pack has written; put pack after it"):
        optimize(
            classifier(), data={"x": np.zeros((8, 32), np.float32)}, passes=[PASSES[n] for n in order], progress=no_work
        )


@pytest.mark.parametrize("order", [("prune", "quantize", "pack"), ("quantize", "prune", "pack")], ids="-".join)
def test_a_whole_run_tells_what_each_pass_did(order: tuple[str, ...], tmp_path: Path) -> None:
    proto = small_network()
    result = optimize(
        proto,
        data=random_samples(Model.load(proto), samples=64),
        passes=[PASSES[name] for name in order],
        timing=False,
        force=True,
        resume=False,
    )

    report = result.report
    assert [entry.verdict in {"kept", "forced"} for entry in report.stages] == [True] * len(report.stages)
    steps = [step for entry in report.stages for step in entry.attempts[-1].passes]
    assert [step.name for step in steps] == list(order)
    assert all(step.changed for step in steps)
    assert report.size > 4
    assert report.after.resident_bytes is not None
    assert report.before.resident_bytes is not None
    assert report.after.resident_bytes < 0.5 * report.before.resident_bytes
    assert not [note for note in report.notes if "without pack" in note]
