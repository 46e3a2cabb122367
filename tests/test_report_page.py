"""The report as one HTML page: what is in it, that nothing of a report can act in it, and that it loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import click
import pytest

from onnxcomp.cli import main
from onnxcomp.ledger import Attempt, PassEntry, Report, StageEntry
from onnxcomp.report import from_json, to_json
from onnxcomp.report.page import page_html
from onnxcomp.report.page.answer import SHARED, cards, next_steps
from onnxcomp.report.page.candidates import candidates, chart_data, front
from onnxcomp.report.page.history import curves, measured, time_line
from onnxcomp.report.page.layers import layer_data
from onnxcomp.report.page.panels import details
from onnxcomp.report.rows import figure_rows
from tests.graphs import graph_of
from tests.markdown import shell_commands
from tests.reports import detail, large_report, layer, sample_report

MOST_BYTES = 1_500_000
VOID = {"meta", "br", "input", "link", "img", "hr", "wbr"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\u202e\x1b[31m\n"


class Page(HTMLParser):
    """What a page consists of; it refuses elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.contents.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.contents[self._open[-1]][-1] += data

    @property
    def embedded(self) -> Any:
        """The JSON in it."""
        return json.loads(self.contents["script"][0])


def read_back(report: Report) -> Report:
    return from_json(to_json(report))


def page_of(**changes: Any) -> Page:
    return Page(page_html(read_back(sample_report(**changes))))


def attempt(verdict: str, speed: float | None, size: float | None, drop: float | None, **more: Any) -> Attempt:
    return Attempt([PassEntry("quantize", more.pop("options", {}))], verdict, "why", 2.0, speed, size, drop, **more)


# --- one file, which is safe ------------------------------------------------------------------------------------------


def hostile_detail() -> dict[str, Any]:
    """A panel's data with a type that is HTML, and numbers that no weight has."""
    [given, made] = detail()["activations"]
    weights = {**detail()["weights"], "low": -1e300, "high": 1e300, "before": [1], "after": [10**30]}
    singular = {"kept": 0, "total": 0, "values": [[1, 1e300], [None, 2], [2, None]]}
    odd = {**given, "type": HOSTILE, "scale": 0, "low": 1, "high": -1}
    return detail(weights=weights, activations=[odd, {**made, "scale": -1e300}], singular_values=singular)


def hostile_graph() -> dict[str, Any]:
    """A node whose every text is HTML, script and control characters."""
    nodes = [(HOSTILE, HOSTILE, [HOSTILE, f"{HOSTILE}w"], [f"{HOSTILE}y"])]
    return graph_of(
        nodes, {f"{HOSTILE}w": HOSTILE}, inputs=[HOSTILE], outputs=[f"{HOSTILE}y"], bodies={f"{HOSTILE}2": 3}
    )


def hostile_report() -> Report:
    """A report whose every text is HTML, script and control characters."""
    table = {"title": HOSTILE, "columns": [HOSTILE, "error at 50%", "error at 75%"], "rows": [[HOSTILE, 0.1, 0.2]] * 3}
    entry = PassEntry(
        HOSTILE,
        {HOSTILE: HOSTILE},
        changed=[{"where": HOSTILE, "what": HOSTILE}],
        left=[{"where": HOSTILE, "why": HOSTILE}],
        notes=[HOSTILE],
        tables=[table],
    )
    tried = Attempt([entry], "kept", HOSTILE, 1.0, 1.5, 2.0, 0.001, (0.0, 0.1), 0.1, (0.05, 0.2), "measured")
    report = sample_report(
        verdict=HOSTILE,
        target=HOSTILE,
        warnings=[HOSTILE],
        notes=[HOSTILE],
        stages=[StageEntry(HOSTILE, "kept", HOSTILE, 1.0, [tried, tried])],
        metric={"name": HOSTILE, "higher_is_better": True},
        options={HOSTILE: HOSTILE, "command": [HOSTILE]},
        layers=[
            layer(HOSTILE, op=HOSTILE, reason=HOSTILE, kernel_after=HOSTILE, cause=HOSTILE, detail=hostile_detail())
        ],
        graph={"before": hostile_graph(), "after": hostile_graph()},
    )
    report.model["path"] = HOSTILE
    report.environment["versions"][HOSTILE] = HOSTILE
    return read_back(report)


