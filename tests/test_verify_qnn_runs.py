"""Qualcomm's provider, installed and run on its simulator: how near it is to the CPU provider, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RuntimeFailure
from onnxcomp.verification.environments.qnn import Qnn
from tests.deployed import CPU, Feeds, first_outputs, image_feeds, installed, optimized, sample_model
from tests.models import Array, graph_model, random_weights

pytestmark = pytest.mark.slow

STRICT = {"session.disable_cpu_ep_fallback": "1"}
QUANTIZED = ("--shape", "image=1,1,28,28", "-p", "simplify", "-p", "quantize")
PACKED = ("--shape", "image=1,1,28,28")
IMAGES = 100

STEPS = {"lenet": 3, "mobilenet": 8, "vit": 18}
"""How many steps of the output's scale the simulator may be off: each layer rounds in its own way, by a step at most,
and later layers add that up. On 500 images 2, 6 and 14 were seen."""

AGREEMENT = 0.98
"""The part of images that must get the same class; 496 of 500 in the worst case seen."""


@pytest.fixture(scope="module")
def qnn(tmp_path_factory):
    with installed(Qnn, tmp_path_factory.mktemp("cache")) as environment:
        yield environment


def compare(qnn: Qnn, model: Path, feeds: Feeds, **options: dict[str, str]):
    """The first outputs on the provider and on the CPU provider of the same build, and what executed the former."""
    execution = qnn.run(model, feeds, **options)  # type: ignore[arg-type]
    plain = qnn.run(model, feeds, plain=True)
    assert list(plain.nodes) == [CPU]
    return first_outputs(execution), first_outputs(plain), execution.nodes


def output_scale(model: Path) -> float:
    """The scale of the DequantizeLinear that makes the output."""
    proto = onnx.load(model)
    [last] = [node for node in proto.graph.node if proto.graph.output[0].name in node.output]
    assert last.op_type == "DequantizeLinear"
    [scale] = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer if tensor.name == last.input[1]]
    return float(scale)


def assert_near(name: str, model: Path, got: Array, wanted: Array) -> None:
    assert np.abs(got - wanted).max() / output_scale(model) <= STEPS[name] + 0.01
    assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= AGREEMENT


@pytest.mark.parametrize("options", [QUANTIZED, PACKED], ids=["quantized", "packed"])
@pytest.mark.parametrize(("name", "layers"), [("lenet", {"Gemm": 3}), ("mobilenet", {"Conv": 20, "Add": 4, "Gemm": 1})])
def test_an_int8_model_runs_wholly_on_the_provider_and_near_the_cpu(qnn, tmp_path, name, layers, options):
    model = optimized(name, "qnn", tmp_path, *options)

    got, wanted, nodes = compare(qnn, model, image_feeds(IMAGES), config=STRICT)

    assert list(nodes) == ["QNNExecutionProvider"]
    assert {operator: nodes["QNNExecutionProvider"].get(operator) for operator in layers} == layers
    assert_near(name, model, got, wanted)


def test_nodes_that_fall_back_are_seen_or_refused(qnn, tmp_path):
    model = optimized("vit", "qnn", tmp_path, *QUANTIZED)

    got, wanted, nodes = compare(qnn, model, image_feeds(IMAGES))

    assert nodes[CPU] == {"Erf": 4}  # the provider has Gelu, but no Erf
    assert nodes["QNNExecutionProvider"]["MatMul"] == 8
    assert_near("vit", model, got, wanted)
    with pytest.raises(RuntimeFailure, match="assigned to the default CPU EP, but fallback to CPU EP has"):
        qnn.run(model, image_feeds(1), config=STRICT)


def test_a_float_model_is_not_counted_as_run_by_the_provider(qnn):
    nodes = qnn.run(sample_model("lenet"), image_feeds(1)).nodes

    assert list(nodes) == [CPU]


def test_a_wrong_model_is_told_apart(qnn, tmp_path):
    model = optimized("lenet", "qnn", tmp_path, *QUANTIZED)
    feeds = image_feeds(IMAGES)
    inverted = [{"image": 1 - feed["image"]} for feed in feeds]

    got, wanted, _ = compare(qnn, model, feeds)
    other, _, _ = compare(qnn, model, inverted)

    assert_near("lenet", model, got, wanted)
    with pytest.raises(AssertionError):
        assert_near("lenet", model, other, wanted)


def product_model(path: Path, *, axis: int | None) -> Path:
    """A quantized matrix product whose weight has one scale for each place along an axis; None: one in all."""
    weight = random_weights(64, 32) * np.geomspace(0.1, 4, 32 if axis else 64).reshape((1, -1) if axis else (-1, 1))
    over = None if axis is None else 1 - axis
    scale = np.asarray(np.abs(weight).max(axis=over, keepdims=True) / 127, np.float32)
    quantized = np.round(weight / scale).astype(np.int8)
    scales = scale.reshape(-1) if axis is not None else scale.reshape(())
    text = f"""g (float[16, 64] x) => (float[16, 32] y) {{
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis = {axis or 0}>(W, ws, wz)
        m = MatMul(xd, wd)
        mq = QuantizeLinear(m, t, z)
        y = DequantizeLinear(mq, t, z)
    }}"""
    weights = {"W": quantized, "ws": scales, "wz": np.zeros_like(scales, dtype=np.int8)}
    numbers = {"s": np.float32(0.04), "t": np.float32(0.5), "z": np.uint8(128)}
    onnx.save(graph_model(text, {**weights, **{name: np.asarray(value) for name, value in numbers.items()}}), path)
    return path


@pytest.mark.parametrize("axis", [None, 1])
def test_a_product_with_a_scale_for_each_output_channel_is_right(qnn, tmp_path, axis):
    model = product_model(tmp_path / "m.onnx", axis=axis)

    got, wanted, nodes = compare(qnn, model, [{"x": random_weights(16, 64, seed=1)}], config=STRICT)

    assert nodes["QNNExecutionProvider"]["MatMul"] == 1
    assert np.abs(got - wanted).max() / 0.5 <= 1.01
    assert len(np.unique(wanted)) > 20


def test_a_product_with_a_scale_for_each_input_channel_is_silently_wrong_which_the_comparison_shows(qnn, tmp_path):
    model = product_model(tmp_path / "m.onnx", axis=0)

    got, wanted, nodes = compare(qnn, model, [{"x": random_weights(16, 64, seed=1)}], config=STRICT)

    assert nodes["QNNExecutionProvider"]["MatMul"] == 1
    assert np.abs(got - wanted).max() / 0.5 > 10
