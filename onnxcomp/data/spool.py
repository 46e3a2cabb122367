"""Collect samples that arrive a few at a time: in memory while they are few, in temporary files beyond that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from onnxcomp.data.dataset import Segment
from onnxcomp.data.fit import Feed, Item
from onnxcomp.data.specs import Array
from onnxcomp.errors import DataError

MEMORY_BYTES = 64 << 20
MOST_OF_FREE = 0.9
"""The share of the temporary folder's free space that samples may take: some generators never end."""
_ALIGNMENT = 64
_LABEL = 0  # the labels' key among the columns: no input can have it, as their names are text


@dataclass
class _Column:
    """One input's (or the labels') values within one segment."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: list[Array] = field(default_factory=list)
    start: int | None = None


@dataclass
class _Group:
    """Consecutive samples of equal shape: a segment in the making."""

    key: object
    feeds: Mapping[str, Feed]
    shared: Mapping[str, Array]
    columns: dict[str | int, _Column]
    size: int = 0


class Spool:
    """Collects items into segments; see the module's docstring."""

    def __init__(self, where: str, memory_bytes: int | None = None) -> None:
        self._where = where
        self._memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self._groups: list[_Group] = []
        self._held = 0
        self._spilled = False
        self._files: dict[str | int, IO[bytes]] = {}
        self._room = 0.0
        self.size = 0

    def add(self, item: Item) -> None:
        """Append samples; they are copied, so that the caller may reuse its arrays."""
        if self._groups and (item.labels is None) != (_LABEL not in self._groups[0].columns):
            message = f"{self._where}: some samples have a label and some have none; give one to all or to none"
            raise DataError(message)
        if not item.count:
            return
        columns: dict[str | int, Array] = {
            name: array for name, array in item.arrays.items() if item.feeds[name] is not Feed.SHARED
        }
        if item.labels is not None:
            columns[_LABEL] = item.labels
        group = self._group(item, columns)
        for name, array in columns.items():
            self._append(name, group.columns[name], array)
        group.size += item.count
        self.size += item.count
        if not self._spilled and self._held > self._memory_bytes:
            self._spill()

    def _group(self, item: Item, columns: Mapping[str | int, Array]) -> _Group:
        shared = {name: array for name, array in item.arrays.items() if item.feeds[name] is Feed.SHARED}
        key = (
            tuple(item.feeds.items()),
            tuple((name, array.dtype, array.shape[1:]) for name, array in columns.items()),
            tuple((name, array.dtype, array.tobytes()) for name, array in shared.items()),
        )
        if not self._groups or self._groups[-1].key != key:
            made = {name: _Column(array.dtype, array.shape[1:]) for name, array in columns.items()}
            self._groups.append(_Group(key, item.feeds, {n: a.copy() for n, a in shared.items()}, made))
        return self._groups[-1]

    def _append(self, name: str | int, column: _Column, array: Array) -> None:
        if not self._spilled:
            column.pieces.append(np.array(array, order="C"))
            self._held += array.nbytes
        else:
            self._write(name, column, array)

    def _spill(self) -> None:
        """Move what is held in memory to files, one a column."""
        self._spilled = True
        self._room = MOST_OF_FREE * shutil.disk_usage(tempfile.gettempdir()).free
        for group in self._groups:
            for name, column in group.columns.items():
                for piece in column.pieces:
                    self._write(name, column, piece)
                column.pieces.clear()

    def _write(self, name: str | int, column: _Column, array: Array) -> None:
        self._room -= array.nbytes
        if self._room < 0:
            message = (
                f"{self._where}: {self.size:,} samples fill most of {tempfile.gettempdir()}, and there are more; "
                "end them earlier, or set TMPDIR to a folder with room"
            )
            raise DataError(message)
        with self._writing():
            if name not in self._files:
                # Such a file has no name: the system takes it back however the process ends.
                self._files[name] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
            file = self._files[name]
            if column.start is None:
                column.start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
                file.write(bytes(column.start - file.tell()))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = (
                f"{self._where}: cannot spool the data to {tempfile.gettempdir()}: {error.strerror}; "
                "set TMPDIR to a folder with room"
            )
            raise DataError(message) from error

    def finish(self) -> list[Segment]:
        """Return what was collected."""
        maps: dict[str | int, Array] = {}
        for name, file in self._files.items():
            with self._writing():
                file.flush()
                if file.tell():
                    maps[name] = np.memmap(file, dtype=np.uint8, mode="r")  # outlives close()
        segments = []
        for group in self._groups:
            arrays = {name: _values(column, group.size, maps.get(name)) for name, column in group.columns.items()}
            labels = arrays.pop(_LABEL, None)
            inputs = {**{str(name): array for name, array in arrays.items()}, **group.shared}
            segments.append(Segment(group.feeds, inputs, labels, group.size))
            group.columns.clear()
        return segments

    def close(self) -> None:
        """Close the files; what `finish` returned stays valid."""
        for file in self._files.values():
            file.close()


def _values(column: _Column, rows: int, bytes_: Array | None) -> Array:
    shape = (rows, *column.shape)
    if column.pieces:
        return column.pieces[0] if len(column.pieces) == 1 else np.concatenate(column.pieces)
    length = int(np.prod(shape)) * column.dtype.itemsize
    if bytes_ is None or not length:
        return np.empty(shape, column.dtype)
    start = column.start or 0
    return bytes_[start : start + length].view(column.dtype).reshape(shape)
