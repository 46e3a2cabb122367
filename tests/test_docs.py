"""The documents: every command and Python block in them runs, and what they say of the code is so."""

from __future__ import annotations

import json
import re
import shutil
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import netron
import numpy as np
import pytest
from click.testing import CliRunner

from onnxcomp import judge, passes, quality, resume, verdict, viewing
from onnxcomp.budget import Budget
from onnxcomp.cli import main
from onnxcomp.ledger import WHOLE_OUTPUT
from onnxcomp.lints import LINTS
from onnxcomp.report import comparison_schema, schema
from onnxcomp.stages import default_stages
from onnxcomp.targets import TARGETS
from onnxcomp.verification import LAYERS
from tests.markdown import DOCUMENTS, ROOT, anchors, blocks, commands, links, read, section, shell_commands, table

SAMPLES = ROOT / "sample_models"
EXAMPLES = ROOT / "docs" / "examples"
CALIBRATION_SAMPLES = 64
TEST_SAMPLES = 200


@pytest.fixture(scope="session")
def user_folder(tmp_path_factory):
    """What the documents take to be there: a model, data, code, and the sample models; smaller, to be quick."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "sample_models").mkdir()
    for path in SAMPLES.glob("fashion_*.onnx"):
        shutil.copy(path, folder / "sample_models")
    shutil.copy(SAMPLES / "fashion_lenet.onnx", folder / "model.onnx")
    shown = next(block for block in blocks("docs/cli.md") if block.file_name == "network.py")
    (folder / "network.py").write_text(shown.text, encoding="utf-8")
    for source, name, count in (("calib", "calib", CALIBRATION_SAMPLES), ("test", "test", TEST_SAMPLES)):
        with np.load(SAMPLES / f"fashion_{source}.npz") as arrays:
            np.savez(folder / f"{name}.npz", **{key: arrays[key][:count] for key in arrays.files})
        shutil.copy(folder / f"{name}.npz", folder / "sample_models" / f"fashion_{source}.npz")
    return folder


@pytest.fixture
def here(user_folder, tmp_path, monkeypatch):
    """A copy of that folder, as the current one, with a cache of its own; what the examples need can be imported."""
    copy = tmp_path / "user"
    shutil.copytree(user_folder, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    monkeypatch.setattr(viewing, "wait", netron.stop)  # nobody is there to press Ctrl-C
    return copy


# --- what they show runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_onnxcomp_command_runs_with_the_exit_code_that_is_told(document, here):
    for block in blocks(document):
        if block.file_name and not (here / block.file_name).exists():
            (here / block.file_name).write_text(block.text, encoding="utf-8")
        for command in commands(block) if block.language == "sh" else ():
            if command.words[0] == "onnxcomp":
                result = CliRunner().invoke(main, command.words[1:])
                assert result.exit_code == command.exit_code, f"{command.line}\n{result.output}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_python_block_runs(document, here, monkeypatch, clean_registry):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shutil.copy("model.onnx", "small.onnx")
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(document):
        if block.language == "python" and not _is_example_file(block.text):
            exec(compile(block.text, document, "exec"), names)


def _is_example_file(text: str) -> bool:
    return any(path.read_text(encoding="utf-8") == text for path in EXAMPLES.iterdir() if path.is_file())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_other_command_is_set_up_or_a_benchmark_that_is_there(document):
    for command in shell_commands(document):
        words = [word for word in command.words if "=" not in word or word.startswith("-")]
        if words[0] == "python3":
            assert document == "README.md", command.line  # test_readme.py has those
        elif words[:3] == ["python", "-m", "pip"]:
            assert words[3] == "install", command.line
        elif words[0] == "python":
            module, options = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
            source = (ROOT / (module if module.endswith(".py") else module.replace(".", "/") + ".py")).read_text(
                "utf-8"
            )
            assert all(f'"{option}"' in source for option in options if option.startswith("--")), command.line
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), command.line
        else:
            assert words[0] == "onnxcomp", command.line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for link in links(document):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("path", [*DOCUMENTS, "CHANGELOG.md", "sample_models/README.md"])
def test_every_text_is_free_of_paths_and_hosts_of_a_machine(path):
    text = read(path)
    assert not [word for word in ("/home/", "/tmp/", "/work/", "/root/", "localhost") if word in text]


def test_the_pages_of_the_gallery_are_whole_load_nothing_and_tell_nothing_of_a_machine():
    pages = [link for link in links("docs/gallery/README.md") if link.endswith(".html")]
    assert len(pages) == 4
    for page in pages:
        text = read(f"docs/gallery/{page}")
        assert text.startswith("<!doctype html>")
        assert text.rstrip().endswith("</html>")
        assert 'http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;' in text
        assert not [word for word in ("/home/", "/tmp/", "/work/", "/root/") if word in text]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_option_of_a_command_is_in_its_section(name):
    text = section("docs/cli.md", f"onnxcomp {name}")
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            for spelling in parameter.opts:
                assert f"`{spelling}" in text, f"{name} {spelling}"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_option_in_a_section_is_one_of_the_command(name):
    known = {spelling for parameter in main.commands[name].params for spelling in parameter.opts} | {"-h", "--help"}
    for line in section("docs/cli.md", f"onnxcomp {name}").splitlines():
        if line.startswith("| `-"):
            spellings = [part.split()[0].strip("`") for part in line.split("|")[1].split(", `")]
            assert set(spellings) <= known, line


def test_every_command_is_in_the_table_and_in_the_readme():
    names = {row["command"].split("`")[1] for row in table(read("docs/cli.md"))}
    assert names == set(main.commands)
    assert all(f"onnxcomp {name}" in read("README.md") for name in names)


def test_the_options_of_a_recipe_are_those_that_are_read():
    from onnxcomp.recipe import _OPTIONS

    text = section("docs/cli.md", "Recipes").rpartition("`[options]` may hold")[2].partition(".")[0]
    assert {part for index, part in enumerate(text.split("`")) if index % 2} == set(_OPTIONS)


# --- how it works -----------------------------------------------------------------------------------------------------


def test_the_rules_of_each_target_are_those_of_the_table():
    rows = {row["target"].strip("`"): row for row in table(section("docs/how-it-works.md", "Quantization by target"))}
    assert list(rows) == list(TARGETS)
    for name, target in TARGETS.items():
        row, rules = rows[name], target.rules
        fixed = "fixed, but for the batch" if target.dynamic_batch else "fixed"
        assert row["dynamic axes"] == (fixed if target.static_shapes else "kept")
        said = [row[key] for key in ("activations", "weights", "a scale a channel", "operators", "every output")]
        if rules is None:
            assert said == ["none", "none", "", "", ""]
        else:
            weights = "int8, 7 bits" if rules.reduce_range else "int8"
            channels = "but " + ", ".join(sorted(rules.per_tensor)) if rules.per_tensor else "all"
            operators = "all" if rules.operators is None else ", ".join(sorted(rules.operators))
            assert said == [rules.activations, weights, channels, operators, "yes" if rules.quantized_outputs else "no"]


def test_the_numbers_are_those_of_the_code():
    text = read("docs/how-it-works.md")
    budget = Budget()
    for phrase in (
        f"`--max-drop`, {budget.max_drop:g} unless given",
        f"`--max-error`, {budget.max_error:g} unless given",
        f"at least {judge.NOT_SLOWER:g} times as fast",
        f"{verdict.WORTH_KEEPING:g} times better",
        f"at most {quality.LOSSLESS_ERROR:.0e}".replace("e-0", "e-"),
        f"half of `--max-error` too: {budget.max_error * WHOLE_OUTPUT:.0%}".replace("%", " %"),
    ):
        assert phrase in " ".join(text.split()), phrase
    assert (verdict.MAX_WEAKER, judge.ROUNDING_MARGIN, resume.KEPT_DAYS) == (6, 4, 7)
    cli = read("docs/cli.md")
    assert f"`{budget.max_error:g}` by default" in cli
    assert f"`{budget.max_drop:g}`, the default" in cli


def test_the_default_stages_are_those_of_the_table():
    rows = table(section("docs/how-it-works.md", "Stages"))
    assert [row["stage"].strip("`") for row in rows] == [stage.name for stage in default_stages(data=True)]
    without = [row["stage"].strip("`") for row in rows if not row["needs"]]
    assert without == [stage.name for stage in default_stages(data=False)]


def test_verdicts_and_evidence_are_those_of_the_schema():
    definitions = schema()["$defs"]
    told = [row["verdict"] for row in table(section("docs/how-it-works.md", "The judge and its verdicts"))]
    assert sorted(told) == sorted(definitions["verdict"]["enum"])
    labels = {row["label"] for row in table(section("docs/how-it-works.md", "Evidence"))}
    assert labels == set(definitions["evidence"]["enum"]) - {"executed"}  # nothing runs on other targets yet


def test_every_module_of_the_layout_is_there():
    layout = next(block for block in blocks("docs/how-it-works.md") if block.text.startswith("onnxcomp/"))
    for line in layout.text.splitlines():
        for word in line[:35].replace(",", " ").split():
            if word.endswith((".py", "/")):
                assert (ROOT / "onnxcomp" / word).exists() or (ROOT / word).exists(), word


# --- deploying --------------------------------------------------------------------------------------------------------


def test_the_table_of_lints_is_that_of_the_code():
    steps = {"fit-target": "`fit-target`", "shapes": "fixed shapes", "deploy": "`deploy`", "": ""}
    rows = {row["lint"].strip("`"): row for row in table(section("docs/deploy.md", "Lints"))}
    assert rows.keys() == LINTS.keys()
    for name, lint in LINTS.items():
        told = [rows[name][column] for column in ("severity", "targets", "taken out by")]
        assert told == [lint.severity, ", ".join(sorted(lint.on)) or "all", steps[lint.mended_by]], name


def test_the_table_of_layers_is_that_of_the_code():
    rows = table(section("docs/deploy.md", "Layers of verification"))
    assert [row["layer"].strip("`") for row in rows] == list(LAYERS)
    assert all(set(target.verify_layers) <= set(LAYERS) for target in TARGETS.values())


# --- the report -------------------------------------------------------------------------------------------------------


def _field_names(part: dict[str, Any]) -> Iterator[str]:
    for name, described in part.get("properties", {}).items():
        yield name
        yield from _field_names(described)
    for inner in (*part.get("oneOf", ()), *([part["items"]] if "items" in part else [])):
        yield from _field_names(inner)


@pytest.mark.parametrize(
    ("title", "definition"),
    [
        ("The run", None),
        ("Figures", "figures"),
        ("The ledger", "stage"),
        ("The ledger", "pass"),
        ("Layers", "layer"),
        ("The graphs", "graph"),
        ("The graphs", "node"),
    ],
)
def test_every_field_of_the_schema_is_told(title, definition):
    whole = schema()
    text = section("docs/report-schema.md", title)
    part = whole if definition is None else whole["$defs"][definition]
    names = set(_field_names(part))
    assert names, title
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_every_field_of_an_attempt_is_told():
    text = section("docs/report-schema.md", "The ledger").rpartition("Each of the `attempts`")[2]
    assert {name for name in schema()["$defs"]["attempt"]["properties"] if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("definition", [None, "candidate"])
def test_every_field_of_a_comparison_is_told(definition):
    whole = comparison_schema()
    text = section("docs/report-schema.md", "A comparison")
    part = whole if definition is None else whole["$defs"][definition]
    assert {name for name in part["properties"] if f"`{name}`" not in text} == set()


def test_no_table_tells_of_a_field_that_is_not_in_the_schema():
    known = set(json.dumps([schema(), comparison_schema()]).replace('"', " ").split())
    for line in read("docs/report-schema.md").splitlines():
        if line.startswith("| `"):
            for part in line.split("|")[1].split(","):
                assert part.strip().strip("`") in known, line


# --- writing a pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero_small.py", "pyproject.toml"])
def test_the_example_is_shown_as_it_is(name):
    shown = [block.text for block in blocks("docs/writing-a-pass.md")]
    assert (EXAMPLES / name).read_text(encoding="utf-8") in shown


def test_the_example_pass_is_as_short_as_promised():
    source = (EXAMPLES / "zero_small.py").read_text(encoding="utf-8")
    statements = [line for line in re.sub(r'""".*?"""', "", source, flags=re.DOTALL).splitlines() if line.strip()]
    imports = [line for line in statements if line.startswith(("import ", "from "))]
    assert len(statements) - len(imports) <= 30


@pytest.fixture
def clean_registry(monkeypatch):
    """A registry that forgets what a test registers."""
    passes.registered_passes()
    monkeypatch.setattr(passes, "_registry", dict(passes._registry))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("zero_small"):
            del sys.modules[name]


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_every_benchmark_is_told_of():
    text = read("benchmarks/README.md")
    for path in Path(ROOT, "benchmarks").glob("*.py"):
        assert path.stem == "__init__" or path.stem in text, path.name
