"""Nodes whose output provably equals one of their inputs, and chains of nodes that one node can do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp_passes._shapes import ShapeValues
from onnxcomp_passes._workspace import Workspace, is_standard, label

__all__ = ["merge_chain", "remove_noop", "settle_reshape"]

FULL_END = 2**63 - 1
"""The end of a Slice that means "to the end" for every length."""

Rule = Callable[[Workspace, gs.Node, ShapeValues], bool]


def remove_noop(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    """Remove a node whose first output equals its first input (or another one that is not a constant)."""
    rule = RULES.get(node.op)
    if rule is None or not is_standard(node, node.op) or not node.inputs or not node.outputs:
        return False
    if any(tensor.name and (tensor.outputs or work.is_fixed(tensor)) for tensor in node.outputs[1:]):
        return False
    for source in _sources(work, node):
        if rule(work, node, shapes) and not source.is_empty():
            where, op = label(node), node.op
            if work.bypass(node, source):
                work.changes.add(where, f"{op} without effect removed")
                return True
    return False


def _sources(work: Workspace, node: gs.Node) -> list[gs.Tensor]:
    """The input that the output may equal."""
    if node.op in {"Add", "Mul"} and work.value(node.inputs[0]) is not None:
        return [node.inputs[1]]
    return [node.inputs[0]]


# --- one rule an operator ---------------------------------------------------------------------------------------------


def _always(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    return len(node.inputs) == 1


def _dropout(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    if work.opset < 7:
        return bool(node.attrs.get("is_test", 0))
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return True
    training = work.value(node.inputs[2])
    return training is not None and not training.any()


def _cast(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    source, result = work.dtype(node.inputs[0]), work.dtype(node.outputs[0])
    return source is not None and source == result


def _reshape(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    dims = work.dims(node.inputs[0])
    target = shapes.of(node.inputs[1]) if len(node.inputs) > 1 else None
    if dims is None or target is None or target.ndim != 1 or target.size != len(dims):
        return False
    zero_copies = not node.attrs.get("allowzero", 0)
    same = [item == dim or (item == 0 and zero_copies) for item, dim in zip(target, dims, strict=True)]
    unproven = [item for item, equal in zip(target, same, strict=True) if not equal]
    return not unproven or unproven == [-1]


def _flatten(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    dims = work.dims(node.inputs[0])
    return dims is not None and len(dims) == 2 and node.attrs.get("axis", 1) in (1, -1)


def _transpose(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    perm = node.attrs.get("perm")
    return isinstance(perm, list) and perm == sorted(perm)


def _pad(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    pads = work.ints(node, "pads", 1)
    return pads is not None and not any(pads)


def _tile(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    repeats = work.ints(node, "repeats", 1) if work.opset >= 6 else None
    return repeats is not None and all(count == 1 for count in repeats)


def _slice(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    starts = work.ints(node, "starts", 1)
    if starts is None or any(starts):
        return False
    listed = work.ints(node, "ends", 2)
    computed = shapes.of(node.inputs[2]) if listed is None and len(node.inputs) > 2 else None
    ends: list[int | str | None] = [*(listed if listed is not None else computed if computed is not None else ())]
    axes = _optional_ints(work, node, "axes", 3, list(range(len(starts))))
    steps = _optional_ints(work, node, "steps", 4, [1] * len(starts))
    if axes is None or steps is None or any(step != 1 for step in steps) or not len(starts) == len(ends) == len(axes):
        return False
    dims = work.dims(node.inputs[0])
    for axis, end in zip(axes, ends, strict=True):
        dim = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
        whole = end == dim or (isinstance(end, int) and (end >= FULL_END or (isinstance(dim, int) and end >= dim)))
        if end is None or not whole:
            return False
    return True


def _optional_ints(work: Workspace, node: gs.Node, name: str, index: int, default: list[int]) -> list[int] | None:
    given = name in node.attrs or (len(node.inputs) > index and not node.inputs[index].is_empty())
    return work.ints(node, name, index) if given else default


def _expand(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    dims = work.dims(node.inputs[0])
    target = shapes.of(node.inputs[1])
    if dims is None or target is None or target.ndim != 1 or target.size > len(dims):
        return False
    aligned = dims[len(dims) - target.size :]
    return all(item == 1 or item == dim for item, dim in zip(target, aligned, strict=True))


def _neutral(number: float) -> Rule:
    """Add of 0, Mul by 1, Sub of 0, Div by 1, where broadcasting changes nothing."""

    def rule(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
        if work.opset < 7:
            return False
        source = _sources(work, node)[0]
        operand = node.inputs[1] if source is node.inputs[0] else node.inputs[0]
        value, dims = work.value(operand), work.dims(source)
        if value is None or dims is None or value.size != 1 or value.ndim > len(dims) or source is operand:
            return False
        return value.dtype.kind in "fiu" and bool(value.reshape(-1)[0] == number)

    return rule


RULES: dict[str, Rule] = {
    "Identity": _always,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _always),
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Pad": _pad,
    "Tile": _tile,
    "Slice": _slice,
    "Expand": _expand,
    "Add": _neutral(0),
    "Sub": _neutral(0),
    "Mul": _neutral(1),
    "Div": _neutral(1),
}


# --- chains -----------------------------------------------------------------------------------------------------------


def merge_chain(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    """Let one node do what it and the node before it do."""
    if not node.inputs or not node.outputs or node.inputs[0].is_empty():
        return False
    if is_standard(node, "Transpose"):
        return _merge_transposes(work, node)
    if is_standard(node, "Squeeze", "Unsqueeze"):
        return _cancel_axes(work, node)
    if is_standard(node, "Reshape"):
        return _merge_into_reshape(work, node)
    return False


def _merge_transposes(work: Workspace, node: gs.Node) -> bool:
    first = work.producer(node, 0, "Transpose")
    if first is None or first.inputs[0].is_empty():
        return False
    inner, outer = first.attrs.get("perm"), node.attrs.get("perm")
    if not isinstance(inner, list) or not isinstance(outer, list) or len(inner) != len(outer):
        return False
    perm = [inner[axis] for axis in outer]
    if perm == sorted(perm):
        where = label(node)
        done = work.bypass(node, first.inputs[0])
        if done:
            work.changes.add(where, "two Transposes that cancel removed")
        return done
    if not work.reads_alone(node, node.inputs[0]) or first.inputs[0].is_empty():
        return False
    node.inputs[0] = first.inputs[0]
    node.attrs["perm"] = perm
    work.changes.add(label(node), "two Transposes merged")
    return True


def _cancel_axes(work: Workspace, node: gs.Node) -> bool:
    opposite = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}[node.op]
    first = work.producer(node, 0, opposite)
    if first is None:
        return False
    axes = [work.ints(each, "axes", 1) for each in (first, node)]
    wide = work.dims(node.inputs[0] if opposite == "Unsqueeze" else first.inputs[0])
    if axes[0] is None or axes[1] is None or wide is None:
        return False
    normal = [sorted(axis % len(wide) for axis in each) for each in axes if each is not None]
    if not wide or normal[0] != normal[1]:
        return False
    where = label(node)
    done = work.bypass(node, first.inputs[0])
    if done:
        work.changes.add(where, f"{opposite} and {node.op} that cancel removed")
    return done


def _merge_into_reshape(work: Workspace, node: gs.Node) -> bool:
    """The shape before a Reshape does not matter, unless zeros copy from it."""
    first = work.producer(node, 0, "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    target = work.value(node.inputs[1]) if len(node.inputs) > 1 else None
    if first is None or target is None or target.ndim != 1 or (target == 0).any():
        return False
    if not work.reads_alone(node, node.inputs[0]) or first.inputs[0].is_empty():
        return False
    node.inputs[0] = first.inputs[0]
    work.changes.add(label(node), f"{first.op} before Reshape removed")
    return True


# --- shapes that are computed -----------------------------------------------------------------------------------------


def settle_reshape(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    """Give a Reshape a constant shape: 0 copies a dimension of the input, -1 stands for the one that is unknown."""
    if not is_standard(node, "Reshape") or len(node.inputs) != 2 or isinstance(node.inputs[1], gs.Constant):
        return False
    if not work.slack:
        return False  # what computes the shape may be smaller than the constant
    computed = shapes.of(node.inputs[1])
    if computed is None or computed.ndim != 1 or node.attrs.get("allowzero", 0):
        return False
    target = settled(list(computed), work.dims(node.inputs[0]))
    if target is None:
        return False
    value = np.array(target, np.int64)
    name = work.model.unique_name(f"{label(node)}.shape")
    node.inputs[1] = work.constant(name, value, work.graph_of(node))
    work.changes.add(label(node), f"computed shape replaced by {target}")
    return True


def settled(target: list[int | str | None], dims: tuple[int | str, ...] | None) -> list[int] | None:
    """A constant shape that means the same as a computed one, or None.

    An unknown element may become -1 if it is the only one and the others are positive: then it is what is left of the
    input's elements, also when there are none.
    """
    copied = [
        0 if isinstance(item, str) and dims is not None and axis < len(dims) and dims[axis] == item else item
        for axis, item in enumerate(target)
    ]
    numbers = [item for item in copied if isinstance(item, int)]
    unknown = len(copied) - len(numbers)
    if unknown == 0:
        return numbers
    if unknown > 1 or any(number <= 0 for number in numbers):
        return None
    return [item if isinstance(item, int) else -1 for item in copied]
