"""Several models compared with one original in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from onnxcomp import comparing, layer_details, layer_table, optimize
from onnxcomp.budget import Budget
from onnxcomp.comparison import compare, compare_all, worth
from onnxcomp.errors import DataError, ModelError, OptionError, RuntimeFailure, WorkerDied
from onnxcomp.metrics import Metric
from onnxcomp.report import comparison_schema, comparison_to_json
from onnxcomp.runtime import Runtime
from onnxcomp_passes.quantize import Quantize
from tests.small import CLASSES, INPUTS, classifier, save_classifier, save_samples
from tests.test_cli import run
from tests.test_comparison import model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared")
    save_classifier(path / "a.onnx")
    save_classifier(path / "near.onnx", noise=0.001)
    save_classifier(path / "far.onnx", seed=5)
    save_samples(path / "test.npz")
    onnx.save(model("g (float[N,7] z) => (float[N,4] scores) { scores = Relu(z) }"), path / "other.onnx")
    (path / "broken.onnx").write_bytes(b"not a model")
    return path


@pytest.fixture(scope="module")
def found(folder):
    names = ("near.onnx", "far.onnx", "gone.onnx", "other.onnx", "broken.onnx")
    return compare_all(
        folder / "a.onnx", [folder / name for name in names], data=folder / "test.npz", timing=False, layers=True
    )


def test_each_candidate_has_the_figures_that_it_has_alone(found, folder):
    for number, name in enumerate(("near.onnx", "far.onnx")):
        alone = compare(folder / "a.onnx", folder / name, data=folder / "test.npz", timing=False)
        together = found.pair(found.candidates[number])
        for figure in ("drop", "drop_interval", "error", "metric", "agreement", "size_bytes", "kernels"):
            assert getattr(together.after, figure) == getattr(alone.after, figure)
        assert together.sqnr_db == alone.sqnr_db
    assert found.before.metric == 1.0


def test_what_cannot_be_compared_has_a_reason_and_the_others_go_on(found):
    assert [one.verdict for one in found.candidates] == ["no gain", "over", "failed", "failed", "failed"]
    gone, other, broken = found.candidates[2:]
    assert gone.reason == "cannot be read (No such file or directory)"
    assert other.reason == "the models must take the same inputs; the original has x, the new one z"
    assert broken.reason.startswith("is not an ONNX model")
    assert {one.after for one in (gone, other, broken)} == {None}


def test_strict_raises_what_a_candidate_fails_with(folder):
    with pytest.raises(ModelError, match=r"gone\.onnx: cannot be read"):
        compare_all(folder / "a.onnx", [folder / "near.onnx", folder / "gone.onnx"], timing=False, strict=True)


def test_the_budget_decides_what_is_over_it(folder):
    def verdict(limit: float) -> str:
        data = folder / "test.npz"
        budget = Budget(max_drop=limit)
        found = compare_all(folder / "a.onnx", [folder / "far.onnx"], data=data, timing=False, budget=budget)
        return found.candidates[0].verdict

    assert (verdict(0.005), verdict(1.0)) == ("over", "no gain")


def test_a_smaller_model_inside_the_budget_is_better(folder, tmp_path):
    proto = classifier()
    proto.doc_string = "x" * 20_000
    onnx.save(proto, tmp_path / "large.onnx")
    found = compare_all(tmp_path / "large.onnx", [folder / "a.onnx"], data=folder / "test.npz", timing=False)
    [one] = found.candidates
    assert one.verdict == "better"
    assert one.reason == f"{one.size:.2f} times smaller, drop 0.0000"


@pytest.mark.parametrize(
    ("size", "speed", "verdict"),
    [
        (2.0, 0.9, "no gain"),
        (0.9, 2.0, "no gain"),
        (1.0, 1.01, "no gain"),
        (2.0, 0.99, "better"),
        (1.0, 1.1, "better"),
        (2.0, None, "better"),
    ],
)
def test_a_gain_in_one_does_not_make_up_for_a_loss_in_the_other(size, speed, verdict):
    assert worth(size, speed) == verdict


def test_all_are_timed_in_turn_in_one_call(folder, monkeypatch):
    monkeypatch.setattr(comparing, "TIMING_SECONDS", 0.05)
    timed: list[list[str]] = []
    measure = Runtime.time

    def time(self: Runtime, paths: list[Path], *rest: Any, **more: Any) -> Any:
        timed.append([path.name for path in paths])
        return measure(self, paths, *rest, **more)

    monkeypatch.setattr(Runtime, "time", time)
    found = compare_all(folder / "a.onnx", [folder / "near.onnx", folder / "far.onnx"])
    assert timed == [["a.onnx", "near.onnx", "far.onnx"]]
    for one in found.measured:
        assert found.before.latency_ms is not None
        assert one.after is not None
        assert one.after.latency_ms is not None
        assert one.speed == pytest.approx(found.before.latency_ms / one.after.latency_ms)
        assert one.after.latency_evidence == "measured"


def test_where_timing_all_together_fails_each_is_timed_with_the_original(folder, monkeypatch):
    monkeypatch.setattr(comparing, "TIMING_SECONDS", 0.05)
    measure = Runtime.time

    def time(self: Runtime, paths: list[Path], *rest: Any, **more: Any) -> Any:
        if len(paths) > 2 or paths[-1].name == "far.onnx":
            message = f"{paths[-1].name}: no memory"
            raise RuntimeFailure(message)
        return measure(self, paths, *rest, **more)

    monkeypatch.setattr(Runtime, "time", time)
    near, far = compare_all(folder / "a.onnx", [folder / "near.onnx", folder / "far.onnx"]).candidates
    assert near.speed is not None
    assert (far.verdict, far.reason) == ("failed", "far.onnx: no memory")


def test_layers_are_those_of_each_candidate_with_their_work(found):
    near, far = found.candidates[:2]
    assert [{row["name"] for row in one.layers} for one in (near, far)] == [{"first", "head"}] * 2
    assert max(row["error"] for row in near.layers) < min(row["error"] for row in far.layers)
    assert {row["name"]: row["macs"] for row in near.layers}["head"] == 48 * CLASSES


def test_a_candidate_that_refuses_the_batches_is_run_on_samples_one_by_one(folder):
    one = classifier(noise=0.001)
    one.graph.node[0].input[0] = "flat"
    shape = onnx.numpy_helper.from_array(np.array([1, INPUTS]), "shape")
    one.graph.initializer.append(shape)
    one.graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "shape"], ["flat"], name="flatten"))
    found = compare_all(folder / "a.onnx", [folder / "near.onnx", one], data=folder / "test.npz", timing=False)
    near, single = found.candidates
    assert near.warnings == []
    assert single.warnings == ["compared on the samples one by one: it refuses the batches that the others take"]
    assert near.after is not None
    assert single.after is not None
    assert single.after.drop == near.after.drop


def test_candidates_that_fix_one_input_otherwise_are_not_fed_together(folder):
    fixed = []
    for size in (2, 3):
        proto = classifier()
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
        fixed.append(proto)
    first, second = compare_all(classifier(), fixed, timing=False).candidates
    assert first.after is not None
    assert second.reason == (
        "it fixes sizes of its inputs that an earlier candidate fixes otherwise; compare it in a run of its own"
    )


def test_layers_of_candidates_are_told_in_detail_as_those_of_a_run(folder, monkeypatch):
    monkeypatch.setattr(comparing, "TIMING_SECONDS", 0.05)
    files = [folder / "near.onnx", folder / "far.onnx"]
    found = compare_all(folder / "a.onnx", files, data=folder / "test.npz", layers=True)

    jsonschema.validate(json.loads(comparison_to_json(found)), comparison_schema())
    rows = [row for one in found.candidates for row in one.layers]
    assert len(rows) == 4
    for row in rows:
        assert (row["bits_before"], row["bits_after"]) == (32, 32)
        assert 0 < row["time_ms_before"] < 10
        assert 0 < row["time_ms_after"] < 10
        assert sum(row["detail"]["weights"]["before"]) == sum(row["detail"]["weights"]["after"])
        assert [each["place"] for each in row["detail"]["activations"]] == ["input", "output"]


def test_candidates_share_what_is_told_of_layers_in_detail(folder, monkeypatch):
    monkeypatch.setattr(layer_details, "MOST_DETAILED", 2)  # both layers of one candidate, and not those of two
    near, far = folder / "near.onnx", folder / "far.onnx"
    for files, told in (([near], [True, True]), ([near, far], [False] * 4)):
        found = compare_all(folder / "a.onnx", files, timing=False, layers=True)
        assert [row["detail"] is not None for one in found.candidates for row in one.layers] == told


@pytest.mark.parametrize(("target", "share"), [("arm64", 1.0), ("coreml", 0.0)])
def test_figures_are_those_of_the_target_as_in_a_run(folder, target, share):
    report = optimize(
        folder / "a.onnx", data=folder / "test.npz", passes=[Quantize()], force=True, timing=False, resume=False
    )
    found = compare(folder / "a.onnx", report.model, target=target)
    assert found.after.macs
    assert found.after.int8_macs == share * found.after.macs
    assert found.after.load_ms is None  # this machine's says nothing of the target


def test_layers_that_cannot_be_had_cost_a_candidate_nothing_else(folder, monkeypatch):
    def layer_errors(*_: Any) -> Any:
        message = "no room for the tensors"
        raise RuntimeFailure(message)

    monkeypatch.setattr(layer_table, "layer_errors", layer_errors)
    [one] = compare_all(folder / "a.onnx", [folder / "near.onnx"], timing=False, layers=True).candidates
    assert one.after is not None
    assert one.layers == []
    assert one.warnings == ["its layers are not listed: no room for the tensors"]


def test_a_candidate_that_crashes_onnx_runtime_ends_nothing_else(folder, monkeypatch):
    execute = Runtime.run

    def crashing(self: Runtime, path: Path, *rest: Any, **more: Any) -> Any:
        if path.name == "far.onnx":
            message = "the ONNX Runtime process died while running far.onnx (signal 11)"
            raise WorkerDied(message)
        return execute(self, path, *rest, **more)

    monkeypatch.setattr(Runtime, "run", crashing)
    far, near = compare_all(folder / "a.onnx", [folder / "far.onnx", folder / "near.onnx"], timing=False).candidates
    assert (far.verdict, far.reason) == ("failed", "the ONNX Runtime process died while running far.onnx (signal 11)")
    assert near.after is not None


def test_nothing_to_compare_with_is_refused(folder):
    with pytest.raises(OptionError, match="give at least one candidate"):
        compare_all(classifier(), [])
    with pytest.raises(OptionError, match=r"expected a list of models, got '.*near\.onnx'"):
        compare_all(classifier(), str(folder / "near.onnx"))


def test_models_in_memory_are_told_apart_by_their_numbers():
    found = compare_all(classifier(), [classifier(noise=0.001), classifier(seed=5)], timing=False)
    assert [name for name, _ in found.named] == ["candidate 1", "candidate 2"]


def test_a_metric_that_cannot_be_computed_misses_its_limit(folder):
    def largest(outputs: list[Any], labels: Any) -> float:
        if len(outputs[0][0]) != CLASSES:
            message = "expected scores of all classes"
            raise DataError(message)
        return float(outputs[0].max())

    narrow = model("g (float[N,32] x) => (float[N,16] scores) { scores, rest = Split(x) }", 13)
    metric, data = Metric("largest", True, largest), folder / "test.npz"
    found = compare_all(folder / "a.onnx", [narrow], data=data, metric=metric, timing=False, limits={"largest": 0.0})
    [one] = found.candidates
    assert one.verdict == "over"
    assert one.shortfalls == ["largest cannot be computed from its outputs"]


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(folder: Path, *names: str) -> tuple[object, ...]:
    models = [folder / name for name in ("a.onnx", *names)]
    return ("compare", *models, "--data", folder / "test.npz", "--no-timing")


def test_prints_one_table_with_a_row_for_each(folder):
    result = run(*arguments(folder, "near.onnx", "far.onnx"))
    assert result.exit_code == 0
    rows = [line.split()[:2] for line in result.stdout.splitlines() if ".onnx  " in line]
    assert [(Path(name).name[-10:], verdict) for name, verdict in rows] == [
        ("a.onnx", "original"),
        ("near.onnx", "no"),
        ("far.onnx", "over"),
    ]


def test_a_failure_is_told_and_the_exit_code_is_1_though_the_rest_is_written(folder, tmp_path):
    result = run(*arguments(folder, "near.onnx", "gone.onnx"), "--json", tmp_path / "c.json", "--fail-under", "size=3")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: {folder / 'near.onnx'}: size is 1, under the limit of 3",
        f"Error: {folder / 'gone.onnx'}: cannot be read (No such file or directory)",
    ]
    verdicts = [one["verdict"] for one in json.loads((tmp_path / "c.json").read_text())["candidates"]]
    assert verdicts == ["no gain", "failed"]


def test_a_limit_or_a_budget_that_one_of_them_misses_gives_code_3(folder):
    limited = run(*arguments(folder, "a.onnx", "far.onnx"), "-q", "--fail-under", "agreement=0.9")
    budgeted = run(*arguments(folder, "a.onnx", "far.onnx"), "-q", "--max-drop", "1%")
    assert limited.exit_code == budgeted.exit_code == 3
    assert f"Error: {folder / 'far.onnx'}: agreement is " in limited.stderr
    assert f"Error: {folder / 'far.onnx'}: it is over the budget: " in budgeted.stderr


def test_being_over_the_budget_is_no_failure_unless_one_was_asked_for(folder):
    assert run(*arguments(folder, "far.onnx"), "-q").exit_code == 0


def test_the_json_knows_the_command_that_made_it(folder):
    result = run(*arguments(folder, "near.onnx"), "--json", "-")
    assert json.loads(result.stdout)["options"]["command"][-2:] == ["--json", "-"]


def test_the_page_is_that_of_the_json(folder, tmp_path):
    given = (*arguments(folder, "near.onnx", "far.onnx"), "-q", "--json", tmp_path / "c.json")
    assert run(*given, "--report", tmp_path / "c.html").exit_code == 0
    assert run("report", tmp_path / "c.json", "-q", "-o", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text() == (tmp_path / "c.html").read_text()


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_no_output_overwrites_a_model_that_is_compared(folder, option):
    result = run(*arguments(folder, "near.onnx"), option, folder / "near.onnx")
    assert result.exit_code == 1
    assert result.stderr.endswith("the output would overwrite the input; choose another name with -o\n")


def test_the_page_and_the_json_are_two_files(folder, tmp_path):
    result = run(*arguments(folder, "near.onnx"), "--json", tmp_path / "c", "--report", tmp_path / "c")
    assert result.exit_code == 2
    assert "--json and --report both name" in result.stderr