def test_no_text_of_a_report_becomes_an_element_or_a_script():
    calm, hostile = page_of(), Page(page_html(hostile_report()))

    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in calm.elements} | {"h3"}
    assert len(hostile.contents["script"]) == 3
    assert hostile.contents["script"][1:] == calm.contents["script"][1:]
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]
    assert HOSTILE[:20] in hostile.contents["h1"][0]


def test_a_name_cannot_end_the_embedded_json_and_is_read_back_from_it():
    text = page_html(hostile_report())
    embedded = Page(text).embedded

    assert not set("<>&") & set(text.partition('id="data">')[2].partition("</script>")[0])
    assert embedded["layers"]["texts"][0].startswith("</script><script>alert(1)</script>")


def test_control_and_direction_characters_are_shown_escaped():
    text = page_html(hostile_report())
    assert not {"\x1b", "\u202e"} & set(text)
    assert "\\x1b[31m\\n" in Page(text).contents["h1"][0]


def test_nothing_is_loaded():
    page = page_of(layers=[layer("a")])
    attributes = [(tag, name) for tag, found in page.elements for name, _ in found.items()]
    links = [found["href"] for tag, found in page.elements if "href" in found]

    assert not [name for _, name in attributes if name in {"src", "srcset", "action", "data", "poster", "style"}]
    assert links == ["#main"]
    assert not re.search(
        r"url\(|@import|sourceMappingURL", page.contents["style"][0] + "".join(page.contents["script"])
    )
    assert "http" not in page.contents["style"][0] + page.contents["script"][2]


def test_the_policy_names_its_own_style_and_scripts_and_allows_nothing_else():
    page = page_of()
    [policy] = [
        found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"
    ]

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    _, *scripts = page.contents["script"]
    assert policy is not None
    assert policy.split("; ")[:3] == [
        "default-src 'none'",
        f"style-src {digest(page.contents['style'][0])}",
        f"script-src {' '.join(map(digest, scripts))}",
    ]


def test_a_page_of_2000_layers_is_smaller_than_1_5_megabytes():
    assert len(page_html(large_report(2000)).encode()) < MOST_BYTES


def test_every_row_of_a_large_model_is_in_the_page():
    rows = Page(page_html(large_report(2000))).embedded["layers"]["rows"]
    assert len(rows) == 2000


def test_the_library_is_the_one_whose_hash_is_told_and_its_licence_is_in_the_page():
    vendor = resources.files("onnxcomp.report.page") / "vendor"
    library = vendor.joinpath("chart.umd.min.js").read_bytes()
    [command] = [line for line in shell_commands("onnxcomp/report/page/vendor/README.md") if "sha256sum" in line.line]

    assert hashlib.sha256(library).hexdigest() == command.words[1].split()[0]
    assert "The MIT License" in "".join(page_of().contents["pre"])


def test_ids_are_unique_and_every_label_leads_to_one():
    page = page_of(layers=[layer("a")])
    ids = [found["id"] for _, found in page.elements if "id" in found]
    wanted = {found["aria-labelledby"] for _, found in page.elements if "aria-labelledby" in found}
    assert len(set(ids)) == len(ids)
    assert wanted <= set(ids)


# --- the answer -------------------------------------------------------------------------------------------------------


def test_the_four_figures_are_told_before_and_after():
    shown = [(card.title, card.before, card.after, card.change) for card in cards(sample_report())]
    assert shown == [
        ("Size", "755 kB", "210 kB", "3.60x"),
        ("Latency", "1.23 ms ±4%", "0.685 ms ±4%", "1.80x"),
        ("Accuracy (top1)", "0.9120", "0.9100", "drop +0.0020"),
        ("Work in int8", "0%", "93.8%", ""),
    ]


def test_the_accuracy_has_its_interval_and_the_budget():
    accuracy = cards(sample_report())[2]
    assert accuracy.details == ["95 % interval of the drop -0.0010 to +0.0052", "budget 0.005: met"]
    assert accuracy.tone == "good"


def test_a_drop_over_the_budget_is_told_as_bad():
    accuracy = cards(sample_report(budget={"max_drop": 0.001, "max_error": 0.1}, budget_met=False))[2]
    assert accuracy.details[1] == "budget 0.001: NOT met"
    assert accuracy.tone == "bad"


def test_an_error_on_made_up_inputs_is_not_called_accuracy():
    report = sample_report(quality="relative-error")
    report.after.drop = None
    report.data["generated"] = True
    card = cards(report)[2]
    assert (card.title, card.after, card.tone) == ("Relative error", "4.30%", "")
    assert "says nothing of accuracy" in card.details[0]


