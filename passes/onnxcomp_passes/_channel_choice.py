"""Which units of which groups go: so many, or as many as the accuracy budget pays for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Table
from onnxcomp.weights import Spool
from onnxcomp_passes._channel_scores import Consumer, Order, compensated_rows, consumers_of, order_units
from onnxcomp_passes._channels_groups import Channels, Group, Slot, macs_by_node
from onnxcomp_passes._dead import shift_bias, takes_shift
from onnxcomp_passes._pruning import from_matrices
from onnxcomp_passes._refit import refit
from onnxcomp_passes._search import last_that_holds
from onnxcomp_passes._views import WeightView, find_views
from onnxcomp_passes._windows import gather_products

__all__ = ["Candidates", "Removal", "kept_units"]

Array = np.ndarray[Any, Any]
Removal = dict[str, int]
"""Group -> how many of its units go."""

MARGIN = 0.9
"""The share of the budget that is spent on the samples that choices are made on: others lose a little more."""

PROBE = 0.5
"""The part of a group's units that goes when what the group costs is measured."""

PROBE_FITS = 8
"""Layers that are fitted before what a group costs is measured: those behind it make up for most of what they can,
and without that a group that others can stand in for looks as bad as one that they cannot."""

PRICES = 96
"""Trades of error for multiply-accumulates that are looked at, from none to all."""

LEAST_LEFT = 0.125
"""The part of a group's units that always stays."""


def kept_units(units: int, ratio: float, multiple: int) -> int:
    """How many units stay when a ratio goes: a multiple that kernels like, of the groups that are larger than it.

    Example:
        >>> kept_units(64, 0.3, 8), kept_units(20, 0.3, 8), kept_units(6, 0.3, 8)
        (48, 16, 5)
    """
    kept = units * (1 - ratio)
    if units >= multiple * 1.5:
        return int(min(units, max(multiple, multiple * np.ceil(kept / multiple - 1e-9))))
    return int(max(1, np.ceil(kept - 1e-9)))


