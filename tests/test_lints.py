"""Each trap is found by its lint, on its target alone, and `optimize --target` takes it out."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcomp import optimize
from onnxcomp.errors import ModelError
from onnxcomp.lints import LINTS, lint_file, lint_model, mended_by
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.runtime import Runtime
from onnxcomp.targets import TARGETS, find_target
from onnxcomp.verification.always import ort_runtime
from onnxcomp_passes import Pack
from tests import traps
from tests.models import graph_model, mlp_model, run

TRAPS = {
    "uint8 Softmax at 1/255": (traps.softmax(), "xnnpack", "softmax-scale"),
    "Softmax range from few samples": (traps.softmax(0.5 / 255), "arm64", "softmax-range"),
    "uint8 with int8 weights": (traps.conv(), "xnnpack", "uint8-int8"),
    "no zero point": (traps.conv(activations="int8", weight_zero=None), "xnnpack", "weight-zero-point"),
    "weights with an offset": (traps.conv(activations="int8", weight_zero=3), "xnnpack", "weight-offset"),
    "int8 activations for NNAPI": (traps.conv(activations="int8"), "nnapi", "activation-type"),
    "int8 activations for QNN": (traps.conv(activations="int8"), "qnn", "activation-type"),
    "8 bits without reduce_range": (traps.conv(), "x86", "saturation"),
    "8 bits and int8 activations": (traps.conv(activations="int8"), "x86", "saturation"),
    "dynamic batch for NNAPI": (traps.conv(batch="N"), "nnapi", "dynamic-shape"),
    "Q/DQ for CoreML": (traps.conv(), "coreml", "qdq-unsupported"),
    "per-channel MatMul for QNN": (traps.matmul(), "qnn", "per-channel-matmul"),
    "a scale for each input of a product": (traps.matmul(axis=0), "web", "weight-axis"),
    "Concat of unlike scales": (traps.concat(), "x86-vnni", "concat-scales"),
    "a mask in the scale": (traps.mask(), "arm64", "mask-scale"),
    "a bias in another scale": (traps.gemm(8.0), "x86-vnni", "bias-scale"),
    "float bias": (traps.conv(bias="float"), "arm64", "float-bias"),
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime() as shared:
        yield shared


@pytest.mark.parametrize("name", TRAPS)
def test_the_trap_is_caught(name):
    model, target, lint = TRAPS[name]
    assert lint in traps.found(model, target)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axes_of_a_packed_weight_are_known(axis):
    model = Model.load(traps.matmul(axis=axis, shape=(2048, 8)))
    model.set_weight("W", np.sign(model.weight("W")).astype(np.int8))
    assert "W" in [change.where for change in Pack().rewrite(model, Context()).changed]

    assert ("weight-axis" in traps.found(model, "x86-vnni")) is (axis == 0)


@cache
def optimized(name: str) -> Model:
    model, target, _ = TRAPS[name]
    return optimize(model, target=target, timing=False).model


@pytest.mark.parametrize("name", TRAPS)
def test_optimizing_for_the_target_gives_a_model_without_the_trap(name):
    target = TRAPS[name][1]
    assert traps.found(optimized(name), target) & {lint for _, _, lint in TRAPS.values()} == set()


@pytest.mark.parametrize("name", TRAPS)
def test_the_model_without_the_trap_gives_nearly_the_same(name):
    model, _, lint = TRAPS[name]
    rng = np.random.default_rng(3)
    shapes = {info.name: [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim] for info in model.graph.input}
    feed = {name: rng.uniform(-2, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    fitted = optimized(name)
    before, after = (run(one, feed)[0] for one in (model, fitted))
    if lint in {"mask-scale", "concat-scales", "softmax-range"}:  # that was the ruin of them
        assert np.isfinite(after).all()
        return
    assert np.abs(before - after).max() <= 0.06  # one step of the output, 0.05, of a range of 12.8


def test_what_is_exact_changes_no_value():
    model = traps.conv()
    feed = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    fitted = optimize(model, target="xnnpack", timing=False).model
    np.testing.assert_array_equal(run(model, feed)[0], run(fitted, feed)[0])


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (traps.conv(activations="int8"), "arm64"),
        (traps.conv(activations="int8"), "xnnpack"),
        (traps.conv(limit=63), "x86"),
        (traps.conv(), "x86-vnni"),
        (traps.conv(), "nnapi"),
        (traps.conv(), "qnn"),
        (traps.softmax(1 / 256), "xnnpack"),
        (traps.softmax(1 / 255), "x86-vnni"),
        (traps.matmul(), "x86-vnni"),
        (traps.gemm(), "x86-vnni"),
        (mlp_model(), "web"),
    ],
)
def test_a_model_as_the_target_wants_it_is_clean(model, target):
    assert traps.found(model, target) == set()


def test_depthwise_channels_under_one_scale_are_told():
    assert "depthwise-per-tensor" in traps.found(traps.conv(depthwise=True, per_channel=False), "arm64")
    assert "depthwise-per-tensor" not in traps.found(traps.conv(depthwise=True), "arm64")


def test_a_scale_for_each_channel_below_opset_13_is_told_and_mended():
    model = traps.conv(opset=12)
    assert "per-channel-opset" in traps.found(model, "x86-vnni")
    result = optimize(model, target="x86-vnni", timing=False)
    assert traps.found(result.model, "x86-vnni") == set()
    assert any("does not load the model at opset 12" in note for note in result.report.notes)


def test_a_softmax_of_another_zero_point_is_refused_by_xnnpack_too():
    model = traps.softmax(1 / 256)
    next(tensor for tensor in model.graph.initializer if tensor.name == "zs").raw_data = b"\x05"
    assert "softmax-scale" in traps.found(model, "xnnpack")


def test_nothing_saturates_where_there_is_no_8_bit_kernel():
    """Activations of 16 bits, and transposed convolutions, run in float."""
    wide = traps.gemm()
    for tensor in wide.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(1 << 15, np.uint16), "z"))
    wide.opset_import[0].version = 21
    transposed = traps.conv()
    node = next(node for node in transposed.graph.node if node.op_type == "Conv")
    node.op_type = "ConvTranspose"
    assert "saturation" in traps.found(traps.gemm(), "x86")
    assert "saturation" not in traps.found(wide, "x86") | traps.found(transposed, "x86")


@pytest.mark.parametrize(("limit", "told"), [(127, {"qoperator-saturation"}), (63, set())])
def test_weights_of_8_bits_in_operators_of_their_own_saturate_too(limit, told):
    model = graph_model(
        """g (uint8[1, 4] x) => (int32[1, 2] y) { y = MatMulInteger(x, W, zx) }""",
        W=np.full((4, 2), limit, np.int8),
        zx=np.asarray(3, np.uint8),
    )
    assert traps.found(model, "x86") == told
    assert traps.found(model, "x86-vnni") == set()


def test_a_scale_of_0_in_a_concat_is_no_crash():
    model = traps.concat()
    next(tensor for tensor in model.graph.initializer if tensor.name == "ss").raw_data = bytes(4)
    assert "concat-scales" not in traps.found(model, "web")


@pytest.mark.parametrize("name", ["it's", 'a "name"', "two words"])
def test_a_dynamic_input_of_any_name_is_told_by_it(name):
    model = graph_model("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    found = lint_model(Model.load(model), find_target("nnapi"))
    assert [(finding.where, finding.what) for finding in found] == [(name, "the input is float32 (N, 2)")]


def test_an_input_with_any_number_of_axes_is_dynamic_too():
    model = graph_model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.ClearField("shape")
    (found,) = lint_model(Model.load(model), find_target("nnapi"))
    assert (found.id, found.what) == ("dynamic-shape", "the input is float32 with any number of axes")


def test_control_flow_is_told_for_qnn_only():
    model = graph_model(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <
                then_branch = a () => (float[2] t) { t = Relu(x) }, else_branch = b () => (float[2] e) { e = Neg(x) }
            >
        }"""
    )
    assert "control-flow" in traps.found(model, "qnn")
    assert "control-flow" not in traps.found(model, "arm64")


