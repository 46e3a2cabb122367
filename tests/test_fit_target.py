"""What `optimize` does for a target's sake: `fit-target` is kept, and no stage is that brings a trap in."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxcomp import Budget, Changes, Context, Model, Pass, Report, optimize
from onnxcomp.packed import find_packed
from onnxcomp.targets import find_target
from onnxcomp.verification.candidate import CandidateCheck
from onnxcomp.verification.differences import difference
from onnxcomp_passes import FitTarget, Pack
from tests import traps
from tests.models import run

DATA = {"x": np.random.default_rng(0).uniform(-2, 2, (16, 3, 8, 8)).astype(np.float32)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass(frozen=True, kw_only=True)
class Coarsen(Pass):
    """Holds a bias in another scale, which ONNX Runtime's int8 kernel does not see."""

    name: ClassVar[str] = "coarsen"
    lossless: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        changes = Changes()
        model.set_weight("sb", model.weight("sb") * np.float32(8))
        changes.add("sb", "times 8")
        return changes


@dataclass(frozen=True, kw_only=True)
class DropZeroPoint(Pass):
    """Leaves the zero point of weights out: the same values, and XNNPACK refuses the model."""

    name: ClassVar[str] = "drop-zero-point"
    lossless: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        changes = Changes()
        for node in model.graph.nodes:
            if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant) and len(node.inputs) > 2:
                node.inputs.pop(2)
                changes.add(node.outputs[0].name, "zero point left out")
        return changes


def verdicts(report: Report) -> dict[str, tuple[str, str]]:
    return {stage.name: (stage.verdict, stage.reason) for stage in report.stages}


def test_a_stage_that_brings_a_trap_of_the_target_in_is_dropped():
    model = traps.conv(activations="int8")
    told = verdicts(optimize(model, target="xnnpack", passes=[DropZeroPoint()], timing=False).report)
    verdict, reason = told["drop-zero-point"]
    assert verdict == "dropped"
    assert "xnnpack does not take it: conv: its weight's zero point is left out (lint weight-zero-point)" in reason


def test_the_same_stage_is_kept_for_a_target_without_the_trap():
    model = traps.conv(activations="int8")
    told = verdicts(optimize(model, target="arm64", passes=[DropZeroPoint()], timing=False).report)
    assert told["drop-zero-point"][0] == "kept"


def test_a_trap_that_the_original_has_is_not_held_against_a_stage():
    model = traps.gemm(8.0)
    told = verdicts(optimize(model, target="arm64", passes=[Coarsen()], timing=False).report)
    assert "lint" not in told["coarsen"][1]


def test_a_stage_whose_outputs_hang_on_optimizations_is_dropped(monkeypatch):
    """Also where no lint knows the reason."""
    monkeypatch.setattr("onnxcomp.verification.candidate.lint_model", lambda *_: ())
    told = verdicts(optimize(traps.gemm(), target="x86-vnni", passes=[Coarsen()], timing=False).report)
    verdict, reason = told["coarsen"]
    assert verdict == "dropped"
    assert "with ONNX Runtime's optimizations off its outputs differ by" in reason


def test_a_model_that_does_not_come_back_from_the_ort_format_is_dropped(monkeypatch):
    class Wrong:
        equal, max_abs = False, 0.5

    calls = []

    def second_is_wrong(one, other):
        calls.append(1)
        return Wrong if len(calls) % 2 == 0 else difference(one, other)

    monkeypatch.setattr("onnxcomp.verification.candidate.difference", second_is_wrong)
    told = verdicts(optimize(traps.conv(activations="int8"), target="arm64", passes=[DropZeroPoint()]).report)
    assert told["drop-zero-point"] == ("dropped", "read again from the ORT format, its outputs differ by 0.5")


def test_the_check_leaves_nothing_beside_a_file_and_takes_nothing_away(tmp_path):
    """A candidate may be the original again, whose file is the user's."""
    path = tmp_path / "m.onnx"
    Model.load(traps.conv(activations="int8")).save(path)
    (tmp_path / "m.ort").write_bytes(b"mine")
    judge = SimpleNamespace(target=find_target("arm64"))
    check = CandidateCheck(judge, Model.load(path))  # type: ignore[arg-type]  # all that it asks for here
    assert check._unlike_written(path, [{"x": DATA["x"][:1]}]) is None
    assert (tmp_path / "m.ort").read_bytes() == b"mine"


def test_fit_target_is_kept_whatever_it_costs_and_says_so():
    budget = Budget(max_drop=1e-9, max_error=1e-9)
    result = optimize(traps.conv(), target="x86", data=DATA, passes=[FitTarget()], budget=budget, timing=False)
    verdict, reason = verdicts(result.report)["fit-target"]
    assert verdict == "kept"
    assert reason.startswith("the target needs it, although: over the budget")
    assert not result.report.budget_met


def test_fit_target_runs_though_no_loss_can_be_measured():
    proto = traps.conv()
    proto.graph.node.add(op_type="RandomNormalLike", input=["y"], output=["r"])
    proto.graph.output.add(name="r").CopyFrom(proto.graph.output[0])
    proto.graph.output[1].name = "r"
    result = optimize(proto, target="x86", data=DATA, timing=False)
    assert verdicts(result.report)["fit-target"][0] == "kept"
    assert "saturation" not in traps.found(result.model, "x86")


def test_the_default_stages_have_it_only_where_a_lint_finds_what_it_mends():
    with_trap, without = (optimize(traps.conv(limit=limit), target="x86", timing=False).report for limit in (127, 63))
    assert "fit-target" in verdicts(with_trap)
    assert "fit-target" not in verdicts(without)


def test_later_stages_are_judged_though_it_made_the_model_slower():
    """For CoreML the int8 kernels are gone, and what is stored small is kept all the same."""
    result = optimize(traps.conv(), target="coreml", data=DATA, timing=False)
    assert verdicts(result.report)["fit-target"][0] == "kept"
    assert not any("slower" in stage.reason for stage in result.report.stages)


def test_packed_weights_are_mended_too():
    packed = Model.load(traps.conv(activations="int8", weight_zero=None, channels=64, limit=1))
    Pack().rewrite(packed, Context(target=find_target("xnnpack")))
    assert find_packed(packed)
    assert traps.found(packed, "xnnpack") == {"weight-zero-point"}

    fitted = optimize(packed, target="xnnpack", passes=[FitTarget()], timing=False).model

    assert traps.found(fitted, "xnnpack") == set()
    feed = {"x": DATA["x"][:1]}
    np.testing.assert_array_equal(run(packed, feed)[0], run(fitted, feed)[0])


@pytest.mark.parametrize("target", ["xnnpack", "coreml", "x86"])
def test_what_the_user_excludes_stays(target):
    model = Model.load(traps.conv(bias="float"))
    changes = FitTarget().rewrite(model, Context(target=find_target(target), exclude=("*",)))
    assert changes.count == 0
    assert model.digest == Model.load(traps.conv(bias="float")).digest


def test_codes_that_are_an_output_keep_their_type_and_it_says_so():
    proto = traps.conv()
    proto.graph.output.add(name="cq").type.tensor_type.elem_type = 2
    model = Model.load(proto)
    changes = FitTarget().rewrite(model, Context(target=find_target("xnnpack")))
    assert any("'cq' is read or made as codes elsewhere" in left.why for left in changes.left)
