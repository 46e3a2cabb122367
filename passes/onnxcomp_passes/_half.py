"""Which nodes compute in float16: told by the operators' schemas, the values at hand, and the Casts at the borders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import sorted_nodes, subgraphs
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._stored import weight_inputs
from onnxcomp_passes._workspace import is_dense, is_standard

__all__ = ["HALF_MAX", "Plan", "Ports", "harm_of", "plan"]

Array = np.ndarray[Any, Any]

HALF_MAX = float(np.finfo(np.float16).max)
"""65504."""

WEIGHT_ERROR = 1e-3
"""Rounding a weight to float16 makes at most 2**-11 = 0.0005 of its norm, unless part of it is in the denormals."""

CHUNK = 1 << 20
"""Elements of a constant that are looked at together."""

SUMMING = frozenset(
    {"Attention", "CumSum", "Einsum", "GlobalLpPool", "LpNormalization", "LpPool", "LRN", "MeanVarianceNormalization"}
)
"""Operators that sum many terms or their powers, so that their inside may overflow where input and output do not. So do
those whose name begins with Reduce, but for the largest and the smallest."""

COORDINATES = frozenset(
    {"GridSample", "MaxRoiPool", "NonMaxSuppression", "Range", "Resize", "RoiAlign", "TopK", "Upsample"}
)
"""Operators on positions or orders, which 11 bits do not tell apart."""

UNBOUNDED = frozenset({"Exp", "Pow", "Reciprocal"})
"""Operators whose result may be far larger than their input; without data nothing is known of it."""

SCATTERING = frozenset({"ScatterElements", "ScatterND"})
"""Operators that ONNX Runtime loads in float16 and then refuses to run, where they combine values."""

INTEGER = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

BOUNDED = frozenset(
    {"Cos", "Erf", "HardSigmoid", "InstanceNormalization", "LayerNormalization", "Sigmoid", "Sin"}
    | {"Softmax", "Softsign", "Tanh"}
)
"""Operators whose result is small whatever comes in."""

EITHER = frozenset({"Cast", "Shape", "Size"})
"""Operators that read float16 in the place of float32 and give the same."""

ROUNDS = 8
"""Of moving borders: each moves them by whole chains, forward and back."""


@dataclass(frozen=True)
class Ports:
    """The places of a node that may be float16."""

    inputs: frozenset[int]
    outputs: frozenset[int]


@dataclass
class Plan:
    """What computes in float16.

    Attributes:
        ports: Of each such node, by its identity.
        left: Nodes that compute with float32 all the same, and why.
        converts_io: Whether inputs and outputs of the graph are float16 too.
        outputs: The graph's outputs, by identity.
    """

    ports: dict[int, Ports] = field(default_factory=dict)
    left: list[tuple[gs.Node, str]] = field(default_factory=list)
    converts_io: bool = False
    outputs: frozenset[int] = frozenset()

    def reads_half(self, node: gs.Node, index: int) -> bool:
        """Whether an input of a node is float16."""
        return id(node) in self.ports and index in self.ports[id(node)].inputs

    def makes_half(self, tensor: gs.Tensor) -> bool:
        """Whether a node makes a tensor in float16."""
        for maker in tensor.inputs:
            if id(maker) in self.ports:
                return any(maker.outputs[index] is tensor for index in self.ports[id(maker)].outputs)
        return False


def plan(
    model: Model,
    context: Context,
    *,
    blocked: frozenset[str],
    seen: Mapping[str, bool] | None,
    converts_io: bool,
) -> Plan:
    """Decide which nodes of the main graph compute in float16.

    Args:
        model: The model; it is not changed.
        context: Nodes that it excludes stay float32.
        blocked: Operators that stay float32.
        seen: Tensor name -> whether all its values were seen to fit float16; None: there are no data, and what comes of
            constants that do not fit is taken not to fit.
        converts_io: Whether inputs and outputs of the graph are float16 too.
    """
    types = _Types(model)
    nodes = sorted_nodes(model.graph)
    wide = _wide_without_data(nodes) if seen is None else {}
    derived = _integer_derived(nodes, types)
    made = Plan(converts_io=converts_io, outputs=frozenset(map(id, model.graph.outputs)))
    functions = {function.name for function in model.functions}
    for node in nodes:
        reason = _refusal(node, context, blocked, has_data=seen is not None)
        if node.op in functions:
            reason = reason or "is a function of the model"
        ports = None if reason else _ports(node, model.opset, types)
        if ports is None:
            reason = reason or ("its schema has no float16" if types.computes(node) else None)
        else:
            reason = _value_refusal(node, ports, wide, seen, derived)
        if reason is not None:
            if types.computes(node):
                made.left.append((node, reason))
        elif ports is not None:
            made.ports[id(node)] = ports
    for node in _at_useless_borders(nodes, made, types):
        made.left.append((node, "would need as many Casts around it as it spares"))
    return made


class _Types:
    """The dtypes of a model's tensors."""

    def __init__(self, model: Model) -> None:
        self._known = infer_known(model)

    def get(self, tensor: gs.Tensor) -> np.dtype[Any] | None:
        """The dtype, None where it is not known or the value is no dense tensor."""
        if isinstance(tensor, gs.Constant):
            return np.dtype(tensor.dtype) if is_dense(tensor) else None
        known = self._known.get(id(tensor))
        return known[1].dtype if known is not None else None

    def is_float(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is float32."""
        return not tensor.is_empty() and self.get(tensor) == np.float32

    def computes(self, node: gs.Node) -> bool:
        """Whether a node has float32 on both sides, or subgraphs."""
        reads, makes = any(map(self.is_float, node.inputs)), any(map(self.is_float, node.outputs))
        return (reads and makes) or any(True for _ in subgraphs(node))


# --- schemas ----------------------------------------------------------------------------------------------------------


@cache
def _signature(op: str, opset: int) -> tuple[list[str], list[str], frozenset[str]] | None:
    """Type names of the inputs and outputs, and those that may be float16; None where it cannot be told.

    A last parameter that may repeat stands for all that follow.
    """
    if not onnx.defs.has(op, opset):
        return None
    schema = onnx.defs.get_schema(op, opset)
    if not all(formal.is_homogeneous for formal in (*schema.inputs, *schema.outputs)):
        return None
    halves = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    return [f.type_str for f in schema.inputs], [f.type_str for f in schema.outputs], frozenset(halves)


def _ports(node: gs.Node, opset: int, types: _Types) -> Ports | None:
    """The places of a node that may be float16, or None."""
    signature = _signature(node.op, opset)
    if signature is None or any(types.get(t) is None for t in (*node.inputs, *node.outputs) if not t.is_empty()):
        return None
    inputs, outputs, halves = signature

    def places(tensors: Iterable[gs.Tensor], formals: list[str], names: frozenset[str]) -> dict[int, str]:
        named = ((i, formals[min(i, len(formals) - 1)]) for i, t in enumerate(tensors) if types.is_float(t))
        return {index: name for index, name in named if name in names}

    read = places(node.inputs, inputs, halves)
    made = places(node.outputs, outputs, frozenset(read.values()))  # a type that no input binds is an attribute's
    return Ports(frozenset(read), frozenset(made)) if read and made else None


# --- reasons ----------------------------------------------------------------------------------------------------------


def _refusal(node: gs.Node, context: Context, blocked: frozenset[str], *, has_data: bool) -> str | None:
    """Why a node stays float32 whatever its values, or None."""
    if context.excludes(node):
        return "excluded"
    if not is_standard(node, node.op):
        return "is not an operator of ONNX"
    if node.op in blocked:
        return f"{node.op} is blocked"
    if any(True for _ in subgraphs(node)):
        return "has subgraphs, which stay float32"
    if node.op in COORDINATES:
        return "its positions need more than 11 bits"
    is_sum = node.op.startswith("Reduce") and node.op not in {"ReduceMax", "ReduceMin"}
    if is_sum or node.op in SUMMING:
        return "its sums may overflow float16"
    if node.op in UNBOUNDED and not has_data:
        return "its result may overflow float16, and there are no data to tell"
    if node.op in SCATTERING and node.attrs.get("reduction", "none") != "none":
        return "ONNX Runtime has no float16 kernel for its reduction"
    beside = (*(t.inputs[0] for t in node.inputs if t.inputs), *(r for t in node.outputs for r in t.outputs))
    if any(map(_crashes, node.inputs if node.op == "MatMul" else node.outputs if node.op == "Transpose" else ())):
        return "ONNX Runtime crashes on float16 where a Transpose moves the first axis to the end before a MatMul"
    if node.op in INTEGER or any(other.op in INTEGER for other in beside):
        return "is part of int8 computation"
    return "is a conversion" if node.op in EITHER else None


def _crashes(tensor: gs.Tensor) -> bool:
    """Whether a Transpose makes a tensor that a MatMul reads, and moves the first axis to one of the last two places.

    ONNX Runtime 1.32 makes one node of both, also through Casts, and ends by SIGSEGV where it has no kernel for that.
    """
    maker = tensor.inputs[0] if tensor.inputs else None
    while maker is not None and maker.op == "Cast":
        tensor = maker.inputs[0]
        maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "Transpose" or not _is_read_by_matmul(tensor):
        return False
    order = [int(axis) for axis in maker.attrs.get("perm", ())]
    others = [axis for axis in order if axis]
    return len(order) > 2 and others == sorted(others) and 0 in order[-2:]


def _is_read_by_matmul(tensor: gs.Tensor) -> bool:
    return any(
        reader.op == "MatMul" or (reader.op == "Cast" and _is_read_by_matmul(reader.outputs[0]))
        for reader in tensor.outputs
    )


def _value_refusal(
    node: gs.Node, ports: Ports, wide: Mapping[int, gs.Tensor], seen: Mapping[str, bool] | None, derived: set[int]
) -> str | None:
    """Why a node stays float32 for its values, or None."""
    if id(node) in derived:
        return "computes with what were integers"
    reads = [node.inputs[index] for index in sorted(ports.inputs)]
    for tensor in reads:
        if isinstance(tensor, gs.Constant) and (harm := harm_of(tensor)) is not None:
            return f"its constant {tensor.name!r} {harm}"
    if node.op == "Div" and 1 in ports.inputs and _has_vanishing(node.inputs[1]):
        return f"its divisor {node.inputs[1].name!r} holds values that are 0 in float16"
    for tensor in (*reads, *(node.outputs[index] for index in ports.outputs)):
        if id(tensor) in wide:
            return f"{tensor.name!r} comes of a constant that does not fit float16"
        if seen is not None and not isinstance(tensor, gs.Constant) and not seen.get(tensor.name, False):
            return f"{tensor.name!r} holds values that do not fit float16"
    return None


def _has_vanishing(tensor: gs.Tensor) -> bool:
    if not isinstance(tensor, gs.Constant):
        return False
    return any(np.any((value != 0) & (value.astype(np.float16) == 0)) for value in _chunks(tensor))


def harm_of(constant: gs.Constant) -> str | None:
    """Why a float32 constant must not be rounded to float16, or None. It is read, not kept.

    Example:
        >>> harm_of(gs.Constant("epsilon", np.array([1e-12], np.float32)))
        'loses too much below the range of float16'
        >>> harm_of(gs.Constant("half", np.array([0.5], np.float32)))
    """
    peak = lost = norm = 0.0
    for value in _chunks(constant):
        if np.isnan(value).any():
            return "holds NaN"
        finite = value[np.isfinite(value)].astype(np.float64)  # infinity stays infinity
        peak = max(peak, float(np.max(np.abs(finite), initial=0.0)))
        if peak > HALF_MAX:
            return f"reaches {peak:.3g}, beyond {HALF_MAX:g}"
        error = finite.astype(np.float16) - finite
        lost, norm = lost + float(error @ error), norm + float(finite @ finite)
    return "loses too much below the range of float16" if lost > WEIGHT_ERROR**2 * norm else None


def _chunks(constant: gs.Constant) -> Iterator[Array]:
    """The elements of a constant, some at a time: as float64, all of a large one would take twice its size."""
    flat = value_of(constant).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def _wide_without_data(nodes: Iterable[gs.Node]) -> dict[int, gs.Tensor]:
    """What is computed from constants beyond float16, up to operators whose result is small whatever comes in."""
    wide: dict[int, gs.Tensor] = {}
    for node in nodes:
        if node.op not in BOUNDED and any(id(t) in wide or _is_beyond(t) for t in node.inputs):
            wide.update((id(tensor), tensor) for tensor in node.outputs)
    return wide


def _is_beyond(tensor: gs.Tensor) -> bool:
    if not is_dense(tensor) or tensor.dtype != np.float32:
        return False
    return any(np.any(np.abs(value[np.isfinite(value)]) > HALF_MAX) for value in _chunks(tensor))


def _integer_derived(nodes: Iterable[gs.Node], types: _Types) -> set[int]:
    """Nodes that compute in float with nothing but what were integers: sizes, positions, masks, codes of weights."""
    derived: set[int] = set()
    tensors: set[int] = set()
    for node in nodes:
        if node.op == "Cast" and not types.is_float(node.inputs[0]):
            tensors.update(id(t) for t in node.outputs if types.is_float(t))
            continue
        data = [t for t in node.inputs if types.is_float(t) and not isinstance(t, gs.Constant)]
        if data and all(id(t) in tensors for t in data) and not weight_inputs(node):
            derived.add(id(node))
            tensors.update(id(t) for t in node.outputs)
    return derived


# --- borders ----------------------------------------------------------------------------------------------------------


def _at_useless_borders(nodes: list[gs.Node], made: Plan, types: _Types) -> list[gs.Node]:
    """Take out nodes that are as well off in float32, so that no Casts surround them; returns those."""
    gone: list[gs.Node] = []
    for number in range(ROUNDS):
        moved = []
        for node in nodes if number % 2 == 0 else reversed(nodes):
            if id(node) in made.ports and not _is_heavy(node) and _is_as_well_in_float(node, made, types):
                del made.ports[id(node)]
                moved.append(node)
        gone += moved
        if not moved and number:
            break
    return gone


def _is_heavy(node: gs.Node) -> bool:
    """Whether a node is what float16 is for."""
    places = weight_inputs(node)
    return bool(places) and (node.op != "Gather" or isinstance(node.inputs[0], gs.Constant))


def _is_as_well_in_float(node: gs.Node, made: Plan, types: _Types) -> bool:
    ports = made.ports[id(node)]
    half = single = 0
    for tensor in {id(node.inputs[i]): node.inputs[i] for i in ports.inputs}.values():
        if isinstance(tensor, gs.Constant):
            continue
        from_half = (
            made.makes_half(tensor) or (made.converts_io and not tensor.inputs) or _was_half(tensor, made, types)
        )
        half += not from_half
        single += from_half
    for index in ports.outputs:
        readers = list(_readers(node.outputs[index]))
        is_output = id(node.outputs[index]) in made.outputs
        half += any(not made.reads_half(*place) for place in readers) or (is_output and not made.converts_io)
        single += any(made.reads_half(*place) for place in readers) or (is_output and made.converts_io)
    return single <= half


def _was_half(tensor: gs.Tensor, made: Plan, types: _Types) -> bool:
    """Whether a Cast has made a tensor of a float16 one, or of one that is going to be."""
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "Cast":
        return False
    return types.get(maker.inputs[0]) == np.float16 or made.makes_half(maker.inputs[0])


def _readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """Who reads a tensor, and where; not those that read either type."""
    for node in {id(node): node for node in tensor.outputs}.values():
        if not is_standard(node, *EITHER):
            yield from ((node, index) for index, other in enumerate(node.inputs) if other is tensor)
