"""Where a weight's bytes are: in memory, in a file, or still inside its TensorProto.

A graph holds its large weights as `LazyWeight`: a stub without data, and a `Blob` that can produce the bytes. Forks
share blobs, an untouched weight is never copied, and saving streams from where the bytes are.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import tempfile
import weakref
from abc import ABC, abstractmethod
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxcomp.errors import ModelError, OutputError
from onnxcomp.files import check_unchanged, stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ArrayBlob",
    "Blob",
    "FileBlob",
    "LazyWeight",
    "SparseWeight",
    "Spool",
    "SpooledBlob",
    "check_sparse",
    "check_tensor",
    "external_blob",
    "numpy_dtype",
    "stored_bytes",
]

CHUNK_BYTES = 1 << 22
"""Files are read and written in pieces of this size, so that a large weight needs no memory."""

MOST_DENSE_BYTES = 1 << 31
"""A sparse tensor is written out to be run, and no tensor inside a model may be larger; a few bytes can claim more."""

BITS_OF_SUBBYTE = {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    getattr(onnx.TensorProto, "UINT2", -1): 2,
    getattr(onnx.TensorProto, "INT2", -2): 2,
}


def numpy_dtype(onnx_dtype: int) -> np.dtype[Any]:
    """The numpy dtype of an ONNX element type (ml_dtypes for bfloat16, float8 and 4-bit types; object for strings).

    Raises:
        ModelError: ONNX knows no such type.
    """
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(onnx_dtype))
    except KeyError as error:
        message = f"the model has a tensor of element type {onnx_dtype}, which ONNX does not know"
        raise ModelError(message) from error


def stored_bytes(dims: tuple[int, ...], onnx_dtype: int) -> int:
    """How many bytes a tensor of this shape takes in `raw_data` or an external file."""
    count = math.prod(dims)
    bits = BITS_OF_SUBBYTE.get(onnx_dtype)
    return -(-count * bits // 8) if bits else count * numpy_dtype(onnx_dtype).itemsize


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Refuse a tensor whose type, shape and amount of data do not fit each other.

    Raises:
        ModelError: They do not.
    """
    where = f"tensor {tensor.name!r}"
    if tensor.data_type not in helper.get_all_tensor_dtypes() or tensor.data_type == onnx.TensorProto.UNDEFINED:
        message = f"{where}: its element type {tensor.data_type} is none that ONNX knows"
        raise ModelError(message)
    dims = tuple(tensor.dims)
    if any(dim < 0 for dim in dims):
        message = f"{where}: its shape {list(dims)} has a negative dimension"
        raise ModelError(message)
    if tensor.HasField("segment"):
        message = f"{where}: it is one segment of a tensor, which no runtime reads; join the segments"
        raise ModelError(message)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        if tensor.data_type == onnx.TensorProto.STRING:
            message = f"{where}: its strings are in raw_data, where ONNX allows none"
            raise ModelError(message)
        unit, expected, got = "bytes", stored_bytes(dims, tensor.data_type), len(tensor.raw_data)
    else:
        unit, expected = "numbers", _stored_numbers(math.prod(dims), tensor.data_type)
        got = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    if got != expected:
        message = f"{where}: shape {list(dims)} needs {expected} {unit}, the file has {got}"
        raise ModelError(message)


def check_sparse(tensor: onnx.SparseTensorProto) -> None:
    """Refuse a sparse tensor that cannot be written out as a dense one.

    Raises:
        ModelError: Its values and places do not fit each other or its shape, or it would take more than 2 GiB.
    """
    where, dims = f"sparse tensor {tensor.values.name!r}", tuple(tensor.dims)
    count = math.prod(tensor.values.dims)
    problem = ""
    if any(dim < 0 for dim in dims) or stored_bytes(dims, tensor.values.data_type) > MOST_DENSE_BYTES:
        problem = f"its shape {list(dims)} is negative, or has more than 2 GiB of numbers"
    elif len(tensor.values.dims) != 1:
        problem = f"its values must have one axis, got the shape {list(tensor.values.dims)}"
    elif tensor.indices.data_type != onnx.TensorProto.INT64:
        problem = "its indices must be int64"
    elif tuple(tensor.indices.dims) not in {(count,), (count, len(dims))}:
        problem = f"{count} values of {len(dims)} axes do not go with indices of shape {list(tensor.indices.dims)}"
    else:
        indices = numpy_helper.to_array(tensor.indices)
        limits = np.array([math.prod(dims)] if indices.ndim == 1 else dims, np.int64)
        if np.any(indices < 0) or np.any(indices >= limits):
            problem = f"some of its indices are outside of its shape {list(dims)}"
    if problem:
        message = f"{where}: {problem}"
        raise ModelError(message)


