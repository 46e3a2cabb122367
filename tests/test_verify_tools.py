"""Tools that fetch and make environments: their errors are told in one line, and what they fetch is checked."""

from __future__ import annotations

import hashlib
import importlib.util
import sys

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments import tools
from onnxcomp.verification.environments.tools import fetch_npm, fetch_wheel, lacking_npm, lacking_pip, run_tool
from tests.deployed import program

CONTENT = b"the package\n"
HASH = hashlib.sha256(CONTENT).hexdigest()


def test_a_tool_gives_what_it_prints():
    assert run_tool([sys.executable, "-c", "print(1)"]) == "1\n"


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("note; echo 'E: no such package'; echo 'hint: none'", "E: no such package"),
        ("npm error code E404; echo npm error 404; echo npm error A complete log of this run is there",
         "npm error code E404 npm error 404"),
        ("'runner.c:14: fatal error: stdio.h: No such file'; echo compilation terminated.",
         "runner.c:14: fatal error: stdio.h: No such file"),
        ("Traceback; echo 'ImportError: none'", "ImportError: none"),
        ("", "it printed nothing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", ["", " >&2"])
def test_a_tool_s_failure_is_told_by_its_own_error(printed, told, stream):
    command = ["sh", "-c", f"(echo {printed}){stream}; exit 100"]
    with pytest.raises(RequirementError) as caught:
        run_tool(command)
    assert str(caught.value) == f"sh failed with exit code 100: {told}"


def test_a_tool_that_is_not_there_is_told():
    with pytest.raises(RequirementError, match="no-such-tool update cannot be started"):
        run_tool(["no-such-tool", "update"])


def test_a_tool_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(tools, "_TIMEOUT_S", 0.1)
    with pytest.raises(RequirementError, match=r"sleep was stopped: it took longer than 0\.1 s"):
        run_tool(["sleep", "60"])


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm that notes how it was called and gives one package."""
    program(tmp_path / "bin", "npm", f'echo "$@" > {tmp_path}/called; while [ "$1" != --pack-destination ]; do shift;'
            ' done; echo the package > "$2/some-1.0.tgz"')  # fmt: skip
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


def test_a_package_of_npm_is_fetched_and_nothing_of_it_run(npm, tmp_path):
    assert fetch_npm("some@1.0", HASH, tmp_path).read_bytes() == CONTENT

    called = (npm / "called").read_text().split()
    assert called[:3] == ["pack", "some@1.0", "--ignore-scripts"]
    assert called[called.index("--cache") + 1] == str(tmp_path / "npm")


def test_another_package_than_the_pinned_one_is_refused(npm, tmp_path):
    with pytest.raises(RequirementError, match=r"some-1\.0\.tgz: its SHA-256 is .*, expected 0{64}: .* do not use it"):
        fetch_npm("some@1.0", "0" * 64, tmp_path)


def test_an_npm_that_gives_nothing_is_told(npm, tmp_path):
    program(npm / "bin", "npm", "exit 0")
    with pytest.raises(RequirementError, match=r"some@1\.0: expected one file to be downloaded, found none; try again"):
        fetch_npm("some@1.0", HASH, tmp_path)


def test_a_wheel_is_asked_for_by_its_python_and_platforms(monkeypatch, tmp_path):
    called: list[str] = []

    def run(command: list[str]) -> str:
        called.extend(command)
        (tmp_path / "some_wheel-1.0-py3-none-any.whl").write_bytes(CONTENT)
        return ""

    monkeypatch.setattr(tools, "run_tool", run)

    for digest in (HASH, None):
        wheel = fetch_wheel("some-wheel==1.0", digest, tmp_path, python="3.13", platforms=["one", "other"])
        assert wheel.read_bytes() == CONTENT
    assert called[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.13", "--platform=one", "--platform=other"} < set(
        called
    )
    assert called[-1] == "some-wheel==1.0"
    with pytest.raises(RequirementError, match=r"some_wheel-1\.0-.*its SHA-256 is"):
        fetch_wheel("some-wheel==1.0", "0" * 64, tmp_path, python="3.13", platforms=["one"])


def test_tools_that_are_not_there_are_told_with_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lacking_npm() == "there is no npm to fetch it with; install it (apt-get install npm)"
    assert "there is no pip in this Python" in (lacking_pip() or "")


def test_nothing_is_lacking_where_the_tools_are(npm):
    assert lacking_npm() is None
    assert lacking_pip() is None
