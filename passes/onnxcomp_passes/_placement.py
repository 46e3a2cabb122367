"""Which nodes run in int8, and which tensors between them need a QuantizeLinear and a DequantizeLinear.

The rules are those of ONNX Runtime's CPU provider, found by running: see docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import subgraphs, walk
from onnxcomp.model import value_of
from onnxcomp.passes import Changes, Context
from onnxcomp.targets import QuantizationRules, host_target
from onnxcomp_passes._companions import SAME_GRID, clip_low, data_inputs, is_adapted, is_supported
from onnxcomp_passes._stored import Stored, find_stored, is_decoded

__all__ = ["Layer", "Placement", "find_layers", "place", "rangeable", "ranged_alone"]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})
"""Operators whose int8 kernels can write float: no output scale is needed where no int8 node reads the result."""

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

    @property
    def is_finite(self) -> bool:
        """Whether its float weight holds neither NaN nor infinity, which no code stands for."""
        held = self.weight
        return isinstance(held, Stored) or held.dtype != np.float32 or bool(np.isfinite(value_of(held)).all())


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
        if changes is not None:
            _leave_inner(node, changes)
        if node.op not in LAYERS or node.domain:
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


def _leave_inner(node: gs.Node, changes: Changes) -> None:
    """Say why layers in the bodies of If, Loop and Scan stay float."""
    for body in subgraphs(node):
        for graph in walk(body):
            for inner in graph.nodes:
                if inner.op in LAYERS and not inner.domain:
                    changes.leave(
                        inner.name or inner.outputs[0].name,
                        f"is in a body of the {node.op} {node.name or node.outputs[0].name}; bodies stay float",
                    )


def _weight(node: gs.Node) -> gs.Constant | Stored | None:
    tensor = node.inputs[1] if len(node.inputs) > 1 else None
    if isinstance(tensor, gs.Constant):
        return tensor
    return None if tensor is None else find_stored(tensor)


def _refusal(node: gs.Node, weight: gs.Constant | Stored | None) -> str | None:
    """Why a node cannot run in int8, or None."""
    if node.op == "ConvTranspose":
        return "ONNX Runtime has no int8 ConvTranspose"
    if len(node.inputs) < 2:
        return "it has no weight"
    if weight is None:
        return _no_weight(node.inputs[1])
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


def _no_weight(tensor: gs.Tensor) -> str:
    """Why a tensor is no weight."""
    if not tensor.inputs:
        return f"its weight {tensor.name!r} is a graph input"
    if tensor.inputs[0].op == "DequantizeLinear":
        return "its weight is quantized already"
    if is_decoded(tensor):
        return "its weight is stored in blocks, with zero points or packed: int8 kernels take none of these"
    # Attention: rounding both operands takes as long as an int8 kernel saves, from 50 to 256 tokens.
    return "both its operands are computed: rounding them costs what int8 gains"


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
    leave: Container[str] = frozenset(),
) -> Placement:
    """Decide what runs in int8 around the given layers.

    An operator between two layers follows them into int8 when all its data come from int8 nodes and an int8 node reads
    its result; elsewhere the way back to float would cost more than it spares.

    Args:
        graph: The graph, its nodes in topological order; it is not changed.
        layers: The layers to run in int8.
        opset: Of the default operator set.
        known: The tensors that have a range; operators on others do not follow. None: all.
        rules: The target's: operators that it has no int8 kernel for do not follow.
        leave: Operators that do not follow, by the name of the node or of its first output.
    """
    chosen = tuple(layers)
    outputs = {id(tensor) for tensor in graph.outputs}
    results, absorbed = _results((layer.node for layer in chosen), outputs)
    core = set(results)
    reached, more, clips = _reach(graph, results, outputs, known, lambda node: _may_follow(node, opset, rules, leave))
    results |= more
    companions = _useful(reached, results, core)
    inside = core | {id(node) for node in companions}
    absorbed |= {key: clip for key, clip in clips.items() if key in inside}
    tensors: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        if id(node) not in inside:
            continue
        for tensor in _ranged(node, results[id(node)], absorbed.get(id(node)), inside, rules):
            tensors[tensor.name] = tensor
    grid = {
        result.name: node.inputs[0].name for node in companions if node.op in SAME_GRID for result in results[id(node)]
    }
    gone = tuple(clip for clip in absorbed.values() if clip.outputs[0].name in tensors)
    return Placement(chosen, tuple(companions), tensors, gone, grid)


def ranged_alone(layer: Layer, outputs: set[int], rules: QuantizationRules) -> set[str]:
    """The tensors that need a range where this layer alone runs in int8.

    Args:
        layer: The layer.
        outputs: The graph's outputs, by identity.
        rules: The target's.
    """
    results, absorbed = _results((layer.node,), outputs)
    key = id(layer.node)
    return {str(tensor.name) for tensor in _ranged(layer.node, results[key], absorbed.get(key), {key}, rules)}


def _ranged(
    node: gs.Node, results: tuple[gs.Tensor, ...], clip: gs.Node | None, inside: set[int], rules: QuantizationRules
) -> Iterator[gs.Tensor]:
    """The tensors around an int8 node that need a range: what it reads, and what it writes for others in int8."""
    yield from data_inputs(node)
    # ONNX Runtime looks for a Q behind a Relu or Clip that others read, and leaves all in float without.
    clipped = clip is not None and len(clip.outputs[0].outputs) > 0
    may_be_float = node.op in FLOAT_OUTPUT and not rules.quantized_outputs and not clipped
    for result in results:
        if not may_be_float or any(id(reader) in inside for reader in result.outputs):
            yield result


Results = dict[int, tuple[gs.Tensor, ...]]
"""A node's id -> its results: its outputs, or that of the Relu or Clip behind it that quantization makes redundant."""


