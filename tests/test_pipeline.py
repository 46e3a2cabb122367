"""`optimize`: what is kept, what is dropped, and that the report tells the truth about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from onnxcomp import pipeline
from onnxcomp.budget import Budget
from onnxcomp.errors import DataError, ModelError, OptionError, RequirementError, RuntimeFailure
from onnxcomp.judge import Judge
from onnxcomp.ledger import Report, StageEntry
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass
from onnxcomp.pipeline import Result, optimize
from onnxcomp.quality import Quality
from onnxcomp.runtime import Runtime
from onnxcomp_passes import Quantize, QuantizeWeights, Simplify
from tests.models import mlp_model

SAMPLES = Path(__file__).parent.parent / "sample_models"
LENET = SAMPLES / "fashion_lenet.onnx"
MOBILENET = SAMPLES / "fashion_mobilenet.onnx"
CALIB = SAMPLES / "fashion_calib.npz"
TEST = SAMPLES / "fashion_test.npz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies the weight: before W, after factor * W. Left alone: nothing."""

    name: ClassVar[str] = "scale"
    factor: float = 1.0

    def rewrite(self, model: Model, context: Context) -> Changes:
        changes = Changes()
        model.set_weight("W", model.weight("W") * np.float32(self.factor))
        changes.add("W", f"times {self.factor}")
        return changes

    def weaker(self) -> Iterator[Self]:
        for factor in (1.05, 1.001):
            yield type(self)(factor=factor)


@dataclass(frozen=True, kw_only=True)
class Liar(Scale):
    """Claims to be lossless: before W, after 2 W. Left alone: nothing."""

    name: ClassVar[str] = "liar"
    lossless: ClassVar[bool] = True
    factor: float = 2.0

    def weaker(self) -> Iterator[Self]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Breaker(Pass):
    """Renames the output: before y, after broken. Left alone: nothing."""

    name: ClassVar[str] = "breaker"

    def rewrite(self, model: Model, context: Context) -> Changes:
        changes = Changes()
        model.graph.outputs[0].name = "broken"
        changes.add("y", "renamed")
        return changes


@dataclass(frozen=True, kw_only=True)
class Recorder(QuantizeWeights):
    """Stores weights, and notes the share of the budget that it was given and whether the judge was cautious."""

    name: ClassVar[str] = "recorder"
    min_elements: int = 1
    shares: ClassVar[list[float]] = []
    cautious: ClassVar[list[bool]] = []

    def rewrite(self, model: Model, context: Context) -> Changes:
        self.shares.append(round(context.share, 3))
        self.cautious.append(context.judge is not None and context.judge.cautious)
        return super().rewrite(model, context)


@dataclass(frozen=True, kw_only=True)
class Ordered(Recorder):
    """Stores weights in so many bits, whatever the budget: an order, not a choice."""

    name: ClassVar[str] = "ordered"
    bits: int = 6

    def weaker(self) -> Iterator[Ordered]:
        if self.bits < 8:
            yield replace(self, bits=self.bits + 1)

    def rewrite(self, model: Model, context: Context) -> Changes:
        Recorder.shares.append(self.bits)
        return QuantizeWeights(bits=self.bits, min_elements=1, choose=False).rewrite(model, Context())


@dataclass(frozen=True, kw_only=True)
class SeenExact(Pass):
    """Notes the unrounded weight that it may go back to. Left alone: all."""

    name: ClassVar[str] = "seen-exact"

    def rewrite(self, model: Model, context: Context) -> Changes:
        changes = Changes()
        seen = "none" if context.exact is None else f"{context.exact.weight('W').ravel()[0]:.6f}"
        changes.notes.append(seen)
        return changes


def confirm_only_from(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    """Let the check on the last samples fail until the recorder has run so often."""
    Recorder.shares.clear()
    Recorder.cautious.clear()
    confirm = Judge.confirm

    def judged(judge: Judge, model: Model) -> Quality:
        quality = confirm(judge, model)
        return (
            quality
            if len(Recorder.shares) >= run
            else replace(quality, error=9.0, plain_error=9.0, error_interval=(9.0, 9.0))
        )

    monkeypatch.setattr(Judge, "confirm", judged)


def small_model(outputs: int = 6, final: str = "y = MatMul(x, W)") -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => (float[N, {outputs}] y) {{ {final} }}'
    proto = parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, outputs)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    for node in proto.graph.node:
        node.ClearField("domain")
    return proto


def small_data(count: int = 64, **more: Any) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((count, 64)).astype(np.float32), **more}


