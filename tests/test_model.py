from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.model import Model, model_files
from tests.models import (
    assert_same_outputs,
    conv_bn_model,
    external_model,
    graph_model,
    if_model,
    loop_model,
    mlp_model,
    random_inputs,
    random_weights,
)
from tests.strategies import small_graphs

RELU = "g (float[N] x) => (float[N] y) { y = Relu(x) }"


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


# --- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp_model, conv_bn_model, if_model, loop_model])
def test_a_model_that_nothing_changed_is_saved_byte_for_byte(build, tmp_path):
    path = saved(build(), tmp_path / "in.onnx")

    Model.load(path).save(tmp_path / "out.onnx")

    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


@given(small_graphs())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_graph_comes_back_as_it_was(proto):
    assert Model.load(proto).to_proto() == proto


def rich_model() -> onnx.ModelProto:
    """A model with something in every field."""
    proto = graph_model("g (float[N, 4] x) => (float[N, 4] y) { h = Relu(x) y = Add(h, b) }", b=random_weights(4))
    proto.producer_name, proto.producer_version, proto.domain = "maker", "1.2", "org.example"
    proto.model_version, proto.doc_string = 7, "of the model"
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    graph = proto.graph
    graph.doc_string = "of the graph"
    graph.metadata_props.add(key="graph", value="yes")
    graph.input[0].doc_string = "pixels"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.output[0].type.denotation = "TENSOR"
    graph.node[0].name, graph.node[0].doc_string = "relu", "of the node"
    graph.node[0].metadata_props.add(key="namespace", value="model.relu")
    graph.initializer[0].doc_string = "of the weight"
    graph.initializer.append(numpy_helper.from_array(random_weights(100), "unused"))
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 4]))
    graph.value_info[0].metadata_props.add(key="layer", value="3")
    graph.quantization_annotation.add(tensor_name="h")
    body = [helper.make_node("Neg", ["p"], ["q"])]
    proto.functions.append(helper.make_function("local", "F", ["p"], ["q"], body, [helper.make_opsetid("", 17)]))
    return proto


def test_keeps_every_field():
    assert Model.load(rich_model()).to_proto() == rich_model()


def test_a_fork_keeps_every_field():
    assert Model.load(rich_model()).fork().to_proto() == rich_model()


@pytest.mark.parametrize(
    "name",
    ["INT4", "UINT4", "INT8", "UINT8", "BOOL", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "DOUBLE"],
)
def test_keeps_weights_of_every_type(name):
    dtype = getattr(TensorProto, name)
    proto = graph_model("g (float[N] x) => (float[N] y) { y = Relu(x) }", ir_version=10)
    for size in (3, 1001):
        values = np.arange(size) % 2
        proto.graph.initializer.append(helper.make_tensor(f"w{size}", dtype, [size], values))
    model = Model.load(proto)

    result = model.to_proto()

    assert result == proto


def test_keeps_string_and_complex_weights():
    proto = graph_model(RELU)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(["a", "ü", ""] * 200, object), "s"))
    proto.graph.initializer.append(numpy_helper.from_array(np.full(100, 1 + 2j, np.complex64), "c"))

    assert Model.load(proto).to_proto() == proto


def test_stores_a_weight_of_floats_as_raw_bytes_of_the_same_size():
    proto = graph_model("g (float[N, 100] x) => (float[N, 100] y) { y = Add(x, w) }")
    proto.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [100], np.arange(100.0)))
    model = Model.load(proto)

    np.testing.assert_array_equal(model.weight("w"), np.arange(100, dtype=np.float32))
    assert model.to_proto().ByteSize() == proto.ByteSize()


def test_lists_initializers_as_inputs_where_the_ir_version_asks_for_it():
    proto = graph_model("g (float[4] b, float[N, 4] x) => (float[N, 4] y) { y = Add(x, b) }", ir_version=3, opset=8)
    proto.graph.initializer.append(numpy_helper.from_array(random_weights(4), "b"))
    model = Model.load(proto)

    assert [tensor.name for tensor in model.graph.inputs] == ["x"]
    assert model.to_proto() == proto


def test_an_initializer_that_is_an_input_is_a_default_and_no_constant():
    proto = graph_model("g (float[N, 4] x, float[4] b) => (float[N, 4] y) { y = Add(x, b) }", b=random_weights(4))
    model = Model.load(proto)

    assert list(model.constants()) == []
    assert model.to_proto() == proto


# --- weights ----------------------------------------------------------------------------------------------------------


