"""A Conv as several thin ones in a row: finding their weights, and what these amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from onnxcomp_passes._conv_forms import (
    FORMS,
    factor_shapes,
    full_ranks,
    has_form,
    own_axes,
    ranks_for,
    useful_ranks,
)
from onnxcomp_passes._cp import cp_factors

__all__ = ["FORMS", "ConvFactors", "factor", "factor_shapes", "full_ranks", "has_form", "ranks_for"]

Array = np.ndarray[Any, Any]

BALANCING = 100
"""Rounds of balancing at most; each leaves about half of what is out of balance in a chain of four."""

BALANCED = 1e-6
"""The relative change that ends it: float32 weights are not known much better."""


@dataclass(frozen=True)
class ConvFactors:
    """The weights of consecutive Convs that stand for one, whose bias is that of the last of them.

    Attributes:
        form: One of `FORMS`.
        group: Of the Conv that they stand for.
        weights: As a Conv has them, (outputs, inputs of a group, *kernel), float32, first to last.

    Example:
        >>> thin = factor(np.ones((4, 6, 3, 3), np.float32), 1, "spatial", (1,))
        >>> [weight.shape for weight in thin.weights], thin.parameters, thin.dense().mean().round(4).item()
        ([(1, 6, 3, 1), (4, 1, 1, 3)], 30, 1.0)
    """

    form: str
    group: int
    weights: tuple[Array, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of the Conv that they stand for."""
        return tuple(max(sizes) for sizes in zip(*(weight.shape[2:] for weight in self.weights), strict=True))

    @property
    def parameters(self) -> int:
        """How many numbers the weights have together."""
        return sum(weight.size for weight in self.weights)

    def groups(self) -> tuple[int, ...]:
        """The attribute `group` of each Conv."""
        depthwise = range(1, len(self.weights) - 1) if self.form == "cp" else ()
        return tuple(len(w) if index in depthwise else self.group for index, w in enumerate(self.weights))

    def attributes(self, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All attributes of each Conv.

        Args:
            attrs: Those of the Conv that they stand for; its kernel and groups are known.
        """
        axes, mode, made = len(self.kernel), attrs.get("auto_pad", "NOTSET"), []
        pads = attrs.get("pads", [0] * 2 * axes)
        for weight, group, own in zip(self.weights, self.groups(), own_axes(self.form, self.kernel), strict=True):
            each: dict[str, Any] = {"group": group, "kernel_shape": list(weight.shape[2:])}
            for name in ("strides", "dilations"):
                values = attrs.get(name, [1] * axes)
                each[name] = [int(values[axis]) if axis in own else 1 for axis in range(axes)]
            if mode == "NOTSET":
                each["pads"] = [int(pad) if place % axes in own else 0 for place, pad in enumerate(pads)]
            else:  # adds nothing along the other axes, where kernel and stride are 1
                each["auto_pad"] = mode
            made.append(each)
        return made

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Multiply-accumulates of one sample.

        Args:
            inputs: Spatial sizes of the input, not padded.
            outputs: Spatial sizes of the output.
        """
        sizes, total = list(inputs), 0
        for weight, own in zip(self.weights, own_axes(self.form, self.kernel), strict=True):
            for axis in own:
                sizes[axis] = outputs[axis]
            total += weight.size * math.prod(sizes)
        return total

    def dense(self) -> Array:
        """The weight of the one Conv that they amount to, shape (n, c / g, *kernel), float32."""
        made = reduce(_composed, self._matrices())
        return made.reshape(-1, *made.shape[2:]).astype(np.float32)

    def features(self) -> Array:
        """What a window is multiplied with for the values that the last Conv multiplies.

        Returns:
            Shape (g, inputs, features), float64: inputs in the order of `dense().reshape(n, -1)`, features in that of
            `last`, so that `features() @ last()` is the dense weight.
        """
        *most, last = self._matrices()
        inputs, kernel = last.shape[2], last.shape[3:]
        taken = np.eye(inputs * math.prod(kernel)).reshape(1, -1, inputs, *kernel)
        made = reduce(_composed, [*most, taken])
        return np.ascontiguousarray(made.reshape(*made.shape[:2], -1).swapaxes(1, 2))

    def last(self) -> Array:
        """The last weight as matrices, shape (g, features, n / g), float32."""
        weight = self.weights[-1]
        return np.ascontiguousarray(weight.reshape(self.group, len(weight) // self.group, -1).swapaxes(1, 2))

    def with_last(self, last: Array) -> ConvFactors:
        """The same with another last weight, shape (g, features, n / g); see `balanced`."""
        weight = np.ascontiguousarray(last.swapaxes(1, 2), np.float32).reshape(self.weights[-1].shape)
        return replace(self, weights=(*self.weights[:-1], weight))

    def balanced(self) -> ConvFactors:
        """The same dense weight, each channel between two Convs scaled so that both sides of it have one L2 norm.

        Quantization has one scale for a tensor, and one for each output of a weight: channels of unlike norms would not
        all be resolved. A channel that is zero on one side becomes so on the other.

        It is done in turn until little changes, as in Nagel et al. 2019, "Data-Free Quantization Through Weight
        Equalization and Bias Correction", arXiv 1906.04721, section 4.1, but with another norm.
        """
        weights, groups = [weight.astype(np.float64) for weight in self.weights], self.groups()
        norms = [np.sqrt(np.square(weight).reshape(*weight.shape[:2], -1).sum(axis=2)) for weight in weights]
        for index, scale in enumerate(_balancing(norms, groups)):
            _scale(weights, groups, index, scale)
        return replace(self, weights=tuple(weight.astype(np.float32) for weight in weights))

    def _matrices(self) -> list[Array]:
        pairs = zip(self.weights, self.groups(), strict=True)
        return [_by_group(weight.astype(np.float64), own, self.group) for weight, own in pairs]


def factor(weight: Array, group: int, form: str, ranks: Sequence[int]) -> ConvFactors:
    """Weights near to that of a Conv, balanced; the best of these ranks with "svd" and "spatial".

    "tucker" is found by higher-order orthogonal iteration, with TensorLy, which the extra `low-rank` brings; "cp" by
    alternating least squares, see `cp_factors`. Either is a local minimum.

    Args:
        weight: Shape (n, c / g, *kernel), all finite.
        group: g.
        form: One of `FORMS`, one that the Conv has.
        ranks: One, with "tucker" two; more than the full ones are cut to these.

    Raises:
        ValueError: If the Conv does not have the form, a rank is less than 1, or a weight is not finite.
        ModuleNotFoundError: If TensorLy is missing, with "tucker".
    """
    if not has_form(form, weight.shape, group):
        text = f"a Conv with weight {weight.shape} and {group} groups does not have the form {form}"
        raise ValueError(text)
    if min(ranks) < 1 or not np.isfinite(weight).all():
        text = "ranks must be positive and weights finite"
        raise ValueError(text)
    ranks = useful_ranks(form, weight.shape, group, ranks)
    blocks = weight.astype(np.float64).reshape(group, -1, *weight.shape[1:])
    parts = [_factored(block, form, ranks) for block in blocks]
    stacked = tuple(np.concatenate(each) for each in zip(*parts, strict=True))
    return ConvFactors(form, group, stacked).balanced()


def _factored(block: Array, form: str, ranks: tuple[int, ...]) -> list[Array]:
    """The weights for one group, not balanced."""
    shapes = factor_shapes(form, block.shape, 1, ranks)
    size = np.abs(block).max()
    if size == 0:
        return [np.zeros(shape) for shape in shapes]
    *most, last = _METHODS[form](block / size, ranks)  # squares of very small weights would be lost
    return [each.reshape(shape) for each, shape in zip([*most, last * size], shapes, strict=True)]


def _leading(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The two factors of the nearest matrix of this rank, shapes (rows, rank) and (rank, columns)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def _svd(block: Array, ranks: tuple[int, ...]) -> list[Array]:
    left, right = _leading(block.reshape(len(block), -1), ranks[0])
    return [right, left]


def _spatial(block: Array, ranks: tuple[int, ...]) -> list[Array]:
    outputs, inputs, height, width = block.shape
    left, right = _leading(block.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width), ranks[0])
    return [left.T, right.reshape(-1, outputs, width).swapaxes(0, 1)]


def _tucker(block: Array, ranks: tuple[int, ...]) -> list[Array]:
    from tensorly.decomposition import partial_tucker

    (core, (left, right)), _ = partial_tucker(block, rank=ranks[::-1], modes=[0, 1], init="svd", random_state=0)
    return [right.T, core, left]


def _cp(block: Array, ranks: tuple[int, ...]) -> list[Array]:
    sizes = [size for size in block.shape[2:] if size > 1]
    left, right, *along = cp_factors(block.reshape(*block.shape[:2], *sizes), ranks[0])
    return [right.T, *(each.T for each in along), left]


_METHODS = {"svd": _svd, "tucker": _tucker, "spatial": _spatial, "cp": _cp}


def _by_group(weight: Array, group: int, outer: int) -> Array:
    """A weight with `group` groups as one with `outer`, shape (outer, outputs, inputs, *kernel)."""
    each = group // outer
    parts = weight.reshape(outer, each, -1, *weight.shape[1:])
    if each == 1:
        return parts[:, 0]
    outputs, inputs, *kernel = parts.shape[2:]
    made = np.zeros((outer, each, outputs, each, inputs, *kernel))
    made[:, np.arange(each), :, np.arange(each)] = parts.swapaxes(0, 1)
    return made.reshape(outer, each * outputs, each * inputs, *kernel)


def _composed(first: Array, second: Array) -> Array:
    """Two Convs as one; along each axis only one of them has a kernel, so that it is an outer product.

    Args:
        first: Shape (groups, between, inputs, *kernel).
        second: Shape (groups, outputs, between, *kernel).
    """
    one, other = (np.moveaxis(each, (1, 2), (-2, -1)) for each in (first, second))
    return np.moveaxis(other @ one, (-2, -1), (1, 2))


def _balancing(norms: Sequence[Array], groups: Sequence[int]) -> list[Array]:
    """What the channels after each Conv but the last are to be multiplied with; 0 where a side of them is zero.

    Args:
        norms: For each Conv those of its kernels, shape (outputs, inputs of a group).
        groups: Of each Conv.
    """
    norms = list(norms)
    totals = [np.ones(len(each)) for each in norms[:-1]]
    for _ in range(BALANCING):
        change = 0.0
        for index, total in enumerate(totals):
            made = np.linalg.norm(norms[index], axis=1)
            following = norms[index + 1]
            read = np.linalg.norm(following.reshape(groups[index + 1], -1, following.shape[1]), axis=1).reshape(-1)
            there = (made > 0) & (read > 0)
            scale = np.sqrt(np.divide(read, made, out=np.zeros_like(made), where=there))
            _scale(norms, groups, index, scale)
            total *= scale
            change = max(change, float(np.abs(scale[there] - 1).max(initial=0)))
        if change < BALANCED:
            break
    return totals


def _scale(weights: list[Array], groups: Sequence[int], index: int, scale: Array) -> None:
    """Multiply the channels that one Conv makes, and divide what the next one reads them with."""
    weight, following = weights[index], weights[index + 1]
    weights[index] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    parts = following.reshape(groups[index + 1], -1, *following.shape[1:])
    inverse = inverse.reshape(groups[index + 1], 1, -1, *[1] * (following.ndim - 2))
    weights[index + 1] = (parts * inverse).reshape(following.shape)
