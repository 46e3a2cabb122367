"""The README's two commands, what .ci/run makes of them, and the figures that it quotes; test_docs.py runs the rest."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib

import pytest
from click.testing import CliRunner

from onnxcomp.cli import main
from tests.markdown import ROOT, blocks, commands, read, section, shell_commands, table

SET_UP = "python3 -m venv .venv && "
CHECKS = ["ruff format --check .", "ruff check .", "mypy", "pytest -n logical"]


@pytest.fixture(scope="module")
def two_commands():
    """The main job and the tests, each a line that does all of its own set-up."""
    lines = [command.line for command in shell_commands("README.md") if command.line.startswith(SET_UP)]
    assert len(lines) == 2
    return lines


def test_the_first_shell_block_is_the_two_commands(two_commands):
    first = next(block for block in blocks("README.md") if block.language == "sh")
    assert [command.line for command in commands(first)] == two_commands


def test_says_what_it_is_before_them_in_three_sentences():
    intro = read("README.md").partition("```")[0].split("\n\n")[1]
    assert len(re.findall(r"\.(?:\s|$)", intro)) == 3


def test_the_main_job_installs_no_extras_at_pinned_versions(two_commands):
    install = two_commands[0].split(" && ")[1]
    assert install == ".venv/bin/pip install -q -c constraints.txt ."


def test_the_main_job_runs_on_a_sample_model(two_commands, tmp_path):
    program, *arguments = two_commands[0].split(" && ")[2].split()
    assert program == ".venv/bin/onnxcomp"
    assert arguments[0] == "optimize"
    output = arguments[arguments.index("-o") + 1]
    inputs = [str(ROOT / word) if word.startswith("sample_models/") else word for word in arguments]
    inputs[inputs.index(output)] = str(tmp_path / output)
    result = CliRunner().invoke(main, [*inputs, "--no-resume"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / output).stat().st_size < (ROOT / arguments[1]).stat().st_size / 3


def test_the_result_of_the_main_job_is_ignored_by_git(two_commands):
    words = two_commands[0].split()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert words[words.index("-o") + 1].endswith(".opt.onnx")
    assert {"*.opt.onnx", ".venv/"} <= set(ignored)


def test_the_test_command_is_set_up_and_every_check(two_commands):
    activate, install, *checks = two_commands[1].removeprefix(SET_UP).split(" && ")
    assert activate == ". .venv/bin/activate"
    assert install == "pip install -q -c constraints.txt -e '.[dev]'"
    assert checks == CHECKS


def test_ci_runs_the_test_command_as_it_is_written(two_commands):
    """The line of .ci/run that takes the command out of the README, run by itself."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [line] = [line for line in script.splitlines() if line.startswith("command=")]
    shell = ["bash", "-euo", "pipefail", "-c", f'{line}; printf %s "$command"']
    found = subprocess.run(shell, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert found == two_commands[1]


def test_ci_can_be_run_and_stops_at_the_first_failure():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8").splitlines()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    limits = section("README.md", "Limits")
    pythons = [entry.rsplit(" ", 1)[1] for entry in project["classifiers"] if "Python :: 3." in entry]
    assert f"Python {pythons[0]} to {pythons[-1]}" in limits
    [runtime] = [entry for entry in project["dependencies"] if entry.startswith("onnxruntime")]
    assert f"ONNX Runtime {runtime.partition('>=')[2]} or later" in limits
    [pinned] = re.findall(r"^onnxruntime==(\d+\.\d+)", read("constraints.txt"), re.MULTILINE)
    assert f"tested with {pinned}" in limits


def test_the_result_table_is_that_of_the_benchmarks():
    after = read("benchmarks/README.md").partition("<!-- table: sample_models.py -->")[2]
    assert table(section("README.md", "Results")) == table(after)


def test_the_accuracies_are_those_of_the_sample_models():
    told = re.search(r"On the 1,000 images.*?it is ([\d.]+), ([\d.]+) and ([\d.]+)\.", _joined(), re.DOTALL)
    assert told
    rows = table(section("README.md", "Results"))
    assert [float(row["accuracy before"]) for row in rows] == [float(value) for value in told.groups()]


def _joined() -> str:
    return " ".join(read("sample_models/README.md").split())


def test_the_report_that_is_shown_is_of_the_same_run_as_the_command(two_commands):
    words = two_commands[0].split()
    shown = next(block.text for block in blocks("README.md") if block.language == "text")
    source = words[words.index("optimize") + 1]
    assert shown.startswith(f"{source} -> {words[words.index('-o') + 1]}: ")