def _results(nodes: Iterable[gs.Node], outputs: set[int]) -> tuple[Results, dict[int, gs.Node]]:
    """The results of nodes, and the Relu and Clip nodes that are redundant behind them, by the id of the node."""
    results: Results = {}
    absorbed = {}
    for node in nodes:
        clip = _redundant_clip(node, outputs)
        results[id(node)] = tuple(node.outputs) if clip is None else (clip.outputs[0],)
        if clip is not None:
            absorbed[id(node)] = clip
    return results, absorbed


def _redundant_clip(node: gs.Node, outputs: set[int]) -> gs.Node | None:
    """The Relu or Clip that alone reads a node's result: the range behind it, and so the codes, stay in its bounds.

    Not behind operators that share the grid of their input: that range may leave the bounds.
    """
    tensor = node.outputs[0]
    if node.op in SAME_GRID or len(tensor.outputs) != 1 or id(tensor) in outputs:
        return None
    reader = tensor.outputs[0]
    if reader.domain:
        return None
    return reader if reader.op == "Relu" or (reader.op == "Clip" and clip_low(reader) == 0.0) else None


def _reach(
    graph: gs.Graph,
    results: Results,
    outputs: set[int],
    known: Container[str] | None,
    may_follow: Callable[[gs.Node], bool],
) -> tuple[list[gs.Node], Results, dict[int, gs.Node]]:
    """The operators that are reached from int8 on all sides, with their results and what these absorb."""
    int8 = {id(t) for tensors in results.values() for t in tensors if known is None or t.name in known}
    reached: list[gs.Node] = []
    found: Results = {}
    absorbed: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if id(node) in results or not may_follow(node):
            continue
        data = list(data_inputs(node))
        if not data or not all(id(tensor) in int8 for tensor in data):
            continue
        own, clips = _results((node,), outputs)
        if known is None or all(tensor.name in known for tensor in own[id(node)]):
            reached.append(node)
            found |= own
            absorbed |= clips
            int8.update(id(tensor) for tensor in own[id(node)])
    return reached, found, absorbed


def _may_follow(node: gs.Node, opset: int, rules: QuantizationRules, leave: Container[str]) -> bool:
    if not is_supported(node, opset) or not rules.supports(node.op) or (is_adapted(node) and not rules.cpu):
        return False
    return node.name not in leave and node.outputs[0].name not in leave


def _useful(reached: list[gs.Node], results: Results, core: set[int]) -> list[gs.Node]:
    """Those of the operators that an int8 node reads further on."""
    useful = set(core)
    kept = []
    for node in reversed(reached):
        if any(id(reader) in useful for result in results[id(node)] for reader in result.outputs):
            useful.add(id(node))
            kept.append(node)
    return kept[::-1]
