"""An environment's folder in the user's cache: whole and as it was made, or taken for missing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from onnxcomp.errors import RequirementError
from onnxcomp.resume import cache_folder

__all__ = ["Installation", "check_hash"]

_RECORD = "installed.json"
_BYTECODE = "__pycache__"  # Python writes there whenever it likes


class Installation:
    """What is installed for one environment.

    While one process installs, it holds a lock that ends with it, and others wait. So whatever temporary folder is
    there when one begins is of a process that was killed, and is removed.

    Args:
        name: The environment's.
        recipe: What decides the contents. An installation from another recipe is no longer right.
    """

    def __init__(self, name: str, recipe: Mapping[str, str]) -> None:
        self.name = name
        self.folder = cache_folder() / "environments" / name
        self._recipe = dict(recipe)

    def problem(self) -> str | None:
        """Why it cannot be used, in a few words; None: it can."""
        if not self.folder.exists():
            return "not installed yet"
        try:
            record = self._record()
            recipe, files, _ = (dict(record[part]) for part in ("recipe", "files", "versions"))
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.folder} is not a whole installation"
        for part, wanted in self._recipe.items():
            if recipe.get(part) != wanted:
                return f"installed for {part} {recipe.get(part)}, and {wanted} is wanted"
        for name, digest in files.items():
            path = self.folder / name
            try:
                if _sha256(path) != digest:
                    return f"{path} was changed"
            except OSError:
                return f"{path} is missing"
        return None

    def versions(self) -> dict[str, str]:
        """Name -> version of what is installed."""
        return {str(name): str(version) for name, version in self._record()["versions"].items()}

    def make(self, fill: Callable[[Path, Path], Mapping[str, str]], progress: Callable[[str], None]) -> None:
        """Install, unless it is there and whole; in the end all is there, or nothing of it.

        Args:
            fill: Puts everything into the first of two empty folders, and tells the versions of what it put there.
                Nothing in that folder may name it: it is renamed. The other folder is for downloads and is removed.
            progress: Called with a line when it has to wait for another process.

        Raises:
            RequirementError: It cannot be had or written.
        """
        work = self.folder.with_name(f".{self.name}.tmp")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(progress):
                if self.problem() is not None:
                    try:
                        self._make_in(work, fill)
                    finally:
                        shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            place = f"cannot be installed into {self.folder} ({error.strerror or error})"
            message = f"{self.name}: {place}; free some space, or set XDG_CACHE_HOME"
            raise RequirementError(message) from error
        except RequirementError as error:
            message = f"{self.name}: {error}"
            raise RequirementError(message) from error

    def _make_in(self, work: Path, fill: Callable[[Path, Path], Mapping[str, str]]) -> None:
        shutil.rmtree(work, ignore_errors=True)
        filled, downloads = work / "filled", work / "downloads"
        for folder in (filled, downloads):
            folder.mkdir(parents=True)
        versions = dict(fill(filled, downloads))
        record = {"recipe": self._recipe, "versions": versions, "files": _digests(filled)}
        (filled / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(work / "broken")
        filled.rename(self.folder)

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        return record

    @contextlib.contextmanager
    def _alone(self, progress: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock, and remove its file in the end."""
        path = self.folder.with_name(f".{self.name}.lock")
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context(path.open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress(f"{self.name}: another process is installing it; waiting for that")
                    fcntl.flock(file, fcntl.LOCK_EX)
                if _is_at(file, path):  # otherwise the one that held it has removed the file
                    break
            stack.callback(path.unlink, missing_ok=True)
            yield


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _BYTECODE not in path.parts
    }


def check_hash(path: Path, sha256: str) -> None:
    """Refuse a downloaded file that is not the one expected.

    Raises:
        RequirementError: Its hash differs.
    """
    found = _sha256(path)
    if found != sha256:
        message = f"{path.name}: its SHA-256 is {found}, expected {sha256}: not the file that was tested; do not use it"
        raise RequirementError(message)
