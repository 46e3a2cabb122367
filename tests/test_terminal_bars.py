"""Bars in the terminal, and `--plain` for logs."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from onnxcomp import inspect
from onnxcomp.report import plain_text, print_report
from onnxcomp.report.sections import Section, show
from onnxcomp.report.terminal import bar
from onnxcomp.report.views import print_facts
from tests.reports import sample_report
from tests.small import save_classifier, save_samples
from tests.test_cli import run

FULL = "\N{FULL BLOCK}"


def drawn(section: Section, width: int = 100, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(Console(file=file, force_terminal=True, width=width, color_system=None), ["head", "more"], [section])
    file.flush()
    file.seek(0)
    return file.read().splitlines()


def table(*values: float | None, **changes: object) -> Section:
    rows = [(f"layer {number}", "1 kB" * 3, str(value)) for number, value in enumerate(values)]
    return Section("layers", ("name", "bytes", "error"), rows, bars={"error": values}, **changes)  # type: ignore[arg-type]


def bars(lines: list[str]) -> list[int]:
    return [line.count(FULL) for line in lines if line.startswith("layer ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    save_classifier(path / "modèle.onnx")
    save_classifier(path / "near.onnx", noise=0.01)
    save_samples(path / "test.npz")
    return path


# --- bars -------------------------------------------------------------------------------------------------------------


def test_a_bar_is_as_long_as_its_value_is_a_part_of_the_largest():
    assert bars(drawn(table(8.0, 4.0, 0.0, None))) == [12, 6, 0, 0]


def test_what_is_infinite_has_a_whole_bar_and_leaves_the_others_their_length():
    assert bars(drawn(table(math.inf, 2.0, 1.0, math.nan))) == [12, 12, 6, 0]


def test_nothing_but_zeros_has_no_bars():
    assert bars(drawn(table(0.0, 0.0))) == [0, 0]


def test_bars_are_shorter_in_a_narrow_terminal_and_left_out_before_cells_are_folded():
    lengths = [max(bars(drawn(table(1.0), width))) for width in (100, 40, 36, 30)]
    assert lengths[0] == 12
    assert 0 < lengths[1] < 12
    assert lengths[-1] == 0
    assert lengths == sorted(lengths, reverse=True)


def test_columns_that_may_be_left_out_make_room_for_bars_and_are_named():
    lines = drawn(table(1.0, optional=("bytes",)), 32)
    assert bars(lines) > [0]
    assert not any("1 kB" in line for line in lines)
    assert "there is no room for bytes (--plain shows all)" in " ".join(map(str.rstrip, lines))


def test_a_terminal_that_has_but_ascii_gets_plain_text():
    lines = drawn(table(1.0), encoding="ascii")
    assert "  layer 0  1 kB1 kB1 kB    1.0" in lines


def test_a_bar_of_a_value_over_the_largest_is_whole():
    console = Console(file=io.StringIO(), width=20)
    console.print(bar(3.0, 1.0, 4))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == FULL * 4


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_shows_where_the_work_is(folder, width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    print_facts(inspect(folder / "near.onnx"), [], console)
    first, head = (next(line for line in file.getvalue().splitlines() if line.startswith(name))
                   for name in ("first ", "head "))  # fmt: skip
    assert first.count(FULL) > head.count(FULL)
    assert all(len(line) <= width for line in file.getvalue().splitlines())


def test_a_report_shows_what_part_is_left():
    file = io.StringIO()
    print_report(sample_report(), Console(file=file, width=120, force_terminal=True, color_system=None))
    [size] = [line for line in file.getvalue().splitlines() if line.strip().startswith("size ")]
    assert size.count(FULL) == 2  # of ten: 210 of 755 kB


def test_plain_output_has_no_bars():
    assert FULL not in plain_text(sample_report())


# --- --plain ----------------------------------------------------------------------------------------------------------


def plain(*arguments: object) -> str:
    """What a command prints for logs, in a terminal that insists on colours."""
    result = run(*arguments, "--plain", env={"FORCE_COLOR": "1", "COLUMNS": "40", "TTY_COMPATIBLE": "1"})
    assert result.exit_code == 0, result.output
    text: str = result.stdout
    return text


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "modèle.onnx"],
        ["compare", "modèle.onnx", "near.onnx", "--no-timing", "--layers"],
        ["compare", "modèle.onnx", "near.onnx", "modèle.onnx", "--no-timing"],
        ["optimize", "modèle.onnx", "-p", "simplify", "--no-timing", "-o", "small.onnx"],
    ],
    ids=["inspect", "compare", "compare several", "optimize"],
)
def test_plain_is_ascii_in_lines_of_any_length(folder, arguments, monkeypatch):
    monkeypatch.chdir(folder)
    text = plain(*arguments)
    assert text.isascii()
    assert all(line.isprintable() for line in text.splitlines())
    assert "mod\\xe8le.onnx" in text
    assert max(map(len, text.splitlines())) > 40


def test_without_plain_a_terminal_that_insists_gets_bars(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = run("inspect", "near.onnx", env={"FORCE_COLOR": "1", "COLUMNS": "100"})
    assert FULL in result.stdout
    assert "\x1b[" in result.stdout


def test_a_pipe_is_plain_by_itself_but_keeps_names_as_they_are(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = run("inspect", "modèle.onnx").stdout
    assert text.startswith("modèle.onnx\n")
    assert not {FULL, "\x1b"} & set(text)
