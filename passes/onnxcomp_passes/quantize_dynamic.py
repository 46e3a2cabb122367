"""Int8 where it pays and no data tell the ranges: they are found at each run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.targets import QuantizationRules, host_target
from onnxcomp_passes._choice import Chooser
from onnxcomp_passes._dynamic import DynamicScheme, find_dynamic_layers
from onnxcomp_passes._placement import Layer
from onnxcomp_passes._remedies import Evidence
from onnxcomp_passes._stored import Stored, lift_constants
from onnxcomp_passes._weights import LayerWeights

__all__ = ["QuantizeDynamic"]

DYNAMIC_OPSET = 11
"""The first opset with DynamicQuantizeLinear."""


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic(Pass):
    """Run MatMul and Gemm in int8, with the range of their input found at each run.

    ::

        before   Y = Gemm(X, W, b)
        after    X8, s, z = DynamicQuantizeLinear(X)
                 Y = Add(Mul(Cast(MatMulInteger(X8, W8, z)), Mul(s, scale)), b)     W8: int8, scale: one a column

    ONNX Runtime runs this as one kernel, DynamicQuantizeMatMul; layers that read one tensor share its quantization, and
    each is a MatMulIntegerToFloat then. No data are needed, and ranges are never wrong; finding them costs a pass over
    the input at each run, so static int8 is faster where it holds. Codes of weights that are stored as int8 are taken
    over. Layers return to float by measurement, as those of `quantize` do.

    Left alone: layers without a constant weight of two axes, Conv (ConvInteger is slower than float), recurrent
    layers, layers beside QuantizeLinear or DequantizeLinear nodes, weights that other nodes read too, excluded nodes,
    subgraphs, and all where the target wants fixed scales.
    """

    name: ClassVar[str] = "quantize-dynamic"
    rounds: ClassVar[bool] = True

    per_channel: bool = option(True, "One weight scale per output channel, where the target has such kernels.")
    min_elements: int = option(256, "Layers with a smaller weight stay float.", minimum=1)
    choose: bool = option(True, "Return layers to float by measurement; false quantizes every layer that can be.")
    skip: tuple[str, ...] = option((), "Names of layers that stay float.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        rules = self._rules(context, changes)
        if rules is None:
            return changes
        base = model.fork()
        lift_constants(base.graph)
        if not self._usable(find_dynamic_layers(base, context, changes), changes):
            return changes
        try:
            base.raise_opset(DYNAMIC_OPSET)
        except ModelError as error:
            changes.leave("the model", str(error))
            return changes
        layers = find_dynamic_layers(base, context)
        usable = self._usable(layers, Changes())
        names = [layer.name for layer in layers]
        keys = tuple(layer.key for layer in layers)
        scheme = DynamicScheme(base, rules, {}, keys, LayerWeights(context.exact))
        chosen = self._chosen(model, scheme, names, usable, context, changes)
        if not chosen:
            return changes
        model.become(scheme.build(chosen, context))
        for index in sorted(chosen):
            changes.add(names[index], "runs in int8, range found at run time")
        changes.resolved = {"choose": False, "skip": [name for i, name in enumerate(names) if i not in chosen]}
        return changes

    def _rules(self, context: Context, changes: Changes) -> QuantizationRules | None:
        """The target's rules, or None where it has no kernels of this kind."""
        target = context.target or host_target()
        rules = target.rules
        if rules is None or rules.quantized_outputs or not rules.supports("MatMul"):
            changes.leave("the model", f"{target.name} has no int8 kernels with ranges found at run time")
            return None
        return replace(rules, per_channel=rules.per_channel and self.per_channel)

    def _usable(self, layers: list[Layer], changes: Changes) -> frozenset[int]:
        """The layers that may run in int8, by their place."""
        usable = set()
        for index, layer in enumerate(layers):
            held = layer.weight.codes if isinstance(layer.weight, Stored) else layer.weight
            if layer.name in self.skip:
                continue
            if math.prod(held.shape) < self.min_elements:
                changes.leave(layer.name, f"its weight has fewer than {self.min_elements} elements")
            elif not layer.is_finite:
                changes.leave(layer.name, "its weight holds NaN or infinity")
            else:
                usable.add(index)
        return frozenset(usable)

    def _chosen(
        self,
        model: Model,
        scheme: DynamicScheme,
        names: list[str],
        usable: frozenset[int],
        context: Context,
        changes: Changes,
    ) -> frozenset[int]:
        """The layers that int8 pays for; all where nothing can be measured."""
        if context.judge is None or not self.choose:
            return usable
        # Remedies against rounding need statistics of data; this pass looks at none.
        nothing = Evidence(lambda model, watches: {}, lambda model, tensors: {}, context)
        # Kept for another choice within less of the budget, which needs no second measurement of each layer.
        key = self.name, model.digest, self
        chooser = context.statistics.setdefault(key, Chooser(scheme, names, nothing, context))
        chosen, _ = chooser.choose(usable, changes)
        return frozenset(chosen)
