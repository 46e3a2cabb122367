"""The layer `android` as it really runs: what XNNPACK executes, and what it computes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import RuntimeFailure
from onnxcomp.verification.environments.android import Android, installing
from onnxcomp.verification.environments.base import Execution
from onnxcomp_passes import Cluster, Pack, Prune, Quantize, Simplify
from tests.deployed import ARM_FUSION, CPU, Feeds, forced, image_feeds, installed, on_host, sample_model
from tests.models import (
    Array,
    assert_same_arrays,
    external_model,
    graph_model,
    if_model,
    loop_model,
    random_inputs,
    random_weights,
)

pytestmark = pytest.mark.slow

XNNPACK = "XnnpackExecutionProvider"
SAMPLES = 20
IMAGE = {"image": (1, 1, 28, 28)}


@pytest.fixture(scope="module")
def android(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Android]:
    """Installed anew, with every warning of the compiler an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installing, "_COMPILE", (*installing._COMPILE, "-Wall", "-Wextra", "-Werror"))
        with installed(Android, tmp_path_factory.mktemp("cache")) as environment:
            yield environment


@pytest.fixture(scope="module")
def images() -> Feeds:
    return image_feeds(SAMPLES)


def wheel(model: Path, feeds: Feeds) -> list[dict[str, Array]]:
    """What the CPU provider of the installed wheel computes, set to take int8 as a phone does."""
    return on_host(model, feeds, ARM_FUSION).outputs


def assert_same_runs(wanted: list[dict[str, Array]], got: list[dict[str, Array]], *, exact: bool = False) -> None:
    assert [list(run) for run in wanted] == [list(run) for run in got]
    for one, other in zip(wanted, got, strict=True):
        for name, value in one.items():
            assert_same_arrays(np.asarray(value), other[name], exact=exact)


def test_it_is_installed_in_one_folder_of_the_cache_and_then_there(android: Android):
    started = time.monotonic()
    android.install(lambda message: pytest.fail(f"installed again: {message}"))

    assert time.monotonic() - started < 5
    assert android.missing() is None
    assert 30e6 < sum(path.stat().st_size for path in android.folder.iterdir()) < 50e6


# --- the sample models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "executed"),
    [
        ("lenet", {"Gemm": 3}),
        ("mobilenet", {"Conv": 20, "Gemm": 1}),
        ("vit", {"MatMul": 16, "Conv": 1, "Gemm": 1}),
    ],
)
def test_xnnpack_executes_the_float_layers_and_computes_what_the_wheel_does(
    android: Android, images: Feeds, name: str, executed: dict[str, int]
):
    execution = android.run(sample_model(name), images)

    assert execution.nodes[XNNPACK] == executed
    assert execution.nodes[CPU]
    assert not set(execution.nodes[CPU]) & {"Conv", "Gemm", "FusedConv", "FusedGemm"}
    assert execution.runtime == "ONNX Runtime 1.29.0, Android, x86-64"
    assert_same_runs(wheel(sample_model(name), images), execution.outputs)


@pytest.mark.parametrize("name", ["lenet", "mobilenet", "vit"])
def test_plain_is_the_cpu_provider_alone(android: Android, images: Feeds, name: str):
    execution = android.run(sample_model(name), images, plain=True)

    assert set(execution.nodes) == {CPU}
    assert_same_runs(wheel(sample_model(name), images), execution.outputs)


@pytest.fixture(scope="module")
def int8_mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forced("mobilenet", "xnnpack", tmp_path_factory.mktemp("int8"), Simplify(), Quantize(), shapes=IMAGE)


def test_xnnpack_executes_every_int8_conv_and_computes_what_the_wheel_does(
    android: Android, images: Feeds, int8_mobilenet: Path
):
    execution = android.run(int8_mobilenet, images)
    plain = android.run(int8_mobilenet, images, plain=True, config=ARM_FUSION)

    assert execution.nodes[XNNPACK] == {"QLinearConv": 20, "Gemm": 1}
    assert not set(execution.nodes[CPU]) & {"QLinearConv", "Conv", "FusedConv", "Gemm"}
    assert plain.nodes[CPU]["QLinearConv"] == 20
    assert_same_runs(wheel(int8_mobilenet, images), execution.outputs)  # Gemm is in float
    assert_same_runs(plain.outputs, execution.outputs)


