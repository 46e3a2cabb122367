"""`Model`: an ONNX model that passes rewrite, and that nothing gets lost from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Union

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx import helper, numpy_helper, shape_inference, version_converter
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcomp.errors import ModelError
from onnxcomp.files import check_writable, replaced_whole
from onnxcomp.graph_io import Node, Variable, describe, export_graph, import_graph, walk
from onnxcomp.weights import ArrayBlob, Blob, LazyWeight, external_blob

__all__ = ["Model", "ModelSource"]

Array = np.ndarray[Any, Any]
ModelSource = Union[str, Path, onnx.ModelProto, "Model"]

LAZY_FROM_BYTES = 256
"""Tensors of at least this size become lazy; smaller ones (shapes, scalars) stay in the structure for analysis."""

INLINE_LIMIT_BYTES = (1 << 31) - (1 << 20)
"""What a single protobuf file can hold, less some room for the structure."""

ALIGNMENT = 4096
"""External tensors start at a page, so that a runtime can map them."""

DEFAULT_DOMAINS = ("", "ai.onnx")


class Model:
    """An ONNX model: a graphsurgeon graph to rewrite, with lazy weights, and all that surrounds it.

    Make one with `Model.load`. `graph` is an onnx-graphsurgeon `Graph`; its nodes and tensors are plain Python objects.

    Attributes:
        graph: The graph that passes rewrite.
        metadata: The model's metadata_props; kept, and free to edit.
        path: The file it came from, if any.

    Example:
        >>> from onnx import parser
        >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
        >>> model = Model.load(parser.parse_model(text))
        >>> [node.op for node in model.graph.nodes], model.opset
        (['Relu'], 17)
    """

    def __init__(
        self, structure: onnx.ModelProto, blobs: dict[str, Blob], path: Path | None, *, external: bool
    ) -> None:
        self.path = path
        self.metadata = {entry.key: entry.value for entry in structure.metadata_props}
        self._external = external
        self._blobs = blobs
        self._header = onnx.ModelProto()
        for field, value in structure.ListFields():
            if field.name == "graph" or field.name == "metadata_props":
                continue
            if field.is_repeated:
                getattr(self._header, field.name).extend(value)
            else:
                setattr(self._header, field.name, value)
        load = partial(_lazy, blobs=blobs)
        self.graph: gs.Graph = import_graph(structure.graph, load, overridable=structure.ir_version >= 4)
        self.graph.opset = self.opset
        self._extras: dict[str, onnx.NodeProto] = {
            node.outputs[0].name: node.extra
            for node in self.graph.nodes
            if isinstance(node, Node) and node.extra is not None and node.outputs
        }

    # --- making ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: ModelSource) -> Model:
        """Read a model; weights are read only when they are asked for.

        Args:
            source: A path to an .onnx file, a ModelProto, or a Model (forked).

        Raises:
            ModelError: The file is missing, not an ONNX model, cut short, or points at data outside its folder.
        """
        if isinstance(source, Model):
            return source.fork()
        if isinstance(source, onnx.ModelProto):
            structure = onnx.ModelProto()
            structure.CopyFrom(source)
            return cls._from_proto(structure, None)
        path = Path(source)
        return cls._from_proto(_read(path), path)

    @classmethod
    def _from_proto(cls, structure: onnx.ModelProto, path: Path | None) -> Model:
        folder = path.resolve().parent if path else Path.cwd()
        blobs: dict[str, Blob] = {}
        external = False
        for tensor in _tensors(structure.graph):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external = True
                _stub(tensor, external_blob(tensor, folder), blobs)
            elif tensor.HasField("raw_data") and len(tensor.raw_data) >= LAZY_FROM_BYTES:
                _stub(tensor, ArrayBlob(tensor.raw_data), blobs)
        return cls(structure, blobs, path, external=external)

    def fork(self) -> Model:
        """A copy to rewrite freely; weights are shared, not copied."""
        return Model(self.proto(), dict(self._blobs), self.path, external=self._external)

    def become(self, other: Model) -> None:
        """Take over another model's contents (a fork that turned out well); `other` must not be used any more."""
        self.__dict__.update(other.__dict__)

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        versions = [entry.version for entry in self._header.opset_import if entry.domain in DEFAULT_DOMAINS]
        return max(versions, default=1)

    @property
    def ir_version(self) -> int:
        """The ONNX IR version of the file."""
        return int(self._header.ir_version)

    @property
    def functions(self) -> list[onnx.FunctionProto]:
        """The model-local functions, which passes leave alone."""
        return list(self._header.functions)

    def graphs(self) -> Iterator[gs.Graph]:
        """The graph and every subgraph in it."""
        return walk(self.graph)

    def constants(self) -> Iterator[gs.Constant]:
        """Every constant that a node of the graph or of a subgraph reads, once."""
        seen: set[int] = set()
        for graph in self.graphs():
            for node in graph.nodes:
                for tensor in node.inputs:
                    if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield tensor

    def weight(self, name: str) -> Array:
        """The value of an initializer, read without keeping it in memory.

        Raises:
            ModelError: No initializer has this name.
        """
        return value_of(self._constant(name))

    def set_weight(self, name: str, array: Array) -> None:
        """Replace the value of an initializer.

        Raises:
            ModelError: No initializer has this name.
        """
        self._constant(name).values = np.asarray(array)

    def _constant(self, name: str) -> gs.Constant:
        for tensor in self.constants():
            if tensor.name == name:
                return tensor
        message = f"the model has no initializer called {name!r}"
        raise ModelError(message)

    @property
    def digest(self) -> str:
        """A hash of everything in the model, the weights included."""
        structure = self.proto()
        for tensor in _tensors(structure.graph):
            if reference := _ref(tensor):
                tensor.external_data[1].value = self._blobs[reference].digest
        return hashlib.sha256(structure.SerializeToString(deterministic=True)).hexdigest()

    @property
    def size_bytes(self) -> int:
        """The bytes that the saved model takes, to within a few bytes a weight: the file and its external data."""
        structure = self.proto()
        total = structure.ByteSize()
        for tensor in _tensors(structure.graph):
            if reference := _ref(tensor):
                stub_bytes = tensor.ByteSize()
                nbytes = self._blobs[reference].nbytes
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                bare_bytes = tensor.ByteSize()
                full_bytes = bare_bytes + 1 + _varint_bytes(nbytes) + nbytes
                total += full_bytes - stub_bytes + _varint_bytes(full_bytes) - _varint_bytes(stub_bytes)
        return total

    # --- changing -------------------------------------------------------------------------------------------------

    def unique_name(self, base: str) -> str:
        """A tensor or node name that nothing in the model has yet."""
        taken = self._names()
        if base not in taken:
            taken.add(base)
            return base
        number = 1
        while f"{base}_{number}" in taken:
            number += 1
        name = f"{base}_{number}"
        taken.add(name)
        return name

    def _names(self) -> set[str]:
        """All names in use; remembered, since names are only ever added by asking for them here."""
        if not hasattr(self, "_taken"):
            self._taken: set[str] = set()
            for graph in self.graphs():
                self._taken.update(tensor.name for tensor in (*graph.inputs, *graph.outputs))
                for node in graph.nodes:
                    self._taken.add(node.name)
                    self._taken.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        return self._taken

    def infer_shapes(self) -> None:
        """Fill in the dtypes and shapes of inner tensors where ONNX's shape inference knows them."""
        try:
            inferred = shape_inference.infer_shapes(self.proto(), data_prop=True)
        except (shape_inference.InferenceError, RuntimeError, ValueError):
            return  # a model that its own operators contradict keeps what it declares
        _describe_tensors(self.graph, inferred.graph)

    def raise_opset(self, version: int) -> None:
        """Convert the model to a later opset with ONNX's version converter.

        Raises:
            ModelError: The converter cannot convert this model.
        """
        if self.opset >= version:
            return
        if self.functions:
            message = f"opset {self.opset} cannot be raised to {version}: the model has functions of its own"
            raise ModelError(message)
        try:
            converted = version_converter.convert_version(self.to_proto(), version)
        except (RuntimeError, ValueError, IndexError, EncodeError) as error:
            message = f"opset {self.opset} cannot be raised to {version}: {str(error).splitlines()[0]}"
            raise ModelError(message) from error
        converted.ir_version = max(self.ir_version, _ir_version_for(version))
        fresh = Model._from_proto(converted, self.path)
        fresh.metadata, fresh._external = self.metadata, self._external
        self.become(fresh)

    # --- writing --------------------------------------------------------------------------------------------------

    def proto(self) -> onnx.ModelProto:
        """The structure as a ModelProto: large weights are stubs without data (for analysis, not for saving)."""
        model = onnx.ModelProto()
        model.CopyFrom(self._header)
        model.graph.CopyFrom(export_graph(self.graph, self._dump, self._extras))
        if self.ir_version < 4:
            _list_initializers_as_inputs(model.graph, vars(self.graph).get("listed_inputs", []))
        for key, value in self.metadata.items():
            model.metadata_props.add(key=key, value=value)
        _import_domains(model)
        return model

    def to_proto(self) -> onnx.ModelProto:
        """The whole model in memory.

        Raises:
            ModelError: It is larger than the 2 GiB that one protobuf message can hold.
        """
        if self.size_bytes > INLINE_LIMIT_BYTES:
            message = f"the model has {self.size_bytes} bytes; more than 2 GiB only fits a file with external data"
            raise ModelError(message)
        model = self.proto()
        for tensor in _tensors(model.graph):
            if reference := _ref(tensor):
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = b"".join(bytes(chunk) for chunk in self._blobs[reference].chunks())
        return model

    def save(self, path: str | Path, *, external_data: bool | None = None) -> None:
        """Write the model; the file appears whole or not at all.

        Args:
            path: Where to. External data go beside it, as `<name>.data`.
            external_data: Whether weights go to a file of their own; by default as the model came, and always when they
                exceed the 2 GiB of one file.

        Raises:
            OutputError: It cannot be written, or it is the file (or the data file) that the model was read from.
        """
        path = Path(path)
        sources = {blob.path for blob in self._blobs.values() if hasattr(blob, "path")}
        check_writable(path, inputs=(*((self.path,) if self.path else ()), *sources))
        too_large = self.size_bytes > INLINE_LIMIT_BYTES
        if external_data or too_large or (external_data is None and self._external):
            self._save_external(path, sources)
            return
        data = self.to_proto().SerializeToString()
        with replaced_whole(path) as [file]:
            file.write(data)

    def _save_external(self, path: Path, sources: set[Path]) -> None:
        """Stream the weights to a new data file, then the structure; the new file never replaces the old one's data."""
        number, data_path = 0, path.with_name(f"{path.name}.data")
        while data_path.exists() or data_path in sources:
            number += 1
            data_path = path.with_name(f"{path.name}.{number}.data")
        stale = _data_files(path)
        with replaced_whole(data_path, path) as [data_file, model_file]:
            model, offset = self.proto(), 0
            for tensor in _tensors(model.graph):
                reference = _ref(tensor)
                if not reference:
                    continue
                blob = self._blobs[reference]
                padding = -offset % ALIGNMENT if blob.nbytes >= ALIGNMENT else 0
                data_file.write(b"\0" * padding)
                offset += padding
                for chunk in blob.chunks():
                    data_file.write(chunk)
                del tensor.external_data[:]
                entries = {"location": data_path.name, "offset": str(offset), "length": str(blob.nbytes)}
                for key, value in entries.items():
                    tensor.external_data.add(key=key, value=value)
                offset += blob.nbytes
            model_file.write(model.SerializeToString())
        for old in stale - {data_path} - sources:
            old.unlink(missing_ok=True)

    def _dump(self, constant: gs.Constant) -> onnx.TensorProto:
        """The TensorProto of a constant: a stub for lazy and for large ones."""
        value = constant._values
        if isinstance(value, LazyValues):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value.tensor)
            if constant.name:
                tensor.name = constant.name
            return tensor
        tensor = numpy_helper.from_array(np.asarray(value), constant.name)
        if tensor.HasField("raw_data") and len(tensor.raw_data) >= LAZY_FROM_BYTES:
            _stub(tensor, ArrayBlob(tensor.raw_data), self._blobs)
            constant._values = LazyWeight(tensor, self._blobs[_ref(tensor)])
            return self._dump(constant)
        return tensor