def stage(result: Result, name: str) -> StageEntry:
    return next(entry for entry in result.report.stages if entry.name == name)


def top1(path: Path | bytes) -> float:
    with np.load(TEST) as data:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits = session.run(None, {"image": data["image"]})[0]
        return float((logits.argmax(1) == data["label"]).mean())


def test_makes_a_trained_model_several_times_smaller_at_its_accuracy(tmp_path: Path) -> None:
    result = optimize(MOBILENET, data=CALIB)
    result.save(tmp_path / "small.onnx")

    assert result.report.size > 3
    assert result.report.budget_met
    assert (tmp_path / "small.onnx").stat().st_size * 3 < MOBILENET.stat().st_size
    assert top1(MOBILENET) - top1(tmp_path / "small.onnx") <= 0.005


def measured_speed(before: Path, after: Path) -> float:
    with np.load(CALIB) as data, Runtime() as runtime:
        one, other = runtime.time([before, after], {"image": data["image"][:1]}, min_rounds=200, seconds=1.0)
    return one.median_ms / other.median_ms


def test_zeros_and_codebooks_are_packed_on_top_of_int8_where_they_pay(tmp_path: Path) -> None:
    result = optimize(LENET, data=CALIB, budget=Budget(max_drop=0.01), timing=False)  # else near ties may go either way
    result.save(tmp_path / "small.onnx")

    report = result.report
    assert stage(result, "prune + cluster + pack").verdict == "kept"
    assert report.size >= 8
    assert measured_speed(LENET, tmp_path / "small.onnx") >= 0.97
    assert report.after.int8_macs == report.after.macs
    assert (report.before.resident_bytes or 0) > 3.5 * (report.after.resident_bytes or 0)
    assert report.budget_met
    assert top1(LENET) - top1(tmp_path / "small.onnx") <= 0.01


def test_the_report_holds_what_a_fresh_session_computes(tmp_path: Path) -> None:
    result = optimize(LENET, data=TEST, metric="top1")
    result.save(tmp_path / "small.onnx")

    with np.load(TEST) as data:
        images, labels = data["image"], data["label"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    logits = onnxruntime.InferenceSession(tmp_path / "small.onnx", options).run(None, {"image": images})[0]
    order = np.random.default_rng(0).permutation(len(labels))
    confirm = np.sort(order[-250:])
    assert result.report.after.metric == pytest.approx((logits.argmax(1) == labels)[confirm].mean(), abs=1e-9)
    assert result.report.after.size_bytes == pytest.approx((tmp_path / "small.onnx").stat().st_size, abs=64)


def test_without_data_only_data_free_stages_run_and_the_report_says_so() -> None:
    report = optimize(LENET).report

    assert [entry.name for entry in report.stages] == [
        "simplify",
        "quantize-weights",
        "float16",
        "prune + cluster + pack",
    ]
    assert report.data["generated"]
    assert any("no data" in warning for warning in report.warnings)
    assert report.size > 3


def test_a_stage_that_breaks_the_budget_is_tried_weaker_then_kept() -> None:
    result = optimize(small_model(), data=small_data(), passes=[Scale(factor=2.0)], force=False)

    entry = stage(result, "scale")
    assert [attempt.verdict for attempt in entry.attempts] == ["dropped", "dropped", "dropped"]
    assert "over the budget" in entry.attempts[0].reason
    assert "does not pay" in entry.attempts[2].reason
    np.testing.assert_array_equal(result.model.weight("W"), Model.load(small_model()).weight("W"))


def test_a_stage_that_does_not_hold_at_the_end_chooses_again_within_less(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=3)

    result = optimize(small_model(), data=small_data(), passes=[Recorder()])

    entry = stage(result, "recorder")
    assert Recorder.shares == [1.0, 0.7, 0.49]
    assert entry.verdict == "kept"
    assert [attempt.verdict for attempt in entry.attempts] == ["dropped", "dropped", "kept"]
    assert "did not hold on the samples kept for confirmation" in entry.attempts[0].reason


def test_only_later_choices_are_cautious(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=2)

    optimize(small_model(), data=small_data(), passes=[Recorder()])

    assert Recorder.cautious == [False, True]


def test_an_order_that_does_not_hold_at_the_end_goes_on_with_its_weaker_form(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=2)

    result = optimize(small_model(), data=small_data(), passes=[Ordered()], budget=Budget(max_error=1.0))

    entry = stage(result, "ordered")
    assert Recorder.shares == [6, 7]
    assert entry.verdict == "kept"
    assert [attempt.verdict for attempt in entry.attempts] == ["dropped", "kept"]


def test_an_order_that_never_holds_at_the_end_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=99)

    result = optimize(small_model(), data=small_data(), passes=[Ordered()], budget=Budget(max_error=1.0))

    assert Recorder.shares == [6, 7]
    assert stage(result, "ordered").verdict == "dropped"


