from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcomp.errors import ModelError, OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, find_pass
from onnxcomp_passes.simplify import Simplify
from tests.models import (
    assert_same_outputs,
    external_model,
    graph_model,
    if_model,
    loop_model,
    mlp_model,
    ops,
    random_inputs,
    random_weights,
)


def simplified(proto: onnx.ModelProto, **context: Any) -> tuple[Model, Changes]:
    """Simplify, and check what must hold for every model."""
    model = Model.load(proto)
    before = model.size_bytes
    changes = Simplify().rewrite(model, Context(**context))
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    assert model.size_bytes <= before
    assert list(result.graph.output) == list(proto.graph.output)
    assert [i for i in result.graph.input if i in list(proto.graph.input)] == list(result.graph.input)
    assert Simplify().rewrite(model, Context(**context)).count == 0
    return model, changes


# --- the pass ---------------------------------------------------------------------------------------------------------


def test_is_found_by_its_name():
    assert find_pass("simplify") is Simplify


def test_leaves_a_model_without_anything_to_simplify_as_it_is():
    proto = mlp_model()

    model, changes = simplified(proto)

    assert changes.count == 0
    assert model.to_proto() == proto


def test_refuses_a_negative_opset():
    with pytest.raises(OptionError, match="simplify: opset must be at least 0, got -1"):
        Simplify(opset=-1)


def test_raises_the_opset_when_asked():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset=11, ir_version=6)
    model = Model.load(proto)

    changes = Simplify(opset=17).rewrite(model, Context())

    assert model.opset == 17
    assert [change.what for change in changes.changed] == ["opset raised from 11 to 17"]
    assert Simplify(opset=17).rewrite(model, Context()).count == 0


def test_says_why_an_opset_cannot_be_raised():
    model = Model.load(graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }"))

    with pytest.raises(ModelError, match="opset 17 cannot be raised to 9999"):
        Simplify(opset=9999).rewrite(model, Context())


def test_leaves_the_model_alone_when_it_would_become_bigger(monkeypatch):
    proto = graph_model("g (float[N] x) => (float[N] y) { i = Identity(x) y = Relu(i) }")
    monkeypatch.setattr("onnxcomp_passes.simplify.drop_traces", lambda model: model.metadata.update(blown="up" * 999))
    model = Model.load(proto)

    changes = Simplify().rewrite(model, Context())

    assert (changes.count, changes.notes) == (0, ["left as it was: simplified it would be bigger"])
    assert model.to_proto() == proto


def test_keeps_the_metadata_of_model_graph_and_interface():
    proto = graph_model("g (float[N] x) => (float[N] y) { i = Identity(x) y = Relu(i) }")
    proto.producer_name, proto.doc_string, proto.graph.doc_string = "maker", "what it is", "of the graph"
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.graph.input[0].doc_string = "pixels"
    proto.graph.output[0].type.denotation = "SCORES"

    model, _ = simplified(proto)

    result = model.to_proto()
    assert (result.producer_name, result.doc_string, result.graph.doc_string) == ("maker", "what it is", "of the graph")
    assert result.metadata_props == proto.metadata_props
    assert (result.graph.input, result.graph.output) == (proto.graph.input, proto.graph.output)


def test_leaves_excluded_nodes_alone():
    proto = graph_model("g (float[N] x) => (float[N] y) { i = Identity(x) j = Identity(i) y = Relu(j) }")
    proto.graph.node[0].name, proto.graph.node[1].name = "/keep/this", "/drop/this"

    model, _ = simplified(proto, exclude=("/keep/*",))

    assert [node.name for node in model.graph.nodes] == ["/keep/this", ""]


def test_leaves_operators_of_other_domains_alone():
    text = "g (float[N] x) => (float[N] y) { a = Identity(x) y = Add(a, x) }"
    proto = graph_model(text)
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    model = Model.load(proto)

    changes = Simplify().rewrite(model, Context())

    assert changes.count == 0
    assert model.to_proto() == proto


def test_leaves_operators_that_the_model_redefines_alone():
    proto = graph_model("g (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }")
    body = [helper.make_node("Neg", ["p"], ["q"])]
    proto.functions.append(helper.make_function("", "Identity", ["p"], ["q"], body, [helper.make_opsetid("", 17)]))
    model = Model.load(proto)

    Simplify().rewrite(model, Context())

    assert [node.op for node in model.graph.nodes] == ["Identity", "Relu"]


# --- traces and definitions -------------------------------------------------------------------------------------------


def traced_model() -> onnx.ModelProto:
    proto = mlp_model()
    for node in proto.graph.node:
        node.doc_string = "File train.py, line 3"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File train.py, line 3" * 20)
    proto = onnx.shape_inference.infer_shapes(proto)
    assert len(proto.graph.value_info) == 2
    return proto


