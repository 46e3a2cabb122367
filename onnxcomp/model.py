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
from google.protobuf.message import EncodeError
from onnx import numpy_helper, shape_inference, version_converter
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcomp.errors import ModelError
from onnxcomp.files import Stamp, check_unchanged, check_writable, replaced_whole, stamp_of
from onnxcomp.graph_io import Node, describe_tensors, export_graph, import_graph, walk
from onnxcomp.inference import infer_shapes
from onnxcomp.structure import (
    LAZY_FROM_BYTES,
    check_functions,
    check_text,
    import_domains,
    ir_version_for,
    list_initializers_as_inputs,
    model_files,
    own_data_files,
    read_in,
    read_structure,
    reference_of,
    small_tensors,
    sparse_tensors,
    stub,
    tensors_of,
)
from onnxcomp.weights import ArrayBlob, Blob, FileBlob, LazyWeight, check_sparse, check_tensor, external_blob
from onnxcomp.wire import model_bytes, write_model

__all__ = ["Model", "ModelSource", "model_files", "value_of"]

Array = np.ndarray[Any, Any]
ModelSource = Union[str, Path, onnx.ModelProto, "Model"]

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
        self._stamps: dict[Path, Stamp] = {
            blob.path: blob.stamp for blob in blobs.values() if isinstance(blob, FileBlob)
        }
        self._sources = frozenset(self._stamps)
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
        stamp = stamp_of(path) if path.exists() else None
        model = cls._from_proto(read_structure(path), path)
        if stamp is not None:
            model._stamps = {path: stamp, **model._stamps}
        return model

    @classmethod
    def _from_proto(cls, structure: onnx.ModelProto, path: Path | None) -> Model:
        folder = path.resolve().parent if path else Path.cwd()
        check_text(structure)
        check_functions(structure)
        blobs: dict[str, Blob] = {}
        external = False
        for tensor in tensors_of(structure.graph):
            check_tensor(tensor)
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external = True
                stub(tensor, external_blob(tensor, folder), blobs)
            elif tensor.HasField("raw_data") and len(tensor.raw_data) >= LAZY_FROM_BYTES:
                stub(tensor, ArrayBlob(tensor.raw_data), blobs)
            elif tensor.float_data and 4 * len(tensor.float_data) >= LAZY_FROM_BYTES:
                data = ArrayBlob(np.array(tensor.float_data, "<f4").tobytes())  # the same size as raw_data
                tensor.ClearField("float_data")
                stub(tensor, data, blobs)
        for tensor in small_tensors(structure):
            check_tensor(tensor)
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                read_in(tensor, external_blob(tensor, folder))
        for sparse in sparse_tensors(structure.graph):
            check_sparse(sparse)
        compact = onnx.ModelProto()  # a copy without the data: protobuf frees a message's memory only as a whole
        compact.CopyFrom(structure)
        return cls(compact, blobs, path, external=external)

    def fork(self) -> Model:
        """A copy to rewrite freely; weights are shared, not copied, and those no longer used are let go."""
        structure = self.proto()
        used = {reference for tensor in tensors_of(structure.graph) if (reference := reference_of(tensor))}
        copy = Model(structure, {key: self._blobs[key] for key in used}, self.path, external=self._external)
        copy._sources = self._sources
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        """The same as `fork`."""
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the whole model, which must fit one protobuf message."""
        return _unpickled, (self.to_proto().SerializeToString(), self.path, self._external)

    def become(self, other: Model) -> None:
        """Take over another model's contents (a fork that turned out well); `other` must not be used any more."""
        self.__dict__.clear()  # what was remembered of the old contents, such as the names in use, holds no longer
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

    def check_files(self) -> None:
        """Refuse files that are no longer those that the model was loaded from.

        Raises:
            ModelError: One of them has changed, or is gone.
        """
        for path, stamp in self._stamps.items():
            check_unchanged(path, stamp)

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
        for tensor in tensors_of(structure.graph):
            if reference := reference_of(tensor):
                tensor.external_data[1].value = self._blobs[reference].digest
        return hashlib.sha256(structure.SerializeToString(deterministic=True)).hexdigest()

    @property
    def size_bytes(self) -> int:
        """The bytes of the model saved as one file; external data add a little padding."""
        return model_bytes(self.proto(), self._blobs)

    # --- changing -------------------------------------------------------------------------------------------------

    def unique_name(self, base: str) -> str:
        """A tensor or node name that nothing in the model has yet."""
        taken = self._names()
        if base not in taken:
            taken.add(base)
            return base
        number = self._numbers.get(base, 1)
        while f"{base}_{number}" in taken:
            number += 1
        self._numbers[base] = number + 1
        name = f"{base}_{number}"
        taken.add(name)
        return name

    def _names(self) -> set[str]:
        """All names in use; remembered, since names are only ever added by asking for them here."""
        if not hasattr(self, "_taken"):
            self._taken: set[str] = set()
            self._numbers: dict[str, int] = {}
            for graph in self.graphs():
                self._taken.update(tensor.name for tensor in (*graph.inputs, *graph.outputs))
                for node in graph.nodes:
                    self._taken.add(node.name)
                    self._taken.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        return self._taken

    def infer_shapes(self) -> None:
        """Fill in the dtypes and shapes of inner tensors where ONNX's shape inference knows them."""
        try:
            inferred = infer_shapes(self.proto())
        except (shape_inference.InferenceError, RuntimeError, ValueError):
            return  # a model that its own operators contradict keeps what it declares
        describe_tensors(self.graph, inferred.graph)

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
            structure = self.proto()  # large weights stay stubs
            converted = version_converter.convert_version(structure, version)
        except (RuntimeError, ValueError, IndexError, EncodeError) as error:
            message = f"opset {self.opset} cannot be raised to {version}: {str(error).splitlines()[0]}"
            raise ModelError(message) from error
        if self.ir_version < 4:  # only before IR 4 is an initializer that is also an input a constant
            constants = {tensor.name for tensor in converted.graph.initializer}
            inputs = [info for info in converted.graph.input if info.name not in constants]
            del converted.graph.input[:]
            converted.graph.input.extend(inputs)
        for side in ("input", "output"):  # the converter infers shapes, and would narrow the declared ones
            declared = {info.name: info for info in getattr(structure.graph, side)}
            for info in getattr(converted.graph, side):
                info.CopyFrom(declared.get(info.name, info))
        converted.ir_version = max(self.ir_version, ir_version_for(version))
        fresh = Model(converted, self._blobs, self.path, external=self._external)
        fresh.metadata, fresh._sources = self.metadata, self._sources
        self.become(fresh)

    # --- writing --------------------------------------------------------------------------------------------------

    def proto(self) -> onnx.ModelProto:
        """The structure as a ModelProto: large weights are stubs without data (for analysis, not for saving)."""
        model = onnx.ModelProto()
        model.CopyFrom(self._header)
        model.graph.CopyFrom(export_graph(self.graph, self._dump, self._extras))
        if self.ir_version < 4:
            list_initializers_as_inputs(model.graph, vars(self.graph).get("listed_inputs", []))
        for key, value in self.metadata.items():
            model.metadata_props.add(key=key, value=value)
        import_domains(model)
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
        for tensor in tensors_of(model.graph):
            if reference := reference_of(tensor):
                read_in(tensor, self._blobs[reference])
        return model

    def save(self, path: str | Path, *, external_data: bool | None = None, durable: bool = True) -> None:
        """Write the model; the file appears whole or not at all.

        Args:
            path: Where to. External data go beside it, as `<name>.data`.
            external_data: Whether weights go to a file of their own; by default as the model came, and always when they
                exceed the 2 GiB of one file.
            durable: Whether to wait until the disk has it; False for what does not outlive the run.

        Raises:
            OutputError: It cannot be written, or it is the file (or the data file) that the model was read from.
        """
        path = Path(path)
        check_writable(path, inputs=(*((self.path,) if self.path else ()), *self._sources))
        too_large = self.size_bytes > INLINE_LIMIT_BYTES
        if external_data or too_large or (external_data is None and self._external):
            self._save_external(path, durable=durable)
            return
        with replaced_whole(path, durable=durable) as [file]:
            write_model(self.proto(), self._blobs, file)

    def _save_external(self, path: Path, *, durable: bool) -> None:
        """Stream the weights to a new data file, then the structure; the new file never replaces the old one's data."""
        number, data_path = 0, path.with_name(f"{path.name}.data")
        while data_path.exists() or data_path in self._sources:
            number += 1
            data_path = path.with_name(f"{path.name}.{number}.data")
        stale = own_data_files(path)
        with replaced_whole(data_path, path, durable=durable) as [data_file, model_file]:
            model, offset = self.proto(), 0
            for tensor in tensors_of(model.graph):
                reference = reference_of(tensor)
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
        for old in stale - {data_path} - self._sources:
            old.unlink(missing_ok=True)

    def _dump(self, constant: gs.Constant) -> onnx.TensorProto:
        """The TensorProto of a constant: a stub for lazy and for large ones."""
        value = constant._values
        if isinstance(value, LazyValues):
            if isinstance(value, LazyWeight) and value.blob is not None:
                self._blobs.setdefault(reference_of(value.tensor), value.blob)  # a pass may have made it
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value.tensor)
            if constant.name:
                tensor.name = constant.name
            return tensor
        tensor = numpy_helper.from_array(np.asarray(value), constant.name)
        if tensor.HasField("raw_data") and len(tensor.raw_data) >= LAZY_FROM_BYTES:
            stub(tensor, ArrayBlob(tensor.raw_data), self._blobs)
            constant._values = LazyWeight(tensor, self._blobs[reference_of(tensor)])
            return self._dump(constant)
        return tensor


def value_of(constant: gs.Constant) -> Array:
    """A constant's value, read without keeping it in memory as `constant.values` would."""
    value = constant._values
    return np.asarray(value.load() if isinstance(value, LazyValues) else value)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _unpickled(data: bytes, path: Path | None, external: bool) -> Model:
    model = Model.load(onnx.load_from_string(data))
    model.path, model._external = path, external
    return model


def _lazy(tensor: onnx.TensorProto, blobs: dict[str, Blob]) -> LazyWeight:
    reference = reference_of(tensor)
    return LazyWeight(tensor, blobs[reference] if reference else None)
