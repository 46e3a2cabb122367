"""What a fault leaves: the old output or the whole new one, one line of error, and the rest of the run."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from benchmarks.faults import strike
from onnxcomp import Changes, Context, Model, Pass, optimize
from onnxcomp.errors import ModelError
from onnxcomp.judge import Judge
from onnxcomp.quality import Quality
from onnxcomp_passes import Simplify
from tests.markdown import ROOT
from tests.small import INPUTS, classifier, save_classifier

DATA = {"x": np.random.default_rng(0).normal(size=(32, INPUTS)).astype(np.float32)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass(frozen=True, kw_only=True)
class Greedy(Pass):
    """Wants more memory than there is, after it has begun to change the model."""

    name: ClassVar[str] = "greedy"

    def rewrite(self, model: Model, context: Context) -> Changes:
        model.set_weight("b1", model.weight("b1") * np.float32(100))
        raise MemoryError


def test_a_pass_that_runs_out_of_memory_is_rolled_back_and_the_rest_goes_on():
    result = optimize(classifier(), data=DATA, passes=[Greedy(), Simplify()], timing=False)
    told = {stage.name: (stage.verdict, stage.reason) for stage in result.report.stages}
    assert told["greedy"] == ("dropped", "greedy ran out of memory")
    assert told["simplify"][0] == "kept"
    np.testing.assert_array_equal(result.model.weight("b1"), Model.load(classifier()).weight("b1"))


@dataclass(frozen=True, kw_only=True)
class Faulty(Pass):
    """Has a mistake, behind a change that was good."""

    name: ClassVar[str] = "faulty"
    kind: str

    def rewrite(self, model: Model, context: Context) -> Changes:
        model.set_weight("b1", model.weight("b1") * np.float32(100))
        if self.kind == "attribute":
            model.graph.nodes[0].attrs["odd"] = object()
        if self.kind == "cycle":
            model.graph.nodes[0].inputs[0] = model.graph.nodes[-1].outputs[0]
        if self.kind == "raise":
            raise KeyError(self.kind)
        changes = Changes()
        changes.add("b1", "scaled")
        return changes if self.kind != "nothing" else None  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:faulty. internal error:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raise", "internal error (KeyError: 'raise')"),
        ("nothing", "internal error (AttributeError: 'NoneType' object has no attribute 'count')"),
        ("attribute", "is not an accepted attribute value.)"),
        ("cycle", "faulty broke the model: the graph has a cycle through node 'first'"),
    ],
)
def test_a_pass_with_a_mistake_costs_its_stage_and_not_the_run(kind, reason):
    result = optimize(classifier(), data=DATA, passes=[Faulty(kind=kind), Simplify()], timing=False)
    told = {stage.name: (stage.verdict, stage.reason) for stage in result.report.stages}
    assert told["faulty"][0] == "dropped"
    assert told["faulty"][1].endswith(reason)
    assert told["simplify"][0] == "kept"
    np.testing.assert_array_equal(result.model.weight("b1"), Model.load(classifier()).weight("b1"))


def test_a_mistake_in_a_pass_is_a_warning_that_names_it():
    with pytest.warns(
        RuntimeWarning, match=r"faulty: internal error \(KeyError: 'raise'\); it is left out, please report"
    ):
        optimize(classifier(), data=DATA, passes=[Faulty(kind="raise")], timing=False)


def test_a_measurement_that_runs_out_of_memory_drops_the_stage(monkeypatch):
    real = Judge.quality

    def fail(judge: Judge, model: Model) -> Quality:
        if model.digest != judge.original_digest:
            raise MemoryError
        return real(judge, model)

    monkeypatch.setattr(Judge, "quality", fail)
    [stage] = optimize(classifier(), data=DATA, passes=[Simplify()], timing=False).report.stages
    assert stage.verdict == "dropped"
    assert "ran out of memory" in stage.reason


def command(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may have so many bytes."""

    def full_disk() -> None:
        assert limit is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "onnxcomp", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=full_disk if limit is not None else None,
    )


