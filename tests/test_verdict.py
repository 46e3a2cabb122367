"""Stages of several passes: what each may spend, what is kept of them, and how they are tried again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxcomp import Budget, Changes, Context, Model, Pass, Stage, optimize
from onnxcomp.judge import Judge
from onnxcomp.pipeline import Result
from onnxcomp.quality import Quality
from onnxcomp_passes import Cluster, Prune, QuantizeWeights, Simplify
from tests.small import INPUTS, classifier

ORIGINAL = Model.load(classifier())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Spend.shares.clear()


@dataclass(frozen=True, kw_only=True)
class Spend(Pass):
    """Multiplies a weight, and notes the share of the budget that it was given."""

    name: ClassVar[str] = "spend"
    shares: ClassVar[list[float]] = []
    factor: float = 1.0

    def rewrite(self, model: Model, context: Context) -> Changes:
        self.shares.append(round(context.share, 3))
        changes = Changes()
        if self.factor != 1.0:
            model.set_weight("b1", model.weight("b1") * np.float32(self.factor))
            changes.add("b1", f"times {self.factor}")
        return changes


@dataclass(frozen=True, kw_only=True)
class Store(QuantizeWeights):
    """Stores weights, and notes the share of the budget that it was given."""

    name: ClassVar[str] = "store"

    def rewrite(self, model: Model, context: Context) -> Changes:
        Spend.shares.append(round(context.share, 3))
        return super().rewrite(model, context)


@dataclass(frozen=True, kw_only=True)
class SeenExact(Spend):
    """Notes the unrounded weight that it may go back to."""

    name: ClassVar[str] = "seen-exact"

    def rewrite(self, model: Model, context: Context) -> Changes:
        return Changes(notes=["none" if context.exact is None else "exact"])


@dataclass(frozen=True, kw_only=True)
class Dawdle(Spend):
    """Takes until the time limit."""

    name: ClassVar[str] = "dawdle"

    def rewrite(self, model: Model, context: Context) -> Changes:
        context.deadline = time.monotonic()
        return Changes()


def optimized(*passes: Pass | Stage, **options: Any) -> Result:
    """A run on the small classifier, which Simplify makes smaller by an Identity, judged by relative error."""
    data = {"x": np.random.default_rng(1).standard_normal((64, INPUTS)).astype(np.float32)}
    return optimize(classifier(), data=data, passes=passes, metric=None, timing=False, **options)


def hold_from(monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """Let the check on the last samples fail, for what is not exact, until lossy passes have run so often."""
    confirm = Judge.confirm

    def judged(judge: Judge, model: Model) -> Quality:
        quality = confirm(judge, model)
        fine = len(Spend.shares) >= runs or judge.is_lossless(quality)
        return quality if fine else replace(quality, error=9.0, plain_error=9.0, error_interval=(9.0, 9.0))

    monkeypatch.setattr(Judge, "confirm", judged)


def has_identity(result: Result) -> bool:
    return any(node.op == "Identity" for node in result.model.graph.nodes)


# --- the budget -------------------------------------------------------------------------------------------------------


def test_lossy_passes_of_a_stage_get_equal_parts_of_the_budget() -> None:
    optimized(Stage((Spend(), Simplify(), Spend(factor=1.02))))
    assert Spend.shares == [0.5, 1.0]


def test_a_pass_chooses_within_the_share_of_its_stage() -> None:
    optimized(Stage((Spend(),), 0.4))
    assert Spend.shares == [0.4]


def test_what_earlier_stages_used_up_is_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "used", lambda judge, model: 0.4)
    optimized(Stage((Spend(), Spend(factor=1.02))))
    assert Spend.shares == [0.7, 1.0]


def test_what_the_last_pass_of_a_stage_does_not_use_goes_to_the_others() -> None:
    """Within half of this budget no weight can be stored."""
    result = optimized(Stage((Store(), Spend())), budget=Budget(max_error=0.03))

    [entry] = result.report.stages
    assert Spend.shares == [0.5, 1.0, 1.0]
    assert entry.verdict == "kept"
    assert [[(step.name, len(step.changed)) for step in attempt.passes] for attempt in entry.attempts] == [
        [("store", 1), ("spend", 0)]
    ]


def test_a_pass_does_not_go_back_behind_a_change_in_its_own_stage() -> None:
    def seen(*passes: Pass) -> str:
        stages = optimized(QuantizeWeights(), Stage((*passes, SeenExact())), force=True).report.stages
        return stages[-1].attempts[0].passes[-1].notes[0]

    assert seen(Simplify()) == "exact"
    assert seen(Spend(factor=1.02)) == "none"


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_lossless_passes_are_kept_alone_where_the_others_do_not_hold() -> None:
    result = optimized(Stage((Spend(factor=9.0), Simplify())))

    [entry] = result.report.stages
    assert (entry.name, entry.verdict) == ("spend + simplify", "kept")
    assert [[step.name for step in attempt.passes] for attempt in entry.attempts] == [
        ["spend", "simplify"],
        ["simplify"],
    ]
    assert "over the budget" in entry.attempts[0].reason
    assert entry.reason.startswith("simplify alone (over the budget: ")
    np.testing.assert_array_equal(result.model.weight("b1"), ORIGINAL.weight("b1"))
    assert not has_identity(result)


@pytest.mark.parametrize(("runs", "verdict"), [(3, "kept"), (99, "dropped")])
def test_a_lossless_stage_stays_when_the_stage_before_it_chooses_again(
    monkeypatch: pytest.MonkeyPatch, runs: int, verdict: str
) -> None:
    hold_from(monkeypatch, runs)

    result = optimized(Store(), Simplify())

    assert Spend.shares == [1.0, 0.7, 0.49, 0.343][:runs]
    assert [(entry.name, entry.verdict) for entry in result.report.stages] == [("store", verdict), ("simplify", "kept")]
    assert not has_identity(result)
    held = [constant.dtype for constant in result.model.constants() if constant.shape == [INPUTS, 48]]
    assert held == [np.int8 if verdict == "kept" else np.float32]


def test_what_has_the_kernels_of_the_model_before_it_is_not_slower_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "_speed", lambda *_: (0.96, "measured"))

    assert [entry.verdict for entry in optimized(Store()).report.stages] == ["kept"]


def test_only_the_lossless_part_of_a_stage_is_kept_where_the_rest_never_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    hold_from(monkeypatch, 99)

    result = optimized(Stage((Store(), Simplify())))

    [entry] = result.report.stages
    assert entry.verdict == "kept"
    assert not has_identity(result)
    np.testing.assert_array_equal(result.model.weight("w1"), ORIGINAL.weight("w1"))


def test_the_report_says_that_zeros_and_codebooks_alone_do_not_pay() -> None:
    alone = [note for note in optimized(Cluster(bits=4), force=True).report.notes if "cluster without pack" in note]
    assert len(alone) == 1
    assert "add -p pack" in alone[0]
    assert not [note for note in optimized(Cluster(bits=4)).report.notes if "without pack" in note]  # it was dropped


def test_a_dropped_stage_whose_lossless_passes_have_nothing_to_do_is_dropped() -> None:
    result = optimized(Simplify(), Stage((Spend(factor=9.0), Simplify())))

    entry = result.report.stages[1]
    assert [attempt.verdict for attempt in entry.attempts] == ["dropped", "unchanged"]
    assert entry.verdict == "dropped"
    assert "over the budget" in entry.reason


# --- why nothing changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Prune(keep_ends="false"), Cluster()])
def test_what_was_not_measured_for_want_of_time_is_not_said_to_cost_too_much(step: Pass) -> None:
    [entry] = optimized(Stage((Dawdle(), step))).report.stages

    assert entry.verdict == "unchanged"
    assert entry.reason == f"{step.name}: the time limit was reached before it was chosen (2 of 2)"


@pytest.mark.parametrize("step", [Prune(keep_ends="false"), Cluster()])
def test_nothing_is_measured_where_the_budget_is_used_up(step: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(judge: Judge, model: Model) -> float:
        raise AssertionError

    monkeypatch.setattr(Judge, "allows", lambda judge, quality, share=1.0: False)
    monkeypatch.setattr(Judge, "rough_error", refuse)

    [entry] = optimized(step).report.stages

    assert entry.verdict == "unchanged"
    assert entry.reason == "the model as it is uses up the part of the budget that this may take (2 of 2)"


@pytest.mark.parametrize("step", [Prune(keep_ends="false"), Cluster()])
def test_no_more_is_measured_where_not_even_the_gentlest_change_holds(
    step: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    rough_error = Judge.rough_error

    def rough(judge: Judge, model: Model) -> float:
        measured.append(model.digest)
        return rough_error(judge, model)

    monkeypatch.setattr(Judge, "rough_error", rough)
    monkeypatch.setattr(Judge, "allows", lambda judge, quality, share=1.0: quality.plain_error < 1e-6)

    [entry] = optimized(step).report.stages

    assert entry.verdict == "unchanged"
    assert entry.reason.endswith(" (2 of 2)")
    assert len(measured) == 3  # the model as it is, and each of two weights once
