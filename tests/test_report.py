from __future__ import annotations

import io
import json
import math
import re

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from onnxcomp.errors import OutputError
from onnxcomp.ledger import Attempt, Figures, PassEntry, Report, StageEntry
from onnxcomp.report import html_summary, plain_text, print_report, schema, to_json, write_json
from onnxcomp.report.text import bytes_text, count_text, duration_text, error_text, percent, printable
from tests.reports import sample_report

EVIL = "conv\x1b[31m[red]x[/red]\nnext\r\u202e<b>\x07"


def evil_report() -> Report:
    """A report whose every name is hostile."""
    entry = PassEntry(
        EVIL, {EVIL: EVIL}, changed=[{"where": EVIL, "what": EVIL}], left=[{"where": EVIL, "why": EVIL}], notes=[EVIL]
    )
    attempts = [Attempt([entry], "kept", EVIL, 1.0), Attempt([entry], "dropped", EVIL, 1.0)]
    sample = sample_report()
    return sample_report(
        verdict=EVIL,
        stages=[StageEntry(EVIL, "kept", EVIL, 1.0, attempts)],
        model={**sample.model, "path": f"in/{EVIL}"},
        output={"path": EVIL, "sha256": "1" * 64, "size_bytes": 3},
        data={**sample.data, "description": EVIL},
        metric={"name": EVIL, "higher_is_better": True},
        target=EVIL,
        warnings=[EVIL],
        notes=[EVIL],
    )


def rendered(report: Report, *, width: int = 100, verbose: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="truecolor", highlight=False)
    print_report(report, console, verbose=verbose)
    return file.getvalue()


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_shows_every_figure_with_its_evidence():
    lines = {line.split("  ")[0].strip(): line for line in plain_text(sample_report()).splitlines()}
    assert lines["size"].split("  ")[-1].strip() == "3.60x"
    assert "755 kB" in lines["size"]
    assert "1.23 ms +-4%" in lines["latency, measured"]
    assert "1.80x" in lines["latency, measured"]
    assert lines["MACs in int8"].split()[-2:] == ["0%", "93.8%"]
    assert "-0.0010 to +0.0052" in lines["drop"]
    assert lines["top1"].split() == ["top1", "0.9120", "0.9100"]
    assert "31.2 dB" in lines["SQNR"]


def test_leaves_out_what_was_not_measured():
    bare = Figures(size_bytes=1000)
    text = plain_text(sample_report(before=bare, after=bare, speed=None))
    table = text.split("ledger")[0].splitlines()[3:]
    assert [line.split()[0] for line in table if line.strip()] == ["before", "size"]


def test_says_exact_where_outputs_are_equal_and_infinite_where_they_are_lost():
    same = Figures(size_bytes=1, error=0.0, sqnr_db=math.inf)
    lost = Figures(size_bytes=1, error=math.inf, sqnr_db=-math.inf)
    assert "exact" in plain_text(sample_report(after=same))
    text = plain_text(sample_report(after=lost))
    assert "infinite" in text
    assert "no match" in text
    assert "exact" not in text


def test_shows_attempts_only_where_there_were_several():
    text = plain_text(sample_report())
    assert "dropped form 1: over the budget" in text
    assert "kept form 2: float_nodes=/head/Gemm: 3.6 times smaller" in text
    assert text.count("form ") == 2


def test_lists_changes_and_places_left_alone_when_asked():
    assert "excluded" not in plain_text(sample_report())
    text = plain_text(sample_report(), verbose=True)
    assert "changed: bn1: folded into conv1" in text
    assert "left: node0, node1, node2 and 2 more: excluded" in text
    assert "changed: /features/0/Conv, /features/1/Conv, /features/2/Conv and 14 more: runs in int8" in text


def test_warnings_and_notes_are_never_left_out():
    for text in (plain_text(sample_report()), without_styles(rendered(sample_report()))):
        assert "250 samples are too few to be sure of the budget" in text
        assert "the labels look like classes" in text


def test_an_empty_ledger_says_so():
    assert "no stage was run" in plain_text(sample_report(stages=[]))


# --- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 100, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_fits_the_terminal(width, verbose):
    for line in without_styles(rendered(sample_report(), width=width, verbose=verbose)).splitlines():
        assert len(line) <= width


def test_plain_text_is_ascii_without_trailing_spaces():
    text = plain_text(sample_report(), verbose=True)
    assert text.isascii()
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_is_plain_where_there_is_no_terminal():
    file = io.StringIO()
    print_report(sample_report(), Console(file=file, width=20))
    assert file.getvalue() == plain_text(sample_report())


def test_prints_names_that_the_encoding_lacks():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_report(sample_report(target="模型"), Console(file=file))
    file.flush()
    assert b"\\u6a21\\u578b" in raw.getvalue()