def test_a_full_disk_is_told_in_a_line_and_the_old_output_stays(tmp_path):
    model, output = save_classifier(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    output.write_bytes(b"old")
    done = command("optimize", str(model), "-p", "simplify", "-o", str(output), "--no-resume", limit=1000)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["m.onnx", "o.onnx"]


def test_a_run_without_standard_files_writes_its_result(tmp_path):
    model, output = save_classifier(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    words = [sys.executable, "-m", "onnxcomp", "optimize", str(model), "-p", "simplify", "-o", str(output)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], check=False)
    assert done.returncode == 0
    onnx.checker.check_model(str(output))


def test_two_runs_at_once_to_one_output_leave_one_of_their_results_whole(tmp_path):
    models = [save_classifier(tmp_path / f"{seed}.onnx", seed=seed) for seed in (0, 1)]
    output = tmp_path / "o.onnx"
    alone = []
    for index, model in enumerate(models):
        command("optimize", str(model), "-p", "simplify", "-o", str(tmp_path / f"a{index}.onnx"), "--no-resume")
        alone.append((tmp_path / f"a{index}.onnx").read_bytes())
    ends: list[int] = []

    def go(model: Path) -> None:
        ends.append(command("optimize", str(model), "-p", "simplify", "-o", str(output), "--no-resume").returncode)

    threads = [threading.Thread(target=go, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [0, 0]
    assert output.read_bytes() in alone
    onnx.checker.check_model(str(output))


def test_a_model_that_is_replaced_while_it_is_read_gives_the_result_of_one_of_the_two(tmp_path):
    """Its old file goes on to exist for who has it open."""
    path = save_classifier(tmp_path / "m.onnx")
    loaded = Model.load(path)
    other = classifier(seed=5)
    (tmp_path / "new.onnx").write_bytes(other.SerializeToString())
    os.replace(tmp_path / "new.onnx", path)
    result = optimize(loaded, passes=[Simplify()], timing=False).model
    expected = optimize(classifier(), passes=[Simplify()], timing=False).model
    assert result.digest == expected.digest


@dataclass(frozen=True, kw_only=True)
class TrainOn(Pass):
    """Changes nothing, while someone writes the model's file anew."""

    name: ClassVar[str] = "train-on"
    lossless: ClassVar[bool] = True
    path: str

    def rewrite(self, model: Model, context: Context) -> Changes:
        Path(self.path).write_bytes(classifier(seed=5).SerializeToString())
        return Changes()


def test_a_model_that_is_written_anew_during_its_run_is_an_error_since_its_figures_hold_for_neither(tmp_path):
    path = save_classifier(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx: has changed since it was first read"):
        optimize(path, passes=[TrainOn(path=str(path))], timing=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_at_any_moment_leaves_the_old_output_or_the_whole_new_one(number, tmp_path):
    outcome = strike(ROOT / "sample_models" / "fashion_lenet.onnx", tmp_path, 12, number, random.Random(1))
    assert outcome.wrong == []
    assert sum(outcome.held.values()) == 12


@pytest.mark.parametrize(
    ("numbers", "code", "told"),
    [
        ([signal.SIGTERM] * 2, 143, b""),
        ([signal.SIGHUP], 129, b""),
        ([signal.SIGINT] * 4, 130, b"Stopped.\n"),  # an impatient user
    ],
)
def test_a_run_that_is_asked_to_end_takes_its_temporary_files_with_it(numbers, code, told, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "onnxcomp", "optimize", ROOT / "sample_models" / "fashion_vit.onnx", "--no-resume"]
    command += ["--data", ROOT / "sample_models" / "fashion_calib.npz", "-o", tmp_path / "small.onnx"]
    process = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(temporary.glob("onnxcomp-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.01)

    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, told)
    assert list(temporary.iterdir()) == []
