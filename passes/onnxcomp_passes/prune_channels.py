"""Remove whole channels, heads and neurons from the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.weights import Spool
from onnxcomp_passes._channels_groups import Channels, Group, find_channels, node_key
from onnxcomp_passes._dead import Removed, remove_dead
from onnxcomp_passes._stored import lift_constants

__all__ = ["PruneChannels"]


@register
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Remove whole channels, attention heads and neurons from the graph, with all that is tied to them.

    ::

        before   h = Relu(Conv(X, W, b))    Y = Conv(h, V)      W: (64, 3, 3, 3), V: (32, 64, 3, 3)
        after    h = Relu(Conv(X, W', b'))  Y = Conv(h, V')     W': (48, 3, 3, 3), V': (32, 48, 3, 3)

    What goes adds nothing to any output: its weights are zero, nothing reads it, or it is constant and moves into the
    next bias. Channels that a residual Add, a depthwise convolution or the like ties together go together; shapes,
    Split sizes, indices and group numbers that depend on them are changed along.

    Left alone: channels that reach an output of the model, that an operator computes across (LayerNormalization,
    Softmax), that are tied to values that no weight makes, or that cannot be followed; each with its reason.
    """

    name: ClassVar[str] = "prune-channels"
    lossless: ClassVar[bool] = True

    skip: tuple[str, ...] = option((), "Names of groups (their first layers) that stay as they are.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        candidate, spool = model.fork(), Spool()
        lift_constants(candidate.graph)
        channels = find_channels(candidate, context.excludes)
        for where, why in channels.left.items():
            changes.leave(where, why)
        held = self._held(candidate, channels, context)
        removed = remove_dead(candidate, wanted=lambda group: not held & _layers(group), spool=spool)
        _tell(removed, channels, changes)
        if changes.count:
            model.become(candidate)
        return changes

    def _held(self, model: Model, channels: Channels, context: Context) -> set[str]:
        """The layers, by `node_key`, that the user asked to leave alone."""
        held = {node_key(node) for node in model.graph.nodes if context.excludes(node)}
        skipped = (_layers(group) for group in channels.groups if group.name in self.skip)
        return held.union(*skipped)


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