def _stored_numbers(count: int, onnx_dtype: int) -> int:
    """How many numbers a tensor takes in a typed field such as `int32_data`."""
    if onnx_dtype in {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}:
        return 2 * count
    bits = BITS_OF_SUBBYTE.get(onnx_dtype)
    return -(-count * bits // 8) if bits else count


class Blob(ABC):
    """The bytes of one weight, as ONNX stores them."""

    nbytes: int

    @property
    def key(self) -> str:
        """What tells this blob from others, cheaply: the same key means the same bytes."""
        return self.digest

    @abstractmethod
    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in pieces."""

    @abstractmethod
    def buffer(self) -> Any:
        """The bytes as one read-only buffer (a mapped file, or the bytes in memory)."""

    @abstractmethod
    def part(self, start: int, length: int) -> bytes | memoryview:
        """Some of the bytes, by a plain read: mapped pages would count as resident memory."""

    @cached_property
    def digest(self) -> str:
        """A hash of the contents, computed once and without loading the whole."""
        state = hashlib.sha256()
        for chunk in self.chunks():
            state.update(chunk)
        return state.hexdigest()


class ArrayBlob(Blob):
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes at once: they are in memory already."""
        yield self._data

    def buffer(self) -> bytes:
        """The bytes."""
        return self._data

    def part(self, start: int, length: int) -> memoryview:
        """Some of the bytes, not copied."""
        return memoryview(self._data)[start : start + length]


class FileBlob(Blob):
    """A range of a file, mapped when it is read."""

    def __init__(self, path: Path, offset: int, nbytes: int) -> None:
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self.stamp = stamp_of(path)

    @property
    def key(self) -> str:
        """The place in the file: hashing gigabytes can wait until a digest is asked for."""
        return f"{self.path}:{self.offset}:{self.nbytes}"

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file, if it is still the one that it was."""
        try:
            file = self.path.open("rb")
        except OSError:
            check_unchanged(self.path, self.stamp)
            raise
        with file:
            check_unchanged(self.path, self.stamp, opened=file.fileno())
            yield file

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the range in pieces, by plain reads: mapped pages would count as resident memory."""
        left = self.nbytes
        with self._opened() as file:
            file.seek(self.offset)
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    message = f"{self.path}: the file became shorter while it was read"
                    raise ModelError(message)
                left -= len(chunk)
                yield chunk
            check_unchanged(self.path, self.stamp, opened=file.fileno())

    def buffer(self) -> Any:
        """The range as a read-only memory map."""
        if not self.nbytes:
            return b""
        with self._opened() as file:
            return np.memmap(file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.nbytes,))

    def part(self, start: int, length: int) -> bytes:
        """Some of the range, read."""
        with self._opened() as file:
            file.seek(self.offset + start)
            data = file.read(length)
        if len(data) < length:
            message = f"{self.path}: the file became shorter while it was read"
            raise ModelError(message)
        return data


class Spool:
    """A temporary file that takes the bytes of new weights, so that they need no memory.

    The file has no name; its space is freed when the last blob in it is let go.

    Example:
        >>> spool = Spool()
        >>> first, second = spool.add(b"abc"), spool.add(b"de")
        >>> bytes(second.buffer()), first.nbytes
        (b'de', 3)
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="onnxcomp-")  # noqa: SIM115 - closed by the finalizer
        self._end = 0
        weakref.finalize(self, self.file.close)

    def add(self, data: bytes) -> Blob:
        """Append bytes.

        Raises:
            OutputError: The temporary folder has no room.
        """
        offset = self._end
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            message = f"{tempfile.gettempdir()}: new weights cannot be written ({error.strerror}); set TMPDIR"
            raise OutputError(message) from error
        self._end += len(data)
        return SpooledBlob(self, offset, len(data))


class SpooledBlob(Blob):
    """A range of a spool."""

    def __init__(self, spool: Spool, offset: int, nbytes: int) -> None:
        self._spool = spool
        self.offset = offset
        self.nbytes = nbytes

    @property
    def key(self) -> str:
        """The place in the spool: nothing is written there twice."""
        return f"spool {id(self._spool)}:{self.offset}:{self.nbytes}"

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the range in pieces, by plain reads."""
        place, end = self.offset, self.offset + self.nbytes
        while place < end:
            chunk = os.pread(self._spool.file.fileno(), min(CHUNK_BYTES, end - place), place)
            place += len(chunk)
            yield chunk

    def buffer(self) -> Any:
        """The range as a read-only memory map."""
        if not self.nbytes:
            return b""
        return np.memmap(self._spool.file, dtype=np.uint8, mode="r", offset=self.offset, shape=(self.nbytes,))

    def part(self, start: int, length: int) -> bytes:
        """Some of the range, read."""
        return os.pread(self._spool.file.fileno(), length, self.offset + start)


