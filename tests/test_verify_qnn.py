"""The environment of Qualcomm's provider without a download: what it lacks, what is unpacked, and what it counts."""

from __future__ import annotations

import zipfile

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RuntimeFailure
from onnxcomp.verification.environments import qnn
from onnxcomp.verification.environments.base import Execution, with_compiled_parts
from onnxcomp.verification.environments.foreign import ForeignPython
from onnxcomp.verification.environments.qnn import Qnn
from tests.deployed import CPU, left_over, on_linux_x86
from tests.models import mlp_model, random_inputs, run

QNN = "QNNExecutionProvider"


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """It is installed, on a fit machine, out of a wheel that has more than is needed."""
    on_linux_x86(tmp_path, monkeypatch)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*qnn.FILES, "onnxruntime_qnn/libQnnGpu.so"):
            archive.writestr(name, name)
    asked = []

    def fetch(package, sha256, folder, **more):
        asked.append((package, sha256, more))
        return wheel

    monkeypatch.setattr(qnn, "fetch_wheel", fetch)
    Qnn().install(print)
    return asked


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp_model(), path)
    return path


@pytest.mark.parametrize(
    ("version", "fits"), [("1.24.1", False), ("1.22.0", False), ("1.24.2", True), ("1.32.0.dev1", True)]
)
def test_an_onnx_runtime_that_takes_no_such_provider_is_told(monkeypatch, version, fits):
    monkeypatch.setattr(qnn, "version", lambda _: version)

    told = None if fits else f"onnxruntime is {version}, expected 1.24.2 or newer: pip install -U onnxruntime"
    assert Qnn().missing() == told


def test_installs_what_is_needed_of_the_pinned_wheel_and_nothing_else(installed):
    found = {str(path.relative_to(Qnn().folder)) for path in Qnn().folder.rglob("*") if path.is_file()}

    assert found == {*qnn.FILES, "installed.json"}
    platform = {"python": "3.11", "platforms": ["manylinux_2_35_x86_64"]}
    assert installed == [("onnxruntime-qnn==2.7.0", qnn.WHEEL_SHA256, platform)]


# --- counting ---------------------------------------------------------------------------------------------------------

PARTS = [(QNN, ["Conv", "QuantizeLinear", "Conv"]), (CPU, ["Erf"]), (QNN, ["Gemm"])]


def test_the_nodes_in_executed_parts_count_and_so_do_those_that_fell_back():
    profiled = {QNN: {"QNN_7_1": 1, "QNN_7_2": 1}, CPU: {"Erf": 1}}

    counted = with_compiled_parts(profiled, PARTS, QNN)

    assert counted == {QNN: {"Conv": 2, "QuantizeLinear": 1, "Gemm": 1}, CPU: {"Erf": 1}}


def test_parts_that_were_not_all_executed_are_only_counted():
    assert with_compiled_parts({QNN: {"QNN_7_1": 1}}, PARTS, QNN) == {QNN: {"compiled part": 1}}


def test_what_was_only_planned_does_not_count():
    assert with_compiled_parts({}, PARTS, QNN) == {}


# --- running ----------------------------------------------------------------------------------------------------------


def test_plain_is_the_cpu_provider_in_a_process_of_its_own(model, tmp_path):
    feeds = [random_inputs(model, seed=seed, batch=seed + 1) for seed in range(2)]

    execution = Qnn().run(model, feeds, plain=True)

    for feed, output in zip(feeds, execution.outputs, strict=True):
        np.testing.assert_array_equal(output["y"], run(model, feed, optimized=True)[0])
    assert execution.nodes == {CPU: {"FusedGemm": 1, "Gemm": 1}}
    assert "onnxruntime-qnn" not in execution.versions
    assert left_over(tmp_path) == []


def test_a_library_that_cannot_be_loaded_is_told(model, tmp_path):
    library = r"onnxruntime_qnn/libonnxruntime_providers_qnn\.so"
    with pytest.raises(RuntimeFailure, match=rf"^{model}: HTP 75 simulated: .*{library}"):
        Qnn().run(model, [])
    assert left_over(tmp_path) == []


def test_the_plug_in_is_the_library_with_the_simulator_and_its_architecture(model, monkeypatch):
    called = []

    def answer(python, job, plugin=None):
        called.append((job.config, plugin))
        return Execution([], {}, "", {"onnxruntime": "1.32.0"})

    monkeypatch.setattr(ForeignPython, "run", answer)
    execution = Qnn().run(model, [], config={"session.disable_cpu_ep_fallback": "1"})

    [(config, plugin)] = called
    folder = Qnn().folder / "onnxruntime_qnn"
    assert config == {"session.disable_cpu_ep_fallback": "1"}
    assert (plugin.provider, plugin.library) == (QNN, str(folder / "libonnxruntime_providers_qnn.so"))
    assert plugin.chosen == {
        "backend_path": str(folder / "libQnnHtp.so"),
        "htp_arch": "75",
        "offload_graph_io_quantization": "0",
    }
    assert execution.versions == {"onnxruntime": "1.32.0", "onnxruntime-qnn": "2.7.0"}
