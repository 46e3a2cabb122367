"""Writing results: an output is replaced whole or not at all, and never the input."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from onnxcomp.errors import OptionError, OutputError

__all__ = ["check_outputs", "check_writable", "replaced_whole", "same_file"]


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, also through links; a path that does not exist is no file."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def check_writable(path: Path, *, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output before any work starts.

    Raises:
        OutputError: The folder does not exist or cannot be written to, or the path is a folder or one of the inputs.
    """
    for source in inputs:
        if same_file(path, source):
            message = f"{path}: the output would overwrite the input; choose another name with -o"
            raise OutputError(message)
    if path.is_dir():
        message = f"{path}: the output is a folder, expected a file name"
        raise OutputError(message)
    folder = path.parent
    if not folder.is_dir():
        message = f"{path}: its folder {str(folder)!r} does not exist"
        raise OutputError(message)
    if not os.access(folder, os.W_OK):
        message = f"{path}: its folder {str(folder)!r} cannot be written to"
        raise OutputError(message)


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
