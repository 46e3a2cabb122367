"""The ranks that a weight may get, and what each of them saves and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp_passes._conv_factors import FORMS, has_form, ranks_for
from onnxcomp_passes._layer_costs import Sizes, layer_macs
from onnxcomp_passes._reduced_rank import Goal
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_fit import Solved, fitted
from onnxcomp_passes._thin_layers import Unit

__all__ = ["FORM_CHOICES", "Option", "break_even", "forms_of", "options_of", "rounded"]

Array = np.ndarray[Any, Any]

APART = 1.05
"""Of the ranks of one weight that are looked at, each is at least so many times the one before."""

FORM_CHOICES = ("auto", *FORMS)

AUTO: tuple[str, ...] = ("svd", "spatial", "cp")
"""At one number of weights all forms take about equally long. On 21 Convs of two trained networks CP missed least, 0.13
to 0.55 of what the spatial form did; Tucker-2 was never the best. A 1 x 1 Conv has the first alone."""

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
"""Of the weights that stay, where each rank has to be solved for."""

CP_SHARES = (0.1, 0.2, 0.35, 0.55)
"""Fewer: each takes seconds for a large Conv."""


@dataclass(frozen=True)
class Option:
    """One thing that may become of a unit.

    Attributes:
        thin: It.
        parameters: How many numbers the factors have.
        macs: Multiply-accumulates; 0 where sizes are not known.
        missed: The share of the output's energy that is lost.
    """

    thin: Thin
    parameters: int
    macs: int
    missed: float


def rounded(rank: float, multiple: int) -> int:
    """A rank that kernels like, not above another; small ones are only made whole.

    Example:
        >>> rounded(30.5, 8), rounded(11.0, 8), rounded(0.5, 8)
        (24, 11, 1)
    """
    whole = max(1, int(rank))
    return whole - whole % multiple if whole >= 1.5 * multiple else whole


def break_even(unit: Unit) -> float:
    """The rank at which two matrices have as many weights as there are now."""
    groups, inputs, outputs = unit.sizes
    return unit.elements / (groups * (inputs + outputs))


def forms_of(unit: Unit, form: str) -> list[str]:
    """The forms that a unit may take: of a Conv the one asked for, or with "auto" each of `AUTO`."""
    if unit.node.op != "Conv":
        return ["svd"]
    part = unit.parts[0]
    wanted = AUTO if form == "auto" else (form,)
    return [each for each in wanted if has_form(each, part.view.shape, part.sizes[0])]


def options_of(
    unit: Unit, goal: Goal, sizes: Sequence[Sizes], forms: Sequence[str], multiple: int, solved: Solved
) -> list[Option]:
    """All options of a unit that have fewer weights, and multiply-accumulates where there are any, than it has now.

    Args:
        unit: The unit.
        goal: What its factors come close to.
        sizes: Of its nodes; may be empty.
        forms: As `forms_of` gives them.
        multiple: Of which ranks are.
        solved: Factors that are known; more are added.
    """
    found: list[Option] = []
    now = layer_macs(unit, sizes, unit.present)
    for form in forms:
        tries = _svd(unit, goal, multiple) if form == "svd" else _solved(unit, goal, form, multiple, solved)
        for thin, missed in tries:
            macs = layer_macs(unit, sizes, thin)
            if thin.parameters(unit) < unit.elements and (macs < now or not now):
                found.append(Option(thin, thin.parameters(unit), macs, missed))
    return found


def _svd(unit: Unit, goal: Goal, multiple: int) -> list[tuple[Thin, float]]:
    """From the singular values, which tell what every rank misses."""
    energies = goal.energies().sum(axis=0)
    missed = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]]) / max(goal.energy, 1e-300)
    most = min(int(np.ceil(break_even(unit))) - 1, len(energies))
    ranks: list[int] = []
    for rank in sorted({rounded(rank, multiple) for rank in range(1, most + 1)}, reverse=True):
        if not ranks or rank * APART <= ranks[-1]:
            ranks.append(rank)
    return [(Thin("svd", (rank,)), float(missed[rank])) for rank in reversed(ranks)]


def _solved(unit: Unit, goal: Goal, form: str, multiple: int, solved: Solved) -> list[tuple[Thin, float]]:
    """By factoring at some ranks."""
    part, found = unit.parts[0], {}
    for share in CP_SHARES if form == "cp" else SHARES:
        ranks = ranks_for(form, part.view.shape, part.sizes[0], round(share * unit.elements), multiple)
        if ranks is not None and Thin(form, ranks) not in found:
            thin = Thin(form, ranks)
            found[thin] = fitted(unit, thin, goal, solved).missed
    return list(found.items())
