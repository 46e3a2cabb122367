"""The layers `arm64` and `x86`: where they run, what they install, and how they call the emulator."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import zipfile
from importlib.metadata import version
from typing import Any

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments import arm64, debian, foreign, x86
from onnxcomp.verification.environments.arm64 import Arm64
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import ForeignPython
from onnxcomp.verification.environments.processes import Job
from onnxcomp.verification.environments.x86 import X86
from tests.deployed import left_over, on_linux_x86, program

VERSIONS = {"python": "3.13.5", "numpy": "2.4.6", "onnxruntime": "1.32.0", "machine": "aarch64"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that environments are installed into, on Linux on an x86-64 with VNNI."""
    monkeypatch.setattr(debian, "lacking_tools", lambda: None)
    with_features(monkeypatch, "avx2", "avx512_vnni")
    (tmp_path / "m.onnx").touch()
    return on_linux_x86(tmp_path, monkeypatch)


def with_features(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(x86, "cpu_features", lambda: features)


@pytest.fixture
def fetched(monkeypatch):
    """Debian's packages without a network: a qemu that starts whatever it is given. What was asked for."""
    asked: list[str] = []

    def packages(folder, names):
        asked.extend(names)
        return {name: folder / name for name in names}

    def unpack(package, root):
        for name in ("usr/lib/libc.so.6", "usr/share/doc/copyright", "usr/bin/python3.13"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(package.name)

    monkeypatch.setattr(debian, "packages", packages)
    monkeypatch.setattr(debian, "unpack", unpack)
    monkeypatch.setattr(
        debian, "unpack_file", lambda package, member, target: program(target.parent, target.name, 'shift 2; exec "$@"')
    )
    monkeypatch.setattr(debian, "package_version", lambda package: "10.0.13")
    return asked


@pytest.fixture
def registries(fetched, monkeypatch):
    """Python's packages without a network, too; what was asked of them, and what the first start prints."""
    asked: dict[str, Any] = {"wheels": [], "starts": [], "versions": dict(VERSIONS)}

    def fetch_wheel(package, sha256, folder, **_):
        asked["wheels"].append((package, sha256))
        name, _, wanted = package.partition("==")
        if wanted == "9.9.9":
            message = "pip download failed with exit code 1: ERROR: No matching distribution found"
            raise RequirementError(message)
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{wanted}-cp313.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"{name}/__init__.py"), wanted)
        return path

    def run_tool(command, **_):
        asked["starts"].append(command)
        return f"some noise\n{json.dumps(asked['versions'])}\n"

    monkeypatch.setattr(arm64, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(foreign, "run_tool", run_tool)
    return asked


@pytest.fixture
def calls(monkeypatch):
    """The Pythons that are asked to run a model, and how."""
    called: list[tuple[ForeignPython, Job]] = []

    def run(python, job, plugin=None):
        called.append((python, job))
        return Execution([], {}, "", {})

    monkeypatch.setattr(ForeignPython, "run", run)
    return called


# --- arm64 ------------------------------------------------------------------------------------------------------------


def test_is_installed_whole_with_the_installed_version_of_onnx_runtime(cache, registries):
    environment = Arm64()
    said: list[str] = []
    environment.install(said.append)
    assert environment.missing() is None
    assert all(line.startswith("arm64: ") for line in said)
    wheels = [f"onnxruntime=={version('onnxruntime')}", "numpy==2.4.6"]
    assert registries["wheels"] == [(wheel, arm64._HASHES.get(wheel)) for wheel in wheels]
    names = sorted(str(path.relative_to(cache / "arm64")) for path in (cache / "arm64").rglob("*") if path.is_file())
    assert names == [
        "installed.json",
        "qemu-aarch64",
        "root/usr/bin/python3.13",
        "root/usr/lib/libc.so.6",
        "site/numpy/__init__.py",
        "site/onnxruntime/__init__.py",
    ]
    assert (cache / "arm64/root/lib/libc.so.6").exists()


def test_another_version_of_onnx_runtime_makes_it_anew(registries, monkeypatch):
    Arm64().install(lambda _: None)
    monkeypatch.setattr(arm64, "version", lambda package: "1.31.0")
    assert (Arm64().missing() or "").startswith(
        f"installed for onnxruntime {version('onnxruntime')}, and 1.31.0 is wanted; install it"
    )
    Arm64().install(lambda _: None)
    assert Arm64().missing() is None


def test_the_tested_version_is_taken_where_the_installed_one_has_no_wheel_for_arm(registries, monkeypatch):
    monkeypatch.setattr(arm64, "version", lambda package: "9.9.9")
    Arm64().install(lambda _: None)
    wheels = [wheel for wheel, _ in registries["wheels"]]
    assert wheels == ["onnxruntime==9.9.9", f"onnxruntime=={arm64._TESTED}", "numpy==2.4.6"]
    assert Arm64().missing() is None


def test_the_tested_wheels_are_pinned():
    assert set(arm64._HASHES) == {f"numpy=={arm64._NUMPY}", f"onnxruntime=={arm64._TESTED}"}
    assert all(len(bytes.fromhex(digest)) == hashlib.sha256().digest_size for digest in arm64._HASHES.values())


def test_what_does_not_run_as_arm_does_not_take_its_place(cache, registries, tmp_path):
    registries["versions"]["machine"] = "x86_64"
    with pytest.raises(RequirementError, match="does not run as 64-bit ARM"):
        Arm64().install(lambda _: None)
    assert left_over(tmp_path) == []
    assert not (cache / "arm64").exists()


def test_the_emulator_runs_a_phone_s_processor_in_the_installed_tree(cache, registries, calls, monkeypatch, tmp_path):
    Arm64().install(lambda _: None)
    monkeypatch.setenv("PYTHONHOME", "/wrong")
    Arm64().run(tmp_path / "m.onnx", [], outputs=["y"], config={"a": "1"}, timeout_s=5)
    [(python, job)] = calls
    folder = cache / "arm64"
    assert python.command == (
        f"{folder}/qemu-aarch64", "-cpu", "cortex-a76", "-L", f"{folder}/root", f"{folder}/root/usr/bin/python3.13",
    )  # fmt: skip
    assert python.variables == {"PYTHONPATH": f"{folder}/site", "LC_ALL": "C.UTF-8"}
    assert python.versions == {"qemu": "10.0.13", "python": "3.13.5", "numpy": "2.4.6", "onnxruntime": "1.32.0"}
    assert (job.outputs, job.config, job.timeout_s) == (["y"], {"a": "1"}, 5)


def test_the_first_start_is_of_the_same_processor(registries):
    Arm64().install(lambda _: None)
    [command] = registries["starts"]
    assert command[1:4] == ["-cpu", "cortex-a76", "-L"]


def test_a_64_bit_arm_needs_nothing_and_runs_itself(cache, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert Arm64().missing() is None
    Arm64().install(lambda line: pytest.fail(line))
    Arm64().run(tmp_path / "m.onnx", [])
    assert calls[0][0].command == (sys.executable,)
    assert not cache.exists()


def test_without_pip_it_cannot_be_installed(monkeypatch):
    monkeypatch.setattr(arm64, "lacking_pip", lambda: "there is no pip")
    assert Arm64().missing() == "there is no pip"


@pytest.mark.parametrize("kind", [Arm64, X86])
def test_without_debian_s_tools_it_cannot_be_installed(monkeypatch, kind):
    monkeypatch.setattr(debian, "lacking_tools", lambda: "there is no apt-get")
    assert kind().missing() == "there is no apt-get"


# --- x86 --------------------------------------------------------------------------------------------------------------


def test_the_emulator_alone_is_installed(cache, fetched):
    said: list[str] = []
    X86().install(said.append)
    assert sorted(path.name for path in (cache / "x86").iterdir()) == ["installed.json", "qemu-x86_64"]
    assert all(line.startswith("x86: ") for line in said)
    assert fetched == ["qemu-user:amd64"]


def test_the_emulator_runs_this_python_without_vnni(cache, fetched, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "SKYLAKEX")
    monkeypatch.setenv("MINE", "1")
    X86().install(lambda _: None)
    X86().run(tmp_path / "m.onnx", [])
    [(python, _)] = calls
    assert python.command == (f"{cache}/x86/qemu-x86_64", "-cpu", "Haswell-v4", sys.executable)
    assert "OPENBLAS_CORETYPE" not in python.variables
    assert python.variables["MINE"] == "1"
    assert "Haswell-v4 by qemu 10.0.13" in python.title
    assert python.versions["qemu"] == "10.0.13"


def test_an_emulator_that_does_not_start_does_not_take_its_place(cache, fetched, monkeypatch, tmp_path):
    monkeypatch.setattr(debian, "unpack_file", lambda package, member, target: target.write_text("no program"))
    with pytest.raises(RequirementError, match="qemu-x86_64 cannot be started"):
        X86().install(lambda _: None)
    assert left_over(tmp_path) == []
    assert not (cache / "x86").exists()


def test_an_x86_without_vnni_needs_nothing_and_runs_itself(cache, calls, monkeypatch, tmp_path):
    with_features(monkeypatch, "avx2")
    assert X86().missing() is None
    X86().install(lambda line: pytest.fail(line))
    X86().run(tmp_path / "m.onnx", [])
    assert calls[0][0].command == (sys.executable,)
    assert not cache.exists()


def test_a_processor_that_does_not_tell_its_features_is_emulated(monkeypatch):
    with_features(monkeypatch)
    assert "not installed yet" in (X86().missing() or "")
