"""The contract of `test_every_pass.py` on graphs that nobody wrote.

A small number with a fixed seed each time; thousands with other seeds in a nightly run, as many as
ONNXCOMP_RANDOM_GRAPHS says:

    ONNXCOMP_RANDOM_GRAPHS=20000 pytest -m slow tests/test_random_graphs.py
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from onnxcomp.data import input_specs, open_data
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, registered_passes
from onnxcomp.runtime import Runtime
from tests.models import graph_model
from tests.wide_strategies import WideGraph, wide_graphs

ROUNDING = 1e-4
"""Relative to the largest output: graphs of a dozen layers whose results partly cancel lose more than single ones."""

FUSED_INT8 = 2e-2
"""The same where ONNX Runtime's optimizations meet int8 weights: it fuses a MatMul with the DequantizeLinear that it
alone reads, and rounds its other input too. Which it fuses hangs on what else reads the weight."""

COUNT = int(os.environ.get("ONNXCOMP_RANDOM_GRAPHS", "2000"))
UNTRAINED = [name for name, cls in registered_passes().items() if "torch" not in cls.requires]
CHEAP = {"epochs": 1.0, "batch_size": 4, "held_out": 0.5}
NIGHTLY = [*UNTRAINED, *(name for name, cls in registered_passes().items() if "torch" in cls.requires)]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    with Runtime() as runtime:
        yield Context(runtime=runtime, workdir=tmp_path_factory.mktemp("random"))


def make(name: str) -> Pass:
    """A pass in its default form; those that train in a cheap one."""
    cls = registered_passes()[name]
    return cls(**CHEAP) if "torch" in cls.requires else cls()


def context_of(step: Pass, graph: WideGraph, base: Context) -> Context:
    """What the pass may use: data only where it says that it needs them."""
    data = None
    if step.requires & {"data", "labels"}:
        samples: dict[str, Any] = dict(graph.samples)
        if "labels" in step.requires:
            samples["label"] = np.zeros(len(samples["z"]), np.int64)
        data = open_data(samples, input_specs(graph.model))
    return Context(data=data, runtime=base.runtime, workdir=base.workdir)


def check_contract(graph: WideGraph, step: Pass, base: Context) -> None:
    """Apply a pass twice to a graph, and to an equal one, and look at all that every pass promises."""
    source = Model.load(graph.model)
    before = source.digest
    results, changes = [], Changes()
    for _ in range(2):
        result = source.fork()
        try:
            changes = step.rewrite(result, context_of(step, graph, base))
        except OnnxcompError as error:
            assert "\n" not in str(error)  # noqa: PT017 - an error is as good an outcome as a result
            return  # the pipeline drops the stage and says why
        results.append(result)
    assert results[0].digest == results[1].digest, "the same model gives another result"
    assert source.digest == before, "the model that was forked was touched"
    assert (changes.count == 0) == (results[0].digest == before), f"{changes.count} changes are not honest"
    if changes.count and can_run(graph, base):
        check_result(graph, step, results[0], base)


def check_result(graph: WideGraph, step: Pass, result: Model, base: Context) -> None:
    """Look at a changed model."""
    proto = result.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(graph.model.graph.input)
    assert list(proto.graph.output) == list(graph.model.graph.output)
    assert base.workdir is not None
    path = Path(base.workdir) / "result.onnx"
    result.save(path)
    assert Model.load(path).digest == result.digest, "the file has another model"
    if step.idempotent:
        again = step.rewrite(Model.load(path), context_of(step, graph, base))
        assert again.count == 0, f"a second time changes {again.changed[0]}"
    has_int8 = any(node.op_type == "DequantizeLinear" for node in graph.model.graph.node)
    limits = (ROUNDING, FUSED_INT8 if has_int8 else ROUNDING)
    for limit, wanted, got in zip(limits, runs(graph, graph.model, base), runs(graph, proto, base), strict=True):
        for one, other in zip(wanted, got, strict=True):
            compare(np.asarray(one), np.asarray(other), limit if step.lossless else None)


def runs(graph: WideGraph, model: onnx.ModelProto, base: Context) -> list[list[Any]]:
    """What a model gives without and with ONNX Runtime's optimizations, in another process: some models crash it."""
    assert base.runtime is not None
    assert base.workdir is not None
    path = Path(base.workdir) / "run.onnx"
    onnx.save(model, path)
    feeds = {False: graph.feed(2), True: graph.feed(3)}
    return [outputs for each, feed in feeds.items() for outputs in base.runtime.run(path, [feed], optimize=each)]


def can_run(graph: WideGraph, base: Context) -> bool:
    """Whether ONNX Runtime takes the graph itself; it breaks some between QuantizeLinear of different types."""
    try:
        return bool(runs(graph, graph.model, base))
    except OnnxcompError:
        return False


def compare(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any], limit: float | None) -> None:
    """Equal types and shapes; equal values, to so much of the largest, where there is a limit."""
    assert (wanted.dtype, wanted.shape) == (got.dtype, got.shape)
    if limit is not None:
        finite = np.abs(wanted[np.isfinite(wanted)])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=limit * float(finite.max(initial=1.0)))


@given(wide_graphs(), st.sampled_from(UNTRAINED))
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
def test_a_random_graph_keeps_the_contract_of_a_pass(context: Context, graph: WideGraph, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # values that overflow in the graph overflow in a pass
        check_contract(graph, make(name), context)


@pytest.mark.slow
@pytest.mark.parametrize("name", NIGHTLY)
def test_thousands_of_random_graphs_keep_the_contract(context: Context, name: str):
    count = COUNT // 10 if "torch" in registered_passes()[name].requires else COUNT

    @given(wide_graphs())
    @settings(max_examples=count, deadline=None, suppress_health_check=[*HealthCheck], print_blob=True)
    def keeps(graph: WideGraph) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            check_contract(graph, make(name), context)

    keeps()


def test_the_contract_notices_a_wrong_result(context: Context, monkeypatch: pytest.MonkeyPatch):
    def negate(model: Model) -> None:
        for node in model.graph.nodes:
            node.op = "Neg" if node.op == "Relu" else node.op

    monkeypatch.setattr("onnxcomp_passes.simplify.drop_traces", negate)
    model = graph_model("g (float[N, 4] z) => (float[N, 4] y) { i = Identity(z) y = Relu(i) }")
    graph = WideGraph(model, {"z": np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)})

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_contract(graph, make("simplify"), context)