def test_a_stage_that_never_holds_at_the_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=99)

    result = optimize(small_model(), data=small_data(), passes=[Recorder()])

    assert Recorder.shares == [1.0, 0.7, 0.49, 0.343]
    assert stage(result, "recorder").verdict == "dropped"
    assert result.model.digest == Model.load(small_model()).digest


def test_the_stage_before_a_dropped_one_has_tries_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm_only_from(monkeypatch, run=99)

    stages = [Recorder(skip=("W1",)), Recorder(skip=("W0",))]
    optimize(mlp_model((64, 48, 32)), data=small_data(), passes=stages)

    assert Recorder.shares == [1.0, 1.0, 0.7, 0.49, 0.343, 0.7, 0.49, 0.343]


def test_later_passes_go_back_behind_rounding_but_not_behind_other_changes_of_weights() -> None:
    first = float(Model.load(small_model()).weight("W").ravel()[0])

    def seen(*passes: Pass) -> str:
        stages = optimize(small_model(), data=small_data(), passes=[*passes, SeenExact()], force=True).report.stages
        return str(stages[-1].attempts[0].passes[0].notes[0])

    assert seen(QuantizeWeights(min_elements=1)) == f"{first:.6f}"
    assert seen(QuantizeWeights(min_elements=1), Simplify()) == f"{first:.6f}"
    assert seen(Scale(factor=1.001)) == "none"
    assert seen(Scale(factor=1.001), QuantizeWeights(min_elements=1)) == f"{1.001 * first:.6f}"


def test_force_keeps_a_stage_and_says_what_speaks_against_it() -> None:
    result = optimize(small_model(), data=small_data(), passes=[Scale(factor=2.0)], force=True)

    entry = stage(result, "scale")
    assert entry.verdict == "forced"
    assert "although: over the budget" in entry.reason
    assert not result.report.budget_met


def test_a_pass_that_only_claims_to_be_lossless_is_dropped() -> None:
    result = optimize(small_model(), data=small_data(), passes=[Liar()])

    assert stage(result, "liar").verdict == "dropped"
    assert "claims to be lossless" in stage(result, "liar").reason


def test_a_pass_that_changes_the_interface_is_dropped() -> None:
    result = optimize(small_model(), data=small_data(), passes=[Breaker()])

    assert "changed the model's inputs or outputs" in stage(result, "breaker").reason
    assert [tensor.name for tensor in result.model.graph.outputs] == ["y"]


def test_a_model_with_random_outputs_gets_lossless_stages_only() -> None:
    model = small_model(final="r = RandomNormalLike(x)  z = Add(x, r)  i = Identity(z)  y = MatMul(i, W)")

    report = optimize(model).report

    assert [entry.verdict for entry in report.stages] == ["kept", "skipped", "skipped", "unchanged"]
    assert any("random" in warning for warning in report.warnings)


def test_nothing_helps_is_not_an_error() -> None:
    result = optimize(small_model(outputs=1), data=small_data())

    assert result.report.verdict.startswith("nothing helped")
    assert result.model.digest == Model.load(small_model(outputs=1)).digest


def test_optimizing_twice_changes_nothing(tmp_path: Path) -> None:
    once = optimize(LENET, data=CALIB, timing=False)
    again = optimize(once.model, data=CALIB, timing=False)

    assert again.model.digest == once.model.digest


@pytest.mark.slow
def test_without_timing_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        optimize(MOBILENET, data=CALIB, timing=False).save(tmp_path / f"{name}.onnx")

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_replay_takes_the_decisions_of_an_earlier_run(tmp_path: Path) -> None:
    from onnxcomp.report import write_json

    first = optimize(MOBILENET, data=CALIB)
    write_json(first.report, tmp_path / "report.json")

    again = optimize(MOBILENET, data=CALIB, replay=tmp_path / "report.json")

    assert again.model.digest == first.model.digest


def test_replay_refuses_a_file_that_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")

    with pytest.raises(OptionError, match="is not a report"):
        optimize(LENET, data=CALIB, replay=tmp_path / "report.json")


def test_labels_that_look_like_classes_are_judged_by_top1() -> None:
    report = optimize(LENET, data=TEST, passes=[QuantizeWeights()]).report

    assert (report.quality, report.metric) == ("metric", {"name": "top1", "higher_is_better": True})
    assert report.after.drop_interval is not None