def test_without_the_phone_s_setting_the_cpu_provider_leaves_int8_convs_in_float(
    android: Android, images: Feeds, int8_mobilenet: Path
):
    plain = android.run(int8_mobilenet, images[:1], plain=True)
    assert plain.nodes[CPU]["QLinearConv"] < 20
    assert plain.nodes[CPU]["Conv"] > 0


def test_an_ort_file_has_no_int8_conv_for_xnnpack(
    android: Android, images: Feeds, int8_mobilenet: Path, tmp_path: Path
):
    shutil.copy(int8_mobilenet, tmp_path / "m.onnx")
    converter = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(tmp_path)]
    options = ["--optimization_style", "Fixed", "--target_platform", "arm"]
    subprocess.run([*converter, *options], check=True, capture_output=True)

    execution = android.run(tmp_path / "m.ort", images)

    assert execution.nodes[XNNPACK] == {"Gemm": 1}
    assert execution.nodes[CPU]["QLinearConv"] == 20
    assert_same_runs(wheel(tmp_path / "m.ort", images), execution.outputs)


@pytest.mark.parametrize(("name", "executed"), [("lenet", {"Gemm": 3}), ("mobilenet", {"Conv": 20, "Gemm": 1})])
def test_packed_weights_are_folded_before_xnnpack_takes_its_nodes(
    android: Android, images: Feeds, tmp_path: Path, name: str, executed: dict[str, int]
):
    packed = forced(name, "xnnpack", tmp_path, Simplify(), Prune(), Cluster(), Pack(), shapes=IMAGE)
    operators = {node.op_type for node in onnx.load(packed).graph.node}
    assert "Gather" in operators, "nothing was packed"

    execution = android.run(packed, images)

    assert execution.nodes[XNNPACK] == executed
    assert "Gather" not in execution.nodes[CPU]
    assert_same_runs(wheel(packed, images), execution.outputs)


# --- which quantized nodes XNNPACK takes ------------------------------------------------------------------------------


def quantized(
    body: str,
    dtype: str,
    weights: Mapping[str, Any] | None = None,
    *,
    scale: float = 0.03,
    zero_point: int | None = None,
    input_shape: str = "1, 4, 12, 12",
    output_shape: str = "1, 4, 6, 6",
) -> onnx.ModelProto:
    """`body` between quantized tensors of this type: it reads x, and its output's scale is `scale`."""
    middle = 3 if dtype == "int8" else 121
    text = f"""g (float[{input_shape}] input) => (float[{output_shape}] output) {{
        xq = QuantizeLinear(input, x_scale, x_zero)   x = DequantizeLinear(xq, x_scale, x_zero)
        {body}
        yq = QuantizeLinear(y, y_scale, y_zero)   output = DequantizeLinear(yq, y_scale, y_zero)
    }}"""
    scales: dict[str, Any] = {
        "x_scale": np.float32(0.03),
        "x_zero": np.array(middle, dtype),
        "y_scale": np.float32(scale),
        "y_zero": np.array(middle if zero_point is None else zero_point, dtype),
    }
    return graph_model(text, {name: np.asarray(value) for name, value in {**scales, **(weights or {})}.items()})


