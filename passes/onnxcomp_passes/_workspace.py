"""What the steps of `simplify` share: who reads what, what is known of each tensor, and safe ways to rewire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import sorted_nodes, subgraphs, walk
from onnxcomp.model import Model, value_of
from onnxcomp.packed import PREFIX
from onnxcomp.passes import Changes, Context
from onnxcomp.weights import FileBlob, SparseWeight
from onnxcomp_passes._shapes import Known, infer_known

__all__ = ["Array", "Workspace", "is_dense", "is_standard", "label"]

Array = np.ndarray[Any, Any]

SMALL_BYTES = 4096
"""Constants up to this size are shapes, axes, scalars: cheap to read while rules are tried."""

ATTRIBUTE_TYPES: dict[str, type | tuple[type, ...]] = {
    "FLOAT": float,
    "INT": int,
    "STRING": str,
    "TENSOR": gs.Constant,
    "GRAPH": gs.Graph,
    "INTS": (list, onnx.AttributeProto),
    "FLOATS": (list, onnx.AttributeProto),
}
"""What graphs hold the attributes of a node as."""

UNKNOWN = Known(None, None)

HELD_BYTES = 1 << 28
"""Models with more external data than this keep their large weights where they are: they may not fit in memory."""


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Whether the node is one of these operators of the default domain."""
    return node.op in ops and node.domain in (None, "", "ai.onnx")


@cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    return onnx.defs.get_schema(op, opset) if onnx.defs.has(op, opset) else None


def fits_schema(node: gs.Node, opset: int) -> bool:
    """Whether a node of the default domain has the inputs, outputs and attributes that its operator asks for."""
    if node.domain not in (None, "", "ai.onnx"):
        return True
    schema = _schema(node.op, opset)
    if schema is None:
        return False
    required = [tensor for tensor in node.inputs[: schema.min_input] if not tensor.is_empty()]
    if len(required) < schema.min_input or len(node.inputs) > schema.max_input:
        return False
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        return False
    types = {name: str(declared.type).rpartition(".")[2] for name, declared in schema.attributes.items()}
    return all(
        name in types and isinstance(value, ATTRIBUTE_TYPES.get(types[name], object))
        for name, value in node.attrs.items()
    )


def label(node: gs.Node) -> str:
    """How reports call a node."""
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op