def test_good_is_green_and_a_missed_budget_yellow():
    assert "\x1b[1;32m✓ 3.60 times smaller" in rendered(sample_report()).replace("\x1b[0m\x1b[1;32m", "")
    assert "\x1b[1;33m! 3.60 times smaller" in rendered(sample_report(budget_met=False)).replace(
        "\x1b[0m\x1b[1;33m", ""
    )


# --- hostile names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [False, True])
def test_names_cannot_send_control_codes_to_the_terminal(verbose):
    text = rendered(evil_report(), width=200, verbose=verbose)
    plain = without_styles(text)
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert "\u202e" not in plain
    assert "\r" not in plain
    assert "\\x1b[31m[red]x[/red]\\nnext" in plain


def test_names_are_no_markup():
    colours = set(re.findall(r"\x1b\[[0-9;]*m", rendered(evil_report(), width=300, verbose=True)))
    assert colours <= set(re.findall(r"\x1b\[[0-9;]*m", rendered(sample_report(), width=300, verbose=True)))


@pytest.mark.parametrize("verbose", [False, True])
def test_plain_text_has_no_control_codes_and_no_lines_of_others(verbose):
    text = plain_text(evil_report(), verbose=verbose)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert not any(line.startswith("next") for line in text.splitlines())


def test_html_is_escaped():
    text = html_summary(evil_report())
    assert "<b>\\x07" not in text
    assert "&lt;b&gt;" in text
    assert "\x1b" not in text


def test_html_shows_figures_and_stages():
    text = html_summary(sample_report())
    assert "<th>size</th><td" in text
    assert "<th>quantize</th><td>kept</td>" in text
    assert text.startswith("<div>")
    assert text.endswith("</div>")


def test_a_notebook_shows_what_stands_on_top_of_the_page():
    report = sample_report()
    text = html_summary(report)
    for part in (report.verdict, *report.warnings, *report.notes, "in/model.onnx", "x86-vnni", "MACs in int8"):
        assert part in text


def test_a_report_shows_itself():
    report = sample_report()
    assert str(report) == plain_text(report)
    assert report._repr_html_() == html_summary(report)


# --- JSON -------------------------------------------------------------------------------------------------------------


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())


def test_the_schema_is_a_valid_schema_with_a_version():
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$id"] == "urn:onnxcomp:report:1.2"
    assert sample_report().schema_version == "1.2"


@pytest.mark.parametrize(
    "report", [sample_report(), evil_report(), sample_report(output=None, metric=None, speed=None)]
)
def test_json_is_as_the_schema_says(report):
    validator().validate(json.loads(to_json(report)))


def test_the_schema_refuses_a_report_with_unknown_or_missing_fields():
    document = json.loads(to_json(sample_report()))
    assert not validator().is_valid({**document, "extra": 1})
    assert not validator().is_valid({key: value for key, value in document.items() if key != "stages"})
    document["after"]["latency_evidence"] = "guessed"
    assert not validator().is_valid(document)


def test_infinity_and_nan_are_null_in_json():
    figures = Figures(size_bytes=1, sqnr_db=math.inf, error=math.nan, drop_interval=(-math.inf, math.inf))
    text = to_json(sample_report(after=figures))
    after = json.loads(text, parse_constant=pytest.fail)["after"]
    assert (after["sqnr_db"], after["error"], after["drop_interval"]) == (None, None, [None, None])


def test_numpy_values_become_plain_numbers():
    entry = PassEntry("p", {"a": np.float32(0.5), "b": np.arange(3), "c": (1, 2), "d": np.bool_(True)})
    stage = StageEntry("s", "kept", "r", np.float64(1.5), [Attempt([entry], "kept", "r", 1.0)])
    written = json.loads(to_json(sample_report(stages=[stage])))
    assert written["stages"][0]["attempts"][0]["passes"][0]["options"] == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": [1, 2],
        "d": True,
    }
    validator().validate(written)


def test_writes_json_whole(tmp_path):
    write_json(sample_report(), tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == to_json(sample_report())
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_refuses_to_write_json_where_there_is_no_folder(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        write_json(sample_report(), tmp_path / "no" / "r.json")


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (2_600_000_000, "2.60 GB")],
)  # fmt: skip
def test_sizes_are_rounded_to_three_digits(size, text):
    assert bytes_text(size) == text


def test_words_for_numbers():
    assert [count_text(n) for n in (7, 1234, 12_345_678)] == ["7", "1.23 k", "12.3 M"]
    assert [duration_text(s) for s in (0.04, 59.96, 3661)] == ["0.0 s", "1 min 0 s", "61 min 1 s"]
    assert [percent(s) for s in (0, 0.00001, 0.5, 0.99999, 1)] == ["0%", "<0.1%", "50.0%", ">99.9%", "100%"]
    assert [error_text(e) for e in (0, 1e-6, 0.05, math.inf)] == ["0", "below 0.01%", "5.00%", "infinite"]


def test_what_cannot_be_printed_is_escaped():
    assert printable("a\tb\x1b\u200e é模") == "a\\tb\\x1b\\u200e é模"
