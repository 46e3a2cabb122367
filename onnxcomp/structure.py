"""The protobuf side of a model: reading its structure, and taking the weights' bytes out and in again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import helper

from onnxcomp.errors import ModelError
from onnxcomp.ort_format import is_ort
from onnxcomp.skeleton import cut_weights
from onnxcomp.weights import Blob, LazyWeight, Spool, external_blob

__all__ = [
    "LAZY_FROM_BYTES",
    "check_functions",
    "check_text",
    "import_domains",
    "ir_version_for",
    "list_initializers_as_inputs",
    "model_files",
    "own_data_files",
    "read_in",
    "read_structure",
    "reference_of",
    "small_tensors",
    "sparse_tensors",
    "spooled",
    "stub",
    "tensors_of",
]

LAZY_FROM_BYTES = 256
"""Tensors of at least this size become lazy; smaller ones (shapes, scalars) stay in the structure for analysis."""

DEFAULT_DOMAINS = ("", "ai.onnx")


# --- stubs: a weight's place in the structure, with a reference to its blob instead of data ---------------------------

REFERENCE = "onnxcomp.blob"


def stub(tensor: onnx.TensorProto, blob: Blob, blobs: dict[str, Blob]) -> None:
    """Take the data out of a TensorProto and leave a reference."""
    reference = blob.key
    blobs.setdefault(reference, blob)
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=REFERENCE)
    tensor.external_data.add(key="key", value=reference)


def reference_of(tensor: onnx.TensorProto) -> str:
    """The reference of a stub, or an empty string."""
    entries = tensor.external_data
    return entries[1].value if len(entries) == 2 and entries[0].value == REFERENCE else ""


def spooled(data: bytes, onnx_dtype: int, dims: Iterable[int], spool: Spool) -> LazyWeight:
    """A new weight whose bytes go to a temporary file, for `gs.Constant(name, ...)`.

    Args:
        data: The bytes as ONNX stores them (2- and 4-bit types packed).
        onnx_dtype: The element type.
        dims: The shape.
        spool: Where large data go; small ones stay in the structure.
    """
    tensor = onnx.TensorProto(data_type=onnx_dtype, dims=dims)
    if len(data) < LAZY_FROM_BYTES:
        tensor.raw_data = data
        return LazyWeight(tensor, None)
    blob = spool.add(data)
    stub(tensor, blob, {})
    return LazyWeight(tensor, blob)


def small_tensors(structure: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors that always stay in the structure: those of functions and of sparse tensors."""
    for function in structure.functions:
        yield from _attribute_tensors(function.node)
    for sparse in sparse_tensors(structure.graph):
        yield from (sparse.values, sparse.indices)


def sparse_tensors(graph: onnx.GraphProto) -> Iterator[onnx.SparseTensorProto]:
    """Every sparse initializer of a graph and of its subgraphs."""
    for each in _graphs(graph):
        yield from each.sparse_initializer


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def read_in(tensor: onnx.TensorProto, blob: Blob) -> None:
    """Put the data into the TensorProto."""
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = b"".join(bytes(chunk) for chunk in blob.chunks())


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every TensorProto of a graph: initializers and tensor attributes, those of subgraphs included."""
    yield from graph.initializer
    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors_of(attribute.g)
            for inner in attribute.graphs:
                yield from tensors_of(inner)


# --- reading ----------------------------------------------------------------------------------------------------------


def check_functions(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, by whatever way: they have no end.

    Raises:
        ModelError: There are some.
    """
    bodies = {(function.domain, function.name): function.node for function in model.functions}
    calls = {
        name: {(node.domain, node.op_type) for node in _with_bodies(nodes)} & bodies.keys()
        for name, nodes in bodies.items()
    }
    while calls:
        ends = [name for name, called in calls.items() if not called & calls.keys()]
        if not ends:
            domain, name = next(iter(calls))
            message = (
                f"the function {name!r} of {domain!r} calls itself, maybe through others; ONNX allows no recursion"
            )
            raise ModelError(message)
        for name in ends:
            del calls[name]


