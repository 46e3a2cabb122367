"""Rounding that makes up for its error in the weights not rounded yet, by the statistics of a layer's input."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp_passes._codes import Codes, Grouping, Width, nearest

__all__ = ["InputProducts", "gptq", "output_error"]

Array = np.ndarray[Any, Any]

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: the authors' setting."""

BLOCK = 128
"""Rows after which the rows further on are brought up to date, in one matrix product."""

DAMPING_TRIES = 6


class InputProducts:
    """Sums X^T X over many runs, in the memory of one square matrix. Runs in the worker.

    Example:
        >>> watch = InputProducts()
        >>> watch.update(np.array([[1.0, 2.0]], np.float32)); watch.update(np.array([[[3.0, 0.0]]], np.float32))
        >>> watch.total.tolist(), watch.rows
        ([[10.0, 2.0], [2.0, 4.0]], 2)
    """

    def __init__(self) -> None:
        self.total = np.zeros((0, 0))
        self.rows = 0

    def update(self, array: Array) -> None:
        """Take in a layer's input, shape (..., features); rows with NaN or infinity are left out."""
        rows = np.asarray(array, np.float32).reshape(-1, array.shape[-1])
        finite = np.isfinite(rows).all(axis=1)
        rows = rows if finite.all() else rows[finite]
        if not self.total.size:
            self.total = np.zeros((rows.shape[1], rows.shape[1]))
        self.total += rows.T @ rows
        self.rows += len(rows)


def gptq(weight: Array, grouping: Grouping, width: Width, products: Array) -> Codes:
    """Round a matrix row by row, each row's error taken up by the rows after it.

    Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv 2210.17323, section 3: rows in the order of falling input energy, updates in blocks of 128 rows, the inverse
    Hessian by Cholesky with 1% damping. Scales are those of `nearest`, fixed beforehand. A column whose output error
    does not fall stays rounded to nearest. Zeros stay zeros, as in Frantar & Alistarh 2023, "SparseGPT: Massive
    Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774, section 3.5: what they should take up goes
    on to the rows after them.

    Args:
        weight: Shape (inputs, outputs), finite float32.
        grouping: Of that shape: groups lie along the inputs, or are whole columns, or the whole matrix.
        width: The integers.
        products: X^T X of the layer's inputs, shape (inputs, inputs), float64.

    Returns:
        The codes, in the shape of the grouping.
    """
    plain = nearest(weight, grouping, width)
    rows, columns = weight.shape
    energy = np.diag(products)
    order = np.argsort(-energy, kind="stable")
    factor = _inverse_factor(products[np.ix_(order, order)])
    if factor is None:
        return plain
    scale = _by_row(plain.scale, rows, columns)
    zero = None if plain.zero is None else _by_row(plain.zero, rows, columns)
    left = weight[order].astype(np.float32)
    codes = np.empty((rows, columns), np.float32)
    for start in range(0, rows, BLOCK):
        end = min(start + BLOCK, rows)
        errors = np.empty((end - start, columns), np.float32)
        for row in range(start, end):
            place = order[row]
            offset = np.float32(0) if zero is None else zero[place].astype(np.float32)
            code = np.clip(np.rint(left[row] / scale[place]) + offset, width.low, width.high)
            code = np.where(weight[place] == 0, offset, code)
            codes[place] = code
            error = (left[row] - (code - offset) * scale[place]) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], error)
            errors[row - start] = error
        left[end:] -= factor[start:end, end:].T @ errors
    made = Codes(codes.astype(plain.codes.dtype).reshape(grouping.shape), plain.scale, plain.zero)
    better = output_error(weight, made, products) < output_error(weight, plain, products)
    mixed = np.where(better, made.codes.reshape(rows, columns), plain.codes.reshape(rows, columns))
    return Codes(mixed.reshape(grouping.shape), plain.scale, plain.zero)


def output_error(weight: Array, made: Codes, products: Array) -> Array:
    """What GPTQ minimises: the squared error of each output over the data, shape (outputs,)."""
    error = made.decode().reshape(weight.shape).astype(np.float64) - weight
    return np.asarray(np.sum(error * (products @ error), axis=0))


def _by_row(values: Array, rows: int, columns: int) -> Array:
    """One value for each row and column, from one for each group: a view that repeats where it can."""
    flat = values.reshape(-1, values.shape[-1])
    if len(flat) > 1:
        flat = np.repeat(flat, rows // len(flat), axis=0)
    return np.broadcast_to(flat, (rows, columns))


def _inverse_factor(products: Array) -> Array | None:
    """The upper Cholesky factor of the damped inverse; None where the data say nothing at all."""
    mean = float(np.mean(np.diag(products)))
    if not np.isfinite(mean) or mean <= 0:
        return None
    damping = DAMPING * mean
    for _ in range(DAMPING_TRIES):
        damped = products + np.eye(len(products)) * damping
        try:
            factor = np.linalg.cholesky(np.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        return np.ascontiguousarray(factor, np.float32)
    return None
