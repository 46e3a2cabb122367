"""Static int8 where it pays: QuantizeLinear and DequantizeLinear pairs that ONNX Runtime turns into int8 kernels."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self, TypeVar

from onnxcomp import analysis
from onnxcomp.calibration import METHODS, make_calibrator
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.runtime.results import Observer
from onnxcomp.targets import QuantizationRules, host_target
from onnxcomp_passes._canonical import canonicalize
from onnxcomp_passes._choice import Chooser
from onnxcomp_passes._placement import Layer, find_layers, place, rangeable, ranged_alone
from onnxcomp_passes._qdq import Ranges, is_written_by_us
from onnxcomp_passes._remedies import REMEDIES, Evidence, treat
from onnxcomp_passes._scheme import Scheme
from onnxcomp_passes._statistics import observe
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._weights import LayerWeights

__all__ = ["Quantize"]

O = TypeVar("O", bound=Observer)  # noqa: E741 - the type of an observer

PER_CHANNEL_OPSET = 13
"""The first opset whose DequantizeLinear has an axis."""


@register
@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Run Conv, Gemm and MatMul in int8 where that is measured to pay.

    ::

        before   Y = Relu(Conv(X, W, b))
        after    Y = DQ(Q(Conv(DQ(Q(X)), DQ(W8), DQ(b32))))     Q, DQ: QuantizeLinear, DequantizeLinear

    ONNX Runtime runs the second form as one int8 kernel. Activation ranges come from calibration data. Weights are
    int8, symmetric, per output channel where the target has such kernels; biases are int32 in the graph, so that what
    is verified is what runs. Operators between two int8 layers (residual Adds, pooling, reshapes) follow them.

    Layers return to float when their int8 kernel does not materialise, when they are slower for it, or, ranked by
    output error per millisecond gained, until the accuracy budget holds. Before that, what may hold accuracy is tried
    and kept where it helps: ranges fitted to the function behind them, channels evened out between layers, weights
    rounded for the least output error, biases corrected.

    Left alone: layers without a constant weight, ConvTranspose, mask and shape arithmetic, layers whose activations
    hold NaN or infinity, excluded layers, and models that are already quantized.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"data"})
    rounds: ClassVar[bool] = True

    calibration: str = option("minmax", "How ranges are found.", choices=METHODS)
    percentile: float = option(99.99, "Share of values covered, in percent, for 'percentile'.", minimum=50, maximum=100)
    per_channel: bool = option(True, "One weight scale per output channel, where the target has such kernels.")
    weight_bits: int = option(
        8, "Bits of weights; with fewer than 8 the first and the last layer keep 8. They run as int8; `pack` then makes"
        " the file smaller.", minimum=2, maximum=8,
    )  # fmt: skip
    choose: bool = option(True, "Return layers to float by measurement; false quantizes every layer that can be.")
    skip: tuple[str, ...] = option((), "Names of layers that stay float.")
    remedies: tuple[str, ...] = option((), f"What is done for accuracy without choosing: {', '.join(REMEDIES)}.")

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: One of them is out of range, or no remedy is called so.
        """
        super().__post_init__()
        unknown = [name for name in self.remedies if name not in REMEDIES]
        if unknown:
            message = f"quantize: no remedy is called {unknown[0]!r}; there are {', '.join(REMEDIES)}"
            raise OptionError(message)

    def weaker(self) -> Iterator[Self]:
        """Ranges without the outliers."""
        if self.calibration == "minmax":
            yield replace(self, calibration="percentile")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        rules = self._rules(context)
        if rules is None:
            changes.leave("the model", "the target has no int8 kernels for Q/DQ models")
            return changes
        if is_written_by_us(model):  # what is left in float there was left for a reason
            changes.leave("the model", "is already quantized")
            return changes
        base = model.fork()
        lift_constants(base.graph)
        if not any(layer.name not in self.skip for layer in find_layers(base.graph, context, changes)):
            if analysis.is_quantized(model):
                changes.leave("the model", "is already quantized")
            return changes
        base.raise_opset(PER_CHANNEL_OPSET)
        canonicalize(base, context)
        layers = find_layers(base.graph, context)
        wanted = place(base.graph, layers, base.opset, rules=rules).tensors
        ranges = self._calibrate(base, wanted, context, changes)
        usable = self._usable(base, layers, ranges, rules, changes)
        names = [layer.name for layer in layers]
        keys = tuple(layer.key for layer in layers)
        limits = dict.fromkeys(keys[1:-1], 2 ** (self.weight_bits - 1) - 1)
        scheme = Scheme(base, rules, ranges, keys, LayerWeights(context.exact), limits=limits)
        evidence = Evidence(
            lambda model, watches: observe(model, watches, context),
            lambda model, tensors: self._calibrate(model, tensors, context, Changes()),
            context,
        )
        if context.judge is not None and self.choose:
            # Kept for another choice within less of the budget, which needs no second measurement of each layer.
            key = "quantize", model.digest, self
            chooser = context.statistics.setdefault(key, Chooser(scheme, names, evidence, context))
            chosen, remedies = chooser.choose(usable, changes)
        else:
            chosen, remedies = usable, self.remedies
        if not chosen:
            return changes
        scheme = treat(scheme, remedies, chosen, evidence)
        model.become(scheme.build(chosen, context))
        for index in sorted(chosen):
            story = scheme.story.get(scheme.keys[index], ())
            changes.add(names[index], "; ".join(("runs in int8", *story)))
        skipped = [name for index, name in enumerate(names) if index not in chosen]
        changes.resolved = {"choose": False, "skip": skipped, "remedies": list(remedies)}
        return changes

    def _usable(
        self, base: Model, layers: list[Layer], ranges: Ranges, rules: QuantizationRules, changes: Changes
    ) -> frozenset[int]:
        """The layers that may run in int8, by their place."""
        usable = set()
        outputs = {id(tensor) for tensor in base.graph.outputs}
        for index, layer in enumerate(layers):
            if layer.name in self.skip:
                continue
            if not layer.is_finite:
                changes.leave(layer.name, "its weight holds NaN or infinity")
            elif ranged_alone(layer, outputs, rules) <= ranges.keys():
                usable.add(index)
            else:
                changes.leave(layer.name, "its activations hold NaN or infinity, or nothing at all")
        return frozenset(usable)

    def _rules(self, context: Context) -> QuantizationRules | None:
        rules = (context.target or host_target()).rules
        return None if rules is None else replace(rules, per_channel=rules.per_channel and self.per_channel)

    def _calibrate(self, base: Model, wanted: Container[str], context: Context, changes: Changes) -> Ranges:
        """The range of each tensor over the calibration data; tensors with NaN or infinity are left out.

        All that any target may want are calibrated at once, so that several targets need one calibration.
        """
        rules = self._rules(context) or QuantizationRules()
        fresh = partial(make_calibrator, self.calibration, self.percentile, levels=rules.levels)
        watches = observe(base, {name: fresh() for name in rangeable(base.graph, context, base.opset)}, context)
        makers = {tensor.name: node for node in base.graph.nodes for tensor in node.outputs}
        for name, watch in watches.items():
            if watch.nonfinite and name in wanted:
                maker = makers.get(name)
                source = f"output of {maker.op} {(maker.name or name)!r}" if maker else "graph input"
                changes.leave(name, f"{source}, holds NaN or infinity ({watch.nonfinite} values)")
        return {name: watch.range() for name, watch in watches.items() if not watch.nonfinite and watch.count}
