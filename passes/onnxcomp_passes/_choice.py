"""Which layers run in int8: chosen by what the whole model is measured to gain and to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.quality import Quality
from onnxcomp.runtime import KernelReport, explain
from onnxcomp_passes._causes import find_cause
from onnxcomp_passes._remedies import REMEDIES, SLOWING, Evidence
from onnxcomp_passes._scheme import Scheme
from onnxcomp_passes._search import MARGIN, costliest_first, fewest, most_worth_ranking

__all__ = ["Chooser"]

Layers = frozenset[int]

REPAIRS = 3
"""Rounds of taking out layers whose int8 kernel did not materialise: each changes what is around the others."""

FUSED_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
"""Operators that ONNX Runtime fuses into a float Conv or Gemm, whose kernel may then go by their name."""

COMFORT = 0.5
"""What helps accuracy at no cost in time is tried where more than this share of the budget would be spent."""

HELPS = 0.97
"""A remedy is kept where it brings the relative error of the whole model below this share."""

FASTER = 1.02
"""A set of layers is preferred to another when the whole model is at least this much better with it."""

TIMINGS = 3
"""A gain has to show in each of so many: in a single one noise may make it."""

MIN_GAIN_MS = 1e-4
"""Stands in for layers whose time is too short to be seen."""


class Chooser:
    """Chooses the layers that run in int8, and what is done for their accuracy.

    Args:
        scheme: How layers are quantized.
        names: The layers' names, in the order of the scheme's keys.
        evidence: What remedies know of the float model.
        context: Its judge measures.
    """

    def __init__(self, scheme: Scheme, names: list[str], evidence: Evidence, context: Context) -> None:
        assert context.judge is not None
        self._scheme = self._untreated = scheme
        self._names = names
        self._evidence = evidence
        self._context = context
        self._judge: Judge = context.judge
        self._why: dict[int, str] = {}
        self._qualities: dict[Layers, Quality] = {}
        self._tried: list[str] | None = None
        self._kept: list[str] = []
        self._order: dict[Layers, tuple[list[int], dict[int, float]]] = {}

    def choose(self, layers: Layers, changes: Changes) -> tuple[Layers, tuple[str, ...]]:
        """The best subset of `layers` found, empty if int8 is not worth it anywhere; and the remedies that helped.

        Called again with a smaller `Context.share`, it goes on from what it has measured.

        Args:
            layers: What may run in int8.
            changes: Told why layers are returned to float, and what was done for accuracy.
        """
        chosen = self._fused(layers)
        if chosen and self._tried is None and not self._holds(chosen, COMFORT):
            self._tried = self._remedy(chosen)
            chosen = self._fused(chosen)
        changes.notes += self._tried or []
        if chosen and not self._holds(chosen):
            chosen = self._within_budget(chosen)
        if chosen:
            chosen = self._without_slow(chosen)
        for index in sorted(layers - chosen):
            changes.leave(self._names[index], self._why.get(index, "int8 does not pay"))
        return chosen, tuple(self._kept)

    @property
    def _base(self) -> Model:
        return self._scheme.base

    def _build(self, layers: Layers) -> Model:
        return self._scheme.build(layers, self._context)

    def _remedy(self, layers: Layers) -> list[str]:
        """Try what may hold accuracy with these layers in int8, the cheapest first, and keep what helps."""
        told = []
        error = self._rough_error(self._build(layers))
        for name, remedy in REMEDIES.items():
            if self._context.out_of_time():
                break
            self._context.progress(f"for accuracy: {name}")
            if name in SLOWING and self._holds(layers):
                continue
            candidate = remedy(self._scheme, layers, self._evidence)
            if candidate is None:
                continue
            found = self._rough_error(candidate.build(layers, self._context))
            change = f"relative error {error:.2%} -> {found:.2%} with {len(layers)} layers in int8"
            helps = found < HELPS * error
            told.append(f"{name}: {change}, {'kept' if helps else 'not kept'}")
            if helps:
                self._scheme, error = candidate, found
                self._kept.append(name)
                self._qualities.clear()
        return told

    def _rough_error(self, model: Model) -> float:
        error = self._judge.rough_error(model)
        self._judge.forget(model)
        return error

    # --- kernels ----------------------------------------------------------------------------------------------------

    def _report(self, layers: Layers) -> KernelReport:
        model = self._build(layers)
        census = self._judge.runtime.census(self._judge.path_of(model))
        return explain(model.proto(), census, wide=self._scheme.rules.wide)

    def _fused(self, layers: Layers) -> Layers:
        """Without the layers that ONNX Runtime would not run in int8."""
        self._context.progress(f"checking the kernels of {len(layers)} layers")
        index = {name: i for i, name in enumerate(self._names)}
        for _ in range(REPAIRS):
            if not layers:
                break
            missed = {index[miss.node]: miss.reason for miss in self._report(layers).missed if miss.node in index}
            if not missed:
                break
            self._why.update(missed)
            layers = layers.difference(missed)
        return layers

    # --- accuracy ---------------------------------------------------------------------------------------------------

    def _quality(self, layers: Layers) -> Quality:
        if layers not in self._qualities:
            model = self._build(layers)
            self._qualities[layers] = self._judge.quality(model)
            self._judge.forget(model)
        return self._qualities[layers]

    def _holds(self, layers: Layers, share: float = MARGIN) -> bool:
        return self._judge.allows(self._quality(layers), share * self._context.share)

    def _within_budget(self, layers: Layers) -> Layers:
        """Return layers to float, those with most output error per millisecond gained first, until the budget holds."""
        if layers not in self._order:
            self._order[layers] = self._rank(layers)
        order, errors = self._order[layers]

        def holds(count: int) -> bool:
            self._context.progress(f"trying {len(order) - count} of {len(order)} layers in int8")
            return self._holds(frozenset(order[count:]))

        count = fewest(len(order), holds, self._context)
        causes = self._causes()
        for index in order[:count]:
            told = [f"alone: relative error {errors[index]:.2%}"] if index in errors else []
            told += [causes[index]] if causes.get(index) else []
            self._why[index] = "costs too much accuracy" + (f" ({'; '.join(told)})" if told else "")
        return frozenset(order[count:])

    def _causes(self) -> dict[int, str]:
        """What each layer's input and weights show, by its place."""
        scheme = self._untreated
        moments = self._evidence.moments(scheme)
        place = {key: index for index, key in enumerate(scheme.keys)}
        found = {
            place[layer.key]: find_cause(layer, scheme.ranges, moments, scheme.weights.get(layer))
            for layer in scheme.layers(scheme.base, self._context)
        }
        return {index: cause for index, cause in found.items() if cause}

    def _rank(self, layers: Layers) -> tuple[list[int], dict[int, float]]:
        """Layers by error per millisecond gained, worst first, and the errors that were measured."""
        self._context.progress(f"ranking {len(layers)} layers by error and time")
        times = self._times(self._base) if self._judge.timed else self._judge.layer_macs(self._base)
        gains = {index: max(times.get(self._names[index], 0.0), MIN_GAIN_MS) for index in sorted(layers)}
        errors = self._errors(gains)
        return costliest_first(gains, errors), errors

    def _errors(self, gains: dict[int, float]) -> dict[int, float]:
        """The output error that each layer alone adds in int8, for the layers that gain most.

        What the float model is off by already (its weights may be stored small) is not the layer's; independent errors
        add up as squares.
        """
        errors = {}
        before = self._judge.rough_error(self._base)
        for index in most_worth_ranking(gains, self._context):
            found = self._rough_error(self._build(frozenset({index})))
            errors[index] = math.sqrt(max(0.0, found**2 - before**2))
        return errors

    # --- speed ------------------------------------------------------------------------------------------------------

    def _times(self, model: Model) -> dict[str, float]:
        """Milliseconds a layer, by layer name, as ONNX Runtime's profiler tells."""
        known = self._kernel_names()
        times: dict[str, float] = {}
        for kernel, ms in self._judge.runtime.profile(self._judge.path_of(model), self._judge.feed).items():
            name = _layer_of(kernel, known)
            if name is not None:
                times[name] = times.get(name, 0.0) + ms
        return times

    def _kernel_names(self) -> dict[str, str]:
        """Node or tensor name -> the layer whose kernel may go by it.

        That is its own name or that of its result, or of the activation (and the residual Add before it) fused into it:
        kernels in blocked layout are named after what they write.
        """
        layers = set(self._names)
        known = {name: name for name in layers}
        for node in self._base.graph.nodes:
            name = node.name or (node.outputs[0].name if node.outputs else "")
            if name not in layers:
                continue
            last = node
            known.setdefault(node.outputs[0].name, name)
            for ops in ({"Add"}, FUSED_ACTIVATIONS):
                readers = last.outputs[0].outputs
                if len(readers) == 1 and readers[0].op in ops:
                    last = readers[0]
                    known.setdefault(last.name or last.outputs[0].name, name)
                    known.setdefault(last.outputs[0].name, name)
        return known

    def _without_slow(self, chosen: Layers) -> Layers:
        """Return layers to float that are slower in int8, the worst first, while the whole model is better for it."""
        if not self._judge.timed:
            return chosen
        self._context.progress("looking for layers that are slower in int8")
        model = self._build(chosen)
        before, after = self._times(self._base), self._times(model)
        ways = self._conversions(model)
        lost = {index: self._lost(before, after, ways, self._names[index]) for index in sorted(chosen)}
        slow = [index for index in sorted(lost, key=lambda i: lost[i], reverse=True) if lost[index] > 0]
        best, count = chosen, 1
        while count < 2 * len(slow) and not self._context.out_of_time():
            rest = self._fused(chosen.difference(slow[:count]))
            if rest and self._is_better(rest, best) and self._holds(rest):
                best = rest
            count *= 2
        for index in chosen - best:
            self._why.setdefault(index, "is slower in int8 on this machine")
        return best

    def _conversions(self, model: Model) -> dict[str, float]:
        """Milliseconds that the ways to int8 and back to float cost beside a layer, by layer name."""
        known, path = self._kernel_names(), self._judge.path_of(model)
        nodes = self._judge.runtime.census(path).nodes
        times = self._judge.runtime.profile(path, self._judge.feed)
        layer = {node.name: name for node in nodes if (name := _layer_of(node.name, known)) is not None}
        maker = {tensor: layer[node.name] for node in nodes if node.name in layer for tensor in node.outputs}
        readers: dict[str, list[str]] = {}
        for node in nodes:
            for tensor in node.inputs if node.name in layer else ():
                readers.setdefault(tensor, []).append(layer[node.name])
        ways: dict[str, float] = {}
        for node in nodes:
            beside: list[str] = []
            if node.op == "DequantizeLinear" and node.inputs[0] in maker:
                beside = [maker[node.inputs[0]]]
            elif node.op in {"QuantizeLinear", "DynamicQuantizeLinear"}:
                beside = readers.get(node.outputs[0], [])
            for name in beside:
                ways[name] = ways.get(name, 0.0) + times.get(node.name, 0.0) / len(beside)
        return ways

    @staticmethod
    def _lost(before: dict[str, float], after: dict[str, float], ways: dict[str, float], name: str) -> float:
        """The milliseconds that a layer loses in int8; not positive where it gains or nothing is known."""
        return after.get(name, 0.0) + ways.get(name, 0.0) - before.get(name, float("inf"))

    def _is_better(self, new: Layers, old: Layers) -> bool:
        """Whether one set gains over another in every one of some timings."""
        return all(self._gain(old, new) >= FASTER for _ in range(TIMINGS))

    def _gain(self, old: Layers, new: Layers) -> float:
        """How many times better the whole model is with one set than with another: faster by smaller."""
        models = self._build(old), self._build(new)
        slower, faster = self._judge.time([self._judge.path_of(model) for model in models])
        return (slower.median_ms / faster.median_ms) * (models[0].size_bytes / models[1].size_bytes)


def _layer_of(kernel: str, known: Mapping[str, str]) -> str | None:
    """The layer that a kernel of the optimized graph was made from: fusion appends to its name."""
    name = kernel
    while name not in known:
        shorter = name.rpartition("_token_")[0] or name.removesuffix("_nchwc").removesuffix("/MatMulAddFusion")
        shorter = shorter.removeprefix("fused ")
        if shorter == name:
            return None
        name = shorter
    return known[name]
