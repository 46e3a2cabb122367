from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnxcomp.errors import ModelError, OnnxcompError, OutputError
from onnxcomp.model import Model
from tests.models import conv_bn_model, external_model, graph_model, mlp_model, random_weights

# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read \\(No such file or directory\\)"),
        (b"", "is not an ONNX model \\(no graph in it\\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not an ONNX model, or is cut short \\(108 bytes\\)"),
        (b"\x30\0\0\0ORTM" + bytes(100), "is in ONNX Runtime's own format; give the .onnx file that it was made of"),
        (mlp_model().SerializeToString()[:-7], "is not an ONNX model, or is cut short"),
    ],
)
def test_says_what_is_wrong_with_a_file(content, message, tmp_path):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ModelError, match=message) as caught:
        Model.load(path)

    assert str(path) in str(caught.value)


def test_refuses_a_folder(tmp_path):
    with pytest.raises(ModelError, match=r"is a folder, expected an \.onnx file"):
        Model.load(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(damage):
    data = bytearray(DAMAGED)
    for place, value in damage:
        data[place % len(data)] = value
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(bytes(data))
    except DecodeError:
        return  # (the tests above say what becomes of it)

    with contextlib.suppress(OnnxcompError):
        model = Model.load(proto)
        _ = model.size_bytes, model.digest, model.fork()


DAMAGED = conv_bn_model().SerializeToString()


# --- broken models ----------------------------------------------------------------------------------------------------


def change(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = mlp_model()
    edit(proto)
    return proto


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: setattr(p.graph.initializer[0], "data_type", 99), "tensor 'W0': its element type 99 is none that"),
        (lambda p: setattr(p.graph.initializer[0], "data_type", 0), "tensor 'W0': its element type 0 is none that"),
        (lambda p: p.graph.initializer[0].dims.append(-1), r"tensor 'W0': its shape \[8, 16, -1\] has a negative"),
        (lambda p: p.graph.initializer[0].dims.append(2), r"\[8, 16, 2\] needs 1024 bytes, the file has 512"),
        (lambda p: p.graph.initializer[1].ClearField("raw_data"), r"\[16\] needs 16 numbers, the file has 0"),
        (lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 99), "element type 99, which ONNX does not"),
        (lambda p: p.graph.node[2].output.__setitem__(0, "h0"), "the tensor 'h0' is produced twice"),
        (lambda p: p.graph.node[0].output.__setitem__(0, "W1"), "the tensor 'W1' is produced twice"),
    ],
)
def test_says_what_is_wrong_with_a_model(edit, message):
    with pytest.raises(ModelError, match=message):
        Model.load(change(edit))


def test_refuses_names_that_are_not_text():
    data = mlp_model().SerializeToString().replace(b"W0", b"W\xff")

    with pytest.raises(ModelError, match="a name or text that is not UTF-8"):
        Model.load(onnx.ModelProto.FromString(data))


def test_refuses_a_cycle():
    proto = graph_model("g (float[N] x) => (float[N] y) { a = Add(x, b) b = Relu(a) y = Relu(b) }")

    with pytest.raises(ModelError, match="the graph has a cycle through node"):
        _ = Model.load(proto).size_bytes


# --- hostile external data --------------------------------------------------------------------------------------------


def hostile(tmp_path: Path, **entries: str) -> Path:
    """A model whose second weight has other external data entries."""
    path = external_model(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[1].external_data:
        if entry.key in entries:
            entry.value = entries[entry.key]
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../secret.bin", "sub/../../secret.bin", "..\\secret.bin", "", "a\0b", "C:/../x"]
)
def test_refuses_external_data_outside_the_folder(location, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(20000))

    with pytest.raises(ModelError, match="external data must lie inside the model's folder"):
        Model.load(hostile(folder, location=location))


def test_refuses_a_link_that_leads_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(20000))
    (folder / "inner.bin").symlink_to(tmp_path / "secret.bin")

    with pytest.raises(ModelError, match="is a link that leads out of the model's folder"):
        Model.load(hostile(folder, location="inner.bin", offset="0"))


