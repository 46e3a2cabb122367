"""Equal things once: nodes that compute the same, initializers with the same bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp_passes._workspace import Workspace, is_dense, label

__all__ = ["merge_equal_nodes", "share_initializers"]

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that give another value each time."""

Key = tuple[Any, ...]


def merge_equal_nodes(work: Workspace) -> int:
    """Let one node do the work of several that are equal in operator, attributes and inputs."""
    count = 0
    for graph in work.graphs():
        known: dict[Key, gs.Node] = {}
        for node in work.nodes(graph):
            key = _node_key(work, node)
            if key is None:
                continue
            first = known.setdefault(key, node)
            if first is not node and _merge(work, first, node):
                count += 1
    return count


def _node_key(work: Workspace, node: gs.Node) -> Key | None:
    """What equal nodes have in common; None for nodes that are never merged."""
    if node.domain not in (None, "", "ai.onnx") or node.op in RANDOM or not node.outputs:
        return None
    if node.op == "Dropout" or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return None
    attributes = tuple(sorted((name, _attribute_key(value)) for name, value in node.attrs.items()))
    inputs = tuple(id(tensor) if tensor.name else 0 for tensor in node.inputs)
    return node.op, attributes, inputs, tuple(bool(tensor.name) for tensor in node.outputs)


def _attribute_key(value: Any) -> str:
    if isinstance(value, gs.Constant):
        return f"{value.dtype} {list(value.shape)} {_digest(value)}"
    if isinstance(value, onnx.AttributeProto):
        return f"proto {value.SerializeToString(deterministic=True).hex()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    return f"{type(value).__name__} {value!r}"


def _merge(work: Workspace, first: gs.Node, second: gs.Node) -> bool:
    """Remove `second`; `first` makes its outputs, under the names that the outside knows."""
    pairs = [(one, other) for one, other in zip(first.outputs, second.outputs, strict=True) if one.name]
    forward = [work.can_replace(other, one) for one, other in pairs]
    if not all(simple or work.can_replace(one, other) for simple, (one, other) in zip(forward, pairs, strict=True)):
        return False
    work.changes.add(label(second), f"equal {second.op} computed once, by {label(first)}")
    work.kill(second)
    for simple, (one, other) in zip(forward, pairs, strict=True):
        if simple:
            work.replace(other, one)
        else:
            work.take_over(first, one, other)
    return True


def share_initializers(work: Workspace) -> int:
    """Let one initializer stand for all of its graph with the same dtype, shape and bytes."""
    groups: dict[Key, dict[int, gs.Constant]] = {}
    for graph in work.graphs():
        for node in graph.nodes:
            for tensor in node.inputs:
                if is_dense(tensor) and tensor.name and not work.is_fixed(tensor):
                    home = id(getattr(tensor, "owner", graph))
                    key = (home, str(tensor.dtype), tuple(tensor.shape), int(tensor._values.nbytes))
                    groups.setdefault(key, {})[id(tensor)] = tensor
    count = 0
    for group in groups.values():
        known: dict[str, gs.Constant] = {}
        for tensor in group.values() if len(group) > 1 else ():
            first = known.setdefault(_digest(tensor), tensor)
            if first is not tensor and work.can_replace(tensor, first):
                work.replace(tensor, first)
                count += 1
    return count


def _digest(constant: gs.Constant) -> str:
    """A hash of a constant's bytes; large ones are streamed from where they are."""
    blob = getattr(constant._values, "blob", None)
    if blob is not None:
        return str(blob.digest)
    value = value_of(constant)
    if value.dtype == np.object_:
        return "".join(f"{len(item)}:{item!r}" for item in value.reshape(-1).tolist())
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