@pytest.mark.parametrize(
    ("quality", "drop", "told"),
    [
        ("expected-drop", 0.002, "budget 0.005: kept by the drop, but another limit is NOT met (relative error 4.30%)"),
        ("relative-error", None, "budget 10.00%: NOT met; a whole output may be off by half of it"),
    ],
)
def test_the_page_calls_a_budget_met_only_where_the_verdict_does(quality, drop, told):
    report = sample_report(quality=quality, budget_met=False)
    report.after.drop = drop
    card = cards(report)[2]
    assert (card.tone, told in card.details) == ("bad", True)
    assert next(row for row in figure_rows(report) if row.label == "relative error").good is False


@pytest.mark.parametrize(
    ("quality", "title"), [("metric", "Drop"), ("expected-drop", "Drop"), ("relative-error", "Relative error")]
)
def test_an_infinite_loss_which_json_has_no_number_for_is_told_as_one(quality, title):
    tried = [attempt("forced", 1.1, 1.0, math.inf, error=math.inf), attempt("dropped", None, None, None)]
    report = sample_report(quality=quality, budget_met=False, stages=[StageEntry("float16", "forced", "", 1.0, tried)])
    report.after.drop, report.after.error, report.after.metric = math.inf, math.inf, None
    report = from_json(to_json(report))

    card = cards(report)[2]
    assert (card.title, card.after, card.tone) == (title, "infinite", "bad")
    told = [each.loss_text(relative=quality == "relative-error") for each in candidates(report)]
    assert told == ["infinite", "-"]


def test_an_error_of_made_up_inputs_is_held_against_the_limit_of_whole_outputs():
    report = sample_report(quality="relative-error")
    report.after.drop, report.after.error_interval = None, (0.04, 0.05)
    report.data["generated"] = True
    assert cards(report)[2].details[-1] == "budget 5.00%: met"


def test_an_estimated_latency_says_so():
    report = sample_report()
    report.after.latency_evidence = "estimated"
    assert "nothing was timed" in cards(report)[1].details[0]


def test_the_command_is_the_one_that_was_given_and_its_data_go_to_verify():
    report = sample_report()
    report.options["command"] = ["in/my model.onnx", "--data", "calib.npz", "-o", "out/small.onnx"]
    assert [step.command for step in next_steps(report)] == [
        "onnxcomp optimize 'in/my model.onnx' --data calib.npz -o out/small.onnx",
        "onnxcomp verify in/model.onnx out/small.onnx --target x86-vnni --data calib.npz",
        "onnxcomp view out/small.onnx",
    ]


def test_verify_reads_the_samples_as_they_were_read():
    report = sample_report()
    given = ["--data", "mod:samples", "--allow-code", "--image-mean=0.5", "--shape", "x=1,3,8,8", "--shape", "y=1,2"]
    report.options["command"] = ["in/model.onnx", *given, "--max-drop", "1%", "-q"]

    command = next_steps(report)[1].command

    assert command.endswith(f"--target x86-vnni {' '.join(given)}")
    verify = main.get_command(click.Context(main), "verify")
    assert verify is not None
    assert {name for option in verify.params for name in option.opts} >= {*SHARED, "--allow-code"}


def test_a_report_without_the_command_gives_one_made_of_its_options():
    again, verify, _ = next_steps(sample_report())
    assert again.command == (
        "onnxcomp optimize in/model.onnx --data DATA --metric top1 --max-drop 0.005 --max-error 0.1 --target x86-vnni "
        "--threads 1 --seed 0 -o out/small.onnx"
    )
    assert again.note == verify.note == "put the path of your samples for DATA"


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1.0, 0.0)], [(1.0, 0.0)]),
        ([(1.0, 0.0), (2.0, 0.0)], [(2.0, 0.0)]),
        ([(2.0, 0.1), (1.0, 0.2)], [(2.0, 0.1)]),
        ([(2.0, 0.1), (2.0, 0.3), (1.0, 0.0), (1.5, 0.1)], [(1.0, 0.0), (2.0, 0.1)]),
    ],
)
def test_the_front_is_what_no_other_point_beats_in_both(points, expected):
    assert front(points) == expected


def test_each_attempt_is_a_candidate_with_its_stage_and_what_tells_it_from_the_first():
    tried = candidates(sample_report())
    assert [(one.label, one.kept) for one in tried] == [
        ("simplify", True),
        ("quantize (form 1)", False),
        ("quantize (form 2: float_nodes=/head/Gemm)", True),
    ]


