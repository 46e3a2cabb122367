"""Bad input on the command line: one line, the right exit code, no traceback, nothing left behind."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from onnxcomp import pipeline
from onnxcomp.errors import ModelError, OptionError, WorkerDied
from tests.small import save_classifier, save_samples
from tests.test_cli import one_error_line, run

REAL_OPTIMIZE = pipeline.optimize


@pytest.fixture
def model(tmp_path):
    return save_classifier(tmp_path / "model.onnx")


@pytest.fixture(autouse=True)
def no_work(monkeypatch, tmp_path):
    """These must fail before any work starts."""

    def optimize(source, **arguments):
        pytest.fail("the work was started")

    monkeypatch.setattr(pipeline, "optimize", optimize)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def optimize(source, **arguments):
        raise error

    monkeypatch.setattr(pipeline, "optimize", optimize)


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "simplfy"], "Invalid value for '-p' / '--pass': no pass is called 'simplfy'; did you mean 'simplify'"),
        (["-p", "quantize:percentile=7"], "quantize: percentile must be from 50 to 100, got 7"),
        (["-p", "quantize:percntile=99"], "the pass 'quantize' has no option 'percntile'; did you mean 'percentile'?"),
        (["--max-drop", "much"], "Invalid value for '--max-drop': expected a share of at least 0, such as 0.5%"),
        (["--max-error", "-1"], "Invalid value for '--max-error': expected a share of at least 0"),
        (["--time-limit", "soon"], "Invalid value for '--time-limit': expected a time such as 90s, 10m or 1h"),
        (["--target", "arm46"], "Invalid value for '--target': no target is called 'arm46'; did you mean 'arm64'?"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--seed", "x"], "Invalid value for '--seed'"),
        (["--image-size", "big"], "expected HEIGHTxWIDTH or one number, such as 224x224, got 'big'"),
        (["--image-mean", "a"], "expected numbers divided by commas, one a channel, got 'a'"),
        (["--shape", "x"], "'x' is not a shape; expected NAME=SIZE,SIZE,..."),
        (["--data", "mine:load"], "--data 'mine:load' names code to run; allow it with --allow-code"),
        (["--metric", "mine:score"], "--metric 'mine:score' names code to run; allow it with --allow-code"),
        (["--recipe", "no.toml"], "no.toml: cannot be read (No such file or directory)"),
        (["--recipe", "r.toml", "-p", "simplify"], "--recipe and --pass both say what to try; give one of them"),
        (["--target", "x86", "--target", "arm64"], "several targets are written to a folder; give one with -o"),
        (["--bogus"], "No such option"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2_and_say_what_was_expected(model, options, message):
    result = run("optimize", model, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx"]


def test_an_unknown_command_is_a_usage_error():
    assert run("optimise", "x").exit_code == 2


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["optimize"], ["inspect"], ["compare", "model.onnx"]])
def test_a_missing_model_is_a_failure(command, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    result = run(*command, "no.onnx")
    assert result.exit_code == 1
    assert one_error_line(result) == "Error: no.onnx: cannot be read (No such file or directory)"


@pytest.mark.parametrize("command", ["optimize", "inspect"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12\x07"])
def test_what_is_no_model_is_a_failure(tmp_path, monkeypatch, command, content):
    monkeypatch.setattr(pipeline, "optimize", REAL_OPTIMIZE)
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    result = run(command, path)
    assert result.exit_code == 1
    assert one_error_line(result).startswith(f"Error: {path}: is not an ONNX model")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["bad.onnx"]


@pytest.mark.parametrize("command", ["optimize", "inspect"])
def test_a_model_that_was_cut_short_is_a_failure(model, command):
    data = model.read_bytes()
    model.write_bytes(data[: len(data) // 2])
    result = run(command, model)
    assert result.exit_code == 1
    assert "is not an ONNX model, or is cut short" in one_error_line(result)


def test_a_folder_is_no_model(tmp_path):
    assert one_error_line(run("inspect", tmp_path)) == f"Error: {tmp_path}: is a folder, expected an .onnx file"
    assert run("optimize", tmp_path).exit_code == 1


def test_the_output_is_never_the_input(model):
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    for name in (model, link, model.parent / "." / "model.onnx"):
        result = run("optimize", model, "-o", name)
        assert result.exit_code == 1
        assert "the output would overwrite the input; choose another name with -o" in one_error_line(result)


def test_the_output_is_never_the_data_or_the_recipe(model, tmp_path):
    data = save_samples(tmp_path / "x.npz")
    before = data.read_bytes()
    assert "would overwrite the input" in one_error_line(run("optimize", model, "--data", data, "-o", data))
    assert "would overwrite the input" in one_error_line(run("optimize", model, "--data", data, "--json", data))
    assert data.read_bytes() == before


@pytest.mark.parametrize("command", ["inspect", "compare", "verify"])
def test_the_json_is_never_the_model(model, command):
    before = model.read_bytes()
    models = [model] if command == "inspect" else [model, model]
    assert "would overwrite the input" in one_error_line(run(command, *models, "--json", model))
    assert model.read_bytes() == before


def test_the_output_and_the_report_are_two_files(model, tmp_path):
    result = run("optimize", model, "-o", tmp_path / "a", "--json", tmp_path / "a")
    assert result.exit_code == 2
    assert "-o and --json both name" in one_error_line(result)


def test_two_outputs_are_one_file_by_whatever_way_their_folder_is_named(model, tmp_path):
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for other in (link / "a", folder / ".." / "folder" / "a"):
        for command in (["optimize", model], ["compare", model, model]):
            result = run(*command, "--json", folder / "a", "--report", other)
            assert result.exit_code == 2
            assert "--json and --report both name" in one_error_line(result)


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_path_without_a_name_is_told_as_the_folder_that_it_is(model, tmp_path, path):
    assert "older" in one_error_line(run("optimize", path))
    assert "directory" in one_error_line(run("report", path))
    targets = ("--target", "arm64", "--target", "web", "-o", tmp_path / "models")
    for more in ((), targets):
        for option in ("--report", "--json"):
            assert "the output is a folder" in one_error_line(run("optimize", model, option, path, *more))


def test_the_page_is_a_file_of_its_own(model, tmp_path):
    result = run("optimize", model, "--json", tmp_path / "a", "--report", tmp_path / "a")
    assert result.exit_code == 2
    assert "--json and --report both name" in one_error_line(result)


@pytest.mark.parametrize("option", ["-o", "--json", "--report"])
def test_a_missing_folder_is_told_before_any_work(model, tmp_path, option):
    result = run("optimize", model, option, tmp_path / "no" / "out")
    assert result.exit_code == 1
    assert one_error_line(result).endswith("does not exist")


def test_a_folder_for_several_targets_that_cannot_be_made_is_told(model, tmp_path):
    result = run("optimize", model, "--target", "x86", "--target", "web", "-o", tmp_path / "no" / "out")
    assert result.exit_code == 1
    assert "the folder for several targets cannot be made (No such file or directory)" in one_error_line(result)


def test_an_output_that_is_a_folder_is_refused(model, tmp_path):
    assert "the output is a folder, expected a file name" in one_error_line(run("optimize", model, "-o", tmp_path))


# --- failures of the work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ModelError("m.onnx: is strange"), 1, "Error: m.onnx: is strange"),
        (OptionError("budget is odd"), 2, "Error: budget is odd"),
        (WorkerDied("the ONNX Runtime process died"), 1, "Error: the ONNX Runtime process died"),
        (ModelError("bad \x1b[31mname\nsecond"), 1, "Error: bad \\x1b[31mname\\nsecond"),
        (MemoryError(), 1, "Error: there is not enough memory; close other programs, or use a machine with more"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"), 1, "Error: /tmp/x: No space left on device"),
        (KeyboardInterrupt(), 130, "Stopped."),
        (
            ZeroDivisionError("oh\nno"),
            1,
            "Error: internal error (ZeroDivisionError: oh\\nno); run with -v for the traceback, and please report it",
        ),
    ],
)
def test_failures_are_one_line(model, monkeypatch, error, code, line):
    fails_with(monkeypatch, error)
    result = run("optimize", model)
    assert result.exit_code == code
    assert one_error_line(result) == line
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx"]


def test_verbose_shows_the_traceback_of_an_internal_error(model, monkeypatch):
    fails_with(monkeypatch, ZeroDivisionError("oh"))
    assert isinstance(run("optimize", model, "-v").exception, ZeroDivisionError)


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_other_commands_refuse_bad_shapes(model, command):
    models = [model] * (2 if command == "compare" else 1)
    result = run(command, *models, "--shape", "y=3,3")
    assert result.exit_code == 2
    assert "the model has no input 'y' to give a shape to" in one_error_line(result)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("top1", "expected NAME=VALUE, such as top1=0.90, got 'top1'"), ("sqnr=x", "sqnr must be a number of at least 0")],
)
def test_compare_refuses_a_limit_that_is_none(model, limit, message):
    result = run("compare", model, model, "--fail-under", limit)
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_refuses_data_that_do_not_fit(model, tmp_path):
    np.savez(tmp_path / "x.npz", z=np.zeros((3, 32), np.float32))
    result = run("compare", model, model, "--data", tmp_path / "x.npz")
    assert result.exit_code == 1
    assert "'x'" in one_error_line(result)
