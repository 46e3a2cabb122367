"""The page's graphs: the operators before and after, and the nodes as the page holds them."""

from __future__ import annotations

from typing import Any

import onnx
import pytest

from onnxcomp.report.page import graph as page_graph
from onnxcomp.report.page import page_html
from onnxcomp.report.page.graph import graph_data, graph_summary, left_out, operator_chart, operators
from onnxcomp.report.page.kinds import KINDS
from tests.graphs import graph_of, large_graphs, sample_graphs
from tests.reports import sample_report

CONTRIBUTED = {
    *("BiasGelu", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "GroupQueryAttention", "MatMulIntegerToFloat"),
    *("MatMulNBits", "MultiHeadAttention", "QAttention", "QGemm", "QLinearAdd", "QLinearLeakyRelu", "QLinearMul"),
    *("QLinearSigmoid", "QLinearSoftmax", "QuickGelu", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    "SkipSimplifiedLayerNormalization",
}
"""Operators of ONNX Runtime's own."""

Node = tuple[str, str, list[str | None], list[str | None], list[str | None]]


def unpacked(data: dict[str, Any], side: str) -> list[Node]:
    """The nodes of a side: name, operator, and the names of the inputs, outputs and captured tensors."""
    names: list[str] = []
    for shared, rest in zip(data["names"][::2], data["names"][1::2], strict=True):
        names.append((names[-1] if names else "")[:shared] + data["rests"][rest])
    packed = data[side]
    tensors, number = [], 0
    for step in packed["tensors"]:
        number += step
        tensors.append(names[number])
    flat = iter(packed["nodes"])
    nodes: list[Node] = []
    name = met = 0
    for step in flat:
        name += step
        op, *counts = packed["forms"][next(flat)]
        parts: list[list[str | None]] = []
        for count in counts:
            part: list[str | None] = []
            for _ in range(count):
                back = next(flat)
                part.append(None if back < 0 else tensors[met - back])
                met += back == 0
            parts.append(part)
        nodes.append((names[name], data["ops"][op][0], *parts))
    assert met == len(tensors) == len(packed["about"])
    return nodes


def listed(table: dict[str, Any]) -> list[Node]:
    """The nodes of a report's graph in the same form."""

    def named(places: list[int | None]) -> list[str | None]:
        return [None if place is None else table["tensors"][place] for place in places]

    return [
        (node["name"], node["op"], named(node["inputs"]), named(node["outputs"]), named(node.get("captured", [])))
        for node in table["nodes"]
    ]


def data_of(graphs: dict[str, Any]) -> dict[str, Any]:
    data = graph_data(sample_report(graph=graphs))
    assert data is not None
    return data


# --- operators --------------------------------------------------------------------------------------------------------


def test_every_operator_with_a_kind_is_one_of_onnx_or_of_onnx_runtime():
    known = {each.name for each in onnx.defs.get_all_schemas()}
    named = {op for ops in KINDS.values() for op in ops}
    assert named - known == CONTRIBUTED


def test_no_operator_is_of_two_kinds():
    assert sum(map(len, KINDS.values())) == len({op for ops in KINDS.values() for op in ops})


def test_operators_are_told_before_and_after_by_kind():
    found = [(each.name, each.kind, each.before, each.after, each.change) for each in operators(sample_report())]
    assert found == [
        ("Conv", "compute", 1, 1, ""),
        ("DequantizeLinear", "quantization", 0, 2, "new"),
        ("QuantizeLinear", "quantization", 0, 1, "new"),
        ("Relu", "elementwise", 1, 1, ""),
        ("BatchNormalization", "normalization", 1, 0, "gone"),
    ]


def test_the_summary_names_what_is_new_what_is_gone_and_what_changed_in_number():
    graphs = sample_graphs()
    graphs["after"]["operators"]["Conv"] = 3
    assert graph_summary(operators(sample_report(graph=graphs))) == (
        "3 nodes before, 7 after. New: DequantizeLinear (2), QuantizeLinear (1). Gone: BatchNormalization (1). "
        "Changed: Conv (+2)."
    )


def test_equal_graphs_are_told_to_be_equal():
    before = sample_graphs()["before"]
    found = operators(sample_report(graph={"before": before, "after": before}))
    assert graph_summary(found) == "3 nodes before, 3 after. As many of each operator."


def test_nodes_in_bodies_count_and_are_told_apart():
    graphs = sample_graphs()
    graphs["before"]["body_operators"] = {"Relu": 1200}
    graphs["before"]["function_operators"] = {"Relu": 2}
    report = sample_report(graph=graphs)
    [relu] = [each for each in operators(report) if each.name == "Relu"]

    assert (relu.before, relu.inside, relu.change) == (1203, ("1,200 in bodies, 2 in functions", ""), "-1202")
    assert left_out(report) == ["Nodes inside of bodies and functions are counted, and not listed here."]
    assert "1,200 in bodies" in page_html(report)


def test_the_chart_shows_what_changed_before_what_there_is_more_of(monkeypatch):
    monkeypatch.setattr(page_graph, "MOST_BARS", 2)
    graphs = sample_graphs()
    graphs["before"]["operators"]["Conv"] = graphs["after"]["operators"]["Conv"] = 50
    [chart] = operator_chart(operators(sample_report(graph=graphs)))
    assert [bar[0] for bar in chart["bars"]] == ["DequantizeLinear", "QuantizeLinear"]
    assert chart["hidden"] == 3


def test_a_report_without_graphs_has_a_page_that_says_so():
    text = page_html(sample_report(graph=None))
    assert "The report has no graphs" in text
    assert 'id="node-search"' not in text


# --- nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [sample_graphs(), large_graphs(20)])
@pytest.mark.parametrize("side", ["before", "after"])
def test_the_page_holds_every_node_as_the_report_lists_it(graphs, side):
    assert unpacked(data_of(graphs), side) == listed(graphs[side])


def test_names_beyond_the_basic_plane_and_what_a_body_reads_are_held_too():
    table = graph_of([("\U0001f600a", "If", ["x"], ["\U0001f600"]), ("\U0001f601", "Relu", ["\U0001f600"], ["y"])], {})
    table["nodes"][0]["captured"] = [0]
    assert unpacked(data_of({"before": table, "after": table}), "after") == listed(table)


def test_types_and_constants_are_held_for_each_tensor():
    data = data_of(sample_graphs())
    told = [(data["types"][about >> 1], bool(about & 1)) for about in data["before"]["about"]]
    assert told[:3] == [
        ("float32 (N, 3, 32, 32)", False),
        ("float32 (8, 3, 3, 3)", True),
        ("float32 (N, 8, 30, 30)", False),
    ]
    assert data["before"]["inputs"] == [0]


def test_of_a_large_graph_what_changed_and_its_neighbours_are_held(monkeypatch):
    monkeypatch.setattr(page_graph, "MOST_NODES", 5)
    chain = [(f"n{index}", "Relu", [f"t{index}"], [f"t{index + 1}"]) for index in range(9)]
    before = graph_of(chain, {}, inputs=["t0"], outputs=["t9"])
    after = graph_of([*chain[:4], ("n4", "Elu", ["t4"], ["t5"]), *chain[5:]], {}, inputs=["t0"], outputs=["t9"])
    graphs = {"before": before, "after": after}
    data = data_of(graphs)

    assert [node[:2] for node in unpacked(data, "after")] == [("n3", "Relu"), ("n4", "Elu"), ("n5", "Relu")]
    assert [node[0] for node in unpacked(data, "before")] == ["n3", "n4", "n5"]
    assert data["after"]["all"] == 9
    assert left_out(sample_report(graph=graphs))[0].startswith(
        "Of a graph of more than 5 nodes the page has those that"
    )


def test_nodes_that_have_only_a_weight_in_common_are_no_neighbours(monkeypatch):
    monkeypatch.setattr(page_graph, "MOST_NODES", 2)
    chain = [(f"n{index}", "Add", [f"t{index}", "w"], [f"t{index + 1}"]) for index in range(6)]
    before = graph_of(chain, {"w": "float32 (2,)"}, inputs=["t0"], outputs=["t6"])
    after = graph_of(
        [("n0", "Mul", ["t0", "w"], ["t1"]), *chain[1:]], {"w": "float32 (2,)"}, inputs=["t0"], outputs=["t6"]
    )
    assert [node[0] for node in unpacked(data_of({"before": before, "after": after}), "after")] == ["n0", "n1"]


def test_no_more_nodes_are_held_than_the_page_may_have(monkeypatch):
    monkeypatch.setattr(page_graph, "MOST_NODES", 7)
    data = data_of(large_graphs(10))
    assert (len(unpacked(data, "before")), len(unpacked(data, "after"))) == (7, 7)