def test_reads_and_replaces_a_weight():
    model = Model.load(mlp_model())
    before = model.digest

    model.set_weight("W0", model.weight("W0") * 2)

    np.testing.assert_array_equal(model.weight("W0"), random_weights(8, 16, scale=8**-0.5) * 2)
    assert model.digest != before


def test_says_which_weight_is_unknown():
    with pytest.raises(ModelError, match="the model has no initializer called 'nope'"):
        Model.load(mlp_model()).weight("nope")


@pytest.mark.parametrize("dtype", ["int4", "uint4", "bfloat16", "float8_e4m3fn"])
def test_a_weight_of_a_rare_type_can_be_replaced(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.arange(300) % 7
    proto = graph_model("g (float[N] x) => (float[N] y) { c = Cast<to = 1>(w) y = Add(x, c) }", opset=21, ir_version=10)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(300, getattr(ml_dtypes, dtype)), "w"))
    model = Model.load(proto)

    model.set_weight("w", values.astype(getattr(ml_dtypes, dtype)))

    copy = Model.load(model.to_proto())
    np.testing.assert_array_equal(copy.weight("w").astype(int), values)


def test_a_fork_does_not_change_its_original():
    model = Model.load(mlp_model())
    fork = model.fork()

    fork.set_weight("W0", np.zeros((8, 16), np.float32))
    fork.graph.nodes[0].attrs["alpha"] = 2.0
    fork.metadata["who"] = "fork"

    assert model.to_proto() == mlp_model()


def test_a_fork_shares_the_bytes_of_weights_and_lets_go_of_old_ones():
    model = Model.load(mlp_model())
    old = next(iter(model._blobs))

    fork = model.fork()
    assert fork._blobs[old] is model._blobs[old]
    for name in ("W0", "W1", "b0", "b1"):
        fork.set_weight(name, fork.weight(name) + 1)

    assert old not in fork.fork()._blobs


def test_equal_models_have_equal_digests_however_they_are_stored(tmp_path):
    path = external_model(tmp_path)
    inline = Model.load(onnx.load(path))

    assert Model.load(path).digest == inline.digest == inline.fork().digest


@pytest.mark.parametrize(
    "change",
    [
        lambda proto: proto.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0)),
        lambda proto: proto.metadata_props.add(key="a", value="b"),
        lambda proto: setattr(proto.graph.output[0], "doc_string", "other"),
        lambda proto: proto.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.nextafter(random_weights(8, 16, scale=8**-0.5), 9, dtype=np.float32), "W0")
        ),
    ],
)
def test_any_change_changes_the_digest(change):
    proto = mlp_model()
    before = Model.load(proto).digest

    change(proto)

    assert Model.load(proto).digest != before


@given(small_graphs())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_knows_its_size_to_a_few_bytes_a_weight(proto):
    model = Model.load(proto)

    assert abs(model.size_bytes - proto.ByteSize()) <= 4 * (1 + len(proto.graph.initializer) + len(proto.graph.node))


# --- external data ----------------------------------------------------------------------------------------------------


def test_reads_external_data_and_writes_it_again(tmp_path):
    path = external_model(tmp_path)
    (tmp_path / "out").mkdir()

    Model.load(path).save(tmp_path / "out" / "copy.onnx")

    assert sorted(os.listdir(tmp_path / "out")) == ["copy.onnx", "copy.onnx.data"]
    assert onnx.load(tmp_path / "out" / "copy.onnx") == onnx.load(path)


@pytest.mark.parametrize("external", [True, False])
def test_stores_weights_where_it_is_told_to(external, tmp_path):
    Model.load(mlp_model()).save(tmp_path / "m.onnx", external_data=external)

    assert (tmp_path / "m.onnx.data").exists() == external
    assert Model.load(tmp_path / "m.onnx").digest == Model.load(mlp_model()).digest


def test_writes_external_tensors_at_page_boundaries(tmp_path):
    Model.load(external_model(tmp_path, size=64)).save(tmp_path / "out.onnx")

    for tensor in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer:
        assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % 4096 == 0


