"""Streamed saving writes what protobuf itself would write."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from onnxcomp.model import Model
from onnxcomp.wire import write_model


def model_with(shapes: list[tuple[int, ...]]) -> onnx.ModelProto:
    proto = parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    for index, shape in enumerate(shapes):
        value = np.full(shape, index + 1, np.float32)
        tensor = numpy_helper.from_array(value, f"w{index}")
        tensor.doc_string = "kept"
        proto.graph.initializer.append(tensor)
    proto.doc_string = "a model"
    proto.metadata_props.add(key="k", value="v")
    return proto


def streamed(model: Model) -> bytes:
    file = io.BytesIO()
    write_model(model.proto(), model._blobs, file)
    return file.getvalue()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple), max_size=4))
def test_writes_the_bytes_that_protobuf_writes(shapes: list[tuple[int, ...]]) -> None:
    model = Model.load(model_with(shapes))

    assert streamed(model) == model.to_proto().SerializeToString()


@pytest.mark.parametrize("size", [31, 32, 63, 64, 4095, 4096, 524288])
def test_lengths_around_a_varint_boundary_are_right(size: int) -> None:
    model = Model.load(model_with([(size,)]))

    assert streamed(model) == model.to_proto().SerializeToString()


def test_weights_in_subgraphs_are_written_in_place() -> None:
    inner = '<ir_version: 8, opset_import: ["": 17]> i () => (float[N] z) { z = Identity(w) }'
    branch = parser.parse_model(inner).graph
    branch.initializer.append(numpy_helper.from_array(np.arange(500, dtype=np.float32), "w"))
    node = onnx.helper.make_node("If", ["c"], ["q"], then_branch=branch, else_branch=branch)
    proto = model_with([(200,)])
    proto.graph.node.append(node)

    read_back = onnx.ModelProto.FromString(streamed(Model.load(proto)))

    then = next(a for a in read_back.graph.node[1].attribute if a.name == "then_branch").g
    np.testing.assert_array_equal(numpy_helper.to_array(then.initializer[0]), np.arange(500))
