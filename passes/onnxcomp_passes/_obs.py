"""Pruning that makes up for what it removes in the weights that stay, by the statistics of a layer's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxcomp_passes._gptq import inverse_factor
from onnxcomp_passes._pruning import Pattern, lowest

__all__ = ["compensated"]

Array = np.ndarray[Any, Any]

BLOCK = 128
"""Rows whose mask is chosen together: the authors' setting."""


def compensated(
    matrix: Array,
    products: Array,
    share: float | Pattern,
    round_row: Callable[[Array, int], Array] | None = None,
) -> Array | None:
    """Prune a matrix row by row, each row's loss taken up by the rows after it.

    Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv
    2301.00774, sections 3.2 to 3.5: the mask of each block of rows by w^2 / [H^-1]_ii, rows in the order of falling
    input energy (in their own order for N:M), rounding and pruning in one.

    Args:
        matrix: Shape (inputs, outputs).
        products: X^T X of the layer's inputs, shape (inputs, inputs).
        share: Of zeros; or N:M along the inputs.
        round_row: Rounds a row to the values that it may have, given its place; None: any.

    Returns:
        The pruned matrix, float32; None where the data say nothing at all.
    """
    rows = len(matrix)
    pattern = share if isinstance(share, Pattern) else None
    energy = np.diag(products)
    order = np.arange(rows) if pattern else np.argsort(-energy, kind="stable")
    factor = inverse_factor(products[np.ix_(order, order)])
    if factor is None:
        return None
    left = matrix[order].astype(np.float32)
    result = np.zeros_like(left)
    block = BLOCK if pattern is None else max(1, BLOCK // pattern.group) * pattern.group
    goes = _shares_of_blocks(matrix[order], factor, share, block)
    for start in range(0, rows, block):
        end = min(start + block, rows)
        scores = np.square(left[start:end] / np.diag(factor)[start:end, None])
        mask = pattern.mask(scores) if pattern else lowest(scores, goes[start // block])
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for row in range(start, end):
            kept = left[row] if round_row is None else round_row(left[row], int(order[row]))
            result[row] = np.where(mask[row - start], np.float32(0), kept)
            error = (left[row] - result[row]) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], error)
            errors[row - start] = error
        left[end:] -= factor[start:end, end:].T @ errors
    restored = np.empty_like(result)
    restored[order] = result
    return restored


def _shares_of_blocks(ordered: Array, factor: Array, share: float | Pattern, block: int) -> list[int]:
    """How many weights go from each block of rows: as many as a ranking over the whole matrix takes from it.

    A fixed share of each block would prune rows of much energy as hard as those of next to none.
    """
    if isinstance(share, Pattern):
        return []
    scores = np.square(ordered / np.diag(factor)[:, None])
    mask = lowest(scores, round(share * ordered.size))
    return [int(np.count_nonzero(mask[start : start + block])) for start in range(0, len(ordered), block)]
