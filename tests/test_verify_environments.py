"""What the environments have in common: what they lack is told, they are installed once, and broken ones anew."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import RequirementError, RuntimeFailure
from onnxcomp.verification.environments import ENVIRONMENTS, find_environment, x86
from onnxcomp.verification.environments.installed import InstalledEnvironment
from onnxcomp.verification.environments.web import environment as web
from tests.deployed import left_over, on_linux_x86


def fill(_: object, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
    progress("filling")
    (downloads / "package").write_bytes(b"1234567890")
    (folder / "program").write_bytes(b"12345")
    return {"program": "1.0"}


@pytest.fixture(params=sorted(ENVIRONMENTS))
def environment(request, tmp_path, monkeypatch):
    """An environment, on a machine that can run it, that fetches nothing."""
    on_linux_x86(tmp_path, monkeypatch)
    monkeypatch.setattr(x86, "cpu_features", lambda: ("avx2", "avx512_vnni"))
    monkeypatch.setattr(web, "_node_version", lambda: (20, 1, 2))
    kind = type(find_environment(request.param))
    monkeypatch.setattr(kind, "_lacking", lambda _: None)
    monkeypatch.setattr(kind, "_fill", fill)
    return find_environment(request.param)


def refuse(told: str) -> None:
    pytest.fail(f"it was installed again: {told}")


def test_what_is_not_installed_is_told_with_what_it_costs(environment):
    assert environment.missing() == f"not installed yet; install it with --install ({environment.size})"


def test_nothing_runs_before_it_is_installed(environment):
    with pytest.raises(RequirementError, match=f"^{environment.name}: not installed yet; install it"):
        environment.run(Path("m.onnx"), [])


def test_it_is_installed_whole_and_once(environment, tmp_path):
    told: list[str] = []
    environment.install(told.append)

    assert environment.missing() is None
    assert told == ["filling"]
    assert sorted(path.name for path in environment.folder.iterdir()) == ["installed.json", "program"]
    environment.install(refuse)
    assert left_over(tmp_path) == []


def test_a_changed_file_is_told_and_made_anew(environment):
    environment.install(print)
    (environment.folder / "program").write_bytes(b"1234.")

    assert (
        environment.missing()
        == f"{environment.folder}/program was changed; install it with --install ({environment.size})"
    )
    with pytest.raises(RequirementError, match="program was changed; install it"):
        environment.run(Path("m.onnx"), [])
    environment.install(print)
    assert environment.missing() is None


def test_what_lacks_for_an_installation_is_told_before_one(environment, monkeypatch):
    monkeypatch.setattr(type(environment), "_lacking", lambda _: "there is no tool")

    assert environment.missing() == "there is no tool"
    with pytest.raises(RequirementError, match=f"^{environment.name}: there is no tool$"):
        environment.install(refuse)


def test_what_is_installed_needs_no_tools_any_more(environment, monkeypatch):
    environment.install(print)
    monkeypatch.setattr(type(environment), "_lacking", lambda _: "there is no tool")

    assert environment.missing() is None
    environment.install(refuse)


def test_a_failure_is_told_with_the_name_and_leaves_nothing(environment, tmp_path, monkeypatch):
    def fail(*_):
        message = "no network"
        raise RequirementError(message)

    monkeypatch.setattr(type(environment), "_fill", fail)
    with pytest.raises(RequirementError, match=f"^{environment.name}: no network$"):
        environment.install(print)
    assert left_over(tmp_path) == []


def test_a_model_that_is_not_there_is_told(environment, tmp_path):
    environment.install(print)
    with pytest.raises(RuntimeFailure, match=r"no\.onnx: expected a model file, found nothing"):
        environment.run(tmp_path / "no.onnx", [])


def test_what_is_no_tensor_of_numbers_is_refused(environment, tmp_path):
    environment.install(print)
    (tmp_path / "m.onnx").touch()
    with pytest.raises(RuntimeFailure, match=r"m\.onnx: 'x' is of the type object; only tensors of numbers"):
        environment.run(tmp_path / "m.onnx", [{"x": np.array(["text"], object)}])


def assert_unfit(name: str, told: str) -> None:
    environment = find_environment(name)
    assert isinstance(environment, InstalledEnvironment)
    assert told in (environment.missing() or "")
    with pytest.raises(RequirementError, match=f"^{name}: .*{told}"):
        environment.install(refuse)


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS.keys() - {"web"}))
@pytest.mark.parametrize(("system", "machine"), [("Darwin", "x86_64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_a_machine_that_cannot_run_it_is_told(monkeypatch, name, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert_unfit(name, f", and this is {system} on {machine}; use such a machine")


@pytest.mark.parametrize(("name", "oldest"), [("android", "2.34"), ("qnn", "2.35")])
@pytest.mark.parametrize(("library", "told"), [(("glibc", "2.31"), "glibc 2.31"), (("", ""), "another C library")])
def test_a_c_library_that_is_too_old_is_told(tmp_path, monkeypatch, name, oldest, library, told):
    on_linux_x86(tmp_path, monkeypatch)
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    assert_unfit(name, f"it needs glibc {oldest} or newer, and this is {told}; use a newer system")
