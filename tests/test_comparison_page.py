"""A comparison of several models as JSON, as one HTML page, in the terminal and in a notebook."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from onnxcomp import layer_details
from onnxcomp.compared import Comparisons
from onnxcomp.errors import OptionError
from onnxcomp.ledger import Report
from onnxcomp.report import comparison_from_json, comparison_schema, comparison_to_json, read_any_json, to_json
from onnxcomp.report.compared import comparison_table, print_comparisons
from onnxcomp.report.comparison_document import any_from_json
from onnxcomp.report.page import comparison_page_html, page_html
from tests.comparisons import candidate, failed, sample_comparison, unmeasured
from tests.reports import detail, layer, sample_report
from tests.test_cli import one_error_line, run
from tests.test_report_page import HOSTILE, Page


def read_back(found: Comparisons) -> Comparisons:
    return comparison_from_json(comparison_to_json(found))


def page_of(*candidates: Any, **changes: Any) -> Page:
    return Page(comparison_page_html(read_back(sample_comparison(*candidates, **changes))))


def shown(found: Comparisons, *, terminal: bool = False, width: int = 160, verbose: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    print_comparisons(found, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def hostile_comparison() -> Comparisons:
    """A comparison whose every text is HTML, script and control characters."""
    one = candidate(
        HOSTILE,
        reason=HOSTILE,
        warnings=[HOSTILE],
        shortfalls=[HOSTILE],
        sqnr_db={HOSTILE: 1.0, "b": 2.0},
        after={"kernels": {HOSTILE: 3}},
        layers=[layer(HOSTILE, op=HOSTILE, reason=HOSTILE)],
    )
    found = sample_comparison(
        one,
        dataclasses.replace(one, model={**one.model, "path": f"{HOSTILE}2"}),
        failed(HOSTILE, HOSTILE),
        metric={"name": HOSTILE, "higher_is_better": True},
        target=HOSTILE,
        warnings=[HOSTILE],
        options={HOSTILE: HOSTILE, "command": [HOSTILE]},
        limits={HOSTILE: 1.0},
    )
    found.model["path"] = found.data["description"] = HOSTILE
    return found


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_is_as_its_schema_says():
    validator = jsonschema.Draft202012Validator(comparison_schema())
    validator.check_schema(validator.schema)
    for found in (sample_comparison(), sample_comparison(failed()), hostile_comparison()):
        validator.validate(json.loads(comparison_to_json(found)))


def test_every_field_of_a_comparison_is_in_its_schema():
    properties = comparison_schema()["properties"]
    assert properties.keys() == {field.name for field in dataclasses.fields(Comparisons)}
    assert set(comparison_schema()["required"]) == properties.keys()


def test_what_is_read_back_is_written_the_same():
    text = comparison_to_json(sample_comparison())
    assert comparison_to_json(comparison_from_json(text)) == text


def test_a_file_tells_a_report_from_a_comparison(tmp_path):
    (tmp_path / "r.json").write_text(to_json(sample_report()))
    (tmp_path / "c.json").write_text(comparison_to_json(sample_comparison()))
    assert isinstance(read_any_json(tmp_path / "r.json"), Report)
    assert isinstance(read_any_json(tmp_path / "c.json"), Comparisons)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["candidates"], [], "candidates: expected 1 items, got 0"),
        (["candidates", 0, "verdict"], "good", "candidates[0].verdict: expected one of better, no gain, over, failed"),
        (["candidates", 0, "after"], 7, "candidates[0].after: expected object, got 7"),
        (["schema_version"], "2.0", "schema_version: expected a text like"),
        (["model", "size_bytes"], -1, "model.size_bytes: -1 is out of range"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_with_its_place(path, value, message, tmp_path):
    facts = json.loads(comparison_to_json(sample_comparison()))
    place = facts
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(OptionError, match=r"^c: is not a comparison as --json writes it") as caught:
        any_from_json(json.dumps(facts), "c")
    assert message in str(caught.value)


def test_the_command_refuses_a_broken_comparison_in_one_line(tmp_path):
    (tmp_path / "c.json").write_text('{"kind": "comparison"}')
    result = run("report", tmp_path / "c.json")
    assert result.exit_code == 2
    assert one_error_line(result).endswith("expected a field 'schema_version', got none")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in leaves(item, (*path, key))]


@pytest.mark.parametrize("wrong", [None, -1])
def test_a_comparison_with_any_field_replaced_is_shown_or_refused(wrong):
    text = comparison_to_json(sample_comparison(candidate(layers=[layer("a")], sqnr_db={"a": 1.0, "b": 2.0}), failed()))
    places = leaves(json.loads(text))
    assert len(places) > 100
    seen = set()
    for place in places:
        facts = json.loads(text)
        inner = facts
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = wrong
        try:
            found = any_from_json(json.dumps(facts))
        except OptionError:
            seen.add("refused")
            continue
        assert isinstance(found, Comparisons)
        assert "<html" in comparison_page_html(found)
        assert shown(found)
        seen.add("shown")
    assert "refused" in seen


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_model_and_no_column_without_a_figure():
    text = " ".join(page_of().contents["th"])
    for name in ("model.onnx", "int8.onnx", "half.onnx", "pruned.onnx", "gone.onnx"):
        assert name in text
    assert page_of().contents["th"][:3] == ["Model", "Verdict", "Size"]
    untimed = page_of(candidate(after={"latency_ms": None}, speed=None))
    assert "Faster" in page_of().contents["th"]
    assert "Faster" not in untimed.contents["th"]


def test_the_charts_have_a_point_for_each_candidate_that_was_measured_and_the_budget():
    charts = page_of().embedded["compared"]
    assert [chart["axis"] for chart in charts] == ["speed", "size"]
    assert [point[:3] + point[4:] for point in charts[0]["points"]] == [
        [1.8, 0.002, "int8.onnx", True],
        [0.8, 0.0, "half.onnx", True],
        [1.1, 0.3, "pruned.onnx", False],
    ]
    assert charts[0]["budget"] == 0.005
    assert charts[0]["front"] == [[1.0, 0.0], [1.8, 0.002]]


def test_one_candidate_has_cards_before_and_after():
    single, several = page_of(candidate()), page_of()
    assert ("ul", {"class": "cards"}) in single.elements
    assert ("ul", {"class": "cards"}) not in several.elements
    assert single.contents["h1"] == ["3.60 times smaller, 1.80 times as fast, drop 0.0020"]
    assert several.contents["h1"] == ["1 of 4 candidates is better than the original"]


def test_layers_name_their_model_where_there_are_several():
    layers = page_of().embedded["layers"]
    assert [column["key"] for column in layers["columns"]][:2] == ["layer", "model"]
    assert {"int8.onnx", "pruned.onnx"} <= set(layers["texts"])
    options = [found["value"] for tag, found in page_of().elements if tag == "option"]
    assert options == ["all", "model=int8.onnx", "model=pruned.onnx"]
    alone = page_of(candidate(layers=[layer("a")])).embedded["layers"]
    assert "model" not in [column["key"] for column in alone["columns"]]


def test_the_page_says_on_which_samples_the_errors_of_layers_rest():
    row = layer("conv1")
    for text, told in (
        (page_html(sample_report(layers=[row])), "all layers up to it, on a few samples."),
        (
            comparison_page_html(sample_comparison(candidate(layers=[row]))),
            "all layers up to it, on all of the samples.",
        ),
    ):
        assert told in text


@pytest.mark.parametrize(("quality", "loss"), [("metric", "drop"), ("relative-error", "error")])
def test_an_infinite_loss_is_told_alike_with_and_without_json_between(quality, loss):
    found = sample_comparison(candidate(after={"drop": math.inf, "error": math.inf}), quality=quality)
    for each in (found, read_back(found)):
        table = comparison_table(each)
        assert dict(zip(table.head, table.rows[1], strict=True))[loss] == "infinite"


def test_each_panel_belongs_to_the_row_of_its_layer_and_model():
    first = candidate("a.onnx", layers=[layer("conv1"), layer("conv2", detail=detail())])
    second = candidate("b.onnx", layers=[layer("conv1", detail=detail(), cause="pruned"), layer("conv2")])
    layers = page_of(first, second).embedded["layers"]

    told = [[layers["texts"][number] for number in layers["rows"][row][:2]] for row, _ in layers["details"]]
    assert told == [["conv2", "a.onnx"], ["conv1", "b.onnx"]]
    assert [panel["cause"] for _, panel in layers["details"]] == ["rounding: its weight takes 8 bits", "pruned"]


def test_without_layers_there_is_no_table_of_them():
    ids = [found.get("id") for _, found in page_of(candidate()).elements]
    assert "table" not in ids
    assert "layers" not in ids


def test_no_text_of_a_comparison_becomes_an_element_or_a_script():
    calm = page_of()
    text = comparison_page_html(read_back(hostile_comparison()))
    hostile = Page(text)
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in calm.elements}
    assert len(hostile.contents["script"]) == 3
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]
    assert not {"\x1b", "\u202e"} & set(text)


def test_a_relative_error_on_made_up_inputs_has_the_limit_of_whole_outputs():
    found = sample_comparison(
        candidate(after={"drop": None, "metric": None, "error_interval": (0.0, 0.1)}),
        quality="relative-error",
        metric=None,
    )
    judged = Page(comparison_page_html(read_back(found))).embedded["compared"]
    found.data["generated"] = True
    assert judged[0]["budget"] == 0.2
    assert Page(comparison_page_html(read_back(found))).embedded["compared"][0]["budget"] == 0.1


def test_five_models_of_2000_layers_stay_small():
    few = layer_details.MOST_DETAILED // 5
    rows = [layer(f"/encoder/layers.{index}/MatMul", detail=detail() if index < few else None) for index in range(2000)]
    many = [candidate(f"{number}.onnx", layers=rows) for number in range(5)]
    assert len(comparison_page_html(sample_comparison(*many))) < 1_500_000


def test_a_command_is_made_for_a_comparison_that_does_not_know_its_own():
    code = page_of().contents["code"][0]
    assert code == (
        "onnxcomp compare model.onnx int8.onnx half.onnx pruned.onnx gone.onnx --data DATA --fail-under top1=0.9 "
        "--target x86-vnni"
    )


# --- terminal and notebook --------------------------------------------------------------------------------------------


def test_plain_text_says_why_a_model_could_not_be_compared():
    text = shown(sample_comparison())
    assert "could not be compared\n  gone.onnx  cannot be read (No such file or directory)\n" in text
    assert "warning: pruned.onnx: compared on the samples one by one" in text
    assert str(sample_comparison()) == text


def test_one_candidate_is_shown_before_and_after():
    head = "model.onnx -> int8.onnx: better, 3.60 times smaller, 1.80 times as fast, drop 0.0020"
    assert shown(sample_comparison(candidate())).startswith(f"{head}\n")
    assert "size                     755 kB         210 kB" in shown(sample_comparison(candidate()))


def test_the_worst_layers_of_each_are_shown_and_all_of_them_on_request():
    many = candidate(layers=[layer(f"conv{index}") for index in range(30)])
    found = sample_comparison(many, failed())
    assert "int8.onnx: layers" in shown(found)
    assert shown(found).count("  conv") == 8
    assert shown(found, verbose=True).count("  conv") == 30


@pytest.mark.parametrize("width", [40, 80, 100, 120, 160, 240])
@pytest.mark.parametrize("found", [sample_comparison(), hostile_comparison()], ids=["calm", "hostile"])
def test_it_fits_the_terminal(width, found):
    for line in shown(found, terminal=True, width=width, verbose=True).splitlines():
        assert len(line) <= width
        assert line.isprintable()


def test_a_narrow_terminal_says_which_columns_it_goes_without():
    text = shown(sample_comparison(), terminal=True, width=80)
    assert "there is no room for deflated; same class;" in text
    assert "no room" not in shown(sample_comparison(), terminal=True, width=240)
    assert "95% interval" in shown(sample_comparison(), width=80)  # no terminal: nothing is left out


def test_a_metric_may_be_called_as_a_column_is():
    found = sample_comparison(metric={"name": "size", "higher_is_better": True})
    assert "size (metric)" in shown(found)


def test_a_relative_error_takes_the_place_of_the_drop():
    found = sample_comparison(
        candidate(after=dataclasses.asdict(unmeasured())), failed(), quality="relative-error", metric=None
    )
    assert "1.00%" in shown(found)
    assert "drop" not in shown(found).partition("could not")[0].replace("drop 0.0020", "")


def test_a_notebook_shows_a_pair_escaped():
    found = hostile_comparison()
    text = found.pair(found.candidates[0])._repr_html_()
    assert "<th>size</th><td" in text
    assert "<script" not in text
    assert "\x1b" not in text


def test_a_notebook_shows_the_table_escaped():
    text = sample_comparison()._repr_html_()
    hostile = hostile_comparison()._repr_html_()
    assert "<td>int8.onnx</td><td>better</td>" in text
    assert "gone.onnx could not be compared" in text
    assert "<script" not in hostile
    assert "\x1b" not in hostile
