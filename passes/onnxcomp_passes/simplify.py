"""`Simplify`: everything that makes a model smaller or faster without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp_passes._folding import constants_to_initializers, fold
from onnxcomp_passes._fusion import fuse_affine, fuse_pad
from onnxcomp_passes._noops import merge_chain, remove_noop, settle_reshape
from onnxcomp_passes._shapes import ShapeValues
from onnxcomp_passes._sharing import merge_equal_nodes, share_initializers
from onnxcomp_passes._traces import drop_traces, drop_unused_definitions
from onnxcomp_passes._workspace import Workspace

__all__ = ["Simplify"]

MAX_ROUNDS = 100
"""Each round only removes or simplifies, so this is never reached; it bounds a mistake."""

SLACK_BYTES = 1024
"""How much one rewrite may add to the file: the node that it saves is worth it. If the whole grows, none may."""


@register
@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Fold constants, remove what has no effect, fuse BatchNormalization, Pad and arithmetic into convolutions.

    ::

        before   S = Shape(X)                    X: (N, 3, 8, 8)
                 T = Concat(Gather(S, 0), [-1])
                 Y = BatchNormalization(Conv(Pad(X), W), scale, bias, mean, var)
                 Z = Reshape(Identity(Y), T)
        after    Y = Conv(X, W * scale / sqrt(var), bias - mean * scale / sqrt(var))
                 Z = Reshape(Y, [0, -1])

    Equal nodes and equal initializers become one, Constant nodes become initializers, exporter's traces and shapes
    that inference finds again are dropped (unless debugging information is to be kept).

    Left alone: inputs and outputs; random operators and those of other domains; QuantizeLinear and DequantizeLinear;
    weights that are packed (8-bit integers that a Cast decodes) or shared; whatever would make the file bigger.
    Weights that no fusion touches keep every bit.
    """

    name: ClassVar[str] = "simplify"
    lossless: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    opset: int = option(0, "raise the opset to at least this; 0 keeps it", minimum=0)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """Simplify the model in place, and say what changed.

        Raises:
            ModelError: The opset cannot be raised.
        """
        raised = model.opset < self.opset
        old_opset = model.opset
        if raised:
            model.raise_opset(self.opset)
        original = model.fork()
        limit = original.size_bytes
        for slack in (SLACK_BYTES, 0):
            changes = Changes()
            _simplify(model, context, changes, slack)
            if model.size_bytes <= limit:
                break
            model.become(original.fork())
            changes = Changes(notes=["left as it was: simplified it would be bigger"])
        if raised:
            changes.add("the model", f"opset raised from {old_opset} to {self.opset}")
        return changes


def _simplify(model: Model, context: Context, changes: Changes, slack: int) -> None:
    work = Workspace(model, context, changes, slack=slack)
    work.refresh()
    if count := constants_to_initializers(work):
        changes.add("the graph", f"Constant nodes turned into initializers: {count}")
    dead = work.sweep()
    shared = 0
    for _ in range(MAX_ROUNDS):
        work.refresh()
        rewritten = _rewrite_nodes(work)
        removed = work.sweep()
        dead += removed
        if not rewritten and not removed:
            merged = share_initializers(work)  # only now: a shared weight takes no fusion
            shared += merged
            if not merged:
                break
    if dead:
        changes.add("the graph", f"nodes that nothing reads removed: {dead}")
    if shared:
        changes.add("the graph", f"initializers that equal another one removed: {shared}")
    if unused := _drop_unused_initializers(work):
        changes.add("the graph", f"initializers that nothing reads removed: {unused}")
    if unused := drop_unused_definitions(model):
        changes.add("the model", f"unused functions and operator sets removed: {unused}")
    if not context.keep_debug:
        before = model.size_bytes
        drop_traces(model)
        if dropped := before - model.size_bytes:
            changes.add("the model", f"exporter's traces and inferable shapes dropped: {dropped:,} bytes")


def _rewrite_nodes(work: Workspace) -> int:
    """One round over all nodes; returns how many rewrites were made."""
    count = 0
    shapes = ShapeValues(work)
    graphs = list(work.graphs())
    for graph in graphs:
        for node in work.nodes(graph):
            count += _rewrite_node(work, node, shapes)
    for graph in graphs:
        for node in work.nodes(graph):
            count += fuse_affine(work, node) or fuse_pad(work, node)
    return count + merge_equal_nodes(work)


def _rewrite_node(work: Workspace, node: gs.Node, shapes: ShapeValues) -> bool:
    if fold(work, node, shapes):
        return True
    return any(rule(work, node, shapes) for rule in (remove_noop, settle_reshape, merge_chain))


def _drop_unused_initializers(work: Workspace) -> int:
    count = 0
    for graph in work.graphs():
        unused = vars(graph).get("unused_initializers", [])
        kept = [constant for constant in unused if work.is_fixed(constant)]
        count += len(unused) - len(kept)
        if kept != unused:
            graph.unused_initializers = kept
    return count
