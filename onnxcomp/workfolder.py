"""Folders for what a run writes on its way, and what killed runs have left of theirs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

__all__ = ["work_folder"]

PREFIX = "onnxcomp-"
LOCK = ".lock"


@contextmanager
def work_folder() -> Iterator[Path]:
    """Make a temporary folder, removed at the end.

    A run that is killed cannot remove its own, which may hold several copies of a large model. Each folder holds a file
    that its process has locked; the first folder of a process removes those whose lock is free.

    Yields:
        The folder, empty but for the file that is locked.

    Raises:
        OSError: It cannot be made.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    new = folder / f"{LOCK}.new"
    with new.open("w") as file:
        with suppress(OSError):  # a file system without locks: then nothing tells whether its owner lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(folder / LOCK)  # under its name it is locked from the beginning
        yield


@cache
def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of one's own whose process is gone."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):
            if lock.parent.lstat().st_uid != os.getuid() or lock.is_symlink():
                continue
            with lock.open("r+") as file:
                if _is_free(file):
                    shutil.rmtree(lock.parent, ignore_errors=True)


def _is_free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
