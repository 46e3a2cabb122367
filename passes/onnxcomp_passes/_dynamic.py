"""Int8 with ranges found at run time: which layers may have it, and how it is written.

The pattern is the one that ONNX Runtime's MatMulIntegerToFloat and DynamicQuantizeMatMul fusions look for
(onnxruntime/core/optimizer/matmul_integer_to_float.cc, dynamic_quantize_matmul_fusion.cc): any other runs as separate
nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context
from onnxcomp_passes._placement import Layer
from onnxcomp_passes._qdq import drop_unused_decoders, weight_codes
from onnxcomp_passes._scheme import Scheme
from onnxcomp_passes._stored import find_stored

__all__ = ["DynamicScheme", "find_dynamic_layers"]

Array = np.ndarray[Any, Any]

QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})

NO_KERNEL = {
    "Conv": "ONNX Runtime has no fast int8 Conv with ranges found at run time (ConvInteger is slower than float)",
    "ConvTranspose": "ONNX Runtime has no int8 ConvTranspose",
    "LSTM": "its int8 kernel, DynamicQuantizeLSTM, is no operator of ONNX",
    "GRU": "ONNX Runtime has no int8 GRU",
    "RNN": "ONNX Runtime has no int8 RNN",
}
"""Operators with weights that ranges found at run time are nothing for."""


@dataclass(frozen=True)
class DynamicScheme(Scheme):
    """Ranges found at run time, by a DynamicQuantizeLinear for each tensor that layers read."""

    def layers(self, model: Model, context: Context, chosen: frozenset[int] | None = None) -> list[Layer]:
        """See the base class."""
        wanted = set(self.keys) if chosen is None else {self.keys[index] for index in chosen}
        return [layer for layer in find_dynamic_layers(model, context) if layer.key in wanted]

    def build(self, chosen: frozenset[int], context: Context) -> Model:
        """See the base class."""
        fork = self.base.fork()
        writer = _Writer(fork, self)
        layers = self.layers(fork, context, chosen)
        for layer in layers:
            writer.write(layer)
        gone = {id(layer.node) for layer in layers}
        fork.graph.nodes = [node for node in fork.graph.nodes if id(node) not in gone]
        fork.graph.nodes.extend(writer.added)
        drop_unused_decoders(fork.graph)
        return fork


@dataclass
class _Writer:
    """Writes layers into one model; what several need is written once."""

    model: Model
    scheme: Scheme
    added: list[gs.Node] = field(default_factory=list)
    quantized: dict[int, list[gs.Tensor]] = field(default_factory=dict)
    weights: dict[tuple[int, int, bool], tuple[gs.Constant, Array]] = field(default_factory=dict)

    def write(self, layer: Layer) -> None:
        """Put the int8 form in the place of a layer; its output keeps its name."""
        node, result = layer.node, layer.node.outputs[0]
        codes, scale = self._weight(layer)
        scale = (scale * np.float32(node.attrs.get("alpha", 1.0))).astype(np.float32)
        bias = self._bias(node)
        data, data_scale, data_zero = self._quantized(node.inputs[0])
        whole = self._add("MatMulInteger", [data, codes, data_zero], name=layer.name)
        number = self._add("Cast", [whole], {"to": int(onnx.TensorProto.FLOAT)})
        step = self._add("Mul", [data_scale, gs.Constant(self._fresh("s"), scale)])
        node.inputs.clear()
        node.outputs.clear()
        if bias is None:
            self._add("Mul", [number, step], result=result)
        else:
            self._add("Add", [self._add("Mul", [number, step]), bias], result=result)

    def _weight(self, layer: Layer) -> tuple[gs.Constant, Array]:
        """A layer's codes as (inputs, outputs), and their scale: one, or one an output."""
        tensor = layer.node.inputs[1]
        key = id(tensor), layer.axis, layer.key in self.scheme.steps
        if key not in self.weights:
            codes, scale = weight_codes(layer, self.scheme)
            codes = codes if layer.axis == 1 else np.ascontiguousarray(codes.T)
            self.weights[key] = gs.Constant(self._fresh("q"), codes), scale
        return self.weights[key]

    def _quantized(self, tensor: gs.Tensor) -> list[gs.Tensor]:
        """Codes, scale and zero point of a layer's input."""
        if id(tensor) not in self.quantized:
            outputs = [Variable(self._fresh("t")) for _ in range(3)]
            self.added.append(Node("DynamicQuantizeLinear", "", {}, [tensor], outputs))
            self.quantized[id(tensor)] = outputs
        return self.quantized[id(tensor)]

    def _bias(self, node: gs.Node) -> gs.Tensor | None:
        if node.op != "Gemm" or len(node.inputs) < 3 or not node.inputs[2].name:
            return None
        beta = float(node.attrs.get("beta", 1.0))
        if beta == 0.0:
            return None
        bias = node.inputs[2]
        if beta == 1.0:
            return bias
        return gs.Constant(self._fresh("b"), np.asarray(value_of(bias) * np.float32(beta), np.float32))

    def _add(
        self,
        op: str,
        inputs: list[gs.Tensor],
        attrs: dict[str, Any] | None = None,
        *,
        name: str = "",
        result: gs.Tensor | None = None,
    ) -> gs.Tensor:
        output = Variable(self._fresh("t")) if result is None else result
        self.added.append(Node(op, name, attrs or {}, inputs, [output]))
        return output

    def _fresh(self, letter: str) -> str:
        return self.model.unique_name(f"{letter}.0")


