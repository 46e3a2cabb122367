"""`verify`: the layers that need only the wheel, the lints among what it finds, and how it tells."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from rich.console import Console

import onnxcomp
from onnxcomp.cli import main
from onnxcomp.errors import ModelError, OptionError, RequirementError, RuntimeFailure
from onnxcomp.model import Model
from onnxcomp.report.verification import print_verification
from onnxcomp.runtime import Feed, Runtime
from onnxcomp.verification import Verification, elsewhere, verify
from onnxcomp.verification.always import ort_runtime
from onnxcomp.verification.coverage import coverages
from onnxcomp.verification.differences import difference, too_far
from onnxcomp.verification.environments import Environment, Execution
from onnxcomp.verification.environments.base import executed_nodes
from onnxcomp.verification.results import Difference, LayerResult
from onnxcomp.verification.steps import expose_codes, parting_nodes
from tests import traps
from tests.models import graph_model, mlp_model, random_weights

WHEEL = ["cpu", "ort"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A float Conv, and a quantized one that is near to it."""
    quantized = traps.conv(activations="int8")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    floats = (weights["W"] * weights["sw"].reshape(-1, 1, 1, 1)).astype(np.float32)
    original = graph_model(
        "g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] y) { c = Conv<pads = [1, 1, 1, 1]>(x, W, b) y = Relu(c) }",
        W=floats,
        b=(weights["B"] * weights["sb"]).astype(np.float32),
    )
    paths = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    for path, model in zip(paths, (original, quantized), strict=True):
        Model.load(model).save(path)
    return paths


@pytest.fixture
def data() -> dict[str, Any]:
    return {"x": np.random.default_rng(0).uniform(-2, 2, (12, 3, 8, 8)).astype(np.float32)}


def layers(found: Verification) -> list[tuple[str, str, str]]:
    return [(layer.name, layer.what, layer.status) for layer in found.layers]


# --- the layers of the wheel ------------------------------------------------------------------------------------------


def test_a_sound_model_passes_each_way_of_running_it(pair, data):
    found = verify(*pair, data=data, target="arm64", layers=WHEEL)
    assert layers(found) == [
        ("cpu", "as it is", "ran"),
        ("cpu", "optimizations off", "ran"),
        ("ort", "written and read again", "ran"),
    ]
    assert found.passed
    assert found.data["samples"] == 12


def test_arm_fusions_are_tried_for_other_targets_too(pair, data):
    found = verify(*pair, data=data, target="x86-vnni", layers=["cpu"])
    assert ("cpu", "ARM's int8 fusions", "ran") in layers(found)


def test_kernels_are_those_that_ran(pair, data):
    found = verify(*pair, data=data, target="arm64", layers=WHEEL)
    kernels = [next(iter(layer.nodes.values())) for layer in found.layers]
    assert kernels[0]["QLinearConv"] == 1
    assert kernels[1]["Conv"] == 1
    assert kernels[2]["com.microsoft:QLinearConv"] == 1


def test_a_model_that_optimizations_change_fails(tmp_path):
    """A bias in another scale than that of the products: the int8 kernel adds it unseen."""
    Model.load(traps.gemm(8.0)).save(tmp_path / "m.onnx")
    found = verify(tmp_path / "m.onnx", tmp_path / "m.onnx", target="x86-vnni", layers=["cpu"])
    failed = [layer for layer in found.layers if layer.status == "failed"]
    assert [layer.what for layer in failed] == ["optimizations off"]
    assert "its outputs differ from" in failed[0].reason
    assert not found.passed


def test_an_ort_file_is_run_and_linted(pair, data, tmp_path):
    with ort_runtime() as runtime:
        runtime.convert(pair[1], tmp_path / "m.ort")
    found = verify(pair[0], tmp_path / "m.ort", data=data, target="arm64", layers=WHEEL)
    assert layers(found) == [("cpu", "as it is", "ran"), ("ort", "written and read again", "skipped")]
    assert next(iter(found.layers[0].nodes.values()))["com.microsoft:QLinearConv"] == 1
    assert (
        verify(pair[0], tmp_path / "m.ort", data=data, target="xnnpack", layers=[]).findings[0].id == "ort-for-provider"
    )


def test_an_error_of_a_lint_fails_the_whole_and_a_warning_does_not(pair, data):
    assert not verify(*pair, data=data, target="xnnpack", layers=[]).findings
    assert not verify(*pair, data=data, target="coreml", layers=[]).passed
    warned = verify(traps.conv(bias="float"), traps.conv(bias="float"), target="arm64", layers=[])
    assert {finding.severity for finding in warned.findings} == {"warning"}
    assert warned.passed


