"""What a layer's weight looks like before and after: its histogram, its factors, and its singular values."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.weight_values import WeightValues, sampled_places

__all__ = ["factors", "histogram", "ranks", "singular_values"]

Array = np.ndarray[Any, Any]

BINS = 28
"""Enough to see a shape, codes of 4 bits and less as combs, and to fit a narrow screen."""

TAIL = 0.001
"""The share of values on either side that is not looked at for where bins end."""

MOST_VALUES = 1 << 20
"""Of a weight; of a larger one so many are drawn. A bin that holds 1% of a weight is off by 1% of that at most."""

SHOWN_VALUES = 64
"""Singular values that are told of a layer."""

LARGEST_SIDE = 1024
"""Singular values take a second for a matrix whose shorter side is this; of larger ones they are not looked for."""

ROWS = 4096
"""Rows of a matrix that are looked at together, so that it is never held in float64 as a whole."""

BETWEEN = frozenset({"Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear"})
"""What may stand between two factors; and a Mul that makes floats of an integer product."""

PRODUCTS = frozenset({"Gemm", "MatMul", "MatMulInteger"})


def histogram(before: WeightValues | None, after: Sequence[WeightValues]) -> dict[str, Any] | None:
    """Count the values of a weight in bins that both models share.

    Args:
        before: The original's.
        after: The new model's: one, or the factors whose product took its place.

    Returns:
        `low`, `high`, and for each model the counts of bins of one width between them and the number of values that
        were looked at; values beyond are in the first or the last bin, and `least` and `most` are the extremes. What is
        infinite or no number is in no bin. None where neither can be read.
    """
    sides = {"before": _values([before] if before else []), "after": _values(after, before.shape if before else None)}
    known = {side: values[np.isfinite(values)] for side, values in sides.items() if values is not None and values.size}
    known = {side: values for side, values in known.items() if values.size}
    if not known:
        return None
    edges = [_edges(values) for values in known.values()]
    low, high = min(edge[0] for edge in edges), max(edge[1] for edge in edges)
    if low == high:  # such as a weight of ones: a bin around it
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    counts: dict[str, Any] = {
        "low": low,
        "high": high,
        "least": min(float(values.min()) for values in known.values()),
        "most": max(float(values.max()) for values in known.values()),
    }
    for side in sides:
        values = known.get(side)
        inside = None if values is None else np.clip(values, low, high)
        counts[side] = None if inside is None else np.histogram(inside, BINS, (low, high))[0].tolist()
        counts[f"{side}_values"] = 0 if values is None else int(values.size)
    return counts


def _edges(values: Array) -> tuple[float, float]:
    """Where bins begin and end: at the extremes, or nearer where few values lie so far out that none could be seen."""
    low, high = (float(edge) for edge in np.quantile(values, (TAIL, 1 - TAIL)))
    room = (high - low) / 2
    return max(float(values.min()), low - room), min(float(values.max()), high + room)


def _values(parts: Sequence[WeightValues], shape: tuple[int, ...] | None = None) -> Array | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0].read(sampled_places(parts[0].size, MOST_VALUES))
    return _product(parts, shape)


# --- factors ----------------------------------------------------------------------------------------------------------


def factors(weight: WeightValues, known: Mapping[int, WeightValues], new: Container[str]) -> list[WeightValues]:
    """The factors that a layer's weight was split into, in the order in which they are multiplied with the input.

    Args:
        weight: The weight of the layer that gives the result.
        known: The weights of the model, by the id of the node that uses them.
        new: Names of nodes that the original does not have.

    Returns:
        The factors, `weight` the last; it alone where it was not split.
    """
    chain = [weight]
    while (maker := _maker_of_input(chain[0])) is not None:
        other = known.get(id(maker))
        if other is None or not _are_alike(other, weight) or (maker.name or maker.outputs[0].name) not in new:
            break
        chain.insert(0, other)
    return chain


def _maker_of_input(weight: WeightValues) -> gs.Node | None:
    """The node that computes what a weight is multiplied with, past those that only change its type."""
    node = weight.node
    place = 1 if _is_left(weight) else 0
    tensor = node.inputs[place] if place < len(node.inputs) else None
    while tensor is not None and len(tensor.inputs) == 1:
        maker = tensor.inputs[0]
        if maker.op == "Mul":
            tensor = next((one for one in maker.inputs if len(one.inputs) == 1 and one.inputs[0].op == "Cast"), None)
        elif maker.op in BETWEEN:
            tensor = maker.inputs[0] if maker.inputs else None
        else:
            return maker
    return None


def _are_alike(one: WeightValues, other: WeightValues) -> bool:
    """Whether two weights may be factors of one."""
    ops = {one.node.op, other.node.op}
    return (len(ops) == 1 or ops <= PRODUCTS) and min(len(one.shape), len(other.shape)) > 1


def _is_left(weight: WeightValues) -> bool:
    """Whether a matrix product has its weight on the left."""
    node = weight.node
    return node.op in {"MatMul", "Gemm"} and not _leads_to(node.inputs[1], weight)


def _leads_to(tensor: gs.Tensor, weight: WeightValues) -> list[gs.Tensor]:
    """The tensors on the way from a weight to the input that it becomes; empty where it does not become it."""
    way = [tensor]
    for _ in range(8):  # a decoding is a handful of nodes at most
        if way[-1].name == weight.held.name or way[-1] is weight.held.constant:
            return way
        if len(way[-1].inputs) != 1 or not way[-1].inputs[0].inputs:
            break
        way.append(way[-1].inputs[0].inputs[0])
    return []


def ranks(parts: Sequence[WeightValues]) -> list[int]:
    """The ranks of a chain of factors: how many values each hands to the next; one of a CP form, whose are alike."""
    found = [_outputs(part) for part in parts[:-1]]
    return found[:1] if len(parts) > 3 else found


def _outputs(part: WeightValues) -> int:
    shape, node = part.shape, part.node
    if node.op == "Conv":
        return shape[0]
    if _is_left(part):
        return shape[-1] if node.attrs.get("transA", 0) else shape[-2]
    return shape[-2] if node.attrs.get("transB", 0) else shape[-1]


def _product(parts: Sequence[WeightValues], shape: tuple[int, ...] | None) -> Array | None:
    """What factors amount to, flat; None where that is not a weight of the original's shape."""
    matrices = [matrix for part in parts if (matrix := _laid_out(part)) is not None]
    if len(matrices) < len(parts) or shape is None:
        return None
    if parts[0].node.op == "Conv":
        return _conv_product(matrices, shape)
    if len(matrices) != 2 or len(shape) != 2:
        return None
    first, second = matrices
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] * second.shape[1] != math.prod(shape):
        return None
    rows = sampled_places(first.shape[0], max(1, MOST_VALUES // second.shape[1]))
    return np.asarray(((first if rows is None else first[rows]) @ second).reshape(-1))


def _laid_out(part: WeightValues) -> Array | None:
    """A factor as (inputs, outputs), where it is a matrix."""
    values = part.read()
    if values is None:
        return None
    values, node = values.reshape(part.shape), part.node
    left = _is_left(part)
    flipped = bool(node.attrs.get("transA" if left else "transB", 0))
    return values.swapaxes(-1, -2) if node.op != "Conv" and values.ndim > 1 and left != flipped else values


def _conv_product(parts: Sequence[Array], shape: tuple[int, ...]) -> Array | None:
    """The kernel of a chain of convolutions none of which spread along an axis that another has spread along."""
    whole = parts[0]
    for part in parts[1:]:
        if part.ndim != 4 or whole.ndim != 4 or any(a > 1 and b > 1 for a, b in zip(
            part.shape[2:], whole.shape[2:], strict=True)):  # fmt: skip
            return None
        if part.shape[1] == whole.shape[0]:
            whole = np.einsum("orab,rcde->ocadbe", part, whole, optimize=True)
        elif part.shape[1] == 1 and part.shape[0] == whole.shape[0]:
            whole = np.einsum("rab,rcde->rcadbe", part[:, 0], whole)  # a filter of its own for each channel
        else:
            return None
        a, b = whole.shape[2] * whole.shape[3], whole.shape[4] * whole.shape[5]
        whole = whole.reshape(*whole.shape[:2], a, b)
    return whole.reshape(-1) if whole.shape == shape else None


# --- singular values --------------------------------------------------------------------------------------------------


def singular_values(before: WeightValues | None, parts: Sequence[WeightValues]) -> dict[str, Any] | None:
    """The singular values of a weight that was split into two factors.

    Args:
        before: The original weight.
        parts: Its factors.

    Returns:
        `kept`: how many the factors have room for; `total`: how many there are; `values`: some of them as [number,
        value], the largest first, and among them the one numbered `kept`. None where there is no one matrix that the
        factors stand for, or it is too large.
    """
    if before is None or len(parts) != 2:
        return None
    matrix = _as_matrix(before, parts)
    if matrix is None or min(matrix.shape) > LARGEST_SIDE:
        return None
    values = _singular(matrix)
    if not np.isfinite(values).all():
        return None
    kept, total = ranks(parts)[0], len(values)
    shown = total if total <= SHOWN_VALUES else SHOWN_VALUES - 1
    numbers = {*np.linspace(1, total, shown).round().astype(int).tolist(), min(kept, total)}
    return {
        "kept": kept,
        "total": total,
        "values": [[number, float(values[number - 1])] for number in sorted(numbers)],
    }


def _as_matrix(before: WeightValues, parts: Sequence[WeightValues]) -> Array | None:
    """The matrix whose rank was cut: of a Conv that of its outputs, or of one kernel axis against the other."""
    shape, node = before.shape, before.node
    if len(shape) < 2 or int(node.attrs.get("group", 1)) != 1 or (node.op != "Conv" and len(shape) != 2):
        return None
    if node.op == "Conv" and len(shape) != 4:
        return None
    if min(shape[0], math.prod(shape[1:])) > LARGEST_SIDE:
        return None
    flat = before.read()
    if flat is None:
        return None
    values = flat.reshape(shape)
    if node.op != "Conv" or all(size == 1 for size in parts[-1].shape[2:]):
        return values.reshape(shape[0], -1)
    return values.transpose(1, 2, 0, 3).reshape(shape[1] * shape[2], -1)


def _singular(matrix: Array) -> Array:
    """Singular values, the largest first, by way of the smaller square: what is below a 1e-7th of the largest is 0."""
    wide = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    square = np.zeros((wide.shape[1], wide.shape[1]))
    for start in range(0, wide.shape[0], ROWS):
        block = wide[start : start + ROWS].astype(np.float64)
        square += block.T @ block
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(square)[::-1], 0.0)))
