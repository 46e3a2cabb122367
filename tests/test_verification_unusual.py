"""`verify` on models that few have: random, of one number, of a fixed batch, quantized already."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcomp import Model, compare, verify
from onnxcomp.cli import main
from onnxcomp.errors import RuntimeFailure
from onnxcomp.report.verification import _verdict
from onnxcomp.runtime import Runtime
from onnxcomp.targets import find_target
from onnxcomp.verification.candidate import CandidateCheck
from onnxcomp.verification.coverage import coverages
from onnxcomp.verification.differences import FLOAT_ERROR, difference, too_far
from onnxcomp.verification.elsewhere import _placement
from onnxcomp.verification.environments import Execution, find_environment
from onnxcomp.verification.results import Difference
from onnxcomp.verification.steps import expose_codes, parting_nodes
from tests import traps
from tests.models import graph_model, mlp_model
from tests.test_judge import loss


def test_outputs_of_one_number_are_compared():
    one, other = ([[np.float64(value)]] for value in (1.0, 1.5))
    assert difference(one, other).max_abs == 0.5
    assert difference([[np.asarray(2.0)]], [[np.asarray(2.0)]]).equal


def test_equal_infinities_do_not_differ_and_a_new_nan_differs_without_end():
    one, other = (np.asarray([np.inf, np.nan, 1.0, value]) for value in (1.0, 1.25))
    assert difference([[one]], [[other]]).max_abs == 0.25
    assert difference([[one]], [[np.full(4, np.nan)]]).max_abs == math.inf


def test_a_model_with_one_number_as_its_output_is_verified():
    model = graph_model("g (float[2, 8] x) => (float y) { s = Sigmoid(x) y = ReduceSum<keepdims = 0>(s) }")
    assert verify(model, model, layers=["cpu"]).passed


def test_the_samples_of_a_fixed_batch_are_counted_not_the_runs():
    model = graph_model("g (float[4, 8] x) => (float[2, 16] y) { y = Reshape(x, s) }", s=np.asarray([2, 16]))
    data = {"x": np.ones((6, 8), np.float32)}
    found = verify(model, model, data=data, layers=["cpu"], samples=6, target="arm64")
    assert {layer.versus_cpu.samples for layer in found.layers if layer.versus_cpu} <= {4, 6}
    assert found.layers[0].versus_cpu is not None
    assert found.layers[0].versus_cpu.samples == 6


def test_a_model_that_was_changed_in_memory_is_verified_not_the_file_that_it_came_from(tmp_path):
    """The model of a Result still knows the original's file."""
    onnx.save(mlp_model(), tmp_path / "m.onnx")
    changed = Model.load(tmp_path / "m.onnx")
    changed.set_weight("W0", changed.weight("W0") * 3)
    assert verify(tmp_path / "m.onnx", changed, layers=["cpu"]).quality["error"] > 0.1
    found = compare(tmp_path / "m.onnx", changed, timing=False)
    assert max(found.sqnr_db.values()) < 20


@pytest.mark.parametrize(("apart", "refused"), [(0.015, False), (0.025, True)])
def test_a_candidate_may_miss_the_original_on_either_side_with_optimizations_off(apart, refused):
    class TwoWays:
        def run(self, path, feeds, *, optimize=True):
            return [[np.full(4, 1.0 if optimize else 1.0 + apart)]]

    judge: Any = SimpleNamespace(
        runtime=TwoWays(), target=find_target("x86-vnni"), deterministic=True, rounding=0.0,
        path_of=lambda model: None, few_feeds=lambda: [{}],
    )  # fmt: skip
    model = Model.load(mlp_model())

    against = CandidateCheck(judge, model).against(model, loss(plain_error=0.01))

    assert (against is not None) is refused


def test_a_model_with_random_outputs_is_compared_with_nothing():
    model = graph_model("g (float[2, 8] x) => (float[2, 8] y) { r = RandomNormalLike(x) y = Add(x, r) }")
    found = verify(model, model, layers=["cpu", "ort"], target="arm64")
    assert [(layer.name, layer.status) for layer in found.layers] == [("cpu", "skipped"), ("ort", "skipped")]
    assert all("random" in layer.reason for layer in found.layers)
    assert found.passed
    assert _verdict(found) == "verified on nothing; NOT on cpu, ort"


def test_a_quantized_model_holds_against_itself():
    """Its int8 kernels round otherwise than its operators one by one, here by 1%."""
    model = traps.softmax(1 / 255)
    data = {"x": np.random.default_rng(1).standard_normal((4, 10)).astype(np.float32)}
    found = verify(model, model, data=data, layers=["cpu"], target="arm64")
    plain = found.layers[1]
    assert plain.what == "optimizations off"
    assert plain.versus_cpu is not None
    assert plain.versus_cpu.error > FLOAT_ERROR
    assert plain.status == "ran"


@pytest.mark.parametrize(("rounding", "apart", "fails"), [(0.0, 2e-3, True), (0.01, 0.019, False), (0.01, 0.03, True)])
def test_the_rounding_of_the_original_is_allowed_twice(rounding, apart, fails):
    nothing, some = (Difference(1, error == 0, error, 0.0, 0.0) for error in (0.0, apart))
    assert bool(too_far(nothing, some, some, rounding)) == fails


def test_a_model_that_cannot_be_written_as_ort_fails_on_its_layers_alone():
    model = graph_model("g (float[2, 8] x) => (optional(float[2, 8]) y) { y = Optional(x) }")
    found = verify(model, model, layers=["cpu", "arm64"], target="arm64")
    told = {layer.name: (layer.status, layer.reason) for layer in found.layers}
    assert told["cpu"] == ("ran", "")
    assert told["arm64"][0] == "failed"
    assert "type" in told["arm64"][1]


def test_a_graph_that_cannot_be_written_has_no_coverage_and_says_why(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        message = "too large"
        raise RuntimeFailure(message)

    monkeypatch.setattr(Runtime, "convert", refuse)
    with Runtime() as runtime:
        found = coverages(runtime, tmp_path / "m.onnx")
    assert [covered.provider for covered in found] == ["NNAPI", "CoreML"]
    assert all("too large" in covered.reason for covered in found)


def test_no_layer_at_all_is_refused_by_the_command():
    """Nothing would have failed, and nothing been verified."""
    result = CliRunner().invoke(main, ["verify", "a.onnx", "b.onnx", "--layers", ","])
    assert result.exit_code == 2
    assert "expected names of layers, such as cpu,ort, and found none" in result.output


def test_codes_of_a_computed_scale_are_not_looked_into():
    model = graph_model(
        "g (float[2] x, float s) => (float[2] y) { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }"
    )
    assert expose_codes(Model.load(model))[1] == []
    assert parting_nodes(Model.load(model), {"y": [np.zeros(2)]}, {"y": [np.ones(2)]}) == ()


@pytest.mark.parametrize(("nodes", "status"), [({}, "failed"), ({"QNNExecutionProvider": {"Relu": 1}}, "ran")])
def test_a_provider_that_no_profile_shows_at_work_is_not_verified(nodes, status):
    ran = Execution([], nodes, "runtime")
    told, reason = _placement(find_environment("qnn"), ran, plain=False)
    assert told == status
    assert ("no node ran on QNNExecutionProvider" in reason) == (status == "failed")
