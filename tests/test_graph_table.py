"""What the report lists of a model's graph."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import helper, parser

from onnxcomp import optimize
from onnxcomp.errors import OptionError
from onnxcomp.graph_table import graph_table
from onnxcomp.model import Model, ModelSource
from onnxcomp.report import from_json, schema, to_json
from onnxcomp_passes import Simplify
from tests.models import graph_model, if_model, random_weights
from tests.reports import sample_report


def listed(source: ModelSource) -> dict[str, Any]:
    """The graph of a model, which must be as the schema says."""
    table = graph_table(Model.load(source))
    whole = schema()
    jsonschema.validate(table, {"$ref": "#/$defs/graph", "$defs": whole["$defs"]})
    return table


def named(table: dict[str, Any], places: list[int | None]) -> list[str | None]:
    return [None if place is None else table["tensors"][place] for place in places]


def types_of(table: dict[str, Any]) -> dict[str, str]:
    """Tensor -> type in words."""
    return {
        name: table["types"][kind] for name, kind in zip(table["tensors"], table["tensor_types"], strict=True)
    }  # fmt: skip


def conv_model() -> onnx.ModelProto:
    return graph_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { c = Conv<pads = [1,1,1,1]>(x, W) y = Clip(c, , top) }",
        W=random_weights(4, 3, 3, 3),
        top=np.array(6, np.float32),
    )


def test_a_node_names_its_tensors_by_their_places_and_what_is_left_out_is_none():
    table = listed(conv_model())
    conv, clip = table["nodes"]

    assert (conv["op"], named(table, conv["inputs"]), named(table, conv["outputs"])) == ("Conv", ["x", "W"], ["c"])
    assert named(table, clip["inputs"]) == ["c", None, "top"]
    assert named(table, table["inputs"]) == ["x"]
    assert named(table, table["outputs"]) == ["y"]


def test_weights_are_told_apart_with_their_types_and_shapes():
    table = listed(conv_model())
    assert named(table, table["constants"]) == ["W", "top"]
    assert types_of(table) == {
        "x": "float32 (N, 3, 8, 8)",
        "W": "float32 (4, 3, 3, 3)",
        "c": "float32 (N, 4, 8, 8)",
        "top": "float32 ()",
        "y": "float32 (N, 4, 8, 8)",
    }


def test_operators_of_other_domains_have_their_domain():
    text = (
        '<ir_version: 8, opset_import: ["": 17, "a.b": 1]> g (float[2] x) => (float[2] y) { z = a.b.F(x) y = Relu(z) }'
    )
    table = listed(parser.parse_model(text))
    assert table["operators"] == {"a.b.F": 1, "Relu": 1}
    assert [node["op"] for node in table["nodes"]] == ["a.b.F", "Relu"]
    assert types_of(table)["z"] == ""


def test_nodes_in_bodies_are_counted_apart_and_what_they_read_outside_is_read_by_their_node():
    table = listed(if_model())
    [node] = table["nodes"]
    assert table["operators"] == {"If": 1}
    assert table["body_operators"]["Add"] == 2
    assert named(table, node["captured"]) == ["W", "x"]
    assert named(table, table["constants"]) == ["W"]


def test_nodes_of_functions_are_counted_apart():
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]> g (float[2] x) => (float[2] y) { y = own.F(x) }
    <domain: "own", opset_import: ["": 17]> F (a) => (c) { b = Relu(a) c = Relu(b) }"""
    table = listed(parser.parse_model(text))
    assert (table["operators"], table["function_operators"]) == ({"own.F": 1}, {"Relu": 2})


def test_a_model_whose_shapes_contradict_each_other_is_listed_as_it_declares_itself():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float[3] z) => (float[2] y) { y = Add(x, z) }'
    assert types_of(listed(parser.parse_model(text)))["z"] == "float32 (3,)"


def test_types_that_numpy_does_not_have_are_named():
    text = '<ir_version: 10, opset_import: ["": 21]> g (int4[2] x) => (bfloat16[2] y) { y = Cast<to = 16>(x) }'
    assert types_of(listed(parser.parse_model(text))) == {"x": "int4 (2,)", "y": "bfloat16 (2,)"}


# --- in the JSON ------------------------------------------------------------------------------------------------------


def test_a_node_takes_one_line_of_the_json():
    lines = to_json(sample_report()).splitlines()
    [line] = [line for line in lines if '"name": "bn1"' in line]
    assert json.loads(line.removesuffix(",")) == sample_report().graph["before"]["nodes"][1]  # type: ignore[index]


def test_the_graphs_are_read_back_as_they_were():
    report = sample_report(verdict='\n  "graph": null')
    again = from_json(to_json(report))
    assert again.graph == report.graph
    assert again.verdict == report.verdict


def test_a_report_of_an_earlier_version_has_no_graphs():
    document = json.loads(to_json(sample_report(graph=None)))
    del document["graph"]
    assert from_json(json.dumps({**document, "schema_version": "1.1"})).graph is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"constants": [0, 99]}, "graph.after.constants: expected numbers below 9, got 99"),
        ({"tensor_types": [0]}, "graph.after.tensor_types: expected 9 items, got 1"),
        ({"types": []}, "graph.after.tensor_types: expected numbers below 0, got 5"),
        ({"inputs": [-1]}, "graph.after.inputs[0]: -1 is out of range"),
        ({"tensors": ["x", 1]}, "graph.after.tensors[1]: expected string, got 1"),
        (
            {"nodes": [{"name": "a", "op": "b", "inputs": [None], "outputs": [11]}]},
            "graph.after.nodes[0].outputs: expected numbers below 9, got 11",
        ),
        (
            {"nodes": [{"name": "a", "op": "b", "inputs": [True], "outputs": []}]},
            "graph.after.nodes[0].inputs[0]: expected integer or null, got True",
        ),
    ],
)
def test_a_graph_that_names_what_is_not_there_is_refused(change, told):
    document = json.loads(to_json(sample_report()))
    document["graph"]["after"].update(change)
    with pytest.raises(OptionError) as caught:
        from_json(json.dumps(document), "r.json")
    assert str(caught.value) == f"r.json: is not a report as --json writes it: {told}"


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_that_lists_layers_lists_both_graphs():
    report = optimize(conv_model(), passes=[Simplify()], timing=False, layers=True).report
    assert report.graph is not None
    assert report.graph["before"] == graph_table(Model.load(conv_model()))
    assert "Conv" in report.graph["after"]["operators"]


def test_a_run_that_lists_no_layers_lists_no_graphs():
    assert optimize(conv_model(), passes=[Simplify()], timing=False).report.graph is None


def chain(nodes: int) -> Model:
    relus = [helper.make_node("Relu", [f"t{index}"], [f"t{index + 1}"], f"n{index}") for index in range(nodes)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("t0", f"t{nodes}")]
    return Model.load(helper.make_model(helper.make_graph(relus, "g", ends[:1], ends[1:])))


def test_20_times_as_many_nodes_take_about_20_times_as_long():
    def seconds(model: Model) -> float:
        start = time.process_time()
        graph_table(model)
        return time.process_time() - start

    few, many = chain(500), chain(10_000)
    assert min(seconds(many) for _ in range(2)) < 150 * min(seconds(few) for _ in range(3))  # a walk a node: 400
