"""Which nodes run in int8, and which tensors between them need a QuantizeLinear and a DequantizeLinear.

The rules are those of ONNX Runtime's CPU provider, found by running: see docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp.passes import Changes, Context
from onnxcomp.targets import QuantizationRules, host_target
from onnxcomp_passes._stored import Stored, find_stored

__all__ = ["Layer", "Placement", "find_layers", "place", "rangeable"]

SAME_GRID = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Resize", "DepthToSpace"})
"""Operators that only move values: output and input share scale and zero point, and the runtime drops the Q/DQ."""

COMPANIONS = SAME_GRID | {"Add", "Mul", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Concat"}
"""Operators that are worth int8 between two int8 layers, since they spare a way to float and back."""

FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})
"""Operators whose int8 kernels can write float: no output scale is needed where no int8 node reads the result."""

MAXPOOL_INT8_OPSET = 12

ANY = QuantizationRules()
"""No target's restrictions."""

WIDEST = QuantizationRules(quantized_outputs=True)
"""Wants a range of every tensor that any target wants one of."""


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul whose weight is known: what int8 is about.

    Attributes:
        node: The node.
        weight: Its weight: a float initializer, or one in the storage form.
        axis: The weight's axis of output channels.
    """

    node: gs.Node
    weight: gs.Constant | Stored
    axis: int

    @property
    def name(self) -> str:
        """The node's name, or its first output's."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def key(self) -> str:
        """The name of its first output, which no other node has."""
        return str(self.node.outputs[0].name)


@dataclass(frozen=True)
class Placement:
    """Where int8 runs.

    Attributes:
        layers: The layers in int8.
        companions: The nodes between them that follow.
        tensors: Float tensors that get a scale, by name.
        absorbed: Relu and Clip nodes that the output range of a layer makes redundant.
        grid: Tensor name -> the tensor whose scale it shares.
    """

    layers: tuple[Layer, ...]
    companions: tuple[gs.Node, ...]
    tensors: dict[str, gs.Tensor]
    absorbed: tuple[gs.Node, ...]
    grid: dict[str, str]


def find_layers(graph: gs.Graph, context: Context, changes: Changes | None = None) -> list[Layer]:
    """All layers of the main graph that the target has int8 kernels for; says why others are left alone."""
    target = context.target or host_target()
    return _layers(graph, context, target.rules or ANY, target.name, changes)


def rangeable(graph: gs.Graph, context: Context, opset: int) -> list[str]:
    """The tensors that any target may want a range of: one calibration then serves them all."""
    return list(place(graph, _layers(graph, context, WIDEST), opset, rules=WIDEST).tensors)


def _layers(
    graph: gs.Graph, context: Context, rules: QuantizationRules, target: str = "", changes: Changes | None = None
) -> list[Layer]:
    layers = []
    for node in graph.nodes:
        if node.op not in {"Conv", "Gemm", "MatMul", "ConvTranspose"} or node.domain:
            continue
        weight = _weight(node)
        reason = "excluded" if context.excludes(node) else _refusal(node, weight)
        if reason is None and not rules.supports(node.op):
            reason = f"{target} has no int8 {node.op}"
        if reason is None and weight is not None:
            layers.append(Layer(node, weight, _axis(node)))
        elif changes is not None:
            changes.leave(node.name or node.outputs[0].name, reason or "has no constant weight")
    return layers


def _weight(node: gs.Node) -> gs.Constant | Stored | None:
    tensor = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(tensor, gs.Constant):
        return tensor
    return None if tensor is None else find_stored(tensor)


def _refusal(node: gs.Node, weight: gs.Constant | Stored | None) -> str | None:
    """Why a node cannot run in int8, or None."""
    if node.op == "ConvTranspose":
        return "ONNX Runtime has no int8 ConvTranspose"
    if weight is None:
        return "its weight is not constant"
    if isinstance(node.inputs[0], gs.Constant):
        return "its data input is constant"
    if isinstance(weight, gs.Constant) and weight.dtype != np.float32:
        return f"its weight is {weight.dtype}"
    rank = len(weight.shape if isinstance(weight, gs.Constant) else weight.codes.shape)
    if node.op == "MatMul" and rank != 2:
        return f"its weight has {rank} axes, int8 kernels want 2"
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("transA", 0)):
        return "alpha is not 1 or A is transposed"
    bias = _bias(node)
    if bias is not None and (not isinstance(bias, gs.Constant) or bias.dtype != np.float32):
        return "its bias is not a float constant"
    if node.op == "Gemm" and bias is not None and (node.attrs.get("beta", 1.0) != 1.0 or len(bias.shape) != 1):
        return "beta is not 1 or its bias is not one value per output"
    return None


def _bias(node: gs.Node) -> gs.Tensor | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias if bias is not None and bias.name else None


def _axis(node: gs.Node) -> int:
    if node.op == "Conv":
        return 0
    return 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else 1


