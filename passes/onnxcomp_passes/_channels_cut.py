"""Remove units of channel groups from a model: every coupled constant, shape and attribute at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcomp.model import Model
from onnxcomp.weights import Spool
from onnxcomp_passes._channels_groups import Channels

__all__ = ["cut"]

Array = np.ndarray[Any, Any]


def cut(model: Model, channels: Channels, removed: Mapping[str, Array], spool: Spool | None = None) -> None:
    """Remove units in place.

    Args:
        model: The model that `channels` was found in, or a fork of it.
        channels: From `find_channels`.
        removed: Group name -> the units that go, integers in any order.
        spool: Where the bytes of large weights go; by default they are held in memory.

    Raises:
        ValueError: An axis would lose all of its entries (see `Channels.allowed`).
        KeyError: There is no such group.
    """
    raise NotImplementedError