def test_a_newer_opset_than_the_oldest_runtime_has_is_told():
    model = graph_model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=23, ir_version=11)
    told = lint_model(Model.load(model), find_target("arm64"))
    assert [finding.what.split()[0] for finding in told if finding.id == "runtime-floor"] == ["opset", "IR"]


def test_a_layer_that_stays_float_between_codes_is_told_with_its_rule(runtime, tmp_path):
    model = traps.conv()
    relu = next(node for node in model.graph.node if node.op_type == "Conv")
    relu.output[0] = "r"
    model.graph.node.insert(4, helper.make_node("Tanh", ["r"], ["c"]))
    loaded = Model.load(model)
    loaded.save(tmp_path / "m.onnx")
    found = lint_model(loaded, find_target("x86-vnni"), runtime.census(tmp_path / "m.onnx"))
    assert [(finding.id, finding.where) for finding in found] == [("no-int8-kernel", "conv")]
    assert "no-output-q" in found[0].what


def test_external_data_are_told_where_a_model_is_loaded_from_memory(tmp_path):
    model = mlp_model((64, 64, 64))

    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    assert "external-data" in traps.found(Model.load(tmp_path / "m.onnx"), "web")
    assert "external-data" not in traps.found(Model.load(tmp_path / "m.onnx"), "x86-vnni")


