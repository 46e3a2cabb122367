"""The environment of Qualcomm's provider without a download: what it lacks, how it is installed, and what it counts."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RequirementError, RuntimeFailure, WorkerDied
from onnxcomp.verification.environments.qnn import Qnn, environment
from tests.models import mlp_model, random_inputs, run

CONTENT = {"onnxruntime_qnn/provider.so": b"the provider", "onnxruntime_qnn.libs/more.so": b"more"}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """A fit machine, a cache and a folder for temporary files of the test's own, and small files to be installed."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(environment, "FILES", {n: hashlib.sha256(data).hexdigest() for n, data in CONTENT.items()})
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A stand-in for pip's download of the wheel, the one that is pinned; gives the commands that were run."""
    wheel = tmp_path / environment.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in {**CONTENT, "onnxruntime_qnn/libQnnGpu.so": b"x" * 100}.items():
            archive.writestr(name, data)
    monkeypatch.setattr(environment, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    commands: list[list[str]] = []

    def download(command: list[str], folder: Path, what: str) -> None:
        assert what == "onnxruntime-qnn"
        commands.append(command)
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(environment, "run_client", download)
    return commands


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp_model(), path)
    return path


def left_over(tmp_path: Path) -> list[str]:
    """Files and folders in the places for temporary ones."""
    places = (tmp_path / "tmp", tmp_path / "cache/onnxcomp/environments")
    return [path.name for place in places if place.is_dir() for path in place.iterdir() if path.name != "qnn"]


# --- what it lacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("machine", "aarch64", "this machine is Linux on aarch64; Qualcomm's simulator needs Linux on x86_64"),
        ("system", "Darwin", "this machine is Darwin on x86_64; Qualcomm's simulator needs Linux on x86_64"),
        ("libc_ver", ("glibc", "2.31"), "the C library is glibc 2.31, expected glibc 2.35 or newer"),
        ("libc_ver", ("", ""), "the C library is unknown , expected glibc 2.35 or newer"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told(monkeypatch, name, value, message):
    monkeypatch.setattr(platform, name, lambda: value)

    missing = Qnn().missing()
    assert missing is not None
    assert missing.startswith(message)


@pytest.mark.parametrize(
    ("version", "fits"), [("1.24.1", False), ("1.22.0", False), ("1.24.2", True), ("1.32.0.dev1", True)]
)
def test_an_onnx_runtime_that_takes_no_such_provider_is_told(monkeypatch, version, fits):
    monkeypatch.setattr(environment, "version", lambda _: version)

    wanted = "onnxruntime-qnn 2.7.0 is not installed" if fits else f"onnxruntime is {version}, expected 1.24.2 or newer"
    missing = Qnn().missing()
    assert missing is not None
    assert missing.startswith(wanted)


# --- installing -------------------------------------------------------------------------------------------------------


def test_installs_what_is_needed_and_nothing_else(downloads, tmp_path):
    Qnn().install(print)

    assert Qnn().missing() is None
    found = {str(path.relative_to(Qnn().folder)): path.read_bytes() for path in Qnn().folder.rglob("*.so")}
    assert found == CONTENT
    [command] = downloads
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[-1] == "onnxruntime-qnn==2.7.0"
    assert left_over(tmp_path) == []


def test_a_second_install_does_nothing_and_a_damaged_one_is_made_anew(downloads):
    Qnn().install(print)
    Qnn().install(print)
    assert len(downloads) == 1
    path = Qnn().folder / "onnxruntime_qnn.libs/more.so"
    path.write_bytes(b"mor3")

    missing = Qnn().missing()
    assert missing is not None
    assert f"is damaged ({path}): install it" in missing
    Qnn().install(print)

    assert Qnn().missing() is None
    assert len(downloads) == 2


def test_another_wheel_than_the_pinned_one_is_refused(downloads, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "WHEEL_SHA256", "0" * 64)

    with pytest.raises(RequirementError, match=r"onnxruntime_qnn-2.*\.whl: its sha256 is .*, expected 0+: .* do not"):
        Qnn().install(print)

    assert not Qnn().folder.exists()
    assert left_over(tmp_path) == []


# --- counting ---------------------------------------------------------------------------------------------------------


def write_profile(folder: Path, executed: list[tuple[str, str, str]]) -> tuple[Path, Path]:
    """A profile of (provider, operator, name), and two parts of a graph that were given to the provider."""
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": operator, "provider": provider}}
        for provider, operator, name in executed
    ]
    (folder / "profile.json").write_text(json.dumps(events))
    parts = [
        ["QNNExecutionProvider", ["Conv", "QuantizeLinear", "Conv"]],
        ["CPUExecutionProvider", ["Erf"]],
        ["QNNExecutionProvider", ["Gemm"]],
    ]
    (folder / "assigned.json").write_text(json.dumps(parts))
    return folder / "profile.json", folder / "assigned.json"