class LazyWeight(LazyValues):  # type: ignore[misc] # graphsurgeon has no type information
    """A constant's value that is read when a pass asks for it; graphsurgeon calls `load()`."""

    def __init__(self, tensor: onnx.TensorProto, blob: Blob | None) -> None:
        self.tensor = tensor
        self.blob = blob
        self.shape = list(tensor.dims)
        self.dtype = numpy_dtype(tensor.data_type)
        self.nbytes = blob.nbytes if blob else stored_bytes(tuple(tensor.dims), tensor.data_type)

    def load(self) -> np.ndarray[Any, Any]:
        """The value, read-only where it is a view of a file."""
        if self.blob is None:
            return np.asarray(numpy_helper.to_array(self.tensor))
        if self.tensor.data_type in BITS_OF_SUBBYTE:
            whole = onnx.TensorProto()
            whole.CopyFrom(self.tensor)
            whole.ClearField("external_data")
            whole.ClearField("data_location")
            whole.raw_data = b"".join(bytes(chunk) for chunk in self.blob.chunks())
            return np.asarray(numpy_helper.to_array(whole))
        return np.frombuffer(self.blob.buffer(), dtype=self.dtype.newbyteorder("<")).reshape(self.shape)


class SparseWeight(SparseValues):  # type: ignore[misc] # graphsurgeon has no type information
    """The value of a `sparse_initializer`; read as a dense array, kept sparse when untouched."""

    def __init__(self, tensor: onnx.SparseTensorProto) -> None:
        self.tensor = tensor
        self.shape = list(tensor.dims)
        self.dtype = numpy_dtype(tensor.values.data_type)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> np.ndarray[Any, Any]:
        """The dense array."""
        values = numpy_helper.to_array(self.tensor.values)
        indices = numpy_helper.to_array(self.tensor.indices)
        dense = np.zeros(self.shape, self.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        return dense


def external_blob(tensor: onnx.TensorProto, folder: Path) -> FileBlob:
    """The file range that holds an external tensor, checked to lie inside the model's folder and the file.

    Raises:
        ModelError: The entry points outside the folder, at something that is not a regular file, past its end, or at
            a number of bytes that does not fit the tensor's shape.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"initializer {tensor.name!r}"
    path = _inside(folder, entries.get("location", ""), where)
    expected = stored_bytes(tuple(tensor.dims), tensor.data_type)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        message = f"{where}: the offset and length of its external data must be whole numbers ({error})"
        raise ModelError(message) from error
    if length != expected:
        message = f"{where}: shape {list(tensor.dims)} needs {expected} bytes of external data, the entry says {length}"
        raise ModelError(message)
    size = path.stat().st_size
    if offset < 0 or offset + length > size:
        message = f"{where}: its external data end at byte {offset + length}, {path.name} has only {size}"
        raise ModelError(message)
    return FileBlob(path, offset, length)


def _inside(folder: Path, location: str, where: str) -> Path:
    """The file that an external-data location names, refused unless it lies inside `folder`."""
    base = folder.resolve()
    parts = Path(location.replace("\\", "/"))
    if not location or "\0" in location or parts.is_absolute() or ".." in parts.parts:
        message = f"{where}: external data must lie inside the model's folder, got the location {location!r}"
        raise ModelError(message)
    path = base / parts
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(base):
        message = f"{where}: the external data file {location!r} is a link that leads out of the model's folder"
        raise ModelError(message)
    try:
        mode = real.stat().st_mode
    except OSError as error:
        message = f"{where}: its external data file {location!r} cannot be read ({error.strerror})"
        raise ModelError(message) from error
    if not stat.S_ISREG(mode):
        message = f"{where}: the external data file {location!r} is not a regular file"
        raise ModelError(message)
    return real
