"""Writing results: an output is replaced whole or not at all, and never the input."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from onnxcomp.errors import ModelError, OptionError, OutputError

__all__ = ["Stamp", "check_outputs", "check_unchanged", "check_writable", "replaced_whole", "same_file", "stamp_of"]

Stamp = tuple[int, int, int, int]
"""What changes with a file: device, inode, size and the time of its last change."""


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, also through links; a path that does not exist is no file."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def stamp_of(file: Path | int) -> Stamp:
    """The stamp of a file, by its path or as it is open.

    Raises:
        OSError: It cannot be looked at.
    """
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(path: Path, before: Stamp, *, opened: int | None = None) -> None:
    """Refuse a file of a model that is not the one that was read: what was measured would hold for neither.

    Args:
        path: Where it is.
        before: Its stamp at first.
        opened: The file as it is open; None: whatever is at `path` by now.

    Raises:
        ModelError: It was written to, replaced or removed.
    """
    try:
        same = stamp_of(path if opened is None else opened) == before
    except OSError as error:
        message = f"{path}: cannot be read any more ({error.strerror}); leave it in place until the run has ended"
        raise ModelError(message) from error
    if not same:
        message = f"{path}: has changed since it was first read; leave it as it is until the run has ended"
        raise ModelError(message)


def check_writable(path: Path, *, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output before any work starts.

    Raises:
        OutputError: The folder does not exist or cannot be written to, or the path is one of the inputs, or is there
            and no file: a folder, a device or a pipe.
    """
    for source in inputs:
        if same_file(path, source):
            message = f"{path}: the output would overwrite the input; choose another name with -o"
            raise OutputError(message)
    if path.is_dir():
        message = f"{path}: the output is a folder, expected a file name"
        raise OutputError(message)
    if path.exists() and (not path.is_file() or _is_open_file(path)):
        message = f"{path}: the output is a device or a pipe, which a file would replace; expected a file name"
        raise OutputError(message)
    folder = path.parent
    if not folder.is_dir():
        message = f"{path}: its folder {str(folder)!r} does not exist"
        raise OutputError(message)
    if not os.access(folder, os.W_OK):
        message = f"{path}: its folder {str(folder)!r} cannot be written to"
        raise OutputError(message)


def _is_open_file(path: Path) -> bool:
    """Whether a path is a name for what a process has open, as /dev/stdout is."""
    return path.is_symlink() and path.readlink().is_relative_to("/proc")


def check_outputs(outputs: Mapping[str, Path | None], *, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse several outputs before any work starts.

    Args:
        outputs: Option -> where it writes to; None: it writes no file.
        inputs: What is read.

    Raises:
        OutputError: One of them cannot be written; see `check_writable`.
        OptionError: Two of them are one file.
    """
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_writable(path, inputs=inputs)
        other = taken.setdefault(path.parent.resolve() / path.name, option)  # a link itself is replaced
        if other != option:
            message = f"{other} and {option} both name {str(path)!r}; give one of them another name"
            raise OptionError(message)


@contextlib.contextmanager
def replaced_whole(*paths: Path, durable: bool = True) -> Iterator[list[IO[bytes]]]:
    """Open temporary files beside `paths`; when the block ends well they take their places, in the order given.

    Args:
        paths: Where to.
        durable: Whether to wait until the disk has them; what a run deletes at its end needs not survive the machine.

    Raises:
        OutputError: Something could not be written (no space, no permission). Nothing is left behind.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out.bin"
        >>> with replaced_whole(target) as [file]:
        ...     _ = file.write(b"whole")
        >>> target.read_bytes()
        b'whole'
    """
    written: list[tuple[IO[bytes], Path]] = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            written.append((os.fdopen(handle, "wb"), Path(name)))
        yield [file for file, _ in written]
        for file, temporary in written:
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
            temporary.chmod(0o666 & ~_umask())
        for (_, temporary), path in zip(written, paths, strict=True):
            temporary.replace(path)
        if durable:
            _fsync_folder(paths[0].parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        message = f"{paths[0]}: cannot be written ({error.strerror or error})"
        raise OutputError(message) from error
    finally:
        for file, temporary in written:
            with contextlib.suppress(OSError):
                file.close()
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fsync_folder(folder: Path) -> None:
    handle: Any = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