def test_refuses_external_data_that_are_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ModelError, match="is not a regular file"):
        Model.load(hostile(tmp_path, location="pipe"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "missing.bin"}, "cannot be read \\(No such file"),
        ({"offset": "-4096"}, "its external data end at byte"),
        ({"offset": "99999999999"}, "its external data end at byte 100000016383, weights.bin has only"),
        ({"offset": "ten"}, "must be whole numbers"),
        ({"length": "16"}, r"shape \[64, 64\] needs 16384 bytes of external data, the entry says 16"),
    ],
)
def test_says_what_is_wrong_with_external_data(entries, message, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        Model.load(hostile(tmp_path, **entries))

    assert "initializer 'W1'" in str(caught.value)


def test_a_data_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    model = Model.load(external_model(tmp_path))
    os.truncate(tmp_path / "weights.bin", 100)

    with pytest.raises(ModelError, match=r"weights\.bin: has changed since it was first read"):
        model.save(tmp_path / "out.onnx")

    assert not (tmp_path / "out.onnx").exists()


# --- saving -----------------------------------------------------------------------------------------------------------


def test_refuses_to_overwrite_its_input(tmp_path):
    path = external_model(tmp_path)
    before = path.read_bytes()

    for target in (path, tmp_path / "weights.bin"):
        with pytest.raises(OutputError, match="the output would overwrite the input"):
            Model.load(path).save(target)

    assert path.read_bytes() == before


def test_refuses_to_overwrite_its_input_also_after_changes(tmp_path):
    path = external_model(tmp_path, layers=1)
    fork = Model.load(path).fork()
    fork.set_weight("W0", np.zeros((64, 64), np.float32))
    fork = fork.fork()

    with pytest.raises(OutputError, match="the output would overwrite the input"):
        fork.save(tmp_path / "weights.bin")


def test_refuses_a_missing_folder(tmp_path):
    with pytest.raises(OutputError, match=r"its folder '.*nowhere' does not exist"):
        Model.load(mlp_model()).save(tmp_path / "nowhere" / "m.onnx")


@pytest.mark.parametrize("external", [True, False])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(external, tmp_path, monkeypatch):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxcomp.files.os.fsync", fail)
    with pytest.raises(OutputError, match=r"m\.onnx.*: cannot be written \(No space left on device\)"):
        Model.load(mlp_model()).save(target, external_data=external)

    assert os.listdir(tmp_path) == ["m.onnx"]
    assert target.read_bytes() == b"old"


def test_more_than_two_gigabytes_fit_no_proto(monkeypatch):
    monkeypatch.setattr("onnxcomp.model.INLINE_LIMIT_BYTES", 1000)

    with pytest.raises(ModelError, match="more than 2 GiB only fits a file with external data"):
        Model.load(mlp_model()).to_proto()


def test_more_than_two_gigabytes_are_saved_with_external_data(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxcomp.model.INLINE_LIMIT_BYTES", 1000)

    Model.load(mlp_model()).save(tmp_path / "m.onnx")

    assert (tmp_path / "m.onnx.data").exists()
    assert Model.load(tmp_path / "m.onnx").digest == Model.load(mlp_model()).digest


# --- sparse tensors and segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "indices", "problem"),
    [
        ([-5], [1, 3], "its shape \\[-5\\] is negative"),
        ([1 << 45], [1, 3], "has more than 2 GiB of numbers"),
        ([5], [1, 5], "some of its indices are outside of its shape \\[5\\]"),
        ([5], [-1, 3], "some of its indices are outside"),
        ([5], [1, 2, 3], "2 values of 1 axes do not go with indices of shape \\[3\\]"),
        ([5], np.array([1, 2], np.int32), "its indices must be int64"),
    ],
)
def test_refuses_a_sparse_initializer_that_cannot_be_written_out(dims, indices, problem):
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Add(x, w) }")
    values = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "w")
    places = onnx.numpy_helper.from_array(np.asarray(indices))
    sparse = proto.graph.sparse_initializer.add(dims=dims)
    sparse.values.CopyFrom(values)
    sparse.indices.CopyFrom(places)

    with pytest.raises(ModelError, match=f"sparse tensor 'w': .*{problem}"):
        Model.load(proto)


def test_refuses_a_sparse_initializer_whose_values_have_two_axes():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Add(x, w) }")
    sparse = proto.graph.sparse_initializer.add(dims=[5])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones((2, 1), np.float32), "w"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([[1], [3]])))

    with pytest.raises(ModelError, match=r"sparse tensor 'w': its values must have one axis, got the shape \[2, 1\]"):
        Model.load(proto)


def test_refuses_strings_in_raw_data():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Identity(x) }")
    proto.graph.initializer.add(name="s", dims=[2], data_type=onnx.TensorProto.STRING, raw_data=bytes(16))

    with pytest.raises(ModelError, match="tensor 's': its strings are in raw_data"):
        Model.load(proto)


def test_refuses_a_tensor_in_segments():
    proto = mlp_model()
    proto.graph.initializer[0].segment.end = 4

    with pytest.raises(ModelError, match="tensor 'W0': it is one segment of a tensor"):
        Model.load(proto)


# --- changing ---------------------------------------------------------------------------------------------------------


def test_gives_names_that_nothing_has():
    model = Model.load(mlp_model())

    assert [model.unique_name(base) for base in ("new", "new", "W0", "W0", "x")] == [
        "new",
        "new_1",
        "W0_1",
        "W0_2",
        "x_1",
    ]


def test_names_are_unique_also_after_the_contents_were_exchanged():
    model = Model.load(mlp_model())
    model.unique_name("a")
    other = Model.load(graph_model("g (float[N] x) => (float[N] y) { b = Relu(x) y = Relu(b) }"))

    model.become(other)

    assert model.unique_name("b") == "b_1"


def test_infers_the_shapes_of_inner_tensors():
    model = Model.load(conv_bn_model())

    model.infer_shapes()

    assert [list(node.outputs[0].shape) for node in model.graph.nodes] == [["N", 8, 6, 6]] * 3


def test_cannot_raise_the_opset_of_a_model_with_functions():
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }", opset=13)
    sets = [onnx.helper.make_opsetid("", 13)]
    body = [onnx.helper.make_node("Neg", ["p"], ["q"])]
    proto.functions.append(onnx.helper.make_function("local", "F", ["p"], ["q"], body, sets))

    with pytest.raises(ModelError, match="opset 13 cannot be raised to 17: the model has functions of its own"):
        Model.load(proto).raise_opset(17)


def test_raising_the_opset_keeps_metadata_and_weights():
    proto = graph_model("g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, b) }", opset=11, b=random_weights(4))
    proto.metadata_props.add(key="classes", value="cat,dog")
    model = Model.load(proto)

    model.raise_opset(17)

    assert (model.opset, model.metadata) == (17, {"classes": "cat,dog"})
    np.testing.assert_array_equal(model.weight("b"), random_weights(4))
    assert model.to_proto().graph.initializer[0].data_type == TensorProto.FLOAT


def test_imports_the_operator_sets_that_rewrites_bring_in():
    model = Model.load(mlp_model())
    model.graph.nodes[1].domain = "com.example"

    assert [entry.domain for entry in model.to_proto().opset_import] == ["", "com.example"]