def place(
    graph: gs.Graph,
    layers: Iterable[Layer],
    opset: int,
    known: Container[str] | None = None,
    rules: QuantizationRules = ANY,
) -> Placement:
    """Decide what runs in int8 around the given layers.

    An operator between two layers follows them into int8 when all its data come from int8 nodes and an int8 node reads
    its result; elsewhere the way back to float would cost more than it spares.

    Args:
        graph: The graph; it is not changed.
        layers: The layers to run in int8.
        opset: Of the default operator set.
        known: The tensors that have a range; operators on others do not follow. None: all.
        rules: The target's: operators that it has no int8 kernel for do not follow.
    """
    chosen = tuple(layers)
    core = {id(layer.node) for layer in chosen}
    outputs = {id(tensor) for tensor in graph.outputs}
    final, absorbed = _final_outputs(graph, chosen, outputs)
    companions = _companions(graph, core, final, outputs, opset, known, rules)
    inside = core | {id(node) for node in companions}
    for node in companions:
        clip = _redundant_clip(node, outputs)
        final[id(node)] = node.outputs[0] if clip is None else clip.outputs[0]
        absorbed += [] if clip is None else [clip]
    tensors: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        if id(node) not in inside:
            continue
        for tensor in _data_inputs(node):
            tensors[tensor.name] = tensor
        result = final[id(node)]
        may_be_float = node.op in FLOAT_OUTPUT and not rules.quantized_outputs
        if not may_be_float or any(id(reader) in inside for reader in result.outputs):
            tensors[result.name] = result
    grid = {final[id(n)].name: n.inputs[0].name for n in companions if n.op in SAME_GRID}
    gone = tuple(clip for clip in absorbed if clip.outputs[0].name in tensors)
    return Placement(chosen, tuple(companions), tensors, gone, grid)


def _final_outputs(
    graph: gs.Graph, layers: Iterable[Layer], outputs: set[int]
) -> tuple[dict[int, gs.Tensor], list[gs.Node]]:
    """Each layer's result: its output, or that of the Relu or Clip behind it that quantization makes redundant."""
    final: dict[int, gs.Tensor] = {}
    absorbed = []
    for layer in layers:
        clip = _redundant_clip(layer.node, outputs)
        absorbed += [] if clip is None else [clip]
        final[id(layer.node)] = layer.node.outputs[0] if clip is None else clip.outputs[0]
    return final, absorbed


def _redundant_clip(node: gs.Node, outputs: set[int]) -> gs.Node | None:
    """The Relu or Clip that alone reads a node's result: the range behind it, and so the codes, stay in its bounds.

    Not behind operators that share the grid of their input: that range may leave the bounds.
    """
    tensor = node.outputs[0]
    if node.op in SAME_GRID or len(tensor.outputs) != 1 or id(tensor) in outputs:
        return None
    reader = tensor.outputs[0]
    if reader.op == "Relu":
        return reader
    if reader.op != "Clip" or any(t.name and not isinstance(t, gs.Constant) for t in reader.inputs[1:]):
        return None
    return reader if _clip_low(reader) == 0.0 else None


def _clip_low(node: gs.Node) -> float:
    if "min" in node.attrs:
        return float(node.attrs["min"])
    low = node.inputs[1] if len(node.inputs) > 1 else None
    return float(value_of(low)) if isinstance(low, gs.Constant) else -np.inf


def _companions(
    graph: gs.Graph,
    core: set[int],
    final: dict[int, gs.Tensor],
    outputs: set[int],
    opset: int,
    known: Container[str] | None,
    rules: QuantizationRules,
) -> list[gs.Node]:
    """The operators between int8 nodes: reached from int8 on all sides, and read by int8 further on."""
    int8 = {id(tensor) for tensor in final.values() if known is None or tensor.name in known}
    reached: list[gs.Node] = []
    results: dict[int, gs.Tensor] = {}
    for node in graph.nodes:
        data = list(_data_inputs(node))
        may = node.op in COMPANIONS and rules.supports(node.op) and _supported(node, opset)
        if may and data and all(id(t) in int8 for t in data):
            clip = _redundant_clip(node, outputs)
            result = node.outputs[0] if clip is None else clip.outputs[0]
            if known is not None and result.name not in known:
                continue
            reached.append(node)
            results[id(node)] = result
            int8.add(id(result))
    useful = set(core)
    kept = []
    for node in reversed(reached):
        if any(id(reader) in useful for reader in results[id(node)].outputs):
            useful.add(id(node))
            kept.append(node)
    return kept[::-1]


def _supported(node: gs.Node, opset: int) -> bool:
    """Whether the int8 form of an operator exists for these attributes."""
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op == "MaxPool":
        return opset >= MAXPOOL_INT8_OPSET
    if node.op == "Resize":
        return bool(node.attrs.get("mode", "nearest") == "nearest")
    if node.op in {"Add", "Mul"}:
        return not any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
    return True


def _data_inputs(node: gs.Node) -> Iterator[gs.Tensor]:
    """The inputs that carry data, not weights, shapes or bounds."""
    several: Any = {"Add", "Mul", "Concat"}
    count = len(node.inputs) if node.op in several else 1
    for tensor in node.inputs[:count]:
        if not isinstance(tensor, gs.Constant):
            yield tensor
