"""Integer codes of weights, and the numbers behind them that are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from onnxcomp.model import value_of
from onnxcomp.torch_bridge.dtypes import INTEGER_RANGES
from onnxcomp.torch_bridge.registry import NodeCall
from onnxcomp.torch_bridge.weights import Held, kind_of

__all__ = ["WITHIN", "Code", "codes_of", "is_pruned"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Code:
    """What turns the numbers behind a weight into what the graph holds: the call of that step, and of its inverse."""

    call: NodeCall
    back: NodeCall
    inputs: tuple[str, ...]


PRUNED_FROM = 3.0
"""Rounding makes at most about twice as many zeros as ones (of values that fall off as exp(-|x|) in steps)."""


def is_pruned(codes: Tensor) -> bool:
    """Whether there are more zeros among codes than rounding makes."""
    zeros, ones = int((codes == 0).sum()), int((codes.abs() == 1).sum())
    return zeros > PRUNED_FROM * max(1.0, ones / 2)


WITHIN = 0.499
"""How far from its code a number may start, in steps, for rounding to lead back to the code."""


def codes_of(held: Held) -> Code:
    """How numbers become the codes that a DequantizeLinear reads."""
    node = held.readers[0].node
    inputs = tuple(tensor.name for tensor in node.inputs[1:])
    kind = kind_of(held)
    attrs = {key: node.attrs[key] for key in ("axis", "block_size") if key in node.attrs}
    own = {"output_dtype": kind, "range": _grid(value_of(held.constant), kind)}
    call = NodeCall(held.name, "QuantizeLinear", attrs={**attrs, **own}, input_types=(0, 0, kind))
    return Code(call, NodeCall(held.name, "DequantizeLinear", attrs=attrs), inputs)


def _grid(codes: Array, kind: int) -> tuple[float, float]:
    """The smallest and the largest code that may come: as many bits as codes fill, symmetric where they are.

    Weights of 4 bits that are held as int8 stay in 4 bits, and those that leave -128 out go on leaving it out.
    """
    low, high = INTEGER_RANGES[kind]
    if kind == TensorProto.INT32:
        return -math.inf, math.inf
    if low == 0 or not codes.size:
        return low, high
    values = codes.astype(np.int64)
    bits = max(2, int(max(values.max(), -values.min() - 1, 0)).bit_length() + 1)
    top = 2 ** (bits - 1) - 1
    return (-top if values.min() >= -top else -top - 1), top