def test_drops_traces_and_shapes_that_inference_finds_again():
    proto = traced_model()

    model, changes = simplified(proto)

    assert model.to_proto() == mlp_model()
    dropped = proto.ByteSize() - mlp_model().ByteSize()
    assert [change.what for change in changes.changed] == [
        f"exporter's traces and inferable shapes dropped: {dropped:,} bytes"
    ]


def test_keeps_traces_when_debugging_information_is_kept():
    proto = traced_model()

    model, changes = simplified(proto, keep_debug=True)

    assert changes.count == 0
    assert model.to_proto() == proto


def test_keeps_declared_shapes_that_inference_does_not_find():
    proto = graph_model("g (float[N, 4] x) => (float[M] y) { h = Custom(x) y = Flat(h) }")
    for node in proto.graph.node:
        node.domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    proto.graph.value_info.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, [3, 4]))
    model = Model.load(proto)

    Simplify().rewrite(model, Context())

    assert model.to_proto().graph.value_info == proto.graph.value_info


def test_drops_functions_and_operator_sets_that_nothing_uses():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Outer(x) }")
    proto.graph.node[0].domain = "local"
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    for name, op, domain in (("Outer", "Inner", "local"), ("Inner", "Relu", ""), ("Unused", "Neg", "")):
        body = [helper.make_node(op, ["p"], ["q"], domain=domain)]
        proto.functions.append(helper.make_function("local", name, ["p"], ["q"], body, sets))
    proto.opset_import.add(domain="local", version=1)
    proto.opset_import.add(domain="ai.onnx.ml", version=3)

    model, changes = simplified(proto)

    assert [function.name for function in model.functions] == ["Outer", "Inner"]
    assert [entry.domain for entry in model.to_proto().opset_import] == ["", "local"]
    assert [change.what for change in changes.changed] == ["unused functions and operator sets removed: 2"]


# --- control flow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [True, False])
def test_simplifies_the_branches_of_an_if(condition):
    proto = if_model()

    model, _ = simplified(proto)

    branches = model.graph.nodes[-1].attrs
    assert [node.op for node in branches["then_branch"].nodes] == ["Mul", "Add"]
    assert [node.op for node in branches["else_branch"].nodes] == ["Add"]
    feeds = {**random_inputs(proto), "condition": np.array(condition)}
    assert_same_outputs(proto, model, feeds, exact=True)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_does_not_believe_the_declared_shape_of_what_a_loop_carries(turns):
    proto = loop_model()

    model, _ = simplified(proto)

    feeds = {"turns": np.array(turns), "x": np.ones((1, 2), np.float32)}
    assert_same_outputs(proto, model, feeds, exact=True)


def test_keeps_an_outer_tensor_that_a_branch_gives_back_by_name():
    text = """g (bool c, float[2] x) => (float[2] y) {
        outer = Identity(x)
        y = If(c) <
            then_branch = yes () => (float[2] t) { t = Neg(outer) },
            else_branch = no () => (float[2] e) { e = Identity(outer) }
        >
    }"""
    proto = graph_model(text)

    model, _ = simplified(proto)

    for condition in (True, False):
        assert_same_outputs(proto, model, {"c": np.array(condition), "x": np.ones(2, np.float32)}, exact=True)


def test_does_not_let_an_inner_name_hide_an_outer_one():
    # `a` inside the branch is another tensor than `a` outside: `b` inside must not become `a`.
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Neg(x)
        b = Identity(a)
        y = If(c) <
            then_branch = yes () => (float[2] t) { a = Exp(x) t = Add(a, b) },
            else_branch = no () => (float[2] e) { e = Relu(b) }
        >
    }"""
    model = Model.load(graph_model(text))  # (ONNX itself asks for unique names; exporters do not all obey)

    Simplify().rewrite(model, Context())

    branch = model.graph.nodes[-1].attrs["then_branch"]
    assert [tensor.name for tensor in branch.nodes[-1].inputs] == ["a", "b"]


def test_removes_a_dead_if_and_what_only_it_read():
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Neg(x)
        unused = If(c) <
            then_branch = yes () => (float[2] t) { t = Exp(a) },
            else_branch = no () => (float[2] e) { e = Add(x, W) }
        >
        y = Relu(x)
    }"""
    model, _ = simplified(graph_model(text, W=random_weights(2)))

    assert ops(model) == ["Relu"]
    assert not model.to_proto().graph.initializer


# --- large models -----------------------------------------------------------------------------------------------------


def test_reads_no_weight_that_it_does_not_need(tmp_path, monkeypatch):
    model = Model.load(external_model(tmp_path, layers=3))
    monkeypatch.setattr("onnxcomp.weights.FileBlob.buffer", lambda self: pytest.fail("a weight was read"))

    changes = Simplify().rewrite(model, Context())

    assert changes.count == 0
