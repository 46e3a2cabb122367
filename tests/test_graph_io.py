from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.graph_io import Node, sorted_nodes, subgraphs, walk
from onnxcomp.model import Model
from tests.models import graph_model, if_model, loop_model, ops, random_weights

RELU = "g (float[N] x) => (float[N] y) { y = Relu(x) }"


# --- import -----------------------------------------------------------------------------------------------------------


def test_a_subgraph_reads_the_outer_tensor_itself():
    graph = Model.load(if_model()).graph
    branch = next(subgraphs(graph.nodes[0]))

    assert branch.nodes[0].inputs[0] is graph.inputs[1]
    assert graph.inputs[1].outputs == [branch.nodes[0], graph.nodes[0].attrs["else_branch"].nodes[1]]


def test_walks_nested_subgraphs():
    inner = if_model().graph.node[0]
    text = "g (bool condition, float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }"
    proto = graph_model(text, W=random_weights(3))
    branch = helper.make_graph([inner], "outer", [], [onnx.ValueInfoProto(name="y")])
    nested = helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)
    proto.graph.node.insert(0, nested)

    assert len(list(walk(Model.load(proto).graph))) == 1 + 2 * 3


def test_same_named_tensors_of_sibling_branches_stay_apart():
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <
            then_branch = yes () => (float[2] t) { a = Neg(x) t = Relu(a) },
            else_branch = no () => (float[2] t) { a = Exp(x) t = Relu(a) }
        >
    }"""
    proto = graph_model(text)
    model = Model.load(proto)
    one, other = subgraphs(model.graph.nodes[0])

    assert one.nodes[0].outputs[0] is not other.nodes[0].outputs[0]
    assert model.to_proto() == proto


def test_same_named_initializers_of_sibling_branches_keep_their_values():
    text = """g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <
            then_branch = yes () => (float[2] t) { t = Add(x, w) },
            else_branch = no () => (float[2] e) { e = Add(x, w) }
        >
    }"""
    proto = graph_model(text)
    for number, attribute in enumerate(proto.graph.node[0].attribute):
        attribute.g.initializer.append(numpy_helper.from_array(np.full(2, number, np.float32), "w"))

    assert Model.load(proto).to_proto() == proto


def test_nodes_are_compared_by_identity():
    one, other = Node("Relu"), Node("Relu")

    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize(
    "attribute",
    [
        helper.make_attribute("f", 0.1),
        helper.make_attribute("i", -(2**63)),
        helper.make_attribute("s", b"\xff\xfe"),
        helper.make_attribute("s", ""),
        helper.make_attribute("strings", ["a", "b"]),
        helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS),
        helper.make_attribute("floats", [0.1, 1e-40, float("inf")]),
        helper.make_attribute("t", numpy_helper.from_array(np.ones((2, 0, 3), np.float16))),
        helper.make_attribute("tensors", [numpy_helper.from_array(np.ones(n, np.int8)) for n in (1, 300)]),
        helper.make_attribute("type", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2]))),
        helper.make_attribute("graphs", [onnx.parser.parse_graph("g (float x) => (float y) { y = Relu(x) }")]),
    ],
)
def test_keeps_attributes_of_every_kind(attribute):
    proto = graph_model(RELU)
    proto.graph.node[0].domain = "com.example"
    proto.graph.node[0].attribute.append(attribute)
    proto.opset_import.add(domain="com.example", version=1)

    assert Model.load(proto).to_proto() == proto


def test_keeps_types_that_are_not_tensors():
    text = """g (seq(float[N]) s, optional(float[N]) o) => (seq(float[N]) y) {
        t = SequenceAt(s, i)
        y = SequenceInsert(s, t)
    }"""
    proto = graph_model(text, i=np.array(0))

    assert Model.load(proto).to_proto() == proto


def test_keeps_sparse_initializers():
    proto = graph_model("g (float[N, 100] x) => (float[N, 100] y) { y = Add(x, w) }")
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    indices = numpy_helper.from_array(np.array([5, 70]))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [100]))
    model = Model.load(proto)

    assert model.to_proto() == proto
    dense = np.zeros(100)
    dense[[5, 70]] = [1, 2]
    np.testing.assert_array_equal(model.weight("w"), dense)


def test_keeps_a_list_that_is_said_to_hold_numbers_of_another_type():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    proto.graph.node[0].attribute.add(name="odd", type=onnx.AttributeProto.INTS, floats=[1.0])

    assert Model.load(proto).to_proto() == proto


def test_omitted_inputs_and_outputs_stay_omitted():
    text = "g (float[N, 4] x) => (float[N, 4] y) { y = Clip(x, , high) }"
    proto = graph_model(text, high=np.float32(1))

    assert Model.load(proto).to_proto() == proto


def test_keeps_a_subgraph_output_that_is_an_outer_tensor():
    text = """g (bool c, float[2] x) => (float[2] y) {
        outer = Neg(x)
        y = If(c) <
            then_branch = yes () => (float[2] outer) { unused = Relu(outer) },
            else_branch = no () => (float[2] e) { e = Identity(outer) }
        >
    }"""
    proto = graph_model(text)

    assert Model.load(proto).to_proto() == proto


# --- export -----------------------------------------------------------------------------------------------------------


def test_sorts_nodes_that_a_rewrite_left_out_of_order():
    model = Model.load(graph_model("g (float[N] x) => (float[N] y) { a = Neg(x) b = Exp(a) y = Relu(b) }"))

    model.graph.nodes = list(reversed(model.graph.nodes))

    assert ops(model) == ["Neg", "Exp", "Relu"]


def test_sorts_a_node_before_the_subgraph_that_reads_it():
    text = """g (bool c, float[2] x) => (float[2] y) {
        a = Neg(x)
        y = If(c) <
            then_branch = yes () => (float[2] t) { t = Exp(a) },
            else_branch = no () => (float[2] e) { e = Relu(x) }
        >
    }"""
    model = Model.load(graph_model(text))

    model.graph.nodes = list(reversed(model.graph.nodes))

    assert ops(model) == ["Neg", "If"]


def test_sorting_keeps_an_order_that_is_right():
    graph = Model.load(graph_model("g (float[N] x) => (float[N] z) { b = Exp(x) a = Neg(x) z = Add(a, b) }")).graph

    assert sorted_nodes(graph) == graph.nodes


def test_names_a_node_of_a_cycle():
    model = Model.load(graph_model("g (float[N] x) => (float[N] y) { a = Add(x, b) b = Relu(a) y = Neg(x) }"))
    model.graph.nodes[0].name = "/loop/add"

    with pytest.raises(ModelError, match="the graph has a cycle through node '/loop/add'"):
        sorted_nodes(model.graph)


def test_keeps_the_metadata_of_a_node_that_another_one_replaces():
    proto = graph_model(RELU)
    proto.graph.node[0].metadata_props.add(key="namespace", value="model.relu")
    model = Model.load(proto)
    old = model.graph.nodes[0]
    output = old.outputs[0]
    old.outputs.clear()

    model.graph.nodes = [gs.Node("Tanh", "t", {}, list(old.inputs), [output])]

    node = model.to_proto().graph.node[0]
    assert (node.op_type, node.metadata_props[0].value) == ("Tanh", "model.relu")


def test_new_weights_follow_the_old_ones():
    model = Model.load(
        graph_model("g (float[N, 2] x) => (float[N, 2] y) { a = Add(x, w) y = Mul(a, v) }", v=np.ones(2), w=np.ones(2))
    )

    model.graph.nodes[0].inputs[1] = gs.Constant("new", np.ones(2, np.float32))

    assert [tensor.name for tensor in model.to_proto().graph.initializer] == ["v", "new"]


def test_a_new_weight_of_a_branch_lives_in_the_branch():
    model = Model.load(if_model())
    branch = next(subgraphs(model.graph.nodes[0]))

    branch.nodes[0].inputs[1] = gs.Constant("new", np.ones(3, np.float32))

    proto = model.to_proto().graph
    assert [tensor.name for tensor in proto.initializer] == []
    assert [tensor.name for tensor in proto.node[0].attribute[0].g.initializer] == ["new"]


def test_a_changed_shape_is_written():
    proto = graph_model("g (float[N, 4] x) => (float[N, 4] y) { h = Relu(x) y = Neg(h) }")
    proto.graph.value_info.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 4]))
    model = Model.load(proto)

    model.graph.nodes[0].outputs[0].shape = [3, 4]

    dims = model.to_proto().graph.value_info[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [3, 4]


def test_loop_bodies_survive():
    assert Model.load(loop_model()).to_proto() == loop_model()
