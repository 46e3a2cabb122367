"""Reading a report back from its JSON: what is accepted, and in which words the rest is refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from onnxcomp.errors import OptionError
from onnxcomp.report import from_json, read_json, schema, to_json, write_json
from onnxcomp.report.checking import first_mismatch
from onnxcomp.report.page import page_html
from tests.reports import layer, sample_report
from tests.test_cli import one_error_line, run


def loaded(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(to_json(sample_report(layers=[layer("conv1")], **changes)))
    return facts


def refused(code: int, *arguments: object) -> str:
    """The one line on stderr of a command that ends with this code."""
    result = run(*arguments)
    assert result.exit_code == code
    return one_error_line(result)


def test_what_is_read_back_is_written_the_same():
    text = to_json(sample_report(layers=[layer("conv1")]))
    assert to_json(from_json(text)) == text


def test_a_report_of_the_earlier_form_has_no_layers():
    facts = loaded() | {"schema_version": "1.0"}
    del facts["layers"]
    assert from_json(json.dumps(facts)).layers == []


def test_fields_of_a_later_form_are_passed_over():
    facts = loaded() | {"schema_version": "1.9", "more": 1}
    facts["stages"][0]["more"] = facts["before"]["more"] = {}
    assert from_json(json.dumps(facts)).verdict == sample_report().verdict


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["verdict"], 7, "verdict: expected string, got 7"),
        (["schema_version"], "2.0", "schema_version: expected a text like ^1\\.\\d+$, got '2.0'"),
        (
            ["stages", 0, "verdict"],
            "good",
            "stages[0].verdict: expected one of kept, dropped, forced, unchanged, skipped",
        ),
        (["after", "latency_ms"], "fast", "after.latency_ms: expected number or null, got 'fast'"),
        (["after", "size_bytes"], -1, "after.size_bytes: -1 is out of range"),
        (["after", "drop_interval"], [0.1], "after.drop_interval: expected 2 items, got 1"),
        (["after", "kernels"], {"Conv": "1"}, "after.kernels.Conv: expected integer, got '1'"),
        (["layers", 0, "weight_zeros_after"], 1.5, "layers[0].weight_zeros_after: 1.5 is out of range"),
        (["budget_met"], 1, "budget_met: expected boolean, got 1"),
        (["before"], [], "before: expected object, got a list"),
        (["speed"], 10**400, "speed: expected number or null, got 1000"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_with_its_place(path, value, message):
    facts = loaded()
    inner: Any = facts
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(OptionError) as caught:
        from_json(json.dumps(facts), "r.json")
    assert str(caught.value).startswith(f"r.json: is not a report as --json writes it: {message}")


def test_a_missing_field_is_named():
    facts = loaded()
    del facts["stages"][0]["reason"]
    assert first_mismatch(facts, schema()) == "stages[0]: expected a field 'reason', got none"


def test_the_checks_agree_with_jsonschema_on_what_is_valid():
    facts = loaded()
    jsonschema.validate(facts, schema())
    assert first_mismatch(facts, schema()) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "\ufeff{}", "[1, NaN]", "Infinity", "[" * 100_000, "1" * 5000],
    ids=lambda text: text[:6] or "empty",
)
def test_what_is_no_json_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    line = refused(2, "report", path)
    assert f"{path}: " in line


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\x00\x80\x80")
    assert "got what is no JSON" in refused(2, "report", path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "none.json")


WRONG = [None, -1, 10**29, 1e300, True, "", "<b>\n", [], {}, [None, None], {"a": None}]
"""What each field of a report is replaced by, in turn."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_a_report_with_any_field_replaced_is_shown_or_refused():
    facts, outcomes = loaded(), Counter[str]()
    for index, path in enumerate(places(facts)):
        changed = copy.deepcopy(facts)
        inner: Any = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = WRONG[index % len(WRONG)]
        try:
            page_html(from_json(json.dumps(changed)))
        except OptionError:
            outcomes["refused"] += 1
        else:
            outcomes["shown"] += 1
    assert min(outcomes["refused"], outcomes["shown"]) > 20


def test_an_interval_without_ends_is_shown():
    facts = loaded()
    facts["after"]["drop_interval"] = facts["stages"][2]["attempts"][0]["drop_interval"] = [None, None]
    assert "+0.0020" in page_html(from_json(json.dumps(facts)))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_page_is_written_beside_the_report(tmp_path):
    write_json(sample_report(), tmp_path / "run.json")
    result = run("report", tmp_path / "run.json")
    assert (tmp_path / "run.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert result.stdout.startswith(f"{tmp_path / 'run.html'}: ")


def test_the_report_itself_is_not_overwritten(tmp_path):
    write_json(sample_report(), tmp_path / "run.html")
    line = refused(1, "report", tmp_path / "run.html")
    assert "the output would overwrite the input" in line


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    write_json(sample_report(), tmp_path / "run.json")
    line = refused(1, "report", tmp_path / "run.json", "-o", tmp_path / "none" / "run.html")
    assert "does not exist" in line
