"""Files that mean harm: one line of error, or a clean result; bounded memory and time; nothing written elsewhere."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxcomp.cli import main
from tests import hostile
from tests.models import mlp_model

MEMORY_BYTES = 1 << 30
"""Resident: importing onnx, ONNX Runtime and numpy takes 0.1 of it."""
LIMIT_BYTES = 3 << 30
"""What a process may take at all: models that compute something endless meet it in ONNX Runtime's process."""
ENDLESS = {"folding_bomb", "huge_constant_of_shape"}
SECONDS = 60.0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own, which is the current one, beside others that must stay empty."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return inner


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_symlink() and "cache" not in path.parts}


def good_model(folder: Path) -> Path:
    onnx.save(mlp_model(), folder / "good.onnx")
    return folder / "good.onnx"


def check(code: int, output: str, before: set[Path], folder: Path, *, result: Path | None = None) -> None:
    """Either a clean end with a result, or one line of error, and nothing but the result is new."""
    assert code in {0, 1, 2}, output
    assert "Traceback" not in output
    assert "internal error" not in output
    if code:
        assert len(output.strip().splitlines()) == 1 or code == 2, output
    new = files(folder.parent) - before
    assert new <= ({result} if code == 0 and result else set())


@pytest.mark.parametrize(
    ("name", "command"),
    # ONNX Runtime takes all the memory that it may for what is endless: with limits, below.
    [(name, "inspect") for name in hostile.MODELS]
    + [(name, "optimize") for name in hostile.MODELS if name not in ENDLESS],
)
def test_a_hostile_model_is_read_or_refused_in_a_line(name, command, folder):
    path = hostile.MODELS[name](folder)
    before = files(folder.parent)
    output = folder / "out.onnx"
    arguments = [command, str(path), *(["-o", str(output), "-p", "simplify"] if command == "optimize" else [])]
    result = CliRunner().invoke(main, arguments)
    check(result.exit_code, result.output if result.exit_code else "", before, folder, result=output)


@pytest.mark.parametrize("name", [name for name in hostile.DATA if name != "zip_bomb"])
def test_hostile_data_are_refused_in_a_line(name, folder):
    model, data = good_model(folder), hostile.DATA[name](folder)
    before = files(folder.parent)
    result = CliRunner().invoke(main, ["optimize", str(model), "--data", str(data), "-o", str(folder / "o.onnx")])
    assert result.exit_code == 1, result.output
    check(result.exit_code, result.output, before, folder)


@pytest.mark.parametrize("name", hostile.RECIPES)
def test_a_hostile_recipe_is_refused_in_a_line(name, folder):
    model, recipe = good_model(folder), folder / "r.toml"
    recipe.write_text(hostile.RECIPES[name])
    before = files(folder.parent)
    result = CliRunner().invoke(main, ["optimize", str(model), "--recipe", str(recipe), "-o", str(folder / "o.onnx")])
    assert result.exit_code in {1, 2}, result.output
    check(result.exit_code, result.output, before, folder)


@pytest.mark.parametrize(
    "name", ["a\nb.onnx", "\x1b[31mred.onnx", "-rf.onnx", "a" * 250 + ".onnx", "ü☃.onnx", "; rm x"]
)
def test_an_output_of_an_odd_name_is_written_where_it_says(name, folder):
    model = good_model(folder)
    result = CliRunner().invoke(main, ["optimize", str(model), "-o", str(folder / name), "-p", "simplify"])
    assert result.exit_code in {0, 1}
    assert "\x1b" not in result.output
    if result.exit_code == 0:
        assert (folder / name).is_file()


EVIL = "\x1b]0;owned\x07<script>alert(1)</script>\r\n\u202e"


def test_names_of_a_model_cannot_move_the_cursor_or_become_markup(folder):
    model = mlp_model()
    for node in model.graph.node:
        node.name = f"{EVIL}{node.op_type}{node.output[0]}"
    model.producer_name = model.doc_string = EVIL
    model.metadata_props.add(key=EVIL, value=EVIL)
    onnx.save(model, folder / "m.onnx")
    np.savez(folder / "d.npz", x=np.ones((16, 8), np.float32))
    told = [
        CliRunner().invoke(main, arguments).output
        for arguments in (
            ["inspect", "m.onnx", "-v", "--advise"],
            ["optimize", "m.onnx", "--data", "d.npz", "-o", "o.onnx", "-v"],
            ["compare", "m.onnx", "m.onnx", "--no-timing", "--layers", "-v"],
            ["verify", "m.onnx", "m.onnx", "--layers", "cpu", "-v"],
            ["deploy", "m.onnx", "--target", "web", "-o", "app"],
        )
    ]
    for text in told:
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\r" not in text
        assert "\u202e" not in text


def test_a_report_in_a_notebook_is_free_of_markup_of_the_models(folder):
    from onnxcomp import optimize

    model = mlp_model()
    for node in model.graph.node:
        node.name = f"{EVIL}{node.output[0]}"
    report = optimize(model, timing=False).report
    assert "<script>" not in report._repr_html_()


# --- with limits, each in a process of its own ------------------------------------------------------------------------


def limited(*arguments: str, cwd: Path) -> tuple[int, str, int, float]:
    """Run the command; its exit code, what it said, its peak memory with its worker's, and its seconds."""
    code = (
        "import resource, sys; from onnxcomp.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
        "    print('peak', max(resource.getrusage(who).ru_maxrss for who in both) * 1024, file=sys.stderr)\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd.parent / "cache")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES)),
    )
    lines = done.stderr.strip().splitlines()
    peak = int(lines[-1].split()[1]) if lines and lines[-1].startswith("peak ") else 0
    return (
        done.returncode,
        "\n".join(line for line in lines if not line.startswith("peak ")),
        peak,
        time.monotonic() - started,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.MODELS)
def test_a_hostile_model_takes_bounded_memory_and_time(name, folder):
    path = hostile.MODELS[name](folder)
    code, said, peak, _ = limited("optimize", str(path), "-o", "o.onnx", cwd=folder)
    assert code in {0, 1}, said
    assert "Traceback" not in said
    assert 0 < peak < (LIMIT_BYTES if name in ENDLESS else MEMORY_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.DATA)
def test_hostile_data_take_bounded_memory_and_time(name, folder):
    model, data = good_model(folder), hostile.DATA[name](folder)
    code, said, peak, _ = limited("optimize", str(model), "--data", str(data), "-o", "o.onnx", cwd=folder)
    assert code == 1, said
    assert 0 < peak < MEMORY_BYTES
