"""The forms that a Conv may take as several thin ones in a row: what they are, their shapes and their ranks."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

__all__ = ["FORMS", "factor_shapes", "full_ranks", "has_form", "own_axes", "ranks_for", "useful_ranks"]

FORMS = ("svd", "tucker", "spatial", "cp")
"""What becomes of a Conv with the weight (n, c / g, *kernel) and g groups:

- svd: the same with fewer outputs, then 1x1. Zhang et al. 2015, "Accelerating Very Deep Convolutional Networks for
  Classification and Detection", arXiv 1505.06798, section 3.1. A 1x1 Conv becomes the product of two matrices.
- tucker: 1x1, the same with fewer inputs and outputs, 1x1. Kim et al. 2016, "Compression of Deep Convolutional Neural
  Networks for Fast and Low Power Mobile Applications", arXiv 1511.06530, section 3 (Tucker-2).
- spatial: down the first of two axes, then along the second. Jaderberg et al. 2014, "Speeding up Convolutional Neural
  Networks with Low Rank Expansions", arXiv 1405.3866, section 2.1, scheme 2.
- cp: 1x1, a depthwise Conv along each axis, 1x1. Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using
  Fine-tuned CP-Decomposition", arXiv 1412.6553, section 3.2.

Groups are factored apart, with the same ranks. Padding is with zeros, which a Conv without bias makes zeros of, so that
the borders come out right as long as only the last one has a bias.
"""


def own_axes(form: str, kernel: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The spatial axes that each consecutive Conv moves along; the others do not see them.

    Example:
        >>> own_axes("cp", (3, 1, 3))
        ((), (0, 1), (2,), ())
    """
    every = tuple(range(len(kernel)))
    if form == "svd":
        return every, ()
    if form == "tucker":
        return (), every, ()
    if form == "spatial":
        return (0,), (1,)
    wide = [axis for axis in every if kernel[axis] > 1]
    first = tuple(axis for axis in every if axis == wide[0] or kernel[axis] == 1)  # strides and pads need a Conv too
    return (), first, *((axis,) for axis in wide[1:]), ()


def factor_shapes(form: str, shape: Sequence[int], group: int, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes of the weights of consecutive Convs.

    Args:
        form: One of `FORMS`.
        shape: Of the Conv's weight.
        group: Its groups.
        ranks: Of each group: the outputs of the first Conv, with "tucker" also those of the second.
    """
    outputs, inputs, *kernel = shape
    kernels = [tuple(k if axis in own else 1 for axis, k in enumerate(kernel)) for own in own_axes(form, kernel)]
    first = (group * ranks[0], inputs, *kernels[0])
    last = (outputs, ranks[-1], *kernels[-1])
    between = [(group * ranks[-1], ranks[0] if form == "tucker" else 1, *each) for each in kernels[1:-1]]
    return [first, *between, last]


def full_ranks(form: str, shape: Sequence[int], group: int) -> tuple[int, ...]:
    """Ranks at which any weight of this shape has the form exactly; with "cp" fewer may do, but finding them is hard.

    Example:
        >>> [full_ranks(form, (8, 4, 3, 3), 1) for form in FORMS]
        [(8,), (4, 8), (12,), (36,)]
    """
    outputs, inputs, *kernel = shape[0] // group, *shape[1:]
    size = math.prod(kernel)
    if form == "svd":
        return (min(outputs, inputs * size),)
    if form == "tucker":
        return min(inputs, outputs * size), min(outputs, inputs * size)
    if form == "spatial":
        return (min(inputs * kernel[0], outputs * kernel[1]),)
    return (outputs * inputs * size // max(outputs, inputs, *kernel),)


def useful_ranks(form: str, shape: Sequence[int], group: int, ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks without what nothing is gained by: no more than the full ones, nor than their neighbours can fill."""
    ranks = [min(pair) for pair in zip(ranks, full_ranks(form, shape, group), strict=True)]
    if form == "tucker":
        first, second = ranks
        size = math.prod(shape[2:])
        return min(first, second * size), min(second, first * size)
    return tuple(ranks)


def has_form(form: str, shape: Sequence[int], group: int) -> bool:
    """Whether a Conv has the form, and with ranks of 1 fewer parameters in it than it has now."""
    kernel = shape[2:]
    if not kernel or (form in {"tucker", "cp"} and max(kernel) == 1):
        return False
    if form == "spatial" and (len(kernel) != 2 or min(kernel) == 1):
        return False
    return _parameters(form, shape, group, (1, 1) if form == "tucker" else (1,)) < math.prod(shape)


def ranks_for(
    form: str, shape: Sequence[int], group: int, parameters: int, multiple: int = 1
) -> tuple[int, ...] | None:
    """The largest ranks with so many parameters at most; the two of "tucker" are as inputs and outputs are.

    Args:
        form: One of `FORMS`.
        shape: Of the Conv's weight, one that `has_form`.
        group: Its groups.
        parameters: Of all weights together.
        multiple: Of which ranks are, rounded down, unless they are less than one and a half.

    Returns:
        The ranks, or None where even those of 1 have more parameters.

    Example:
        >>> ranks_for("tucker", (64, 32, 3, 3), 1, 9000), ranks_for("tucker", (64, 32, 3, 3), 1, 9000, 8)
        ((18, 37), (16, 32))
    """
    sides = (shape[1], shape[0] // group)

    def ranks(size: int) -> tuple[int, ...]:
        found = [max(1, size * side // max(sides)) for side in sides] if form == "tucker" else [size]
        return useful_ranks(form, shape, group, found)

    most = max(sides) if form == "tucker" else max(full_ranks(form, shape, group))
    sizes = range(1, most + 1)
    size = bisect.bisect_right(sizes, parameters, key=lambda each: _parameters(form, shape, group, ranks(each)))
    if size == 0:
        return None
    return tuple(rank - rank % multiple if rank >= 1.5 * multiple else rank for rank in ranks(size))


def _parameters(form: str, shape: Sequence[int], group: int, ranks: Sequence[int]) -> int:
    return sum(map(math.prod, factor_shapes(form, shape, group, ranks)))