def test_a_form_that_held_in_a_stage_that_was_dropped_later_is_not_marked_as_kept():
    stage = StageEntry("quantize", "dropped", "did not hold", 4.0, [attempt("kept", 1.5, 2.0, 0.001)])
    assert not candidates(sample_report(stages=[stage]))[0].kept


def test_the_charts_hold_what_was_measured_with_the_budget():
    report = sample_report()
    speed, size = chart_data(report, candidates(report))
    assert [point[:2] for point in speed["points"]] == [[1.9, 0.021], [1.8, 0.002]]
    assert [point[:2] for point in size["points"]] == [[3.7, 0.021], [3.6, 0.002]]
    assert speed["budget"] == size["budget"] == 0.005
    assert speed["front"] == [(1.0, 0.0), (1.8, 0.002), (1.9, 0.021)]
    assert speed["result"] == [1.8, 0.002]


def test_there_is_no_chart_where_nothing_was_measured():
    report = sample_report(stages=[StageEntry("float16", "unchanged", "nothing to do", 0.0, [])])
    assert chart_data(report, candidates(report)) == []


@pytest.mark.parametrize(("interval", "budget"), [((0.009, 0.011), 0.05), (None, None)])
def test_errors_of_made_up_inputs_have_the_limit_of_whole_outputs_but_in_old_reports(interval, budget):
    tried = attempt("kept", 1.1, 1.0, None, error=0.01, error_interval=interval)
    report = sample_report(quality="relative-error", stages=[StageEntry("simplify", "kept", "why", 1.0, [tried])])
    report.data["generated"] = True
    assert [chart["budget"] for chart in chart_data(report, candidates(report))] == [budget, budget]


# --- layers -----------------------------------------------------------------------------------------------------------


def cells(report: Report) -> list[dict[str, Any]]:
    """The rows of the table by the keys of its columns, texts looked up."""
    data = layer_data(report)
    return [
        {
            column["key"]: data["texts"][value] if column["kind"] == "text" else value
            for column, value in zip(data["columns"], row, strict=True)
        }
        for row in data["rows"]
    ]


def test_a_layer_has_its_figures_and_what_each_pass_did_to_it_by_any_of_its_names():
    entries = [
        PassEntry("prune", {}, changed=[{"where": "conv1.weight", "what": "a quarter is zero"}]),
        PassEntry("quantize", {}, changed=[{"where": "conv1", "what": "runs in int8"}]),
        PassEntry("cluster", {}, left=[{"where": "conv1.weight_quantized", "why": "costs too much"}]),
    ]
    stage = StageEntry("all", "kept", "why", 1.0, [Attempt(entries, "kept", "why", 1.0)])

    [row] = cells(sample_report(stages=[stage], layers=[layer("conv1")]))

    assert row == {
        "layer": "conv1",
        "op": "Conv",
        "weight": "24×1×3×3 float32 → int8",
        "output": "1×24×14×14",
        "macs": 42_336,
        "before": 864,
        "after": 216,
        "zeros": 0.25,
        "kernel": "Conv → QLinearConv",
        "error": 0.0275,
        "sqnr": 31.2,
        "time_before": 0.0412,
        "time_after": 0.0156,
        "cause": "rounding: its weight takes 8 bits",
        "bits": 8.0,
        "done": "prune: a quarter is zero\nquantize: runs in int8",
        "left": "cluster: costs too much",
    }


def test_what_a_dropped_stage_did_is_not_told_of_the_result():
    entry = PassEntry("quantize", {}, changed=[{"where": "conv1", "what": "runs in int8"}])
    stage = StageEntry("quantize", "dropped", "over the budget", 1.0, [Attempt([entry], "dropped", "why", 1.0)])
    [row] = cells(sample_report(stages=[stage], layers=[layer("conv1")]))
    assert "done" not in row


def test_a_report_without_layers_lists_the_places_that_passes_named():
    rows = cells(sample_report())
    assert rows[0] == {"layer": "bn1", "done": "simplify: folded into conv1", "left": ""}
    assert {"layer": "/head/Gemm", "done": "", "left": "quantize: costs more accuracy than it gains"} in rows


def test_the_worst_layers_come_first_where_errors_are_known():
    assert layer_data(large_report(3))["sort"] == "error"
    assert layer_data(sample_report())["sort"] == ""


def panel_of(**changes: Any) -> dict[str, Any]:
    """The panel of a layer whose detail has these changes."""
    report = read_back(sample_report(layers=[layer("conv1", detail=detail(**changes))]))
    found = dict(details(report.layers))
    return found.get(0, {})


