"""The layer `x86`: where it runs, what it installs, and how it calls the emulator."""

from __future__ import annotations

import sys

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments import debian, x86
from onnxcomp.verification.environments.base import Execution
from onnxcomp.verification.environments.foreign import ForeignPython
from onnxcomp.verification.environments.x86 import X86
from tests.deployed import left_over, on_linux_x86


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
    """Debian's packages without a network: a qemu that starts whatever it is given."""
    asked = []

    def packages(folder, names):
        asked.extend(names)
        return {name: folder / name for name in names}

    def unpack_file(package, member, target):
        target.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
        target.chmod(0o755)

    monkeypatch.setattr(debian, "packages", packages)
    monkeypatch.setattr(debian, "unpack_file", unpack_file)
    monkeypatch.setattr(debian, "package_version", lambda package: "10.0.13")
    return asked


@pytest.fixture
def calls(monkeypatch):
    """The Pythons that are asked to run a model."""
    called: list[ForeignPython] = []

    def run(python, job, plugin=None):
        called.append(python)
        return Execution([], {}, "", {})

    monkeypatch.setattr(ForeignPython, "run", run)
    return called


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
    [python] = calls
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
    assert calls[0].command == (sys.executable,)
    assert not cache.exists()


def test_a_processor_that_does_not_tell_its_features_is_emulated(monkeypatch):
    with_features(monkeypatch)
    assert "not installed yet" in (X86().missing() or "")


def test_what_lacks_for_an_installation_is_told(monkeypatch):
    monkeypatch.setattr(debian, "lacking_tools", lambda: "there is no apt-get")
    assert X86().missing() == "there is no apt-get"
