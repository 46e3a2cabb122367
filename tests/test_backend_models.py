from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.backend_cases import Case, difference, load_cases
from benchmarks.backend_checks import LOAD_AND_SAVE, OPTIMIZE
from benchmarks.backend_models import check_cases, everything
from benchmarks.large_model import make_large_model, simplify_in_fresh_process
from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from tests.models import graph_model

SAMPLE, SMALL_SAMPLE = 150, 12
SEED = 20
SIMPLIFIED = (LOAD_AND_SAVE, "simplify")
UNTRAINED = [name for name in everything() if name not in {*SIMPLIFIED, "distill", "fine-tune", "qat", OPTIMIZE}]


def has_graphs_or_sequences(case: Case) -> bool:
    """Whether a model has control flow, sequences, optionals or functions of its own."""
    special = {"If", "Loop", "Scan", "SequenceMap"}
    kinds = {info.type.WhichOneof("value") for info in (*case.model.graph.input, *case.model.graph.output)}
    own = any(node.op_type in special or "Sequence" in node.op_type for node in case.model.graph.node)
    return own or bool(kinds & {"sequence_type", "optional_type"}) or bool(case.model.functions)


def broken(names: list[str], what: Sequence[str]) -> list[tuple[str, str, str]]:
    outcomes = check_cases(names, what)
    assert {(outcome.name, outcome.what) for outcome in outcomes} == {(name, each) for name in names for each in what}
    assert sum(outcome.ran for outcome in outcomes) > 0.9 * len(outcomes)
    return [(outcome.name, outcome.what, outcome.why) for outcome in outcomes if outcome.broken]


def sample_of(size: int) -> list[str]:
    return random.Random(SEED).sample(sorted(load_cases()), size)


@pytest.mark.parametrize("half", [0, 1])
def test_a_sample_of_onnx_s_own_models_survives(half):
    assert broken(sample_of(SAMPLE)[half::2], SIMPLIFIED) == []


def test_a_smaller_sample_survives_every_pass_that_does_not_train():
    assert broken(sample_of(SMALL_SAMPLE), UNTRAINED) == []


def test_the_whole_pipeline_has_a_verdict_for_each_stage():
    assert broken(["pytorch-converted/test_Conv2d", "node/test_if"], [OPTIMIZE]) == []


def test_models_with_control_flow_sequences_and_functions_survive():
    names = sorted(name for name, case in load_cases().items() if has_graphs_or_sequences(case) and "light" not in name)

    assert broken(names, SIMPLIFIED) == []


@pytest.mark.slow
@pytest.mark.parametrize("what", everything())
def test_all_of_onnx_s_own_models_survive(what):
    assert broken(sorted(load_cases()), [what]) == []


@pytest.mark.parametrize(
    ("wanted", "got", "reason"),
    [
        ([np.float32(1)], [np.float32(1.01)], "output 0: largest difference 0.00999"),
        ([np.ones(2)], [np.ones(3)], r"output 0: shape \(3,\), expected \(2,\)"),
        ([np.ones(2)], [np.ones(2, int)], "output 0: dtype int64, expected float64"),
        ([["a"]], [["b"]], "output 0: output 0: other strings"),
        ([None], [np.ones(1)], "output 0: only one is empty"),
        ([1, 2], [1], "1 outputs, expected 2"),
        ([np.nan], [0.0], "output 0: largest difference nan"),
    ],
)
def test_the_comparison_finds_a_difference(wanted, got, reason):
    case = Case("x", graph_model("g (float x) => (float y) { y = Relu(x) }"), (), 1e-3, 1e-7)

    assert re.match(reason, difference(wanted, got, case))


def test_a_wrong_rewrite_is_found(monkeypatch):
    def negate(model: Model) -> None:
        for node in model.graph.nodes:
            node.op = "Neg" if node.op == "Relu" else node.op

    monkeypatch.setattr("onnxcomp_passes.simplify.drop_traces", negate)

    outcomes = check_cases(["node/test_relu", "node/test_abs"], ["simplify"])

    assert {outcome.name: outcome.status for outcome in outcomes} == {"node/test_relu": "wrong", "node/test_abs": "ok"}


@pytest.mark.parametrize(
    ("act", "status"),
    [
        ("raise ValueError", "crash"),
        ("os._exit(3)", "crash"),
        ("model.graph.nodes[0].inputs.clear()", "invalid"),
        ("model.graph.nodes[0].op = 'Exp'", "wrong"),
        ("raise ModelError('no')", "refused"),
        ("", "ok"),
    ],
)
def test_what_goes_wrong_is_called_by_its_name(act, status, monkeypatch):
    def fail(model: Model) -> None:
        exec(act, {"model": model, "os": os, "ModelError": ModelError})

    monkeypatch.setattr("onnxcomp_passes.simplify.drop_traces", fail)

    assert [outcome.status for outcome in check_cases(["node/test_abs"], ["simplify"])] == [status]


@pytest.mark.slow
def test_a_large_model_needs_little_memory(tmp_path):
    path = make_large_model(tmp_path, 0.6)

    result = simplify_in_fresh_process(path, tmp_path / "out.onnx")

    assert result["peak_mb"] - result["before_mb"] < 100
    assert result["changes"][-1] == "initializers that equal another one removed: 1"