def test_the_nodes_in_executed_parts_count_and_so_do_those_that_fell_back(tmp_path):
    cpu, qnn = "CPUExecutionProvider", "QNNExecutionProvider"
    paths = write_profile(tmp_path, [(qnn, "QNN_7_1", "a"), (cpu, "Erf", "e"), (qnn, "QNN_7_2", "b")])

    assert environment.executed_parts(*paths) == {qnn: {"Conv": 2, "QuantizeLinear": 1, "Gemm": 1}, cpu: {"Erf": 1}}


def test_parts_that_were_not_all_executed_are_only_counted(tmp_path):
    paths = write_profile(tmp_path, [("QNNExecutionProvider", "QNN_7_1", "a")])

    assert environment.executed_parts(*paths) == {"QNNExecutionProvider": {"compiled part": 1}}


def test_what_was_only_planned_does_not_count(tmp_path):
    assert environment.executed_parts(*write_profile(tmp_path, [])) == {}


# --- running ----------------------------------------------------------------------------------------------------------


def test_plain_is_the_cpu_provider_in_a_process_of_its_own(model, tmp_path):
    feeds = [random_inputs(model, seed=seed, batch=seed + 1) for seed in range(2)]

    execution = Qnn().run(model, feeds, plain=True)

    for feed, output in zip(feeds, execution.outputs, strict=True):
        np.testing.assert_array_equal(output["y"], run(model, feed, optimized=True)[0])
    assert execution.nodes == {"CPUExecutionProvider": {"FusedGemm": 1, "Gemm": 1}}
    assert list(execution.versions) == ["onnxruntime"]
    assert left_over(tmp_path) == []


def test_a_refusal_is_one_line_in_onnx_runtimes_words(model, tmp_path):
    with pytest.raises(RuntimeFailure, match=f"^{model}: .*Got: 3 Expected: 8.*$") as caught:
        Qnn().run(model, [{"x": np.zeros((1, 3), np.float32)}], plain=True)

    assert not isinstance(caught.value, WorkerDied)
    assert "\n" not in str(caught.value)
    assert left_over(tmp_path) == []


def test_the_job_names_the_library_the_simulator_and_its_architecture(model, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(
        f"import pathlib, shutil, sys; shutil.copy(sys.argv[1], {str(tmp_path)!r}); sys.exit('no library')"
    )
    monkeypatch.setattr(environment, "SCRIPT", tmp_path / "script.py")

    with pytest.raises(WorkerDied, match=r"onnxruntime-qnn died \(exit code 1; it last printed: no library\)"):
        Qnn().run(model, [], config={"session.disable_cpu_ep_fallback": "1"})

    job = json.loads((tmp_path / "job.json").read_text())
    folder = tmp_path / "cache/onnxcomp/environments/qnn/onnxruntime_qnn"
    assert job["library"] == str(folder / "libonnxruntime_providers_qnn.so")
    assert job["options"] == {
        "backend_path": str(folder / "libQnnHtp.so"),
        "htp_arch": "75",
        "offload_graph_io_quantization": "0",
    }
    assert job["config"] == {"session.disable_cpu_ep_fallback": "1"}