def test_a_panel_has_a_chart_for_each_thing_that_is_known():
    panel = panel_of()
    assert panel.keys() == {"histogram", "ranges", "singular", "factors", "cause"}
    assert [each["place"] for each in panel["ranges"]] == ["input", "output"]
    assert panel["factors"] == "9\N{MULTIPLICATION SIGN}8, 8\N{MULTIPLICATION SIGN}24"
    assert (panel["singular"]["kept"], len(panel["singular"]["values"])) == (8, 24)
    assert not panel["histogram"]["drawn"]


def test_a_panel_leaves_out_what_is_not_known():
    assert panel_of(singular_values=None, factors=None, activations=[]).keys() == {"histogram", "cause"}
    assert panel_of(weights=None, singular_values=None, factors=None, activations=[]) == {}


def test_counts_of_which_the_bins_differ_or_that_have_no_edges_are_not_drawn():
    weights = detail()["weights"]
    assert "histogram" not in panel_of(weights={**weights, "before": [1, 2]})
    assert "histogram" not in panel_of(weights={**weights, "low": None})
    assert panel_of(weights={**weights, "before": []})["histogram"]["before"] is None
    assert "histogram" not in panel_of(weights={**weights, "before": [], "after": None})


def test_a_weight_of_which_not_all_was_looked_at_says_so():
    assert panel_of(weights={**detail()["weights"], "before_values": 215})["histogram"]["drawn"]


def test_a_report_of_an_earlier_form_has_the_rows_and_no_panels():
    rows = [layer("conv1")]
    for name in ("bits_before", "bits_after", "rank", "cause", "time_ms_before", "time_ms_after", "detail"):
        del rows[0][name]
    facts = json.loads(to_json(sample_report(layers=rows)))
    report = from_json(json.dumps({**facts, "schema_version": "1.1"}))

    assert details(report.layers) == []
    assert cells(report)[0]["error"] == 0.0275
    assert "press the name" not in page_html(report)


def test_the_rank_of_a_layer_is_a_number_that_sorts():
    assert [row["rank"] for row in cells(sample_report(layers=[layer("a", rank=[16, 24]), layer("b")]))][:2] == [
        16,
        None,
    ]


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_attempts_of_a_stage_follow_each_other_and_stages_do():
    bars = time_line(sample_report())
    assert [(bar["stage"], bar["start"], bar["end"]) for bar in bars] == [
        ("simplify", 0.0, 0.2),
        ("quantize", 0.2, 4.3),
        ("quantize", 4.3, 7.7),
    ]


def stage_with_table(columns: list[str], rows: list[list[Any]]) -> Report:
    entry = PassEntry("prune", {}, tables=[{"title": "measured", "columns": columns, "rows": rows}])
    return sample_report(stages=[StageEntry("prune", "kept", "why", 1.0, [Attempt([entry], "kept", "why", 1.0)])])


def test_columns_at_shares_become_a_line_for_each_row_the_steepest_first():
    report = stage_with_table(["weight", "error at 50%", "error at 90%"], [["a", 0.1, 0.2], ["b", 0.1, 0.9]])
    [chart] = curves(report)
    assert [(line["name"], line["points"]) for line in chart["lines"]] == [
        ("b", [[50.0, 0.1], [90.0, 0.9]]),
        ("a", [[50.0, 0.1], [90.0, 0.2]]),
    ]


def test_a_first_column_of_rising_numbers_becomes_the_axis_of_a_line_for_each_further_column():
    [chart] = curves(stage_with_table(["step", "loss"], [[1, 0.5], [2, 0.3], [3, None], [4, 0.2]]))
    assert chart["lines"] == [{"name": "loss", "points": [[1, 0.5], [2, 0.3], [4, 0.2]]}]


def test_a_table_of_names_and_counts_is_no_curve_but_a_table():
    report = stage_with_table(["weight", "non-zeros"], [["a", 1000], ["b", 2]])
    assert curves(report) == []
    assert [table.rows for table in measured(report)] == [[["a", "1,000"], ["b", "2"]]]


def test_a_row_that_is_shorter_than_its_columns_breaks_nothing():
    report = read_back(stage_with_table(["weight", "error at 50%", "error at 90%"], [["a"], [], ["b", 0.1, 0.2]]))
    assert "measured" in page_html(report)


def test_a_run_in_which_nothing_was_tried_has_a_page():
    page = page_of(stages=[], output=None, speed=None, metric=None)
    assert "Nothing was tried." in page.contents["p"]
