"""Writes float16 into a graph: weights that are stored so, and computation with Casts at its borders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.structure import spooled
from onnxcomp.weights import LazyWeight, Spool
from onnxcomp_passes._half import Plan
from onnxcomp_passes._stored import redirect
from onnxcomp_passes._workspace import is_standard

__all__ = ["store_half", "write_half"]

FLOAT, FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)

SHARED_BYTES = 512
"""A constant of at least this size is not written twice for readers of both types: a Cast decodes it."""


def store_half(model: Model, constants: Iterable[gs.Constant], spool: Spool) -> None:
    """Store constants of the main graph as float16, with a Cast that ONNX Runtime folds at load.

    ::

        W_float16 -> Cast -> W
    """
    for constant in constants:
        stored = gs.Constant(model.unique_name("h.0"), _rounded(constant, spool))
        decoded = Variable(constant.name)
        redirect(constant, decoded)
        model.graph.nodes.insert(0, Node("Cast", "", {"to": FLOAT}, [stored], [decoded]))


def write_half(model: Model, plan: Plan, spool: Spool) -> None:
    """Let the nodes of a plan compute in float16.

    Args:
        model: The model that the plan was made for.
        plan: What computes in float16.
        spool: Where large weights go.
    """
    _Writer(model, plan, spool).write()


class _Writer:
    def __init__(self, model: Model, plan: Plan, spool: Spool) -> None:
        self.model = model
        self.plan = plan
        self.spool = spool
        self.nodes = [node for node in model.graph.nodes if id(node) in plan.ports]
        self.halves: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}
        self.added: list[gs.Node] = []
        self.bypassed: dict[int, gs.Node] = {}
        self.fixed = {id(tensor) for tensor in model.graph.outputs} | _read_by_name(model)

    def write(self) -> None:
        """Write all: outputs first, so that inputs find them."""
        if self.plan.converts_io:
            self._convert_inputs()
        for node in self.nodes:
            for index in sorted(self.plan.ports[id(node)].outputs):
                self._make_half(node, index)
        places = [(node, index) for node in self.nodes for index in sorted(self.plan.ports[id(node)].inputs)]
        halves = [self._half(node.inputs[index]) for node, index in places]
        for (node, index), tensor in zip(places, halves, strict=True):
            node.inputs[index] = tensor
        if self.plan.converts_io:
            self._convert_outputs()
        self.model.graph.nodes.extend(self.added)
        self._drop_bypassed()

    def _drop_bypassed(self) -> None:
        """Remove the Casts to float32 that nothing reads any more."""
        for key, node in list(self.bypassed.items()):
            if node.outputs[0].outputs or id(node.outputs[0]) in self.fixed:
                del self.bypassed[key]
            else:
                node.inputs.clear()
                node.outputs.clear()
        self.model.graph.nodes = [node for node in self.model.graph.nodes if id(node) not in self.bypassed]

    def _make_half(self, node: gs.Node, index: int) -> None:
        """Let a node give float16; a Cast serves those that want float32."""
        tensor = node.outputs[index]
        wanted = id(tensor) in self.fixed or any(
            not self.plan.reads_half(reader, place) and not _reads_either(reader)
            for reader in tensor.outputs
            for place, other in enumerate(reader.inputs)
            if other is tensor
        )
        half = Variable(self._fresh("h") if wanted else tensor.name)
        node.outputs[index] = half
        self.halves[id(tensor)] = tensor, half
        self._serve_either(tensor, half)
        if wanted:
            self.added.append(Node("Cast", "", {"to": FLOAT}, [half], [tensor]))

    def _half(self, tensor: gs.Tensor) -> gs.Tensor:
        """The float16 form of a tensor."""
        if id(tensor) not in self.halves:
            self.halves[id(tensor)] = tensor, self._converted(tensor)
        return self.halves[id(tensor)][1]

    def _converted(self, tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor)
        source, maker = tensor, tensor.inputs[0] if tensor.inputs else None
        if maker is not None and is_standard(maker, "Cast"):
            source = maker.inputs[0]  # no two Casts in a row
            self.bypassed[id(maker)] = maker
            if source.dtype == np.float16:
                return source
        half = Variable(self._fresh("h"))
        self.added.append(Node("Cast", "", {"to": FLOAT16}, [source], [half]))
        return half

    def _constant(self, constant: gs.Constant) -> gs.Constant:
        """The constant in float16; the float32 one stays where other nodes read it."""
        others = id(constant) in self.fixed or any(
            not self.plan.reads_half(reader, place)
            for reader in constant.outputs
            for place, other in enumerate(reader.inputs)
            if other is constant
        )
        half = gs.Constant(self._fresh("h") if others else constant.name, _rounded(constant, self.spool))
        if others and constant._values.nbytes >= SHARED_BYTES and id(constant) not in self.fixed:
            decoded = Variable(constant.name)
            for reader in {id(node): node for node in constant.outputs}.values():
                for place, other in enumerate(reader.inputs):
                    if other is constant and not self.plan.reads_half(reader, place):
                        reader.inputs[place] = decoded
            self.added.append(Node("Cast", "", {"to": FLOAT}, [half], [decoded]))
        return half

    # --- inputs and outputs -----------------------------------------------------------------------------------------

    def _convert_inputs(self) -> None:
        defaults = {tensor.name for tensor in vars(self.model.graph).get("default_values", [])}
        for tensor in self.model.graph.inputs:
            if tensor.dtype != np.float32 or tensor.name in defaults or id(tensor) in self.fixed:
                continue
            readers = [
                (node, place)
                for node in {id(node): node for node in tensor.outputs}.values()
                for place, other in enumerate(node.inputs)
                if other is tensor and not self.plan.reads_half(node, place)
            ]
            _retype(tensor)
            self.halves[id(tensor)] = tensor, tensor
            if readers:
                single = Variable(self._fresh("f"))
                for node, place in readers:
                    node.inputs[place] = single
                self.added.append(Node("Cast", "", {"to": FLOAT}, [tensor], [single]))

    def _convert_outputs(self) -> None:
        """Give outputs float16: where a node makes it, under the output's name; elsewhere by a Cast."""
        casts = {id(node.outputs[0]): node for node in self.added if node.attrs["to"] == FLOAT}
        for tensor in self.model.graph.outputs:
            maker = tensor.inputs[0] if tensor.inputs else None
            if tensor.dtype != np.float32 or maker is None:
                continue
            single = Variable(self._fresh("f"))
            redirect(tensor, single)
            maker.outputs[next(i for i, other in enumerate(maker.outputs) if other is tensor)] = single
            _retype(tensor)
            cast = casts.get(id(tensor))
            if cast is None:
                self.added.append(Node("Cast", "", {"to": FLOAT16}, [single], [tensor]))
                continue
            half = cast.inputs[0]
            half_maker = half.inputs[0]
            redirect(half, tensor)
            half_maker.outputs[next(i for i, other in enumerate(half_maker.outputs) if other is half)] = tensor
            if not single.outputs:
                cast.inputs.clear()
                cast.outputs.clear()
                self.added.remove(cast)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _serve_either(self, tensor: gs.Tensor, half: gs.Tensor) -> None:
        for reader in {id(node): node for node in tensor.outputs}.values():
            for place, other in enumerate(reader.inputs):
                if other is tensor and _reads_either(reader):
                    reader.inputs[place] = half

    def _fresh(self, letter: str) -> str:
        return self.model.unique_name(f"{letter}.0")


def _reads_either(node: gs.Node) -> bool:
    return is_standard(node, "Cast", "Shape", "Size")


def _retype(tensor: gs.Variable) -> None:
    """Make a float32 input or output of the graph float16; what else is said of it stays."""
    info = getattr(tensor, "info", None)
    tensor.dtype = np.dtype(np.float16)
    if info is not None:
        fresh = onnx.ValueInfoProto()
        fresh.CopyFrom(info)
        fresh.type.tensor_type.elem_type = FLOAT16
        tensor.info = fresh


def _rounded(constant: gs.Constant, spool: Spool) -> LazyWeight:
    value = value_of(constant)
    data: Any = np.ascontiguousarray(value.astype("<f2")).tobytes()
    return spooled(data, FLOAT16, value.shape, spool)


def _read_by_name(model: Model) -> set[int]:
    """Tensors of the main graph that a subgraph gives out as they are."""
    names = {
        tensor.name
        for graph in model.graphs()
        if graph is not model.graph
        for tensor in graph.outputs
        if not tensor.inputs
    }
    return {id(t) for node in model.graph.nodes for t in (*node.inputs, *node.outputs) if t.name in names}
