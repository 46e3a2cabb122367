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
        own = {MANIFEST, "README.md", OPERATORS, manifest["model"]["file"]}
        own |= {part["file"] for part in manifest["model"].get("data", [])}
        for sample in manifest["samples"]:
            own |= {part["file"] for side in ("inputs", "outputs") for part in sample[side].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return there <= own


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
        _replace(folder, written)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        message = f"{folder}: cannot be written ({error.strerror or error})"
        raise OutputError(message) from error
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _replace(folder: Path, written: Path) -> None:
    """Put one folder in the place of another; where that fails, the old one is back."""
    if not folder.exists():
        written.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = aside / "old"
    try:
        folder.rename(old)
        written.rename(folder)
    except BaseException:  # Ctrl-C too
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        if not old.exists() or folder.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
