"""What each value of a weight is multiplied with, on average over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.channels import ChannelMoments
from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._statistics import observe
from onnxcomp_passes._stored import reduction_axis
from onnxcomp_passes._views import WeightView

__all__ = ["input_energies"]

Array = np.ndarray[Any, Any]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def input_energies(model: Model, views: Sequence[WeightView], context: Context) -> Mapping[str, Array]:
    """The mean square of the input channel that each value of a weight is multiplied with.

    Args:
        model: What the views are of.
        views: The weights; those of Conv, ConvTranspose, Gemm and MatMul with two axes have an answer.
        context: Its data are run.

    Returns:
        By the name of the view, float64 values that broadcast over its shape.
    """
    layers = [view for view in views if _is_layer(view)]
    if context.data is None or context.runtime is None or context.workdir is None or not layers:
        return {}
    axes = {view.node.inputs[0].name: 1 if "Conv" in view.node.op else -1 for view in layers}
    seen = observe(model, {name: ChannelMoments(axis) for name, axis in axes.items()}, context)
    found = {}
    for view in layers:
        moments = seen.get(view.node.inputs[0].name)
        energy = None if moments is None or not moments.count else _over_weight(view, moments.square())
        if energy is not None:
            found[view.name] = energy
    return found


def _is_layer(view: WeightView) -> bool:
    if view.node.op not in LAYERS or view.index != 1:
        return False
    return "Conv" in view.node.op or (len(view.shape) == 2 and not view.node.attrs.get("transA", 0))


def _over_weight(view: WeightView, square: Array) -> Array | None:
    """Values by input channel, shaped to broadcast over the weight; None where they do not fit it."""
    axis = reduction_axis(view.node, view.index, len(view.shape))
    groups = int(view.node.attrs.get("group", 1)) if view.node.op == "Conv" else 1
    if axis is None or len(square) != view.shape[axis] * groups:
        return None
    if groups == 1:
        return square.reshape([-1 if place == axis else 1 for place in range(len(view.shape))])
    outputs = view.shape[0] // groups  # of each group; rows of one group have its own inputs
    return np.repeat(square.reshape(groups, -1), outputs, 0).reshape(*view.shape[:2], *[1] * (len(view.shape) - 2))
