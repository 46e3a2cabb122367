"""Store float weights as int8, at unchanged speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.judge import Judge
from onnxcomp.model import Model, value_of
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp_passes._choice import MOST_RANKED, costliest_first, fewest
from onnxcomp_passes._stored import (
    Stored,
    encode,
    find_stored,
    lift_constants,
    output_channel_axis,
    restore,
    store,
    weight_inputs,
)

__all__ = ["QuantizeWeights"]

NODE_OVERHEAD_BYTES = 160
"""What the two nodes and the extra initializers of one stored weight add to the file, about."""


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Store float weights as int8 with a scale per output channel; the runtime decodes them when it loads the model.

    ::

        before   Y = Conv(X, W)                      W: float32
        after    Y = Conv(X, Mul(Cast(W8), scale))   W8: int8, same shape; scale: float32, one per output channel

    ONNX Runtime folds Cast and Mul at load, so inference computes in float32 as before, at the same speed and from a
    file a quarter the size. No data are needed. Round-to-nearest, symmetric.

    Left alone: weights that are not float32, that are too small for the two nodes to pay, that hold NaN or infinity,
    that live in a subgraph, that are a graph output, and whatever ONNX Runtime is seen not to fold.
    """

    name: ClassVar[str] = "quantize-weights"

    per_channel: bool = option(True, "One scale per output channel (or table row) instead of one per weight.")
    min_elements: int = option(128, "Weights with fewer elements stay float.", minimum=1)
    choose: bool = option(True, "Return weights to float by measurement; false stores every weight that can be.")
    skip: tuple[str, ...] = option((), "Names of weights that stay float.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        candidate = model.fork()
        lift_constants(candidate.graph)
        stored = self._store_all(candidate, context, changes)
        _undo_unfolded(candidate, context, stored, changes)
        if stored and context.judge is not None and self.choose:
            self._fit_budget(candidate, context, context.judge, stored, changes)
        if changes.count:
            model.become(candidate)
        return changes

    def _store_all(self, model: Model, context: Context, changes: Changes) -> dict[str, Stored]:
        """Store every weight that can be and is worth it."""
        stored: dict[str, Stored] = {}
        outputs = {tensor.name for tensor in model.graph.outputs}
        for constant, node, index in _weights(model):
            reason = self._refusal(constant, node, context, outputs)
            if reason:
                changes.leave(constant.name, reason)
                continue
            weight = value_of(constant)
            if not np.isfinite(weight).all():
                changes.leave(constant.name, "holds NaN or infinity")
                continue
            axis = output_channel_axis(node, index, weight.ndim) if self.per_channel else None
            codes, scale = encode(weight, axis)
            if codes.nbytes + scale.nbytes + NODE_OVERHEAD_BYTES >= weight.nbytes:
                changes.leave(constant.name, "too small for int8 codes, scales and two nodes to be smaller")
                continue
            stored[constant.name] = store(model, model.graph, constant, codes, scale)
            changes.add(constant.name, f"{'x'.join(map(str, weight.shape))} float32 stored as int8")
        return stored

    def _fit_budget(
        self, model: Model, context: Context, judge: Judge, stored: dict[str, Stored], changes: Changes
    ) -> None:
        """Return weights to float, those with most output error per byte first, until the budget holds."""
        if judge.allows(judge.quality(model)):
            return
        saved = {name: float(np.prod(form.codes.shape)) for name, form in stored.items()}

        def floats(chosen: list[str]) -> Model:
            """The model with these weights in float again."""
            fork = model.fork()
            for name in chosen:
                form = find_stored(next(t for n in fork.graph.nodes for t in n.outputs if t.name == name))
                if form is not None:
                    restore(form, fork.graph)
            return fork

        errors: dict[str, float] = {}
        for name in sorted(saved, key=lambda name: saved[name], reverse=True)[:MOST_RANKED]:
            if context.out_of_time():
                break
            context.progress(f"measuring what storing {name} costs")
            alone = floats([other for other in saved if other != name])
            errors[name] = judge.rough_error(alone)
            judge.forget(alone)
        order = costliest_first(saved, errors)
        count = fewest(len(order), lambda count: judge.allows(judge.quality(floats(order[:count]))), context)
        for name in order[:count]:
            restore(stored[name], model.graph)
            changes.leave(name, "costs too much accuracy")
        changes.changed = [change for change in changes.changed if change.where not in order[:count]]
        changes.resolved = {"choose": False, "skip": order[:count]}

    def _refusal(self, constant: gs.Constant, node: gs.Node, context: Context, outputs: set[str]) -> str | None:
        """Why a weight is left alone, judged without reading it."""
        if context.excludes(node) or constant.name in self.skip:
            return "excluded"
        if constant.dtype != np.float32:
            return f"is {constant.dtype}, not float32" if np.issubdtype(constant.dtype, np.floating) else "not a float"
        if int(np.prod(constant.shape)) < self.min_elements:
            return f"has fewer than {self.min_elements} elements"
        if constant.name in outputs:
            return "is a graph output"
        return None


def _weights(model: Model) -> list[tuple[gs.Constant, gs.Node, int]]:
    """The constants of the main graph that feed a weight input, each with its first reader."""
    found: dict[int, tuple[gs.Constant, gs.Node, int]] = {}
    for node in model.graph.nodes:
        for index in weight_inputs(node):
            tensor = node.inputs[index] if index < len(node.inputs) else None
            if isinstance(tensor, gs.Constant) and getattr(tensor, "owner", model.graph) is model.graph:
                found.setdefault(id(tensor), (tensor, node, index))
    return list(found.values())


def _undo_unfolded(model: Model, context: Context, stored: dict[str, Stored], changes: Changes) -> None:
    """Put back weights whose decoding ONNX Runtime does not fold: it would run at each inference."""
    if not stored or context.runtime is None or context.workdir is None:
        return
    path = context.workdir / "stored.onnx"
    model.save(path)
    alive = {name for node in context.runtime.census(path).nodes for name in node.outputs}
    for name, form in stored.items():
        if name in alive or form.cast.outputs[0].name in alive:
            restore(form, model.graph)
            changes.changed = [change for change in changes.changed if change.where != name]
            changes.leave(name, "ONNX Runtime does not fold its decoding")
