"""What is in the wheel, and what is pinned."""

from __future__ import annotations

import configparser
import email
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.markdown import ROOT

SHIPPED = {".py", ".json", ".typed", ".c", ".kt", ".swift", ".mjs", ".txt", ".jinja", ".css", ".js", ".md"}
NOT_PROJECT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "sample_models", "dist", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the project without network."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "project", ignore=NOT_PROJECT)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(command, cwd=folder / "project", check=True, capture_output=True, stdin=subprocess.DEVNULL)
    [path] = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    [member] = [member for member in wheel.namelist() if member.endswith(f".dist-info/{name}")]
    return wheel.read(member).decode()


def test_holds_every_module_of_the_two_packages_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "onnxcomp"), (ROOT / "passes", "onnxcomp_passes"))
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix in SHIPPED
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.parametrize(
    "name",
    [
        "onnxcomp/py.typed",
        "onnxcomp/report/schema.json",
        "onnxcomp/report/comparison_schema.json",
        "onnxcomp/report/page/comparison.html.jinja",
        "onnxcomp/report/page/page.html.jinja",
        "onnxcomp/report/page/parts.html.jinja",
        "onnxcomp/report/page/scripts/compare.js",
        "onnxcomp/report/page/vendor/chart-LICENSE.txt",
        "onnxcomp/deployment/snippets/load.kt",
        "onnxcomp/verification/environments/android/runner.c",
        "onnxcomp/verification/environments/android/shim.c",
    ],
)
def test_holds_what_is_not_python(wheel, name):
    assert name in wheel.namelist()


def test_has_no_tests_and_no_data(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"onnxcomp", "onnxcomp_passes"}


def test_declares_the_command_and_its_own_passes_as_a_plugin(wheel):
    entries = configparser.ConfigParser()
    entries.read_string(_metadata(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"onnxcomp": "onnxcomp.__main__:run"}
    assert dict(entries["onnxcomp.passes"]) == {"onnxcomp": "onnxcomp_passes"}


def test_carries_the_licence_and_the_readme(wheel):
    assert "Apache License" in _metadata(wheel, "licenses/LICENSE")
    metadata = email.message_from_string(_metadata(wheel, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert str(metadata.get_payload()).startswith("# onnxcomp")


def test_needs_no_torch_unless_asked(wheel):
    metadata = email.message_from_string(_metadata(wheel, "METADATA"))
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if line.startswith(("torch", "scipy", "tensorly", "pytest", "pillow"))]


# --- constraints.txt --------------------------------------------------------------------------------------------------


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wrong = [line for line in lines if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not wrong, "a pin is NAME==VERSION: no ranges, hosts, paths or local versions"
    return {_plain(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return _plain(match[0])


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(entry for extra in project["optional-dependencies"].values() for entry in extra),
    ]
    assert {_name(entry) for entry in wanted} <= set(_pins())
    assert _pins()["torch"] == "2.13.0"


def test_every_dependency_of_a_pinned_package_is_pinned():
    pins = _pins()
    for name in pins:
        for requirement in importlib.metadata.requires(name) or []:
            if ";" not in requirement:  # what has a marker is for an extra or another platform
                assert _name(requirement) in pins, f"{name} needs {requirement}"
