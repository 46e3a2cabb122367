"""Which weights get which rank: so that they have so many weights together, or as much as the accuracy budget buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._rank_options import Option
from onnxcomp_passes._search import last_that_holds
from onnxcomp_passes._thin import Thin

__all__ = ["LEAST_KEPT", "MARGIN", "Gain", "allocations", "measured_costs", "smallest", "within_budget"]

Array = np.ndarray[Any, Any]
Choice = dict[str, Option]
"""Unit -> what becomes of it; those that stay are left out."""

Gain = Callable[[str, Option], float]
Build = Callable[[Mapping[str, Thin]], Model]

PRICES = 512
"""Trades of error for gain that are looked at, from none to all."""

DEAREST = 1e4
"""How many times the trade is worse, at most, than the worst one that a unit's first step can be."""

MARGIN = 0.5
"""The share of the budget that is spent on the samples that choices are made on. What a factor cuts off is what these
hardly show, so that others lose more: with 0.9 an anomaly detector lost 2.8 points of AUC, with this 0.2."""

LEAST_KEPT = 0.75
"""The share of the energy of a layer's output that factors keep at the least where ranks are chosen: with less it is
another layer, whatever samples of one kind may tell."""

TINY = 1e-12


@dataclass(frozen=True)
class _Tries:
    """The options of one unit, the first of which is to leave it."""

    options: Sequence[Option | None]
    costs: Array
    gains: Array


def allocations(options: Mapping[str, Sequence[Option]], scale: Mapping[str, float], gain: Gain) -> list[Choice]:
    """Choices from little to much gain, each the best trade over all units at one price.

    Args:
        options: By unit.
        scale: What the whole loses, for the share of its output's energy that a unit misses; losses add up.
        gain: What an option saves; those that save nothing are not taken.
    """
    tries = {}
    for name, each in options.items():
        worth = [option for option in each if gain(name, option) > 0]
        costs = [0.0, *(max(scale[name] * option.missed, TINY) for option in worth)]
        tries[name] = _Tries(
            [None, *worth], np.array(costs), np.array([0.0, *(gain(name, option) for option in worth)])
        )
    rates = np.concatenate([each.costs[1:] / each.gains[1:] for each in tries.values()] or [np.zeros(0)])
    if not len(rates):
        return []
    path: list[Choice] = []
    most = min(max(map(_last_price, tries.values())) * 2, rates.max() * DEAREST)
    for price in np.geomspace(rates.min() / 2, most, PRICES):
        places = {name: int(np.argmin(each.costs - price * each.gains)) for name, each in tries.items()}
        chosen = {name: option for name, place in places.items() if (option := tries[name].options[place]) is not None}
        if chosen and (not path or chosen != path[-1]):
            path.append(chosen)
    return path


def _last_price(each: _Tries) -> float:
    """The price at which nothing gains more than what gains most."""
    place = int(np.argmax(each.gains))
    less = each.gains < each.gains[place]
    rates = (each.costs[place] - each.costs[less]) / (each.gains[place] - each.gains[less])
    return float(rates.max(initial=0.0))


def smallest(path: Sequence[Choice], saved: Gain, wanted: float, options: Mapping[str, Sequence[Option]]) -> Choice:
    """The first choice that saves enough, with what it saves too much given back where that helps most.

    Args:
        path: As `allocations` gives it.
        saved: What an option saves.
        wanted: What all are to save together; the last choice where none does.
        options: By unit.
    """
    totals = [sum(saved(*each) for each in choice.items()) for choice in path]
    place = next((index for index, total in enumerate(totals) if total >= wanted), len(path) - 1)
    if not path:
        return {}
    chosen = dict(path[place])
    spare = totals[place] - wanted
    while True:
        better: list[tuple[float, float, str, Option | None]] = []
        for name, now in chosen.items():
            for other in (*options[name], None):
                back = saved(name, now) - (saved(name, other) if other else 0.0)
                helps = now.missed - (other.missed if other else 0.0)
                if helps > 0 and 0 <= back <= spare:
                    better.append((helps, back, name, other))
        if not better:
            return chosen
        _, back, name, other = max(better, key=lambda item: item[0])
        spare -= back
        if other is None:
            del chosen[name]
        else:
            chosen[name] = other


def measured_costs(probes: Mapping[str, Option], build: Build, judge: Judge, context: Context) -> dict[str, float]:
    """The squared error of the whole model for the share of its output's energy that each unit misses.

    Args:
        probes: What is measured of each unit.
        build: The model with such factors; what is not named stays.
        judge: Measures.
        context: Its deadline ends it; units that were not measured are left out.
    """
    found = {}
    base = judge.rough_error(build({}))
    for name, option in probes.items():
        if context.out_of_time():
            break
        context.progress(f"measuring what {name} may lose")
        model = build({name: option.thin})
        error = judge.rough_error(model)
        judge.forget(model)
        square = error**2 - base**2 if np.isfinite(error) else 1e3
        found[name] = max(square, TINY) / max(option.missed, TINY)
    return found


def within_budget(path: Sequence[Choice], holds: Callable[[dict[str, Thin]], bool], context: Context) -> Choice:
    """The last of the choices that hold, by bisection; none where not even the first does."""

    def tried(choice: Choice) -> bool:
        return holds({name: option.thin for name, option in choice.items()})

    return last_that_holds(path, tried, context) or {}
