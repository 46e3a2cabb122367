"""`prune-channels` on whole models, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxcomp.data import generate
from onnxcomp.model import Model, ModelSource
from onnxcomp.passes import Context
from onnxcomp_passes import Pack, PruneChannels, Simplify
from tests.models import FLOAT_ROUNDING, graph_model, mlp_model, proto_of, random_weights, run

Array = np.ndarray[Any, Any]

SAMPLES = Path(__file__).parent.parent / "sample_models"


def silent_mlp(sizes: tuple[int, ...] = (6, 10, 4), units: tuple[int, ...] = (1, 4, 7)) -> onnx.ModelProto:
    """An MLP whose first layer gives zeros for some units."""
    model = Model.load(mlp_model(sizes))
    weight, bias = model.weight("W0").copy(), model.weight("b0").copy()
    weight[:, list(units)], bias[list(units)] = 0, 0
    model.set_weight("W0", weight)
    model.set_weight("b0", bias)
    return model.to_proto()


def shapes(source: ModelSource) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in proto_of(source).graph.initializer}


def assert_equal_outputs(before: ModelSource, after: ModelSource) -> None:
    for feeds in generate(proto_of(before), count=4, seed=2).feeds():
        for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=FLOAT_ROUNDING * np.abs(one).max())


def test_silent_neurons_go():
    proto = silent_mlp()
    model = Model.load(proto)

    changes = PruneChannels().rewrite(model, Context())

    assert [(change.where, change.what) for change in changes.changed] == [
        ("h0", "3 of 10 neurons removed that add nothing")
    ]
    assert shapes(model) == {"W0": [6, 7], "b0": [7], "W1": [7, 4], "b1": [4]}
    assert_equal_outputs(proto, model)


def test_the_ledger_names_what_is_left_alone_and_why():
    model = Model.load(silent_mlp())

    changes = PruneChannels().rewrite(model, Context())

    assert [(left.where, left.why) for left in changes.left] == [("y", "is an output of the model")]


@pytest.mark.parametrize("options", [{"skip": ("h0",)}, {}], ids=["skipped", "excluded"])
def test_layers_that_the_user_names_stay(options: dict[str, Any]):
    model = Model.load(silent_mlp())

    changes = PruneChannels(**options).rewrite(model, Context(exclude=() if options else ("h0",)))

    assert not changes.count
    assert shapes(model)["W0"] == [6, 10]


@pytest.mark.parametrize("excluded", ["h0", "y"])
def test_a_unit_stays_if_any_layer_that_it_is_cut_from_is_excluded(excluded: str):
    model = Model.load(silent_mlp())

    assert not PruneChannels().rewrite(model, Context(exclude=(excluded,))).count


def test_weights_that_the_caller_may_replace_stay():
    proto = silent_mlp()
    proto.graph.input.append(helper.make_tensor_value_info("W0", TensorProto.FLOAT, [6, 10]))

    assert not PruneChannels().rewrite(Model.load(proto), Context()).count


def test_weights_listed_as_inputs_before_ir_4_are_cut_there_too():
    proto = silent_mlp()
    proto.ir_version, proto.opset_import[0].version = 3, 8
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model = Model.load(proto)

    PruneChannels().rewrite(model, Context())

    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    listed = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in result.graph.input}
    assert listed["W0"] == [6, 7]
    feeds = {"x": random_weights(3, 6)}
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=FLOAT_ROUNDING, atol=FLOAT_ROUNDING)


def test_channels_that_a_branch_reads_stay():
    text = """g (bool c, float[N, 6] x) => (float[N, 4] y) {
        h = MatMul(x, W)
        y = If(c) <
            then_branch = yes () => (float[N, 4] a) { a = MatMul(h, V) },
            else_branch = no () => (float[N, 4] b) { t = Relu(h) b = MatMul(t, V) }
        >
    }"""
    weight = random_weights(6, 8)
    weight[:, 3] = 0
    model = Model.load(graph_model(text, W=weight, V=random_weights(8, 4)))

    changes = PruneChannels().rewrite(model, Context())

    assert not changes.count
    assert ("h", "y (If) reads it, through which channels are not followed") in {(e.where, e.why) for e in changes.left}


def test_a_constant_that_a_branch_reads_too_stays_whole_for_it():
    text = """g (bool c, float[N, 6] x) => (float[N, 4] y, float[8] z) {
        m = MatMul(x, W)
        h = Add(m, b)
        y = MatMul(h, V)
        z = If(c) <
            then_branch = yes () => (float[8] p) { p = Neg(b) },
            else_branch = no () => (float[8] q) { q = Identity(b) }
        >
    }"""
    weight, bias = random_weights(6, 8), random_weights(8)
    weight[:, 3], bias[3] = 0, 0
    proto = graph_model(text, W=weight, V=random_weights(8, 4), b=bias)
    model = Model.load(proto)

    changes = PruneChannels().rewrite(model, Context())

    assert changes.count == 1
    assert shapes(model)["W"] == [6, 7]
    for condition in (True, False):
        feeds = {"c": np.array(condition), "x": random_weights(3, 6, seed=5)}
        for one, other in zip(run(proto, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(other, one, rtol=FLOAT_ROUNDING, atol=FLOAT_ROUNDING)


def test_a_function_of_the_model_is_not_looked_into():
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 6] x) => (float[N, 4] y) { h = MatMul(x, W) r = own.f(h) y = MatMul(r, V) }
        <opset_import: ["": 17], domain: "own"> f (a) => (b) { b = Relu(a) }"""
    proto = parser.parse_model(text)
    weight = random_weights(6, 8)
    weight[:, 3] = 0
    for name, value in (("W", weight), ("V", random_weights(8, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))

    changes = PruneChannels().rewrite(Model.load(proto), Context())

    assert not changes.count
    assert "channels are not followed" in changes.left[0].why


def test_packed_weights_are_named_and_stay():
    weights = {"W": np.sign(random_weights(64, 128)), "V": np.sign(random_weights(128, 64, seed=1))}
    weights["W"][:, 5] = 0
    model = Model.load(
        graph_model("g (float[N, 64] x) => (float[N, 64] y) { h = MatMul(x, W) y = MatMul(h, V) }", weights)
    )
    assert Pack().rewrite(model, Context()).count

    changes = PruneChannels().rewrite(model, Context())

    assert not changes.count
    assert {left.why for left in changes.left} == {"is packed: unpack the model first (onnxcomp optimize --unpack)"}


def test_declared_shapes_between_nodes_follow():
    proto = silent_mlp()
    proto.graph.value_info.append(helper.make_tensor_value_info("r0", TensorProto.FLOAT, ["N", 10]))
    model = Model.load(proto)

    PruneChannels().rewrite(model, Context())

    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    [info] = [info for info in result.graph.value_info if info.name == "r0"]
    assert info.type.tensor_type.shape.dim[1].dim_value == 7


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_of_other_float_types_are_cut(dtype: str):
    weight = random_weights(6, 8).astype(dtype)
    weight[:, 3] = 0
    kind = {"float64": "double"}.get(dtype, dtype)
    text = f"g ({kind}[N, 6] x) => ({kind}[N, 4] y) {{ h = MatMul(x, W) y = MatMul(h, V) }}"
    proto = graph_model(text, W=weight, V=random_weights(8, 4).astype(dtype))
    model = Model.load(proto)

    PruneChannels().rewrite(model, Context())

    assert shapes(model) == {"W": [6, 7], "V": [7, 4]}
    feeds = {"x": random_weights(3, 6).astype(dtype)}
    assert np.array_equal(run(model, feeds)[0], run(proto, feeds)[0])


@pytest.mark.parametrize("name", ["fashion_lenet", "fashion_mobilenet", "fashion_vit"])
def test_in_a_trained_model_only_outputs_and_what_is_normalised_is_left_alone(name: str):
    model = Model.load(SAMPLES / f"{name}.onnx")
    Simplify().rewrite(model, Context())

    changes = PruneChannels().rewrite(model, Context())

    reasons = {left.why.rpartition(") ")[2] for left in changes.left}
    assert reasons <= {"is an output of the model", "computes across them"}
