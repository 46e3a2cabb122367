"""Let weights take few different values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from onnxcomp.errors import OptionError
from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.packed import find_packed
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.weights import LazyWeight, Spool
from onnxcomp_passes._energy import input_energies
from onnxcomp_passes._kmeans import code_book, codebook, nearest_of
from onnxcomp_passes._search import BUDGET_USED, MARGIN, OUT_OF_TIME, costliest_first, fewest, most_worth_ranking
from onnxcomp_passes._stored import lift_constants, output_channel_axis
from onnxcomp_passes._views import Grid, WeightView, find_views, wanted_views

__all__ = ["Cluster"]

Array = np.ndarray[Any, Any]

WIDTHS = (8, 4, 2)
"""Bits that codes are packed in without waste, and so those that are chosen from."""

SAFE_BITS = 8
"""Where there is no judge: 256 values are off by some thousandths of the weight's spread."""


DAMPING = 0.01
"""Of the mean energy, added to each: channels that the data leave silent still count. As for GPTQ."""


@register
@dataclass(frozen=True, kw_only=True)
class Cluster(Pass):
    """Replace each weight by the nearest value of a codebook of its tensor, found by K-means.

    ::

        before   Y = MatMul(X, W)
        after    Y = MatMul(X, W)      W: at most 2**bits different values, zeros where there were zeros

    Weights keep the form that they have: float32, float16, or integers decoded at load or computed with. Of integers
    the codes take few values, those with the least error of the weights that they stand for. So the file is as large as
    before: it gets smaller when it is compressed, or once `pack` stores codes and codebook.

    With data, an error counts with the energy of what the weight is multiplied with: channels that carry little may be
    off by more. With bits=0 each weight gets 8, 4 or 2 bits, the fewest that hold the budget, by the bytes that this
    saves for the output error that it adds; made-up inputs are too rough a judge of that.

    Left alone: weights of other types, that have few elements or few values already, that hold NaN or infinity, that
    live in a subgraph or that are a graph output.
    """

    name: ClassVar[str] = "cluster"
    pays_with: ClassVar[str] = "pack"

    bits: int = option(0, "A codebook has 2**bits values; 0: chosen for each weight.", minimum=0, maximum=8)
    per_channel: bool = option(False, "A codebook per output channel of a float weight instead of one per weight.")
    energy: bool = option(True, "With data, errors count with the mean square of the input that they meet.")
    keep_zeros: bool = option(True, "Zeros stay zeros: 0 is in the codebook of a weight that has any.")
    min_elements: int = option(128, "Weights with fewer elements stay as they are.", minimum=1)
    widths: tuple[str, ...] = option((), "Bits of single weights, as NAME=BITS.")
    skip: tuple[str, ...] = option((), "Names of weights that stay as they are.")

    def __post_init__(self) -> None:
        """See the base class; widths must be names and bits.

        Raises:
            OptionError: An option has the wrong type or is out of range.
        """
        super().__post_init__()
        for item in self.widths:
            name, _, bits = item.rpartition("=")
            if not name or bits not in set("12345678"):
                message = f"{self.name}: widths must be NAME=BITS with 1 to 8 bits, got {item!r}"
                raise OptionError(message)

    def weaker(self) -> Iterator[Self]:
        """Twice the bits."""
        for bits in (4, 8):
            if 0 < self.bits < bits:
                yield replace(self, bits=bits)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        if find_packed(model):  # what was lossy came before: the budget is not spent a second time
            changes.leave("the model", "is packed: unpack it first (onnxcomp optimize --unpack)")
            return changes
        base = model.fork()
        lift_constants(base.graph)
        views = wanted_views(base, context, changes, skip=self.skip, min_elements=self.min_elements)
        judge = context.judge
        chooses = judge is not None and not self.bits and not self.widths
        if judge is not None and judge.generated and chooses:
            changes.leave("the model", "how few values do is measured on data; give --data, or bits=BITS")
            return changes
        late = context.out_of_time()
        if late and self.energy and not chooses and context.data is not None:
            changes.notes.append("the time limit was reached: errors count the same whatever input they meet")
        energies = input_energies(base, views, context) if self.energy and not late else {}
        clustering = _Clustering(self, base, energies, Spool())
        if judge is not None and chooses:
            widths = self._choose(clustering, views, context, judge, changes)
        else:
            given = {name: int(bits) for name, _, bits in (item.rpartition("=") for item in self.widths)}
            widths = {view.name: given.get(view.name, self.bits or SAFE_BITS) for view in views}
        for view in views:
            if view.name not in widths:
                continue
            context.progress(f"clustering {view.name}")
            bits = widths[view.name]
            why = clustering.refusal(view, bits)
            if why is not None:
                changes.leave(view.name, why)
                del widths[view.name]
                continue
            shape = "x".join(map(str, view.shape))
            per = " a channel" if self.per_channel and view.form.startswith("float") else ""
            kind = str(np.dtype(view.holder.dtype))
            changes.add(view.name, f"{shape} {kind} takes at most {1 << bits} values{per}")
        if changes.count:
            model.become(clustering.built(widths))
        return changes

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choose(
        self, clustering: _Clustering, views: list[WeightView], context: Context, judge: Judge, changes: Changes
    ) -> dict[str, int]:
        """The fewest bits for each weight that hold the budget; those with most error per byte saved are widened."""
        if not self._holds(clustering, {}, context):
            return self._chosen({}, {view.name: BUDGET_USED for view in views}, views, changes)
        steps, saved = self._steps(clustering, views, context, first=True)
        gentlest = costliest_first(saved, self._errors(clustering, steps, saved, context, judge))[-1:]
        hopeless = gentlest and not self._holds(clustering, dict(steps[index] for index in gentlest), context)
        if hopeless or context.out_of_time():
            return self._chosen({}, self._reasons(views, steps, context), views, changes)
        steps, saved = self._steps(clustering, views, context)
        errors = self._errors(clustering, steps, saved, context, judge)
        order = costliest_first(saved, errors)

        def widths_without(count: int) -> dict[str, int]:
            """Each weight's bits when the costliest steps are not taken, nor those that follow them."""
            gone = {steps[index] for index in order[:count]}
            found: dict[str, int] = {}
            stopped: set[str] = set()
            for name, bits in steps:
                if (name, bits) in gone:
                    stopped.add(name)
                elif name not in stopped:
                    found[name] = bits
            return found

        def holds(count: int) -> bool:
            context.progress(f"trying codebooks, {len(order) - count} of {len(order)} steps")
            return self._holds(clustering, widths_without(count), context)

        count = 0 if holds(0) else fewest(len(order), holds, context)
        widths = widths_without(count)
        return self._chosen(widths, self._reasons(views, steps, context), views, changes)

    @staticmethod
    def _reasons(views: list[WeightView], steps: list[tuple[str, int]], context: Context) -> dict[str, str]:
        """Why weights stay, if they do; nothing of those that have few values already."""
        if context.out_of_time():
            return {view.name: OUT_OF_TIME for view in views}
        return {name: "costs too much accuracy" for name, _ in steps}

    def _chosen(
        self, widths: dict[str, int], reasons: Mapping[str, str], views: list[WeightView], changes: Changes
    ) -> dict[str, int]:
        """Tell what was chosen, and why weights stay."""
        stay = [view.name for view in views if view.name not in widths]
        for name in stay:
            if name in reasons:
                changes.leave(name, reasons[name])
        told = [f"{name}={bits}" for name, bits in widths.items()]
        changes.resolved = {"bits": SAFE_BITS, "widths": told, "skip": [*self.skip, *stay]}
        return widths

    @staticmethod
    def _holds(clustering: _Clustering, widths: Mapping[str, int], context: Context) -> bool:
        """Whether the judge allows the model with such codebooks."""
        judge = context.judge
        assert judge is not None
        built = clustering.built(widths)
        quality = judge.quality(built)
        judge.forget(built)
        return judge.allows(quality, MARGIN * context.share)

    @staticmethod
    def _steps(
        clustering: _Clustering, views: list[WeightView], context: Context, *, first: bool = False
    ) -> tuple[list[tuple[str, int]], dict[int, float]]:
        """What may be done, each weight's fewer bits after its more (or the first alone), and the bytes this saves."""
        steps: list[tuple[str, int]] = []
        saved: dict[int, float] = {}
        for view in views:
            before = 8 * np.dtype(view.holder.dtype).itemsize
            stored = int(np.count_nonzero(view.read())) if before else 0
            for bits in (width for width in WIDTHS if width < before):
                if not context.out_of_time() and clustering.refusal(view, bits) is None:
                    saved[len(steps)] = max(stored, 1) * (before - bits) / 8
                    steps.append((view.name, bits))
                    before = bits
                    if first:
                        break
        return steps, saved

    @staticmethod
    def _errors(
        clustering: _Clustering,
        steps: list[tuple[str, int]],
        saved: Mapping[int, float],
        context: Context,
        judge: Judge,
    ) -> dict[int, float]:
        """The output error that each step adds to the step before it, alone; independent errors add up as squares."""
        before = judge.rough_error(clustering.base)
        alone: dict[int, float] = {}
        for index in most_worth_ranking(saved, context):
            name, bits = step = steps[index]
            if step not in clustering.alone:
                context.progress(f"measuring {name} in {bits} bits")
                built = clustering.built({name: bits})
                clustering.alone[step] = judge.rough_error(built)
                judge.forget(built)
            alone[index] = clustering.alone[step]
        errors = {}
        for index, error in alone.items():
            follows = index - 1 in alone and steps[index - 1][0] == steps[index][0]
            errors[index] = math.sqrt(max(0.0, error**2 - max(before, alone[index - 1] if follows else 0.0) ** 2))
        return errors


