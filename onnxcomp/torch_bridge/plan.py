"""A graph as a list of steps that run one after the other on torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError
from onnxcomp.graph_io import sorted_nodes
from onnxcomp.model import value_of
from onnxcomp.torch_bridge.dtypes import as_tensor, onnx_type
from onnxcomp.torch_bridge.registry import NodeCall, Operator, find_operator
from onnxcomp.torch_bridge.weights import value_of_node

__all__ = ["Plan", "Step", "compile_graph", "missing_operators", "run_plan", "with_frees"]

Values = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        function: The operator.
        call: What it is told.
        inputs: Names of the values it gets; empty: None.
        outputs: Names of the values it gives; empty: not wanted.
        bodies: Its subgraphs, by attribute.
        frees: Values that nothing after it reads.
    """

    function: Operator
    call: NodeCall
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bodies: Mapping[str, Plan] = field(default_factory=dict)
    frees: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all values that it needs, those that its subgraphs take from outside included."""
        inner = (name for body in self.bodies.values() for name in body.captures)
        return tuple(dict.fromkeys((*(name for name in self.inputs if name), *inner)))


@dataclass(frozen=True)
class Plan:
    """Steps in order.

    Attributes:
        inputs: Names of what it is given.
        outputs: Names of what it gives.
        captures: Names of what it reads besides, constants among them.
        steps: In order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captures: tuple[str, ...]
    steps: tuple[Step, ...]


def compile_graph(graph: gs.Graph, opsets: Mapping[str, int]) -> Plan:
    """The plan of a graph.

    Args:
        graph: A graph or subgraph whose operators are all there.
        opsets: Domain -> version.

    Raises:
        ModelError: It holds an operator or a tensor that cannot be run.
    """
    steps = [_step(node, opsets) for node in sorted_nodes(graph)]
    inputs, outputs = _names(graph.inputs), _names(graph.outputs)
    made = {name for step in steps for name in step.outputs}
    reads = dict.fromkeys((*(name for step in steps for name in step.reads), *outputs))
    captures = tuple(name for name in reads if name not in made and name not in inputs)
    return Plan(inputs, outputs, captures, with_frees(steps, outputs))


def _names(tensors: Iterable[gs.Tensor]) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in tensors)


def with_frees(steps: Sequence[Step], outputs: Sequence[str]) -> tuple[Step, ...]:
    """The same steps, each told which of the values made here are read for the last time."""
    made = {name for step in steps for name in step.outputs if name} - set(outputs)
    last = {name: index for index, step in enumerate(steps) for name in (*step.outputs, *step.reads) if name in made}
    frees: dict[int, list[str]] = {}
    for name, index in last.items():
        frees.setdefault(index, []).append(name)
    return tuple(replace(step, frees=tuple(frees.get(index, ()))) for index, step in enumerate(steps))


def _step(node: gs.Node, opsets: Mapping[str, int]) -> Step:
    function = find_operator(node.domain, node.op)
    name = node.name or next((tensor.name for tensor in node.outputs if tensor.name), node.op)
    if function is None:
        message = f"node {name!r}: there is no operator {node.op!r}"
        raise ModelError(message)
    attrs = {key: _attribute(name, key, value) for key, value in node.attrs.items() if not isinstance(value, gs.Graph)}
    domain = "" if node.domain in {None, "", "ai.onnx"} else node.domain
    call = NodeCall(
        name=name,
        op=node.op,
        domain=domain,
        opset=opsets.get(domain, 1),
        attrs=attrs,
        wanted=tuple(bool(tensor.name) for tensor in node.outputs),
        input_types=tuple(map(_type_of, node.inputs)),
    )
    bodies = {key: compile_graph(value, opsets) for key, value in node.attrs.items() if isinstance(value, gs.Graph)}
    return Step(function, call, _names(node.inputs), _names(node.outputs), bodies)


def _type_of(tensor: gs.Tensor) -> int:
    """The ONNX element type of a tensor; models seldom declare that of what a Constant node gives."""
    held = value_of_node(tensor)
    return onnx_type(tensor.dtype if held is None else held.dtype)


def _attribute(node: str, key: str, value: Any) -> Any:
    if isinstance(value, onnx.AttributeProto):
        return onnx.helper.get_attribute_value(value)
    if not isinstance(value, gs.Constant):
        return value
    try:
        return as_tensor(value_of(value))
    except (KeyError, TypeError) as error:
        message = f"node {node!r}: torch has no tensors of the type of its attribute {key!r}"
        raise ModelError(message) from error


def missing_operators(graphs: Iterable[gs.Graph]) -> list[gs.Node]:
    """The nodes, one of each kind, whose operator is not there."""
    missing: dict[tuple[str, str], gs.Node] = {}
    for graph in graphs:
        for node in graph.nodes:
            if find_operator(node.domain, node.op) is None:
                missing.setdefault((node.domain or "", node.op), node)
    return list(missing.values())


def run_plan(plan: Plan, values: Values, keep: frozenset[str] = frozenset()) -> None:
    """Run all steps; what they make is put into `values`, and what is read no more is taken out but for `keep`.

    Raises:
        ModelError: An operator fails; the message names the node.
    """
    step = None
    try:
        for step in plan.steps:
            given = [values[name] if name else None for name in step.inputs]
            if step.bodies:
                bodies = {key: partial(_run_body, body, values) for key, body in step.bodies.items()}
                result = step.function(step.call, *given, **bodies)
            else:
                result = step.function(step.call, *given)
            if isinstance(result, tuple):
                values.update(zip(step.outputs, result, strict=False))
            else:
                values[step.outputs[0]] = result
            for name in step.frees:
                if name not in keep:
                    values.pop(name, None)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
        if step is None or isinstance(error, ModelError):
            raise
        shapes = ", ".join(str(tuple(getattr(value, "shape", ()))) for value in given if value is not None)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"node {step.call.name!r} ({step.call.op}) of inputs {shapes}: {reason}"
        raise ModelError(message) from error


def _run_body(plan: Plan, outer: Values, *given: Any) -> list[Any]:
    """Run a subgraph on inputs and on what it takes from the enclosing graph."""
    values = {name: outer[name] for name in plan.captures}
    values.update(zip(plan.inputs, given, strict=True))
    run_plan(plan, values)
    return [values[name] for name in plan.outputs]
