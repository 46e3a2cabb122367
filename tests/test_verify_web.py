"""The web environment without Node and without a download: what it lacks, what is unpacked, and what it runs."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.verification.environments.web import FILES, VERSION, Web, environment
from tests.deployed import CPU, left_over, on_linux_x86, program
from tests.models import external_model, mlp_model

PROFILE = """[
{"cat": "Session", "name": "model_run", "args": {}},
{"cat": "Node", "name": "a_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}},
{"cat": "Node", "name": "b_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}},
{"cat": "Node", "name": "a_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}}
]"""


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """It is installed, out of a package that has more than is needed."""
    on_linux_x86(tmp_path, monkeypatch)
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in (*FILES, "webgpu.wasm"):
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    asked = []

    def fetch(package, sha256, folder):
        asked.append((package, sha256))
        return path

    monkeypatch.setattr(environment, "fetch_npm", fetch)
    monkeypatch.setattr(environment, "lacking_npm", lambda: None)
    Web().install(print)
    return asked


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Puts a shell script in the place of Node."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def write(script: str, version: str = "v20.1.2") -> None:
        program(tmp_path / "bin", "node", f'if [ "$1" = --version ]; then echo {version}; exit; fi\n{script}')

    return write


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp_model(), path)
    return path


def test_no_node_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Web().missing() == "node was not found: install Node 20 or newer"


def test_an_old_node_is_told_with_its_version(node):
    node("", "v18.20.4")
    assert Web().missing() == "Node is 18.20.4, expected 20 or newer: install a newer one"


def test_installs_what_is_needed_of_the_pinned_package_and_nothing_else(installed):
    assert {path.name for path in Web().folder.iterdir()} == {*FILES, "installed.json"}
    assert (Web().folder / FILES[0]).read_text() == FILES[0]
    assert installed == [(f"onnxruntime-web@{VERSION}", environment.PACKAGE_SHA256)]


def test_no_npm_is_told(monkeypatch, node, tmp_path):
    node("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(environment, "lacking_npm", lambda: "there is no npm")
    assert Web().missing() == "there is no npm"


def test_runs_the_script_with_the_job_and_counts_what_was_executed(node, model, tmp_path):
    echo = f"cp job.json {tmp_path}\ncp feeds results\necho a warning\ncat <<EOF\n{PROFILE}\nEOF\n"
    node(f"echo $* > {tmp_path}/words\n{echo}")
    feeds = [{"x": np.arange(8, dtype=np.float32)[None]}, {"x": np.ones((2, 8), np.float32)}]

    execution = Web().run(model, feeds, outputs=["y"], config={"session.disable_prepacking": "1"})

    assert (tmp_path / "words").read_text().split() == [str(environment.SCRIPT)]
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["runtime"] == str(tmp_path / "cache/onnxcomp/environments/web")
    assert job["model"] == str(model)
    assert (job["outputs"], job["externalData"]) == (["y"], [])
    assert job["config"] == {"session.disable_prepacking": "1"}
    for feed, output in zip(feeds, execution.outputs, strict=True):  # its outputs are the feeds
        np.testing.assert_array_equal(output["x"], feed["x"])
    assert execution.nodes == {CPU: {"Gemm": 2}}
    assert execution.versions == {"onnxruntime-web": VERSION, "node": "20.1.2"}
    assert left_over(tmp_path) == []


def test_the_files_of_the_weights_are_named(node, tmp_path):
    node(f"cp job.json {tmp_path}\ncp feeds results")

    Web().run(external_model(tmp_path), [])

    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["externalData"], job["folder"]) == (["weights.bin"], str(tmp_path))


def test_a_refusal_is_told_with_what_refused(node, model):
    node("echo noise >&2; printf 'no such\\n  operator' > refusal; exit 3")

    with pytest.raises(RuntimeFailure, match=f"^{model}: Node: no such operator$") as caught:
        Web().run(model, [])
    assert not isinstance(caught.value, WorkerDied)


def test_a_crash_is_told_with_the_last_line(node, model, tmp_path):
    node("echo RuntimeError: unreachable >&2; echo >&2; exit 3")

    with pytest.raises(
        WorkerDied, match=r"the process of Node died \(exit code 3; it last printed: RuntimeError: unre"
    ):
        Web().run(model, [])
    assert left_over(tmp_path) == []
