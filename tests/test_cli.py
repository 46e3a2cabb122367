"""The command line's parsing, outputs and exit codes, with a stand-in for the optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner, Result

import onnxcomp
from onnxcomp import pipeline
from onnxcomp.budget import Budget
from onnxcomp.cli import main
from onnxcomp.data import ImageOptions
from onnxcomp.pipeline import Shared
from onnxcomp.report import plain_text, read_json, schema
from onnxcomp.report.page import page_html
from onnxcomp.stages import Stage
from onnxcomp_passes import Quantize, QuantizeWeights, Simplify
from tests.reports import sample_report
from tests.small import save_classifier


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def one_error_line(result: Result) -> str:
    """The only line on stderr."""
    lines: list[str] = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@dataclass
class FakeResult:
    report: Any

    def save(self, path):
        Path(path).write_bytes(b"model")
        self.report.output = {"path": str(path), "sha256": "1" * 64, "size_bytes": 5}


@pytest.fixture
def model(tmp_path):
    return save_classifier(tmp_path / "model.onnx")


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of `optimize`, which does nothing."""
    seen: list[dict[str, Any]] = []

    def optimize(source, **arguments):
        seen.append({"source": source, **arguments})
        return FakeResult(sample_report(output=None))

    monkeypatch.setattr(pipeline, "optimize", optimize)
    return seen


# --- every command ----------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, click.Command]]:
    return list(main.commands.items())