# --- files in ONNX Runtime's own format -------------------------------------------------------------------------------


def test_a_file_in_the_runtime_style_is_told(tmp_path):
    """As `--optimization_style Runtime` of ONNX Runtime's own converter writes it."""
    model = graph_model(
        "g (float[1, 4, 8, 8] x) => (float[1, 8, 8, 8] y) { c = Conv<pads = [1, 1, 1, 1]>(x, W) y = Relu(c) }",
        W=np.ones((8, 4, 3, 3), np.float32),
    )
    Model.load(model).save(tmp_path / "m.onnx")
    with Runtime(
        session_config={"optimization.minimal_build_optimizations": "save"}, disabled_optimizers=["NchwcTransformer"]
    ) as runtime:
        runtime.convert(tmp_path / "m.onnx", tmp_path / "m.ort")
    assert "ort-runtime-style" in {finding.id for finding in lint_file(tmp_path / "m.ort", find_target("arm64"))}


def test_a_file_that_was_not_made_for_arm_is_told(tmp_path):
    Model.load(two_int8_convs()).save(tmp_path / "m.onnx")
    with Runtime(disabled_optimizers=["NchwcTransformer"]) as runtime:
        runtime.convert(tmp_path / "m.onnx", tmp_path / "x86.ort")
    with ort_runtime() as runtime:
        runtime.convert(tmp_path / "m.onnx", tmp_path / "arm.ort")
    found = [{f.id for f in lint_file(tmp_path / name, find_target("arm64"))} for name in ("x86.ort", "arm.ort")]
    assert found == [{"ort-unfused"}, set()]


def two_int8_convs() -> onnx.ModelProto:
    """A residual block: what is read twice cannot be made uint8 on x86."""
    rng = np.random.default_rng(2)
    return graph_model(
        """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
            w = DequantizeLinear(W, sw) v = DequantizeLinear(V, sw)
            a = Conv<pads = [1, 1, 1, 1]>(d, w) aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z)
            b = Conv<pads = [1, 1, 1, 1]>(ad, v) bq = QuantizeLinear(b, s, z) bd = DequantizeLinear(bq, s, z)
            t = Add(ad, bd) tq = QuantizeLinear(t, s, z) y = DequantizeLinear(tq, s, z)
        }""",
        s=np.asarray(0.05, np.float32),
        z=np.asarray(0, np.int8),
        W=rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
        V=rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
        sw=np.asarray(0.004, np.float32),
    )


def test_the_ort_format_is_refused_for_targets_with_another_provider(tmp_path):
    Model.load(mlp_model()).save(tmp_path / "m.onnx")
    with ort_runtime() as runtime:
        runtime.convert(tmp_path / "m.onnx", tmp_path / "m.ort")
    assert {f.id for f in lint_file(tmp_path / "m.ort", find_target("xnnpack"))} == {"ort-for-provider"}
    assert lint_file(tmp_path / "m.ort", find_target("arm64")) == ()


def test_a_broken_ort_file_is_told_in_one_line(tmp_path):
    (tmp_path / "m.ort").write_bytes(b"\x10\0\0\0ORTM" + bytes(range(64)))
    with pytest.raises(ModelError, match="broken"):
        lint_file(tmp_path / "m.ort", find_target("arm64"))
    (tmp_path / "n.ort").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="ORTM"):
        lint_file(tmp_path / "n.ort", find_target("arm64"))


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_lint_has_a_reason_a_fix_and_known_targets():
    for lint in LINTS.values():
        assert lint.why
        assert lint.fix
        assert lint.on <= TARGETS.keys()
        assert lint.mended_by in {"", "fit-target", "shapes", "deploy"}


def test_every_trap_that_the_pass_mends_is_tested():
    tested = {lint for _, _, lint in TRAPS.values()} | {"per-channel-opset"}
    assert mended_by("fit-target") <= tested


@pytest.mark.parametrize("axis", [0, 1])
def test_a_packed_weight_has_the_findings_that_it_has_dense(axis: int):
    """Its codes are computed, so that the graph tells no shape of them."""
    rng = np.random.default_rng(2)
    dense = traps.matmul(axis=axis, shape=(64, 48), codes=rng.choice([-100, -3, 0, 100], (64, 48)))
    model = Model.load(dense)
    changes = Pack().rewrite(model, Context())
    packed = Model.load(model.to_proto()).to_proto()

    assert changes.count == 1
    for target in TARGETS:
        assert traps.found(packed, target) == traps.found(dense, target), target
    assert ("weight-axis" in traps.found(packed, "x86-vnni")) == (axis == 0)