def test_what_cannot_be_verified_is_said(pair, data):
    told = {name: verify(*pair, data=data, target=name, layers=[]).unverified for name in ("nnapi", "coreml", "arm64")}
    assert "what NNAPI computes, and how fast, cannot be verified off the device" in told["nnapi"][0]
    assert "what CoreML computes" in told["coreml"][0]
    assert told["arm64"] == ("speed on the device cannot be verified here: measure it there",)


def test_models_that_do_not_fit_each_other_are_refused(pair):
    with pytest.raises(ModelError, match="they must fit"):
        verify(pair[0], mlp_model(), layers=[])


def test_an_unknown_layer_is_refused(pair):
    with pytest.raises(OptionError, match="no layer is called 'phone'"):
        verify(*pair, layers=["phone"])


def test_the_always_layer_costs_at_most_three_times_running_both_models(tmp_path):
    """Counted in runs of models, which do not depend on the clock; benchmarks/verify_cost.py measures it."""
    sizes = (256, 512, 512, 16)
    original, new = tmp_path / "a.onnx", tmp_path / "b.onnx"
    Model.load(mlp_model(sizes)).save(original)
    Model.load(mlp_model(sizes)).save(new)
    found = verify(original, new, data={"x": random_weights(4000, 256)}, layers=WHEEL)
    assert sum(layer.versus_cpu.samples for layer in found.layers if layer.versus_cpu) <= 4 * 8


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_nnapi_takes_nothing_of_a_dynamic_model_and_all_of_a_fixed_one(tmp_path):
    counts = []
    for batch in ("N", "1"):
        Model.load(traps.conv(batch=batch)).save(tmp_path / "m.onnx")
        with Runtime() as runtime:
            nnapi, coreml = coverages(runtime, tmp_path / "m.onnx")
        counts.append((nnapi.supported, nnapi.nodes))
        assert coreml.unsupported == ("ai.onnx:DequantizeLinear", "ai.onnx:QuantizeLinear")
    (dynamic, _), (fixed, nodes) = counts
    assert dynamic < nodes == fixed


# --- differences ------------------------------------------------------------------------------------------------------


def test_equal_runs_are_equal_bit_for_bit():
    runs = [[np.array([[1.0, np.nan]], np.float32)]]
    assert difference(runs, runs) == Difference(1, True, 0.0, math.inf, 0.0, 1.0)


def test_a_difference_tells_its_size_and_the_classes_that_changed():
    one = [[np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)]]
    other = [[np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)]]
    found = difference(one, other, samples=2)
    assert (found.samples, found.equal, found.max_abs, found.agreement) == (2, False, 3.0, 0.5)


def test_outputs_of_other_shapes_are_infinitely_far():
    found = difference([[np.zeros(3, np.float32)]], [[np.zeros(4, np.float32)]])
    assert found.error == math.inf


def gap(error: float) -> Difference:
    return Difference(1, error == 0, error, 0.0, 0.0)


@pytest.mark.parametrize(
    ("here", "there", "apart", "fails"),
    [
        (0.0, 0.0, 0.0, False),
        (0.0, 1e-4, 1e-4, False),
        (0.0, 2e-3, 2e-3, True),
        (0.02, 0.039, 0.03, False),
        (0.02, 0.05, 0.04, True),
        (0.2, 0.25, 0.11, True),
        (math.inf, 1e-3, 0.0, False),
    ],
)
def test_a_loss_may_double_and_a_float_model_only_round(here, there, apart, fails):
    assert bool(too_far(gap(here), gap(there), gap(apart))) == fails


# --- other environments -----------------------------------------------------------------------------------------------