def find_dynamic_layers(model: Model, context: Context, changes: Changes | None = None) -> list[Layer]:
    """The MatMul and Gemm nodes of the main graph with a kernel for int8 with ranges found at run time.

    Args:
        model: The model.
        context: Nodes that it excludes are left out.
        changes: Told why other nodes with weights are left alone; None: nobody is.
    """
    layers = []
    for graph, node in _nodes(model):
        reason = _refusal(node)
        if context.excludes(node):
            reason = "excluded"
        elif graph is not model.graph:
            reason = "is in a subgraph"
        weight = None if reason else _weight(node)
        if weight is not None:
            layers.append(Layer(node, weight, 0 if node.attrs.get("transB", 0) else 1))
        elif changes is not None and reason is not None:
            changes.leave(str(node.name or node.outputs[0].name), reason)
    return layers


def _nodes(model: Model) -> Iterator[tuple[gs.Graph, gs.Node]]:
    for graph in model.graphs():
        for node in graph.nodes:
            if not node.domain and (node.op in {"MatMul", "Gemm"} or node.op in NO_KERNEL):
                yield graph, node


def _weight(node: gs.Node) -> Any:
    tensor = node.inputs[1]
    return tensor if isinstance(tensor, gs.Constant) else find_stored(tensor)


def _refusal(node: gs.Node) -> str | None:
    """Why a node cannot run in int8, or None."""
    data, result = node.inputs[0], node.outputs[0]
    if any(beside.op in QUANTIZING for beside in (*data.inputs, *result.outputs)):
        return "is quantized already"
    if node.op in NO_KERNEL:
        return NO_KERNEL[node.op]
    weight = _weight(node)
    if weight is None:
        return "its weight is not constant"
    if isinstance(data, gs.Constant):
        return "its data input is constant"
    values = weight if isinstance(weight, gs.Constant) else weight.codes
    if isinstance(weight, gs.Constant) and weight.dtype != np.float32:
        return f"its weight is {weight.dtype}, not float32"
    if len(values.shape) != 2:
        return f"its weight has {len(values.shape)} axes, int8 kernels want 2"
    if 0 in values.shape:
        return "its weight is empty"
    if isinstance(weight, gs.Constant) and any(not _multiplies(reader, weight) for reader in weight.outputs):
        return "other nodes read its weight too"
    if node.op == "Gemm":
        return _gemm_refusal(node)
    return None


def _multiplies(node: gs.Node, weight: gs.Constant) -> bool:
    return node.op in {"MatMul", "Gemm"} and node.inputs[1] is weight


def _gemm_refusal(node: gs.Node) -> str | None:
    if node.attrs.get("transA", 0):
        return "its data input is transposed"
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    if has_bias and node.attrs.get("beta", 1.0) not in (0.0, 1.0) and not isinstance(node.inputs[2], gs.Constant):
        return "its bias is computed and beta is not 1"
    return None
