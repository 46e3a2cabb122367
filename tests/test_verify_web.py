"""The web environment without Node and without a download: what it lacks, how it is installed, and what it runs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import stat
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.errors import RequirementError, RuntimeFailure, WorkerDied
from onnxcomp.verification.environments.web import Web, environment
from tests.models import external_model, mlp_model

NODE = 'if [ "$1" = --version ]; then echo v20.1.2; exit; fi\n'
CONTENT = {"ort.wasm.min.mjs": b"the script", "ort.wasm": b"the build"}
PROFILE = """[
{"cat": "Session", "name": "model_run", "args": {}},
{"cat": "Node", "name": "a_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}},
{"cat": "Node", "name": "b_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}},
{"cat": "Node", "name": "a_kernel_time", "args": {"op_name": "Gemm", "provider": "CPUExecutionProvider"}}
]"""


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """A cache and a folder for temporary files of the test's own, and small files to be installed."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(environment, "FILES", {n: hashlib.sha256(data).hexdigest() for n, data in CONTENT.items()})


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts a shell script in the place of a command; only what such scripts use is on the path besides."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cat", "cp", "sleep", "touch"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setenv("PATH", str(folder))

    def write(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    write("node", NODE)
    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with what is needed and more, the one that is pinned."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {**CONTENT, "webgpu.wasm": b"x" * 100}.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    integrity = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(environment, "INTEGRITY", integrity)
    return path


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(mlp_model(), path)
    return path


def npm_that_gets(package: Path) -> str:
    return f'echo "$@" >> {package.parent}/calls\ncp {package} onnxruntime-web-{environment.VERSION}.tgz\n'


def left_over(tmp_path: Path) -> list[str]:
    """Files and folders in the places for temporary ones."""
    places = (tmp_path / "tmp", tmp_path / "cache/onnxcomp/environments")
    return [path.name for place in places if place.is_dir() for path in place.iterdir() if path.name != "web"]


# --- what it lacks ----------------------------------------------------------------------------------------------------


def test_no_node_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert Web().missing() == "node was not found: install Node 20 or newer"


def test_an_old_node_is_told_with_its_version(commands):
    commands("node", "echo v18.20.4\n")

    assert Web().missing() == "Node is 18.20.4, expected 20 or newer: install a newer one"


def test_what_is_not_installed_is_told_with_its_size(commands, tmp_path):
    missing = Web().missing()

    assert missing is not None
    assert f"is not installed ({tmp_path}/cache/onnxcomp/environments/web/ort.wasm.min.mjs): install it" in missing


# --- installing -------------------------------------------------------------------------------------------------------


def test_installs_what_is_needed_and_nothing_else(commands, package, tmp_path):
    commands("npm", npm_that_gets(package))
    told: list[str] = []

    Web().install(told.append)

    assert Web().missing() is None
    assert {path.name: path.read_bytes() for path in Web().folder.iterdir()} == CONTENT
    assert (tmp_path / "calls").read_text().split() == [
        "pack",
        f"onnxruntime-web@{environment.VERSION}",
        "--ignore-scripts",
        "--silent",
    ]
    assert told == [f"downloading onnxruntime-web {environment.VERSION} (33 MB)"]
    assert left_over(tmp_path) == []


def test_a_second_install_does_nothing(commands, package, tmp_path):
    commands("npm", npm_that_gets(package))
    Web().install(print)
    inode = Web().folder.stat().st_ino

    Web().install(print)

    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert Web().folder.stat().st_ino == inode


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_damaged_folder_is_told_and_made_anew(commands, package, damage):
    commands("npm", npm_that_gets(package))
    Web().install(print)
    path = Web().folder / "ort.wasm"
    path.unlink() if damage == "removed" else path.write_bytes(b"the bu1ld")

    missing = Web().missing()
    assert missing is not None
    assert f"is damaged ({path}): install it" in missing
    Web().install(print)

    assert Web().missing() is None
    assert path.read_bytes() == b"the build"


def test_another_package_than_the_pinned_one_is_refused(commands, package, tmp_path):
    package.write_bytes(package.read_bytes() + b"\0")
    commands("npm", npm_that_gets(package))

    with pytest.raises(RequirementError, match=r"onnxruntime-web-.*\.tgz: its sha512 is .*, expected .*do not use it"):
        Web().install(print)

    assert not Web().folder.exists()
    assert left_over(tmp_path) == []


def test_an_npm_that_fails_is_told_with_its_last_line(commands, tmp_path):
    commands("npm", "echo first >&2; echo npm error network >&2; exit 7")

    with pytest.raises(RequirementError, match=r"^onnxruntime-web: npm ended with exit code 7: npm error network$"):
        Web().install(print)

    assert left_over(tmp_path) == []


def test_an_npm_that_gets_nothing_is_told(commands):
    commands("npm", "exit 0")

    with pytest.raises(
        RequirementError, match=r"^onnxruntime-web-.*\.tgz: expected it to be downloaded, found nothing"
    ):
        Web().install(print)


def test_no_npm_is_told(commands):
    with pytest.raises(RequirementError, match=r"^onnxruntime-web: npm was not found; install it and run this again$"):
        Web().install(print)


def test_a_cache_that_cannot_be_written_to_is_told(commands, package, tmp_path):
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(RequirementError, match=r"environments/web: cannot be written .*set XDG_CACHE_HOME"):
        Web().install(print)


# --- running ----------------------------------------------------------------------------------------------------------


def test_runs_the_script_with_the_job_and_counts_what_was_executed(commands, model, tmp_path):
    echo = f"cp job.json {tmp_path}\ncp feeds results\necho a warning\ncat <<EOF\n{PROFILE}\nEOF\n"
    commands("node", f"{NODE}echo $1 $2 > {tmp_path}/words\n{echo}")
    feeds = [{"x": np.arange(8, dtype=np.float32)[None]}, {"x": np.ones((2, 8), np.float32)}]

    execution = Web().run(model, feeds, outputs=["y"], config={"session.disable_prepacking": "1"})

    assert (tmp_path / "words").read_text().split() == [str(environment.SCRIPT), "job.json"]
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["runtime"] == str(tmp_path / "cache/onnxcomp/environments/web")
    assert job["model"] == str(model)
    assert (job["outputs"], job["externalData"]) == (["y"], [])
    assert job["config"] == {"session.disable_prepacking": "1"}
    for feed, output in zip(feeds, execution.outputs, strict=True):  # its outputs are the feeds
        np.testing.assert_array_equal(output["x"], feed["x"])
    assert execution.nodes == {"CPUExecutionProvider": {"Gemm": 2}}
    assert execution.versions == {"onnxruntime-web": environment.VERSION, "node": "20.1.2"}
    assert left_over(tmp_path) == []


def test_the_files_of_the_weights_are_named(commands, tmp_path):
    commands("node", f"{NODE}cp job.json {tmp_path}\ncp feeds results")

    Web().run(external_model(tmp_path), [])

    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["externalData"], job["folder"]) == (["weights.bin"], str(tmp_path))


def test_a_refusal_is_one_line(commands, model, tmp_path):
    commands("node", f"{NODE}echo noise >&2; printf 'no such\\n  operator' > refusal; exit 3")

    with pytest.raises(RuntimeFailure, match=f"^{model}: no such operator$") as caught:
        Web().run(model, [])

    assert not isinstance(caught.value, WorkerDied)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("kill -SEGV $$", "SIGSEGV; it last printed: RuntimeError: unreachable"),
        ("kill -KILL $$", "SIGKILL, as when memory runs out; it last printed: RuntimeError: unreachable"),
        ("exit 3", "exit code 3; it last printed: RuntimeError: unreachable"),
    ],
)
def test_a_crash_is_told_with_how_it_ended(commands, model, tmp_path, end, cause):
    commands("node", f"{NODE}echo RuntimeError: unreachable >&2; echo >&2; {end}")

    with pytest.raises(WorkerDied) as caught:
        Web().run(model, [])

    assert str(caught.value) == f"{model}: the process of Node died ({cause})"
    assert left_over(tmp_path) == []


def test_what_does_not_end_is_stopped_with_all_that_it_started(commands, model, tmp_path):
    commands("node", f"{NODE}(sleep 0.5; touch {tmp_path}/late) & wait")

    with pytest.raises(WorkerDied, match=r"Node was stopped: it took longer than the limit of 0\.1 s"):
        Web().run(model, [], timeout_s=0.1)

    assert left_over(tmp_path) == []
    time.sleep(0.6)
    assert not (tmp_path / "late").exists()


def test_a_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RuntimeFailure, match=r"no\.onnx: expected a model file, found nothing"):
        Web().run(tmp_path / "no.onnx", [])


def test_what_is_no_tensor_is_refused(model):
    with pytest.raises(RuntimeFailure, match="'x' is of the type object; only tensors of numbers"):
        Web().run(model, [{"x": np.array(["text"], object)}])