@dataclass
class Candidates:
    """The groups that may lose units, in which order these go and what that costs.

    Attributes:
        model: The model with all units.
        channels: Its groups.
        orders: By group.
        consumers: By group.
        compensates: Whether other units stand in for those that go; else the consumers' weights stay as they are.
    """

    model: Model
    channels: Channels
    orders: dict[str, Order]
    consumers: dict[str, list[Consumer]]
    compensates: bool = True
    _macs: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def find(
        model: Model, channels: Channels, groups: Sequence[Group], criterion: str, context: Context, changes: Changes
    ) -> Candidates:
        """Score the units of all groups; says why some have none.

        Args:
            model: Its constants are lifted.
            channels: Its groups.
            groups: Those that may lose units.
            criterion: As the pass names it.
            context: Its data are used, where there are any.
            changes: Gets the reasons.
        """
        views = {(str(view.node.outputs[0].name), view.index): view for view in find_views(model)}
        read = {(slot.node, slot.index) for group in groups for slot in group.consumers}
        wanted = [views[key] for key in sorted(read & views.keys()) if views[key].node.op in {"Conv", "Gemm", "MatMul"}]
        products = {}
        if context.data is not None and context.runtime is not None and context.workdir is not None:
            products = gather_products(model, wanted, context)
        found = Candidates(model, channels, {}, {}, _macs=macs_by_node(model))
        for group in groups:
            consumers = consumers_of(group, views, products)
            if consumers is None or not all(takes_shift(consumer.view.node) for consumer in consumers):
                changes.leave(group.name, "what reads it is no plain Conv, Gemm or MatMul")
                continue
            context.progress(f"scoring the {group.kind} of {group.name}")
            producers = [made for slot in group.producers if (made := _units_of(slot, views)) is not None]
            found.orders[group.name] = order_units(group, consumers, criterion, producers)
            found.consumers[group.name] = consumers
        return found

    # --- what a removal costs and gains ---------------------------------------------------------------------------

    def units(self, removal: Mapping[str, int]) -> dict[str, Array]:
        """The units that go."""
        return {name: self.orders[name].units[:count] for name, count in removal.items() if count}

    def macs(self, removal: Mapping[str, int]) -> int:
        """Multiply-accumulates of what is left."""
        gone = self.channels.is_gone(self.units(removal))
        kept: dict[str, dict[str, float]] = {}
        for axis in self.channels.axes:
            if axis.role in {"out", "in", "group", "batch", "summed"} and axis.node in self._macs:
                share = 1.0 - float(np.mean(gone[axis.classes]))
                roles = kept.setdefault(axis.node, {})
                roles[axis.role] = min(share, roles.get(axis.role, 1.0))
        left = 0.0
        for node, macs in self._macs.items():
            left += macs * float(np.prod(list(kept.get(node, {}).values())))
        return round(left)

    def masked(self, removal: Mapping[str, int], spool: Spool) -> tuple[Model, dict[str, Array]]:
        """The model where nothing reads the units that go, and the other weights stand in for them (`compensates`).

        Returns:
            The model, of unchanged shapes; and what was added to biases, by weight.
        """
        fork = self.model.fork()
        views = {view.name: view for view in find_views(fork)}
        matrices: dict[str, Array] = {}
        shifts: dict[str, Array] = {}
        for name, units in self.units(removal).items():
            for consumer in self.consumers[name]:
                key = consumer.view.name
                now = consumer
                if key in matrices or not self.compensates:
                    now = Consumer(consumer.view, consumer.rows, matrices.get(key, consumer.matrix), None)
                matrices[key], shift = compensated_rows(now, units)
                shifts[key] = shifts.get(key, 0.0) + shift
        for key, matrix in matrices.items():
            views[key].write(from_matrices(views[key], matrix[None].astype(np.float32)), spool)
            if shifts[key].any():
                shift_bias(fork, views[key].node, shifts[key])
        return fork, shifts

    # --- choosing -------------------------------------------------------------------------------------------------

    def of_each(self, ratio: float, multiple: int) -> Removal:
        """The same part of every group."""
        removal = {}
        for name, order in self.orders.items():
            count = len(order.units)
            removal[name] = count - kept_units(count, ratio, self._multiple(name, multiple))
        return {name: count for name, count in removal.items() if count}

    def of_all(self, ratio: float, multiple: int, context: Context, changes: Changes) -> Removal:
        """What removes this share of all multiply-accumulates at the least cost, measured where that can be."""
        wanted = (1 - ratio) * self.macs({})
        costs = {name: order.errors for name, order in self.orders.items()}
        if context.judge is not None and not context.judge.generated:
            costs |= self._measured(context.judge, multiple, context, changes)
        path = self._path(costs, multiple)
        enough = next((removal for removal in path if self.macs(removal) <= wanted), path[-1] if path else {})
        return self._given_back(enough, costs, wanted, multiple)

    def _given_back(self, removal: Removal, costs: Mapping[str, Array], wanted: float, multiple: int) -> Removal:
        """Less of a removal, as long as it is enough: groups go in large steps, so the best trades overshoot."""
        removal = dict(removal)
        while True:
            tries = []
            for name, count in removal.items():
                less = _next_fewer(len(self.orders[name].units), count, self._multiple(name, multiple))
                if count and self.macs({**removal, name: less}) <= wanted:
                    tries.append((float(costs[name][count] - costs[name][less]), name, less))
            if not tries:
                return {name: count for name, count in removal.items() if count}
            _, name, less = max(tries)
            removal[name] = less

    def within_budget(self, multiple: int, context: Context, changes: Changes) -> Removal:
        """What removes most multiply-accumulates within the budget, by bisection along the best trades."""
        assert context.judge is not None
        judge, spool = context.judge, Spool()
        costs = self._measured(judge, multiple, context, changes)
        path = self._path(costs, multiple)

        def holds(removal: Removal) -> bool:
            model, _ = self.masked(removal, spool)
            fits = judge.allows(judge.quality(model), MARGIN * context.share)
            judge.forget(model)
            return fits

        return last_that_holds(path, holds, context) or {}

    def _multiple(self, name: str, multiple: int) -> int:
        """What the units that stay are a multiple of: kernels care for channels, not for how many heads there are."""
        return 1 if self.channels.group(name).kind == "heads" else multiple

    def _measured(self, judge: Judge, multiple: int, context: Context, changes: Changes) -> dict[str, Array]:
        """What each group's removals cost the whole model: its own errors, scaled to one that was measured."""
        spool, costs = Spool(), {}
        base = judge.quality(self.model).error
        table = Table("each group alone", ("group", "units", "removed", "error", "MACs saved"), [])
        for name, order in self.orders.items():
            if context.out_of_time():
                break
            count = len(order.units)
            goes = count - kept_units(count, PROBE, self._multiple(name, multiple))
            if not goes:
                continue
            context.progress(f"measuring what {name} costs")
            model, shifts = self.masked({name: goes}, spool)
            if self.compensates and context.data is not None and context.runtime is not None:
                refit(model, self.model, shifts, context, spool, PROBE_FITS, activations=False)
            error = judge.quality(model).error
            judge.forget(model)
            scale = max(error**2 - base**2, 1e-12) / max(float(order.errors[goes]), 1e-12)
            costs[name] = order.errors * scale
            table.rows.append((name, count, goes, error, self.macs({}) - self.macs({name: goes})))
        changes.tables.append(table)
        return costs

    def _path(self, costs: Mapping[str, Array], multiple: int) -> list[Removal]:
        """Removals from few to many, each the best trade at one price of a multiply-accumulate."""
        options: dict[str, list[tuple[int, float, float]]] = {}
        whole = self.macs({})
        for name, errors in costs.items():
            count = len(errors) - 1
            least = max(1, int(np.ceil(count * LEAST_LEFT)))
            each = self._multiple(name, multiple)
            stays = sorted({kept_units(count, ratio, each) for ratio in np.linspace(0, 1, 33)})
            goes = [count - kept for kept in stays if kept >= least]
            options[name] = [(each, float(errors[each]), float(whole - self.macs({name: each}))) for each in goes]
        rates = [cost / gain for tries in options.values() for _, cost, gain in tries if cost > 0 and gain > 0]
        if not rates:
            return [{name: max(each for each, _, _ in tries) for name, tries in options.items()}] if options else []
        path: list[Removal] = []
        for price in np.geomspace(min(rates) / 2, max(rates) * 8, PRICES):
            best = {name: min(tries, key=lambda t: t[1] - price * t[2])[0] for name, tries in options.items()}
            removal = {name: each for name, each in best.items() if each}
            if removal and (not path or removal != path[-1]):
                path.append(removal)
        return path


def _next_fewer(units: int, count: int, multiple: int) -> int:
    """The next smaller number of units that may go."""
    fewer = [units - kept_units(units, each / units, multiple) for each in range(count)]
    return max((each for each in fewer if each < count), default=0)


def _units_of(slot: Slot, views: Mapping[tuple[str, int], WeightView]) -> Array | None:
    """The weights that make each unit, shape (units, weights)."""
    view = views.get((slot.node, slot.index))
    if view is None or slot.axis >= len(view.shape):
        return None
    moved = np.moveaxis(view.read(), slot.axis, 0)[slot.entries]
    return np.asarray(moved.reshape(len(slot.entries), -1), np.float64)
