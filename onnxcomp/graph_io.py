"""Between an ONNX GraphProto and the onnx-graphsurgeon Graph that passes rewrite, without losing anything.

Graphsurgeon's own importer and exporter drop metadata, value_info of non-tensors, initializer order, unused
initializers and attributes of rarer types, and break 2- and 4-bit types. These keep them: what graphsurgeon has no
field for is kept beside its object (`Node.extra`, `Variable.info`, `Graph.header`) and written back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, helper, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcomp.errors import ModelError
from onnxcomp.weights import LazyWeight, SparseWeight, numpy_dtype

__all__ = [
    "Node",
    "Variable",
    "describe_tensors",
    "export_graph",
    "export_node",
    "import_graph",
    "sorted_nodes",
    "subgraphs",
    "walk",
]

# Graphsurgeon's logger writes to stdout; its errors are raised all the same.
G_LOGGER.severity = G_LOGGER.CRITICAL + 1

LoadTensor = Callable[[onnx.TensorProto], LazyWeight]
DumpTensor = Callable[[gs.Constant], onnx.TensorProto]


class Node(gs.Node):  # type: ignore[misc] # graphsurgeon has no type information
    """A graphsurgeon node that is compared by identity and keeps what graphsurgeon has no field for."""

    extra: onnx.NodeProto | None = None

    def __eq__(self, other: object) -> bool:
        """Identity: graphsurgeon compares by contents, which is slow and confuses twins."""
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Variable(gs.Variable):  # type: ignore[misc] # graphsurgeon has no type information
    """A graphsurgeon variable that remembers the ValueInfoProto it came from."""

    info: onnx.ValueInfoProto | None = None


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph inside it."""
    yield graph
    for node in graph.nodes:
        for inner in subgraphs(node):
            yield from walk(inner)