class Faked(Environment):
    """The CPU provider of this process, with a fault that a test wants."""

    name: ClassVar[str] = "android"
    description: ClassVar[str] = "a fake"
    provider: ClassVar[str] = "XnnpackExecutionProvider"
    lacks: ClassVar[str | None] = None
    nodes: ClassVar[dict[str, dict[str, int]]] = {"XnnpackExecutionProvider": {"Conv": 1}}
    shift: ClassVar[float] = 0.0
    fault: ClassVar[Exception | None] = None
    broken_scale: ClassVar[bool] = False

    def missing(self) -> str | None:
        return self.lacks

    def install(self, progress: Callable[[str], None]) -> None:
        message = "it cannot be had"
        raise RequirementError(message)

    def run(
        self,
        model: Path,
        feeds: Sequence[Feed],
        *,
        outputs: Sequence[str] | None = None,
        plain: bool = False,
        config: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> Execution:
        if self.fault:
            raise self.fault
        proto = onnx.load(model)
        if self.broken_scale:
            zero = next(tensor for tensor in proto.graph.initializer if tensor.name == "W")
            codes = numpy_helper.to_array(zero).copy()
            codes.flat[0] -= 3
            zero.CopyFrom(numpy_helper.from_array(codes, "W"))
        changed = model.with_name("changed.onnx")
        onnx.save(proto, changed)
        names = list(outputs or [])
        with Runtime(session_config=dict(config or {})) as runtime:
            runs = list(runtime.run(changed, feeds, outputs=names))
        shifted = [
            {name: value + np.float32(self.shift) for name, value in zip(names, run, strict=True)} for run in runs
        ]
        return Execution(shifted, self.nodes, "a fake runtime")


@pytest.fixture
def fake(monkeypatch):
    def put(**faults: Any) -> None:
        cls = type("Fault", (Faked,), faults)
        monkeypatch.setattr("onnxcomp.verification.verifying.find_environment", lambda _: cls())

    return put


def elsewhere_on(pair: Any, data: Any, **options: Any) -> tuple[Verification, LayerResult]:
    found = verify(*pair, data=data, target="xnnpack", layers=["android"], **options)
    return found, found.layers[0]


def test_a_layer_that_gives_the_same_bits_ran(fake, pair, data):
    fake()
    found, layer = elsewhere_on(pair, data)
    assert (layer.status, layer.reason, layer.runtime) == ("ran", "", "a fake runtime")
    assert layer.versus_cpu is not None
    assert layer.versus_cpu.equal
    assert layer.differing == ()
    assert found.passed


def test_what_is_not_installed_is_skipped_with_the_reason_and_not_verified(fake, pair, data):
    fake(lacks="install it with --install")
    found, layer = elsewhere_on(pair, data)
    assert (layer.status, layer.reason) == ("skipped", "install it with --install")
    assert found.passed
    assert "NOT on android" in printed(found)


def test_an_installation_that_fails_is_skipped_with_its_reason(fake, pair, data):
    fake(lacks="not there")
    _, layer = elsewhere_on(pair, data, install=True)
    assert (layer.status, layer.reason) == ("skipped", "it cannot be had")


def test_what_fell_back_wholly_to_another_provider_fails(fake, pair, data):
    fake(nodes={"CPUExecutionProvider": {"Conv": 1}})
    _, layer = elsewhere_on(pair, data)
    assert layer.status == "failed"
    assert "all fell back to CPUExecutionProvider" in layer.reason


def test_what_fell_back_in_part_is_named(fake, pair, data):
    fake(nodes={"XnnpackExecutionProvider": {"Conv": 3}, "CPUExecutionProvider": {"Softmax": 1}})
    _, layer = elsewhere_on(pair, data)
    assert layer.status == "ran"
    assert layer.reason == "1 of 4 nodes fell back to CPUExecutionProvider, unverified there: Softmax"


def test_outputs_that_are_others_fail(fake, pair, data):
    fake(shift=1.0)
    found, layer = elsewhere_on(pair, data)
    assert layer.status == "failed"
    assert not found.passed


@pytest.mark.parametrize("fault", [RuntimeFailure("it refuses the model"), ValueError("'s' is of the type list")])
def test_a_refusal_fails_with_its_reason(fake, pair, data, fault):
    fake(fault=fault)
    _, layer = elsewhere_on(pair, data)
    assert (layer.status, layer.reason) == ("failed", str(fault))


def test_the_node_where_codes_part_is_named_with_its_steps(fake, pair, data):
    fake(broken_scale=True)
    _, layer = elsewhere_on(pair, data)
    assert [(node.node, node.op) for node in layer.differing] == [("conv", "Conv")]
    assert 1 <= layer.differing[0].steps <= 3
    assert 0 < layer.differing[0].share < 1


def test_nodes_that_cannot_be_looked_for_are_said_to_be_untold(fake, pair, data):
    def run(self: Faked, model: Path, feeds: Sequence[Feed], **options: Any) -> Execution:
        if model.name == "exposed.onnx":
            message = "it refuses so many outputs"
            raise RuntimeFailure(message)
        return Faked.run(self, model, feeds, **options)

    fake(broken_scale=True, run=run)
    _, layer = elsewhere_on(pair, data)
    assert layer.differing == ()
    assert layer.reason == "the nodes where codes differ cannot be told: it refuses so many outputs"


# --- where codes part -------------------------------------------------------------------------------------------------


def two_convs() -> Model:
    rng = np.random.default_rng(2)
    return Model.load(
        graph_model(
            """g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
                q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
                w = DequantizeLinear(W, sw, zw)
                [one] a = Conv<pads = [1, 1, 1, 1]>(d, w) aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z)
                [two] b = Conv<pads = [1, 1, 1, 1]>(ad, w) bq = QuantizeLinear(b, s, z) y = DequantizeLinear(bq, s, z)
            }""",
            s=np.asarray(0.05, np.float32),
            z=np.asarray(0, np.int8),
            W=rng.integers(-127, 128, (4, 4, 3, 3)).astype(np.int8),
            sw=np.asarray(0.004, np.float32),
            zw=np.asarray(0, np.int8),
        )
    )


def test_exposing_codes_keeps_the_kernels(tmp_path):
    model = two_convs()
    exposed, names = expose_codes(model)
    assert names == ["d", "ad", "y"]
    model.save(tmp_path / "a.onnx")
    exposed.save(tmp_path / "b.onnx")
    with Runtime(session_config={"session.qdqisint8allowed": "1"}) as runtime:
        counts = [runtime.census(tmp_path / name).counts()["QLinearConv"] for name in ("a.onnx", "b.onnx")]
    assert counts == [2, 2]


def test_only_the_first_node_of_a_difference_is_named():
    same = [np.zeros((1, 4))]
    ours = {"d": same, "ad": same, "y": same}
    theirs = {"d": same, "ad": [np.array([[0.0, 0.1, 0.0, 0.0]])], "y": [np.ones((1, 4))]}
    found = parting_nodes(two_convs(), ours, theirs)
    assert [(node.node, node.steps, node.share) for node in found] == [("one", 2, 0.25)]


def test_what_only_follows_from_an_earlier_difference_is_not_named():
    ours = {name: [np.zeros((1, 4))] for name in ("d", "ad", "y")}
    theirs = {name: [np.ones((1, 4))] for name in ("d", "ad", "y")}
    assert [node.op for node in parting_nodes(two_convs(), ours, theirs)] == ["QuantizeLinear"]


# --- the command ------------------------------------------------------------------------------------------------------


def printed(found: Verification) -> str:
    written = io.StringIO()
    print_verification(found, Console(file=written, width=200))
    return written.getvalue()


def test_the_command_tells_layers_lints_and_what_cannot_be_verified(pair):
    result = CliRunner().invoke(main, ["verify", *map(str, pair), "--target", "arm64", "--layers", "cpu,ort"])
    assert result.exit_code == 0, result.output
    assert "verified on cpu, ort" in result.output
    assert "optimizations off" in result.output
    assert "no data: inputs are made up" in result.output


def test_the_command_ends_with_3_where_a_lint_finds_an_error(pair):
    result = CliRunner().invoke(main, ["verify", *map(str, pair), "--target", "coreml", "--layers", "cpu"])
    assert result.exit_code == 3
    assert "FAILED: lint qdq-unsupported" in result.output
    assert "onnxcomp optimize --target coreml" in result.output


def test_the_json_has_all_of_it(pair, tmp_path):
    path = tmp_path / "v.json"
    arguments = ["verify", *map(str, pair), "--target", "arm64", "--layers", "cpu", "--json", str(path), "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    document = json.loads(path.read_text())
    assert document["passed"] is True
    assert [layer["status"] for layer in document["layers"]] == ["ran", "ran"]
    assert {covered["provider"] for covered in document["coverage"]} == {"NNAPI", "CoreML"}


def test_a_missing_model_is_one_line(tmp_path):
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1


def test_it_is_there_for_python():
    assert onnxcomp.verify is verify
    assert elsewhere.TRACED_SAMPLES >= 1


def test_providers_are_told_in_the_same_order_by_every_process(tmp_path: Path):
    names = [f"{letter}ExecutionProvider" for letter in "CHBGADFE"]
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "args": {"provider": name, "op_name": "Add"}} for name in names
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events))

    assert list(executed_nodes(tmp_path / "profile.json")) == sorted(names)
