"""Groups of channels that can only be removed together, found by following channels through the graph.

::

    channels = find_channels(model)                 # groups, and what is left alone with its reason
    cut(model, channels, {group.name: [3, 7]})      # (_channels_cut) units 3 and 7 of a group disappear everywhere

A *unit* is the smallest thing that can go: an output channel with all that is tied to it by a residual Add or a
depthwise convolution, an attention head, a neuron of a feed-forward block. Units of a *group* are interchangeable: each
has the same number of entries on the same axes of the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.model import Model

__all__ = ["Channels", "Group", "Slot", "find_channels"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Name of the tensor: a constant, a weight decoded from one, or an activation.
        axis: Which of its axes, counted from the front.
        entries: The positions on that axis that belong to each unit, int64 of shape (units, entries a unit), sorted.
        node: The node that reads it (for an activation: that makes it), by the name of its first output.
        index: At which input that node reads it (for an activation: at which output it makes it).
    """

    tensor: str
    axis: int
    entries: Array
    node: str
    index: int


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one.

    Attributes:
        name: The first node that makes these channels: its name, or its first output's. Unique among groups: a node
            whose channels fall into several groups has "#2", ... behind its name from the second on.
        kind: "channels" (of convolutions), "heads" (of attention) or "neurons" (of MatMul and Gemm).
        units: How many there are.
        producers: Weights whose output channels these are, at the operators that multiply with them.
        consumers: Weights whose input channels these are, at the operators that multiply with them.
        coupled: Other constants that lose entries along: biases, BatchNormalization, slopes, stored codes and scales.
        carriers: Activations that hold these channels, in the order of the nodes that make them.
        macs: Multiply-accumulates that the first removed unit saves in one run (dynamic axes counted as 1).
        size_bytes: Bytes of constants that one unit takes.
    """

    name: str
    kind: str
    units: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    coupled: tuple[Slot, ...]
    carriers: tuple[Slot, ...]
    macs: int
    size_bytes: int


@dataclass(frozen=True)
class Channels:
    """What can be cut in a model.

    It holds names only, so it is valid for forks of the model that it was found in, too.

    Attributes:
        groups: In the order of the nodes that make them.
        left: Nodes whose output channels cannot be cut -> why.
    """

    groups: tuple[Group, ...]
    left: Mapping[str, str]

    def group(self, name: str) -> Group:
        """The group with this name.

        Raises:
            KeyError: There is none.
        """
        raise NotImplementedError

    def allowed(self, removed: Mapping[str, Array]) -> dict[str, Array]:
        """As many of the wanted units as can go without emptying an axis of any tensor.

        Args:
            removed: Group name -> units, int64, those that should go first in front.

        Returns:
            The same without groups that lose nothing; each array is a prefix of what was given, or all of it.
        """
        raise NotImplementedError


def find_channels(model: Model) -> Channels:
    """Follow channels through the main graph.

    No large weight is read. Constants in `Constant` nodes are not seen: call `lift_constants` first.

    Args:
        model: The model; it is not changed.
    """
    raise NotImplementedError