def quantized_conv(
    activations: str, weights: str, *, per_channel: bool, tail: str = "y = Identity(c)", zero_point: int | None = None
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    count = 8 if per_channel else 1
    scale = rng.uniform(0.004, 0.01, count).astype(np.float32)
    zero = np.zeros(count, weights) if weights == "int8" else np.full(count, 128, weights)
    values = {
        "W": rng.integers(-100, 101, (8, 4, 3, 3)).astype(weights)
        if weights == "int8"
        else rng.integers(28, 229, (8, 4, 3, 3)).astype(weights),
        "w_scale": scale if per_channel else scale[0],
        "w_zero": zero if per_channel else zero[0],
        "B": rng.integers(-500, 501, 8).astype(np.int32),
        "b_scale": scale * np.float32(0.03) if per_channel else scale[0] * np.float32(0.03),
    }
    axis = "<axis = 0>" if per_channel else ""
    body = f"""w = DequantizeLinear{axis}(W, w_scale, w_zero)   b = DequantizeLinear{axis}(B, b_scale)
        c = Conv(x, w, b)   {tail}"""
    return quantized(body, activations, values, scale=0.05, zero_point=zero_point, output_shape="1, 8, 10, 10")


def quantized_transposed_conv(*, per_channel: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.004, 0.01, 8 if per_channel else ()).astype(np.float32)
    values = {"W": rng.integers(-100, 101, (4, 8, 3, 3)).astype(np.int8), "w_scale": scale}
    zero = np.zeros(scale.shape, np.int8)
    axis = "<axis = 1>" if per_channel else ""
    body = f"w = DequantizeLinear{axis}(W, w_scale, w_zero)   y = ConvTranspose(x, w)"
    return quantized(body, "int8", {**values, "w_zero": zero}, scale=0.05, output_shape="1, 8, 14, 14")


def quantized_gemm() -> onnx.ModelProto:
    weights = np.random.default_rng(2).integers(-100, 101, (16, 8)).astype(np.int8)
    values = {"W": weights, "w_scale": np.float32(0.01), "w_zero": np.int8(0)}
    body = "w = DequantizeLinear(W, w_scale, w_zero)   y = Gemm(x, w)"
    return quantized(body, "int8", values, scale=0.05, input_shape="4, 16", output_shape="4, 8")


def quantized_softmax(dtype: str, scale: float) -> onnx.ModelProto:
    lowest = int(np.iinfo(dtype).min)
    return quantized("y = Softmax(x)", dtype, scale=scale, zero_point=lowest, output_shape="1, 4, 12, 12")


def feeds_for(model: onnx.ModelProto, batch: int = 1) -> Feeds:
    return [random_inputs(model, seed=seed, batch=batch) for seed in range(SAMPLES)]


def run_both(android: Android, model: onnx.ModelProto, folder: Path) -> tuple[Execution, list[dict[str, Array]]]:
    """What the environment and the wheel make of a model, both set as on a phone."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    feeds = feeds_for(model)
    return android.run(path, feeds, config=ARM_FUSION), wheel(path, feeds)


TAKEN = {
    "int8 by channel": (quantized_conv("int8", "int8", per_channel=True), "QLinearConv"),
    "int8 with one scale": (quantized_conv("int8", "int8", per_channel=False), "QLinearConv"),
    "uint8 with one scale": (quantized_conv("uint8", "uint8", per_channel=False), "QLinearConv"),
    "int8 before a Relu that rounding does too": (
        quantized_conv("int8", "int8", per_channel=True, tail="y = Relu(c)", zero_point=-128),
        "QLinearConv",
    ),
    "int8 ConvTranspose with one scale": (quantized_transposed_conv(per_channel=False), "QLinearConvTranspose"),
    "uint8 Softmax": (quantized_softmax("uint8", 1 / 256), "QLinearSoftmax"),
    "int8 MaxPool": (quantized("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", "int8"), "MaxPool"),
    "uint8 MaxPool": (quantized("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", "uint8"), "MaxPool"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_xnnpack_takes_a_quantized_node_and_is_equal_to_the_bit(android: Android, tmp_path: Path, case: str):
    model, operator = TAKEN[case]
    execution, wanted = run_both(android, model, tmp_path)
    plain = android.run(tmp_path / "model.onnx", feeds_for(model), plain=True, config=ARM_FUSION)

    assert execution.nodes[XNNPACK] == {operator: 1}
    assert_same_runs(wanted, execution.outputs, exact=True)
    assert_same_runs(plain.outputs, execution.outputs, exact=True)
    assert len({run["output"].tobytes() for run in execution.outputs}) == SAMPLES, "the outputs do not depend on inputs"


POOL = "y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)"

LEFT = {
    "uint8 and int8 by channel": (quantized_conv("uint8", "int8", per_channel=True), "QLinearConv"),
    "uint8 and int8 with one scale": (quantized_conv("uint8", "int8", per_channel=False), "QLinearConv"),
    "uint8 by channel": (quantized_conv("uint8", "uint8", per_channel=True), "QLinearConv"),
    "int8 before a Relu of its own": (
        quantized_conv("int8", "int8", per_channel=True, tail="y = Relu(c)"),
        "FusedConv",
    ),
    "int8 ConvTranspose by channel": (quantized_transposed_conv(per_channel=True), "ConvTranspose"),
    "int8 Gemm": (quantized_gemm(), "QGemm"),
    "int8 Softmax": (quantized_softmax("int8", 1 / 256), "QLinearSoftmax"),
    "int8 AveragePool": (quantized(POOL, "int8"), "QLinearAveragePool"),
    "uint8 AveragePool": (quantized(POOL, "uint8"), "QLinearAveragePool"),
    "int8 Add": (quantized("y = Add(x, x)", "int8", scale=0.06, output_shape="1, 4, 12, 12"), "QLinearAdd"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_xnnpack_does_not_take_is_seen_on_the_cpu_provider(android: Android, tmp_path: Path, case: str):
    model, operator = LEFT[case]
    execution, wanted = run_both(android, model, tmp_path)

    assert XNNPACK not in execution.nodes
    assert execution.nodes[CPU][operator] == 1
    assert_same_runs(wanted, execution.outputs)


def test_a_uint8_softmax_at_1_255_makes_the_session_fail(android: Android, tmp_path: Path):
    model = quantized_softmax("uint8", 1 / 255)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)

    with pytest.raises(
        RuntimeFailure, match=r"^\S+model\.onnx: ONNX Runtime's Android build: .*xnn_create_softmax_nc_qu8 failed"
    ) as caught:
        android.run(path, feeds_for(model))

    assert "\n" not in str(caught.value)
    assert_same_runs(wheel(path, feeds_for(model)), android.run(path, feeds_for(model), plain=True).outputs)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("mode", "steps"), [("align_corners", 0), ("half_pixel", 1)])
def test_xnnpack_resizes_8_bits_within_a_step(android: Android, tmp_path: Path, dtype: str, mode: str, steps: int):
    body = f'y = Resize<mode = "linear", coordinate_transformation_mode = "{mode}">(x, roi, sizes)'
    weights = {"roi": np.zeros(0, np.float32), "sizes": np.array([1, 1, 2, 2], np.float32)}
    model = quantized(body, dtype, weights, output_shape="1, 4, 24, 24")
    execution, wanted = run_both(android, model, tmp_path)

    assert execution.nodes[XNNPACK] == {"Resize": 1}
    away = max(
        np.abs(one["output"] - other["output"]).max() for one, other in zip(wanted, execution.outputs, strict=True)
    )
    assert round(float(away) / 0.03) == steps


@pytest.mark.parametrize(("axis", "taken"), [(0, True), (2, False)])
def test_a_dynamic_batch_stays_with_xnnpack_and_a_dynamic_height_does_not(
    android: Android, tmp_path: Path, axis: int, taken: bool
):
    model = quantized_conv("int8", "int8", per_channel=True)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_size"
    onnx.save(model, tmp_path / "model.onnx")
    feeds = [{"input": random_weights(*[5 if axis == place else size for place, size in enumerate((1, 4, 12, 12))])}]

    execution = android.run(tmp_path / "model.onnx", feeds, config=ARM_FUSION)

    assert execution.nodes[XNNPACK if taken else CPU]["QLinearConv"] == 1
    assert (XNNPACK in execution.nodes) == taken
    assert_same_runs(wheel(tmp_path / "model.onnx", feeds), execution.outputs, exact=True)


STRICT = {"session.disable_cpu_ep_fallback": "1"}


def test_partial_placement_can_be_made_an_error(android: Android, images: Feeds, tmp_path: Path):
    whole = graph_model("g (float[1, 8] x) => (float[1, 4] y) { y = Gemm(x, W) }", W=random_weights(8, 4))
    onnx.save(whole, tmp_path / "whole.onnx")

    execution = android.run(tmp_path / "whole.onnx", feeds_for(whole), config=STRICT)
    assert execution.nodes == {XNNPACK: {"Gemm": 1}}
    with pytest.raises(RuntimeFailure, match="fallback to CPU EP has been explicitly disabled"):
        android.run(sample_model("lenet"), images, config=STRICT)


# --- any model, any tensor --------------------------------------------------------------------------------------------

DTYPES = [
    "float32",
    "float16",
    "float64",
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
]


def test_tensors_of_every_type_and_shape_go_through_and_outputs_come_as_asked_for(android: Android, tmp_path: Path):
    shapes: list[list[int]] = [[], [3], [2, 0, 4], [2, 3], [1, 2, 3, 4, 5]]
    arrays, nodes, inputs, outputs = {}, [], [], []
    for number, dtype in enumerate(DTYPES):
        shape = shapes[number % len(shapes)]
        arrays[f"x{number}"] = (random_weights(*shape, seed=number, scale=50) if shape else np.float32(7)).astype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        inputs.append(helper.make_tensor_value_info(f"x{number}", kind, shape))
        outputs.append(helper.make_tensor_value_info(f"ÿ {number}", kind, shape))
        nodes.append(helper.make_node("Identity", [f"x{number}"], [f"ÿ {number}"]))
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, tmp_path / "model.onnx")
    feeds = [{name: np.asarray(value) for name, value in arrays.items()}] * 2

    execution = android.run(tmp_path / "model.onnx", feeds)
    chosen = android.run(tmp_path / "model.onnx", feeds, outputs=["ÿ 7", "ÿ 2"])

    assert_same_runs(wheel(tmp_path / "model.onnx", feeds), execution.outputs, exact=True)
    assert [list(run) for run in chosen.outputs] == [["ÿ 7", "ÿ 2"]] * 2


@pytest.mark.parametrize("make", [if_model, loop_model])
def test_subgraphs_run(android: Android, tmp_path: Path, make: Any):
    model = make()
    onnx.save(model, tmp_path / "model.onnx")
    feeds = [{name: np.asarray(value) for name, value in random_inputs(model, seed=1, batch=1).items()}]
    assert_same_runs(wheel(tmp_path / "model.onnx", feeds), android.run(tmp_path / "model.onnx", feeds).outputs)


def test_external_data_is_found_beside_the_model(android: Android, tmp_path: Path):
    path = external_model(tmp_path)
    feeds = feeds_for(onnx.load(path))
    assert_same_runs(wheel(path, feeds), android.run(path, feeds).outputs)


def test_no_feeds_only_load_the_model(android: Android):
    execution = android.run(sample_model("lenet"), [])
    assert (execution.outputs, execution.nodes) == ([], {})


REFUSED: dict[str, tuple[dict[str, Array], str]] = {
    "another name": ({"picture": np.zeros((1, 1, 28, 28), np.float32)}, r"Invalid input name: picture"),
    "no input": ({}, r"Missing Input: image|No Model Inputs|image"),
    "another shape": ({"image": np.zeros((1, 1, 28, 27), np.float32)}, r"Got invalid dimensions for input: image .*"),
    "another type": ({"image": np.zeros((1, 1, 28, 28))}, r"Unexpected input data type\. .*double.*float.*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_feed_that_does_not_fit_is_refused_in_the_runtime_s_words(android: Android, images: Feeds, case: str):
    feed, told = REFUSED[case]
    with pytest.raises(RuntimeFailure, match=rf"^\S+fashion_lenet\.onnx: ONNX Runtime's Android build: {told}$"):
        android.run(sample_model("lenet"), [images[0], feed])


def test_a_model_that_cannot_be_loaded_is_refused_in_the_runtime_s_words(android: Android, tmp_path: Path):
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    with pytest.raises(
        RuntimeFailure, match=r"^\S+rubbish\.onnx: ONNX Runtime's Android build: Protobuf parsing failed\.$"
    ):
        android.run(tmp_path / "rubbish.onnx", [])

    newer = graph_model("g (float[1] x) => (float[1] y) { y = Relu(x) }", ir_version=99)
    onnx.save(newer, tmp_path / "newer.onnx")
    with pytest.raises(
        RuntimeFailure, match=r"^\S+newer\.onnx: ONNX Runtime's Android build: Unsupported model IR version: 99"
    ):
        android.run(tmp_path / "newer.onnx", [])


def test_outputs_that_are_no_tensors_of_numbers_are_refused(android: Android, tmp_path: Path):
    text = "g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }"
    onnx.save(graph_model(text), tmp_path / "sequence.onnx")
    with pytest.raises(RuntimeFailure, match=r"the output y is no tensor$"):
        android.run(tmp_path / "sequence.onnx", [{"x": np.zeros(2, np.float32)}])

    words = graph_model("g (float[2] x) => (string[2] y) { y = Cast<to = 8>(x) }")
    assert words.graph.output[0].type.tensor_type.elem_type == TensorProto.STRING
    onnx.save(words, tmp_path / "words.onnx")
    with pytest.raises(RuntimeFailure, match=r"the output y has the element type 8, which cannot be handed over$"):
        android.run(tmp_path / "words.onnx", [{"x": np.zeros(2, np.float32)}])