def value_of(constant: gs.Constant) -> Array:
    """A constant's value, read without keeping it in memory as `constant.values` would."""
    value = constant._values
    return np.asarray(value.load() if isinstance(value, LazyValues) else value)


# --- stubs: a weight's place in the structure, with a reference to its blob instead of data ---------------------------

REFERENCE = "onnxcomp.blob"


def _stub(tensor: onnx.TensorProto, blob: Blob, blobs: dict[str, Blob]) -> None:
    """Take the data out of a TensorProto and leave a reference."""
    reference = blob.key
    blobs.setdefault(reference, blob)
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=REFERENCE)
    tensor.external_data.add(key="key", value=reference)


def _ref(tensor: onnx.TensorProto) -> str:
    """The reference of a stub, or an empty string."""
    entries = tensor.external_data
    return entries[1].value if len(entries) == 2 and entries[0].value == REFERENCE else ""


def _varint_bytes(value: int) -> int:
    """How many bytes protobuf needs to write a length."""
    return max(1, -(-value.bit_length() // 7))


def _lazy(tensor: onnx.TensorProto, blobs: dict[str, Blob]) -> LazyWeight:
    reference = _ref(tensor)
    return LazyWeight(tensor, blobs[reference] if reference else None)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every TensorProto of a graph: initializers and tensor attributes, those of subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> onnx.ModelProto:
    try:
        if path.is_dir():
            message = f"{path}: is a folder, expected an .onnx file"
            raise ModelError(message)
        data = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise ModelError(message) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        message = f"{path}: is not an ONNX model, or is cut short ({len(data)} bytes)"
        raise ModelError(message) from error
    if not model.ir_version or not model.HasField("graph") or not (model.graph.node or model.graph.output):
        message = f"{path}: is not an ONNX model (no graph in it)"
        raise ModelError(message)
    return model


def _describe_tensors(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Copy inferred dtypes and shapes to the variables of a graph and of its subgraphs."""
    known = {info.name: info for info in proto.value_info}
    inner = {node.output[0] if node.output else node.name: node for node in proto.node}
    for node in graph.nodes:
        for tensor in node.outputs:
            info = known.get(tensor.name)
            if info is None or not isinstance(tensor, gs.Variable) or not info.type.HasField("tensor_type"):
                continue
            fresh = Variable(tensor.name)
            describe(fresh, info)
            tensor.dtype = fresh.dtype if fresh.dtype is not None else tensor.dtype
            tensor.shape = fresh.shape if fresh.shape is not None else tensor.shape
        node_proto = inner.get(node.outputs[0].name if node.outputs else node.name)
        for attribute in node_proto.attribute if node_proto else []:
            value = node.attrs.get(attribute.name)
            if isinstance(value, gs.Graph):
                _describe_tensors(value, attribute.g)


def _list_initializers_as_inputs(graph: onnx.GraphProto, before: list[onnx.ValueInfoProto]) -> None:
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


def _import_domains(model: onnx.ModelProto) -> None:
    """Import the operator sets of domains that rewrites brought in."""
    known = {entry.domain for entry in model.opset_import}
    for node in model.graph.node:
        if node.domain not in known and not (node.domain in DEFAULT_DOMAINS and known & set(DEFAULT_DOMAINS)):
            known.add(node.domain)
            model.opset_import.add(domain=node.domain, version=1)


def _ir_version_for(opset: int) -> int:
    """The lowest IR version that may carry an opset."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)], ignore_unknown=True))


def model_files(path: Path) -> list[Path]:
    """A saved model's files: the .onnx file, then the external data files that it names."""
    proto = onnx.ModelProto()
    if path.suffix != ".ort":
        proto = _read(path)
    folder = path.resolve().parent
    external = {
        external_blob(tensor, folder).path
        for tensor in _tensors(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    return [path, *sorted(external)]


def _data_files(path: Path) -> set[Path]:
    """The data files that an existing model at `path` names beside itself, to be removed once it is replaced."""
    if not path.is_file():
        return set()
    try:
        tensors = list(_tensors(_read(path).graph))
    except ModelError:
        return set()
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    own = {name for name in names if name.startswith(f"{path.name}.") and name.endswith(".data")}
    return {path.with_name(name) for name in own}
