"""Models with pruned weights: one layer after the other, each by what the layers before it give by then."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp.weights import Spool
from onnxcomp_passes._obs import compensated
from onnxcomp_passes._pruning import Pattern, as_matrices, from_matrices, lowest, lowest_by_output, wanda_scores
from onnxcomp_passes._views import WeightView, find_views
from onnxcomp_passes._windows import Moments, gather_products, inputs_of

__all__ = ["CLOSE", "Amount", "Pruner"]

Array = np.ndarray[Any, Any]

CLOSE = 1e-3
"""A weight with this close to the zeros asked for has them: a second run changes nothing."""

MOST_PASSES = 16
"""Passes over the data for one model: layers further apart than that are pruned by the same pass."""


@dataclass(frozen=True)
class Amount:
    """How much of one weight goes; one of these is given."""

    share: float = 0.0
    threshold: float = 0.0
    deviations: float = 0.0
    pattern: Pattern | None = None

    @property
    def is_small(self) -> bool:
        """Whether all weights go that are small, however many they are."""
        return bool(self.threshold or self.deviations)


@dataclass
class Pruner:
    """Prunes weights of one model.

    Attributes:
        base: The model.
        moments: What its layers are multiplied with, by weight; others are pruned by magnitude.
        context: Its data are run again for layers behind others.
        compensate: Change what stays to make up for what goes; false: the mask alone, by magnitude times input norm.
        criteria: The weights that were changed in the model built last, and what told which of them go.
        passes: How many passes over the data the model built last got after the first, of how many that it was to get.
    """

    base: Model
    moments: Mapping[str, Moments]
    context: Context
    compensate: bool
    criteria: dict[str, str] = field(default_factory=dict)
    passes: tuple[int, int] = (0, 0)
    _remembered: tuple[Model, dict[str, str]] | None = None
    _spool: Spool = field(default_factory=Spool)
    _outputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Know the graph's outputs."""
        self._outputs = frozenset(str(tensor.name) for tensor in self.base.graph.outputs)

    def build(self, amounts: Mapping[str, Amount], *, most_passes: int = MOST_PASSES) -> Model:
        """A copy of the model with weights pruned.

        With compensation, a layer is fitted to give, from what the pruned layers before it give, what it gave in the
        base. The layers are taken in groups, in the order of the graph, with a pass over the data for each group. Once
        time is up there are no more passes, and the layers left are fitted to what the base gives them.

        Args:
            amounts: By the names of weights; others stay.
            most_passes: The most groups.
        """
        fork = self.base.fork()
        self.criteria = {}
        views = [view for view in find_views(fork) if view.name in amounts]
        wanted = [view for view in views if not self._has_it(view, amounts[view.name])]
        if not self.compensate or any(amounts[view.name].is_small for view in wanted):
            groups = [wanted]
        else:
            groups = self._groups(fork, wanted, most_passes)
        done = wanted_passes = 0
        for number, group in enumerate(groups):
            seen = [view for view in group if view.name in self.moments]
            moments = self.moments
            if number and seen:  # before the first, nothing has changed yet
                wanted_passes += 1
                if not self.context.out_of_time():
                    done += 1
                    moments = {**moments, **gather_products(fork, seen, self.context, original=self.base)}
            for view in group:
                self._prune(view, amounts[view.name], moments.get(view.name))
        self.passes = done, wanted_passes
        return fork

    def remember(self, model: Model) -> None:
        """Keep the model built last, for `final`."""
        self._remembered = model, dict(self.criteria)

    def final(self, amounts: Mapping[str, Amount]) -> Model:
        """The model with these amounts; once time is up, the one remembered, which was built and tried with them."""
        if self._remembered is None or not self.context.out_of_time():
            return self.build(amounts)
        model, self.criteria = self._remembered
        return model

    def _groups(self, model: Model, views: Sequence[WeightView], most: int) -> list[list[WeightView]]:
        """Weights that are multiplied with the same tensor together, and neighbours, down to so many groups."""
        read = inputs_of(model, views)
        tensors = list(dict.fromkeys(read[view.name] for view in views if view.name in read))
        size = -(-len(tensors) // most)
        place = {tensor: index // max(1, size) for index, tensor in enumerate(tensors)}
        groups: list[list[WeightView]] = [[] for _ in range(1 + max(place.values(), default=0))]
        for view in views:
            groups[place[read[view.name]] if view.name in read else 0].append(view)
        return groups

    def scores(self, view: WeightView, matrices: Array) -> Array:
        """What each weight matters, to compare layers by."""
        moments = self.moments.get(view.name)
        return np.abs(matrices) if moments is None else wanda_scores(matrices, moments.products)

    def _has_it(self, view: WeightView, amount: Amount) -> bool:
        if amount.is_small:
            return False
        matrices = as_matrices(view, view.read())
        if amount.pattern is None:
            return bool(np.count_nonzero(matrices == 0) >= (amount.share - CLOSE) * matrices.size)
        return not np.any(matrices[_mask_of(np.abs(matrices), amount.pattern)])

    def _prune(self, view: WeightView, amount: Amount, moments: Moments | None) -> None:
        matrices = as_matrices(view, view.read())
        if amount.is_small:
            least = amount.threshold or amount.deviations * float(np.std(matrices, dtype=np.float64))
            self._remove(view, matrices, np.abs(matrices) < least, "magnitude")
        elif moments is None or not self.compensate or not self._compensate(view, matrices, amount, moments):
            by_norm = view.name in self.moments
            criterion = "magnitude times input norm" if by_norm else "magnitude"
            self._remove(view, matrices, self._masked(view, matrices, amount), criterion)

    def _remove(self, view: WeightView, matrices: Array, goes: Array, criterion: str) -> None:
        if np.any(matrices[goes]):  # else nothing changes
            self._write(view, np.where(goes, np.float32(0), matrices), criterion)

    def _masked(self, view: WeightView, matrices: Array, amount: Amount) -> Array:
        scores = self.scores(view, matrices)
        if amount.pattern is not None:
            return _mask_of(scores, amount.pattern)
        if view.name not in self.moments:
            return lowest(scores, round(amount.share * scores.size))
        return lowest_by_output(scores, amount.share)

    def _compensate(self, view: WeightView, matrices: Array, amount: Amount, moments: Moments) -> bool:
        """Prune with compensation, the mean error into the bias; tell whether the data allowed it."""
        bias = bias_of(view, self._outputs)
        fitted = moments if bias is None else moments.centred()
        pruned = compensated(matrices, fitted.products, fitted.cross, amount.pattern or amount.share)
        if pruned is None:
            return False
        self._write(view, pruned, "second order")
        if bias is not None:
            held = as_matrices(view, view.read())  # rounded, where it is held in codes
            missing = np.einsum("gi,gio->go", moments.original_means, matrices, dtype=np.float64)
            missing -= np.einsum("gi,gio->go", moments.means, held, dtype=np.float64)
            bias.values = (value_of(bias) + missing.reshape(-1)).astype(np.float32)
        return True

    def _write(self, view: WeightView, matrices: Array, criterion: str) -> None:
        self.criteria[view.name] = criterion
        view.write(from_matrices(view, matrices), self._spool)


def bias_of(view: WeightView, seen: Container[str]) -> gs.Constant | None:
    """The constant with one number for each output of a layer that is added to it and to nothing else.

    Args:
        view: The layer's weight.
        seen: Names of the outputs of the graph: a sum that is one may change, what is added may not.
    """
    node = view.node
    if node.op in {"Conv", "Gemm"}:
        plain = node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0
        found = node.inputs[2] if len(node.inputs) > 2 and plain else None
        outputs = view.shape[0] if node.op == "Conv" or node.attrs.get("transB", 0) else view.shape[1]
    else:
        readers = node.outputs[0].outputs
        added = readers[0].inputs if node.op == "MatMul" and len(readers) == 1 and readers[0].op == "Add" else []
        added = [] if node.outputs[0].name in seen else added
        found = next((tensor for tensor in added if tensor is not node.outputs[0]), None)
        outputs = view.shape[-1]
    if not isinstance(found, gs.Constant) or found.name in seen or len(found.outputs) != 1 or found.dtype != np.float32:
        return None
    return found if tuple(found.shape) == (outputs,) else None


def _mask_of(scores: Array, pattern: Pattern) -> Array:
    return pattern.mask(scores.swapaxes(0, 1)).swapaxes(0, 1)
