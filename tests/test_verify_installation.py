"""An environment's folder is whole or counts as missing, whoever installs it at the same moment or is killed."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from onnxcomp.errors import RequirementError
from onnxcomp.verification.environments.installation import Installation, check_hash
from tests.deployed import left_over, on_linux_x86

RECIPE = {"suite": "one"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder that environments are installed into."""
    return on_linux_x86(tmp_path, monkeypatch)


def fill(folder: Path, downloads: Path) -> dict[str, str]:
    (downloads / "package").write_bytes(b"1")
    (folder / "inner").mkdir()
    (folder / "inner" / "program").write_bytes(b"12345")
    return {"program": "1.0"}


def refill(folder: Path, downloads: Path) -> dict[str, str]:
    pytest.fail("it was filled again")


def installed() -> Installation:
    installation = Installation("web", RECIPE)
    installation.make(fill, print)
    return installation


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def test_is_missing_before_and_whole_after(cache, tmp_path):
    installation = Installation("web", RECIPE)
    assert installation.problem() == "not installed yet"
    installation.make(fill, print)
    assert installation.problem() is None
    assert installation.versions() == {"program": "1.0"}
    assert left_over(tmp_path) == []


def test_a_second_installation_does_nothing():
    installed().make(refill, print)


def test_a_failure_leaves_nothing(cache):
    def fail(folder, downloads):
        fill(folder, downloads)
        message = "no network"
        raise RequirementError(message)

    with pytest.raises(RequirementError, match=r"^web: no network"):
        Installation("web", RECIPE).make(fail, print)
    assert list(cache.iterdir()) == []


def test_an_interruption_leaves_nothing(cache):
    def interrupt(folder, downloads):
        fill(folder, downloads)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Installation("web", RECIPE).make(interrupt, print)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "inner/program").unlink(), "program is missing"),
        (lambda folder: (folder / "inner/program").write_bytes(b"1234."), "program was changed"),
        (lambda folder: (folder / "installed.json").unlink(), "not a whole installation"),
        (lambda folder: (folder / "installed.json").write_text('{"recipe'), "not a whole installation"),
        (lambda folder: (folder / "installed.json").write_text("[]"), "not a whole installation"),
        (lambda folder: (folder / "installed.json").write_text('{"recipe": [1]}'), "not a whole installation"),
        (file_instead, "not a whole installation"),
    ],
)
def test_a_broken_one_is_told_and_made_anew(cache, tmp_path, harm, told):
    installation = installed()
    harm(cache / "web")
    assert told in (installation.problem() or "")
    installation.make(fill, print)
    assert installation.problem() is None
    assert (cache / "web/inner/program").read_bytes() == b"12345"
    assert left_over(tmp_path) == []


def test_bytecode_that_python_writes_later_breaks_nothing(cache):
    installation = Installation("web", RECIPE)

    def with_bytecode(folder, downloads):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "x.pyc").write_bytes(b"1")
        return fill(folder, downloads)

    installation.make(with_bytecode, print)
    (cache / "web/__pycache__/x.pyc").write_bytes(b"123")
    assert installation.problem() is None


def test_one_from_another_recipe_is_made_anew():
    installed()
    other = Installation("web", {"suite": "two"})
    assert other.problem() == "installed for suite one, and two is wanted"
    other.make(fill, print)
    assert other.problem() is None


def test_of_two_at_the_same_moment_the_later_waits_and_finds_it_done(tmp_path):
    begun, waited = threading.Event(), threading.Event()
    told: list[str] = []

    def slow(folder, downloads):
        begun.set()
        assert waited.wait(10)
        return fill(folder, downloads)

    def wait(line):
        told.append(line)
        waited.set()

    first = threading.Thread(target=Installation("web", RECIPE).make, args=(slow, print))
    first.start()
    assert begun.wait(10)
    Installation("web", RECIPE).make(refill, wait)
    first.join()

    assert told == ["web: another process is installing it; waiting for that"]
    assert installed().problem() is None
    assert left_over(tmp_path) == []


def test_after_one_that_failed_the_waiting_one_installs(tmp_path):
    begun, waited = threading.Event(), threading.Event()
    errors: list[str] = []

    def fail(folder, downloads):
        begun.set()
        assert waited.wait(10)
        message = "no network"
        raise RequirementError(message)

    def first():
        try:
            Installation("web", RECIPE).make(fail, print)
        except RequirementError as error:
            errors.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    installation = Installation("web", RECIPE)
    installation.make(fill, lambda _: waited.set())
    thread.join()

    assert errors == ["web: no network"]
    assert installation.problem() is None
    assert left_over(tmp_path) == []


KILLED = """
import os, signal
from onnxcomp.verification.environments.installation import Installation

def fill(folder, downloads):
    (folder / "half").write_bytes(b"1")
    os.kill(os.getpid(), signal.SIGKILL)

Installation("web", {"suite": "one"}).make(fill, print)
"""


def test_what_a_killed_installation_left_is_removed_by_the_next(cache, tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (cache / ".web.tmp/filled/half").exists()
    assert Installation("web", RECIPE).problem() == "not installed yet"

    installed()

    assert left_over(tmp_path) == []
    assert not (cache / "web/half").exists()


def test_a_lock_that_nobody_holds_is_no_obstacle(cache, tmp_path):
    cache.mkdir(parents=True)
    with (cache / ".web.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    Installation("web", RECIPE).make(fill, lambda line: pytest.fail(line))
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_told_in_one_line(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    with pytest.raises(RequirementError, match=r"^web: cannot be installed into .*; free some space, or set XDG_CACHE"):
        installed()


def test_a_file_with_another_hash_is_refused(tmp_path):
    path = tmp_path / "some.whl"
    path.write_bytes(b"right")
    digest = hashlib.sha256(b"right").hexdigest()
    check_hash(path, digest)
    path.write_bytes(b"wrong")
    with pytest.raises(RequirementError, match=rf"some\.whl: its SHA-256 is [0-9a-f]{{64}}, expected {digest}"):
        check_hash(path, digest)
