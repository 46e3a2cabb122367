"""Feeds and outputs as files that Python, C and JavaScript read alike.

Little endian: ``u32 runs``, then for each run ``u32 tensors``, then for each tensor ``u32 length, name (UTF-8),
u32 ONNX element type, u32 rank, i64 sizes..., u64 bytes, data``. Needs nothing but numpy: it is also copied to where
there is nothing else.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["read_tensors", "write_tensors"]

TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
}
"""ONNX element type -> numpy's."""

_NUMBERS = {dtype: number for number, dtype in TYPES.items()}


def write_tensors(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the tensors of several runs.

    Args:
        path: The file to write.
        runs: For each run, name -> array.

    Raises:
        ValueError: Something is no array of numbers.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs.tensors"
        >>> write_tensors(path, [{"x": np.arange(3, dtype=np.int8)}])
        >>> read_tensors(path)
        [{'x': array([0, 1, 2], dtype=int8)}]
    """
    with path.open("wb") as file:
        file.write(struct.pack("<I", len(runs)))
        for run in runs:
            file.write(struct.pack("<I", len(run)))
            for name, value in run.items():
                _write(file, name, value)


def _write(file: IO[bytes], name: str, value: Any) -> None:
    array = value if isinstance(value, np.ndarray) else None
    if array is None or array.dtype not in _NUMBERS:
        what = type(value).__name__ if array is None else str(array.dtype)
        message = f"{name!r} is of the type {what}; only tensors of numbers can be handed over"
        raise ValueError(message)
    text = name.encode()
    file.write(struct.pack("<I", len(text)) + text)
    file.write(struct.pack(f"<II{array.ndim}q", _NUMBERS[array.dtype], array.ndim, *array.shape))
    file.write(struct.pack("<Q", array.nbytes))
    file.write(np.ascontiguousarray(array).tobytes())


def read_tensors(path: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Read what `write_tensors`, or its like in another language, has written.

    Raises:
        ValueError: The file is broken.
    """
    data = path.read_bytes()
    place = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(form, data, place)
        place += struct.calcsize(form)
        return values

    runs = []
    try:
        for _ in range(*take("<I")):
            run: dict[str, np.ndarray[Any, Any]] = {}
            for _ in range(*take("<I")):
                (length,) = take("<I")
                name = data[place : place + length].decode()
                place += length
                number, rank = take("<II")
                shape = take(f"<{rank}q")
                (size,) = take("<Q")
                dtype = TYPES[number]
                run[name] = np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape).copy()
                place += size
            runs.append(run)
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        message = f"{path}: broken at byte {place:,} of {len(data):,} ({error})"
        raise ValueError(message) from error
    return runs
