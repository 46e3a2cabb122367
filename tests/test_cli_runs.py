"""The commands as a user runs them: real work on small models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcomp.report import schema
from tests.markdown import read
from tests.small import save_classifier, save_samples
from tests.test_cli import one_error_line, run


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    save_classifier(tmp_path / "model.onnx")
    save_samples(tmp_path / "test.npz")
    return tmp_path


def report_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    jsonschema.Draft202012Validator(schema()).validate(document)
    return document


def test_optimizes_without_data(folder):
    before = (folder / "model.onnx").read_bytes()
    result = run("optimize", folder / "model.onnx", "--json", folder / "r.json")
    assert result.exit_code == 0, result.output
    report = report_of(folder / "r.json")
    output = folder / "model.opt.onnx"
    assert report["output"]["size_bytes"] == output.stat().st_size < len(before)
    assert report["data"]["generated"]
    assert "warning: no data" in result.stdout
    assert (folder / "model.onnx").read_bytes() == before
    x = np.load(folder / "test.npz")["x"]
    runs = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (folder / "model.onnx", output)
    ]
    assert (runs[0].argmax(axis=1) == runs[1].argmax(axis=1)).mean() > 0.95


def test_optimizes_with_data_inside_the_budget(folder):
    result = run(
        *("optimize", folder / "model.onnx", "--data", folder / "test.npz", "--max-drop", "20%", "--metric", "top1"),
        *("-o", folder / "small.onnx", "--json", folder / "r.json"),
    )
    assert result.exit_code == 0, result.output
    report = report_of(folder / "r.json")
    assert report["quality"] == "metric"
    assert report["budget"]["max_drop"] == 0.2
    assert report["budget_met"]
    onnx.checker.check_model(onnx.load(folder / "small.onnx"))


def test_writes_a_model_for_each_target_into_a_new_folder(folder):
    result = run(
        *("optimize", folder / "model.onnx", "--data", folder / "test.npz", "--target", "arm64", "--target", "xnnpack"),
        *("-o", folder / "out", "--json", folder / "r.json"),
    )
    assert result.exit_code == 0, result.output
    for name in ("arm64", "xnnpack"):
        report = report_of(folder / f"r.{name}.json")
        assert (report["target"], report["after"]["latency_ms"]) == (name, None)
        onnx.checker.check_model(onnx.load(folder / "out" / f"model.{name}.onnx"))


def test_the_report_lists_each_layer_with_its_weight_kernel_and_error(folder):
    run(
        *("optimize", folder / "model.onnx", "-p", "quantize-weights", "--force", "--no-timing"),
        *("-o", folder / "small.onnx", "--json", folder / "r.json", "--report", folder / "r.html"),
    )
    layers = report_of(folder / "r.json")["layers"]
    told = {row["name"]: (row["weight_before"], row["weight_bytes_after"], row["weight_type_after"]) for row in layers}
    assert told == {"first": ("w1", 32 * 48, "int8"), "head": ("w2", 48 * 4, "int8")}
    assert all(0 < row["error"] < 0.05 and row["kernel_after"].endswith("Gemm") for row in layers)
    assert [row["sqnr_db"] for row in layers] == sorted(row["sqnr_db"] for row in layers)
    assert (folder / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_runs_only_the_passes_that_are_named(folder):
    run("optimize", folder / "model.onnx", "-p", "simplify", "--json", folder / "r.json", "--no-timing")
    report = report_of(folder / "r.json")
    assert [stage["name"] for stage in report["stages"]] == ["simplify"]
    assert "Identity" not in [node.op_type for node in onnx.load(folder / "model.opt.onnx").graph.node]


def test_compares_and_fails_under_a_limit(folder):
    save_classifier(folder / "near.onnx", noise=0.01)
    arguments = ("compare", folder / "model.onnx", folder / "near.onnx", "--data", folder / "test.npz", "--no-timing")
    result = run(*arguments, "--fail-under", "top1=0.5", "--fail-under", "sqnr=20", "--json", folder / "c.json")
    assert result.exit_code == 0, result.output
    assert "top1" in result.stdout
    [one] = json.loads((folder / "c.json").read_text())["candidates"]
    assert one["shortfalls"] == []
    missed = run(*arguments, "-q", "--fail-under", "size=3")
    assert missed.exit_code == 3
    assert missed.stdout == ""
    assert one_error_line(missed) == "Error: size is 1, under the limit of 3"


def test_compares_layer_by_layer(folder):
    save_classifier(folder / "near.onnx", noise=0.01)
    models = ("compare", folder / "model.onnx", folder / "near.onnx", "--data", folder / "test.npz", "--no-timing")
    result = run(*models, "--layers", "--json", folder / "c.json")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^  first +Gemm +FusedGemm +\S+ +32x48 +6.14 kB +[0-9.]+ dB +[0-9.]+%$", result.stdout, re.MULTILINE
    )
    layers = json.loads((folder / "c.json").read_text())["candidates"][0]["layers"]
    assert [row.keys() for row in layers] == [schema()["$defs"]["layer"]["properties"].keys()] * 2
    assert all(f"`{name}`" in read("docs/report-schema.md") for name in layers[0])
    assert json.loads(run(*models, "--json", "-").stdout)["candidates"][0]["layers"] == []


def test_a_limit_on_a_metric_names_the_metric(folder):
    arguments = ("compare", folder / "model.onnx", folder / "model.onnx", "--data", folder / "test.npz", "--no-timing")
    assert run(*arguments, "--fail-under", "top5=0.99", "--json", "-").exit_code == 0
    assert run(*arguments, "--fail-under", "top9=0.99").exit_code == 2


def test_inspects(folder):
    result = run("inspect", folder / "model.onnx", "--advise")
    assert result.exit_code == 0
    assert "advice" in result.stdout
    document = json.loads(run("inspect", folder / "model.onnx", "--advise", "--json", "-").stdout)
    assert document["opset"] == 17
    assert {"technique", "reason", "estimate", "available"} == set(document["advice"][0])


def test_ctrl_c_stops_at_once_and_leaves_nothing(folder):
    temporary = folder / "tmp"
    temporary.mkdir()
    code = "from onnxcomp.cli import main; main()"
    arguments = ["optimize", "model.onnx", "--data", "test.npz", "-v", "--json", "r.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "measuring the original" in first
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Stopped."
    assert "Traceback" not in err
    assert out == ""
    # Importing ONNX Runtime itself leaves a file called .ses there.
    assert [path.name for path in temporary.iterdir() if path.name != ".ses"] == []
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["model.onnx", "test.npz"]


def test_a_closed_pipe_is_no_error(folder):
    code = "from onnxcomp.cli import main; main()"
    command = f"{sys.executable} -c '{code}' inspect model.onnx -v | true"
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("always:simplify. internal error:RuntimeWarning")
def test_a_mistake_in_a_pass_is_one_line_and_the_run_goes_on(folder, monkeypatch):
    monkeypatch.setattr("onnxcomp_passes.Simplify.rewrite", lambda *_: 1 / 0)
    result = run("optimize", folder / "model.onnx", "-p", "simplify", "-o", folder / "out.onnx")
    assert result.exit_code == 0
    assert one_error_line(result) == (
        "Warning: simplify: internal error (ZeroDivisionError: division by zero); it is left out, please report it"
    )
    assert (folder / "out.onnx").is_file()
