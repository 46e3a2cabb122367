"""Models whose large weights stay in the file while they are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from onnxcomp.skeleton import CUT_BYTES, cut_weights, load_skeleton

Array = np.ndarray[Any, Any]

BIG = np.arange(CUT_BYTES, dtype=np.float32).reshape(64, -1)
SMALL = np.arange(6, dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["big"], ["y"], name="\u00fcber")],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, None])],
        [numpy_helper.from_array(BIG, "big"), numpy_helper.from_array(SMALL, "small")],
        doc_string="d" * 300,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="me")
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_large_weights_stay_in_the_file(path: Path):
    skeleton = load_skeleton(path)

    big, small = skeleton.graph.initializer
    assert not big.HasField("raw_data")
    np.testing.assert_array_equal(numpy_helper.to_array(small), SMALL)
    assert len(cut_weights(path)) < 1500


def test_reading_the_weights_back_gives_the_same_model(path: Path):
    skeleton = load_skeleton(path)

    external_data_helper.load_external_data_for_model(skeleton, str(path.parent))
    for tensor in skeleton.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    assert skeleton == onnx.load(path)


def test_a_link_is_read_whole(path: Path):
    link = path.with_name("link.onnx")
    link.symlink_to(path)

    assert load_skeleton(link) == onnx.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"hello" * 9999, b"\x3a\xff\xff\xff\x7f" + b"x" * CUT_BYTES, b"\x80" * CUT_BYTES]
)
def test_what_is_no_message_is_left_to_the_parser(tmp_path: Path, data: bytes):
    path = tmp_path / "text.onnx"
    path.write_bytes(data)

    assert cut_weights(path) == data


def test_a_file_that_is_cut_short_is_left_to_the_parser(path: Path):
    data = path.read_bytes()[:-100]
    path.write_bytes(data)

    assert cut_weights(path) == data


def test_a_weight_that_is_said_to_lie_here_is_cut_all_the_same(path: Path):
    model = onnx.load(path)
    model.graph.initializer[0].data_location = TensorProto.DEFAULT  # written after the data, where it would win
    onnx.save(model, path)

    big = load_skeleton(path).graph.initializer[0]

    assert big.data_location == TensorProto.EXTERNAL
    np.testing.assert_array_equal(numpy_helper.to_array(big, str(path.parent)), BIG)
