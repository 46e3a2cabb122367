"""Which rank each weight gets: asked for, by energy, to a ratio, or chosen by what the runtime is measured to gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Table
from onnxcomp_passes._conv_forms import useful_ranks
from onnxcomp_passes._layer_costs import LayerTimes, layer_macs, layer_sizes
from onnxcomp_passes._rank_choice import (
    LEAST_KEPT,
    MARGIN,
    Choice,
    Gain,
    allocations,
    measured_costs,
    smallest,
    within_budget,
)
from onnxcomp_passes._rank_options import Option, break_even, forms_of, options_of
from onnxcomp_passes._reduced_rank import Goal
from onnxcomp_passes._search import OUT_OF_TIME
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_fit import Found, Splitter
from onnxcomp_passes._thin_layers import Unit
from onnxcomp_passes._windows import Moments, affordable, gather_products

__all__ = ["Amount", "Ranker"]

Array = np.ndarray[Any, Any]

COLUMNS = (
    "layer",
    "shape",
    "form",
    "rank",
    "energy kept",
    "output error",
    "bytes",
    "before",
    "MACs",
    "before",
    "speed",
)

DEFAULT_ENERGY = 0.99
"""Where nothing was asked for and nothing can be measured."""

MULTIPLE, MULTIPLES = 4, {"Conv": 8}
"""What kernels like: blocked convolutions whole blocks; of matrix products the time is nearly linear in the rank."""

TIMED = (0.2, 0.6)
"""The shares of a unit's weights that stay when it is timed in factors."""

PROBE = 0.5
"""The share of a unit's weights that stay when what it may lose is measured."""

FASTER = 0.95
"""The part of a layer's time that its factors may take at most: less gain than that may be noise."""

WORTH = 1.1
"""How many times fewer multiply-accumulates two layers must have than one to be faster, where no clock is asked."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is asked for, and how; see the options of `low-rank`."""

    rank: int
    ratio: float
    energy: float
    ranks: Mapping[str, Thin]
    form: str
    multiple: int
    whiten: bool
    refit: bool


