"""An environment's folder is whole or counts as missing, and what is downloaded is what was expected."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments.installation import Installation, check_hash, run_tool

RECIPE = {"suite": "one"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that environments are installed into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onnxcomp" / "environments"


def fill(folder: Path) -> dict[str, str]:
    (folder / "inner").mkdir()
    (folder / "inner" / "program").write_bytes(b"12345")
    return {"program": "1.0"}


def installed() -> Installation:
    installation = Installation("some", RECIPE)
    installation.make(fill)
    return installation


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def test_is_missing_before_and_whole_after(cache):
    installation = Installation("some", RECIPE)
    assert installation.problem() == f"not installed yet; install it into {cache / 'some'}"
    installation.make(fill)
    assert installation.problem() is None
    assert installation.versions() == {"program": "1.0"}
    assert [path.name for path in cache.iterdir()] == ["some"]


def test_a_second_installation_does_nothing():
    installation = installed()
    installation.make(lambda _: pytest.fail("it was filled again"))


def test_a_failure_leaves_nothing(cache):
    def fail(folder):
        fill(folder)
        message = "no network"
        raise RequirementError(message)

    with pytest.raises(RequirementError, match="no network"):
        Installation("some", RECIPE).make(fail)
    assert list(cache.iterdir()) == []


def test_an_interruption_leaves_nothing(cache):
    def interrupt(folder):
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Installation("some", RECIPE).make(interrupt)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "inner/program").unlink(), r"program is missing, expected 5 bytes; install it again"),
        (lambda folder: (folder / "inner/program").write_bytes(b"1"), "program has 1 bytes, expected 5 bytes"),
        (lambda folder: (folder / "installed.json").unlink(), "not a whole installation; install it again"),
        (lambda folder: (folder / "installed.json").write_text('{"recipe'), "not a whole installation"),
        (lambda folder: (folder / "installed.json").write_text("[]"), "not a whole installation"),
        (lambda folder: (folder / "installed.json").write_text('{"recipe": [1]}'), "not a whole installation"),
        (file_instead, "not a whole installation"),
    ],
)
def test_a_broken_one_is_told_and_made_anew(cache, harm, told):
    installation = installed()
    harm(cache / "some")
    assert told in (installation.problem() or "")
    installation.make(fill)
    assert installation.problem() is None
    assert (cache / "some/inner/program").read_bytes() == b"12345"
    assert [path.name for path in cache.iterdir()] == ["some"]


def test_bytecode_that_python_writes_later_breaks_nothing(cache):
    installation = Installation("some", RECIPE)

    def with_bytecode(folder):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").write_bytes(b"1")
        return fill(folder)

    installation.make(with_bytecode)
    (cache / "some/__pycache__/x.pyc").write_bytes(b"123")
    assert installation.problem() is None


def test_one_from_another_recipe_is_made_anew():
    installed()
    other = Installation("some", {"suite": "two"})
    assert other.problem() == "installed for suite one, and two is wanted; install it again"
    other.make(fill)
    assert other.problem() is None


def test_what_another_process_has_installed_meanwhile_is_kept(cache):
    def slow(folder):
        installed()
        (cache / "some/mark").touch()
        return fill(folder)

    Installation("some", RECIPE).make(slow)
    assert (cache / "some/mark").exists()
    assert [path.name for path in cache.iterdir()] == ["some"]


def test_what_a_killed_installation_left_is_removed_after_a_day(cache):
    old, new = cache / ".some.old.tmp", cache / ".some.new.tmp"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    installed()
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_told_in_one_line(cache):
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(RequirementError, match="some: cannot be installed into "):
        installed()


def test_a_file_with_another_hash_is_refused(tmp_path):
    path = tmp_path / "some.whl"
    path.write_bytes(b"right")
    digest = hashlib.sha256(b"right").hexdigest()
    check_hash(path, digest)
    path.write_bytes(b"wrong")
    with pytest.raises(RequirementError, match=rf"some\.whl: its SHA-256 is [0-9a-f]{{64}}, expected {digest}"):
        check_hash(path, digest)


def test_a_tool_gives_what_it_prints():
    assert run_tool([sys.executable, "-c", "print(1)"]) == "1\n"


def test_a_tool_s_failure_is_told_by_its_own_error():
    command = ["sh", "-c", "echo note; echo 'E: no such package' >&2; echo 'hint: none' >&2; exit 100"]
    with pytest.raises(RequirementError, match=r"^sh failed with exit code 100: E: no such package$"):
        run_tool(command)


def test_a_tool_that_is_not_there_is_told():
    with pytest.raises(RequirementError, match="no-such-tool update cannot be started"):
        run_tool(["no-such-tool", "update"])


def test_a_tool_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr("onnxcomp.verification.environments.installation._TOOL_TIMEOUT_S", 0.1)
    with pytest.raises(RequirementError, match=r"sleep was stopped: it took longer than 0\.1 s"):
        run_tool(["sleep", "60"])
