"""What a model's graph consists of, as plain data for the report: its operators, nodes and tensors."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import Any

import onnx
from onnx import helper, shape_inference

from onnxcomp.inference import infer_shapes
from onnxcomp.layers import captured
from onnxcomp.model import DEFAULT_DOMAINS, Model
from onnxcomp.runtime.census import graphs, node_names

__all__ = ["graph_table"]

CONSTANT = "Constant"


def graph_table(model: Model) -> dict[str, Any]:
    """List a model's operators, and the nodes and tensors of its main graph.

    Nodes name tensors by their place in one list, so that a long name is held once. Nodes in bodies of If, Loop and
    Scan and in model-local functions are counted, but not listed; what a body reads of the main graph counts as read by
    the node that has it.

    Args:
        model: The model; no weight is read.

    Returns:
        `operators`, `body_operators` and `function_operators` (operator -> how many nodes, the most frequent first),
        `nodes` (each with `name`, `op`, `inputs`, `outputs`, and `captured` where it has a body that reads something),
        `tensors` (names), `types` (texts such as "float32 (N, 10)") with the place of each tensor's in `tensor_types`,
        and the places of the `constants`, graph `inputs` and graph `outputs`. An input that is left out is None.
    """
    proto = model.proto()
    graph = proto.graph
    bodies = [inner for index, inner in enumerate(graphs(graph)) if index]
    functions = [node for function in proto.functions for node in _with_bodies(function.node)]
    tensors = _Tensors(_known_types(proto))
    constants = [
        *(tensor.name for tensor in graph.initializer),
        *(each.values.name for each in graph.sparse_initializer),
    ]
    fed = set(constants)
    inputs = tensors.places(info.name for info in graph.input if info.name not in fed)
    own = fed.union(info.name for info in graph.input).union(name for node in graph.node for name in node.output)
    own -= {""}
    names = node_names(graph)  # those of the main graph come first
    nodes = [_node(node, name, tensors, own) for node, name in zip(graph.node, names, strict=False)]
    constants += [name for node in graph.node if node.op_type == CONSTANT for name in node.output]
    outputs = tensors.places(info.name for info in graph.output)
    return {
        "operators": _counts(graph.node),
        "body_operators": _counts(node for body in bodies for node in body.node),
        "function_operators": _counts(functions),
        "nodes": nodes,
        "tensors": list(tensors.found),
        "types": list(tensors.types),
        "tensor_types": tensors.kinds,
        "constants": sorted(tensors.found[name] for name in set(constants) if name in tensors.found),
        "inputs": inputs,
        "outputs": outputs,
    }


def _node(node: onnx.NodeProto, name: str, tensors: _Tensors, own: Set[str]) -> dict[str, Any]:
    outer = sorted(captured(node) & own)
    return {
        "name": name,
        "op": _operator(node),
        "inputs": tensors.places(node.input),
        "outputs": tensors.places(node.output),
        **({"captured": tensors.places(outer)} if outer else {}),
    }


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"


def _counts(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    return dict(Counter(map(_operator, nodes)).most_common())


def _with_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    body = onnx.GraphProto(node=nodes)
    return (node for inner in graphs(body) for node in inner.node)


class _Tensors:
    """Tensors and types by the order in which they were met."""

    def __init__(self, known: dict[str, str]) -> None:
        self.found: dict[str, int] = {}
        self.types: dict[str, int] = {}
        self.kinds: list[int] = []
        self._known = known

    def places(self, names: Iterable[str]) -> list[int | None]:
        return [self._place(name) if name else None for name in names]

    def _place(self, name: str) -> int:
        place = self.found.setdefault(name, len(self.found))
        if place == len(self.kinds):
            self.kinds.append(self.types.setdefault(self._known.get(name, ""), len(self.types)))
        return place


def _known_types(proto: onnx.ModelProto) -> dict[str, str]:
    """The type and shape of each tensor of the main graph, in words."""
    # Of a model that its own operators contradict, what it declares has to do.
    with contextlib.suppress(shape_inference.InferenceError, RuntimeError, ValueError):
        proto = infer_shapes(proto)
    graph = proto.graph
    told = {info.name: _type_text(info.type) for info in (*graph.value_info, *graph.input, *graph.output)}
    weights = [*graph.initializer, *(each.values for each in graph.sparse_initializer)]
    told.update((tensor.name, _text(tensor.data_type, map(str, tensor.dims))) for tensor in weights)
    told.update(
        (each.values.name, _text(each.values.data_type, map(str, each.dims))) for each in graph.sparse_initializer
    )
    return told


def _type_text(kind: onnx.TypeProto) -> str:
    if not kind.HasField("tensor_type"):
        return (kind.WhichOneof("value") or "").removesuffix("_type")
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return _text(tensor.elem_type, None)
    return _text(
        tensor.elem_type, (str(dim.dim_value) if dim.dim_value else dim.dim_param or "?" for dim in tensor.shape.dim)
    )


def _text(dtype: int, sizes: Iterable[str] | None) -> str:
    """A type and shape as `onnxcomp.data.specs.describe` writes them; also of types that numpy does not have."""
    try:
        name = str(helper.tensor_dtype_to_string(dtype)).removeprefix("TensorProto.").lower()
    except (KeyError, ValueError):
        name = "" if dtype == onnx.TensorProto.UNDEFINED else f"type {dtype}"
    name = "float32" if name == "float" else "float64" if name == "double" else name
    if sizes is None:
        return name
    words = list(sizes)
    return f"{name} ({', '.join(words)}{',' if len(words) == 1 else ''})".strip()
