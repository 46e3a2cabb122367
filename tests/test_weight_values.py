"""The numbers that a weight stands for, in each form that it is held in, against what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import ModelError
from onnxcomp.model import Model, ModelSource
from onnxcomp.weight_values import WeightValues, sampled_places, weight_values
from onnxcomp_passes.cluster import Cluster
from onnxcomp_passes.pack import Pack
from onnxcomp_passes.quantize_dynamic import QuantizeDynamic
from onnxcomp_passes.quantize_weights import QuantizeWeights
from tests.models import external_model, graph_model, random_weights, run
from tests.test_weight_profiles import rewritten

MATMUL = "g (float[N,32] x) => (float[N,8] y) { [layer] y = MatMul(x, W) }"
DECODED = "g (float[N,32] x) => (float[N,8] y) {{ W = DequantizeLinear{attrs}({inputs}) [layer] y = MatMul(x, W) }}"


def codes(*shape: int, dtype: Any = np.int8) -> np.ndarray[Any, Any]:
    limits = np.iinfo(dtype)
    return np.random.default_rng(1).integers(limits.min, limits.max, shape, dtype, endpoint=True)


def decoded(attrs: str = "", opset: int = 21, **parts: Any) -> onnx.ModelProto:
    return graph_model(DECODED.format(attrs=attrs, inputs=", ".join(parts)), parts, opset=opset)


def four_bits() -> onnx.ModelProto:
    model = decoded("<axis = 0, block_size = 16>", q=codes(32, 8), s=random_weights(2, 8))
    packed = helper.make_tensor("q", TensorProto.INT4, (32, 8), np.random.default_rng(2).integers(-8, 8, 256))
    [place] = [index for index, tensor in enumerate(model.graph.initializer) if tensor.name == "q"]
    model.graph.initializer[place].CopyFrom(packed)
    return model


def nbits(bits: int, *, zeros: bool) -> onnx.ModelProto:
    """A MatMulNBits with two blocks of 16 inputs for each of 8 outputs."""
    rng = np.random.default_rng(bits)
    parts: dict[str, Any] = {
        "q": rng.integers(0, 256, (8, 2, 2 * bits), np.uint8),
        "s": random_weights(8, 2).ravel(),
    }
    if zeros:
        parts["z"] = rng.integers(0, 256, (8, -(-2 * bits // 8)), np.uint8).ravel()
    text = "g (float[N,32] x) => (float[N,8] y) { y = Relu(x) }"
    model = graph_model(text, parts)
    attrs: dict[str, Any] = {"K": 32, "N": 8, "bits": bits, "block_size": 16, "domain": "com.microsoft"}
    model.graph.node[0].CopyFrom(helper.make_node("MatMulNBits", ["x", *parts], ["y"], "layer", **attrs))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


FORMS: dict[str, Callable[[], ModelSource]] = {
    "float": lambda: graph_model(MATMUL, W=random_weights(32, 8)),
    "float16": lambda: graph_model(
        "g (float[N,32] x) => (float[N,8] y) { W = Cast<to = 1>(h) [layer] y = MatMul(x, W) }",
        h=random_weights(32, 8).astype(np.float16),
    ),
    "one scale": lambda: decoded(q=codes(32, 8), s=np.float32(0.02)),
    "one scale and zero point": lambda: decoded(
        q=codes(32, 8, dtype=np.uint8), s=np.float32(0.02), z=np.uint8(131)
    ),
    "a scale for each column": lambda: decoded(
        "<axis = 1>", q=codes(32, 8, dtype=np.uint8), s=random_weights(8), z=codes(8, dtype=np.uint8)
    ),
    "a scale for each row": lambda: decoded("<axis = -2>", q=codes(32, 8), s=random_weights(32)),
    "blocks": lambda: decoded("<axis = 0, block_size = 8>", q=codes(32, 8), s=random_weights(4, 8)),
    "blocks of 4 bits": four_bits,
    "MatMulNBits": lambda: nbits(4, zeros=False),
    "MatMulNBits with zero points": lambda: nbits(4, zeros=True),
    "MatMulNBits of 8 bits": lambda: nbits(8, zeros=True),
    "stored": lambda: rewritten(graph_model(MATMUL, W=random_weights(32, 8)), QuantizeWeights(min_elements=1)),
    "stored with zero points": lambda: rewritten(
        graph_model(MATMUL, W=random_weights(32, 8)), QuantizeWeights(min_elements=1, symmetric=False)
    ),
    "stored in blocks with zero points": lambda: rewritten(
        graph_model(MATMUL, W=random_weights(32, 8)), QuantizeWeights(min_elements=1, bits=4, block=16, symmetric=False)
    ),
    "packed": lambda: rewritten(
        graph_model(MATMUL.replace("32", "512"), W=random_weights(512, 8)), Cluster(bits=3), Pack()
    ),
}  # fmt: skip


def only_weight(model: ModelSource) -> WeightValues:
    [found] = weight_values(Model.load(model)).values()
    return found


def numbers(weight: WeightValues, places: Any = None) -> np.ndarray[Any, Any]:
    found = weight.read(places)
    assert found is not None
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_what_the_runtime_multiplies_with(form):
    model = FORMS[form]()
    weight = only_weight(model)
    [computed] = run(model, {"x": np.eye(weight.size // 8, dtype=np.float32)})

    values = numbers(weight).reshape(-1, 8) if weight.shape[0] != 8 else numbers(weight).reshape(weight.shape)
    np.testing.assert_allclose(values.T if form.startswith("MatMulNBits") else values, computed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_some_places_of_a_weight_are_those_of_all(form):
    weight = only_weight(FORMS[form]())
    places = np.array([0, 3, 77, 200, 255])
    np.testing.assert_array_equal(numbers(weight, places), numbers(weight)[places])


def test_of_a_weight_in_a_file_runs_of_places_are_read(tmp_path: Path):
    values = weight_values(Model.load(external_model(tmp_path)))
    for weight in values.values():
        places = np.array([0, 1, 2, 900, 901, 4095])
        np.testing.assert_array_equal(numbers(weight, places), numbers(weight)[places])
        assert len(numbers(weight, places[:0])) == 0
    assert len(values) == 2


def test_a_file_that_became_shorter_is_told(tmp_path: Path):
    weight = next(iter(weight_values(Model.load(external_model(tmp_path))).values()))
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ModelError, match="has changed since it was first read"):
        weight.read(np.array([0, 1]))


def test_the_scale_of_ranges_found_at_run_time_is_found_behind_the_product():
    weight = random_weights(32, 8)
    model = rewritten(graph_model(MATMUL, W=weight), QuantizeDynamic())
    [found] = [values for values in weight_values(model).values() if values.held.reader.op == "MatMulInteger"]

    step = np.abs(weight).max() / 127
    np.testing.assert_allclose(numbers(found).reshape(found.shape), weight, atol=step)


def test_codes_that_are_not_understood_have_no_values():
    model = graph_model(
        "g (uint8[N,32] x) => (int32[N,8] y) { [layer] y = MatMulInteger(x, q) }", q=codes(32, 8)
    )  # its scale may be anywhere
    assert only_weight(model).read() is None


def test_of_a_large_weight_the_same_places_are_drawn_each_time():
    assert sampled_places(100, 100) is None
    first, second = (sampled_places(1000, 100) for _ in range(2))
    assert first is not None
    np.testing.assert_array_equal(first, second)
    assert (len(first), first.min() >= 0, first.max() < 1000) == (100, True, True)
