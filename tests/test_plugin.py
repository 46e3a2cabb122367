"""A third party's pass, installed from a package of its own and used from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.markdown import ROOT
from tests.small import HIDDEN, INPUTS, save_classifier, save_samples

CLI = "from onnxcomp.cli import main; main()"
THRESHOLD = 0.1


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example plugin, installed by pip as a user would, without network."""
    folder = tmp_path_factory.mktemp("plugin")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(ROOT / "docs/examples")]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """The command line in a process of its own, with the plugin beside what is installed."""

    def run_cli(*arguments, plugin=True):
        path = [str(ROOT), str(ROOT / "passes"), *([str(installed)] if plugin else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        words = [sys.executable, "-c", CLI, *map(str, arguments)]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_cli


def test_the_list_of_passes_has_it_only_when_it_is_installed(run):
    assert "zero-small" in run("passes").stdout
    assert "zero-small" not in run("passes", plugin=False).stdout


def test_is_explained_with_its_options_like_any_other(run):
    text = run("passes", "zero-small").stdout
    assert "Y = MatMul(X, W')" in text
    assert "threshold=0.02" in text
    assert "(from 0 to 1)" in text


def test_rewrites_a_model_from_the_command_line(run, tmp_path):
    model, data = save_classifier(tmp_path / "model.onnx"), save_samples(tmp_path / "data.npz")
    output, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run(
        "optimize",
        model,
        "--data",
        data,
        "-p",
        f"zero-small:threshold={THRESHOLD}",
        "--force",
        "-o",
        output,
        "--json",
        report,
    )
    assert result.returncode == 0, result.stderr
    before, after = (_weights(path)["w1"] for path in (model, output))
    small = np.abs(before) < THRESHOLD * np.abs(before).max()
    assert before.shape == (INPUTS, HIDDEN)
    assert 0 < small.sum() < small.size
    np.testing.assert_array_equal(after, np.where(small, 0, before))
    [stage] = json.loads(report.read_text(encoding="utf-8"))["stages"]
    assert stage["attempts"][0]["passes"][0]["options"] == {"threshold": THRESHOLD}
    assert [change["where"] for change in stage["attempts"][0]["passes"][0]["changed"]] == ["first", "head"]


def test_leaves_excluded_nodes_alone(run, tmp_path):
    model, output = save_classifier(tmp_path / "model.onnx"), tmp_path / "out.onnx"
    run("optimize", model, "-p", f"zero-small:threshold={THRESHOLD}", "--exclude", "first", "--force", "-o", output)
    before, after = _weights(model), _weights(output)
    np.testing.assert_array_equal(after["w1"], before["w1"])
    assert np.count_nonzero(after["w2"]) < np.count_nonzero(before["w2"])


def test_is_dropped_in_all_its_forms_when_it_does_not_pay(run, tmp_path):
    model, report = save_classifier(tmp_path / "model.onnx"), tmp_path / "report.json"
    result = run("optimize", model, "-p", "zero-small", "-o", tmp_path / "out.onnx", "--json", report)
    assert result.returncode == 0, result.stderr
    [stage] = json.loads(report.read_text(encoding="utf-8"))["stages"]
    assert stage["verdict"] == "dropped"
    thresholds = [attempt["passes"][0]["options"]["threshold"] for attempt in stage["attempts"]]
    assert thresholds == [0.02, 0.01, 0.005]


def test_its_options_are_checked_like_any_others(run, tmp_path):
    result = run("optimize", save_classifier(tmp_path / "model.onnx"), "-p", "zero-small:threshold=2")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("zero-small: threshold must be from 0 to 1, got 2.0")


def test_a_plugin_that_cannot_be_imported_is_named(run, installed, tmp_path):
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (broken / "entry_points.txt").write_text("[onnxcomp.passes]\nbroken = no_such_module\n", encoding="utf-8")
    result = run("passes")
    assert result.returncode == 2
    assert "the plugin 'broken' (no_such_module) cannot be imported" in result.stderr
    assert "Traceback" not in result.stderr


def _weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
