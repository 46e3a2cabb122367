"""Change ONNX models and .npz archives by their structure, for `benchmarks.fuzzing`."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message

__all__ = ["change_archive", "change_model"]

NUMBERS = (0, 1, 2, 3, 7, 8, 9, 13, 16, 17, 22, 23, 127, 255, 256, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
MOST_CHANGES = 4
KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def change_model(data: bytes, most: int, seed: int) -> bytes:
    """Change some fields of a ModelProto: drop, double, swap or replace them. No message: change its bytes."""
    rng = random.Random(seed)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        messages = list(_messages(model))
        for _ in range(rng.randint(1, MOST_CHANGES)):
            _change_field(rng.choice(messages), messages, rng)
        changed = model.SerializeToString()
    except (DecodeError, EncodeError, UnicodeError):  # text that is not UTF-8
        return _change_bytes(data, rng)
    return changed if len(changed) <= most else data


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner)


def _change_field(message: Any, messages: list[Message], rng: random.Random) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if message.ListFields() and rng.random() < 0.7:
        field = rng.choice(message.ListFields())[0]
    if rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        _change_messages(message, field, messages, rng)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if values and rng.random() < 0.5:
            del values[rng.randrange(len(values))]
        else:
            values.insert(rng.randint(0, len(values)), _value(field, message, messages, rng))
    else:
        setattr(message, field.name, _value(field, message, messages, rng))


def _change_messages(message: Any, field: Any, messages: list[Message], rng: random.Random) -> None:
    """Put a copy of a message of the same type that the model has, or an empty one, there."""
    same = [each for each in messages if each.DESCRIPTOR.full_name == field.message_type.full_name]
    target = getattr(message, field.name)
    if field.is_repeated:
        if target and rng.random() < 0.3:
            del target[rng.randrange(len(target))]
            return
        target = target.add()
    copy = type(target)()
    if same and rng.random() < 0.9:
        copy.CopyFrom(rng.choice(same))
    target.CopyFrom(copy)


def _value(field: Any, message: Any, messages: list[Message], rng: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        texts = [value for each in messages for kind, value in _texts(each)]
        return rng.choice([*texts, "", "\n", "x", "a/../b"])
    if field.type == field.TYPE_BYTES:
        known = getattr(message, field.name)
        known = b"" if field.is_repeated else bytes(known)
        return _change_bytes(known, rng)
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    if field.type in {field.TYPE_FLOAT, field.TYPE_DOUBLE}:
        return rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e38, 1e-40])
    number = rng.choice(NUMBERS)
    if field.type == field.TYPE_INT32:
        return min(number, 2**31 - 1) * rng.choice((1, 1, 1, -1))
    return number if field.type == field.TYPE_UINT64 else number * rng.choice((1, 1, 1, -1))


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in value if field.is_repeated else (value,):
                yield field.name, text


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    place = rng.randint(0, len(changed))
    match rng.randrange(4):
        case 0:
            changed[place:place] = rng.randbytes(rng.randint(1, 8))
        case 1:
            del changed[place : place + rng.randint(1, 8)]
        case 2 if changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        case _:
            changed[place : place + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))])
    return bytes(changed)


def change_archive(data: bytes, most: int, seed: int) -> bytes:
    """Change a member of a zip archive or its name, with a checksum that fits. No archive: change its bytes."""
    rng = random.Random(seed)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist() if info.file_size < most]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError):
        return _change_bytes(data, rng)
    if not members:
        return _change_bytes(data, rng)
    number = rng.randrange(len(members))
    name, contents = members[number]
    if rng.random() < 0.1:
        name = rng.choice((*(each for each, _ in members), "label.npy", "y.npy", "/x.npy", "x"))
    else:
        contents = _change_bytes(contents, rng)
    members[number] = name, contents
    stream = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(stream, "w", rng.choice(KINDS)) as archive:
        for each, values in members:
            archive.writestr(each or "x", values)
    return stream.getvalue()
