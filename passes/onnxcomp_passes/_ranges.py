"""The range of an activation that makes the smallest error behind the function that reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.calibration import Percentile

__all__ = ["best_range", "response"]

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]

SHARES = np.linspace(1.0, 0.2, 41)
"""Shares of an end of the range that are tried."""

ROUNDS = 2
LEVELS = 255


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))))


FUNCTIONS: dict[str, Function] = {
    "Sigmoid": _sigmoid,
    "HardSigmoid": lambda x: np.clip(x / 6 + 0.5, 0.0, 1.0),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0.0),
}


def response(tensor: gs.Tensor) -> Function | None:
    """The function that all readers of a tensor apply to it, as far as one is known: SiLU, Sigmoid, HardSwish, ..."""
    readers = {id(node): node for node in tensor.outputs}.values()
    ops = sorted(node.op for node in readers)
    if ops in (["Mul", "Sigmoid"], ["HardSigmoid", "Mul"]):
        gate = next(node for node in readers if node.op != "Mul")
        product = next(node for node in readers if node.op == "Mul")
        if any(other is gate.outputs[0] for other in product.inputs):
            return (lambda x: x * _sigmoid(x)) if gate.op == "Sigmoid" else FUNCTIONS["HardSwish"]
    return FUNCTIONS.get(ops[0]) if len(ops) == 1 else None


def best_range(seen: Percentile, function: Function | None = None) -> tuple[float, float]:
    """The range whose 8-bit grid makes the smallest mean squared error.

    Args:
        seen: The values, as a histogram.
        function: What is applied to them next; the error is that of its result.

    Returns:
        (low, high), inside what was seen; zero is always covered.
    """
    values, counts = seen.bins()
    if not len(values):
        return seen.range()
    wanted = function(values) if function else values

    def cost(low: float, high: float) -> float:
        step = (high - low) / LEVELS
        if step <= 0.0:
            return float("inf")
        zero = np.rint(-low / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, LEVELS) - zero) * step
        error = (function(rounded) if function else rounded) - wanted
        return float(np.dot(np.square(error), counts))

    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    full = low, high
    for _ in range(ROUNDS):
        if full[1] > 0:
            high = float(min(SHARES * full[1], key=lambda end: cost(low, end)))
        if full[0] < 0:
            low = float(min(SHARES * full[0], key=lambda end: cost(end, high)))
    return low, high
