"""Bring a quantized model to what the kernels of a target take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.lints import lint_model, mended_by
from onnxcomp.lints.quantization import CHANNEL_OPSET
from onnxcomp.model import Model
from onnxcomp.packed import unpack
from onnxcomp.passes import Changes, Context, Pass, register
from onnxcomp.targets import Target, host_target
from onnxcomp_passes._refit_activations import decode_at_load, drop_ruinous, shift, widen_softmax
from onnxcomp_passes._refit_weights import refit_biases, refit_weights
from onnxcomp_passes._stored import lift_constants

__all__ = ["FitTarget"]

CLIP_OPSET = 11
"""From here on the bounds of a Clip are inputs."""


@register
@dataclass(frozen=True, kw_only=True)
class FitTarget(Pass):
    """Bring a model that is quantized already to what the target's kernels take.

    ::

        before   DQ(uint8) -> Conv(DQ(int8 weight)) -> Q(uint8)        refused by XNNPACK
        after    DQ(int8) -> Conv(DQ(int8 weight)) -> Q(int8)          the same values

    What `onnxcomp verify` finds with its lints is mended: types of activations, weights with too many bits or scales or
    an offset, missing zero points, the scale of a Softmax, float biases, what one scale ruins; for a target without
    QuantizeLinear and DequantizeLinear they are taken out. Types and zero points change nothing in the results, what
    is rounded anew does.

    Left alone: models in which no lint finds anything that it mends; codes that are inputs or outputs of the model or
    that other operators than DequantizeLinear read; what a scale that is computed stands for.
    """

    name: ClassVar[str] = "fit-target"
    required: ClassVar[bool] = True

    @staticmethod
    def _found(model: Model, target: Target) -> set[str]:
        return {finding.id for finding in lint_model(model, target)}

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        target = context.target or host_target()
        found = self._found(model, target)
        if not found & mended_by(self.name):
            return changes
        candidate = model.fork()
        unpack(candidate)
        if "per-channel-opset" in found and not context.exclude:
            candidate.raise_opset(CHANNEL_OPSET)
            changes.add("the model", f"opset {CHANNEL_OPSET}")
        lift_constants(candidate.graph)
        drop_ruinous(candidate, context, changes)
        if target.rules is None:
            if candidate.opset < CLIP_OPSET and not context.exclude:
                candidate.raise_opset(CHANNEL_OPSET)
            decode_at_load(candidate, context, changes)
        else:
            if found & {"uint8-int8", "activation-type"}:
                shift(candidate, target.rules, context, changes)
            widen_softmax(candidate, context, changes, exactly="softmax-scale" in found)
            refit_weights(candidate, target.rules, found, context, changes)
            if "uint8-int8" in self._found(candidate, target) - found:  # uint8 beside uint8 that was rounded to int8
                shift(candidate, target.rules, context, changes)
                refit_weights(candidate, target.rules, {*found, "uint8-int8"}, context, changes)
            refit_biases(candidate, context, changes)
        _leave_bodies(candidate, changes)
        if changes.count:
            model.become(candidate)
        return changes


def _leave_bodies(model: Model, changes: Changes) -> None:
    """Say that quantized nodes in bodies of If, Loop and Scan stay as they are."""
    for graph in model.graphs():
        count = sum(node.op in {"QuantizeLinear", "DequantizeLinear"} for node in graph.nodes)
        if graph is not model.graph and count:
            why = "are in a body of If, Loop or Scan"
            changes.leave(str(graph.name or "a body"), f"{count} QuantizeLinear and DequantizeLinear {why}")
