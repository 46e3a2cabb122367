"""Read .npy and .npz a few rows at a time, never trusting what their headers claim, and never unpickling."""

from __future__ import annotations

import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxcomp.data import spool
from onnxcomp.data.fit import Feed, Head, Item, check_label, check_names, cut, label_name, plan
from onnxcomp.data.specs import Array, InputSpec
from onnxcomp.errors import DataError

_CHUNK_BYTES = 8 << 20
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, NotImplementedError),
    UnicodeDecodeError,  # a member's name
)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what a broken file makes zipfile, zlib and numpy raise into a DataError."""
    try:
        yield
    except _ZIP_ERRORS as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        message = f"{where}: cannot be read: {reason}; write it anew with numpy.savez"
        raise DataError(message) from error


class NpyReader:
    """One array in .npy format, read front to back.

    Attributes:
        head: Its type and shape, checked against the bytes that there are.
    """

    def __init__(self, stream: IO[bytes], size_bytes: int, where: str) -> None:
        """Read the header.

        Args:
            stream: The file, at its start.
            size_bytes: The bytes that it holds, or claims to.
            where: Its name, for messages.
        """
        self._stream = stream
        self._where = where
        dtype, shape, fortran, start = _header(stream, where)
        self.head = Head(dtype, shape)
        self._fortran = fortran and len(shape) > 1
        self._mapped: Array | None = None
        self._next = 0
        self._bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if self._bytes > size_bytes - start:
            message = (
                f"{where}: its header claims {dtype.name} {shape}, {self._bytes:,} bytes, but it holds "
                f"{size_bytes - start:,}; it is damaged: write it anew"
            )
            raise DataError(message)

    def rows(self, count: int) -> Array:
        """Return the next `count` entries of the first axis."""
        shape = (count, *self.head.shape[1:])
        if self._fortran:
            if self._mapped is None:
                self._mapped = self._map()
            self._next += count
            return self._mapped[self._next - count : self._next]
        return self._read(shape)

    def whole(self) -> Array:
        """Return all of it."""
        return self.rows(self.head.shape[0]) if self.head.shape else self._read(())

    def _read(self, shape: tuple[int, ...]) -> Array:
        length = int(np.prod(shape)) * self.head.dtype.itemsize
        with reading(self._where):
            data = self._stream.read(length)
        self._check(len(data), length)
        return np.frombuffer(data, self.head.dtype).reshape(shape) if length else np.empty(shape, self.head.dtype)

    def _check(self, got: int, wanted: int) -> None:
        if got != wanted:
            message = f"{self._where}: it ends {wanted - got:,} bytes too early; it is damaged: write it anew"
            raise DataError(message)

    def _map(self) -> Array:
        """Copy an array in Fortran order, whose rows are scattered, to a temporary file."""
        if not self._bytes:
            return np.empty(self.head.shape, self.head.dtype)
        with reading(self._where), tempfile.TemporaryFile() as file:
            shutil.copyfileobj(self._stream, file, _CHUNK_BYTES)
            file.flush()
            self._check(min(file.tell(), self._bytes), self._bytes)
            return np.memmap(file, dtype=self.head.dtype, mode="r", shape=self.head.shape, order="F")


def _header(stream: IO[bytes], where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Return type, shape, whether in Fortran order, and where the values start."""
    with reading(where):
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                message = f"version {version[0]}.{version[1]} of the .npy format is not known"
                raise ValueError(message)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            start = stream.tell()
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"{where}: it is not an array in .npy format: {reason}; write it with numpy.save or numpy.savez"
            raise DataError(message) from error
    if dtype.hasobject:
        message = f"{where}: it holds pickled Python objects, which are never read; save plain numbers or strings"
        raise DataError(message)
    if dtype.names is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        message = f"{where}: it holds {dtype}, not plain numbers or strings; save one array an input"
        raise DataError(message)
    if any(size < 0 for size in shape):
        message = f"{where}: its header claims a shape of {shape}; it is damaged: write it anew"
        raise DataError(message)
    return dtype, tuple(int(size) for size in shape), bool(fortran), start


def read_npy(path: Path, where: str) -> Array:
    """Return a whole .npy file."""
    with reading(where), path.open("rb") as file:
        return NpyReader(file, path.stat().st_size, where).whole()


def npy_items(path: Path, specs: Sequence[InputSpec], where: str, limit: int | None) -> Iterator[Item]:
    """Read one .npy file, first axis = sample, for a model with one input."""
    if len(specs) != 1:
        message = f"{where}: the model has {len(specs)} inputs; give an .npz with one array for each"
        raise DataError(message)
    with reading(where), path.open("rb") as file:
        reader = NpyReader(file, path.stat().st_size, where)
        yield from _items({specs[0].name: reader}, None, specs, where, limit)


def npz_items(path: Path, specs: Sequence[InputSpec], where: str, limit: int | None) -> Iterator[Item]:
    """Read an .npz: one array an input, first axis = sample, and possibly labels."""
    with ExitStack() as stack:
        with reading(where):
            archive = stack.enter_context(zipfile.ZipFile(path))
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in members:
                message = f"{where}: it holds {name!r} twice; write it anew with numpy.savez"
                raise DataError(message)
            members[name] = info
        label = label_name(list(members), specs)
        check_names(specs, [name for name in members if name != label], where)
        readers = {}
        for name, info in members.items():
            with reading(f"{where}: {name}"):
                stream = stack.enter_context(archive.open(info))
            readers[name] = NpyReader(stream, info.file_size, f"{where}: {name}")
        labels = readers.pop(label) if label else None
        yield from _items(readers, labels, specs, where, limit)


def _items(
    readers: dict[str, NpyReader], labels: NpyReader | None, specs: Sequence[InputSpec], where: str, limit: int | None
) -> Iterator[Item]:
    heads = {name: reader.head for name, reader in readers.items()}
    if labels is not None:
        check_label(labels.head.dtype, where)
    how = plan(specs, heads, labels.head if labels else None, where)
    count = how.count if limit is None else min(limit, how.count)
    row_bytes = sum(head.row_bytes for name, head in heads.items() if how.feeds[name] is not Feed.SHARED)
    row_bytes += labels.head.row_bytes if labels else 0
    _check_room(count * row_bytes, where)
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    shared = {name: reader.whole() for name, reader in readers.items() if how.feeds[name] is Feed.SHARED}
    for start in range(0, count, step):
        rows = min(step, count - start)
        arrays = {
            name: shared[name] if name in shared else _next(readers[name], rows, name in how.expand) for name in readers
        }
        label = None if labels is None else _next(labels, rows, how.expand_label)
        yield cut(specs, arrays, label, how, where, first=start)


def _next(reader: NpyReader, rows: int, whole: bool) -> Array:
    return reader.whole() if whole else reader.rows(rows)


def _check_room(wanted: int, where: str) -> None:
    """Refuse what would fill the disk, as a small file that unpacks to terabytes does."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if wanted > max(free, spool.MEMORY_BYTES):
        message = (
            f"{where}: it unpacks to {wanted:,} bytes, and {tempfile.gettempdir()} has room for {free:,}; "
            "set TMPDIR to a folder with room, or read fewer samples"
        )
        raise DataError(message)