def test_top1_without_labels_is_estimated_from_the_originals_own_answers() -> None:
    report = optimize(LENET, data=CALIB, metric="top1", passes=[QuantizeWeights()]).report

    assert report.quality == "expected-drop"
    assert any("no labels" in note for note in report.notes)


def test_a_metric_that_needs_labels_says_so() -> None:
    with pytest.raises(DataError, match="metric 'mse' needs labels"):
        optimize(LENET, data=CALIB, metric="mse")


def test_a_pass_that_needs_data_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "Runtime", None)

    with pytest.raises(RequirementError, match="'quantize' needs data"):
        optimize(LENET, passes=[Quantize()])


def test_wrong_data_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "Runtime", None)

    with pytest.raises(DataError, match="'image'"):
        optimize(LENET, data={"picture": np.zeros((4, 1, 28, 28), np.float32)})


def test_the_time_limit_skips_what_is_left() -> None:
    report = optimize(LENET, data=CALIB, time_limit=1e-3).report

    assert {entry.verdict for entry in report.stages} == {"skipped"}
    assert "time limit" in report.stages[0].reason


def test_a_share_of_zero_budget_allows_no_loss() -> None:
    result = optimize(
        small_model(), data=small_data(), passes=[QuantizeWeights()], budget=Budget(max_drop=0.0, max_error=0.0)
    )

    assert result.model.digest == Model.load(small_model()).digest


def test_excluded_layers_stay_as_they_are() -> None:
    result = optimize(LENET, passes=[QuantizeWeights()], exclude=["*"])

    assert stage(result, "quantize-weights").verdict == "unchanged"


def test_another_target_is_judged_by_its_kernels_not_by_this_clock() -> None:
    report = optimize(MOBILENET, data=CALIB, target="arm64", passes=[Simplify(), Quantize()]).report

    assert report.target == "arm64"
    assert report.after.latency_ms is None
    assert report.after.latency_evidence == "estimated"
    assert any("estimated" in warning for warning in report.warnings)


def test_a_model_in_memory_is_not_changed() -> None:
    proto = small_model()
    before = proto.SerializeToString()

    optimize(proto, data=small_data())

    assert proto.SerializeToString() == before


def test_the_verdict_quotes_the_measured_ratios() -> None:
    report = optimize(LENET, data=CALIB, passes=[QuantizeWeights()]).report

    assert f"{report.size:.2f} times smaller" in report.verdict
    assert isinstance(report, Report)


def test_generated_inputs_that_do_not_fit_ask_for_a_shape() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, T] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }'
    )
    proto = parser.parse_model(text)
    proto.graph.node[0].ClearField("domain")
    proto.graph.initializer.append(numpy_helper.from_array(np.array([7, 11]), "s"))
    del proto.graph.input[1]

    with pytest.raises(DataError, match="give --data or --shape"):
        optimize(proto)


def test_a_model_that_onnx_runtime_does_not_load_is_not_asked_for_data() -> None:
    old = '<ir_version: 3, opset_import: ["": 6]> g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }'

    with pytest.raises(ModelError, match=r"the model: ONNX Runtime does not load it: Could not find.*Add\(6\)"):
        optimize(parser.parse_model(old), timing=False)


def test_weights_decoded_at_load_are_as_large_in_memory_as_before() -> None:
    stored = optimize(small_model(outputs=48), passes=[QuantizeWeights()], force=True).report
    assert stored.after.resident_bytes == stored.before.resident_bytes == 64 * 48 * 4

    computed = optimize(small_model(outputs=48), passes=[QuantizeWeights(form="compute")], force=True).report
    assert computed.after.resident_bytes is not None
    assert computed.after.resident_bytes < 0.3 * 64 * 48 * 4


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_are_listed_only_where_they_are_asked_for() -> None:
    results = [optimize(mlp_model(), passes=[Simplify()], timing=False, layers=layers) for layers in (False, True)]
    assert [bool(result.report.layers) for result in results] == [False, True]


def test_layers_that_cannot_be_observed_do_not_cost_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(judge: Judge, original: Model, new: Model) -> None:
        message = "the tensors cannot be shown"
        raise RuntimeFailure(message)

    monkeypatch.setattr(Judge, "layer_table", refuse)
    report = optimize(mlp_model(), passes=[Simplify()], timing=False, layers=True).report
    assert report.layers == []
    assert "the layers are not listed: the tensors cannot be shown" in report.notes