@pytest.mark.parametrize("copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy])
def test_a_copy_by_pickle_or_copy_is_the_same_model_and_apart_from_it(copied, tmp_path):
    model = Model.load(external_model(tmp_path))
    twin = copied(model)
    assert (twin.digest, twin.path) == (model.digest, model.path)

    twin.set_weight("W1", np.zeros((64, 64), np.float32))

    assert twin.digest != model.digest
    twin.save(tmp_path / "twin.onnx")
    assert (tmp_path / "twin.onnx.data").exists()


def test_a_model_whose_data_lie_deeper_is_replaced_and_these_stay(tmp_path):
    deeper = tmp_path / "m.onnx.parts"
    deeper.mkdir()
    old = external_model(tmp_path).rename(tmp_path / "m.onnx")
    model, moved = onnx.load(old, load_external_data=False), deeper / "w.data"
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "m.onnx.parts/w.data"
    old.write_bytes(model.SerializeToString())
    moved.write_bytes(bytes(1 << 16))

    Model.load(mlp_model()).save(old, external_data=True)

    assert Model.load(old).digest == Model.load(mlp_model()).digest
    assert moved.exists()


def test_does_not_read_weights_to_load_fork_or_measure(tmp_path, monkeypatch):
    path = external_model(tmp_path)
    for method in ("chunks", "buffer"):
        monkeypatch.setattr(f"onnxcomp.weights.FileBlob.{method}", lambda self: pytest.fail("a weight was read"))

    assert Model.load(path).fork().size_bytes > 2 * 64 * 64 * 4


def test_saves_a_changed_weight_among_external_ones(tmp_path):
    model = Model.load(external_model(tmp_path))
    model.set_weight("W0", np.ones((64, 64), np.float32))

    model.save(tmp_path / "out.onnx")

    result = Model.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(result.weight("W0"), np.ones((64, 64)))
    np.testing.assert_array_equal(result.weight("W1"), random_weights(64, 64, seed=1, scale=64**-0.5))


@pytest.mark.parametrize("durable", [True, False])
def test_waits_for_the_disk_only_where_a_file_must_outlive_the_run(tmp_path, monkeypatch, durable):
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)

    Model.load(mlp_model()).save(tmp_path / "m.onnx", durable=durable)

    assert bool(waited) is durable
    assert Model.load(tmp_path / "m.onnx").digest == Model.load(mlp_model()).digest


def test_saving_again_replaces_its_own_old_data_file(tmp_path):
    model = Model.load(external_model(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    model.save(out / "m.onnx")
    model.set_weight("W0", np.ones((64, 64), np.float32))

    model.save(out / "m.onnx")

    assert len(os.listdir(out)) == 2
    np.testing.assert_array_equal(Model.load(out / "m.onnx").weight("W0"), np.ones((64, 64)))


def test_names_a_model_s_files(tmp_path):
    path = external_model(tmp_path)

    assert model_files(path) == [path, tmp_path.resolve() / "weights.bin"]


def test_reads_the_external_data_of_functions_into_the_model(tmp_path):
    proto = graph_model("g (float[N] x) => (float[N] y) { y = F(x) }")
    proto.graph.node[0].domain = "local"
    proto.opset_import.add(domain="local", version=1)
    (tmp_path / "f.bin").write_bytes(np.float32(5).tobytes())
    tensor = TensorProto(name="five", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="f.bin")
    body = [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Mul", ["p", "c"], ["q"])]
    proto.functions.append(helper.make_function("local", "F", ["p"], ["q"], body, [helper.make_opsetid("", 17)]))

    result = Model.load(saved(proto, tmp_path / "m.onnx")).to_proto()

    assert result.functions[0].node[0].attribute[0].t.raw_data == np.float32(5).tobytes()


def test_raising_the_opset_does_not_read_large_weights(tmp_path, monkeypatch):
    model = Model.load(external_model(tmp_path))
    for method in ("chunks", "buffer"):
        monkeypatch.setattr(f"onnxcomp.weights.FileBlob.{method}", lambda self: pytest.fail("a weight was read"))

    model.raise_opset(21)

    assert (model.opset, model.ir_version) == (21, 10)
    monkeypatch.undo()
    assert_same_outputs(tmp_path / "model.onnx", model, random_inputs(model))
    model.save(tmp_path / "after.onnx")
    assert Model.load(tmp_path / "after.onnx").digest == model.digest


def test_raising_the_opset_keeps_what_inputs_and_outputs_declare():
    proto = graph_model("g (float[N, 4] x) => (float[M, K] y) { y = MatMul(x, W) }", W=random_weights(4, 6))
    proto.graph.output[0].doc_string = "scores"
    model = Model.load(proto)

    model.raise_opset(21)

    assert list(model.proto().graph.output) == list(proto.graph.output)
    assert list(model.proto().graph.input) == list(proto.graph.input)