def subgraphs(node: gs.Node) -> Iterator[gs.Graph]:
    """The subgraphs of one node (the branches of an If, the body of a Loop or Scan)."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value


# --- import -----------------------------------------------------------------------------------------------------------


def import_graph(
    proto: onnx.GraphProto, load: LoadTensor, outer: dict[str, gs.Tensor] | None = None, *, overridable: bool = False
) -> gs.Graph:
    """Build a graphsurgeon graph.

    Args:
        proto: The graph.
        load: Makes the lazy value of an initializer or a tensor attribute.
        outer: The tensors of the enclosing graphs, by name.
        overridable: Initializers that are also graph inputs are default values (IR 4 and later), so they are variables
            to every pass; before IR 4 every initializer had to be an input, and is a constant all the same.

    Raises:
        ModelError: A tensor is produced twice.
    """
    outer = outer or {}
    local: dict[str, gs.Tensor] = {}
    for tensor in proto.initializer:
        local[tensor.name] = gs.Constant(tensor.name, load(tensor))
    for sparse in proto.sparse_initializer:
        local[sparse.values.name] = gs.Constant(sparse.values.name, SparseWeight(sparse))
    initializers = list(local.values())
    input_names = {info.name for info in proto.input}
    defaults = [tensor for tensor in initializers if overridable and tensor.name in input_names]
    for tensor in defaults:
        del local[tensor.name]
    for info in proto.input:
        if info.name not in local:
            local[info.name] = _variable(info)
    for info in (*proto.output, *(i for i in proto.value_info if i.name not in outer)):
        known = local.get(info.name)
        if known is None:
            local[info.name] = _variable(info)
        elif isinstance(known, gs.Constant):
            known.info = info
        elif isinstance(known, Variable) and known.info is not None and not known.info.type.ByteSize():
            _describe(known, info)
    scope = {**outer, **local}
    produced: set[str] = set()

    def get(name: str, *, local_only: bool) -> gs.Tensor:
        if not name:
            return Variable("")
        tensor = local.get(name) if local_only else scope.get(name)
        if tensor is None:
            tensor = scope[name] = local[name] = Variable(name)
        return tensor

    nodes = []
    for node_proto in proto.node:
        for name in node_proto.output:
            if name and (name in produced or isinstance(local.get(name), gs.Constant)):
                message = f"the tensor {name!r} is produced twice; every tensor needs one producer"
                raise ModelError(message)
            produced.add(name)
        inputs = [get(name, local_only=False) for name in node_proto.input]
        outputs = [get(name, local_only=True) for name in node_proto.output]
        attrs = {a.name: _import_attribute(a, load, scope) for a in node_proto.attribute}
        domain = node_proto.domain or None
        node = Node(node_proto.op_type, node_proto.name, attrs, inputs, outputs, domain=domain)
        node.extra = _node_extra(node_proto)
        nodes.append(node)
    graph = gs.Graph(
        nodes=nodes,
        inputs=[local[i.name] for i in proto.input if not isinstance(local[i.name], gs.Constant)],
        outputs=[local[o.name] for o in proto.output],
        name=proto.name,
        doc_string=proto.doc_string,
    )
    output_names = {output.name for output in proto.output}
    graph.header = _graph_header(proto)
    graph.initializer_order = [tensor.name for tensor in initializers]
    graph.listed_inputs = list(proto.input)
    graph.default_values = defaults
    constants = [
        tensor for tensor in initializers if tensor.name in local and isinstance(local[tensor.name], gs.Constant)
    ]
    graph.unused_initializers = [t for t in constants if not t.outputs and t.name not in output_names]
    for tensor in constants:
        tensor.owner = graph
    return graph


def _variable(info: onnx.ValueInfoProto) -> Variable:
    variable = Variable(info.name)
    _describe(variable, info)
    return variable


def _describe(variable: Variable, info: onnx.ValueInfoProto) -> None:
    """Copy dtype and shape of a tensor type; the rest (sequences, maps, optionals) stays in `info` alone."""
    variable.info = info
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.elem_type:
        return
    variable.dtype = numpy_dtype(info.type.tensor_type.elem_type)
    variable.shape = _shape(info.type.tensor_type)


def describe_tensors(graph: gs.Graph, proto: onnx.GraphProto) -> None:
    """Copy inferred dtypes and shapes to the variables of a graph and of its subgraphs."""
    known = {info.name: info for info in proto.value_info}
    inner = {node.output[0] if node.output else node.name: node for node in proto.node}
    for node in graph.nodes:
        for tensor in node.outputs:
            info = known.get(tensor.name)
            if info is None or not isinstance(tensor, gs.Variable) or not info.type.HasField("tensor_type"):
                continue
            fresh = Variable(tensor.name)
            _describe(fresh, info)
            tensor.dtype = fresh.dtype if fresh.dtype is not None else tensor.dtype
            tensor.shape = fresh.shape if fresh.shape is not None else tensor.shape
        node_proto = inner.get(node.outputs[0].name if node.outputs else node.name)
        for attribute in node_proto.attribute if node_proto else []:
            value = node.attrs.get(attribute.name)
            if isinstance(value, gs.Graph):
                describe_tensors(value, attribute.g)


def _shape(tensor_type: onnx.TypeProto.Tensor) -> list[int | str | None] | None:
    if not tensor_type.HasField("shape"):
        return None
    dims: list[int | str | None] = []
    for dim in tensor_type.shape.dim:
        which = dim.WhichOneof("value")
        dims.append(getattr(dim, which) if which else None)
    return dims


def _node_extra(proto: onnx.NodeProto) -> onnx.NodeProto | None:
    """Everything of a node that graphsurgeon has no field for, or None."""
    extra = onnx.NodeProto()
    for field, value in proto.ListFields():
        if field.name not in {"input", "output", "name", "op_type", "domain", "attribute"}:
            if field.is_repeated:
                getattr(extra, field.name).extend(value)
            else:
                setattr(extra, field.name, value)
    return extra if extra.ByteSize() else None


def _graph_header(proto: onnx.GraphProto) -> onnx.GraphProto:
    header = onnx.GraphProto()
    header.metadata_props.extend(proto.metadata_props)
    header.quantization_annotation.extend(proto.quantization_annotation)
    return header


def _import_attribute(attribute: AttributeProto, load: LoadTensor, scope: dict[str, gs.Tensor]) -> Any:
    """A plain Python value where there is one, else the AttributeProto itself, which export writes back as it is."""
    if attribute.ref_attr_name:
        return attribute
    kind = attribute.type
    if kind == AttributeProto.GRAPH:
        return import_graph(attribute.g, load, scope)
    if kind == AttributeProto.TENSOR:
        return gs.Constant(attribute.t.name, load(attribute.t))
    if kind in {AttributeProto.INT, AttributeProto.FLOAT}:
        return helper.get_attribute_value(attribute)
    numbers = {AttributeProto.INTS: attribute.ints, AttributeProto.FLOATS: attribute.floats}
    if numbers.get(kind):
        return list(helper.get_attribute_value(attribute))
    if kind == AttributeProto.STRING:
        try:
            return attribute.s.decode()
        except UnicodeDecodeError:
            return attribute
    return attribute


# --- export -----------------------------------------------------------------------------------------------------------


def export_graph(graph: gs.Graph, dump: DumpTensor, extras: dict[str, onnx.NodeProto] | None = None) -> onnx.GraphProto:
    """Write a graphsurgeon graph as a GraphProto, nodes in topological order.

    Args:
        graph: The graph.
        dump: Makes the TensorProto of a constant.
        extras: What was kept of the original nodes, by first output name, for nodes that replaced them.
    """
    proto = onnx.GraphProto()
    proto.CopyFrom(vars(graph).get("header", onnx.GraphProto()))
    proto.name = graph.name or "graph"
    if graph.doc_string:
        proto.doc_string = graph.doc_string
    nodes = sorted_nodes(graph)
    for node in nodes:
        export_node(node, proto.node.add(), dump, extras or {})
    constants = _constants(graph, nodes)
    for constant in constants:
        if isinstance(constant._values, SparseWeight):
            proto.sparse_initializer.append(constant._values.tensor)
        else:
            proto.initializer.append(dump(constant))
    proto.input.extend(_value_info(tensor) for tensor in graph.inputs)
    proto.output.extend(_value_info(tensor) for tensor in graph.outputs)
    interface = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in (*constants, *(tensor for node in nodes for tensor in node.outputs)):
        if tensor.name and tensor.name not in interface:
            _add_value_info(proto, tensor)
    return proto


def _add_value_info(proto: onnx.GraphProto, tensor: gs.Tensor) -> None:
    """List what is known of an inner tensor; constants only if they were listed before."""
    if isinstance(tensor, gs.Constant):
        info = getattr(tensor, "info", None)
        if info is not None and info.name == tensor.name:
            proto.value_info.append(_value_info(tensor))
    else:
        info = _value_info(tensor)
        if len(info.ListFields()) > 1:
            proto.value_info.append(info)


def _constants(graph: gs.Graph, nodes: Iterable[gs.Node]) -> list[gs.Constant]:
    """The constants that belong to this graph: original ones in their order, then new ones in order of use."""
    kept = (*vars(graph).get("unused_initializers", []), *vars(graph).get("default_values", []))
    found = {constant.name: constant for constant in kept}
    for constant in _owned_constants(graph, nodes):
        found.setdefault(constant.name, constant)
    rank = {name: index for index, name in enumerate(vars(graph).get("initializer_order", []))}
    return sorted(found.values(), key=lambda constant: rank.get(constant.name, len(rank)))


def _owned_constants(graph: gs.Graph, nodes: Iterable[gs.Node]) -> Iterator[gs.Constant]:
    """The constants that nodes and outputs use and that live here; a new constant lives where it is used."""
    for tensor in (*graph.outputs, *(tensor for node in nodes for tensor in node.inputs)):
        if isinstance(tensor, gs.Constant) and getattr(tensor, "owner", graph) is graph:
            yield tensor
    for node in nodes:
        for inner in subgraphs(node):
            yield from _captured_constants(inner, graph)


def _captured_constants(inner: gs.Graph, owner: gs.Graph) -> Iterator[gs.Constant]:
    """Constants used inside a subgraph that live in the enclosing graph `owner`."""
    for nested in walk(inner):
        for tensor in (*(t for node in nested.nodes for t in node.inputs), *nested.outputs):
            if isinstance(tensor, gs.Constant) and getattr(tensor, "owner", None) is owner:
                yield tensor


def export_node(node: gs.Node, proto: onnx.NodeProto, dump: DumpTensor, extras: dict[str, onnx.NodeProto]) -> None:
    """Write a node into an empty NodeProto."""
    extra = getattr(node, "extra", None)
    if extra is None and node.outputs and not isinstance(node, Node):
        extra = extras.get(node.outputs[0].name)
    if extra is not None:
        proto.CopyFrom(extra)
    proto.op_type = node.op
    if node.name:
        proto.name = node.name
    if node.domain:
        proto.domain = node.domain
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    for name, value in node.attrs.items():
        if isinstance(value, AttributeProto):
            attribute = value
        elif isinstance(value, gs.Graph):
            attribute = helper.make_attribute(name, export_graph(value, dump))
        elif isinstance(value, gs.Constant):
            attribute = helper.make_attribute(name, dump(value))
        elif isinstance(value, np.ndarray):
            attribute = helper.make_attribute(name, numpy_helper.from_array(value))
        else:
            attribute = helper.make_attribute(name, value)
        proto.attribute.append(attribute)


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    """The original ValueInfoProto when nothing changed, else one made from dtype and shape."""
    info: onnx.ValueInfoProto | None = getattr(tensor, "info", None)
    dtype, shape = tensor.dtype, tensor.shape
    shape = None if shape is None else list(shape)
    if info is not None and info.name == tensor.name:
        if dtype is None:
            return info
        tensor_type = info.type.tensor_type
        if tensor_type.elem_type and numpy_dtype(tensor_type.elem_type) == dtype and _shape(tensor_type) == shape:
            return info
    if dtype is None:
        return onnx.ValueInfoProto(name=tensor.name)
    return helper.make_tensor_value_info(tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def sorted_nodes(graph: gs.Graph) -> list[gs.Node]:
    """The nodes in topological order; the order they are in is kept where it is already one.

    Raises:
        ModelError: The graph has a cycle.
    """
    producer = {id(tensor): index for index, node in enumerate(graph.nodes) for tensor in node.outputs if tensor.name}
    needs = [{producer[key] for key in _read_by(node) if key in producer} for node in graph.nodes]
    if all(max(need, default=-1) < index for index, need in enumerate(needs)):
        return list(graph.nodes)
    readers: list[list[int]] = [[] for _ in needs]
    for index, need in enumerate(needs):
        for source in need:
            readers[source].append(index)
    waiting = [len(need) for need in needs]
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(graph.nodes):
        stuck = next(graph.nodes[index] for index, count in enumerate(waiting) if count)
        message = f"the graph has a cycle through node {stuck.name or stuck.op!r}"
        raise ModelError(message)
    return order


def _read_by(node: gs.Node) -> Iterator[int]:
    """The tensors (by identity) that a node reads, those captured by its subgraphs included."""
    for tensor in node.inputs:
        yield id(tensor)
    for inner in subgraphs(node):
        for tensor in inner.outputs:
            yield id(tensor)
        for nested in inner.nodes:
            yield from _read_by(nested)