@dataclass
class _Clustering:
    """Clustered weights of one model, each made once, and their errors alone that were measured."""

    options: Cluster
    base: Model
    energies: Mapping[str, Array]
    spool: Spool
    alone: dict[tuple[str, int], float] = field(default_factory=dict)
    _made: dict[tuple[str, int], LazyWeight] = field(default_factory=dict)

    def refusal(self, view: WeightView, bits: int) -> str | None:
        """Why a weight stays as it is, if it does; else it is made."""
        if (view.name, bits) in self._made:
            return None
        grid = view.grid()
        value = view.read() if grid is None else grid.codes
        if not _is_finite(value if grid is None else grid.scale):
            return "holds NaN or infinity"
        energy = self._energy(view)
        clustered = self._floats(view, value, energy, bits) if grid is None else self._codes(grid, energy, bits)
        if clustered is None:
            return "its zeros have different codes"
        clustered = clustered.astype(view.holder.dtype)
        if np.array_equal(clustered, value.astype(view.holder.dtype)):
            return f"has no more than {1 << bits} values already"
        self._made[view.name, bits] = view.held(clustered, self.spool)
        return None

    def built(self, widths: Mapping[str, int]) -> Model:
        """The model with these weights in codebooks of so many bits."""
        fork = self.base.fork()
        for view in find_views(fork):
            if view.name in widths:
                view.holder.values = self._made[view.name, widths[view.name]]
        return fork

    def _energy(self, view: WeightView) -> Array | None:
        """What errors of a weight count, shaped as its values or codes are held; None: all the same."""
        energy = self.energies.get(view.name)
        if energy is None or not energy.any():
            return None
        damped = energy + DAMPING * np.mean(energy)
        return np.broadcast_to(damped, view.shape).reshape(view.holder.shape)

    def _floats(self, view: WeightView, value: Array, energy: Array | None, bits: int) -> Array:
        keep = self.options.keep_zeros
        per_channel = self.options.per_channel
        axis = output_channel_axis(view.node, view.index, value.ndim) if per_channel else None
        if axis is None:
            return nearest_of(value, codebook(value, 1 << bits, weights=energy, keep_zeros=keep))
        result = np.empty_like(value, order="C")
        by_channel = [np.moveaxis(array, axis, 0) for array in (value, result)]
        counts = [None] * value.shape[axis] if energy is None else np.moveaxis(energy, axis, 0)
        for channel, out, count in zip(*by_channel, counts, strict=True):
            out[...] = nearest_of(channel, codebook(channel, 1 << bits, weights=count, keep_zeros=keep))
        return result

    def _codes(self, grid: Grid, energy: Array | None, bits: int) -> Array | None:
        """A codebook of codes: a code's error counts with the square of its scale. None where 0 has several codes."""
        zero: int | None = None
        codes = grid.zero_code
        if codes is not None and self.options.keep_zeros and np.any(grid.codes == codes):
            if np.ptp(codes.astype(np.int64)):
                return None
            zero = int(codes.reshape(-1)[0])
        counts = grid.scale.astype(np.float64) ** 2
        counts = counts if energy is None else counts * energy
        return nearest_of(grid.codes, code_book(grid.codes, counts, 1 << bits, zero=zero))


def _is_finite(value: Array) -> bool:
    return bool(np.isfinite([np.min(value, initial=0.0), np.max(value, initial=0.0)]).all())
