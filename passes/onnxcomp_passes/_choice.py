"""Which layers run in int8: chosen by what the whole model is measured to gain and to lose."""

from __future__ import annotations

from collections.abc import Callable

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.quality import Quality
from onnxcomp.runtime import KernelReport, explain

__all__ = ["Chooser", "fewest"]

Layers = frozenset[int]

REPAIRS = 3
"""Rounds of taking out layers whose int8 kernel did not materialise: each changes what is around the others."""

FASTER = 1.01
"""A set of layers is preferred to another when the whole model is at least this much better with it."""

MIN_GAIN_MS = 1e-4
"""Stands in for layers whose time is too short to be seen."""


class Chooser:
    """Chooses the layers that run in int8.

    Args:
        build: Makes the model with a set of layers in int8.
        base: The model without int8.
        names: The layers' names.
        context: Its judge measures.
        changes: Told why layers are returned to float.
    """

    def __init__(
        self, build: Callable[[Layers], Model], base: Model, names: list[str], context: Context, changes: Changes
    ) -> None:
        assert context.judge is not None
        self._build = build
        self._base = base
        self._names = names
        self._context = context
        self._judge: Judge = context.judge
        self._changes = changes
        self._why: dict[int, str] = {}
        self._qualities: dict[Layers, Quality] = {}

    def choose(self, layers: Layers) -> Layers:
        """The best set found among subsets of `layers`; empty if int8 is not worth it anywhere."""
        chosen = self._fused(layers)
        if chosen and not self._holds(chosen):
            chosen = self._within_budget(chosen)
        if chosen:
            chosen = self._without_slow(chosen)
        for index in sorted(layers - chosen):
            self._changes.leave(self._names[index], self._why.get(index, "int8 does not pay"))
        return chosen

    # --- kernels ----------------------------------------------------------------------------------------------------

    def _report(self, layers: Layers) -> KernelReport:
        model = self._build(layers)
        census = self._judge.runtime.census(self._judge.path_of(model))
        return explain(model.proto(), census)

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

    def _holds(self, layers: Layers) -> bool:
        return self._judge.allows(self._quality(layers))

    def _within_budget(self, layers: Layers) -> Layers:
        """Return layers to float, those with most output error per millisecond gained first, until the budget holds."""
        self._context.progress(f"ranking {len(layers)} layers by error and time")
        times = self._times(self._base)
        cost: dict[int, float] = {}
        for index in sorted(layers):
            if self._context.out_of_time():
                break
            error = self._quality(frozenset({index})).error
            cost[index] = error**2 / max(times.get(self._names[index], 0.0), MIN_GAIN_MS)
        order = sorted(layers, key=lambda i: cost.get(i, float("inf")), reverse=True)

        def holds(count: int) -> bool:
            self._context.progress(f"trying {len(order) - count} of {len(order)} layers in int8")
            return self._holds(frozenset(order[count:]))

        count = fewest(len(order), holds, self._context)
        for index in order[:count]:
            alone = self._quality(frozenset({index})).error
            self._why[index] = f"costs too much accuracy (alone: relative error {alone:.2%})"
        return frozenset(order[count:])

    # --- speed ------------------------------------------------------------------------------------------------------

    def _times(self, model: Model) -> dict[str, float]:
        """Milliseconds a layer, by layer name, as ONNX Runtime's profiler tells."""
        known = set(self._names)
        times: dict[str, float] = {}
        for kernel, ms in self._judge.runtime.profile(self._judge.path_of(model), self._judge.feed).items():
            name = _layer_of(kernel, known)
            if name is not None:
                times[name] = times.get(name, 0.0) + ms
        return times

    def _without_slow(self, chosen: Layers) -> Layers:
        """Return the layers to float that are slower in int8, if the whole model is better for it."""
        if not self._judge.target.is_host:
            return chosen
        self._context.progress("looking for layers that are slower in int8")
        full = self._build(chosen)
        before, after = self._times(self._base), self._times(full)
        slow = frozenset(
            index
            for index in chosen
            if after.get(self._names[index], 0.0) > before.get(self._names[index], float("inf"))
        )
        rest = self._fused(chosen - slow) if slow else chosen
        if not slow or not rest or not self._holds(rest):
            return chosen
        fewer = self._build(rest)
        paths = [self._judge.path_of(full), self._judge.path_of(fewer)]
        old, new = self._judge.time(paths)
        if (old.median_ms / new.median_ms) * (full.size_bytes / fewer.size_bytes) < FASTER:
            return chosen
        for index in chosen - rest:
            self._why.setdefault(index, "is slower in int8 on this machine")
        return rest


def fewest(most: int, holds: Callable[[int], bool], context: Context) -> int:
    """The smallest count from 1 to `most` with which something holds, by bisection; with `most` it does.

    When the time is over, the smallest count that was seen to hold.
    """
    low, high = 0, most
    while high - low > 1 and not context.out_of_time():
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _layer_of(kernel: str, known: set[str]) -> str | None:
    """The layer that a kernel of the optimized graph was made from: fusion appends to its name."""
    name = kernel
    while name not in known:
        shorter = name.rpartition("_token_")[0] or name.removesuffix("_nchwc").removesuffix("/MatMulAddFusion")
        shorter = shorter.removeprefix("fused ")
        if shorter == name:
            return None
        name = shorter
    return name
