"""What a run writes on its way goes with it, at the latest when the next one begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcomp.workfolder import work_folder

HOLD = """
import sys
from onnxcomp.workfolder import work_folder
with work_folder() as folder:
    (folder / "weights").write_bytes(b"many")
    print(folder, flush=True)
    sys.stdin.read()
"""


def holding(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder until its standard input is closed."""
    environment = {**os.environ, "TMPDIR": str(parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # The type of **pipes tells no overload of Popen from another.
    process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, text=True, **pipes)  # type: ignore[call-overload]
    return process, Path(process.stdout.readline().strip())


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_removed_at_the_end(parent: Path) -> None:
    with work_folder() as folder:
        (folder / "weights").write_bytes(b"many")
        assert folder.parent == parent
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(parent: Path) -> None:
    process, left = holding(parent)
    process.kill()
    process.communicate()
    assert (left / "weights").exists()

    with work_folder() as folder:
        assert list(parent.iterdir()) == [folder]


def test_the_folder_of_a_process_that_runs_stays(parent: Path) -> None:
    process, held = holding(parent)
    with work_folder():
        assert (held / "weights").exists()
    process.communicate()
    assert not held.exists()


def test_a_folder_without_a_lock_is_not_ours_to_remove(parent: Path) -> None:
    other = parent / "onnxcomp-notes"
    other.mkdir()
    with work_folder():
        pass
    assert other.exists()
