"""A model without its large weights, which stay in the file and are mapped from there.

Parsing a model only to add outputs or names to it would hold every weight four times: in the file's bytes, in the
message, in the bytes that ONNX Runtime gets, and in its session. So the weights' bytes are cut out of the file's before
they are parsed, and each is replaced by what ONNX has for data in another file: this file, offset and length.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing this package must not load onnx
    import onnx

__all__ = ["cut_weights", "load_skeleton", "varint"]

CUT_BYTES = 1 << 14
"""Smaller weights stay: ONNX Runtime may want to know their values, and each mapping has its price."""

# Fields of ModelProto, GraphProto, TensorProto and StringStringEntryProto.
GRAPH, INITIALIZER, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION, KEY, VALUE = 7, 5, 9, 13, 14, 1, 2
EXTERNAL = b"\x01"
VARINT, BYTES = 0, 2


def load_skeleton(path: str | Path) -> onnx.ModelProto:
    """Parse a model file; large initializers of the main graph stay in it, see `cut_weights`.

    A session of such a model needs the file's folder (see `Sessions.make_edited`).
    """
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(cut_weights(Path(path)))
    return model


def cut_weights(path: Path) -> bytes:
    """A model file's bytes, where large initializers of the main graph refer to their data in that file.

    Args:
        path: The model file. One that is a link, or no protobuf message, is returned whole: ONNX Runtime refuses
            external data that lie elsewhere, and the parser knows best what is wrong.

    Raises:
        OSError: The file cannot be read.
    """
    if path.is_symlink() or path.stat().st_size < CUT_BYTES:
        return path.read_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _without_weights(data, 0, len(data), [GRAPH, INITIALIZER], path.name.encode())
        except (IndexError, ValueError):
            return data[:]


def _without_weights(data: mmap.mmap, start: int, end: int, way: list[int], name: bytes) -> bytes:
    """A message's bytes, with the raw data replaced in the messages that the fields of `way` lead to."""
    parts = []
    place = b""
    kept = start
    for number, head, body, after in _long_fields(data, start, end):
        if way and number == way[0]:
            parts += [data[kept:head], _field(number, _without_weights(data, body, after, way[1:], name))]
            kept = after
        elif not way and number == RAW_DATA and after - body >= CUT_BYTES:
            parts.append(data[kept:head])
            place = _place(name, body, after - body)
            kept = after
    # At the end: of a field that comes twice the last counts, and some writers say where data lie even if here.
    return b"".join((*parts, data[kept:end], place))


def _place(name: bytes, offset: int, length: int) -> bytes:
    """The fields that say that a tensor's data lie in another file."""
    entries = {b"location": name, b"offset": b"%d" % offset, b"length": b"%d" % length}
    fields = [_field(EXTERNAL_DATA, _field(KEY, key) + _field(VALUE, value)) for key, value in entries.items()]
    return b"".join((varint(DATA_LOCATION << 3 | VARINT) + EXTERNAL, *fields))


def _long_fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The length-delimited fields of a message: number, where the field, its body and the next field start.

    Raises:
        ValueError: The bytes are no message.
        IndexError: They end too early.
    """
    at = start
    while at < end:
        head = at
        tag, at = _read_varint(data, at)
        match tag & 7:
            case 2:
                size, body = _read_varint(data, at)
                at = body + size
                if at > end:
                    raise ValueError
                yield tag >> 3, head, body, at
            case 0:
                _, at = _read_varint(data, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case _:
                raise ValueError


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number as protobuf writes it, seven bits a byte, lowest first; and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | BYTES) + varint(len(body)) + body


def varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
