"""Which weights to prune: matrices of layers, scores, and how many fall to each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp_passes._stored import reduction_axis
from onnxcomp_passes._views import WeightView

__all__ = [
    "Curve",
    "Pattern",
    "as_matrices",
    "ends",
    "from_matrices",
    "lamp_curve",
    "lowest",
    "lowest_by_output",
    "shares",
    "wanda_scores",
]

Array = np.ndarray[Any, Any]

KNOTS = 4096
"""Quantiles by which a layer's scores are remembered while the other layers' are looked at."""


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of each `group` weights along the inputs at most `kept` are not zero.

    Example:
        >>> Pattern.parse("2:4")
        Pattern(kept=2, group=4)
    """

    kept: int
    group: int

    @staticmethod
    def parse(text: str) -> Pattern | None:
        """The pattern that a text such as "2:4" stands for, or None."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return Pattern(int(found[1]), int(found[2]))

    def mask(self, scores: Array) -> Array:
        """Which weights go, along axis 0: the lowest scores of each group; a short last group keeps its share.

        Args:
            scores: Shape (inputs, ...).
        """
        size = scores.shape[0]
        padded = np.full((-(-size // self.group) * self.group, *scores.shape[1:]), np.inf)
        padded[:size] = scores
        groups = padded.reshape(-1, self.group, *scores.shape[1:])
        order = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1, kind="stable")
        present = np.minimum(self.group, size - self.group * np.arange(len(groups)))
        kept = np.ceil(present * self.kept / self.group)
        goes = order < (present - kept).reshape(-1, *[1] * scores.ndim)
        return np.asarray(goes.reshape(padded.shape)[:size])


def as_matrices(view: WeightView, value: Array) -> Array:
    """A weight as matrices, shape (groups, inputs, outputs), inputs being what products are summed over.

    Weights of other operators than Conv, Gemm and MatMul have their reduction axis first and all others behind it.
    """
    node = view.node
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        return np.ascontiguousarray(value.reshape(groups, value.shape[0] // groups, -1).transpose(0, 2, 1))
    if value.ndim == 2 and node.op in {"Gemm", "MatMul", "MatMulInteger"}:
        return value[None] if reduction_axis(node, view.index, 2) == 0 else value.T[None]
    axis = reduction_axis(node, view.index, value.ndim)
    moved = value.reshape(1, -1) if axis is None else np.moveaxis(value, axis, 0)
    return moved.reshape(1, moved.shape[0], -1)


def from_matrices(view: WeightView, matrices: Array) -> Array:
    """The inverse of `as_matrices`."""
    node, shape = view.node, view.shape
    if node.op == "Conv":
        return np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(shape)
    if len(shape) == 2 and node.op in {"Gemm", "MatMul", "MatMulInteger"}:
        return np.asarray(matrices[0] if reduction_axis(node, view.index, 2) == 0 else matrices[0].T)
    axis = reduction_axis(node, view.index, len(shape))
    if axis is None:
        return matrices.reshape(shape)
    moved = (shape[axis], *(size for index, size in enumerate(shape) if index != axis))
    return np.moveaxis(matrices.reshape(moved), 0, axis)


def wanda_scores(matrices: Array, products: Array) -> Array:
    """|weight| times the norm of its input.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, section 3.

    Args:
        matrices: Shape (groups, inputs, outputs).
        products: X^T X, shape (groups, inputs, inputs).
    """
    norms = np.sqrt(np.maximum(np.diagonal(products, axis1=1, axis2=2), 0))
    return np.asarray(np.abs(matrices) * norms[:, :, None])


@dataclass(frozen=True)
class Curve:
    """How a layer's scores are spread: `scores` rises with the share of its weights that lie below.

    Attributes:
        elements: Weights of the layer.
        scores: At evenly spaced shares from 0 to 1.
    """

    elements: int
    scores: Array

    def share_below(self, threshold: float) -> float:
        """The share of the layer's weights that score less."""
        return float(np.interp(threshold, self.scores, np.linspace(0, 1, len(self.scores))))


