"""An environment's folder in the user's cache: whole and as it was made, or taken for missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import RequirementError
from onnxcomp.resume import cache_folder

__all__ = ["Installation", "check_hash", "run_tool"]

_MANIFEST = "installed.json"
_BYTECODE = "__pycache__"  # Python writes there whenever it likes
_TOOL_TIMEOUT_S = 900.0
_ABANDONED_S = 86400.0  # nothing takes a day to install
_REASON_CHARACTERS = 300


class Installation:
    """What is installed for one environment.

    Args:
        name: The environment's.
        recipe: What decides the contents. An installation from another recipe is no longer right.
    """

    def __init__(self, name: str, recipe: Mapping[str, str]) -> None:
        self.name = name
        self.folder = cache_folder() / "environments" / name
        self._recipe = dict(recipe)

    def problem(self) -> str | None:
        """Why it cannot be used, in one line with what to do; None: it can."""
        if not self.folder.exists():
            return f"not installed yet; install it into {self.folder}"
        try:
            manifest = self._manifest()
            recipe, files, _ = (dict(manifest[part]) for part in ("recipe", "files", "versions"))
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.folder} is not a whole installation; install it again"
        for part, wanted in self._recipe.items():
            if recipe.get(part) != wanted:
                return f"installed for {part} {recipe.get(part)}, and {wanted} is wanted; install it again"
        for name, size in files.items():
            found = _size(self.folder / name)
            if found != size:
                came = "is missing" if found is None else f"has {found:,} bytes"
                return f"{self.folder / name} {came}, expected {size:,} bytes; install it again"
        return None

    def versions(self) -> dict[str, str]:
        """Name -> version of what is installed."""
        return {str(name): str(version) for name, version in self._manifest()["versions"].items()}

    def make(self, fill: Callable[[Path], Mapping[str, str]]) -> None:
        """Install, unless it is there and whole; in the end all is there, or nothing of it.

        Args:
            fill: Puts everything into the empty folder that it is given, and tells the versions of what it put there.
                Nothing in the folder may name the folder: it is renamed.

        Raises:
            RequirementError: It cannot be had or written.
        """
        if self.problem() is None:
            return
        temporary = None
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            temporary = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.name}.", suffix=".tmp"))
            versions = dict(fill(temporary))
            manifest = {"recipe": self._recipe, "versions": versions, "files": _sizes(temporary)}
            (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            self._take_place(temporary)
        except OSError as error:
            message = f"{self.name}: cannot be installed into {self.folder} ({error.strerror or error})"
            raise RequirementError(message) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def _take_place(self, temporary: Path) -> None:
        if self.problem() is None:  # another process was quicker, and ours is the same
            return
        temporary.chmod(0o755)
        broken = temporary.with_suffix(".old")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(broken)
        temporary.rename(self.folder)
        _remove(broken)

    def _remove_abandoned(self) -> None:
        """Remove what installations left behind that were killed."""
        limit = time.time() - _ABANDONED_S
        for left in self.folder.parent.glob(f".{self.name}.*"):
            if left.lstat().st_mtime < limit:
                _remove(left)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _BYTECODE not in path.parts
    }


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_hash(path: Path, sha256: str) -> None:
    """Refuse a downloaded file that is not the one expected.

    Raises:
        RequirementError: Its hash differs.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        message = f"{path.name}: its SHA-256 is {found}, expected {sha256}; it is not the file that was tested"
        raise RequirementError(message)


def run_tool(command: Sequence[str], *, cwd: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and give what it printed.

    Args:
        command: The program and its arguments.
        cwd: Where it runs.
        variables: All its environment variables; None: those of this process.

    Raises:
        RequirementError: It cannot be started, failed, or did not end in time; with its own reason in one line.
    """
    try:
        ended = subprocess.run(
            command,
            cwd=cwd,
            env={**(os.environ if variables is None else variables), "LC_ALL": "C.UTF-8"},  # errors in English
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"{_called(command)} was stopped: it took longer than {_TOOL_TIMEOUT_S:g} s; try again"
        raise RequirementError(message) from None
    except OSError as error:
        message = f"{_called(command)} cannot be started ({error.strerror}: {command[0]})"
        raise RequirementError(message) from error
    if ended.returncode != 0:
        message = f"{_called(command)} failed with exit code {ended.returncode}: {_reason(ended.stderr, ended.stdout)}"
        raise RequirementError(message)
    return ended.stdout


def _called(command: Sequence[str]) -> str:
    """The command's name and its first words, without options and paths."""
    words = [word for word in command[1:4] if word.isalpha()]
    return " ".join([Path(command[0]).name, *words])


def _reason(*printed: str) -> str:
    """The last line that says it is an error, or else the last one."""
    lines = [line.strip() for text in printed for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "ERROR", "Error", "error"))]
    return ([*lines[:1], *lines[-1:], *errors] or ["it printed nothing"])[-1][:_REASON_CHARACTERS]
