"""Where environments are kept, and how one gets there whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import RequirementError
from onnxcomp.resume import cache_folder

__all__ = ["check_hash", "damaged_file", "digest", "environment_folder", "installed_whole", "run_client"]

CLIENT_TIMEOUT_S = 1800.0
"""For one call of pip or npm: a hundred megabytes over a slow line."""


def environment_folder(name: str) -> Path:
    """Where an environment is, or would be, installed."""
    return cache_folder() / "environments" / name


@contextlib.contextmanager
def installed_whole(name: str) -> Iterator[Path]:
    """A temporary folder that becomes the environment's when the block ends well; what was there before goes.

    Args:
        name: The environment.

    Yields:
        The folder to fill.

    Raises:
        RequirementError: The cache folder cannot be written to. Nothing is left behind.
    """
    place = environment_folder(name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}.") as folder:
            filled, old = Path(folder) / "new", Path(folder) / "old"
            filled.mkdir()
            yield filled
            with contextlib.suppress(FileNotFoundError):
                place.rename(old)
            filled.rename(place)
    except OSError as error:
        message = f"{place}: cannot be written ({error.strerror or error}); free space, or set XDG_CACHE_HOME"
        raise RequirementError(message) from error


def digest(path: Path, kind: str = "sha256") -> str:
    """The hash of a file: hexadecimal, and base64 for sha512, as npm writes it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind)
    return base64.b64encode(found.digest()).decode() if kind == "sha512" else found.hexdigest()


def check_hash(path: Path, wanted: str, kind: str = "sha256") -> None:
    """Refuse a downloaded file that is not the one that is pinned.

    Raises:
        RequirementError: Its hash is another, or it is not there.
    """
    if not path.is_file():
        message = f"{path.name}: expected it to be downloaded, found nothing; try again"
        raise RequirementError(message)
    found = digest(path, kind)
    if found != wanted:
        message = (
            f"{path.name}: its {kind} is {found}, expected {wanted}: it is not the file that was tried; "
            "do not use it, and look at where it was downloaded from"
        )
        raise RequirementError(message)


def damaged_file(folder: Path, files: Mapping[str, str]) -> str | None:
    """The first of an environment's files that is not there as it was installed; None: all are.

    Args:
        folder: Where they are.
        files: Path inside the folder -> sha256.
    """
    for name, wanted in files.items():
        path = folder / name
        try:
            if digest(path) != wanted:
                return name
        except OSError:
            return name
    return None


def run_client(command: Sequence[str], folder: Path, what: str) -> None:
    """Run pip or npm in a folder.

    Args:
        command: The command.
        folder: Where it runs.
        what: What it gets, for the message.

    Raises:
        RequirementError: It is not there, failed or took too long; the message ends with its own last line.
    """
    program = command[0]
    if shutil.which(program) is None:
        message = f"{what}: {program} was not found; install it and run this again"
        raise RequirementError(message)
    try:
        ended = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=CLIENT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        message = f"{what}: {program} did not end within {CLIENT_TIMEOUT_S:g} s; try again"
        raise RequirementError(message) from error
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip() and "A complete log of this run" not in line]
        message = f"{what}: {program} ended with exit code {ended.returncode}: {words[-1] if words else 'no message'}"
        raise RequirementError(message)