def lamp_curve(scores: Array) -> Curve:
    """Scores that compare between layers: a weight's square over the squares of all that are no smaller.

    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR, arXiv 2010.07611, section 2.2.

    Args:
        scores: Of one layer, any shape, none negative.
    """
    squares = np.sort(np.square(scores, dtype=np.float64), axis=None)
    total = np.cumsum(squares[::-1])[::-1]
    lamp = np.divide(squares, total, out=np.zeros_like(squares), where=total > 0)
    lamp = np.maximum.accumulate(lamp)  # equal weights: the same score
    places = np.linspace(0, lamp.size - 1, min(KNOTS, lamp.size)).astype(np.int64)
    return Curve(int(lamp.size), lamp[places])


def shares(curves: Mapping[str, Curve], sparsity: float) -> dict[str, float]:
    """The share of zeros for each layer, with one threshold over all of them.

    Args:
        curves: By layer.
        sparsity: Of all layers together.

    Example:
        >>> even, steep = lamp_curve(np.ones(100)), lamp_curve(np.arange(100.0))
        >>> found = shares({"even": even, "steep": steep}, 0.5)
        >>> found["even"] < found["steep"], round(sum(found.values()), 2)
        (True, 1.0)
    """
    total = sum(curve.elements for curve in curves.values())
    levels = np.unique(np.concatenate([curve.scores for curve in curves.values()]))
    low, high = 0, len(levels) - 1
    while low < high:  # the lowest threshold that is enough
        middle = (low + high) // 2
        below = sum(curve.share_below(levels[middle]) * curve.elements for curve in curves.values())
        low, high = (low, middle) if below >= sparsity * total else (middle + 1, high)
    found = {name: curve.share_below(levels[low]) for name, curve in curves.items()}
    return _to_the_sum(found, {name: curve.elements for name, curve in curves.items()}, sparsity * total)


def _to_the_sum(found: dict[str, float], elements: Mapping[str, int], wanted: float) -> dict[str, float]:
    """Scale the shares so that they add up: ties and the steps between knots leave a rest."""
    below = sum(share * elements[name] for name, share in found.items())
    if below > wanted:
        return {name: share * wanted / below for name, share in found.items()}
    rest = sum((1 - share) * elements[name] for name, share in found.items())
    part = (wanted - below) / rest if rest > 0 else 0.0
    return {name: share + (1 - share) * part for name, share in found.items()}


def lowest(scores: Array, count: int) -> Array:
    """Which of the scores are the `count` lowest, as a mask of their shape; ties by place."""
    goes = np.zeros(scores.size, bool)
    if count > 0:
        flat = scores.reshape(-1)
        goes[np.argpartition(flat, min(count, flat.size) - 1)[:count]] = True
    return goes.reshape(scores.shape)


def lowest_by_output(scores: Array, share: float) -> Array:
    """Which scores are the lowest within each output, the same count in all; what that leaves over is spread.

    The rest of fewer than one for each output falls to those that give up least for one more.

    Args:
        scores: Shape (groups, inputs, outputs).
        share: Of them all.

    Example:
        >>> lowest_by_output(np.array([[[1.0, 5.0], [2.0, 6.0], [3.0, 4.0]]]), 0.5).astype(int).tolist()
        [[[1, 0], [1, 0], [0, 1]]]
    """
    order = np.argsort(scores, axis=1, kind="stable")
    count = int(share * scores.shape[1])
    rest = round(share * scores.size) - count * scores.shape[0] * scores.shape[2]
    goes = np.zeros(scores.shape, bool)
    np.put_along_axis(goes, order[:, :count], True, axis=1)
    if rest > 0:
        following = order[:, count : count + 1]
        np.put_along_axis(goes, following, lowest(np.take_along_axis(scores, following, axis=1), rest), axis=1)
    return goes


def ends(views: Sequence[WeightView]) -> set[str]:
    """The first and the last layer of the model, in the order of the nodes; tables before the first are none."""
    layers = [view.name for view in views if view.node.op != "Gather"]
    return {layers[0], layers[-1]} if layers else set()