def _with_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _with_bodies(body.node)


def check_text(message: Message) -> None:
    """Refuse names and other text that are not UTF-8, wherever they are: they could not be written back.

    Raises:
        ModelError: Some are not.
    """
    if isinstance(message, onnx.TensorProto):
        entries = (*message.external_data, *message.metadata_props)
        texts: tuple[Any, ...] = (message.name, message.doc_string, *(t for e in entries for t in (e.key, e.value)))
    else:
        texts = ()
        for field, value in message.ListFields():
            values = value if field.is_repeated else (value,)
            if field.type == field.TYPE_MESSAGE:
                for inner in values:
                    check_text(inner)
            elif field.type == field.TYPE_STRING:
                texts = (*texts, *values)
    for text in texts:
        if not isinstance(text, str):
            found: object = text
            error = f"the model has a name or text that is not UTF-8: {found!r}"
            raise ModelError(error)


def read_structure(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Parse a file; external data stay where they are.

    Args:
        path: The model file.
        weights: False leaves large weights in the file too: they then look like external data of that file.

    Raises:
        ModelError: It cannot be read, or is not an ONNX model.
    """
    try:
        if path.is_dir():
            message = f"{path}: is a folder, expected an .onnx file"
            raise ModelError(message)
        data = path.read_bytes() if weights else cut_weights(path)
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise ModelError(message) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        message = f"{path}: is not an ONNX model, or is cut short ({path.stat().st_size} bytes)"
        if is_ort(path):
            message = f"{path}: is in ONNX Runtime's own format; give the .onnx file that it was made of"
        raise ModelError(message) from error
    if not model.ir_version or not model.HasField("graph") or not (model.graph.node or model.graph.output):
        message = f"{path}: is not an ONNX model (no graph in it)"
        raise ModelError(message)
    return model


def list_initializers_as_inputs(graph: onnx.GraphProto, before: list[onnx.ValueInfoProto]) -> None:
    """Before IR 4 every initializer had to be a graph input as well; those listed `before` keep their places."""
    inputs = {info.name: info for info in graph.input}
    for tensor in graph.initializer:
        inputs[tensor.name] = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    for info in before:
        if info.name in inputs and inputs[info.name].type == info.type:
            inputs[info.name] = info
    order = [info.name for info in before if info.name in inputs]
    names = dict.fromkeys((*order, *inputs))
    listed = [inputs[name] for name in names]
    fresh = onnx.GraphProto()
    fresh.input.extend(listed)
    del graph.input[:]
    graph.input.extend(fresh.input)


def import_domains(model: onnx.ModelProto) -> None:
    """Import the operator sets of domains that rewrites brought in."""
    known = {entry.domain for entry in model.opset_import}
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.domain not in known and not (node.domain in DEFAULT_DOMAINS and known & set(DEFAULT_DOMAINS)):
                known.add(node.domain)
                model.opset_import.add(domain=node.domain, version=1)


def ir_version_for(opset: int) -> int:
    """The lowest IR version that may carry an opset."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)], ignore_unknown=True))


def model_files(path: Path) -> list[Path]:
    """A saved model's files: the .onnx file, then the external data files that it names."""
    proto = onnx.ModelProto()
    if path.suffix != ".ort":
        proto = read_structure(path, weights=False)
    folder = path.resolve().parent
    external = {
        external_blob(tensor, folder).path
        for tensor in tensors_of(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    return [path, *sorted(external - {path.resolve()})]


def own_data_files(path: Path) -> set[Path]:
    """The data files that an existing model at `path` names beside itself, to be removed once it is replaced."""
    if not path.is_file():
        return set()
    try:
        tensors = list(tensors_of(read_structure(path, weights=False).graph))
    except ModelError:
        return set()
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    own = {name for name in names if name.startswith(f"{path.name}.") and name.endswith(".data") and "/" not in name}
    return {path.with_name(name) for name in own}
