"""Replace large weights by products of thin ones."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar, Self

from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.packed import find_packed
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.weights import Spool
from onnxcomp_passes._factor_chains import Merged, merge_factors
from onnxcomp_passes._rank_options import FORM_CHOICES
from onnxcomp_passes._ranks import Amount, Ranker
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._thin import Thin
from onnxcomp_passes._thin_layers import Unit, find_units
from onnxcomp_passes._views import WeightView

__all__ = ["LowRank"]


@register
@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Replace large weights by products of thin ones.

    ::

        before   Y = MatMul(X, W)              W: (k, n)
        after    Y = MatMul(MatMul(X, A), B)   A: (k, r), B: (r, n), r * (k + n) < k * n

    Gemm, Conv and tables of embeddings likewise; projections of one input, such as Q, K and V, have A in common where
    that loses less. With data, the factors are those that give the layer's output best from the inputs that it gets,
    and the means that they miss go into the bias. Without an amount, ranks are chosen within the accuracy budget where
    they save most time and bytes.

    Factors that are there already are split anew, as the weight that they make, where `rank`, `ratio` or `ranks` asks
    for fewer weights than they have; so ranks can fall in steps, with training between them.

    Left alone: weights whose factors would be no smaller, or, where ranks are chosen, that ONNX Runtime does not run
    faster for them (tables: that save no bytes); weights that are held as integers or are read in several ways;
    factors, where nothing is asked for or an energy is; weights in subgraphs, and packed ones.
    """

    name: ClassVar[str] = "low-rank"

    rank: int = option(0, "The rank of every weight.", minimum=0)
    ratio: float = option(
        0.0,
        "Weights before over weights after, of the whole model; before: factors count as the weight that they make, so"
        " that 1.5 and then 2 is 2 in all.",
        minimum=0,
    )
    energy: float = option(
        0.0,
        "The share of each layer's output energy that its rank keeps; what factors have lost is not known, they stay.",
        minimum=0,
        maximum=1,
    )
    ranks: tuple[str, ...] = option((), "Ranks by weight, as NAME=FORM:RANK (tucker: RANKxRANK); others stay.")
    conv: str = option(
        "auto",
        "What a Conv becomes: k x k and 1 x 1 (svd); 1 x 1, k x k, 1 x 1 (tucker); k x 1, 1 x k (spatial); 1 x 1, two"
        " depthwise, 1 x 1 (cp); auto: svd, spatial or cp.",
        choices=FORM_CHOICES,
    )
    whiten: bool = option(True, "Keep what matters for the inputs that layers get; needs data. Else plain SVD.")
    refit: bool = option(True, "Fit factors and biases to the inputs that the factored layers before give; needs data.")
    tables: bool = option(True, "Factor tables of embeddings too.")
    round_to: int = option(
        0, "Ranks are a multiple of this, which kernels like; 0: of 8 for a Conv, of 4 for others.", minimum=0
    )
    include: tuple[str, ...] = option((), "Only weights that fit a pattern, by their name or their node's; none: all.")
    min_elements: int = option(1024, "Weights with fewer elements stay as they are.", minimum=1)
    skip: tuple[str, ...] = option((), "Names of weights that stay as they are.")

    def __post_init__(self) -> None:
        """See the base class; an amount is asked for in one way.

        Raises:
            OptionError: An option has the wrong type or is out of range, two contradict each other, or a form needs an
                extra that is not installed.
        """
        super().__post_init__()
        asked = [name for name in ("rank", "ratio", "energy", "ranks") if getattr(self, name)]
        if len(asked) > 1:
            message = f"{self.name}: {' and '.join(asked)} both say how much; give one"
            raise OptionError(message)
        if self.ratio and self.ratio <= 1:
            message = f"{self.name}: ratio is weights before over after and must be above 1, got {self.ratio:g}"
            raise OptionError(message)
        asked_forms = {self.conv, *(thin.form for thin in _parsed(self.ranks).values())}
        if "tucker" in asked_forms and find_spec("tensorly") is None:
            message = f"{self.name}: the form tucker needs TensorLy: pip install 'onnxcomp[low-rank]'"
            raise OptionError(message)

    def weaker(self) -> Iterator[Self]:
        """Two thirds of what is saved, then a third."""
        for part in (2 / 3, 1 / 3):
            if self.ratio:
                yield replace(self, ratio=1 / (1 - part * (1 - 1 / self.ratio)))
            if self.energy:
                yield replace(self, energy=1 - part * (1 - self.energy))

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        if find_packed(model):
            changes.leave("the model", "is packed: unpack it first (onnxcomp optimize --unpack)")
            return changes
        candidate, units = self._opened(model, context, changes)
        if not units:
            return changes
        ranker = Ranker(candidate, units, self._amount(), context, changes)
        chosen = ranker.choose()
        if not chosen:
            return changes
        stay = {unit.name for unit in units if unit.present and unit.name not in chosen}
        if stay:
            anew = {part.view.name for unit in units if unit.name in chosen for part in unit.parts if part.merged}
            ranker.splitter.move(self._merged(model, context, anew)[0], stay)
        fork, found = ranker.build(chosen)
        ranker.splitter.split(fork, found)
        ranker.tell(chosen, found)
        told = [f"{name}={thin}" for name, thin in chosen.items()]
        changes.resolved = {"rank": 0, "ratio": 0.0, "energy": 0.0, "ranks": told}
        model.become(fork)
        return changes

    def _opened(self, model: Model, context: Context, changes: Changes) -> tuple[Model, list[Unit]]:
        """A copy to work on, in which factors that may be split anew are one weight again; and what may be factored."""
        only: set[str] | None = None if self.rank or self.ratio or self.ranks else set()
        while True:
            said = Changes()
            candidate, merged, reasons = self._merged(model, context, only)
            units = find_units(
                candidate, context, said, self._is_wanted, least=self.min_elements, merged=merged, reasons=reasons
            )
            held = {part.view.name for unit in units for part in unit.parts if part.merged}
            if held == merged.keys():
                changes.left += said.left
                return candidate, units
            only = held  # the others stay as they are

    @staticmethod
    def _merged(
        model: Model, context: Context, only: Collection[str] | None
    ) -> tuple[Model, dict[str, Merged], dict[str, str]]:
        candidate = model.fork()
        lift_constants(candidate.graph)
        return candidate, *merge_factors(candidate, context, Spool(), only)

    def _is_wanted(self, view: WeightView) -> bool:
        names = view.name, str(view.node.name)
        named = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.include or ("*",))
        return named and view.name not in self.skip and (self.tables or view.node.op != "Gather")

    def _amount(self) -> Amount:
        return Amount(
            rank=self.rank,
            ratio=self.ratio,
            energy=self.energy,
            ranks=_parsed(self.ranks),
            form=self.conv,
            multiple=self.round_to,
            whiten=self.whiten,
            refit=self.refit,
        )


def _parsed(ranks: Sequence[str]) -> dict[str, Thin]:
    found = {}
    for text in ranks:
        name, _, thin = text.rpartition("=")
        parsed = Thin.parse(thin)
        if not name or parsed is None:
            message = f"low-rank: ranks must be NAME=FORM:RANK, such as W=svd:32 or W=tucker:16x24, got {text!r}"
            raise OptionError(message)
        found[name] = parsed
    return found
