"""What exporters leave behind and no runtime reads: stack traces on nodes, shapes that anyone can infer again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import onnx
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp_passes._shapes import Known, infer_known

__all__ = ["drop_traces", "drop_unused_definitions"]

DEFAULT_DOMAINS = ("", "ai.onnx")

Message = TypeVar("Message", onnx.FunctionProto, onnx.OperatorSetIdProto)


def drop_traces(model: Model) -> None:
    """Drop doc strings and metadata of nodes, and what is known of inner tensors where inference finds it again."""
    known = infer_known(model)
    for graph in model.graphs():
        interface = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            _clear(getattr(node, "extra", None))
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and getattr(tensor, "info", None) is not None:
                    tensor.info = None
            for tensor in node.outputs:
                if id(tensor) not in interface and tensor.name:
                    _clear(getattr(tensor, "info", None))
                    found = known.get(id(tensor))
                    if found and _is_found_again(tensor, found[1]):
                        tensor.info, tensor.dtype, tensor.shape = None, None, None
    for extra in model._extras.values():
        _clear(extra)


def _clear(extra: onnx.NodeProto | onnx.ValueInfoProto | None) -> None:
    if extra is not None:
        extra.ClearField("doc_string")
        del extra.metadata_props[:]


def _is_found_again(tensor: gs.Tensor, known: Known) -> bool:
    """Whether inference knows at least what is declared."""
    if known.dtype is None or (tensor.dtype is not None and known.dtype != tensor.dtype):
        return False
    if tensor.shape is None:
        return True
    if known.dims is None or len(known.dims) != len(tensor.shape):
        return False
    return all(not isinstance(said, int) or said == found for said, found in zip(tensor.shape, known.dims, strict=True))


def drop_unused_definitions(model: Model) -> int:
    """Drop functions that nothing calls and operator sets that nothing uses; returns how many."""
    header = model._header
    before = len(header.functions) + len(header.opset_import)
    called = {(node.domain or "", node.op) for graph in model.graphs() for node in graph.nodes}
    functions = {(function.domain, function.name): function for function in header.functions}
    waiting = [key for key in called if key in functions]
    while waiting:
        for key in _calls(functions[waiting.pop()].node):
            if key not in called:
                called.add(key)
                if key in functions:
                    waiting.append(key)
    kept = [function for function in header.functions if (function.domain, function.name) in called]
    domains = {domain for domain, _ in called} | {entry.domain for function in kept for entry in function.opset_import}
    imports = [entry for entry in header.opset_import if entry.domain in DEFAULT_DOMAINS or entry.domain in domains]
    functions_and_imports = len(kept) + len(imports)
    if functions_and_imports < before:
        kept, imports = [_copy(function) for function in kept], [_copy(entry) for entry in imports]
        del header.functions[:], header.opset_import[:]
        header.functions.extend(kept)
        header.opset_import.extend(imports)
    return before - functions_and_imports


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """The operators that nodes call, those in subgraphs included."""
    for node in nodes:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _calls(body.node)


def _copy(message: Message) -> Message:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
