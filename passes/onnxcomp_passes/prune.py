"""Set the weights to zero that matter least."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.model import Model
from onnxcomp.packed import find_packed
from onnxcomp.passes import Changes, Context, Pass, Table, option, register
from onnxcomp_passes._pruner import CLOSE, Amount, Pruner
from onnxcomp_passes._pruning import Pattern, as_matrices, ends, lamp_curve, shares
from onnxcomp_passes._sparsity import choose_shares
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._views import WeightView, find_views, wanted_views
from onnxcomp_passes._windows import Moments, affordable, gather_products

__all__ = ["Prune"]

Array = np.ndarray[Any, Any]

ENDS_SHARE = 0.05
"""First and last layer stay where they hold no more of all weights than this: they are the most sensitive (Han et al.
2015, section 3.4), and so few zeros would save next to nothing."""

DEFAULT_SPARSITY = 0.5
"""Where nothing was asked for and nothing can be measured."""

TRIAL_PASSES = 4
"""Passes over the data for a model that is only tried: what is chosen then gets all of them, and is better."""


@register
@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Set the weights to zero that matter least.

    ::

        before   Y = MatMul(X, W)
        after    Y = MatMul(X, W')      W': zeros in place of the least of W, in the form that W is held in

    ONNX Runtime has no sparse kernels: zeros make a model neither smaller nor faster until `pack` stores them. Where
    there are calibration data, the weights that stay are changed to make up for those that go. Without an amount, the
    share of zeros of each weight is chosen within the accuracy budget.

    Left alone: weights that are not float32, float16, or integers decoded to floats; those with NaN or infinity, or
    whose codes have none for 0; first and last layer where they are small; weights in subgraphs, and packed ones.
    """

    name: ClassVar[str] = "prune"
    pays_with: ClassVar[str] = "pack"

    criterion: str = option(
        "auto",
        "What matters least: the smallest magnitude; times the norm of its input (wanda); the least change of the"
        " output once the others make up for it (obs); auto: obs where there are data, else magnitude.",
        choices=("auto", "magnitude", "wanda", "obs"),
    )
    sparsity: float = option(0.0, "The share of zeros; 0: chosen within the budget.", minimum=0, maximum=1)
    scope: str = option(
        "global",
        "Whether that is the share of all weights together, or of each weight.",
        choices=("global", "layer"),
    )
    ratios: tuple[str, ...] = option((), "Shares of zeros by weight, as NAME=SHARE; the other weights stay.")
    threshold: float = option(0.0, "Weights of a smaller magnitude than this go.", minimum=0)
    deviations: float = option(0.0, "Weights go that are smaller than so many standard deviations.", minimum=0)
    pattern: str = option("", "N:M, as 2:4: of each M weights along the inputs N stay.")
    operators: tuple[str, ...] = option((), "Only weights of these operators, such as MatMul; none named: all.")
    include: tuple[str, ...] = option((), "Only weights whose name fits one of these patterns; none: all.")
    keep_ends: str = option(
        "auto",
        "Leave the first and the last layer; auto: where they hold little of all weights.",
        choices=("auto", "true", "false"),
    )
    min_elements: int = option(128, "Weights with fewer elements stay as they are.", minimum=1)
    skip: tuple[str, ...] = option((), "Names of weights that stay as they are.")

    def __post_init__(self) -> None:
        """See the base class; an amount is asked for in one way, and magnitudes have no other criterion.

        Raises:
            OptionError: An option has the wrong type or is out of range, or two contradict each other.
        """
        super().__post_init__()
        asked = [name for name in ("sparsity", "ratios", "threshold", "deviations", "pattern") if getattr(self, name)]
        if len(asked) > 1:
            message = f"{self.name}: {' and '.join(asked)} both say how much; give one"
            raise OptionError(message)
        if self.pattern and Pattern.parse(self.pattern) is None:
            message = f"{self.name}: pattern must be N:M with 0 < N < M, such as 2:4, got {self.pattern!r}"
            raise OptionError(message)
        if (self.threshold or self.deviations) and self.criterion not in {"auto", "magnitude"}:
            message = f"{self.name}: {asked[0]} is about magnitudes; leave out criterion={self.criterion}"
            raise OptionError(message)
        _parsed(self.ratios)
        if self.criterion in {"wanda", "obs"}:
            object.__setattr__(self, "requires", frozenset({"data"}))

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class.

        Raises:
            RequirementError: The criterion needs data that are not there.
        """
        changes = Changes()
        if find_packed(model):  # what was lossy came before: the budget is not spent a second time
            changes.leave("the model", "is packed: unpack it first (onnxcomp optimize --unpack)")
            return changes
        if self.criterion in {"wanda", "obs"} and (context.data is None or context.runtime is None):
            message = (
                f"{self.name}: the criterion {self.criterion} needs data, and ONNX Runtime to run them; give --data"
            )
            raise RequirementError(message)
        base = model.fork()
        lift_constants(base.graph)
        views = self._prunable(base, context, changes)
        if not views:
            return changes
        products = self._products(base, views, context, changes)
        pruner = Pruner(base, products, context, compensate=self.criterion != "wanda")
        amounts = self._amounts(pruner, views, context, changes)
        candidate = pruner.final(amounts)
        did, of = pruner.passes
        if did < of:
            changes.notes.append(f"the time limit was reached after {did + 1} of {of + 1} passes over the data")
        done = [view for view in find_views(candidate) if view.name in pruner.criteria]
        for view in done:
            zeros, elements = int(np.count_nonzero(view.read() == 0)), int(np.prod(view.shape))
            what = f"{zeros:,} of {elements:,} weights are zero ({zeros / elements:.1%})"
            changes.add(view.label, f"{what}, by {pruner.criteria[view.name]}")
        if done:
            changes.tables.append(_table(candidate, {view.name for view in views}))
            model.become(candidate)
        return changes

    # --- which weights --------------------------------------------------------------------------------------------

    def _prunable(self, model: Model, context: Context, changes: Changes) -> list[WeightView]:
        found = []
        views = wanted_views(model, context, changes, skip=self.skip, min_elements=self.min_elements)
        views = [view for view in views if self._is_named(view)]
        kept = self._kept_ends(views)
        for view in views:
            value, grid = view.read(), view.grid()
            if view.name in kept:
                changes.leave(view.label, "is the first or the last layer; keep_ends=false prunes it too")
            elif not np.isfinite([np.min(value, initial=0.0), np.max(value, initial=0.0)]).all():
                changes.leave(view.label, "holds NaN or infinity")
            elif grid is not None and grid.zero_code is None:
                changes.leave(view.label, "its codes have none for 0")
            else:
                found.append(view)
        return found

    def _is_named(self, view: WeightView) -> bool:
        named = not self.include or any(fnmatch.fnmatchcase(view.name, pattern) for pattern in self.include)
        return named and (not self.operators or view.node.op in self.operators)

    def _kept_ends(self, views: Sequence[WeightView]) -> set[str]:
        if self.keep_ends == "false" or self.ratios:
            return set()
        found = ends(views)
        elements = {view.name: int(np.prod(view.shape)) for view in views}
        few = sum(elements[name] for name in found) <= ENDS_SHARE * sum(elements.values())
        return found if self.keep_ends == "true" or few else set()

    # --- how much -------------------------------------------------------------------------------------------------

    def _products(
        self, model: Model, views: Sequence[WeightView], context: Context, changes: Changes
    ) -> dict[str, Moments]:
        """What the layers are multiplied with, as far as the criterion asks and memory allows."""
        if self.criterion == "magnitude" or self.threshold or self.deviations:
            return {}
        if context.data is None or context.runtime is None or context.workdir is None:
            return {}
        if context.out_of_time():
            changes.notes.append("the time limit was reached: weights are pruned by magnitude")
            return {}
        found = gather_products(model, affordable(views), context)
        others = len(views) - len(found)
        if others:
            changes.notes.append(f"{others} of {len(views)} weights are pruned by magnitude: their inputs are not seen")
        return found

    def _amounts(
        self, pruner: Pruner, views: Sequence[WeightView], context: Context, changes: Changes
    ) -> dict[str, Amount]:
        names = [view.name for view in views]
        pattern = Pattern.parse(self.pattern)
        if pattern is not None:
            return dict.fromkeys(names, Amount(pattern=pattern))
        if self.ratios:
            asked = _parsed(self.ratios)
            return {name: Amount(share=asked[name]) for name in names if name in asked}
        if self.threshold:
            return dict.fromkeys(names, Amount(threshold=self.threshold))
        if self.deviations:
            return dict.fromkeys(names, Amount(deviations=self.deviations))
        if not self.sparsity and context.judge is not None:
            return self._chosen(pruner, views, context, changes)
        sparsity = self.sparsity or DEFAULT_SPARSITY
        if self.scope == "layer":
            return dict.fromkeys(names, Amount(share=sparsity))
        zeros = sum(int(np.count_nonzero(view.read() == 0)) for view in views)
        if zeros >= (sparsity - CLOSE) * sum(int(np.prod(view.shape)) for view in views):
            return {}
        curves = {view.name: lamp_curve(pruner.scores(view, as_matrices(view, view.read()))) for view in views}
        return {name: Amount(share=share) for name, share in shares(curves, sparsity).items()}

    def _chosen(
        self, pruner: Pruner, views: Sequence[WeightView], context: Context, changes: Changes
    ) -> dict[str, Amount]:
        """Shares of zeros within the budget; made-up inputs are too rough a judge of them."""
        assert context.judge is not None
        if context.judge.generated:
            changes.leave("the model", "how much may go is measured on data; give --data, or sparsity=SHARE")
            return {}

        def build(asked: Mapping[str, float]) -> Model:
            return pruner.build({name: Amount(share=share) for name, share in asked.items()}, most_passes=TRIAL_PASSES)

        chosen = choose_shares(views, build, context, changes, pruner.remember)
        changes.resolved = {"ratios": [f"{name}={share:g}" for name, share in chosen.items()]}
        return {name: Amount(share=share) for name, share in chosen.items()}


def _parsed(ratios: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in ratios:
        name, _, share = text.rpartition("=")
        try:
            found[name] = float(share)
        except ValueError:
            found[name] = -1.0
        if not name or not 0 <= found[name] <= 1:
            message = f"prune: ratios must be NAME=SHARE with a share from 0 to 1, got {text!r}"
            raise OptionError(message)
    return found


def _table(model: Model, names: set[str]) -> Table:
    """What is left of each weight, and of all."""
    rows: list[tuple[Any, ...]] = []
    total = alive = 0
    for view in find_views(model):
        if view.name in names:
            elements, left = int(np.prod(view.shape)), int(np.count_nonzero(view.read()))
            rows.append(_row(view.label, "x".join(map(str, view.shape)), left, elements))
            total, alive = total + elements, alive + left
    rows.append(_row("all", "", alive, total))
    columns = ("weight", "shape", "non-zeros", "total", "percent", "compression rate")
    return Table(f"{alive:,} weights alive, {total - alive:,} pruned", columns, rows)


def _row(name: str, shape: str, alive: int, total: int) -> tuple[Any, ...]:
    return name, shape, alive, total, round(100 * alive / total, 2), round(total / alive, 2) if alive else None
