"""Remove whole channels, heads and neurons from the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.weights import Spool
from onnxcomp_passes._channel_choice import Candidates, Removal
from onnxcomp_passes._channels_groups import Channels, Group, find_channels, node_key
from onnxcomp_passes._dead import Removed, remove_dead
from onnxcomp_passes._refit import refit
from onnxcomp_passes._residual import choose_blocks, removable_blocks, remove_blocks
from onnxcomp_passes._stored import lift_constants

__all__ = ["PruneChannels"]


MULTIPLE = 8
"""What ONNX Runtime's blocked convolutions want: with other counts they run as plain ones, several times slower."""


@register
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Remove whole channels, attention heads and neurons from the graph, with all that is tied to them.

    ::

        before   h = Relu(Conv(X, W, b))    Y = Conv(h, V)      W: (64, 3, 3, 3), V: (32, 64, 3, 3)
        after    h = Relu(Conv(X, W', b'))  Y = Conv(h, V')     W': (48, 3, 3, 3), V': (32, 48, 3, 3)

    By itself it takes what adds nothing to any output: its weights are zero, nothing reads it, or it is constant and
    moves into the next bias. With `ratio` or `choose` it takes more: what the layers behind it can make up for best.
    Their weights are then fitted by least squares to what they computed before, on calibration data. Channels that a
    residual Add, a depthwise convolution or the like ties together go together; shapes, Split sizes, indices and group
    numbers that depend on them are changed along.

    Left alone: channels that reach an output of the model, that an operator computes across (LayerNormalization,
    Softmax), that are tied to values that no weight makes, or that cannot be followed; each with its reason.
    """

    name: ClassVar[str] = "prune-channels"
    lossless: ClassVar[bool] = True

    ratio: float = option(0.0, "The share that goes; 0: only what adds nothing.", minimum=0, maximum=0.95)
    scope: str = option(
        "global",
        "Of what: global, of all multiply-accumulates, where they cost least; group, of the units of each group.",
        choices=("global", "group"),
    )
    choose: bool = option(False, "Take as much as the accuracy budget pays for; needs data.")
    removed: tuple[str, ...] = option((), "How many units go, by group, as NAME=COUNT.")
    criterion: str = option(
        "output",
        "Which units go first: least change of what reads them, others making up for it (without data: l2); smallest"
        " norm of weights; least activation; nearest to the others (geometric median).",
        choices=("output", "l1", "l2", "activation", "median"),
    )
    blocks: bool = option(False, "Take whole residual blocks out first, as far as the budget pays for; needs data.")
    removed_blocks: tuple[str, ...] = option((), "Which residual blocks go, by the name of their sum.")
    round_to: int = option(
        0,
        "Channels and neurons that stay are a multiple of this, which kernels like; 0: of 8, but all that adds nothing"
        " goes if the model is not slower for it.",
        minimum=0,
    )
    refit: bool = option(True, "Fit the weights of the layers behind to what they computed; needs data.")
    skip: tuple[str, ...] = option((), "Names of groups (their first layers) that stay as they are.")

    def __post_init__(self) -> None:
        """See the base class; an amount is asked for in one way.

        Raises:
            OptionError: An option has the wrong type or is out of range, or two contradict each other.
        """
        super().__post_init__()
        asked = [name for name in ("ratio", "choose", "removed") if getattr(self, name)]
        if len(asked) > 1:
            message = f"{self.name}: {' and '.join(asked)} both say how much; give one"
            raise OptionError(message)
        _parsed(self.removed)
        if asked or self.blocks or self.removed_blocks:
            object.__setattr__(self, "lossless", False)
        if self.choose or self.blocks:
            object.__setattr__(self, "requires", frozenset({"data"}))

    def weaker(self) -> Iterator[Self]:
        """Half of the share, then a quarter; of what adds nothing, as much as leaves counts that kernels like."""
        if self.lossless and not self.round_to:
            yield replace(self, round_to=MULTIPLE)
        if self.ratio:
            yield replace(self, ratio=self.ratio / 2)
            yield replace(self, ratio=self.ratio / 4)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class.

        Raises:
            RequirementError: A choice needs a judge, and data, that are not there.
        """
        if (self.choose or self.blocks) and (context.judge is None or context.data is None):
            message = f"{self.name}: {'choose' if self.choose else 'blocks'} measures on data; give --data"
            raise RequirementError(message)
        changes = Changes()
        candidate, spool = model.fork(), Spool()
        lift_constants(candidate.graph)
        channels = find_channels(candidate, context.excludes)
        for where, why in channels.left.items():
            changes.leave(where, why)
        held = self._held(candidate, channels, context)

        def wanted(group: Group) -> bool:
            return not held & _layers(group)

        dead = remove_dead(candidate, wanted=wanted, multiple=max(1, self.round_to), spool=spool)
        _tell(dead, channels, changes)
        if not self.lossless:
            self._take_blocks(candidate, context, changes)
            self._take(candidate, wanted, context, changes)
        if changes.count:
            model.become(candidate)
        return changes

    def _take_blocks(self, candidate: Model, context: Context, changes: Changes) -> None:
        """Remove residual blocks, in place."""
        chosen = choose_blocks(candidate, context) if self.blocks else []
        chosen += [block for block in removable_blocks(candidate) if block.name in self.removed_blocks]
        if not chosen:
            return
        for block in chosen:
            changes.add(block.name, f"residual block of {len(block.nodes)} nodes removed")
        remove_blocks(candidate, chosen)
        changes.resolved |= {"blocks": False, "removed_blocks": [block.name for block in chosen]}

    def _take(self, candidate: Model, wanted: Callable[[Group], bool], context: Context, changes: Changes) -> None:
        """Remove units that add something, in place: let nothing read them, fit what is left, then they are dead."""
        if not (self.ratio or self.choose or self.removed):
            return
        channels = find_channels(candidate, context.excludes)
        groups = [group for group in channels.groups if wanted(group)]
        found = Candidates.find(candidate, channels, groups, self.criterion, context, changes)
        found.compensates = self.refit
        removal = self._removal(found, context, changes)
        if not removal:
            return
        spool = Spool()
        macs = found.macs({})
        masked, shifts = found.masked(removal, spool)
        if self.refit and context.data is not None and context.runtime is not None and context.workdir is not None:
            fitted = refit(masked, candidate, shifts, context, spool)
            changes.notes.append(f"{fitted} layers fitted to what they computed before")
        taken = remove_dead(masked, wanted=lambda group: wanted(group) and group.name in removal, spool=spool)
        for name, count in taken.units.items():
            changes.add(name, f"{count} of {channels.group(name).units} {channels.group(name).kind} removed")
        changes.notes.append(f"{1 - found.macs(removal) / macs:.1%} of the multiply-accumulates removed")
        changes.resolved |= {
            "ratio": 0.0,
            "choose": False,
            "removed": [f"{name}={count}" for name, count in removal.items()],
        }
        candidate.become(masked)

    def _removal(self, found: Candidates, context: Context, changes: Changes) -> Removal:
        multiple = self.round_to or MULTIPLE
        if self.removed:
            asked = _parsed(self.removed)
            return {name: min(asked[name], len(found.orders[name].units) - 1) for name in asked if name in found.orders}
        if self.choose:
            return found.within_budget(multiple, context, changes)
        if self.scope == "group":
            return found.of_each(self.ratio, multiple)
        return found.of_all(self.ratio, multiple, context, changes)

    def _held(self, model: Model, channels: Channels, context: Context) -> set[str]:
        """The layers, by `node_key`, that the user asked to leave alone."""
        held = {node_key(node) for node in model.graph.nodes if context.excludes(node)}
        skipped = (_layers(group) for group in channels.groups if group.name in self.skip)
        return held.union(*skipped)


def _parsed(removed: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in removed:
        name, _, count = text.rpartition("=")
        if not name or not count.isdigit():
            message = f"prune-channels: removed must be NAME=COUNT, got {text!r}"
            raise OptionError(message)
        found[name] = int(count)
    return found


def _layers(group: Group) -> set[str]:
    """The nodes whose constants a group is cut from, by `node_key`."""
    return {slot.node for slot in (*group.producers, *group.consumers, *group.coupled)}


def _tell(removed: Removed, channels: Channels, changes: Changes) -> None:
    kinds = {group.name: group.kind for group in channels.groups}
    for name, count in removed.units.items():
        changes.add(name, f"{count} of {removed.of[name]} {kinds.get(name, 'channels')} removed that add nothing")
    for name in removed.shifted:
        changes.add(name, "constants of removed channels moved into its bias")
    for name in removed.blocks:
        changes.add(name, "sum removed: one side of it is always zero")
