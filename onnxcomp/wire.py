"""Writes a ModelProto with its weights streamed in: the same bytes as protobuf's own, without a copy in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import onnx
from google.protobuf.message import Message

from onnxcomp.skeleton import varint
from onnxcomp.structure import read_in, reference_of, tensors_of
from onnxcomp.weights import Blob

__all__ = ["model_bytes", "write_model"]

Piece = bytes | Blob

LENGTH_DELIMITED = 2
GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def write_model(structure: onnx.ModelProto, blobs: Mapping[str, Blob], file: IO[bytes]) -> None:
    """Write a model whose large weights are stubs; their data are read piece by piece.

    Args:
        structure: The model; stubs outside the main graph's initializers are filled in.
        blobs: The data of the stubs, by reference.
        file: Where to.
    """
    for piece in _model(structure, blobs):
        for chunk in (piece,) if isinstance(piece, bytes) else piece.chunks():
            file.write(chunk)


def model_bytes(structure: onnx.ModelProto, blobs: Mapping[str, Blob]) -> int:
    """How many bytes `write_model` would write."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.nbytes for piece in _model(structure, blobs))


def _model(model: onnx.ModelProto, blobs: Mapping[str, Blob]) -> Iterator[Piece]:
    for tensor in itertools.islice(tensors_of(model.graph), len(model.graph.initializer), None):
        if reference := reference_of(tensor):
            read_in(tensor, blobs[reference])
    yield _fields(model, lambda number: number < GRAPH)
    yield from _nested(GRAPH, list(_graph(model.graph, blobs)))
    yield _fields(model, lambda number: number > GRAPH)


def _graph(graph: onnx.GraphProto, blobs: Mapping[str, Blob]) -> Iterator[Piece]:
    yield _fields(graph, lambda number: number < INITIALIZER)
    for tensor in graph.initializer:
        reference = reference_of(tensor)
        yield from _nested(INITIALIZER, _tensor(tensor, blobs[reference]) if reference else [_serialized(tensor)])
    yield _fields(graph, lambda number: number > INITIALIZER)


def _tensor(stub: onnx.TensorProto, blob: Blob) -> list[Piece]:
    """A stub's fields with the data in their place."""
    bare = onnx.TensorProto()
    bare.CopyFrom(stub)
    bare.ClearField("external_data")
    bare.ClearField("data_location")
    before, after = (_fields(bare, lambda number: number < RAW_DATA), _fields(bare, lambda number: number > RAW_DATA))
    return [before, _tag(RAW_DATA) + varint(blob.nbytes), blob, after]


def _nested(number: int, pieces: list[Piece]) -> Iterator[Piece]:
    """A message field: tag, length, contents."""
    size = sum(len(piece) if isinstance(piece, bytes) else piece.nbytes for piece in pieces)
    yield _tag(number) + varint(size)
    yield from pieces


def _fields(message: Message, wanted: Callable[[int], bool]) -> bytes:
    """The serialized fields whose numbers are wanted."""
    part = type(message)()
    for field, value in message.ListFields():
        if not wanted(field.number):
            continue
        if field.is_repeated:
            getattr(part, field.name).extend(value)
        elif isinstance(value, Message):
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
    return _serialized(part)


def _serialized(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _tag(number: int) -> bytes:
    return varint(number << 3 | LENGTH_DELIMITED)
