"""The folder of a package: refused where it holds anything else, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxcomp.deployment.contents import MANIFEST, OPERATORS
from onnxcomp.errors import OutputError
from onnxcomp.files import same_file
from onnxcomp.model import ModelSource

__all__ = ["check_folder", "replaced_folder"]


def check_folder(folder: Path, source: ModelSource) -> None:
    """Refuse a folder that holds anything but a package, before any work starts."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        message = f"{folder}: expected a folder to write the package to, found something else"
        raise OutputError(message)
    if not folder.parent.is_dir():
        message = f"{folder}: its parent folder {str(folder.parent)!r} does not exist"
        raise OutputError(message)
    if folder.is_dir() and any(folder.iterdir()) and not _is_package(folder):
        message = f"{folder}: the folder holds other files; give a new one, or that of an earlier package"
        raise OutputError(message)
    if isinstance(source, str | Path) and any(same_file(Path(source), path) for path in folder.glob("*")):
        message = f"{folder}: the model lies in this folder, and would be replaced with it; give another one"
        raise OutputError(message)


def _is_package(folder: Path) -> bool:
    """Whether a folder is what an earlier `deploy` wrote, with nothing added."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own = {MANIFEST, "README.md", OPERATORS, "samples", manifest["model"]["file"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {path.name for path in folder.iterdir()} <= own


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends well."""
    try:
        written = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror})"
        raise OutputError(message) from error
    try:
        yield written
        written.chmod(0o777 & ~_umask())
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            folder.rename(old / "old")
        written.rename(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        message = f"{folder}: cannot be written ({error.strerror or error})"
        raise OutputError(message) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