class Workspace:
    """One model while it is simplified.

    Attributes:
        model: The model.
        context: The pass's context.
        changes: What the report will say.
        slack: By how many bytes one rewrite may grow the file (other rewrites pay for it; the whole is checked).
        holds_large: Whether new large weights may be made; they are held in memory until the model is saved.
    """

    def __init__(self, model: Model, context: Context, changes: Changes, *, slack: int) -> None:
        self.model = model
        self.context = context
        self.changes = changes
        self.slack = slack
        in_files = sum(c._values.nbytes for c in model.constants() if _is_in_file(c))
        self.holds_large = in_files <= HELD_BYTES
        self.opset = model.opset
        self._own_operators = {function.name for function in model.functions if function.domain in ("", "ai.onnx")}
        self._left: set[tuple[str, str]] = set()
        self._excluded: dict[int, bool] = {}

    def refresh(self) -> None:
        """Sort the nodes, and find out again what is known of each tensor."""
        graphs = list(self.model.graphs())
        self._graph_of: dict[int, gs.Graph] = {}
        self._outputs: set[int] = set()
        self._killed: set[int] = set()
        self._excluded = {}
        defined: Counter[str] = Counter()
        for graph in graphs:
            graph.nodes = sorted_nodes(graph)
            self._outputs.update(id(tensor) for tensor in graph.outputs)
            names = {tensor.name for node in graph.nodes for tensor in node.outputs}
            names.update(tensor.name for tensor in graph.inputs)
            names.update(tensor.name for tensor in self._constants_of(graph))
            defined.update(names)
            self._graph_of.update((id(node), graph) for node in graph.nodes)
        self._ambiguous = {name for name, count in defined.items() if count > 1}
        self._pinned = set(_read_by_name(graphs))
        self._known = infer_known(self.model)

    @staticmethod
    def _constants_of(graph: gs.Graph) -> Iterator[gs.Constant]:
        for node in graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and getattr(tensor, "owner", graph) is graph:
                    yield tensor

    # --- looking --------------------------------------------------------------------------------------------------

    def graphs(self) -> Iterator[gs.Graph]:
        """The graph and every subgraph."""
        return self.model.graphs()

    def nodes(self, graph: gs.Graph) -> Iterator[gs.Node]:
        """The nodes that rules may rewrite, in topological order; those removed meanwhile are skipped."""
        for node in list(graph.nodes):
            if id(node) not in self._killed and not self.excluded(node):
                yield node

    def excluded(self, node: gs.Node) -> bool:
        """Whether to leave a node alone: asked for by the user, not what its operator says, or decoding a weight."""
        if id(node) not in self._excluded:
            odd = any(tensor.name.startswith(PREFIX) for tensor in (*node.inputs, *node.outputs))
            odd = odd or node.op in self._own_operators or not fits_schema(node, self.opset)
            self._excluded[id(node)] = odd or bool(self.context.exclude and self.context.excludes(node))
        return self._excluded[id(node)]

    def graph_of(self, node: gs.Node) -> gs.Graph:
        """The graph that a node is in."""
        return self._graph_of[id(node)]

    def dims(self, tensor: gs.Tensor) -> tuple[int | str, ...] | None:
        """The dimensions: a number, or a name that stands for the same unknown number everywhere; None if unknown."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self._lookup(tensor).dims

    def static_dims(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The dimensions when all are numbers."""
        dims = self.dims(tensor)
        if dims is None or any(isinstance(dim, str) for dim in dims):
            return None
        return tuple(int(dim) for dim in dims)

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """The element type, if it is known."""
        known: np.dtype[Any] | None = tensor.dtype if isinstance(tensor, gs.Constant) else self._lookup(tensor).dtype
        return known

    def _lookup(self, tensor: gs.Tensor) -> Known:
        found = self._known.get(id(tensor))
        return found[1] if found else UNKNOWN

    def value(self, tensor: gs.Tensor) -> Array | None:
        """The value of a small constant, else None."""
        if not is_dense(tensor) or tensor._values.nbytes > SMALL_BYTES:
            return None
        return value_of(tensor)

    def ints(self, node: gs.Node, attribute: str, index: int) -> list[int] | None:
        """A list of integers that is an attribute in older opsets and a (constant) input in later ones, else None."""
        if attribute in node.attrs:
            value = node.attrs[attribute]
            return [int(item) for item in value] if isinstance(value, list) else None
        if len(node.inputs) <= index or node.inputs[index].is_empty():
            return None
        array = self.value(node.inputs[index])
        return None if array is None else [int(item) for item in array.reshape(-1)]

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is seen from outside: an output of its graph, or read by its name alone."""
        return id(tensor) in self._outputs or tensor.name in self._pinned

    def reads_alone(self, node: gs.Node, tensor: gs.Tensor) -> bool:
        """Whether nothing but this node reads a tensor, and only once."""
        return len(tensor.outputs) == 1 and tensor.outputs[0] is node and not self.is_fixed(tensor)

    def producer(self, node: gs.Node, index: int, *ops: str) -> gs.Node | None:
        """The node of the same graph that makes an input, if it is one of these standard operators and not excluded."""
        makers = node.inputs[index].inputs if index < len(node.inputs) else ()
        if not makers or not is_standard(makers[0], *ops) or self.excluded(makers[0]):
            return None
        maker = makers[0]
        return maker if self._graph_of.get(id(maker)) is self.graph_of(node) else None

    def freed_bytes(self, constants: Iterable[gs.Tensor], readers: Iterable[gs.Node]) -> int:
        """The bytes of the constants that nothing but these nodes reads."""
        gone = {id(node) for node in readers}
        unique = {id(constant): constant for constant in constants if isinstance(constant, gs.Constant)}
        return sum(c._values.nbytes for c in unique.values() if self.belongs_to(c, gone))

    def belongs_to(self, constant: gs.Constant, readers: set[int]) -> bool:
        """Whether nothing but the nodes with these ids reads a constant."""
        return not self.is_fixed(constant) and all(id(reader) in readers for reader in constant.outputs)

    # --- rewiring -------------------------------------------------------------------------------------------------

    def constant(self, name: str, value: Array, graph: gs.Graph) -> gs.Constant:
        """A new initializer of a graph."""
        constant = gs.Constant(name, np.ascontiguousarray(value).reshape(value.shape))
        constant.owner = graph
        return constant

    def can_replace(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Whether every reader of a tensor can read another one instead."""
        if self.is_fixed(old):
            return False
        if new.name == old.name or new.name not in self._ambiguous:
            return True
        home = self.graph_of(old.inputs[0]) if old.inputs else getattr(old, "owner", None)
        return all(self._graph_of.get(id(reader)) is home for reader in old.outputs)

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every reader of a tensor read another one instead."""
        readers = list(old.outputs)
        list.clear(old.outputs)
        for reader in {id(node): node for node in readers}.values():
            for index, tensor in enumerate(reader.inputs):
                if tensor is old:
                    list.__setitem__(reader.inputs, index, new)
        list.extend(new.outputs, readers)

    def bypass(self, node: gs.Node, source: gs.Tensor) -> bool:
        """Remove a node whose (first) output always equals the tensor `source`; False where that is not possible."""
        result = node.outputs[0]
        if self.can_replace(result, source):
            self.kill(node)
            self.replace(result, source)
            return True
        maker = source.inputs[0] if source.inputs else None
        same_graph = maker is not None and self._graph_of.get(id(maker)) is self.graph_of(node)
        if not same_graph or maker is None or self.excluded(maker) or not self.can_replace(source, result):
            return False
        self.kill(node)
        self.take_over(maker, source, result)
        return True

    def take_over(self, maker: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let a node make `new` (which nothing makes any more) in place of `old`."""
        self.replace(old, new)
        index = next(index for index, tensor in enumerate(maker.outputs) if tensor is old)
        maker.outputs[index] = new

    def kill(self, node: gs.Node) -> None:
        """Disconnect a node; `sweep` removes it from its graph."""
        self._killed.add(id(node))
        for inner in subgraphs(node):
            for graph in walk(inner):
                for nested in graph.nodes:
                    self._killed.add(id(nested))
                    nested.inputs.clear()
        node.inputs.clear()
        node.outputs.clear()

    def sweep(self) -> int:
        """Remove disconnected nodes, and those that nothing reads; returns how many of the latter there were."""
        count = 0
        for graph in reversed(list(self.model.graphs())):
            nodes = [node for node in graph.nodes if id(node) not in self._killed]
            dead = self._dead(nodes)
            count += len(dead)
            _disconnect(node for node in nodes if id(node) in dead)
            graph.nodes = [node for node in nodes if id(node) not in dead]
        return count

    def _dead(self, nodes: list[gs.Node]) -> set[int]:
        dead: set[int] = set()
        readers: dict[int, int] = {}
        for node in reversed(nodes):
            used = any(self.is_fixed(t) or readers.get(id(t), len(t.outputs)) for t in node.outputs if t.name)
            if used or not node.outputs or self.excluded(node):
                continue
            dead.add(id(node))
            for tensor in _reads(node):
                readers[id(tensor)] = readers.get(id(tensor), len(tensor.outputs)) - 1
        return dead

    # --- telling --------------------------------------------------------------------------------------------------

    def leave(self, node: gs.Node, why: str) -> None:
        """Say once why a node was left alone."""
        where = label(node)
        if (where, why) not in self._left:
            self._left.add((where, why))
            self.changes.leave(where, why)