def test_has_the_commands_that_the_docs_name():
    names = ["compare", "deploy", "distill", "export", "inspect", "optimize", "passes", "report", "verify", "view"]
    assert sorted(main.commands) == names


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_and_every_option_has_help(name, command):
    assert command.help
    assert command.short_help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_prints(name):
    result = run(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_tells_its_version():
    assert run("--version").output.strip().endswith(metadata.version("onnxcomp"))


@pytest.mark.parametrize(
    "arguments", [*([name, "--help"] for name in sorted(main.commands)), ["--help"], ["--version"]], ids=" ".join
)
def test_help_imports_neither_onnx_nor_onnxruntime_nor_rich(arguments):
    code = (
        "import sys; from onnxcomp.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'onnx', 'onnxruntime', 'onnx_graphsurgeon', 'rich', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    code = "import sys, onnxcomp; assert not {'onnx', 'numpy', 'rich', 'click', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("asked", "found"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_onnx_runtime_writes_no_telemetry_in_this_process_unless_that_is_asked_for(asked, found):
    code = f"import os, onnxcomp; assert os.environ['ORT_DISABLE_TELEMETRY'] == {found!r}"
    variables = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env={**variables, **asked}, check=True)


@pytest.mark.parametrize("code", ["import onnxcomp_passes", "from onnxcomp.passes import registered_passes as f; f()"])
def test_passes_load_torch_only_when_they_train(code):
    code = f"import sys; {code}; assert not {{'torch', 'safetensors', 'tensorboardX'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_listing_and_explaining_passes_loads_no_torch():
    code = (
        "import sys; from onnxcomp.cli import main\n"
        "for words in (['passes'], ['passes', 'distill'], ['passes', 'qat']): main(words, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_public_names_are_sorted_and_there():
    assert onnxcomp.__all__ == sorted(onnxcomp.__all__)
    for name in onnxcomp.__all__:
        value = getattr(onnxcomp, name)
        assert value is not None
        assert not isinstance(value, types.ModuleType)
    assert set(onnxcomp.__all__) <= set(dir(onnxcomp))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'onnxcomp' has no attribute 'optimise'"):
        _ = onnxcomp.optimise


# --- optimize: what is asked ------------------------------------------------------------------------------------------


def test_writes_beside_the_model_unless_told_otherwise(model, calls):
    result = run("optimize", model)
    assert result.exit_code == 0
    assert (model.parent / "model.opt.onnx").read_bytes() == b"model"
    assert calls[0]["source"] == model
    assert set(calls[0]) == {"source", "progress", "target"}


def test_passes_every_option_on(model, calls, tmp_path):
    (tmp_path / "x.npz").touch()
    (tmp_path / "old.json").touch()
    result = run(
        *("optimize", model, "-o", tmp_path / "small.onnx", "--data", tmp_path / "x.npz", "--metric", "top5"),
        *("--max-drop", "0.5%", "--max-error", "0.2", "-p", "simplify", "-p", "quantize:per_channel=false,skip=a|b"),
        *("--target", "arm64", "--exclude", "/head/*", "--exclude", "b", "--shape", "x=4,32", "--time-limit", "10m"),
        *("--seed", "3", "--threads", "2", "--force", "--keep-debug", "--no-timing", "--no-resume", "--allow-code"),
        *("--image-size", "8x9", "--image-layout", "nhwc", "--image-mean", "1,2,3", "--image-std", "4"),
        *("--image-scale", "2", "--image-color", "bgr", "--replay", tmp_path / "old.json"),
    )
    assert result.exit_code == 0, result.output
    [call] = calls
    del call["progress"]
    assert call == {
        "source": model,
        "data": str(tmp_path / "x.npz"),
        "metric": "top5",
        "budget": Budget(max_drop=0.005, max_error=0.2),
        "passes": [Simplify(), Quantize(per_channel=False, skip=("a", "b"))],
        "target": "arm64",
        "exclude": ("/head/*", "b"),
        "shapes": {"x": (4, 32)},
        "time_limit": 600.0,
        "seed": 3,
        "threads": 2,
        "force": True,
        "keep_debug": True,
        "timing": False,
        "resume": False,
        "allow_code": True,
        "image": ImageOptions(size=(8, 9), layout="nhwc", mean=(1, 2, 3), std=(4,), scale=2, color="bgr"),
        "replay": tmp_path / "old.json",
    }


def test_the_command_line_wins_over_the_recipe(model, calls, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[budget]\nmax_drop = 0.01\nmax_error = 0.3\n[options]\nseed = 7\nthreads = 3\ntarget = "arm64"\n'
        '[[stage]]\npasses = ["simplify", "quantize-weights"]\nshare = 0.5\n'
    )
    assert run("optimize", model, "--recipe", recipe, "--max-drop", "0.02", "--seed", "1").exit_code == 0
    assert calls[0]["budget"] == Budget(max_drop=0.02, max_error=0.3)
    assert calls[0]["passes"] == [Stage((Simplify(), QuantizeWeights()), 0.5)]
    assert (calls[0]["seed"], calls[0]["threads"], calls[0]["target"]) == (1, 3, "arm64")


def test_several_targets_write_several_files(model, calls, tmp_path):
    folder = tmp_path / "out"  # is made
    report = tmp_path / "r.json"
    result = run("optimize", model, "--target", "arm64", "--target", "x86", "-o", folder, "--json", report)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == ["model.arm64.onnx", "model.x86.onnx"]
    assert [call["target"] for call in calls] == ["arm64", "x86"]
    assert isinstance(calls[0]["shared"], Shared)
    assert calls[1]["shared"] is calls[0]["shared"]
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["r.arm64.json", "r.x86.json"]


# --- optimize: what is said -------------------------------------------------------------------------------------------


def test_prints_the_report_plainly_to_a_pipe(model, calls, tmp_path):
    result = run("optimize", model, "-o", tmp_path / "small.onnx")
    report = sample_report(output={"path": str(tmp_path / "small.onnx"), "sha256": "1" * 64, "size_bytes": 5})
    assert result.stdout == plain_text(report)
    assert result.stderr == ""


def test_quiet_prints_nothing(model, calls):
    result = run("optimize", model, "-q")
    assert (result.stdout, result.stderr) == ("", "")


def test_verbose_lists_changes(model, calls):
    assert "folded into conv1" in run("optimize", model, "-v").stdout


def test_verbose_tells_progress_on_stderr(model, monkeypatch):
    def optimize(source, *, progress, **arguments):
        progress("doing \x1b[31m[red]this")
        return FakeResult(sample_report(output=None))

    monkeypatch.setattr(pipeline, "optimize", optimize)
    assert one_error_line(run("optimize", model, "-v")) == "[0.0 s] doing \\x1b[31m[red]this"
    monkeypatch.setattr(pipeline, "optimize", lambda source, **arguments: FakeResult(sample_report(output=None)))
    assert run("optimize", model).stderr == ""


def test_the_page_is_made_of_the_json(model, calls, tmp_path):
    result = run("optimize", model, "--json", tmp_path / "r.json", "--report", tmp_path / "r.html")
    assert result.exit_code == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page_html(read_json(tmp_path / "r.json"))
    assert calls[0]["layers"]


def test_the_report_holds_the_command(model, calls, tmp_path):
    run("optimize", model, "--json", tmp_path / "r.json", "-q")
    command = read_json(tmp_path / "r.json").options["command"]
    assert command == [str(model), "--json", str(tmp_path / "r.json"), "-q"]


def test_a_page_for_each_of_several_targets(model, calls, tmp_path):
    run(
        "optimize",
        model,
        "--target",
        "arm64",
        "--target",
        "x86",
        "-o",
        tmp_path / "out",
        "--report",
        tmp_path / "r.html",
    )
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["r.arm64.html", "r.x86.html"]


def test_writes_json_as_the_schema_says(model, calls, tmp_path):
    assert run("optimize", model, "--json", tmp_path / "r.json").exit_code == 0
    document = json.loads((tmp_path / "r.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(document)
    assert document["output"]["path"].endswith("model.opt.onnx")


def test_json_to_stdout_is_all_there_is(model, calls):
    assert json.loads(run("optimize", model, "--json", "-").stdout)["schema_version"] == "1.2"


@pytest.mark.parametrize(
    ("options", "code"), [([], 0), (["--max-drop", "1%"], 3), (["--max-error", "0.1"], 3), (["--max-drop", "0"], 3)]
)
def test_a_missed_budget_is_exit_code_3_only_if_one_was_asked_for(model, monkeypatch, options, code):
    report = sample_report(budget_met=False, output=None)
    monkeypatch.setattr(pipeline, "optimize", lambda source, **arguments: FakeResult(report))
    result = run("optimize", model, *options)
    assert result.exit_code == code
    assert (model.parent / "model.opt.onnx").exists()


# --- passes -----------------------------------------------------------------------------------------------------------


def test_lists_the_passes_with_their_first_lines():
    lines = run("passes").output.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert any(line.startswith("quantize ") and line.endswith("(needs data)") for line in lines)


@pytest.mark.parametrize("name", ["simplify", "quantize-weights", "quantize"])
def test_explains_a_pass_and_each_of_its_options(name):
    from onnxcomp.passes import find_pass

    text = run("passes", name).output
    assert "before" in text
    assert "after" in text
    for option in find_pass(name)().options():
        assert f"\n  {option}=" in text


def test_options_are_shown_as_they_are_given():
    text = run("passes", "quantize").output
    assert "  per_channel=true\n" in text
    assert "(one of minmax, moving-average" in text


@pytest.mark.parametrize(
    ("name", "needs"),
    [("distill", "data and torch"), ("fine-tune", "data, labels and torch"), ("qat", "data and torch")],
)
def test_a_pass_that_trains_says_what_it_needs_and_is_judged_with(name, needs):
    text = run("passes", name).output
    assert f"It may cost accuracy and needs {needs}." in text
    assert "It is judged together with the lossy passes before it" in text


def test_a_pass_says_which_one_it_pays_with():
    text = run("passes", "cluster").output
    assert "It pays only with a later pack, and is judged together with it." in text