class Ranker:
    """Chooses ranks for the weights of one model.

    Args:
        model: It; its constants are lifted.
        units: What may be factored.
        amount: What is asked for.
        context: Its judge, data and runtime measure, where there are any.
        changes: Gets reasons and tables.

    Attributes:
        splitter: Finds the factors; its units are those of one input together where that loses less.
    """

    def __init__(self, model: Model, units: Sequence[Unit], amount: Amount, context: Context, changes: Changes) -> None:
        self._amount, self._context, self._changes = amount, context, changes
        self.splitter = Splitter(model, units, self._moments(model, units), context, amount.refit)
        self._units = [each for unit in units for each in self._together(unit)]
        self.splitter.units = self._units
        self._by_name = {unit.name: unit for unit in self._units}
        self._found: dict[str, list[Option]] | None = None
        self._held: tuple[dict[str, Thin], Model, dict[str, Found]] | None = None
        self._lines: dict[tuple[str, str], tuple[float, float, float]] = {}
        judge = context.judge
        shapes = {name: list(np.shape(value)) for name, value in judge.feed.items()} if judge else {}
        self._sizes = layer_sizes(model, self._units, shapes)
        self._times: LayerTimes | None = None
        if judge is not None and judge.timed and context.workdir is not None:
            self._times = LayerTimes(judge.runtime, context.workdir)

    def choose(self) -> dict[str, Thin]:
        """What becomes of units, by name."""
        amount, judge = self._amount, self._context.judge
        if amount.ranks:
            return self._smaller(self._of_ranks())
        if amount.rank:
            return self._smaller(self._of_rank())
        if amount.ratio:
            return _thins(self._of_ratio())
        if amount.energy or judge is None:
            return _thins(self._of_energy(amount.energy or DEFAULT_ENERGY))
        if judge.generated:
            self._changes.leave("the model", "how much may go is measured on data; give --data, or ratio=RATIO")
            return {}
        return _thins(self._within_budget(judge))

    def build(self, chosen: Mapping[str, Thin]) -> tuple[Model, dict[str, Found]]:
        """The model with what was chosen, as `Splitter.build` gives it: the one that was tried, where there is one."""
        if self._held is not None and self._held[0] == chosen:
            return self._held[1:]
        if self._context.out_of_time() and self._context.data is not None:
            self._changes.notes.append("the time limit was reached: later layers are fitted to few samples")
        return self.splitter.build(chosen)

    def tell(self, chosen: Mapping[str, Thin], found: Mapping[str, Found]) -> None:
        """Say what was done, layer by layer, and why the others were left."""
        table = Table("thin weights", COLUMNS, [])
        for unit in self._units:
            if unit.name not in chosen:
                continue
            thin, missed, sizes = chosen[unit.name], found[unit.name].missed, self._sizes.get(unit.name, [])
            after = thin.parameters(unit)
            self._changes.add(unit.name, f"rank {thin.text}, {after:,} weights in place of {unit.elements:,}")
            macs = [layer_macs(unit, sizes, each) if sizes else None for each in (thin, unit.present)]
            row = (unit.name, "x".join(map(str, unit.sizes[1:])), thin.form, thin.text, round(1 - missed, 4))
            speed = round(self._speed(self._times, unit, thin), 2) if self._times and sizes else None
            width = np.dtype(unit.parts[0].view.holder.dtype).itemsize
            table.rows.append((*row, round(math.sqrt(missed), 4), after * width, unit.elements * width, *macs, speed))
        self._changes.tables.append(table)

    def _speed(self, times: LayerTimes, unit: Unit, thin: Thin) -> float:
        """How many times as fast as it is now a unit is with factors."""
        now, then = (
            times.measure(unit, self._sizes[unit.name], each)[1] if each else 1.0 for each in (unit.present, thin)
        )
        return now / then

    # --- asked for ------------------------------------------------------------------------------------------------

    def _of_ranks(self) -> dict[str, Thin]:
        """What was asked for by name, where there is such a weight, and the form suits it."""
        found = {}
        for name, thin in self._amount.ranks.items():
            unit = self._by_name.get(name)
            if unit is None:
                self._changes.leave(name, "there is no such weight to factor")
            elif thin.form not in forms_of(unit, thin.form):
                self._changes.leave(name, f"a {unit.node.op} of its shape does not have the form {thin.form}")
            else:
                found[name] = thin
        return found

    def _of_rank(self) -> dict[str, Thin]:
        """One rank for all, cut to what is of use in each."""
        found = {}
        for unit in self._units:
            forms = forms_of(unit, self._amount.form)
            if not forms:
                self._changes.leave(unit.name, self._no_form())
                continue
            ranks = (self._amount.rank,) * (2 if forms[0] == "tucker" else 1)
            if unit.node.op == "Conv":
                part = unit.parts[0]
                ranks = useful_ranks(forms[0], part.view.shape, part.sizes[0], ranks)
            found[unit.name] = Thin(forms[0], ranks)
        return found

    def _smaller(self, asked: Mapping[str, Thin]) -> dict[str, Thin]:
        """Those that have fewer weights than they have now."""
        named = {unit.name: unit for unit in self._units}
        found = {name: thin for name, thin in asked.items() if thin.parameters(named[name]) < named[name].elements}
        for name in asked.keys() - found.keys():
            even = f": two matrices pay below rank {break_even(named[name]):.0f}" if asked[name].form == "svd" else ""
            self._changes.leave(name, f"rank {asked[name].text} has no fewer weights{even}")
        return found

    def _of_energy(self, energy: float) -> Choice:
        found = {}
        for name, options in self._options().items():
            enough = [each for each in options if 1 - each.missed >= energy]
            if enough:
                found[name] = min(enough, key=lambda each: each.parameters)
            else:
                self._changes.leave(name, f"no fewer weights keep {energy:.2%} of the energy of its output")
        return found

    def _of_ratio(self) -> Choice:
        """The ranks that miss least of the layers' outputs, in all, with so many weights in the whole model."""
        elements = {unit.name: unit.elements for unit in self._units}
        whole = sum(math.prod(tensor.shape) for tensor in self.splitter.base.constants() if _is_weight(tensor))
        now = whole - sum(math.prod(unit.sizes) - unit.elements for unit in self._units)
        wanted = now - whole / self._amount.ratio
        if wanted <= 0:
            self._changes.leave("the model", f"has {whole / now:.2f} times fewer weights already")
            return {}
        options = self._options()

        def saved(name: str, each: Option) -> float:
            return elements[name] - each.parameters

        path = allocations(options, dict.fromkeys(options, 1.0), saved)
        found = smallest(path, saved, wanted, options)
        reached = whole / (now - sum(saved(*each) for each in found.items()))
        self._changes.notes.append(f"{reached:.2f} times fewer weights in the whole model")
        return found

    # --- chosen ---------------------------------------------------------------------------------------------------

    def _within_budget(self, judge: Judge) -> Choice:
        """What the budget buys most time and bytes with."""
        gain = self._gains(judge)
        options = {}
        for name, each in self._options().items():
            near = [option for option in each if 1 - option.missed >= LEAST_KEPT]
            worth = [option for option in near if gain(name, option) > 0]
            if worth:
                options[name] = worth
            else:
                self._changes.leave(name, self._why_not(name, near))

        def build(asked: Mapping[str, Thin]) -> Model:
            return self.splitter.build(asked)[0]

        probes = {name: self._nearest(name, each, PROBE) for name, each in options.items()}
        scale = measured_costs(probes, build, judge, self._context)
        path = allocations({name: options[name] for name in scale}, scale, gain)
        found = within_budget(path, lambda asked: self._try(asked, judge), self._context)
        why = OUT_OF_TIME if self._context.out_of_time() else "no rank pays within the budget"
        for name in options.keys() - found.keys():
            self._changes.leave(name, why)
        if self._context.out_of_time():  # what holds could not be fitted anew without some of its layers
            return found
        return {name: each for name, each in found.items() if self._is_faster(self._by_name[name], each.thin)}

    def _try(self, asked: dict[str, Thin], judge: Judge) -> bool:
        """Whether a choice holds; if so it is remembered."""
        model, found = self.splitter.build(asked)
        holds = judge.allows(judge.quality(model), MARGIN * self._context.share)
        judge.forget(model)
        if holds:
            self._held = asked, model, found
        return holds

    def _gains(self, judge: Judge) -> Gain:
        """The part of the model's time and bytes that an option saves; 0 where it is not faster."""
        total_bytes = self.splitter.base.size_bytes
        total_ms = judge.time([judge.path_of(self.splitter.base)])[0].median_ms if self._times else 0.0
        total_macs = max(1, sum(judge.layer_macs(self.splitter.base).values()))

        def gain(name: str, each: Option) -> float:
            unit = self._by_name[name]
            saved_bytes = (unit.elements - each.parameters) * unit.parts[0].view.holder.dtype.itemsize / total_bytes
            if self._times and name in self._sizes:
                whole, thin = self._milliseconds(unit, each)
                saved_time = (FASTER * whole - thin) / total_ms
            else:
                saved_time = (layer_macs(unit, self._sizes.get(name, [])) - WORTH * each.macs) / total_macs
            is_table = unit.node.op == "Gather"  # reading rows takes no time that could be saved
            return saved_bytes + saved_time if is_table or saved_time > 0 else 0.0

        return gain

    def _milliseconds(self, unit: Unit, each: Option) -> tuple[float, float]:
        """Of a unit as it is, and in factors: linear in their size, between two that are timed."""
        assert self._times is not None
        key = unit.name, each.thin.form
        if key not in self._lines:
            alike = [other for other in self._options()[unit.name] if other.thin.form == each.thin.form]
            ends = [self._nearest(unit.name, alike, end) for end in TIMED]
            self._context.progress(f"timing {unit.name} in factors")
            timed = [self._times.measure(unit, self._sizes[unit.name], end.thin) for end in ends]
            (whole, low), (_, high) = timed
            slope = (high - low) / max(1, ends[1].parameters - ends[0].parameters)
            self._lines[key] = whole, low - slope * ends[0].parameters, slope
        whole, start, slope = self._lines[key]
        return whole, whole * max(0.0, start + slope * each.parameters)

    def _is_faster(self, unit: Unit, thin: Thin) -> bool:
        """Whether factors that were chosen by estimates are measured to gain, else why not; of a table bytes are."""
        if not self._times or unit.name not in self._sizes or unit.node.op == "Gather":
            return True
        share = self._times.measure(unit, self._sizes[unit.name], thin)[1]
        if share > FASTER:
            self._changes.leave(unit.name, f"its factors ({thin}) run {1 / share:.2f} times as fast: too little")
        return share <= FASTER

    def _why_not(self, name: str, options: Sequence[Option]) -> str:
        if not options:
            return f"no fewer weights keep {LEAST_KEPT:.0%} of the energy of its output"
        if not self._times or name not in self._sizes:
            return "its factors take no less time"
        speeds = {}
        for each in options:
            whole, thin = self._milliseconds(self._by_name[name], each)
            speeds[whole / max(thin, 1e-9)] = each.thin
        best = max(speeds)
        return f"ONNX Runtime does not run factors faster: {best:.2f} times as fast with {speeds[best]}"

    # --- looking --------------------------------------------------------------------------------------------------

    def _moments(self, model: Model, units: Sequence[Unit]) -> dict[str, Moments]:
        """What layers are multiplied with, as far as memory allows."""
        context = self._context
        if not self._amount.whiten or context.data is None or context.runtime is None or context.workdir is None:
            return {}
        views = [part.view for unit in units for part in unit.parts]
        return gather_products(model, affordable(views), context)

    def _together(self, unit: Unit) -> list[Unit]:
        """The unit, or its parts each by itself: whichever misses less at half of the weights."""
        if len(unit.parts) == 1 or unit.present:
            return [unit]
        apart = [Unit((part,)) for part in unit.parts]
        if self._amount.ranks:
            return [unit] if unit.name in self._amount.ranks else apart
        one = _missed_at_half([unit], [self.splitter.goal(unit)])
        several = _missed_at_half(apart, [self.splitter.goal(each) for each in apart])
        return [unit] if one <= several else apart

    def _options(self) -> dict[str, list[Option]]:
        """All options of all units; reasons for units without any are given."""
        if self._found is None:
            self._found = {}
            for unit in self._units:
                self._context.progress(f"finding the ranks of {unit.name}")
                forms = forms_of(unit, self._amount.form)
                sizes = self._sizes.get(unit.name, [])
                multiple = self._amount.multiple or MULTIPLES.get(unit.node.op, MULTIPLE)
                goal, solved = self.splitter.goal(unit), self.splitter.solved
                found = options_of(unit, goal, sizes, forms, multiple, solved)
                if found:
                    self._found[unit.name] = found
                else:
                    self._changes.leave(unit.name, "no rank has fewer weights" if forms else self._no_form())
        return self._found

    def _no_form(self) -> str:
        form = self._amount.form
        return f"does not have the form {form}" if form != "auto" else "has no form with fewer weights"

    def _nearest(self, name: str, options: Sequence[Option], share: float) -> Option:
        """The option that leaves nearest to this share of the weights."""
        elements = self._by_name[name].elements
        return min(options, key=lambda option: abs(option.parameters / elements - share))


def _thins(choice: Choice) -> dict[str, Thin]:
    return {name: option.thin for name, option in choice.items()}


def _is_weight(tensor: gs.Constant) -> bool:
    return len(tensor.shape) > 1 and np.issubdtype(np.dtype(tensor.dtype), np.floating)


def _missed_at_half(units: Sequence[Unit], goals: Sequence[Goal]) -> float:
    """The energy that is missed where the best ranks leave half of all weights."""
    energies, costs = [], []
    for unit, goal in zip(units, goals, strict=True):
        each = goal.energies().sum(axis=0)
        energies.append(each)
        costs.append(np.full(len(each), sum(unit.sizes[1:])))
    order = np.argsort(-np.concatenate(energies) / np.concatenate(costs))
    spent = np.cumsum(np.concatenate(costs)[order])
    left = np.concatenate(energies)[order][spent > sum(unit.elements for unit in units) / 2]
    return float(left.sum())