def is_dense(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant with an ordinary (not sparse) value."""
    return isinstance(tensor, gs.Constant) and not isinstance(tensor._values, SparseWeight)


def _is_in_file(constant: gs.Constant) -> bool:
    return isinstance(getattr(constant._values, "blob", None), FileBlob)


def _read_by_name(graphs: list[gs.Graph]) -> Iterator[str]:
    """Names that are read by name alone: outer tensors as outputs of a subgraph, quantization annotations."""
    for graph in graphs:
        inputs = {id(tensor) for tensor in graph.inputs}
        for tensor in graph.outputs:
            if not tensor.inputs and id(tensor) not in inputs and not isinstance(tensor, gs.Constant):
                yield tensor.name
        header = vars(graph).get("header")  # a graph that a pass made has none
        for annotation in header.quantization_annotation if header is not None else ():
            yield annotation.tensor_name
            yield from (entry.value for entry in annotation.quant_parameter_tensor_names)


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Every tensor that a node reads, those captured by its subgraphs included."""
    yield from node.inputs
    for inner in subgraphs(node):
        for nested in inner.nodes:
            yield from _reads(nested)


def _disconnect(nodes: Iterable[gs.Node]) -> None:
    """Disconnect many nodes at once, in time linear in the number of edges."""
    gone: set[int] = set()
    touched: dict[int, gs.Tensor] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        gone.add(id(node))
        touched.update((id(tensor), tensor) for tensor in (*node.inputs, *node.outputs))
        for inner in subgraphs(node):
            waiting.extend(inner.nodes)
    for tensor in touched.values():
        for readers in (tensor.inputs, tensor.outputs):
            kept = [node for node in readers if id(node) not in gone]
            list.clear(readers)
            list.extend(readers, kept)
